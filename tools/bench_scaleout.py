"""How fast events get into DuckLake on PostgreSQL and into PostgreSQL, as a ratio to a local file.

    "$(tools/environment scaleout duckdb==1.5.5 duckdb-extension-ducklake==1.5.5 \\
        duckdb-extension-postgres-scanner==1.5.5)" tools/bench_scaleout.py [EVENTS]

PostgreSQL is started here, with fsync on. One process ingests what lies in its journal. The first ingest
of each target, which makes the tables and loads the extensions, is not counted. At the end the answers to
`log` and to `log --since 1h --status error` are timed on each target, and DuckLake's files are counted
before and after a merge.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from postgres_server import PASSWORD, Postgres, find_programs

from mxcp_audit import AuditLogger, Config, Filter, Store

EVENT = {
    "customer": "C-1042",
    "region": "EMEA",
    "filter": {"from": "2026-01-01", "tags": ["a", "b"]},
    "limit": 50,
}
SMALL_INGESTS = 50  # of 100 events each: what a quiet server does once a second
FILTERS = (("log", Filter()), ("log --since 1h --status error", Filter(status="error", since="2026-01-01")))


def fill(config: Config, events: int) -> None:
    """Leave that many events in the journal, in sealed segments."""
    with AuditLogger(config.path, journal=config.journal, attach=config.attach, flush_interval=3600) as audit:
        for number in range(events):
            status = "error" if number % 100 == 0 else "success"
            audit.log_event("http", "tool", f"tool_{number % 20}", {**EVENT, "n": number}, 12, status=status)


def timed(store: Store, config: Config, events: int) -> float:
    """Return the seconds that an ingest of so many events takes."""
    fill(config, events)
    start = time.perf_counter()
    assert store.ingest()
    return time.perf_counter() - start


def measure(name: str, path: str, attach: dict[str, object], folder: Path, events: int) -> float:
    """Print what a target can do and return its rows a second."""
    config = Config(path=path, enabled=True, journal=str(folder / f"{name}.journal"), attach=attach)  # type: ignore[arg-type]
    store = Store(config)
    timed(store, config, 100)
    small = sorted(timed(store, config, 100) for _ in range(SMALL_INGESTS))[SMALL_INGESTS // 2]
    seconds = timed(store, config, events)
    print(f"{name:>9}: {events / seconds:9,.0f} rows/s; 100 events take {small * 1000:6.1f} ms")
    for words, what in FILTERS:
        start = time.perf_counter()
        with store.reading() as reading:
            assert list(reading.rows(what))
        print(f"           {words}: {(time.perf_counter() - start) * 1000:.0f} ms, attaching included")
    return events / seconds


def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    programs = find_programs()
    if programs is None:
        raise SystemExit("there is no PostgreSQL: apt-get install postgresql")
    AuditLogger._ingest = None  # events are to stay in the journal until they are ingested here
    os.environ["PGPASSWORD"] = PASSWORD
    server = Postgres(programs)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = measure("file", str(folder / "log.duckdb"), {}, folder, events)
            size = (folder / "log.duckdb").stat().st_size
            lake = measure(
                "DuckLake",
                "ducklake:" + server.target("lake"),
                {"DATA_PATH": str(folder / "lake")},
                folder,
                events,
            )
            parquet = [one.stat().st_size for one in (folder / "lake").rglob("*.parquet")]
            plain = measure("PostgreSQL", server.target("plain"), {}, folder, events)
            total = events + (SMALL_INGESTS + 1) * 100
            table = int(server.sql("SELECT pg_total_relation_size('logs')", "plain"))
            print(f"ratio to a file: DuckLake {lake / file:.2f}, PostgreSQL {plain / file:.2f}")
            print(
                f"bytes/event: file {size / total:.0f}, Parquet {sum(parquet) / total:.0f} "
                f"in {len(parquet)} files, PostgreSQL {table / total:.0f}"
            )
            snapshots = int(server.sql("SELECT count(*) FROM ducklake_snapshot", "lake"))
            catalogue = int(
                server.sql("SELECT pg_database_size('lake') - pg_database_size('template1')", "lake")
            )
            print(f"catalogue: {snapshots} snapshots, {catalogue / snapshots / 1024:.1f} KiB each")
    finally:
        server.close()


if __name__ == "__main__":
    main()
