"""Time `verify` on many events against reading all their columns once, in one run: prints the ratios.

    python tools/bench_verify.py [EVENTS]

Reading is measured twice: as a program that takes every row (`SELECT *`, rows fetched), and inside the
engine (the greatest value of each column), which is the least that any reader can need.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mxcp_audit as m

SEGMENT_EVENTS = 20_000
ROUNDS = 3


def make_log(database: str, events: int) -> m.Store:
    """Make a log of `events` events, lines of about 320 bytes, as servers do."""
    store = m.Store(m.config_from_arguments(database))
    encoder = m.Encoder(m.Redactor(), max_input_bytes=2**20)
    for start in range(0, events, SEGMENT_EVENTS):
        segment = store.journal.open_segment()
        lines = []
        for number in range(start, min(start + SEGMENT_EVENTS, events)):
            value = encoder.input_json({"id": number, "city": "Zürich", "limit": 10}, "t", None, None)
            line = encoder.line(
                "http",
                "tool",
                f"get_user_{number % 20}",
                value,
                number % 300,
                "allow",
                None,
                "success" if number % 10 else "error",
                None if number % 10 else f"no user {number}",
                f"user{number % 977}",
                f"session-{number % 5000}",
                None,
                (),
            )
            lines.append(m.finish_line(line, number - start + 1))
        segment.append(b"".join(lines), len(lines))
        segment.seal()
        store.ingest()
    return store


def best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def verify(events: int = 1_000_000) -> int:
    """Print times and ratios; 1 if verifying takes more than 3 times as long as reading."""
    with tempfile.TemporaryDirectory() as folder:
        database = os.path.join(folder, "log.duckdb")
        store = make_log(database, events)
        columns = ", ".join(f"max({column.name})::VARCHAR" for column in m.COLUMNS)

        def read(sql: str) -> None:
            with store.target.session(read_only=True, wait=5.0) as engine:
                for _ in engine.stream(sql):
                    pass

        def prove() -> None:
            assert store.verify().intact

        proving = best(prove)
        fetching = best(lambda: read("SELECT * FROM audit.logs"))
        scanning = best(lambda: read(f"SELECT {columns} FROM audit.logs"))
        size = os.stat(database).st_size
        version = m.PackageEngine(guest=True).version()
        print(f"{events} events, {size / events:.1f} bytes each in the file, DuckDB {version}")
        print(f"verify                       {proving:7.3f} s")
        print(f"read, every row fetched      {fetching:7.3f} s   ratio {proving / fetching:.2f}  (target 3)")
        print(f"read, inside of the engine   {scanning:7.3f} s   ratio {proving / scanning:.2f}")
        return int(proving > 3 * fetching)


if __name__ == "__main__":
    raise SystemExit(verify(*map(int, sys.argv[1:])))
