"""Measure what reading takes as a ratio to the obvious way, both in this run; tools/bench.py starts it.

    python tools/bench_read.py query [--rows N] [--rounds N]    `log` and others against plain DuckDB
    python tools/bench_read.py verify [--rows N] [--rounds N]   `verify` against reading all columns once

Times are those of several rounds, taken in turns, so that a noisy machine hits both alike. `verify` compares
with a program that takes every row, and with the greatest value of each column inside the engine, which is
the least that any reader can need; its exit status is 1 if it takes more than 3 times as long as the first.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mxcp_audit as m  # noqa: E402

SEGMENT_EVENTS = 20_000
JOURNAL_EVENTS = 5_000  # beside the table that is queried
MILLION = 1_000_000
GENERATE = """
INSERT INTO audit.logs BY NAME
SELECT TIMESTAMP '2026-01-01' + INTERVAL (i * 3) MILLISECOND AS timestamp,
       CASE i % 3 WHEN 0 THEN 'http' WHEN 1 THEN 'stdio' ELSE 'cli' END AS caller,
       CASE WHEN i % 10 = 0 THEN 'resource' ELSE 'tool' END AS type, 'tool_' || (i % 50) AS name,
       '{"id":' || i || ',"q":"hello"}' AS input_json, (hash(i) % 5000)::INTEGER AS duration_ms,
       CASE WHEN i % 97 = 0 THEN 'deny' ELSE 'allow' END AS policy_decision,
       CASE WHEN i % 100 = 0 THEN 'error' ELSE 'success' END AS status,
       CASE WHEN i % 100 = 0 THEN 'boom' END AS error, 'u' || (i % 1000) AS user_id,
       printf('20260101T%012dZ-%08x', i // 5000, i // 5000) AS segment, (i % 5000 + 1)::INTEGER AS seq
FROM range($begin, $stop) AS rows(i)"""
LEDGER = """
INSERT INTO audit.ledger BY NAME
SELECT 'bench' AS journal, row_number() OVER (ORDER BY segment) AS position, 'segment' AS kind, segment,
       count(*) AS events, min(timestamp) AS first_event, max(timestamp) AS last_event,
       max(timestamp) AS ingested_at
FROM audit.logs GROUP BY segment"""
# The obvious way: the package, the table alone, the same rows and columns.
PLAIN = """
import duckdb, sys
connection = duckdb.connect()
connection.execute("ATTACH '" + sys.argv[1] + "' AS audit (READ_ONLY)")
for row in connection.execute(sys.argv[2]).fetchall():
    print(row)
"""
EXPORT = """
COPY (SELECT * FROM audit.logs ORDER BY timestamp DESC, segment DESC, seq DESC)
TO 'out.{0}' (FORMAT {0})"""
NEWEST = "SELECT * FROM audit.logs WHERE {} ORDER BY timestamp DESC, segment DESC, seq DESC LIMIT 100"
PLAIN_FILTERS = {
    "log": "true",
    "log --tool tool_7 --status error": "type = 'tool' AND name = 'tool_7' AND status = 'error'",
    'log --grep id":77': " OR ".join(
        f"{name} ILIKE '%id\":77%'" for name in ("name", "input_json", "error", "reason")
    ),
}


def generate(path: Path, rows: int) -> None:
    """Make a database with this many events, as ingests would have made it."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        connection.execute(f"ATTACH {m.sql_literal(str(path))} AS audit (STORAGE_VERSION 'v1.0.0')")
        connection.execute(m.CREATE_LOGS)
        connection.execute(m.CREATE_LEDGER)
        for begin in range(0, rows, MILLION):
            connection.execute(GENERATE, {"begin": begin, "stop": min(rows, begin + MILLION)})
        connection.execute(LEDGER)
        connection.execute("CHECKPOINT audit")


def write_segment(journal: m.Journal, numbers: range) -> None:
    """Leave events in the journal, lines of about 320 bytes, as servers do."""
    encoder, lines = m.Encoder(m.Redactor(), max_input_bytes=2**20), []
    for seq, number in enumerate(numbers, 1):
        text = encoder.input_json({"id": number, "city": "Zürich", "limit": 10}, "t", None, None)
        status, error = ("success", None) if number % 10 else ("error", f"no user {number}")
        who = (f"user{number % 977}", f"session-{number % 5000}", None)
        name, duration_ms = f"get_user_{number % 20}", number % 300
        line = encoder.line("http", "tool", name, text, duration_ms, "allow", None, status, error, *who, ())
        lines.append(m.finish_line(line, seq))
    segment = journal.open_segment()
    segment.append(b"".join(lines), len(lines))
    segment.seal()


def seconds(command: Sequence[str], folder: Path, **changes: str) -> float:
    """Run a process to its end and return how long that took; nothing stays of its output."""
    # The module's compiled form is kept, as it is in real life.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MXCP_", "PYTHON"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), **changes}
    quiet = subprocess.DEVNULL
    begun = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=quiet, stderr=quiet)
    took = time.perf_counter() - begun
    for file in folder.glob("out.*"):
        file.unlink()
    return took


def compare(rounds: int, *ways: Callable[[], float]) -> list[float]:
    """Return the median of each way, measured in turns after one unmeasured turn."""
    turns = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return [statistics.median(times) for times in zip(*turns)]


def query(folder: Path, rows: int, rounds: int) -> int:
    """Print ratios of the reading commands to plain DuckDB, on a table with a journal beside it."""
    path, begun = folder / "bench.duckdb", time.perf_counter()
    generate(path, rows)
    write_segment(m.Journal(f"{path}.journal"), range(JOURNAL_EVENTS))
    print(
        f"{rows:,} rows ({path.stat().st_size / 1e6:.0f} MB), {JOURNAL_EVENTS:,} events in the journal; "
        f"made in {time.perf_counter() - begun:.0f} s"
    )
    plain = {
        **{
            command: f"SELECT {m.public_select()} FROM ({NEWEST.format(where)})"
            for command, where in PLAIN_FILTERS.items()
        },
        "stats": m.stats_query("SELECT * FROM audit.logs", "name", "calls", 100),
        **{f"log --export out.{form}": EXPORT.format(form) for form in ("csv", "parquet")},
    }
    run = functools.partial(seconds, folder=folder)
    for engine in ("package", "cli"):
        for command, sql in plain.items():
            ours = [sys.executable, "-m", "mxcp_audit", *command.split(" "), "--db", str(path)]
            theirs = [sys.executable, "-c", PLAIN, str(path), sql]
            mine, other = compare(
                rounds,
                functools.partial(run, ours, MXCP_AUDIT_ENGINE=engine),
                functools.partial(run, theirs),
            )
            print(
                f"{engine:8} {command:34} {mine * 1e3:7.0f} ms  plain {other * 1e3:7.0f} ms  "
                f"ratio {mine / other:5.2f}"
            )
    commands = (["-m", "mxcp_audit", "log", "--help"], ["-c", "pass"])
    mine, other = compare(rounds, *(functools.partial(run, [sys.executable, *each]) for each in commands))
    print(f"log --help, beyond an empty Python: {(mine - other) * 1e3:.0f} ms")
    return 0


def verify(folder: Path, rows: int, rounds: int) -> int:
    """Print times and ratios; 1 if verifying takes more than 3 times as long as reading."""
    path = folder / "log.duckdb"
    store = m.Store(m.config_from_arguments(path))
    for start in range(0, rows, SEGMENT_EVENTS):
        write_segment(store.journal, range(start, min(start + SEGMENT_EVENTS, rows)))
        store.ingest()
    columns = ", ".join(f"max({column.name})::VARCHAR" for column in m.COLUMNS)

    def timed(sql: str) -> float:
        begun = time.perf_counter()
        if sql:
            with store.target.session(5.0) as engine:
                collections.deque(engine.stream(sql), 0)  # each is taken, none kept
        else:
            assert store.verify().intact
        return time.perf_counter() - begun

    questions = ("", "SELECT * FROM audit.logs", f"SELECT {columns} FROM audit.logs")
    proving, fetching, scanning = compare(rounds, *(functools.partial(timed, sql) for sql in questions))
    print(f"{rows} events, {path.stat().st_size / rows:.1f} bytes each in the file")
    print(f"verify                       {proving:7.3f} s")
    print(f"read, every row fetched      {fetching:7.3f} s   ratio {proving / fetching:.2f}  (target 3)")
    print(f"read, inside of the engine   {scanning:7.3f} s   ratio {proving / scanning:.2f}")
    return int(proving > 3 * fetching)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("topic", choices=("query", "verify"))
    parser.add_argument("--rows", type=int, default=MILLION)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        raise SystemExit(globals()[options.topic](Path(temporary), options.rows, options.rounds))
