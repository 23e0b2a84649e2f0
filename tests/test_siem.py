"""The stream with its cursor, the forms of other systems by their own schemas, the report, the gauges."""

from __future__ import annotations

import contextlib
import html.parser
import http.server
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Cli, words, write_table_of_mxcp
from forms import CHECKS

from mxcp_audit import AuditLogger

HOSTILE = (
    *("", "x", '"', "\\", "\x01", "\u2028ü😀", "</script><script>alert(1)</script>", '{"a":1}', "null"),
    *("::1", "127.0.0.1", "ab" * 16, "a" * 3000, "\ud800", "=1+1"),
)
TEXTS = tuple(words("user_id session_id trace_id client agent address server request_id error_type"))
COUNT = 800


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of events that hold whatever may stand in them."""
    path = tmp_path_factory.mktemp("siem é") / "log.duckdb"
    dice = random.Random(7)

    def text() -> str | None:
        return dice.choice((*HOSTILE, None))

    with AuditLogger(path) as audit:
        for number in range(COUNT):
            agent = dice.choice((None, {"mcp.protocol.version": "2026-07-28", "user_agent.original": text()}))
            audit.log_event(
                text() or "http",
                dice.choice(("tool", "resource", "prompt")),
                f"{number % 5} {text()}",
                {"a": text(), "b": [number]},
                dice.choice((0, 5, 2**40)),
                dice.choice(("allow", "deny", "warn", "n/a")),
                text(),
                dice.choice(("success", "error")),
                text(),
                **{name: text() for name in TEXTS},  # type: ignore[arg-type]
                result_bytes=dice.choice((None, 0, 77)),
                context=agent,
            )
    return path


# --- what is new since the cursor


def names_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["name"] for line in done.stdout.splitlines()]


def test_cursor_gives_each_event_once_whether_ingested_or_not(cli: Cli, tmp_path: Path, engine: str) -> None:
    log = tmp_path / "log.duckdb"
    new = ("log", "--db", str(log), "--format", "jsonl", "--cursor-file", str(tmp_path / "cursor"))
    with AuditLogger(log, flush_interval=3600) as audit:
        audit.log_event("cli", "tool", "a")
        audit.wait_written()
        assert names_of(cli(*new)) == ["a"]
        audit.log_event("cli", "tool", "b")
        audit.flush()
        audit.log_event("cli", "tool", "c")
        audit.wait_written()
        assert sorted(names_of(cli(*new)) + names_of(cli(*new))) == ["b", "c"]
        audit.log_event("cli", "tool", "d")
    assert names_of(cli(*new)) == ["d"]
    assert names_of(cli(*new)) == []


def test_cursor_that_a_purge_overtook_tells_of_the_gap(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "log.duckdb"
    new = ("log", "--db", str(log), "--format", "jsonl", "--cursor-file", str(tmp_path / "cursor"))
    with AuditLogger(log) as audit:
        audit.log_event("cli", "tool", "read")
    assert names_of(cli(*new)) == ["read"]
    with AuditLogger(log) as audit:
        for _ in range(3):
            audit.log_event("cli", "tool", "unread")
    time.sleep(1.1)
    assert cli("purge", "--db", str(log), "--older-than", "1s").returncode == 0
    (gap,) = map(json.loads, cli(*new).stdout.splitlines())
    assert (gap["type"], gap["status"], gap["input_json"]) == ("gap", "error", '{"events":3}')
    assert names_of(cli(*new)) == []


CURSOR = '{"version": %d, "journals": {"x": %s}, "segments": {}}'


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", CURSOR % (2, 1), CURSOR % (1, "null"), CURSOR % (1, "[" * 99_999), "\\x00"]
)
def test_cursor_that_is_none_of_ours_is_refused(cli: Cli, log: Path, tmp_path: Path, text: str) -> None:
    cursor = tmp_path / "cursor"
    cursor.write_text(text)
    done = cli("log", "--db", str(log), "--format", "ecs", "--cursor-file", str(cursor))
    assert (done.returncode, done.stdout) == (2, "") and str(cursor) in done.stderr
    assert cursor.read_text() == text


def test_cursor_that_cannot_be_written_is_named(cli: Cli, log: Path, tmp_path: Path) -> None:
    cursor = tmp_path / "missing" / "cursor"
    done = cli("log", "--db", str(log), "--format", "ecs", "--cursor-file", str(cursor))
    assert done.returncode == 1 and f"{cursor} can't be written: No such file" in done.stderr


@contextlib.contextmanager
def receiver(
    answers: list[int], retry_after: str = "Wed, 21 Oct 2015 07:28:00 GMT"
) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A web server that gives these answers, then 200; yields its address and what it accepted."""
    accepted: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            code = answers.pop(0) if answers else 200
            if code == 502:  # a proxy that dies while it says so
                self.wfile.write(b"HTTP/1.1 502 X\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nx")
                return
            if code == 200:
                accepted.append((dict(self.headers), body))
            self.send_response(code)
            self.send_header("Location", "/elsewhere")
            self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(b"said so")

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/logs", accepted
        server.shutdown()


def test_post_tries_again_after_429_and_5xx_and_moves_the_cursor(cli: Cli, log: Path, tmp_path: Path) -> None:
    send = ("log", "--db", str(log), "--format", "otlp", "--cursor-file", str(tmp_path / "cursor"))
    with receiver([429, 502]) as (url, accepted):
        done = cli(*send, "--post", url, "--header", "Authorization=TOKEN", TOKEN="Bearer x")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert sum(len(json.loads(body)["resourceLogs"]) for _, body in accepted) == COUNT
        assert {headers["Authorization"] for headers, _ in accepted} == {"Bearer x"}
        assert all(len(body) <= 2**20 for _, body in accepted)
        before = len(accepted)
        assert cli(*send, "--post", url).returncode == 0 and len(accepted) == before


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        *(("2", "trying again in 2 s"), ("soon", "trying again in 1 s")),
        *((text, "nothing more was sent") for text in ("90", "9" * 40, "Fri, 31 Dec 2199 23:59:59 GMT")),
    ],
)
def test_post_tries_no_sooner_than_the_receiver_asks(cli: Cli, log: Path, asked: str, told: str) -> None:
    with receiver([503], asked) as (url, accepted):
        done = cli("log", "--db", str(log), "--format", "ecs", "--post", url)
    assert f"503: said so; {told}" in done.stderr
    assert bool(accepted) == (done.returncode == 0) == told.startswith("trying")


@pytest.mark.parametrize("code", [400, 302, 303, 308])
def test_post_refused_stops_with_the_answer_and_leaves_the_cursor(
    cli: Cli, log: Path, tmp_path: Path, code: int
) -> None:
    cursor = tmp_path / "cursor"
    with receiver([code]) as (url, accepted):
        done = cli("log", "--db", str(log), "--format", "ecs", "--cursor-file", str(cursor), "--post", url)
    assert done.returncode == 1 and f"{code}: said so" in done.stderr and not accepted and not cursor.exists()
    assert "/v1/logs" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        *(["file:///tmp/pa55"], ["ftp://127.0.0.1:1/pa55"], ["http://me:pa55@127.0.0.1/"]),
        *(["http://127.0.0.1:pa55/"], ["http://[pa55/"], ["http://127.0.0.1/pa55 x"]),
        *(["http://127.0.0.1/pa55ü"], ["http://127.0.0.1:99999/pa55"], ["pa55"]),
        *(["http://127.0.0.1/", "--header", "X=TWO_LINES"], ["http://127.0.0.1/", "--header", "X=ABSENT"]),
        *(["http://127.0.0.1/", "--header", "X Y=TOKEN"], ["http://127.0.0.1/", "--header", "TOKEN"]),
    ],
)
def test_post_to_what_is_no_receiver_is_refused_and_shows_no_secret(
    cli: Cli, log: Path, options: list[str]
) -> None:
    secrets = {"TOKEN": "pa55", "TWO_LINES": "pa55\nX-More: pa55"}
    done = cli("log", "--db", str(log), "--format", "ecs", "--post", *options, **secrets)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert "pa55" not in done.stderr


@pytest.mark.parametrize(
    ("url", "proxy", "told"),
    [
        *(("http://a..b/", "", "is no address"), ("http://127.0.0.1/", "http:/pa55", "is no address")),
        ("http://127.0.0.1/", "x y://127.0.0.1/pa55", "can't be reached"),
    ],
)
def test_post_to_no_address_and_by_no_proxy_ends_in_words(
    cli: Cli, log: Path, monkeypatch: pytest.MonkeyPatch, url: str, proxy: str, told: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: monkeypatch.setattr(time, "monotonic", lambda: 1e9))
    done = cli("log", "--db", str(log), "--format", "ecs", "--post", url, http_proxy=proxy, no_proxy="")
    assert done.returncode in (1, 2) and told in done.stderr
    assert "pa55" not in done.stderr and "Traceback" not in done.stderr


# --- forms


def lines_of(cli: Cli, log: Path, form: str) -> list[Any]:
    done = cli("log", "--db", str(log), "--format", form, "--limit", "100000")
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.split("\n") if line]


@pytest.mark.parametrize("form", CHECKS)
def test_log_in_a_form_is_what_its_own_schema_asks_for(cli: Cli, log: Path, form: str) -> None:
    events = lines_of(cli, log, form)
    assert len(events) == COUNT
    CHECKS[form](events)


@pytest.mark.parametrize("form", CHECKS)
def test_log_in_a_form_takes_rows_of_any_time_and_what_is_nearly_json(
    cli: Cli, tmp_path: Path, form: str
) -> None:
    duckdb = pytest.importorskip("duckdb")
    database = tmp_path / "log.duckdb"
    write_table_of_mxcp(database)
    odd = [
        f"TIMESTAMP '{day} 23:59' AS timestamp"
        for day in ("2300-01-01", "9999-12-31", "0001-01-01", "1969-12-31")
    ]
    odd += [f"'{text}' AS input_json" for text in ('{"a": NaN}', "[-inf]", '{"inf": "NaN"}', '{"a":\n1}')]
    with duckdb.connect(str(database)) as connection:
        for value in odd:
            connection.execute(
                f"INSERT INTO logs SELECT * REPLACE ({value}) FROM logs ORDER BY rowid LIMIT 1"
            )
    lines = cli("log", "--db", str(database), "--format", form).stdout.splitlines()
    assert len(lines) == 1 + len(odd)
    for line in lines:
        event = json.loads(line, parse_constant=pytest.fail)
        for record in event["resourceLogs"][0]["scopeLogs"][0]["logRecords"] if form == "otlp" else ():
            assert 0 <= int(record.get("timeUnixNano", 0)) < 2**64


# --- the report


class Report(html.parser.HTMLParser):
    """The texts of the report's tables, and the tags that it uses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self._title = "head"
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        self._in = tag
        if tag == "h2":
            self._title = ""
        elif tag == "tr":
            self.tables.setdefault(self._title, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self._title += data
        elif self._in in ("td", "th"):
            self.tables[self._title][-1][-1] += data

    @property
    def head(self) -> dict[str, str]:
        return dict(self.tables["head"])


def report_of(cli: Cli, log: Path, *arguments: str) -> Report:
    path = log.parent / "report.html"
    done = cli("report", "--db", str(log), "--out", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o777 == 0o600 and [*log.parent.glob("*.part")] == []
    return Report(path.read_text(encoding="utf-8"))


def test_report_counts_what_stats_counts_and_shows_text_as_text(cli: Cli, log: Path) -> None:
    report = report_of(cli, log)
    assert not report.tags & {"script", "link", "img", "iframe", "form", "object", "embed"}
    assert report.head["calls"] == f"{COUNT:,}" and report.head["verify"].startswith("intact")
    text = (log.parent / "report.html").read_text(encoding="utf-8")
    for sign in ('<pattern id="hatch"', ">error</text>", ">denied</text>", 'text-anchor="end">0</text>'):
        assert sign in text  # axes, a legend, and a series that differs by more than its colour
    stats = json.loads(cli("stats", "--db", str(log), "--by", "user", "--json").stdout)
    shown = sorted(int(row[1].replace(",", "")) for row in report.tables["Users"][1:])
    assert shown == sorted(row["calls"] for row in stats)
    pages = [re.sub("made at.*?</tr>", "", (log.parent / "report.html").read_text()) for _ in range(1)]
    report_of(cli, log)
    assert pages == [re.sub("made at.*?</tr>", "", (log.parent / "report.html").read_text())]


def test_report_shows_what_runs_and_what_was_never_finished(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "log.duckdb"
    script = """
import os, sys
from mxcp_audit import AuditLogger
audit = AuditLogger(sys.argv[1], strict=True)
with audit.record("tool", "cut off"):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, str(log)], check=True, cwd=ROOT)
    with AuditLogger(log, strict=True) as audit, audit.record("tool", "at work", user_id="ann"):
        report = report_of(cli, log)
    assert [row[1:3] for row in report.tables["Running calls"][1:]] == [["at work", "ann"]]
    assert [row[1] for row in report.tables["Unfinished calls"][1:]] == ["cut off"]


def test_report_takes_the_filters_of_log(cli: Cli, log: Path) -> None:
    stats = cli("stats", "--db", str(log), "--by", "policy", "--policy", "denied", "--json")
    (denied,) = json.loads(stats.stdout)
    assert report_of(cli, log, "--policy", "denied").head["calls"] == f"{denied['calls']:,}"
    assert report_of(cli, log, "--tool", "no such tool").head["calls"] == "0"


def test_report_takes_rows_of_any_time(cli: Cli, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    write_table_of_mxcp(tmp_path / "log.duckdb")
    for moments, first in ((["infinity"], ""), (["-infinity", "9999-12-31", "0001-01-01"], "0001-01-01")):
        with duckdb.connect(str(tmp_path / "log.duckdb")) as connection:
            connection.execute("UPDATE logs SET timestamp = 'infinity'")
            for moment in moments:
                connection.execute(
                    f"INSERT INTO logs SELECT * REPLACE ('{moment}' AS timestamp) FROM logs LIMIT 1"
                )
        head = report_of(cli, tmp_path / "log.duckdb").head
        assert head["first event"].startswith(first) and "inf" not in head["last event"]


@pytest.mark.parametrize("width", [1280, 400])
def test_report_in_a_browser_is_drawn(cli: Cli, log: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    report_of(cli, log)
    picture = tmp_path / "report.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    command += [f"--screenshot={picture}", (log.parent / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists() and picture.stat().st_size > 10_000, done.stderr[-500:]
    assert "Refused" not in done.stderr


def test_doctor_prometheus_is_parsed_by_its_client(cli: Cli, log: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    done = cli("doctor", "--db", str(log), "--prometheus")
    assert done.returncode == 0, done.stderr
    families = [*parser.text_string_to_metric_families(done.stdout)]
    found = [sample for family in families for sample in family.samples]
    assert {family.type for family in families} == {"gauge"} and len({f.name for f in families}) > 5
    samples = {sample.name: sample.value for sample in found}
    assert str(log.parent) in {sample.labels.get("path") for sample in found}
    assert samples["mxcp_audit_database_events"] == COUNT
    assert samples["mxcp_audit_healthy"] == 1
