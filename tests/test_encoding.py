"""The Encoding section: whatever an event holds, its line is what DuckDB reads back."""

from __future__ import annotations

import datetime
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import table_rows, words
from hypothesis import given, settings
from hypothesis import strategies as st

import mxcp_audit
from mxcp_audit import AuditLogger

MOMENT_NS = 1_700_000_000_123_456_789


def encode(clock_ns: int = MOMENT_NS, max_input_bytes: int = 2**20, **event: Any) -> dict[str, Any]:
    """Encode one event and return the line, decoded as strictly as DuckDB does it."""
    encoder = mxcp_audit.Encoder(
        mxcp_audit.Redactor(), max_input_bytes=max_input_bytes, clock=lambda: clock_ns
    )
    given_fields = {
        **{"caller": "http", "event_type": "tool", "name": "x", "duration_ms": 1, "policy_decision": "n/a"},
        **{"reason": None, "status": "success", "error": None, "user_id": None, "session_id": None},
        "trace_id": None,
        **event,
    }
    echoes: list[str] = []
    input_json = encoder.input_json(
        given_fields.pop("input_params", None),
        given_fields["name"],
        given_fields.pop("endpoint_def", None),
        echoes,
    )
    line = mxcp_audit.finish_line(encoder.line(input_json=input_json, echoes=echoes, **given_fields), 7)
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    mxcp_audit.event_of_line(line[:-1])
    decoded = json.loads(line.decode("utf-8"), parse_constant=pytest.fail)
    assert isinstance(decoded, dict)
    return decoded


def test_line_of_a_plain_event_has_the_columns_in_order() -> None:
    line = encode(input_params={"id": 7})
    left_out = ("segment", *(column.name for column in mxcp_audit.NEW_COLUMNS))
    assert list(line) == [column.name for column in mxcp_audit.COLUMNS if column.name not in left_out]
    assert line["timestamp"] == "2023-11-14T22:13:20.123456Z"
    assert line["input_json"] == '{"id":7}' and line["seq"] == 7


def test_line_of_the_next_second_has_its_own_time() -> None:
    moments = iter([MOMENT_NS, MOMENT_NS + 999_999_999, MOMENT_NS])
    encoder = mxcp_audit.Encoder(mxcp_audit.Redactor(), max_input_bytes=1000, clock=lambda: next(moments))
    times = [
        json.loads(
            encoder.line("cli", "tool", "x", "null", 1, "n/a", None, "success", None, None, None, None, ())
            + b"}"
        )["timestamp"]
        for _ in range(3)
    ]
    assert times == [
        "2023-11-14T22:13:20.123456Z",
        "2023-11-14T22:13:21.123456Z",
        "2023-11-14T22:13:20.123456Z",
    ]


@pytest.mark.parametrize(
    ("more", "recorded", "flag"),
    [
        ([None] * 8, {}, None),
        (
            ["é", None, "::1", "", "7\0", "ValueError"],
            {
                "client": "é",
                "address": "::1",
                "server": "",
                "request_id": "7\ufffd",
                "error_type": "ValueError",
            },
            None,
        ),
        (
            [None] * 6 + [0, {"a": 1, "password": "x"}],
            {"result_bytes": 0, "context": '{"a":1,"password":"[REDACTED]"}'},
            None,
        ),
        ([None] * 6 + [2**63 - 1, {}], {"result_bytes": 2**63 - 1, "context": "{}"}, None),
        ([None] * 6 + [-1], {}, "result_bytes"),
        ([None] * 6 + [True, [1]], {"context": '{"value":[1]}'}, "context is no mapping"),
        ([None, 7] + [None] * 5 + ["x"], {"agent": "7", "context": '{"value":"x"}'}, "context"),
    ],
)
def test_line_with_new_columns_holds_those_that_have_a_value(
    more: list[object], recorded: dict[str, object], flag: str | None
) -> None:
    line = encode(more=(*more, *[None] * (8 - len(more))))
    names = {column.name for column in mxcp_audit.NEW_COLUMNS}
    assert {name: value for name, value in line.items() if name in names} == recorded
    assert line["reason"] is None if flag is None else flag in line["reason"]
    assert list(line)[-1] == "seq"


@pytest.mark.parametrize("field", ["name", "error", "reason", "user_id", "session_id", "trace_id", "caller"])
@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udcff\udcfe.txt", "\ufffdxff\ufffdxfe.txt"),  # FX-061
        ("\ud83d\udc80", "\U0001f480"),
        ("\ud83d\ude00", "\U0001f600"),
        ("line\nbreak\r\t\x1b[2J", "line\nbreak\r\t\x1b[2J"),
        ('quote " back \\u0000 slash \\', 'quote " back \\u0000 slash \\'),
        ("\x7f\x9b\u2028\u202e\U0010ffff", "\x7f\x9b\u2028\u202e\U0010ffff"),
    ],
)
def test_line_with_hostile_text_records_it_safely(field: str, text: str, recorded: str) -> None:
    assert encode(**{field: text})[field] == recorded


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        *(({"a\0b": "x\0"}, '{"a\ufffdb":"x\ufffd"}'), ({"x": "\\u0000"}, '{"x":"\\\\u0000"}')),
        *(({"x": "\\\0\\\\\0"}, '{"x":"\\\\\ufffd\\\\\\\\\ufffd"}'), ({"x": "\ud800é"}, '{"x":"\ufffdé"}')),
        *(({"a\0": 1, "a\ufffd": 2}, '{"a\ufffd":1,"a\ufffd":2}'), ([], "[]"), ({}, "{}")),
    ],
)
def test_input_json_with_nul_or_surrogate_keeps_the_rest(value: object, recorded: str) -> None:
    assert encode(input_params=value)["input_json"] == recorded


def test_input_json_of_none_is_null() -> None:
    assert encode(input_params=None)["input_json"] is None


@pytest.mark.parametrize(
    ("given_ms", "recorded"),
    [
        *((0, 0), (12, 12), (12.6, 13), (-5, 0), (2**31, 2**31 - 1), (10**400, 2**31 - 1)),
        *((math.inf, 2**31 - 1), (-math.inf, 0), (-(10**400), 0), (2**31 - 1 + 0.4, 2**31 - 1)),
        *((math.nan, 0), (True, 1), ("12", 12)),
    ],
)
def test_duration_of_any_number_is_clamped_to_integer(given_ms: Any, recorded: int) -> None:
    line = encode(duration_ms=given_ms)
    assert line["duration_ms"] == recorded and line["reason"] is None


class Hostile:
    def __float__(self) -> float:
        raise ZeroDivisionError

    __str__ = __repr__ = __hash__ = __float__  # type: ignore[assignment]


@pytest.mark.parametrize("given_ms", [None, "soon", [], Hostile()])
def test_duration_that_is_no_number_is_null_and_flagged(given_ms: Any) -> None:
    line = encode(duration_ms=given_ms)
    assert line["duration_ms"] is None and "duration_ms" in line["reason"]


@pytest.mark.parametrize(
    ("field", "column", "value", "recorded"),
    [
        ("event_type", "type", "toool", "toool"),
        ("event_type", "type", None, "null"),
        ("event_type", "type", ["tool"], '["tool"]'),
        ("status", "status", "ok", "ok"),
        ("policy_decision", "policy_decision", "denied", "denied"),
    ],
)
def test_line_with_a_wrong_word_keeps_it_and_flags_it(
    field: str, column: str, value: Any, recorded: str
) -> None:
    line = encode(**{field: value, "reason": "because"})
    assert line[column] == recorded
    assert line["reason"].startswith("because; mxcp_audit: ") and field in line["reason"]


def test_line_without_policy_decision_is_not_flagged() -> None:
    line = encode(policy_decision=None)
    assert line["policy_decision"] == "n/a" and line["reason"] is None


def test_line_with_hostile_objects_everywhere_is_made_all_the_same() -> None:
    fields = tuple(words("caller event_type name reason status error user_id session_id trace_id"))
    line = encode(input_params={"x": Hostile()}, **{name: Hostile() for name in fields})
    assert line["name"] and line["input_json"]


def test_input_json_over_the_limit_is_cut_and_stays_valid() -> None:
    line = encode(input_params={"text": "é" * 5000, "id": 7}, max_input_bytes=1000)
    assert len(line["input_json"].encode()) <= 1000
    assert json.loads(line["input_json"])


@pytest.mark.parametrize(("length", "count", "most"), [(1, 2500, 1024), (600, 50, 0)])
def test_names_in_any_number_don_t_fill_the_memory(length: int, count: int, most: int) -> None:
    encoder = mxcp_audit.Encoder(mxcp_audit.Redactor(), max_input_bytes=1000)
    for number in range(count):
        name, none = f"{number}" * length, [None] * 7
        encoder.line(
            "cli", "tool", name, "null", 1, "n/a", None, "success", None, *none[:3], (), (name, *none)
        )
    assert len(encoder._cache) <= most


def test_input_changed_after_the_call_is_recorded_as_it_was(tmp_path: Path) -> None:
    audit = AuditLogger(tmp_path / "log.duckdb")
    arguments: dict[str, Any] = {"items": [1]}
    audit.log_event("cli", "tool", "direct", arguments)
    with audit.record("tool", "call", arguments):
        arguments["items"].append(2)
        arguments["later"] = True
    audit.shutdown()
    assert table_rows(tmp_path / "log.duckdb", "SELECT DISTINCT input_json FROM logs") == [('{"items":[1]}',)]


TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(
    events=st.lists(st.tuples(TEXT, TEXT, st.dictionaries(TEXT, PLAIN, max_size=4)), min_size=20, max_size=60)
)
@settings(max_examples=4)
def test_line_of_any_event_reaches_the_table_as_it_was_encoded(
    tmp_path_factory: pytest.TempPathFactory, engine: str, events: list[tuple[str, str, dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    audit = AuditLogger(folder / "log.duckdb")
    for name, error, arguments in events:
        audit.log_event("cli", "tool", name, arguments, 1, status="error", error=error)
    assert audit.flush(60)
    assert audit.counters.rejected == 0 and audit.counters.errors == 0
    audit.shutdown()
    rows = table_rows(folder / "log.duckdb", "SELECT name, error, input_json FROM logs ORDER BY segment, seq")
    assert len(rows) == len(events)
    lines = [encode(name=n, error=e, status="error", input_params=a) for n, e, a in events]
    assert rows == [(line["name"], line["error"], line["input_json"]) for line in lines]


SOUND = {"timestamp": "2026-01-01T00:00:00.000000Z", "seq": 1, "name": "x"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *(
            (json.dumps({**SOUND, **change}).encode(), next(iter(change)))
            for change in (
                *({"seq": None}, {"seq": "1"}, {"seq": 2**31}, {"seq": True}),
                {"timestamp": "2026-13-01T00:00:00.000000Z"},
                *({"timestamp": "2026-01-01T23:59:61.000000Z"}, {"timestamp": ""}, {"name": 5}),
                {"duration_ms": 1.5},
            )
        ),
        (b"\xff", "UTF-8"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"[" * 100_000, "JSON"),
    ],
    ids=lambda part: None if isinstance(part, str) else part[:60].decode("ascii", "replace"),
)
def test_event_of_a_damaged_line_raises_with_the_reason(line: bytes, reason: str) -> None:
    assert mxcp_audit.event_of_line(json.dumps(SOUND).encode()) == SOUND
    with pytest.raises(ValueError, match=reason):
        mxcp_audit.event_of_line(line)


def test_encoder_shared_by_threads_never_mixes_seconds() -> None:
    start = MOMENT_NS // 10**9 * 10**9
    ticks = iter(range(100_000))
    encoder = mxcp_audit.Encoder(
        mxcp_audit.Redactor(), max_input_bytes=1000, clock=lambda: start + (next(ticks) % 2) * 10**9 + 5000
    )
    wrong: list[str] = []
    valid = {
        datetime.datetime.fromtimestamp(start // 10**9 + second, datetime.timezone.utc).strftime(
            "%Y-%m-%dT%H:%M:%S.000005Z"
        )
        for second in (0, 1)
    }

    def work() -> None:
        for _ in range(2000):
            line = encoder.line(
                "cli", "tool", "x", "null", 1, "n/a", None, "success", None, None, None, None, ()
            )
            if json.loads(line + b"}")["timestamp"] not in valid:
                wrong.append(str(line))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("field", "limit"),
    [(name, 1024) for name in ("caller", "event_type", "name", "policy_decision", "status", "user_id")]
    + [(name, 1024) for name in ("session_id", "trace_id")]
    + [(name, 2**16) for name in ("reason", "error")],
)
@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "\0"])
def test_line_fields_are_cut_visibly(field: str, limit: int, character: str) -> None:
    value = character * 200_000
    text = encode(**{field: value})["type" if field == "event_type" else field]
    assert limit - 10 < len(text.encode()) <= limit
    assert text.endswith(f"…[CUT: {len(value.encode())} bytes]") and text[0] in (
        character,
        mxcp_audit.REPLACEMENT,
    )


def test_line_a_secret_where_a_text_is_cut_leaves_no_half() -> None:
    for start in range(2**17 - 40, 2**17, 7):
        error = "x " * (start // 2) + "password=hunter2hunter2hunter2 " + "y" * 1000
        assert "hunter2" not in encode(error=error)["error"]
    many = "password=hunter2hunter2hunter2hunter2 " * 5000  # much shorter without them
    assert "hunter2" not in encode(error=many)["error"] and "[CUT: " in encode(error=many)["error"]
