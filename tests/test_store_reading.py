"""Table and journal read as one log, exports, statistics and SQL, on both engines."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SAFETY_SECONDS, held_database, one_engine, wait_until, words, write_table_of_mxcp

import mxcp_audit
from mxcp_audit import (
    AuditLogger,
    DatabaseLockedError,
    DatabaseNotFoundError,
    Filter,
    QueryError,
    Store,
    StoreError,
    config_from_arguments,
)

HOSTILE = (
    *("x' OR '1'='1", "'; DROP TABLE logs; --", "a\n.shell touch pwned\n", ";\n.shell touch pwned\n;"),
    *("$$;\n.shell touch pwned\n$$", '"quoted"', "back\\slash", "100%_sure", "$name", "🦆\u202e\x1b[2J", ""),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(config_from_arguments(tmp_path / "log.duckdb"))


def log(audit: AuditLogger, name: str, **fields: Any) -> None:
    audit.log_event(**{"caller": "cli", "event_type": "tool", "name": name, **fields})  # type: ignore[arg-type]


def live_segment(store: Store, *events: dict[str, Any]) -> mxcp_audit.Segment:
    """Return a segment with these events that nobody ingests before it is sealed."""
    encoder = mxcp_audit.Encoder(mxcp_audit.Redactor(), max_input_bytes=1 << 20)
    segment = store.journal.open_segment()
    for seq, event in enumerate(events, 1):
        fields = {
            **{
                "caller": "cli",
                "event_type": "tool",
                "duration_ms": 0,
                "policy_decision": "n/a",
                "reason": None,
            },
            **{"status": "success", "error": None, "user_id": None, "session_id": None, "trace_id": None},
            **event,
        }
        fields["input_json"] = encoder.input_json(fields.pop("input_params", None), "", None, None)
        segment.append(mxcp_audit.finish_line(encoder.line(**fields, echoes=()), seq), 1)  # type: ignore[arg-type]
    return segment


EVENTS = [{"name": f"t{n}", "input_params": {"n": n}, "duration_ms": n} for n in range(10)]


def fill(database: Path) -> None:
    with AuditLogger(database) as audit:
        for event in EVENTS[:6]:
            log(audit, **event)  # type: ignore[arg-type]


@pytest.fixture
def filled(engine: str, copy_of: Any, store: Store) -> Iterator[Store]:
    """A log of six events in the table and four in a live segment; nothing ingests."""
    copy_of(fill)
    segment = live_segment(store, *EVENTS[6:])
    yield store
    segment.forget()


def names(store: Store, what: Filter = Filter(), **options: Any) -> list[str]:  # noqa: B008 - it is frozen
    with store.reading() as reading:
        assert reading.problem is None
        return [row[3] for row in reading.rows(what, **options)]


def test_reading_table_and_live_segment_are_one_log(filled: Store) -> None:
    assert filled.journal.segments()
    assert names(filled) == [f"t{number}" for number in reversed(range(10))]
    assert names(filled, count=3) == ["t9", "t8", "t7"]
    assert names(filled, count=7, oldest_first=True) == [f"t{number}" for number in range(7)]
    assert names(filled, Filter(min_ms=4, tools=("t5", "t[6]", "t*8", "x")), count=None) == ["t8", "t5"]


@pytest.mark.parametrize("place", ["table", "journal"])
def test_reading_hostile_name_finds_exactly_its_row(
    engine: str,
    place: str,
    tmp_path: Path,
    logger: AuditLogger,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    events = [
        {"name": name, "duration_ms": number, "user_id": name, "error": name, "status": "error"}
        for number, name in enumerate(HOSTILE)
    ]
    if place == "table":
        for event in events:
            log(logger, **event)
        logger.shutdown()
    else:
        live_segment(store, *events).forget()
    with store.reading() as reading:
        for number, name in enumerate(HOSTILE):
            for what in (
                Filter(tools=(name,)),
                Filter(user=name),
                Filter(tools=(name + "*", "y"), user=name),
            ):
                rows = list(reading.rows(what))
                assert [row[5] for row in rows] == [number], what
            assert number in [row[5] for row in reading.rows(Filter(text=name))]
        assert len(list(reading.rows(Filter()))) == len(HOSTILE)
    assert not (tmp_path / "pwned").exists()


def test_reading_without_database_and_journal_names_both_reasons(engine: str, store: Store) -> None:
    with pytest.raises(DatabaseNotFoundError, match="not enabled for the profile, or no events") as caught:
        names(store)
    assert str(store.target.path) in str(caught.value)


def test_reading_older_ten_column_table_shows_it_as_it_is(engine: str, tmp_path: Path, store: Store) -> None:
    write_table_of_mxcp(tmp_path / "log.duckdb")
    with store.reading() as reading:
        (row,) = reading.rows(Filter())
    assert row[0] == "2025-01-01T00:00:00.000000Z" and row[3] == "old" and row[-1] is None


def test_reading_locked_database_shows_the_journal_and_says_who_holds_it(filled: Store) -> None:
    with held_database(Path(filled.target.path)) as holder, filled.reading(wait=0.05) as reading:
        assert isinstance(reading.problem, DatabaseLockedError)
        assert f"PID {holder.pid}" in str(reading.problem)
        shown = [row[3] for row in reading.rows(Filter())]
    assert shown == ["t9", "t8", "t7", "t6"]


def test_reading_corrupt_database_shows_the_journal_and_names_the_file(
    engine: str, tmp_path: Path, store: Store
) -> None:
    (tmp_path / "log.duckdb").write_bytes(b"garbage" * 5000)
    segment = live_segment(store, {"name": "kept"})
    with store.reading() as reading:
        assert "log.duckdb" in str(reading.problem)
        assert [row[3] for row in reading.rows(Filter())] == ["kept"]
    assert (tmp_path / "log.duckdb").read_bytes() == b"garbage" * 5000
    segment.forget()


def test_reading_beside_a_logger_that_ingests_in_the_same_process_sees_every_event_once(
    engine: str, store: Store, logger: AuditLogger
) -> None:
    done = threading.Event()
    flushed = 0

    def record() -> None:
        nonlocal flushed
        while not done.is_set():
            log(logger, f"t{flushed}")
            logger.flush()
            flushed += 1

    log(logger, "first")
    assert logger.flush()
    recorder = threading.Thread(target=record)
    recorder.start()
    try:
        for _ in range(10):
            before = flushed
            with store.reading(wait=SAFETY_SECONDS) as reading:
                assert reading.problem is None
                found = [
                    [row[3] for row in reading.rows(Filter(tools=("t*",)), count=None)] for _ in range(3)
                ]
            for seen in found:
                assert len(seen) == len(set(seen)) and {f"t{number}" for number in range(before)} <= set(seen)
    finally:
        done.set()
        recorder.join()
    assert flushed
    wait_until(lambda: not store.journal.segments(), "what readers kept waiting was not ingested later")


def test_ingest_while_the_same_process_reads_leaves_everything_for_later(
    engine: str, store: Store, logger: AuditLogger
) -> None:
    log(logger, "first")
    assert logger.flush()
    segment = live_segment(store, {"name": "second"})
    with store.reading() as reading:
        segment.seal()
        with pytest.raises(DatabaseLockedError, match="this process"):
            Store(config_from_arguments(store.target.path)).ingest()
        assert [row[3] for row in reading.rows(Filter())] == ["second", "first"]
        # Another reader's end would drop the lock of this one.
        with pytest.raises(DatabaseLockedError, match="this process"):
            store.heads(wait=0)
    assert store.ingest() and not store.journal.segments()
    assert names(store) == ["second", "first"]


def test_reading_while_the_first_segments_are_ingested_loses_none(
    engine: str, tmp_path: Path, store: Store
) -> None:
    """No database yet, so no lock on it: the segments must not vanish under the reader."""
    segment = live_segment(store, {"name": "one"})
    real = store.journal.segments

    def segments() -> list[str]:
        found = real()
        store.journal.segments = real  # type: ignore[method-assign]
        segment.seal()
        Store(config_from_arguments(tmp_path / "log.duckdb")).ingest()
        return found

    store.journal.segments = segments  # type: ignore[method-assign]
    assert names(store) == ["one"]
    assert store.ingest() and not real()
    assert names(store) == ["one"]


# --- export


def export(store: Store, path: Path, form: str, what: Filter = Filter(), **options: Any) -> int:  # noqa: B008
    with store.reading() as reading:
        return reading.export(what, str(path), form=form, **options)


def test_export_every_format_has_all_columns_and_the_filtered_events(filled: Store, tmp_path: Path) -> None:
    what = Filter(min_ms=2)
    with filled.reading() as reading:
        expected = [dict(zip(mxcp_audit.PUBLIC_COLUMNS, row)) for row in reading.rows(what, count=None)]
    assert len(expected) == 8
    for form in mxcp_audit.EXPORT_FORMATS:
        path = tmp_path / f"out.{form}"
        assert mxcp_audit.export_format(str(path)) == form
        assert export(filled, path, form, what) == 8
        assert path.stat().st_mode & 0o777 == 0o600
        if form == "duckdb":
            copy = Store(config_from_arguments(path))
            with copy.reading() as reading:
                found = [dict(zip(mxcp_audit.PUBLIC_COLUMNS, row)) for row in reading.rows(Filter())]
        elif form == "sqlite":
            with contextlib.closing(sqlite3.connect(path)) as file:
                found = [
                    dict(zip(mxcp_audit.PUBLIC_COLUMNS, row)) for row in file.execute("SELECT * FROM logs")
                ]
        else:
            reader = "read_parquet" if form == "parquet" else "read_csv" if form[:3] == "csv" else "read_json"
            kinds = {**dict.fromkeys(mxcp_audit.PUBLIC_COLUMNS, "VARCHAR"), "duration_ms": "BIGINT"}
            types = "" if form == "parquet" else f", columns = {kinds}"
            relation = (
                pytest.importorskip("duckdb").connect().execute(f"SELECT * FROM {reader}('{path}'{types})")
            )
            assert [column[0] for column in relation.description] == list(mxcp_audit.PUBLIC_COLUMNS)
            found = [dict(zip(mxcp_audit.PUBLIC_COLUMNS, row)) for row in relation.fetchall()]
            if form == "parquet":
                for event in found:
                    event["timestamp"] = event["timestamp"].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        assert found == expected, form
    assert not list(tmp_path.glob(".*.part"))
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line) for line in lines] == expected


@one_engine
def test_export_nothing_matches_writes_a_valid_empty_file(filled: Store, tmp_path: Path) -> None:
    for form in ("csv", "json", "jsonl", "parquet", "duckdb", "sqlite"):
        assert export(filled, tmp_path / f"out.{form}", form, Filter(tools=("none",))) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.reader(file)) == [list(mxcp_audit.PUBLIC_COLUMNS)]
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_bc_135_csv_reads_back_cell_by_cell(
    engine: str, tmp_path: Path, logger: AuditLogger, store: Store
) -> None:
    """Python's csv and DuckDB read every cell back, all ASCII and odd characters included."""
    chance = random.Random(7)
    alphabet = (
        [chr(code) for code in range(1, 128)]
        + list('é🦆\u2028\u202e\ufffd\x85\'""",,\r\n\n')
        + ["\r\n", '""']
    )
    texts = ["".join(chance.choices(alphabet, k=chance.randint(0, 12))) for _ in range(600)]
    for number, text in enumerate(texts):
        log(logger, text, duration_ms=number, error=text, user_id=text, session_id=text, caller=text)
    logger.shutdown()
    path = tmp_path / "out.csv"
    assert export(store, path, "csv", raw=True, oldest_first=True) == 600
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    asked = "name, error, user_id, session_id, caller, duration_ms"
    by_duckdb = (
        pytest.importorskip("duckdb")
        .connect()
        .execute(
            f"SELECT {asked} FROM read_csv(?, header = true, all_varchar = true, delim = ',', quote = '\"', "
            "escape = '\"', "
            "allow_quoted_nulls = false, nullstr = '\x7fnone') ORDER BY duration_ms::INTEGER",
            [str(path)],
        )
        .fetchall()
    )
    for number, text in enumerate(texts):
        row = rows[number]
        assert [row[key] for key in ("name", "error", "user_id", "session_id", "caller")] == [text] * 5
        assert [value or "" for value in by_duckdb[number][:5]] == [text] * 5


FORMULAS = [
    *("=HYPERLINK(1)", "+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", " =1", "\u200b=1", "\ufeff\u2066 \xad=1"),
    *("\U000e0020\u3164@1", "|cmd", "＝1", "'quoted", "plain", "a=b"),
]


@one_engine
def test_bc_133_formulas_in_a_csv_export_are_text_and_can_be_had_back(
    engine: str, tmp_path: Path, logger: AuditLogger, store: Store
) -> None:
    """Removing one leading apostrophe gives every cell back."""
    for number, text in enumerate(FORMULAS):
        log(logger, text, duration_ms=number, user_id=text, caller=text, error=text)
    logger.shutdown()
    for raw in (False, True):
        export(store, tmp_path / "out.csv", "csv", raw=raw, oldest_first=True)
        with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
            columns = ("name", "user_id", "caller", "error")
            cells = [{row[column] for column in columns} for row in csv.DictReader(file)]
        assert cells == [{t} if raw or t in ("plain", "a=b") else {"'" + t} for t in FORMULAS]


def test_export_numbers_keep_their_digits_and_json_stays_valid(
    engine: str, tmp_path: Path, store: Store
) -> None:
    """BC-050, BC-051: NaN is no number in JSON; integers beyond 63 bits keep every digit, in every path."""
    numbers = {"a": 2**63, "b": 2**64, "c": 10**29, "d": -(2**63) - 1, "e": 9007199254740993, "f": 1.5}
    segment = live_segment(store, {"name": "numbers", "input_params": numbers})
    for _ in range(2):  # in the journal, then in the table
        export(store, tmp_path / "out.json", "json")
        (event,) = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
        assert json.loads(event["input_json"]) == numbers
        segment.seal()
        store.ingest()


def test_export_damaged_journal_line_leaves_out_that_line_only(
    engine: str, tmp_path: Path, store: Store
) -> None:
    """BC-137."""
    segment = live_segment(store, *({"name": f"t{number}"} for number in range(200)))
    path = Path(segment.path)
    lines = path.read_bytes().split(b"\n")
    lines[100] = lines[100][:40]
    path.write_bytes(b"\n".join(lines))
    for form in ("csv", "json", "jsonl", "parquet", "duckdb", "sqlite"):
        assert export(store, tmp_path / f"out.{form}", form) == 199
    segment.forget()


@one_engine
def test_export_full_disk_leaves_the_old_file(engine: str, filled: Store, tmp_path: Path) -> None:
    """BC-137, BC-138: no partial file, an error, and the older file as it was."""
    path = tmp_path / "out.csv"
    path.write_text("precious")
    code = (
        "import resource, sys; from mxcp_audit import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        f"sys.exit(main(['log', '--db', {filled.target.path!r}, '--export', {str(path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(mxcp_audit.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "can't be written" in done.stderr or "out.csv" in done.stderr
    assert done.stdout == ""
    assert path.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["log.duckdb", "log.duckdb.journal", "out.csv"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


@one_engine
def test_export_refuses_what_would_destroy_or_is_no_file(filled: Store, tmp_path: Path) -> None:
    """BC-138."""
    (tmp_path / "link.csv").symlink_to(tmp_path / "elsewhere.csv")
    (tmp_path / "alias").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "fifo.csv")
    before = (tmp_path / "log.duckdb").read_bytes()
    segment = filled.journal.segments()[0]
    for path in (
        *words("log.duckdb log.duckdb.wal alias/log.duckdb link.csv fifo.csv missing/out.csv"),
        *(
            *("log.duckdb.journal/out.csv", "alias/log.duckdb.journal/out.csv", segment, ".", "/dev/full"),
            "/dev/stdout",
        ),
        "log.duckdb/out.csv",
        "a\0b.csv",
    ):
        with pytest.raises(StoreError):
            filled.refuse_own_files(str(tmp_path / path))
            pytest.fail(path)
    filled.refuse_own_files(str(tmp_path / "new.csv"))
    assert (tmp_path / "log.duckdb").read_bytes() == before


def test_export_tells_its_progress(tmp_path: Path) -> None:
    told: list[int] = []
    came = threading.Event()

    def progress(size: int) -> None:
        told.append(size)
        came.set()

    path = tmp_path / "growing"
    path.write_bytes(b"12345")
    with mxcp_audit._watched(str(path), progress):
        assert came.wait(60)
    assert told[0] == 5
    assert not [each for each in threading.enumerate() if "progress" in each.name]


# --- statistics and SQL


def test_stats_by_each_group_agrees_with_plain_sql(engine: str, logger: AuditLogger, store: Store) -> None:
    for number in range(101):
        log(
            logger,
            f"t{number % 3}",
            duration_ms=number,
            status=("success", "error")[number % 5 == 0],
            policy_decision=("allow", "deny")[number % 7 == 0],
            user_id=None if number % 2 else "u",
        )
        if number == 50:
            logger.flush()
    assert logger.wait_written(SAFETY_SECONDS)  # an ingest would disturb who reads in its process
    with store.reading() as reading:
        for by in mxcp_audit.STATS_BY:
            rows = reading.stats(Filter(), by=by)
            assert sum(row[1] for row in rows) == 101
            assert sum(row[2] for row in rows) == 21 and sum(row[3] for row in rows) == 15
        (row,) = reading.stats(Filter(), by="type")
        assert row[:8] == ("tool", 101, 21, 15, 50, 95, 99, 100)
        assert row[8] <= row[9] and row[8].endswith("Z")
        assert [row[0] for row in reading.stats(Filter(), by="name", sort="max_ms", count=2)] == ["t1", "t0"]
        assert [row[:2] for row in reading.stats(Filter(tools=("t1",)), by="user")] in (
            [("u", 17), (None, 17)],
            [(None, 17), ("u", 17)],
        )
        assert reading.stats(Filter(tools=("none",)), by="name") == []


def test_query_values_are_those_of_json(filled: Store) -> None:
    with filled.reading() as reading:
        columns, rows = reading.query(
            "SELECT name, duration_ms, sum(duration_ms) OVER () AS s, 1.5::DECIMAL(4, 2) AS d, "
            "[1, NULL] AS l, "
            "{'a': 'b'} AS m, 'nan'::DOUBLE AS n, timestamp > '2000-01-01' AS b, 10::HUGEINT ** 2 AS h, "
            "INTERVAL 1 DAY AS i, 1 AS name, event_id IS NOT NULL AS e, '\\xC3'::BLOB AS bytes, "
            "2::UBIGINT AS u "
            "FROM logs ORDER BY duration_ms DESC LIMIT 2; -- comment"
        )
        first = next(rows)
    assert columns[:3] == ["name", "duration_ms", "s"] and len(columns) == 14
    assert first[:8] == ("t9", 9, 45, 1.5, [1, None], {"a": "b"}, None, True)
    assert first[8:] == (100.0, "1 day", 1, True, "\\xC3", 2)


ATTACKS = (
    *("COPY (SELECT 1) TO 'pwned'", "ATTACH 'pwned' AS p", "INSTALL httpfs", "LOAD httpfs"),
    *("INSERT INTO audit.logs (name) VALUES ('x')", "DELETE FROM audit.logs"),
    *("UPDATE audit.logs SET name = 'x'", "DROP TABLE audit.logs", "CREATE TABLE audit.x AS SELECT 1"),
    *("EXPORT DATABASE 'pwned'", "IMPORT DATABASE 'pwned'", "PRAGMA enable_profiling"),
    *("SET lock_configuration = false", "SET enable_external_access = true", "RESET lock_configuration"),
    *("DETACH audit", "CHECKPOINT audit", "CALL force_checkpoint('audit')", "BEGIN", "SELECT 1; SELECT 2"),
    *("SELECT 1; COPY (SELECT 1) TO 'pwned'", "SELECT 1); COPY (SELECT 1) TO 'pwned'; SELECT (1"),
    *("SELECT 1) AS r(c0); COPY (SELECT 1) TO 'pwned'; --", ".shell touch pwned"),
    *("SELECT 1;\n.shell touch pwned\n", ";\n.shell touch pwned", "'\n;\n.shell touch pwned\n'"),
    *(".output pwned", "SELECT * FROM read_text('/etc/hostname')"),
    *("SELECT * FROM read_csv('/etc/hostname')", "SELECT * FROM '/etc/hostname'"),
    *("SELECT * FROM glob('/*')", "SELECT * FROM query('COPY (SELECT 1) TO ''pwned''')"),
    "SELECT * FROM sniff_csv('/etc/hostname')",
    *("SELECT * FROM read_json(['log.duckdb.journal/journal.id'])", "", "not SQL at all"),
)


def test_query_can_neither_write_nor_read_files(
    filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "log.duckdb").read_bytes()
    for attack in ATTACKS:
        with pytest.raises(QueryError), filled.reading() as reading:
            print(attack, list(reading.query(attack)[1]))
        assert (tmp_path / "log.duckdb").read_bytes() == before, attack
        assert sorted(os.listdir(tmp_path)) == ["log.duckdb", "log.duckdb.journal"], attack
    assert len(names(filled)) == 10


def test_query_texts_that_look_like_commands_are_only_text(
    filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (
        "SELECT $$;\n.shell touch pwned\n$$",
        "SELECT ';\n.shell touch pwned\n'",
        "/* ; \n.shell x\n*/ SELECT 1",
    ):
        with filled.reading() as reading:
            assert len(list(reading.query(text)[1])) == 1
    assert sorted(os.listdir(tmp_path)) == ["log.duckdb", "log.duckdb.journal"]


@one_engine
def test_export_that_fails_leaves_the_old_file(
    filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")

    def failing(self: Any, *args: Any) -> int:
        raise mxcp_audit.QueryError("unforeseen")

    monkeypatch.setattr(mxcp_audit.Reading, "_write", failing)
    with pytest.raises(StoreError, match="can't be written: unforeseen"):
        export(filled, path, "csv")
    assert path.read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_reading_while_the_first_ingest_goes_on_shows_the_journal_and_says_so(
    engine: str, store: Store
) -> None:
    segment = live_segment(store, {"name": "waiting"})
    with store.journal.ingest_lock(), store.reading(wait=0.1) as reading:
        assert isinstance(reading.problem, mxcp_audit.DatabaseLockedError)
        assert len(list(reading.rows(Filter(), count=10))) == 1
    segment.seal()
