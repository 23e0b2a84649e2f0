"""Measure what is promised, each figure as a ratio to the obvious way, both taken in this run.

    python tools/bench_query.py query                   # `log` and others on 10 million generated rows
    python tools/bench_query.py query --rows 100000

A subcommand is a function that takes the parsed options and prints lines; SUBCOMMANDS lists them.
Times are the medians of whole processes, taken in turns, so that a noisy machine hits both alike.
"""

from __future__ import annotations

import argparse
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

import mxcp_audit  # noqa: E402


def environment(**changes: str) -> dict[str, str]:
    """The environment of a measured process: the module's compiled form is kept, as it is in real life."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MXCP_", "PYTHON"))}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def seconds(command: Sequence[str], folder: Path, **changes: str) -> float:
    """Run a process to its end and return how long that took; nothing stays of its output."""
    begun = time.perf_counter()
    subprocess.run(
        command,
        cwd=folder,
        env=environment(**changes),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    took = time.perf_counter() - begun
    for file in folder.glob("out.*"):
        file.unlink()
    return took


def compare(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """Return the medians of both, measured in turns after one unmeasured turn."""
    pairs = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


# --- query

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
MILLION = 1_000_000


EXPORT = """
COPY (SELECT * FROM audit.logs ORDER BY timestamp DESC, segment DESC, seq DESC)
TO 'out.{0}' (FORMAT {0})"""


def generate(path: Path, rows: int) -> None:
    """Make a database with this many events, as ingests would have made it."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        connection.execute(f"ATTACH {mxcp_audit.sql_literal(str(path))} AS audit (STORAGE_VERSION 'v1.0.0')")
        connection.execute(mxcp_audit.CREATE_LOGS)
        connection.execute(mxcp_audit.CREATE_LEDGER)
        for begin in range(0, rows, MILLION):
            connection.execute(GENERATE, {"begin": begin, "stop": min(rows, begin + MILLION)})
        connection.execute(LEDGER)
        connection.execute("CHECKPOINT audit")


def write_journal(path: Path, events: int) -> None:
    """Leave events in the journal, newer than all rows, as a running server does."""
    encoder = mxcp_audit.Encoder(mxcp_audit.Redactor(), max_input_bytes=1 << 20)
    segment = mxcp_audit.Journal(f"{path}.journal").open_segment()
    lines = []
    for number in range(events):
        text = encoder.input_json({"id": number, "q": "hello"}, "tool", None, None)
        line = encoder.line(
            "http",
            "tool",
            f"tool_{number % 50}",
            text,
            number,
            "allow",
            None,
            "success",
            None,
            "u",
            None,
            None,
            (),
        )
        lines.append(mxcp_audit.finish_line(line, number + 1))
    segment.append(b"".join(lines), events)
    segment.seal()


def query(options: argparse.Namespace) -> None:
    """Ratios of the reading commands to plain DuckDB, on a table with a journal beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "bench.duckdb"
        begun = time.perf_counter()
        generate(path, options.rows)
        write_journal(path, options.journal)
        size = path.stat().st_size / 1e6
        print(
            f"{options.rows:,} rows ({size:.0f} MB), {options.journal:,} events in the journal; "
            f"made in {time.perf_counter() - begun:.0f} s"
        )
        newest = "SELECT * FROM audit.logs {where} ORDER BY timestamp DESC, segment DESC, seq DESC LIMIT 100"
        columns = f"SELECT {mxcp_audit.public_select()} FROM ({{source}})"
        figures = mxcp_audit.stats_query("SELECT * FROM audit.logs", "name", "calls", 100)
        plain = {
            "log": columns.format(source=newest.format(where="")),
            "log --tool tool_7 --status error": columns.format(
                source=newest.format(where="WHERE type = 'tool' AND name = 'tool_7' AND status = 'error'")
            ),
            "log --grep id\":77": columns.format(
                source=newest.format(where="WHERE " + " OR ".join(
                    f"{name} ILIKE '%id\":77%'" for name in ("name", "input_json", "error", "reason")
                ))
            ),
            "stats": figures,
            "log --export out.csv": EXPORT.format("csv"),
            "log --export out.parquet": EXPORT.format("parquet"),
        }  # fmt: skip
        for engine in options.engines.split(","):
            for command, sql in plain.items():
                ours = [sys.executable, "-m", "mxcp_audit", *command.split(" "), "--db", str(path)]
                theirs = [sys.executable, "-c", PLAIN, str(path), sql]
                mine, other = compare(
                    options.rounds,
                    lambda ours=ours, engine=engine: seconds(ours, folder, MXCP_AUDIT_ENGINE=engine),  # type: ignore[misc]
                    lambda theirs=theirs: seconds(theirs, folder),  # type: ignore[misc]
                )
                print(
                    f"{engine:8} {command:34} {mine * 1e3:7.0f} ms  plain {other * 1e3:7.0f} ms  "
                    f"ratio {mine / other:5.2f}"
                )
        help_ms = seconds_of_help(options.rounds, folder)
        print(f"log --help, beyond an empty Python: {help_ms * 1e3:.0f} ms")


def seconds_of_help(rounds: int, folder: Path) -> float:
    """How much longer `log --help` takes than a Python that does nothing."""
    mine, other = compare(
        rounds,
        lambda: seconds([sys.executable, "-m", "mxcp_audit", "log", "--help"], folder),
        lambda: seconds([sys.executable, "-c", "pass"], folder),
    )
    return mine - other


def add_query(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("query", help=query.__doc__)
    command.add_argument("--rows", type=int, default=10_000_000)
    command.add_argument("--journal", type=int, default=5_000, help="events in the journal")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--engines", default="package,cli", help="which engines (default: both)")
    command.set_defaults(run=query)


SUBCOMMANDS = (
    add_query,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for add in SUBCOMMANDS:
        add(commands)
    options = parser.parse_args(argv)
    options.run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
