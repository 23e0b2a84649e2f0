"""What people and programs read: nothing acts on a terminal, everything lines up, data stays exact."""

from __future__ import annotations

import codecs
import csv
import io
import json
import random
from typing import Any

import pytest

from mxcp_audit import (
    PUBLIC_COLUMNS,
    clip,
    display_width,
    escaped,
    indented_json,
    json_text,
    pad,
    printable,
    summary,
    write_csv,
    write_events,
    write_fields,
    write_grid,
    write_json,
    write_stats,
    write_text,
)

EVENT = {
    **{"timestamp": "2026-01-02T03:04:05.678901Z", "caller": "http", "type": "tool", "name": "get_user"},
    **{"input_json": '{"a":1}', "duration_ms": 12, "policy_decision": "n/a", "status": "success"},
    "event_id": "20260102T030405678901Z-00000000:1",
}
HOSTILE = (
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9b\x9d\xad\u200b\u200e\u202e\u2028\u2029\u2066\ufeff\ue000"
)

BELOW = ("reason", "error", "input_json")


def row(**changes: Any) -> tuple[Any, ...]:
    return tuple({**EVENT, **changes}.get(name) for name in PUBLIC_COLUMNS)


class Text(io.TextIOWrapper):
    """A text file of a certain encoding, as `main` sets standard output up."""

    def __init__(self, encoding: str = "utf-8") -> None:
        codecs.register_error("escaped", escaped)
        super().__init__(io.BytesIO(), encoding=encoding, errors="escaped", newline="")

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined,no-any-return]


def harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def table(rows: list[Any], *, encoding: str = "utf-8", width: int | None = None, **options: Any) -> str:
    file = Text(encoding)
    write_events(file, rows, **{"width": width, "colour": False, **options})
    return file.getvalue()


def test_printable_leaves_nothing_that_a_terminal_acts_on() -> None:
    assert printable("plain é 日本 🦆") == "plain é 日本 🦆"
    for code in [*range(0x300), *range(0x2000, 0x2100), 0xFEFF, 0xE000, 0xE0001, 0x10FFFF]:
        shown = printable(chr(code))
        assert shown.isprintable() and shown, hex(code)
    assert printable("a\x1b[2J\nb") == "a\\x1b[2J\\nb"


@pytest.mark.parametrize(
    ("text", "width"),
    [("abc", 3), ("日本", 4), ("e\u0301", 1), ("ｆｕｌｌ", 8), ("🦆", 2), ("ﾊﾝ", 2), ("각", 2), ("", 0)],
)
def test_display_width_counts_cells(text: str, width: int) -> None:
    assert display_width(text) == width


def test_clip_and_pad_fill_exactly() -> None:
    chance = random.Random(3)
    for _ in range(2000):
        text = "".join(chance.choices("abc 日本語é🦆\u0301\u0327ｶ", k=chance.randint(0, 30)))
        for width in (1, 2, 3, 7, 20):
            shown = clip(text, width)
            assert display_width(shown) in (min(display_width(text), width), width - 1)
            assert shown == text or (shown[-1] == "…" and text.startswith(shown[:-1]))
            assert display_width(pad(shown, width)) == display_width(pad(shown, width, right=True)) == width
    assert clip("abcdef", 4) == "abc…" and clip("日本語", 4) == "日…" and clip("x", None) == "x"
    assert clip("x", 0) == ""


def test_table_hostile_values_are_escaped_in_every_place() -> None:
    bad = row(**{name: f"x{HOSTILE}" for name in PUBLIC_COLUMNS if name != "duration_ms"})
    for options in ({}, {"columns": PUBLIC_COLUMNS}, {"below": BELOW}, {"width": 60, "below": BELOW}):
        assert harmless(table([bad], **options))  # type: ignore[arg-type]


def test_table_fits_the_terminal_and_lines_up() -> None:
    rows = [row(name="日本語の道具" * 5), row(name="short", duration_ms=1234567), row(name="e\u0301" * 50)]
    for width in (40, 60, 80, 100, 200):
        lines = table(rows, width=width).splitlines()
        assert len(lines) == 4
        assert all(display_width(line) <= width for line in lines), width
    lines = table(rows, width=100).splitlines()
    places = {
        display_width(line[: line.index(word)]) for line, word in zip(lines, ["STATUS"] + ["success"] * 3)
    }
    assert len(places) == 1


def test_table_grows_without_moving_when_rows_come_later() -> None:
    file, widths = Text(), list[int]()
    for rows in ([row(name="a")], [], [row(name="longer_name", status="error", error="broken")]):
        write_events(file, rows, width=100, colour=False, widths=widths)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4 and lines[3] == "    error: broken"
    assert lines[0].index("STATUS") == lines[1].index("success") == lines[2].index("error")


def test_table_reason_and_error_stand_under_their_row_unless_columns_are_chosen() -> None:
    bad = row(status="error", error="no\ndice", reason="because", policy_decision="deny")
    assert table([bad]).splitlines()[2:] == ["    reason: because", "    error: no\\ndice"]
    chosen = table([bad], columns=("name", "error"), below=())
    assert chosen.splitlines()[1:] == ["get_user  no\\ndice"]


def test_table_colours_only_when_asked() -> None:
    bad = row(status="error")
    assert "\x1b" not in table([bad])
    assert table([bad], colour=True).splitlines()[1].startswith("\x1b[31m")


def test_table_ascii_terminal_gets_ascii() -> None:
    assert table([row(name="日本" * 20)], encoding="ascii", width=60).isascii()
    assert "\\u65e5" in table([row(name="日本")], encoding="ascii")
    assert "日本" in table([row(name="日本")])


def test_table_input_is_whole() -> None:
    text = json.dumps({"key": "long " * 50})
    lines = table([row(input_json=text)], width=60, below=("input_json",)).splitlines()
    assert lines[2:] == [f"    {text}"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_reads_back_equal_and_is_harmless(encoding: str) -> None:
    rows = [row(name=HOSTILE + "é日本🦆", error=None), row()]
    file = Text(encoding)
    write_json(file, iter(rows))
    file.getvalue().encode(encoding)
    assert harmless(file.getvalue())
    assert json.loads(file.getvalue()) == [dict(zip(PUBLIC_COLUMNS, each)) for each in rows]
    empty = Text()
    write_json(empty, [])
    assert json.loads(empty.getvalue()) == []


def test_json_lines_are_one_object_a_line() -> None:
    file = Text()
    write_json(file, [row(name="a\nb"), row()], by_line=True)
    assert [json.loads(line)["name"] for line in file.getvalue().splitlines()] == ["a\nb", "get_user"]


@pytest.mark.parametrize(
    "text",
    [
        *('{"a":1,"b":[1,{},[],{"c":"d,:[]{}\\"\\\\"}],"e":null}', "[]", "{}", "1.5", '"text"'),
        *('{"é": [1, 2.5]}', r'{"\u00e9": "a"}', "[123456789012345678901234567890]", "[" * 50 + "]" * 50),
    ],
)
def test_indented_json_changes_nothing_but_blanks(text: str) -> None:
    assert indented_json(text) == json.dumps(json.loads(text), indent=2, ensure_ascii=text.isascii())


@pytest.mark.parametrize(
    "text", ["", "no JSON", '{"a":', "[" * 100_000, "1.50", '{"a":1,"a":2}', "[1e400]", '{"a":1, "b":2}']
)
def test_indented_json_leaves_what_it_would_change(text: str) -> None:
    assert indented_json(text) == text


def test_grid_numbers_go_right_and_long_text_is_cut() -> None:
    file = Text()
    write_grid(file, ("name", "n"), [("日本", 1), (None, 23456), ("x" * 100 + HOSTILE, None)], width=40)
    lines = file.getvalue().splitlines()
    assert harmless(file.getvalue())
    assert all(display_width(line) <= 40 for line in lines)
    assert lines[1].endswith("    1") and lines[2].endswith("23456") and lines[2].startswith("-")
    nothing = Text()
    write_grid(nothing, ("a", "b"), [], width=None)
    assert nothing.getvalue() == "a  b\n"


STATS = [
    ("slow", 1000, 10, 1, 5, 500, 900, 12345, *["2026-01-02T03:04:05.678901Z"] * 2, 0),
    ("日本語", 1, 0, 0, 5, 5, 5, 5, *["2026-01-02T03:04:05.678901Z"] * 2, 0),
    (None, 0, 0, 0, None, None, None, None, None, None, 0),
]


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_stats_bars_fit_the_terminal(width: int) -> None:
    file = Text()
    write_stats(file, "name", STATS, bar="calls", width=width)
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    if width >= 80:
        assert all(display_width(line) <= width for line in lines)
        bars = [line.count("█") for line in lines]
        assert bars[1] > 3 and bars[2] == 1 and bars[3] == bars[0] == 0
    assert ("FIRST SEEN" in lines[0], "LAST SEEN" in lines[0]) == (width >= 100, width >= 80)


def test_stats_show_what_runs_only_where_something_does() -> None:
    for running in (0, 3):
        file = Text()
        write_stats(file, "name", [(*STATS[0][:10], running), *STATS[1:]], bar="calls", width=100)
        assert ("RUNNING" in file.getvalue()) is bool(running)


def test_stats_ascii_terminal_and_pipe() -> None:
    ascii_file, pipe = Text("ascii"), Text()
    write_stats(ascii_file, "name", STATS, bar="p95_ms", width=100)
    assert ascii_file.getvalue().isascii() and "####" in ascii_file.getvalue()
    write_stats(pipe, "name", STATS, bar="calls", width=None)
    assert "FIRST SEEN" in pipe.getvalue() and "█" not in pipe.getvalue()


def test_csv_reads_back_equal_and_neutralises_formulas() -> None:
    file = io.StringIO()
    write_csv(file, ("a", "b", "c"), [("=1", -5, [1]), ('x\r\ny,"', None, True)], raw=False)
    file.seek(0)
    assert list(csv.reader(file)) == [["a", "b", "c"], ["'=1", "-5", "[1]"], ['x\r\ny,"', "", "true"]]
    raw = io.StringIO()
    write_csv(raw, ("a",), [("=1",)], raw=True)
    assert raw.getvalue() == "a\n=1\n"


def test_fields_and_text_are_harmless() -> None:
    file = Text()
    write_fields(file, {"name": HOSTILE.replace("\n", ""), "error": "a\x1b\nb", "reason": None})
    write_text(file, "{\n\x1b}")
    assert harmless(file.getvalue())
    assert file.getvalue().endswith("error\n  a\\x1b\n  b\nreason           -\n{\n\\x1b}\n")


def test_json_text_escapes_in_every_place() -> None:
    value = {HOSTILE: [HOSTILE]}
    for indent in (None, 2):
        text = json_text(value, indent)
        assert harmless(text) and json.loads(text) == value


def test_summary_counts() -> None:
    assert summary(0, "event", 100) == "0 events"
    assert summary(2, "group", 2) == "2 groups (there may be more: --limit)"
