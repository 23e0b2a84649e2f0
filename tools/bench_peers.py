"""What tools/bench.py measures, each in a process and an environment of its own.

    python tools/bench_peers.py PEER FOLDER        answers commands: a line of JSON each, and one in return
    python tools/bench_peers.py serve PORT WHAT    a FastMCP server: plain, passing (a middleware that does
                                                   nothing), or a database that it is audited into
    python tools/bench_peers.py load JSON          its clients
    python tools/bench_peers.py middleware FOLDER ROUNDS    what our middleware takes of a request

Every peer gets the same events, records as much of them as it can, and does nothing that it does not
do for its users: queues are bounded only where they are by default, redaction is on where there is any.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Input = dict[str, Any]


def small_input(number: int) -> Input:
    """Return the benchmark's 5-key nested input, each time with another user."""
    return {
        "user_id": number,
        "query": "select name from users where id = ?",
        "options": {"limit": 10, "verbose": True, "password": "hunter2"},
        "tags": ["a", "b"],
        "api_key": "sk-not-a-real-one",
    }


def large_input(number: int) -> Input:
    """Return an input of 26 KB of JSON: a table of 200 small rows."""
    return {
        "user_id": number,
        "password": "hunter2",
        "rows": [
            {
                "id": row,
                "name": f"customer {row}",
                "city": "Zürich",
                "note": "called twice about the invoice",
                "amount": row * 1.25,
                "open": row % 3 == 0,
                "tags": ["north", "wholesale"],
            }
            for row in range(200)
        ],
    }


def sized_input(size: int) -> Callable[[int], Input]:
    """Return a maker of inputs of about `size` bytes of JSON: rows of 100 bytes."""
    text = "the customer called about the invoice and will write when it is paid"
    rows = [{"id": row, "text": text} for row in range(size // 100)]
    return lambda number: {"user_id": number, "rows": rows}


def maker(name: str) -> Callable[[int], Input]:
    """Return the maker of inputs that a name stands for: small, large, or a number of bytes."""
    return {"small": small_input, "large": large_input}.get(name) or sized_input(int(name))


class Ours:
    """mxcp_audit itself; the engine is chosen by MXCP_AUDIT_ENGINE."""

    def __init__(self, folder: Path) -> None:
        from mxcp_audit import AuditLogger

        self.path = folder / "log.duckdb"
        self.audit = AuditLogger(self.path)
        record = self.audit.log_event
        self.log = lambda params: record("http", "tool", "get_user", params, 12)

    def drain(self) -> None:
        writer = self.audit._writer
        while writer.pending:
            time.sleep(0.0005)

    def close(self) -> None:
        self.audit.shutdown(600)

    def count(self) -> int:
        import duckdb

        with duckdb.connect(str(self.path), read_only=True) as connection:
            return int(connection.execute("SELECT count(*) FROM logs").fetchall()[0][0])


class FilePeer:
    """A contestant that writes a line an event into the file `path`."""

    path: Path

    def drain(self) -> None:
        """Wait until all is recorded."""

    def close(self) -> None:
        pass

    def count(self) -> int:
        with self.path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


class Queued(FilePeer):
    """The standard library's QueueHandler with a listener; by default the listener writes a file."""

    discards = False
    formats = False

    def __init__(self, folder: Path) -> None:
        import logging
        import logging.handlers
        import queue

        self.path = folder / "log.txt"
        self.queue: queue.Queue[Any] = queue.Queue(-1)
        handler = logging.handlers.QueueHandler(self.queue)
        if self.formats:

            class JsonFormatter(logging.Formatter):
                def format(self, record: logging.LogRecord) -> str:
                    return json.dumps(
                        {
                            "time": record.created,
                            "message": record.getMessage(),
                            "input": vars(record)["input"],
                        },
                        ensure_ascii=False,
                    )

            handler.setFormatter(JsonFormatter())
        target = logging.NullHandler() if self.discards else logging.FileHandler(self.path)
        if not self.discards:
            target.setFormatter(logging.Formatter("%(message)s" if self.formats else "%(message)s %(input)s"))
        self.listener = logging.handlers.QueueListener(self.queue, target)
        self.listener.start()
        logger = logging.getLogger("audit")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
        self.log = lambda params: logger.info("tool %s", "get_user", extra={"input": params})

    def drain(self) -> None:
        self.queue.join()

    def close(self) -> None:
        self.listener.stop()


class QueuedDiscarding(Queued):
    discards = True


class QueuedJson(Queued):
    formats = True


class Structlog(FilePeer):
    def __init__(self, folder: Path) -> None:
        import structlog

        self.path = folder / "log.jsonl"
        self.file = self.path.open("w", encoding="utf-8")
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.WriteLoggerFactory(self.file),
            cache_logger_on_first_use=True,
        )
        logger = structlog.get_logger()
        self.log = lambda params: logger.info("tool", name="get_user", input=params)

    def drain(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Loguru(FilePeer):
    def __init__(self, folder: Path) -> None:
        from loguru import logger

        self.path = folder / "log.jsonl"
        logger.remove()
        logger.add(self.path, enqueue=True, serialize=True)
        self.logger = logger
        self.log = lambda params: logger.bind(input=params).info("tool get_user")

    def drain(self) -> None:
        self.logger.complete()

    def close(self) -> None:
        self.logger.remove()


_TABLE = """CREATE TABLE logs (timestamp TIMESTAMP, caller TEXT, type TEXT, name TEXT, input_json TEXT,
    duration_ms INTEGER, policy_decision TEXT, reason TEXT, status TEXT, error TEXT)"""
_INSERT = "INSERT INTO logs VALUES (?, 'http', 'tool', 'get_user', ?, 12, 'n/a', NULL, 'success', NULL)"


class Sqlite(FilePeer):
    """An INSERT and a commit an event, with the settings that are recommended for speed."""

    def __init__(self, folder: Path) -> None:
        import sqlite3

        self.path = folder / "log.sqlite"
        self.connection = sqlite3.connect(self.path, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=NORMAL")
        self.connection.execute(_TABLE)
        self.lock = threading.Lock()

    def log(self, params: Input) -> None:
        row = (time.time(), json.dumps(params, ensure_ascii=False))
        with self.lock:
            self.connection.execute(_INSERT, row)
            self.connection.commit()

    def close(self) -> None:
        self.connection.close()

    def count(self) -> int:
        import sqlite3

        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return int(connection.execute("SELECT count(*) FROM logs").fetchone()[0])


class DuckDB(FilePeer):
    """`executemany` into DuckDB, event by event: what is committed survives, as with the others."""

    def __init__(self, folder: Path) -> None:
        import duckdb

        self.path = folder / "log.duckdb"
        self.connection = duckdb.connect(str(self.path))
        self.connection.execute(_TABLE)
        self.lock = threading.Lock()

    def log(self, params: Input) -> None:
        import datetime

        row = (datetime.datetime.now(datetime.timezone.utc), json.dumps(params, ensure_ascii=False))
        with self.lock:
            self.connection.executemany(_INSERT, [row])

    def close(self) -> None:
        self.connection.close()

    def count(self) -> int:
        import duckdb

        with duckdb.connect(str(self.path), read_only=True) as connection:
            return int(connection.execute("SELECT count(*) FROM logs").fetchall()[0][0])


class Mxcp02(FilePeer):
    """MXCP's own logger, as it was until 0.3; it redacts what the endpoint's definition marks."""

    _DEFINITION = {
        "parameters": [
            {"name": "api_key", "type": "string", "sensitive": True},
            {
                "name": "options",
                "type": "object",
                "properties": {"password": {"type": "string", "sensitive": True}},
            },
            {"name": "password", "type": "string", "sensitive": True},
        ]
    }

    def __init__(self, folder: Path) -> None:
        from mxcp.audit import AuditLogger

        self.path = folder / "log.jsonl"
        self.audit = AuditLogger(self.path)
        record, definition = self.audit.log_event, self._DEFINITION
        self.log = lambda params: record("http", "tool", "get_user", params, 12, endpoint_def=definition)
        self.logged = 0

    def drain(self) -> None:
        self.audit._queue.join()
        time.sleep(0.02)  # what was taken off the queue is written within this; nothing says when

    def close(self) -> None:
        self.audit._stop_event.set()
        self.audit._writer_thread.join()  # its own shutdown gives up after 5 s


class Mxcp012(FilePeer):
    """MXCP's newer logger: a coroutine, with the schema that MXCP itself registers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def start(self) -> None:
        from mxcp.sdk.audit import AuditLogger
        from mxcp.server.schemas.audit import ENDPOINT_EXECUTION_SCHEMA as schema

        self.audit = await AuditLogger.jsonl(self.folder / "log.jsonl")
        await self.audit.create_schema(schema)
        record, name = self.audit.log_event, schema.schema_name
        self.log_async = lambda params: record("http", "tool", "get_user", params, 12, name)

    async def drain_async(self) -> None:
        await self.audit.backend.flush()

    async def close_async(self) -> None:
        await self.audit.close()

    def count(self) -> int:
        paths = [path for path in self.folder.glob("log*.jsonl") if "schemas" not in path.name]
        return sum(path.read_bytes().count(b"\n") for path in paths)


PEERS: dict[str, Callable[[Path], Any]] = {
    "mxcp_audit": Ours,
    "queue": Queued,
    "queue-discarding": QueuedDiscarding,
    "queue-json": QueuedJson,
    "structlog": Structlog,
    "loguru": Loguru,
    "sqlite": Sqlite,
    "duckdb": DuckDB,
    "mxcp-0.2": Mxcp02,
    "mxcp-0.12": Mxcp012,
}


def disk_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed_calls(log: Callable[[Input], Any], make: Callable[[int], Input], events: int) -> list[int]:
    """Return how many nanoseconds each call took; making the input doesn't count."""
    clock, took = time.perf_counter_ns, []
    for number in range(events):
        params = make(number)
        start = clock()
        log(params)
        took.append(clock() - start)
    return took


async def timed_calls_async(peer: Any, make: Callable[[int], Input], events: int) -> list[int]:
    clock, took = time.perf_counter_ns, []
    for number in range(events):
        params = make(number)
        start = clock()
        await peer.log_async(params)
        took.append(clock() - start)
    return took


def burst(peer: Any, make: Callable[[int], Input], events: int, threads: int) -> list[int]:
    """Log `events` events from `threads` threads at once, wait until they are recorded, return the times."""
    if threads == 1:
        took = timed_calls(peer.log, make, events)
    else:
        took = []
        gate = threading.Barrier(threads)

        def work() -> None:
            gate.wait()
            took.extend(timed_calls(peer.log, make, events // threads))

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    peer.drain()
    return took


def flood(peer: Any, make: Callable[[int], Input], events: int, threads: int) -> None:
    """Log as fast as it goes, without looking at the clock."""

    share = events // threads

    def work(count: int) -> None:
        log = peer.log
        for number in range(count):
            log(make(number))

    workers = [threading.Thread(target=work, args=(share,)) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    work(events - share * len(workers))
    for worker in workers:
        worker.join()


def _usage() -> tuple[float, float]:
    """Return CPU seconds and the peak of resident megabytes, children included."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return seconds, max(own.ru_maxrss, children.ru_maxrss) / 1024


def pipeline(peer: Any, folder: Path, command: dict[str, Any]) -> dict[str, float]:
    """Log `events` events flat out and close: how long until recorded, and until in the database."""
    make = maker(command["input"])
    peer.log(make(0))
    peer.drain()
    before, _ = _usage()
    start = time.perf_counter()
    flood(peer, make, command["events"] - 1, command["threads"])
    returned = time.perf_counter() - start
    peer.drain()
    recorded = time.perf_counter() - start
    peer.close()
    queryable = time.perf_counter() - start
    return _result(peer, folder, (returned, recorded, queryable), before)


async def pipeline_async(peer: Any, folder: Path, command: dict[str, Any]) -> dict[str, float]:
    make = maker(command["input"])
    await peer.log_async(make(0))
    await peer.drain_async()
    before, _ = _usage()
    start = time.perf_counter()
    for number in range(command["events"] - 1):
        await peer.log_async(make(number))
    returned = time.perf_counter() - start
    await peer.drain_async()
    recorded = time.perf_counter() - start
    await peer.close_async()
    return _result(peer, folder, (returned, recorded, time.perf_counter() - start), before)


def _result(
    peer: Any, folder: Path, times: tuple[float, float, float], cpu_before: float
) -> dict[str, float]:
    cpu, peak = _usage()
    return {
        "returned": times[0],
        "recorded": times[1],
        "queryable": times[2],
        "cpu": cpu - cpu_before,
        "peak_mb": peak,
        "bytes": disk_bytes(folder),
        "count": peer.count(),
    }


def _answer(value: object) -> None:
    print(json.dumps(value), flush=True)


def _commands() -> Any:
    for line in sys.stdin:
        yield json.loads(line)


def run_peer(peer: Any, folder: Path) -> None:
    """Answer commands until the end of the input."""
    _answer("ready")
    for command in _commands():
        if command["do"] == "burst":
            _answer(burst(peer, maker(command["input"]), command["events"], command["threads"]))
        else:
            _answer(pipeline(peer, folder, command))
            return
    peer.close()


async def run_peer_async(peer: Any, folder: Path) -> None:
    await peer.start()
    _answer("ready")
    for command in _commands():  # blocking: between two commands the loop has nothing to do
        if command["do"] == "burst":
            took = await timed_calls_async(peer, maker(command["input"]), command["events"])
            await peer.drain_async()
            _answer(took)
        else:
            _answer(await pipeline_async(peer, folder, command))
            return
    await peer.close_async()


def serve(port: int, what: str) -> None:
    """Run a FastMCP server on 127.0.0.1 with one small tool."""
    from fastmcp import FastMCP

    async def passing(context: Any, call_next: Callable[[Any], Any]) -> Any:
        return await call_next(context)

    server: Any = FastMCP("bench")
    if what == "passing":
        server.add_middleware(passing)
    elif what != "plain":
        from mxcp_audit import AuditLogger

        server.add_middleware(AuditLogger(what).middleware())

    @server.tool
    def find(user_id: int, query: str, options: dict[str, object], tags: list[str], api_key: str) -> str:
        return f"user {user_id}"

    server.run(
        transport="http",
        host="127.0.0.1",
        port=port,
        show_banner=False,
        uvicorn_config={"log_level": "error"},
    )


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(command: dict[str, Any]) -> None:
    """Load each server in turn with real clients, and print a list of rounds."""
    from fastmcp import Client

    async def call_until(client: Any, deadline: float, took: list[float]) -> None:
        number = 0
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            await client.call_tool("find", small_input(number))
            took.append(time.perf_counter() - start)
            number += 1

    async with contextlib.AsyncExitStack() as stack:
        clients: dict[str, list[Any]] = {}
        for name, url in command["urls"].items():
            await _await_port(int(url.split(":")[2].split("/")[0]))
            clients[name] = [await stack.enter_async_context(Client(url)) for _ in range(command["clients"])]
        rounds = []
        for number in range(-1, command["rounds"]):  # the first warms up
            results = {}
            order = list(clients)
            for name in (
                order[number % len(order) :] + order[: number % len(order)]
            ):  # who is first takes turns
                took: list[float] = []
                pid = command["pids"][name]
                cpu, start = _cpu_seconds(pid), time.perf_counter()
                deadline = start + command["seconds"]
                await asyncio.gather(*(call_until(client, deadline, took) for client in clients[name]))
                seconds, cpu = time.perf_counter() - start, _cpu_seconds(pid) - cpu
                took.sort()
                results[name] = {
                    "rate": len(took) / seconds,
                    "p50": took[len(took) // 2] * 1000,
                    "p99": took[len(took) * 99 // 100] * 1000,
                    "cpu": cpu,
                    "calls": len(took),
                }
            if number >= 0:
                rounds.append(results)
        print(json.dumps(rounds), flush=True)
        os._exit(0)  # closing sessions takes seconds, and nobody needs them any more


async def middleware(rounds: int, folder: Path) -> None:
    """Print the microseconds that our middleware itself takes in real requests, as lists a transport.

    A middleware around it lets it pass each answer again, 20 times a request: of these the first has found
    nothing of this request before. What a middleware that does nothing takes is subtracted. Beside it stands
    what a plain `log_event` takes there, between other code.
    """
    import uvicorn
    from fastmcp import Client, FastMCP

    from mxcp_audit import AuditLogger

    audit = AuditLogger(folder / "log.duckdb", flush_interval=3600)
    audited: Any = audit.middleware()
    took: dict[str, list[tuple[float, float]]] = {}

    async def passing(context: Any, call_next: Callable[[Any], Any]) -> Any:
        return await call_next(context)

    async def measuring(context: Any, call_next: Callable[[Any], Any]) -> Any:
        result = await call_next(context)
        if context.method != "tools/call":
            return await audited(context, lambda context: _value(result))

        async def answer(context: Any) -> Any:
            return result

        async def logging(context: Any, call_next: Callable[[Any], Any]) -> None:
            audit.log_event("http", "tool", "find", context.message.arguments, 1)

        spent: dict[Any, list[float]] = {passing: [], audited: [], logging: []}
        for _ in range(20):
            for one in spent:
                start = time.perf_counter()
                await one(context, answer)
                spent[one].append(time.perf_counter() - start)
        own = [(1e6 * (a - b), 1e6 * (c - b)) for b, a, c in zip(*spent.values())]
        took.setdefault(f"{transport}, first", []).append(own[0])
        took.setdefault(f"{transport}, again", []).extend(own[1:])
        return result

    server: Any = FastMCP("bench")
    server.add_middleware(measuring)

    @server.tool
    def find(user_id: int, query: str, options: dict[str, object], tags: list[str], api_key: str) -> str:
        return f"user {user_id}"

    async def call_from(where: Any) -> None:
        async with Client(where) as client:
            for number in range(rounds):
                await client.call_tool("find", small_input(number))

    transport = "memory"
    await call_from(server)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        transport = "http"
        running = uvicorn.Server(uvicorn.Config(server.http_app(), log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        await call_from(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp")
        running.should_exit = True
        thread.join(10)
    audit.shutdown()
    print(json.dumps(took))


async def _value(value: Any) -> Any:
    return value


async def _await_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.1)
    raise SystemExit(f"the server on port {port} did not start")


def main() -> None:
    if sys.argv[1] == "load":
        asyncio.run(load(json.loads(sys.argv[2])))
        return
    if sys.argv[1] == "middleware":
        asyncio.run(middleware(int(sys.argv[3]), Path(sys.argv[2])))
        return
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), sys.argv[3])
        return
    folder = Path(sys.argv[2])
    peer = PEERS[sys.argv[1]](folder)
    if hasattr(peer, "start"):
        asyncio.run(run_peer_async(peer, folder))
    else:
        run_peer(peer, folder)


if __name__ == "__main__":
    main()
