"""How fast events get into DuckLake on PostgreSQL and into PostgreSQL, as a ratio to a local file.

    "$(tools/environment scaleout duckdb==1.5.5 duckdb-extension-ducklake==1.5.5 \\
        duckdb-extension-postgres-scanner==1.5.5)" tools/bench_scaleout.py [EVENTS]
    … tools/bench_scaleout.py hosts [HOSTS [SECONDS]]     many hosts at one catalogue: conflicts and retries
    … tools/bench_scaleout.py small [INGESTS]             ingests of 20 events by four hosts: files, times
    … tools/bench_scaleout.py rows [ROWS]                 `log --limit 100` in PostgreSQL beside psql

PostgreSQL is started here, with fsync on. One process ingests what lies in its journal. The first ingest
of each target, which makes the tables and loads the extensions, is not counted. At the end the answers to
`log` and to `log --since 1h --status error` are timed on each target, and DuckLake's files are counted
before and after a merge.

Hosts are folders with a journal, and each ingest is the child process that a server would start, once a
minute; they wait for one of WORKERS that run at the same time, and PostgreSQL shares their machine.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import statistics
import subprocess
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
MODULE = Path(__file__).resolve().parent.parent / "mxcp_audit.py"
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


PERIOD_SECONDS = 60  # of each host's ingests
WORKERS = 8


def targets(server: Postgres, folder: Path, name: str) -> list[tuple[str, str, dict[str, object]]]:
    """Return name, path and options of both kinds of target that many hosts can write to."""
    lake: dict[str, object] = {"DATA_PATH": str(folder / f"lake_{name}")}
    return [
        ("DuckLake", "ducklake:" + server.target(f"lake_{name}"), lake),
        ("PostgreSQL", server.target(f"plain_{name}"), {}),
    ]


def make_host(folder: Path, path: str, attach: dict[str, object]) -> Config:
    """Make a host's folder with its site file and return the configuration."""
    folder.mkdir(parents=True)
    journal = str(folder / "logs.journal")
    audit = {"enabled": True, "path": path, "attach": attach, "journal": journal}
    (folder / "mxcp-site.yml").write_text(json.dumps({"profiles": {"default": {"audit": audit}}}))
    return Config(path=path, enabled=True, journal=journal, attach=attach)  # type: ignore[arg-type]


def ingest_by_child(folder: Path) -> tuple[float, int]:
    """Ingest as a server does, in a process of its own; return its seconds and its exit status."""
    command = [sys.executable, str(MODULE), "ingest", "--config", str(folder / "mxcp-site.yml")]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 75):
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, done.returncode


def rollbacks(server: Postgres, path: str) -> int:
    """Return how many transactions the server has rolled back: each is one that is tried again."""
    database = path.partition("dbname=")[2].split()[0]
    return int(server.sql(f"SELECT xact_rollback FROM pg_stat_database WHERE datname = '{database}'"))


def let_ingest(configs: dict[Path, Config], seconds: float) -> list[tuple[float, float, int]]:
    """Let each host ingest once a minute; return how late each ingest began, its seconds and exit status."""

    def work(at: float, host: Path) -> tuple[float, float, int]:
        late = time.monotonic() - at
        fill(configs[host], 50)
        return late, *ingest_by_child(host)

    begun = time.monotonic()
    moments = sorted(
        (begun + phase + turn * PERIOD_SECONDS, host)
        for host in configs
        for phase in (random.random() * PERIOD_SECONDS,)
        for turn in range(1 + int(seconds // PERIOD_SECONDS))
        if phase + turn * PERIOD_SECONDS < max(seconds, PERIOD_SECONDS)
    )
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        going = []
        for at, host in moments:
            time.sleep(max(0.0, at - time.monotonic()))
            going.append(pool.submit(work, at, host))
        return [one.result() for one in going]


def simulate(server: Postgres, folder: Path, count: int, seconds: float) -> None:
    """Let so many hosts ingest once a minute each, and print how that went."""
    for name, path, attach in targets(server, folder, f"hosts{count}"):
        hosts = [folder / f"{name}{count}" / f"host{number}" for number in range(count)]
        configs = {host: make_host(host, path, attach) for host in hosts}
        fill(configs[hosts[0]], 1)
        ingest_by_child(hosts[0])  # makes the tables
        before = rollbacks(server, path)
        ingests = let_ingest(configs, seconds)
        again = rollbacks(server, path) - before
        for host in hosts:
            while list((host / "logs.journal").glob("*.jsonl")):
                ingest_by_child(host)
        with Store(configs[hosts[0]]).reading() as reading:
            ((rows,),) = reading.engine.execute("SELECT count(*)::BIGINT AS n FROM sound_logs")
        assert rows == 50 * len(ingests) + 1, (rows, len(ingests))
        times = sorted(1000 * took for _, took, _ in ingests)
        p95 = times[len(times) * 95 // 100]
        print(
            f"{name:>10}, {count:>3} hosts: {len(times)} ingests, each {statistics.median(times):.0f} ms "
            f"(p95 {p95:.0f}); {again} rolled back and repeated, "
            f"{sum(status == 75 for *_, status in ingests)} left for the next minute, "
            f"{sum(late > 1 for late, *_ in ingests)} began late; {rows:,} events in, "
            f"{'intact' if Store(configs[hosts[0]]).verify().intact else 'NOT intact'}",
            flush=True,
        )


def simulate_small(server: Postgres, folder: Path, ingests: int) -> None:
    """Let four hosts ingest 20 events each time, and print what that makes of a lake and of its times."""
    name, path, attach = targets(server, folder, "small")[0]
    configs = [make_host(folder / f"small{number}", path, attach) for number in range(4)]
    stores = [Store(config) for config in configs]
    times = []
    for number in range(ingests):
        fill(configs[number % 4], 20)
        start = time.perf_counter()
        assert stores[number % 4].ingest()
        times.append(time.perf_counter() - start)

    def log_seconds() -> float:
        start = time.perf_counter()
        with stores[0].reading() as reading:
            assert len(list(reading.rows(Filter(), count=100))) == 100
        return time.perf_counter() - start

    def files() -> int:
        return int(
            server.sql("SELECT count(*) FROM ducklake_data_file WHERE end_snapshot IS NULL", "lake_small")
        )

    before, had = statistics.median(log_seconds() for _ in range(5)), files()
    with stores[0].target.session(5, write=True) as engine:
        for table in ("logs", "ledger"):
            engine.execute(f"CALL ducklake_flush_inlined_data('audit', table_name => '{table}')")
        engine.execute("CALL ducklake_merge_adjacent_files('audit')")
    after = statistics.median(log_seconds() for _ in range(5))
    tenth = ingests // 10
    print(
        f"{name}: {ingests} ingests of 20 events: {had} files ({files()} merged by hand); `log --limit 100` "
        f"{before / after:.2f} x its time after that; an ingest "
        f"{statistics.median(times[:tenth]) * 1000:.0f} ms in the first tenth, "
        f"{statistics.median(times[-tenth:]) * 1000:.0f} in the last, {max(times) * 1000:.0f} at most"
    )


def compare_rows(server: Postgres, folder: Path, rows: int) -> None:
    """Print what `log --limit 100` takes of a small and a large table, beside the same query in psql."""
    path = targets(server, folder, "rows")[1][1]
    config = make_host(folder / "rows", path, {})
    columns = "timestamp, name, duration_ms, status, policy_decision, user_id"
    filters = (("", "true"), ("--status error", "status = 'error'"), ("--tool tool_3", "name = 'tool_3'"))
    had = 0
    for size in (2000, rows):
        while had < size:
            fill(config, min(100_000, size - had))
            assert Store(config).ingest()
            had += min(100_000, size - had)
        server.sql("ANALYZE", "plain_rows")
        for words, where in filters:
            query = f"SELECT {columns} FROM logs WHERE {where} ORDER BY timestamp DESC LIMIT 100"
            command = [sys.executable, str(MODULE), "log", "--limit", "100", *words.split()]
            psql, log = [], []
            for _ in range(11):
                start = time.perf_counter()
                server.sql(query, "plain_rows")
                psql.append(time.perf_counter() - start)
                start = time.perf_counter()
                subprocess.run(command, cwd=folder / "rows", check=True, capture_output=True)
                log.append(time.perf_counter() - start)
            print(
                f"{size:>9,} rows, log --limit 100 {words}: {statistics.median(log) * 1000:.0f} ms, "
                f"psql {statistics.median(psql) * 1000:.0f} ms",
                flush=True,
            )


def compare_targets(server: Postgres, folder: Path, events: int) -> None:
    """Print what each kind of target can do, as a ratio to a file, and what an event takes there."""
    file = measure("file", str(folder / "log.duckdb"), {}, folder, events)
    size = (folder / "log.duckdb").stat().st_size
    attach: dict[str, object] = {"DATA_PATH": str(folder / "lake")}
    lake = measure("DuckLake", "ducklake:" + server.target("lake"), attach, folder, events)
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
    catalogue = int(server.sql("SELECT pg_database_size('lake') - pg_database_size('template1')", "lake"))
    print(f"catalogue: {snapshots} snapshots, {catalogue / snapshots / 1024:.1f} KiB each")


def main() -> None:
    what, *words = sys.argv[1:] if sys.argv[1:2] and not sys.argv[1].isdigit() else ["", *sys.argv[1:]]
    sizes, programs = [int(word) for word in words], find_programs()
    if programs is None:
        raise SystemExit("there is no PostgreSQL: apt-get install postgresql")
    AuditLogger._ingest = None  # events are to stay in the journal until they are ingested here
    os.environ["PGPASSWORD"] = PASSWORD
    server = Postgres(programs, max_connections="400")
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if what == "hosts":
                count, seconds = (*sizes, *(200, 600)[len(sizes) :])
                for hosts in sorted({1, count // 20, count // 4, count} - {0}):
                    simulate(server, folder, hosts, seconds if hosts == count else min(60, seconds))
            elif what == "small":
                simulate_small(server, folder, *sizes or [2000])
            elif what == "rows":
                compare_rows(server, folder, *sizes or [1_000_000])
            else:
                compare_targets(server, folder, *sizes or [300_000])
    finally:
        server.close()


if __name__ == "__main__":
    main()
