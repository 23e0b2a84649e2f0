"""Measure mxcp_audit against what else one would use: python tools/bench.py [TOPIC …] [--quick | --full]

Each topic prints one Markdown table or more; `--write` puts them into docs/performance.md as well. What
is compared runs in the same minutes, round by round in turn, and is given as medians and ratios, so that
a busy machine troubles all alike. Peers run in environments of their own, made by tools/environment at
the first run; `--here` uses this interpreter alone and skips what it can't import.

Three print ratios of their own and take options: `query` and `verify` with `--rows N --rounds N`,
`scaleout EVENTS`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS_FILE = ROOT / "tools" / "bench_peers.py"
READ_FILE = ROOT / "tools" / "bench_read.py"
PAGE = ROOT / "docs" / "performance.md"
SCRIPTS = {  # with options of their own, and an environment
    "query": ("bench_read.py", "bench"),
    "verify": ("bench_read.py", "bench"),
    "scaleout": ("bench_scaleout.py", "scaleout"),
}

MAIN_ENVIRONMENT = ("bench", "duckdb", "duckdb-cli", "fastmcp", "structlog", "loguru")
ENVIRONMENTS = {  # of peers that can't live beside the others
    "mxcp-0.2": (
        "bench-mxcp02",
        *("mxcp==0.2.2", "dbt-core<1.10", "dbt-duckdb<1.10", "mcp<1.12", "cel-python<0.4", "pydantic<2.12"),
    ),
    "mxcp-0.12": ("bench-mxcp012", "mxcp==0.12.*", "dbt-core<1.12", "dbt-duckdb<1.11"),
}
SCRIPT_ENVIRONMENTS = {
    "bench": MAIN_ENVIRONMENT,
    "scaleout": (  # as tests/test_scaleout.py has it, or each would make it anew
        *("scaleout", "duckdb==1.5.5", "duckdb-cli==1.5.5"),
        *(f"duckdb-extension-{name}==1.5.5" for name in ("ducklake", "postgres-scanner", "quack", "httpfs")),
    ),
}
PEERS = {  # what the tables call them
    "mxcp_audit": "**mxcp_audit**: redacts, encodes, records",
    "queue-discarding": "QueueHandler, listener discards",
    "queue": "QueueHandler, listener writes a file",
    "queue-json": "QueueHandler, JSON formatter, file",
    "structlog": "structlog, JSON, buffered file",
    "loguru": "loguru, enqueue, serialize, file",
    "sqlite": "sqlite3, insert and commit (WAL)",
    "duckdb": "DuckDB, `executemany` an event",
    "mxcp-0.2": "MXCP 0.2.2's logger, JSONL",
    "mxcp-0.12": "MXCP 0.12's logger, JSONL",
}
ONE_THREAD = {  # who can't be asked from several threads
    "mxcp-0.12": "MXCP 0.12's logger belongs to one event loop, and so to one thread.",
}
SMALL = "small"  # the 5-key nested input


@dataclass(frozen=True)
class Run:
    """What was asked for on the command line.

    Args:
        effort: "tiny" (does it work?), "quick" (about 3 minutes) or "full" (about 15).
        here: use this interpreter for everything.
        only: the peers to measure; ours is always among them. Empty means all.
        folder: where databases and logs go; deleted at the end.
    """

    effort: str
    here: bool
    only: frozenset[str]
    folder: Path

    def pick(self, tiny: Any, quick: Any, full: Any) -> Any:
        """Return the one of three values that fits the effort."""
        return {"tiny": tiny, "quick": quick, "full": full}[self.effort]

    def python(self, peer: str = "mxcp_audit") -> str:
        """Return the interpreter for a peer. Raises RuntimeError if its packages can't be had."""
        return sys.executable if self.here else _environment(ENVIRONMENTS.get(peer, MAIN_ENVIRONMENT))

    def place(self, name: str) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def peers(self, *names: str) -> list[str]:
        """Return the names that were not left out on the command line, ours first."""
        return [name for name in names if name == "mxcp_audit" or not self.only or name in self.only]


@functools.cache
def _environment(words: tuple[str, ...]) -> str:
    made = subprocess.run([str(ROOT / "tools" / "environment"), *words], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr.strip().splitlines()[-1])
    return made.stdout.strip()


@dataclass
class Table:
    """A table of results: a title, a row a contestant, and notes below."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.header) + " |"]
        lines.append("|---" + "|--:" * (len(self.header) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def environ(**changes: str) -> dict[str, str]:
    """Return the environment of a measured process: the module is found, and nothing of ours is set."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MXCP_") and key != "PYTHONDONTWRITEBYTECODE"
    }
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def printed(words: Sequence[str], **changes: str) -> list[str]:
    """Run a program and return the lines that it prints; RuntimeError says what it complains of."""
    env = environ(**changes)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.splitlines()


def us(nanoseconds: float) -> str:
    """Return microseconds as a table shows them."""
    return figure(nanoseconds / 1000)


def figure(value: float) -> str:
    """Return a number with three digits that count, and thousands separated."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def spread(values: Sequence[float], show: Callable[[float], str] = figure) -> str:
    """Return the quartiles of the rounds: half of them lie within."""
    return f"{show(quantile(values, 0.25))} … {show(quantile(values, 0.75))}"


class Peer:
    """A contestant: a child process that answers commands."""

    def __init__(self, run: Run, name: str, **changes: str) -> None:
        self.name = name
        self.folder = run.place(name)
        self.complaints = (self.folder.parent / f"{self.folder.name}.err").open("w+")
        self.process = subprocess.Popen(
            [run.python(name), str(PEERS_FILE), name, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=environ(**changes),
        )
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        watch = threading.Timer(600, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            self.complaints.seek(0)
            said = self.complaints.read().strip().splitlines() or ["it ended"]
            raise RuntimeError(said[-1])
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.communicate(timeout=120)
        self.complaints.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_peers(run: Run, names: Sequence[str], notes: list[str]) -> list[Peer]:
    """Start what can be started, and note what can't, with the reason."""
    started = []
    for name in names:
        try:
            started.append(Peer(run, name))
        except RuntimeError as error:
            if name == "mxcp_audit":
                raise
            notes.append(f"Skipped: {PEERS[name]} ({str(error)[:160]}).")
    return started


# --- topics


def latency(run: Run) -> Iterator[Table]:
    """How long `log_event` keeps its caller, against everything else one would call."""
    cases = [("5-key nested input", SMALL, 1), ("5-key nested input", SMALL, 4)]
    cases += [("26 KB input", "large", 1), ("26 KB input", "large", 4)]
    skipped: list[str] = []
    peers = start_peers(run, run.peers(*PEERS), skipped)
    for title, kind, threads in cases[: run.pick(2, 4, 4)]:
        many = "one thread" if threads == 1 else f"{threads} threads at once"
        table = Table(
            f"`log_event`, {title}, {many}: microseconds a call",
            ("", "p50", "half of the rounds", "p99", "p99.9", "p50 ÷ ours"),
            notes=list(skipped),
        )
        able = [peer for peer in peers if threads == 1 or peer.name not in ONE_THREAD]
        table.notes += [ONE_THREAD[peer.name] for peer in peers if peer not in able]
        rounds = _latency_rounds(run, able, kind, threads)
        ours = rounds["mxcp_audit"]
        for peer in able:
            mine = rounds[peer.name]
            ratio = statistics.median(m[0] / o[0] for m, o in zip(mine, ours))
            p50s = [each[0] for each in mine]
            table.rows.append(
                (
                    PEERS[peer.name],
                    us(statistics.median(p50s)),
                    spread(p50s, us),
                    us(statistics.median(each[1] for each in mine)),
                    us(statistics.median(each[2] for each in mine)),
                    figure(ratio),
                )
            )
        yield table
    for peer in peers:
        peer.close()


def _latency_rounds(
    run: Run, peers: Sequence[Peer], kind: str, threads: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Return p50, p99 and p99.9 of each round of each peer; a round is a burst of up to 5000 calls."""
    budget = run.pick(0.005, 0.03, 0.1)  # seconds of a round; slow peers make fewer calls
    most = 5000 if kind == SMALL else 400  # what is queued must be written before the next round
    events = {}
    for peer in peers:
        warm = statistics.median(
            peer.ask(do="burst", events=8 * threads, input=kind, threads=threads)[threads:]
        )
        events[peer.name] = threads * max(8, min(most, int(budget * 1e9 / warm)) // threads)
        peer.ask(do="burst", events=events[peer.name], input=kind, threads=threads)
    rounds: dict[str, list[tuple[float, float, float]]] = {peer.name: [] for peer in peers}
    for _ in range(run.pick(2, 7, 31)):
        for peer in peers:
            took = peer.ask(do="burst", events=events[peer.name], input=kind, threads=threads)
            rounds[peer.name].append((quantile(took, 0.5), quantile(took, 0.99), quantile(took, 0.999)))
    return rounds


def pipeline(run: Run) -> Iterator[Table]:
    """End to end: from the first call until everything can be queried, in a process of its own each."""
    table = Table(
        "End to end: events of the 5-key input, flat out, until recorded and until in a table",
        (
            *("", "events/s returned", "events/s recorded", "events/s queryable", "÷ ours"),
            *("CPU s per million", "peak MB", "bytes/event"),
        ),
    )
    million = run.pick(2_000, 100_000, 500_000)
    slow = {"duckdb": 0.01, "mxcp-0.12": 0.1, "loguru": 0.1}
    contestants = [("mxcp_audit", PEERS["mxcp_audit"], "package", 1)]
    contestants += [("mxcp_audit", "mxcp_audit, the `duckdb` program", "cli", 1)]
    contestants += [("mxcp_audit", "mxcp_audit, four threads", "package", 4)]
    contestants += [
        (name, PEERS[name], "", 1) for name in PEERS if name not in ("mxcp_audit", "queue-discarding")
    ]
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(run.pick(1, 1, 3)):
        for name, title, engine, threads in contestants:
            if name not in run.peers(*PEERS) or results.get(title) == []:
                continue
            events = max(100, int(million * slow.get(name, 1)) // 4 * 4)
            try:
                peer = Peer(run, name, **({"MXCP_AUDIT_ENGINE": engine} if engine else {}))
                result = peer.ask(do="pipeline", events=events, input=SMALL, threads=threads)
                peer.close()
            except RuntimeError as error:
                table.notes.append(f"Skipped: {title} ({str(error)[:160]}).")
                results[title] = []
                continue
            if result["count"] != events:
                table.notes.append(f"{title}: {result['count']:,.0f} of {events:,} events arrived.")
            for key in ("returned", "recorded", "queryable"):
                result[key] = events / result[key]
            result["cpu"] *= 1e6 / events
            result["bytes"] /= events
            results.setdefault(title, []).append(result)
    ours = results[PEERS["mxcp_audit"]]
    for title, mine in results.items():
        if mine:
            middle = {key: statistics.median(each[key] for each in mine) for key in mine[0]}
            ratio = statistics.median(m["queryable"] / o["queryable"] for m, o in zip(mine, ours))
            keys = ("returned", "recorded", "queryable")
            row = [title, *(figure(middle[key]) for key in keys), figure(ratio)]
            table.rows.append((*row, *(figure(middle[key]) for key in ("cpu", "peak_mb", "bytes"))))
    table.notes.append(
        "“Recorded”: handed to the operating system. “Queryable”: in the database after an orderly end; "
        "for the files of the others, the end of writing (nothing has indexed or typed them yet)."
    )
    yield table


def server(run: Run) -> Iterator[Table]:
    """What auditing costs a FastMCP server under a real client's load."""
    python = run.python()
    folder = run.place("server")
    with contextlib.ExitStack() as stack:
        urls = {}
        processes = {}
        for name, what in (
            ("plain", "plain"),
            ("passing", "passing"),
            ("audited", str(folder / "log.duckdb")),
        ):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            words = [python, str(PEERS_FILE), "serve", str(port), what]
            process = subprocess.Popen(words, env=environ(), stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            urls[name], processes[name] = f"http://127.0.0.1:{port}/mcp", process.pid
        command = json.dumps(
            {
                "urls": urls,
                "pids": processes,
                "rounds": run.pick(1, 3, 8),
                "seconds": run.pick(0.3, 4, 8),
                "clients": 4,
            }
        )
        rounds = json.loads(printed([python, str(PEERS_FILE), "load", command])[-1])
    table = Table(
        "A FastMCP server over HTTP on 127.0.0.1, four clients, one small tool",
        ("", "calls/s", "half of the rounds", "p50 ms", "p99 ms", "server CPU ms a call"),
    )
    titles = {
        "plain": "without any middleware",
        "passing": "with a middleware that does nothing",
        "audited": "**with auditing**",
    }
    cpu = {  # of all rounds together: the clock of a process ticks too slowly for one
        name: sum(each[name]["cpu"] for each in rounds) / sum(each[name]["calls"] for each in rounds)
        for name in titles
    }
    for name, title in titles.items():
        mine = [each[name] for each in rounds]
        rates = [each["rate"] for each in mine]
        others = (figure(statistics.median(each[key] for each in mine)) for key in ("p50", "p99"))
        table.rows.append(
            (title, figure(statistics.median(rates)), spread(rates), *others, figure(cpu[name] * 1000))
        )
    for base, title in (
        ("plain", "with auditing ÷ without any middleware"),
        ("passing", "with auditing ÷ with a middleware that does nothing"),
    ):
        ratio = {
            key: [each["audited"][key] / each[base][key] for each in rounds] for key in ("rate", "p50", "p99")
        }
        rate, p50, p99 = (f"{statistics.median(values):.3f}" for values in ratio.values())
        table.rows.append((title, rate, spread(ratio["rate"]), p50, p99, f"{cpu['audited'] / cpu[base]:.3f}"))
    yield table


def middleware(run: Run) -> Iterator[Table]:
    """How long a middleware itself keeps a tool call: all of its own code, before the body and behind it."""
    words = [str(PEERS_FILE), "middleware", str(run.place("middleware")), str(run.pick(5, 300, 2000))]
    *_, answer = printed([run.python(), *words])
    table = Table(
        "The middleware's own time in a FastMCP server: microseconds a call, less one that does nothing",
        ("", "p50", "half of the calls", "p99", "`log_event` there, p50"),
    )
    for name, took in json.loads(answer).items():
        where, how = name.split(", ")
        title = f"{where}, {'the first time in its request' if how == 'first' else 'again, same request'}"
        own, logged = zip(*took)
        figures = (quantile(own, 0.5), quantile(own, 0.99), quantile(logged, 0.5))
        p50, p99, beside = map(figure, figures)
        table.rows.append((title, p50, spread(own), p99, beside))
    yield table


def strict(run: Run) -> Iterator[Table]:
    """What it costs to have a call on record before its body runs, and its end before it is answered."""
    events, rounds = run.pick(20, 200, 1000), run.pick(1, 5, 15)
    took = _script(run, _STRICT, str(run.place("strict")), str(events), str(rounds))
    table = Table(
        "A call on record before it runs, and its end before it is answered: microseconds a call, one thread",
        ("", "median of the rounds", "half of the rounds", "÷ not strict"),
    )
    loose = statistics.median(took["not strict"])
    for title, mine in took.items():
        middle = statistics.median(mine)
        table.rows.append((title, figure(middle), spread(mine), figure(middle / loose)))
    table.notes.append(
        "None of these forces anything to the disk (`durable`, `synchronous=FULL`, `fsync`). SQLite and the "
        "file are written by the caller itself, who waits for as long as the disk does; strict calls wait at "
        "most `strict_timeout`, because a thread of the logger's own writes."
    )
    yield table


_STRICT = """
import asyncio, json, logging, sqlite3, statistics, sys, time; from pathlib import Path
sys.path.insert(0, "tools")
import mxcp_audit, bench_peers as peers
folder, events, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
loose = mxcp_audit.AuditLogger(folder / "loose.duckdb")
strict = mxcp_audit.AuditLogger(folder / "strict.duckdb", strict=True)
database = sqlite3.connect(folder / "calls.sqlite", isolation_level=None)
database.execute("pragma journal_mode=wal"); database.execute("pragma synchronous=normal")
database.execute("create table calls (at, what, name, input)")
file = logging.getLogger("calls"); file.propagate = False; file.setLevel("INFO")
file.addHandler(logging.FileHandler(folder / "calls.log"))
def sqlite(given):
    for what in ("begin", "end"):
        row = (time.time(), what, "find", json.dumps(given))
        database.execute("insert into calls values (?, ?, ?, ?)", row)
def lines(given):
    for what in ("begin", "end"): file.info("%s %s %s", what, "tool", json.dumps(given))
def call(audit):
    def run(given):
        with audit.record("tool", "find", given): pass
    return run
def timed(run):
    took = []
    for number in range(events):
        given = peers.small_input(number); start = time.perf_counter(); run(given)
        took.append(1e6 * (time.perf_counter() - start))
    return statistics.median(took)
async def timed_async(audit):
    took = []
    for number in range(events):
        given = peers.small_input(number); start = time.perf_counter()
        async with audit.record("tool", "find", given): pass
        took.append(1e6 * (time.perf_counter() - start))
    return statistics.median(took)
contestants = {
    "not strict": lambda: timed(call(loose)),
    "**strict**": lambda: timed(call(strict)),
    "not strict, in an event loop": lambda: asyncio.run(timed_async(loose)),
    "**strict, in an event loop**": lambda: asyncio.run(timed_async(strict)),
    "two rows in SQLite (WAL)": lambda: timed(sqlite),
    "two lines by `logging.FileHandler`": lambda: timed(lines),
}
out = {title: [] for title in contestants}
for number in range(-1, rounds):
    for title, run in contestants.items():
        took = run()
        if number >= 0: out[title].append(took)
loose.shutdown(); strict.shutdown(); print(json.dumps(out))
"""


def ingest(run: Run) -> Iterator[Table]:
    """How fast the journal goes into the database, with each engine."""
    events = run.pick(2_000, 200_000, 1_000_000)
    table = Table(
        f"Ingest of {events:,} events of the 5-key input from the journal",
        ("", "rows/s", "rounds", "CPU s per million", "bytes/event in the database"),
    )
    made = run.place("journal")
    _script(run, _MAKE_JOURNAL, str(made), str(events))
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(run.pick(1, 2, 5)):
        for engine in ("package", "cli", "bare"):
            folder = run.place("ingest")
            shutil.copytree(made, folder, dirs_exist_ok=True)
            if engine == "bare":
                result = _script(run, _BARE, str(folder))
            else:
                result = _script(run, _INGEST, str(folder), MXCP_AUDIT_ENGINE=engine)
            results.setdefault(engine, []).append(result)
            shutil.rmtree(folder)
    for engine, mine in results.items():
        rates = [events / each["seconds"] for each in mine]
        cpu = statistics.median(each["cpu"] for each in mine) * 1e6 / events
        size = statistics.median(each["bytes"] for each in mine) / events
        row = {
            "package": "the `duckdb` package",
            "cli": "the `duckdb` program",
            "bare": "DuckDB alone, set alike: the lines into a table, the digests into another",
        }[engine]
        table.rows.append(
            (
                row,
                figure(statistics.median(rates)),
                f"{figure(min(rates))} … {figure(max(rates))}",
                figure(cpu),
                figure(size),
            )
        )
    table.notes.append(
        "The package is loaded before the time begins, as it is in a server after its first ingest."
    )
    yield table
    megabytes = run.pick(1, 20, 100)
    forked = _script(run, _FORKS, str(run.place("forks")), str(megabytes))
    forks = Table(
        f"100 forks of a server while a child of it ingests {megabytes} MB: milliseconds each",
        ("", "p50", "the slowest", "events ingested"),
    )
    for title, key in (("while it ingests", "ms"), ("the same process before", "before")):
        count = figure(forked["ingested"]) if key == "ms" else ""
        forks.rows.append((title, figure(statistics.median(forked[key])), figure(max(forked[key])), count))
    yield forks


_MAKE_JOURNAL = """
import sys; from pathlib import Path; sys.path.insert(0, "tools")
import mxcp_audit, bench_peers as peers
mxcp_audit.AuditLogger._ingest = None
ours = peers.Ours(Path(sys.argv[1]))
peers.flood(ours, peers.small_input, int(sys.argv[2]), 1)
ours.close(); print("{}")
"""
_INGEST = """
import json, os, sys, time; from pathlib import Path; sys.path.insert(0, "tools")
import mxcp_audit, bench_peers as peers
path = Path(sys.argv[1], "log.duckdb")
store = mxcp_audit.Store(mxcp_audit.config_from_arguments(path))
if os.environ["MXCP_AUDIT_ENGINE"] == "package": import duckdb
before, _ = peers._usage(); start = time.perf_counter()
assert store.ingest()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "cpu": peers._usage()[0] - before, "bytes": path.stat().st_size}))
"""

_BARE = """
import json, sys, time; from pathlib import Path; sys.path.insert(0, "tools")
import duckdb, mxcp_audit, bench_peers as peers
files = [str(path) for path in Path(sys.argv[1], "log.duckdb.journal").glob("*.jsonl")]
path = Path(sys.argv[1], "bare.duckdb")
before, _ = peers._usage(); start = time.perf_counter()
with duckdb.connect(str(path)) as database:
    database.execute(mxcp_audit._session_settings(guest=True))  # one thread and little memory, as ours
    given = {"files": files, "longest": 2**20, "lenient": False}
    database.execute("CREATE TABLE logs AS " + mxcp_audit._LINES, given)
    database.execute("CREATE TABLE ledger AS " + mxcp_audit.digests("logs"))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "cpu": peers._usage()[0] - before, "bytes": path.stat().st_size}))
"""

_FORKS = """
import json, os, sys, threading, time; from pathlib import Path; sys.path.insert(0, "tools")
import mxcp_audit, bench_peers as peers
def forks():
    took = []
    for _ in range(100):
        start = time.perf_counter(); child = os.fork()
        if not child: os._exit(0)
        took.append(1000 * (time.perf_counter() - start)); os.waitpid(child, 0)
    return took
audit = mxcp_audit.AuditLogger(Path(sys.argv[1], "log.duckdb"), flush_interval=3600)
events = int(sys.argv[2]) * 10
for number in range(events): audit.log_event("cli", "tool", "large", {"text": "word " * 20000})
audit.wait_written(60); before = forks()
flush = threading.Thread(target=audit.flush, args=(300,)); flush.start()
while audit._ingester._child is None and flush.is_alive(): time.sleep(0.001)
took = forks(); flush.join(); audit.shutdown()
print(json.dumps({"before": before, "ms": took, "ingested": audit.counters.ingested}))
"""


def _script(run: Run, code: str, *arguments: str, **changes: str) -> Any:
    """Run Python code in the main environment and return what it prints last, as JSON."""
    return json.loads(printed([run.python(), "-c", code, *arguments], **changes)[-1])


def footprint(run: Run) -> Iterator[Table]:
    """What importing costs, and what a logger takes while its server does nothing."""
    took: dict[str, list[tuple[float, float]]] = {}
    threads = 0
    for _ in range(run.pick(1, 11, 41)):
        for statement in ("import mxcp_audit", "import logging, json", "import dataclasses", "import duckdb"):
            result = _script(run, _IMPORT, statement)
            took.setdefault(statement, []).append((result["wall"] * 1000, result["cpu"] * 1000))
            if statement == "import mxcp_audit":
                threads = max(threads, result["threads"])
    table = Table("Import, in a fresh interpreter: milliseconds", ("", "wall", "half of the rounds", "CPU"))
    for statement, times in took.items():
        walls, cpus = zip(*times)
        middle = [figure(statistics.median(each)) for each in (walls, cpus)]
        table.rows.append((f"`{statement}`", middle[0], spread(walls), middle[1]))
    table.notes.append(f"Threads after the import: {threads} (1 is the interpreter's own).")
    yield table
    events = run.pick(1_000, 100_000, 100_000)
    idle = Table(
        f"Added to a FastMCP server by a logger that recorded and ingested {events:,} events, then idles",
        ("", "resident MB", "idle CPU"),
    )
    idles = (str(run.pick(0.2, 2, 10)), str(events))
    for engine, title in (("package", "the `duckdb` package"), ("cli", "the `duckdb` program")):
        mine = [
            _script(run, _IDLE, str(run.place("idle")), *idles, MXCP_AUDIT_ENGINE=engine)
            for _ in range(run.pick(1, 2, 3))
        ]
        memory = statistics.median(each["memory"] for each in mine) / 2**20
        idle.rows.append((title, figure(memory), f"{statistics.median(each['idle'] for each in mine):.3%}"))
    yield idle


_IMPORT = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
exec(sys.argv[1])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
import json, threading
print(json.dumps({"wall": wall, "cpu": cpu, "threads": threading.active_count()}))
"""
_IDLE = """
import asyncio, gc, json, logging, sys, time; from pathlib import Path; sys.path.insert(0, "tools")
import bench_peers as peers
try:
    from fastmcp import FastMCP; server = FastMCP("idle")
except ImportError:
    pass
gc.collect(); before = peers.resident_bytes()
ours = peers.Ours(Path(sys.argv[1]))
for number in range(int(sys.argv[3])): ours.log(peers.small_input(number))
assert ours.audit.flush(60)
time.sleep(0.5); gc.collect(); memory = peers.resident_bytes() - before
cpu, start = time.process_time(), time.perf_counter(); time.sleep(float(sys.argv[2]))
print(json.dumps({"memory": memory, "idle": (time.process_time() - cpu) / (time.perf_counter() - start)}))
"""


def ending(run: Run) -> Iterator[Table]:
    """What the end of a process costs, and that it loses nothing when many end in the same moment."""
    times: dict[str, list[float]] = {}
    for _ in range(run.pick(1, 9, 21)):
        for title, code in (("`import duckdb` and out", "import duckdb"), ("log one event and out", _ONE)):
            start = time.perf_counter()
            command = [run.python(), "-c", code, str(run.place("one"))]
            subprocess.run(command, env=environ(), check=True)
            times.setdefault(title, []).append(1000 * (time.perf_counter() - start))
    bare = statistics.median(times["`import duckdb` and out"])
    table = Table("A whole process, into a new database", ("", "ms", "half of the rounds", "ratio"))
    for title, mine in times.items():
        middle = statistics.median(mine)
        table.rows.append((title, figure(middle), spread(mine), figure(middle / bare)))
    yield table
    together = Table("Workers that get SIGTERM in the same moment, 50 events each", ("", "rounds", "whole"))
    rounds = run.pick(1, 5, 20)
    for workers in run.pick((2,), (4, 8), (4, 8)):
        for held in run.pick((1.5,), (0.0, 1.5), (0.0, 1.5)):
            whole = sum(_end_together(run, workers, held) for _ in range(rounds))
            title = f"{workers} workers" + (f", the database held for {held} s" if held else "")
            together.rows.append((title, str(rounds), str(whole)))
    yield together


_ONE = """
import sys; from mxcp_audit import AuditLogger
AuditLogger(sys.argv[1] + "/log.duckdb").log_event("cli", "tool", "x", {"user_id": 1})
"""
_WORKER = """
import os, signal, sys, time; from mxcp_audit import AuditLogger
audit = AuditLogger(sys.argv[1]); signal.signal(signal.SIGTERM, lambda *_: sys.exit())
for number in range(50): audit.log_event("http", "tool", f"{os.getpid()}-{number}")
audit.wait_written(); print("ready", flush=True); time.sleep(600)
"""


def _end_together(run: Run, workers: int, held: float) -> bool:
    """End workers at once; True if plain DuckDB sees every event after the last has ended."""
    path = str(run.place("together") / f"{os.urandom(4).hex()}.duckdb")
    hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"

    def start(code: str) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([run.python(), "-c", code, path], env=environ(), **pipes)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    running = [start(_WORKER) for _ in range(workers)]
    holder = start(hold) if held else None
    for process in running:
        process.terminate()
    if holder is not None:
        time.sleep(held)
        holder.kill()
    for process in (*running, *([holder] if holder else [])):
        process.communicate()
    select = "SELECT count(*) FROM logs"
    count = f"import duckdb, sys; (n,), = duckdb.connect(sys.argv[1]).sql({select!r}).fetchall(); print(n)"
    return _script(run, count, path) == workers * 50


def query(run: Run) -> Iterator[Table]:
    """How fast `log`, `stats` and others read a large log, against plain DuckDB; see bench_read.py."""
    rows, rounds = run.pick("2000", "1000000", "10000000"), run.pick("1", "3", "3")
    words = [run.python(), str(READ_FILE), "query", "--rows", rows, "--rounds", rounds]
    about, *lines = printed(words)
    table = Table(
        f"Reading: whole processes against plain DuckDB. {about}",
        ("command", "engine", "ms", "plain DuckDB, ms", "ratio"),
    )
    for line in lines:
        found = re.fullmatch(r"(\w+) +(.+?) +(\d+) ms +plain +(\d+) ms +ratio +([\d.]+)", line)
        if found:
            table.rows.append((f"`{found[2]}`", found[1], *found.groups()[2:]))
        else:
            table.notes.append(line + ".")
    yield table


def growth(run: Run) -> Iterator[Table]:
    """How cost grows with rows, threads, processes and input; a plot a curve in docs/ with --write."""
    yield _growth_rows(run)
    yield _growth_threads(run)
    yield _growth_processes(run)
    yield _growth_input(run)


@dataclass
class Plotted(Table):
    """A table that is also a curve: x, then one column a series."""

    name: str = ""
    x_title: str = ""
    y_title: str = ""
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, x: float, *values: float) -> None:
        for series, value in zip(self.header[1:], values):
            self.points.setdefault(series, []).append((x, value))
        self.rows.append((f"{x:,.0f}", *map(figure, values)))


def _growth_rows(run: Run) -> Plotted:
    table = Plotted(
        "Rows in the database: milliseconds, as a reader and a server see it",
        ("rows", "flush of 50 events", "newest 100 events", "one user's events", "MB"),
        name="growth-rows",
        x_title="rows in the database",
        y_title="milliseconds",
    )
    for power in range(run.pick(3, 4, 4), run.pick(4, 7, 8)):
        rows = 10**power
        result = _script(
            run, _ROWS, str(run.place("rows") / "log.duckdb"), str(rows), str(run.pick(1, 5, 15))
        )
        table.add(rows, *(1000 * result[key] for key in ("flush", "newest", "user")), result["bytes"] / 2**20)
    table.points.pop("MB")
    return table


_ROWS = """
import json, os, statistics, sys, time
import duckdb, mxcp_audit
path, rows, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
audit = mxcp_audit.AuditLogger(path, flush_interval=3600)
audit.log_event("http", "tool", "get_user", {"user_id": 0}, 12); audit.flush(60)
with duckdb.connect(path) as connection:
    connection.execute('''INSERT INTO logs BY NAME SELECT
        TIMESTAMP '2026-01-01' + to_microseconds(i * 1000003 % 31536000000000) AS timestamp, 'http' AS caller,
        'tool' AS type, 'get_user_' || i % 20 AS name,
        '{"user_id":' || i || ',"query":"select name from users where id = ?"}' AS input_json,
        (i % 400)::INTEGER AS duration_ms, 'n/a' AS policy_decision, 'success' AS status,
        'user' || i % 1000 AS user_id,
        '20260101T000000000000Z-' || lpad((i // 20000)::VARCHAR, 8, '0') AS segment,
        (i % 20000 + 1)::INTEGER AS seq FROM range($rows) AS numbers(i)''', {"rows": rows - 1})
def timed(work):
    took = []
    for _ in range(rounds):
        start = time.perf_counter(); work(); took.append(time.perf_counter() - start)
    return statistics.median(took)
def flush():
    for number in range(50): audit.log_event("http", "tool", "get_user", {"user_id": number}, 12)
    assert audit.flush(600)
flush()
store = mxcp_audit.Store(mxcp_audit.config_from_arguments(path))
def read(what):
    with store.reading() as reading: assert list(reading.rows(what))
times = {"flush": timed(flush), "newest": timed(lambda: read(mxcp_audit.Filter())),
         "user": timed(lambda: read(mxcp_audit.Filter(user="user7")))}
audit.shutdown(); print(json.dumps({**times, "bytes": os.stat(path).st_size}))
"""


def _growth_threads(run: Run) -> Plotted:
    table = Plotted(
        "Threads: microseconds an event until recorded, all threads flat out",
        ("threads", "until `log_event` returned", "until recorded"),
        name="growth-threads",
        x_title="threads",
        y_title="microseconds an event",
    )
    counts = [2**power for power in range(run.pick(2, 7, 7))]
    events = run.pick(2_000, 64_000, 256_000)
    _add_medians(run, table, counts, lambda count: _pipeline_times(run, events, SMALL, count))
    return table


def _growth_input(run: Run) -> Plotted:
    table = Plotted(
        "Size of the input: microseconds an event",
        ("bytes", "until `log_event` returned", "until recorded"),
        name="growth-input",
        x_title="bytes of input as JSON",
        y_title="microseconds an event",
    )
    sizes = [100, 1_000, 10_000, 100_000, 1_000_000][: run.pick(2, 5, 5)]
    volume = run.pick(10**5, 2 * 10**7, 10**8)
    _add_medians(
        run,
        table,
        sizes,
        lambda size: _pipeline_times(run, min(20_000, max(20, volume // size)), str(size), 1),
    )
    return table


def _pipeline_times(run: Run, events: int, kind: str, threads: int) -> list[float]:
    peer = Peer(run, "mxcp_audit")
    result = peer.ask(do="pipeline", events=events, input=kind, threads=threads)
    peer.close()
    return [result[key] / events * 1e6 for key in ("returned", "recorded")]


def _add_medians(
    run: Run, table: Plotted, places: Sequence[int], measure: Callable[[int], list[float]]
) -> None:
    """Measure at each place of the x axis in turn, several times, and add the medians."""
    rounds = [[measure(place) for place in places] for _ in range(run.pick(1, 1, 3))]
    for index, place in enumerate(places):
        table.add(place, *(statistics.median(values) for values in zip(*(each[index] for each in rounds))))


def _growth_processes(run: Run) -> Plotted:
    table = Plotted(
        "Processes that log into one database: microseconds an event, all of them together",
        ("processes", "until all is in the table"),
        name="growth-processes",
        x_title="processes",
        y_title="microseconds an event",
    )
    events = run.pick(1_000, 64_000, 256_000)

    def measure(count: int) -> list[float]:
        folder = run.place("processes")
        words = [run.python(), "-c", _PROCESS, str(folder), str(events // count)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        children = [subprocess.Popen(words, cwd=ROOT, env=environ(), **pipes) for _ in range(count)]
        for child in children:
            assert child.stdout is not None and child.stdout.readline()
        start = time.perf_counter()
        for child in children:
            child.communicate(b"go\n")
        result = _script(run, _FINISH, str(folder))
        took = time.perf_counter() - start
        if result["count"] != events // count * count:
            table.notes.append(f"{count} processes: {result['count']:,} of {events:,} events arrived.")
        return [took / events * 1e6]

    _add_medians(run, table, [2**power for power in range(run.pick(2, 6, 6))], measure)
    return table


_PROCESS = """
import sys; from pathlib import Path; sys.path.insert(0, "tools")
import bench_peers as peers
ours = peers.Ours(Path(sys.argv[1])); print("ready", flush=True); sys.stdin.readline()
peers.flood(ours, peers.small_input, int(sys.argv[2]), 1)
"""
_FINISH = """
import json, sys; from pathlib import Path; sys.path.insert(0, "tools")
import mxcp_audit, bench_peers as peers
ours = peers.Ours(Path(sys.argv[1]))
mxcp_audit.Store(mxcp_audit.config_from_arguments(ours.path)).ingest()
print(json.dumps({"count": ours.count()}))
"""


# --- plots


def plot(table: Plotted) -> str:
    """Return an SVG of a table's curves, both axes logarithmic: a straight rise is a power law."""
    width, height, left, top, right, bottom = 640, 360, 62, 40, 20, 46
    xs = [math.log10(x) for points in table.points.values() for x, _ in points]
    ys = [math.log10(y) for points in table.points.values() for _, y in points]
    low, high = math.floor(min(ys)), math.ceil(max(ys) + 1e-9)
    first, last = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - first) / ((last - first) or 1)
        up = (math.log10(y) - low) / ((high - low) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for power in range(low, high + 1):
        _, y = at(10**first, 10**power)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:,.10g}</text>')
    for x in sorted({x for points in table.points.values() for x, _ in points}):
        across, _ = at(x, 10**low)
        parts.append(f'<path d="M{across:.1f} {top}V{height - bottom}" stroke="#eee"/>')
        parts.append(
            f'<text x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:,.0f}</text>'
        )
    colours = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce")
    for number, (series, points) in enumerate(table.points.items()):
        colour = colours[number % len(colours)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
            for x, y in (at(*point) for point in points)
        ]
        parts.append(
            f'<text x="{left + number * 190}" y="18" fill="{colour}">● {series.replace("`", "")}</text>'
        )
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 8}" text-anchor="middle">{table.x_title}</text>')
    parts.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{table.y_title}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


# --- the page


def machine(run: Run) -> str:
    """Name the machine and the versions: figures mean nothing without."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    versions = _script(run, _VERSIONS)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {versions['python']}, DuckDB {versions['duckdb']}{load}"
    )


_VERSIONS = """
import json, platform
try: from duckdb import __version__ as version
except ImportError: version = "absent"
print(json.dumps({"python": platform.python_version(), "duckdb": version}))
"""


def write_section(topic: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the topic's two marks on the page."""
    whole = page.read_text(encoding="utf-8")
    start, end = f"<!-- bench {topic} -->\n", f"<!-- end {topic} -->"
    if start not in whole or end not in whole:
        raise SystemExit(f"{page}: the marks of {topic} are missing; add the lines {start.strip()} and {end}")
    before, rest = whole.split(start, 1)
    _, after = rest.split(end, 1)
    page.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def measure(run: Run, topic: str, write: bool) -> bool:
    """Run one topic and print its tables; False, with the reason on standard error, if it failed."""
    started = time.monotonic()
    try:
        about = machine(run)
        tables = list(TOPICS[topic](run))
    except RuntimeError as error:
        print(f"{topic} failed: {error}", file=sys.stderr, flush=True)
        return False
    command = f"python tools/bench.py {topic} --{run.effort}"
    made = f"Made by `{command}` on {datetime.date.today().isoformat()}: {about}.\n"
    text = "\n".join([*(table.markdown() for table in tables), made])
    took = time.monotonic() - started
    print(f"\n## {topic}\n\n{text}\n({took:.0f} s)", flush=True)
    if write:
        write_section(topic, text)
        for table in tables:
            if isinstance(table, Plotted):
                (PAGE.parent / f"{table.name}.svg").write_text(plot(table), encoding="utf-8")
    return True


TOPICS: dict[str, Callable[[Run], Iterator[Table]]] = {
    "latency": latency,
    "server": server,
    "middleware": middleware,
    "strict": strict,
    "pipeline": pipeline,
    "ingest": ingest,
    "footprint": footprint,
    "ending": ending,
    "query": query,
    "growth": growth,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="topics: "
        + "; ".join(f"{name}: {(topic.__doc__ or '').splitlines()[0]}" for name, topic in TOPICS.items()),
    )
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)}; all by default")
    effort = parser.add_mutually_exclusive_group()
    for word, meaning in (
        ("tiny", "only see whether it works"),
        ("quick", "a few minutes, the default"),
        ("full", "about 15 minutes"),
    ):
        effort.add_argument(f"--{word}", dest="effort", action="store_const", const=word, help=meaning)
    parser.add_argument("--here", action="store_true", help="use this interpreter alone")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=[], metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--write", action="store_true", help="put the tables and plots into docs/")
    parser.set_defaults(effort="quick")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options, others = parser.parse_known_args(argv)
    first, *more = options.topics or [""]
    if first in SCRIPTS and (others or first != "query"):
        name, environment = SCRIPTS[first]
        words = [*others, *more] if first == "scaleout" else [first, *others]
        python = sys.executable if options.here else _environment(SCRIPT_ENVIRONMENTS[environment])
        return subprocess.call([python, str(ROOT / "tools" / name), *words], env=environ())
    if others:
        parser.error(f"unknown options: {' '.join(others)}")
    unknown = [topic for topic in options.topics if topic not in TOPICS]
    if unknown:
        parser.error(f"{unknown[0]} is no topic; there are {', '.join(TOPICS)}")
    with tempfile.TemporaryDirectory(prefix="mxcp_audit-bench-", ignore_cleanup_errors=True) as name:
        run = Run(options.effort, options.here, frozenset(options.only), Path(name))
        failures = [measure(run, topic, options.write) for topic in options.topics or TOPICS].count(False)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
