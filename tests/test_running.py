"""Calls that run: on record while they do, unfinished after a crash, refused where they can't be (strict)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SAFETY_SECONDS, wait_until

import mxcp_audit as m

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 0.3  # of strict calls here


def store_of(db: Path) -> m.Store:
    return m.Store(m.config_from_arguments(str(db)))


def rows_of(db: Path) -> list[dict[str, Any]]:
    with store_of(db).reading() as reading:
        return [
            dict(zip(m.PUBLIC_COLUMNS, row))
            for row in reading.rows(m.Filter(), count=None, oldest_first=True)
        ]


def begun_files(db: Path) -> list[Path]:
    return sorted(Path(f"{db}.journal").glob("*.begun*"))


def is_on_record(db: Path, *names: str) -> bool:
    calls = [event["name"] for *_, found in store_of(db).journal.begun(live=True) for event in found.values()]
    return sorted(names) == sorted(calls)


# --- what is killed

CHILD = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
import mxcp_audit
audit = mxcp_audit.AuditLogger(sys.argv[2], strict=sys.argv[3] == "strict", durable=sys.argv[4] == "durable")
bodies = os.open(sys.argv[5], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def work(thread):
    for number in range(10**9):
        name = f"{os.getpid()}_{thread}_{number}"
        with audit.record("tool", name, {"number": number}):
            os.write(bodies, f"{name}\\n".encode())
            time.sleep((0, 0.001, 0.05, 0.3)[number % 4])
def hang():
    with audit.record("tool", f"{os.getpid()}_hangs"):
        time.sleep(600)
threading.Thread(target=hang, daemon=True).start()
for thread in range(8):
    threading.Thread(target=work, args=(thread,), daemon=True).start()
time.sleep(600)
"""


@pytest.mark.parametrize("mode", ["plain", "strict", "strict durable"])
def test_killed_every_body_has_one_row(db: Path, mode: str) -> None:
    """`tools/torture.py` does this three hundred times.

    A child that was being started when its server was killed shares its locks until it runs its own program.
    """
    strict, _, durable = mode.partition(" ")
    bodies = db.parent / "bodies"
    command = [sys.executable, "-c", CHILD, str(ROOT), str(db), strict, durable or "-", str(bodies)]
    for _ in range(2):
        children = [subprocess.Popen(command) for _ in range(2)]
        try:
            have = bodies.stat().st_size if bodies.exists() else 0
            wait_until(lambda have=have: bodies.exists() and bodies.stat().st_size > have + 2000)  # type: ignore[misc]
            wait_until(lambda: begun_files(db))  # of calls that have run for long; the oldest hangs
        finally:
            for child in children:
                child.kill()
                child.wait()
        wait_until(lambda: store_of(db).ingest(wait=SAFETY_SECONDS) and not begun_files(db))
        counts: dict[str, int] = {}
        for row in rows_of_all(db):
            counts[row] = counts.get(row, 0) + 1
        # Else `kill -9` loses what the writer has not seen yet.
        began = bodies.read_text().split() if strict == "strict" else []
        assert not set(began) - counts.keys()
        assert not [name for name, count in counts.items() if count > 1]
    unfinished = [row for row in rows_of(db) if row["error"] == m.UNFINISHED]
    assert unfinished and all(row["status"] == "error" for row in unfinished)
    assert store_of(db).verify().intact


def rows_of_all(db: Path) -> list[str]:
    with store_of(db).reading() as reading:
        return [name for (name,) in reading.ask(m.Filter(), "SELECT name FROM events")]


# --- the files


def write_begun(db: Path, *, over: tuple[str, ...] = (), more: bytes = b"", **calls: str) -> Path:
    """Write what a process left that began these calls, by name, at these times."""
    journal = store_of(db).journal
    journal.make_directory()
    lines = []
    for name, moment in calls.items():
        event = {"timestamp": moment, "caller": "cli", "type": "tool", "name": name, "input_json": "{}"}
        event |= {"policy_decision": "n/a", "status": "error", "error": m.UNFINISHED}
        lines.append(json.dumps({**event, "call": ref_of(name)}).encode() + b"\n")
    if over:
        lines.append(b'{"ended":' + json.dumps([ref_of(name) for name in over]).encode() + b"}\n")
    path = Path(journal.directory, m.new_segment_id(time.time_ns()) + ".begun")
    path.write_bytes(b"".join(lines) + more)
    return path


def ref_of(name: str) -> str:
    return f"20260101T000000000000Z-{name.encode().hex():0>8}"


def write_end(db: Path, name: str, **more: object) -> Path:
    """Write a segment with the end of a call."""
    event = {"timestamp": "2026-01-01T00:00:09.000000Z", "caller": "cli", "type": "tool", "name": name}
    event |= {"input_json": "{}", "duration_ms": 9000, "policy_decision": "n/a", "status": "success", **more}
    store_of(db).journal.make_directory()
    path = Path(f"{db}.journal", m.new_segment_id(time.time_ns()) + ".jsonl")
    path.write_bytes(
        json.dumps({**event, "call": ref_of(name), "seq": 1}, separators=(",", ":")).encode() + b"\n"
    )
    return path


MIDNIGHT = "2026-01-01T00:00:00.000000Z"


def test_unfinished_is_what_neither_the_file_nor_a_segment_ends(db: Path) -> None:
    # What stands for no call, such as damage, holds nothing up.
    more = b'{"call":7}\n{"call":"x","timestamp":"%b","context":"no JSON"}\n{"torn' % MIDNIGHT.encode()
    calls = {"noted": MIDNIGHT, "ended": MIDNIGHT, "left": MIDNIGHT, "odd": "yesterday"}
    path = write_begun(db, over=("noted",), more=more, **calls)
    os.utime(path, (1767225607.5, 1767225607.5))  # 2026-01-01T00:00:07.5Z: its last sign of life
    write_end(db, "ended")
    expected = [("left", "2026-01-01T00:00:07.500000Z", 7500, m.UNFINISHED)]
    expected += [("ended", "2026-01-01T00:00:09.000000Z", 9000, None)]
    shown = [(row["name"], row["timestamp"], row["duration_ms"], row["error"]) for row in rows_of(db)]
    assert shown == expected  # before the ingest as after it
    ids = {row["event_id"] for row in rows_of(db)}
    assert store_of(db).ingest() and not begun_files(db)
    assert [
        (row["name"], row["timestamp"], row["duration_ms"], row["error"]) for row in rows_of(db)
    ] == expected
    assert {row["event_id"] for row in rows_of(db)} == ids and store_of(db).verify().intact


def test_unfinished_of_an_attempt_that_was_killed_is_taken_once(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_begun(db, left=MIDNIGHT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store_of(db).ingest()
    assert [row["name"] for row in rows_of(db)] == ["left"] and begun_files(db)
    assert store_of(db).ingest() and store_of(db).ingest()
    assert [row["name"] for row in rows_of(db)] == ["left"] and not begun_files(db)


def test_late_end_of_a_call_that_is_on_record_as_unfinished_is_put_aside(db: Path) -> None:
    write_begun(db, late=MIDNIGHT, other=MIDNIGHT)
    store_of(db).ingest()
    with store_of(db).target.session(SAFETY_SECONDS, write=True) as engine:  # somebody's own column
        engine.execute("ALTER TABLE audit.logs ADD COLUMN call VARCHAR")
    path = write_end(db, "late")
    end = write_end(db, "elsewhere")
    end.write_bytes(end.read_bytes().replace(ref_of("elsewhere").encode(), b"a call of another kind"))
    store_of(db).ingest()
    assert sorted(row["name"] for row in rows_of(db)) == ["elsewhere", "late", "other"]
    (rejected,) = path.parent.glob("*.rejected")
    assert "as unfinished" in rejected.read_text() and '\\"late\\"' in rejected.read_text()
    assert store_of(db).verify().intact and store_of(db).verify().lost == 1


def test_late_end_beside_a_line_that_cannot_be_read_leaves_both_on_record(db: Path) -> None:
    write_begun(db, late=MIDNIGHT)
    store_of(db).ingest()
    path = write_end(db, "late")
    path.write_bytes(path.read_bytes() + b"{broken\n")
    store_of(db).ingest()
    (rejected,) = path.parent.glob("*.rejected")
    assert "as unfinished" in rejected.read_text() and "{broken" in rejected.read_text()
    assert store_of(db).verify().intact and store_of(db).verify().lost == 2


# --- a logger


@pytest.fixture
def slow(db: Path) -> Iterator[Callable[..., None]]:
    """Run calls in threads until they are let go, or the test ends."""
    loggers: list[m.AuditLogger] = []
    go = threading.Event()
    threads: list[threading.Thread] = []

    def run(audit: m.AuditLogger, *names: str, size: int = 1, **more: Any) -> None:
        def body(name: str) -> None:
            with audit.record("tool", name, "x" * size, **more):
                go.wait(SAFETY_SECONDS)

        for name in names:
            threads.append(threading.Thread(target=body, args=(name,)))
            threads[-1].start()
        loggers.append(audit)

    run.go = go  # type: ignore[attr-defined]
    run.threads = threads  # type: ignore[attr-defined]
    yield run
    go.set()
    for thread in threads:
        thread.join(SAFETY_SECONDS)
    for audit in loggers:
        audit.shutdown()


def let_go(slow: Any) -> None:
    slow.go.set()
    for thread in slow.threads:
        thread.join(SAFETY_SECONDS)


def test_running_calls_are_shown_filtered_and_counted(db: Path, slow: Any, cli: Any) -> None:
    audit = m.AuditLogger(db)
    with audit.record("tool", "quick"):
        pass
    slow(audit, "one", caller="http", user_id="u1")
    slow(audit, "two")
    wait_until(lambda: is_on_record(db, "one", "two"))
    shown = json.loads(cli("log", "--db", str(db), "--running", "--json").stdout)
    assert [row["name"] for row in shown] == ["one", "two"]
    assert {(row["status"], row["error"]) for row in shown} == {("running", None)}
    one = cli("log", "--db", str(db), "--running", "--user", "u1").stdout
    assert " one " in one and " two " not in one and " running " in one
    assert cli("log", "--db", str(db), "--running", "--min-ms", "3600000").stdout.count("\n") <= 1
    stats = json.loads(cli("stats", "--db", str(db), "--json").stdout)
    assert {row["name"]: (row["calls"], row["running"]) for row in stats} == {
        **{"quick": (1, 0), "one": (0, 1), "two": (0, 1)}
    }
    let_go(slow)
    audit.shutdown()
    assert not begun_files(db) and json.loads(cli("log", "--db", str(db), "--running", "--json").stdout) == []
    assert sorted(row["name"] for row in rows_of(db)) == ["one", "quick", "two"]
    wrong = cli("log", "--db", str(db), "--running", "--follow")
    assert wrong.returncode == 2 and "--running" in wrong.stderr


def test_doctor_names_calls_that_hang_and_calls_that_were_refused(db: Path, cli: Any) -> None:
    path = write_begun(db, hangs=MIDNIGHT)
    write_end(db, "no", status="error", error="told", error_type="AuditUnavailableError", timestamp=now())
    with open(path) as file:
        assert m.try_lock(file.fileno())
        done = cli("doctor", "--db", str(db))
    assert done.returncode == 1 and "tool hangs has run since 2026-01-01T00:00:00" in done.stdout
    assert "1 call refused in 30 days" in done.stdout and "told" in done.stdout


def now() -> str:
    return m.utc_now().strftime(m.LINE_TIME)


def test_follow_shows_what_runs_and_then_its_end(db: Path, slow: Any) -> None:
    audit = m.AuditLogger(db)
    command = [sys.executable, "-u", "-m", "mxcp_audit", "log", "--db", str(db), "-f"]
    follower = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert follower.stdout is not None and "waiting for the first event" in follower.stdout.readline()
        slow(audit, "long")
        line = follower.stdout.readline()
        assert line.startswith("running since ") and "tool long" in line
        let_go(slow)
        rest = [follower.stdout.readline() for _ in range(2)]
        assert "long" in rest[1] and "success" in rest[1]
    finally:
        follower.kill()
        follower.communicate()


def test_begun_file_is_written_anew_when_it_grows_moves_or_is_closed(db: Path, slow: Any) -> None:
    audit = m.AuditLogger(db)
    slow(audit, "first", size=1000)
    wait_until(lambda: is_on_record(db, "first"))
    begun = audit._writer._appender.begun
    (path,) = begun_files(db)
    for number in range(5):
        slow.go.clear()
        slow(audit, f"large{number}", size=600_000)
        wait_until(lambda number=number: begun.on_record >= {number + 2})  # type: ignore[misc]
    assert is_on_record(db, "first", *(f"large{number}" for number in range(5)))
    assert begun_files(db) == [path]
    path.unlink()
    slow(audit, "moved")
    wait_until(lambda: is_on_record(db, "first", "moved", *(f"large{number}" for number in range(5))))
    assert begun_files(db) != [path]
    assert begun._file is not None
    os.close(begun._file.number())
    slow(audit, "closed")
    wait_until(lambda: "closed" in str(list(store_of(db).journal.begun(live=True))))
    let_go(slow)
    audit.shutdown()
    store_of(db).ingest()
    assert len(rows_of(db)) == len({row["name"] for row in rows_of(db)}) == 8
    assert {row["status"] for row in rows_of(db)} == {"success"}


def test_fork_leaves_the_calls_to_the_parent(db: Path, slow: Any) -> None:
    audit = m.AuditLogger(db)
    slow(audit, "parent")
    wait_until(lambda: is_on_record(db, "parent"))
    child = os.fork()
    if not child:
        with audit.record("tool", "child"):
            pass
        audit.shutdown()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and is_on_record(db, "parent")
    let_go(slow)
    audit.shutdown()
    store_of(db).ingest(wait=SAFETY_SECONDS)
    assert sorted((row["name"], row["status"]) for row in rows_of(db)) == [
        ("child", "success"),
        ("parent", "success"),
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_only_a_strict_call_is_on_record_before_it_has_run_for_a_moment(
    db: Path, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "_BRIEF_SECONDS", SAFETY_SECONDS)
    monkeypatch.setattr(m, "_SIGN_SECONDS", SAFETY_SECONDS)
    with m.AuditLogger(db, strict=strict) as audit, contextlib.ExitStack() as calls:
        for _ in range(5):
            with audit.record("tool", "over"):
                pass
        calls.enter_context(audit.record("tool", "brief"))
        assert b"over" not in m.Journal(f"{db}.journal").running()
        audit.log_event("cli", "tool", "other")
        assert audit.wait_written()
        assert is_on_record(db, *(["brief"] if strict else []))
        assert bool(begun_files(db)) is strict
        monkeypatch.setattr(m, "_BRIEF_SECONDS", 0.0)
        audit._writer._rouse()
        wait_until(lambda: is_on_record(db, "brief"))
    assert [row["status"] for row in rows_of(db)] == ["success"] * 7


def test_strict_call_that_begins_while_the_writer_is_about_to_sleep_is_put_on_record(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over = threading.Event(), threading.Event()
    real = m.Ingester.step
    audit = m.AuditLogger(db, strict=True, flush_interval=3600)
    writer = audit._writer
    audit.log_event("cli", "tool", "first")
    wait_until(lambda: writer.written == 1 and writer._asleep and writer._wake.locked())

    def step(ingester: m.Ingester) -> float:
        due = real(ingester)
        if not over.is_set():
            over.set()  # the writer has looked at what runs already
            assert begun.wait(SAFETY_SECONDS)
        return due

    monkeypatch.setattr(m.Ingester, "step", step)
    with audit:
        audit.log_event("cli", "tool", "second")
        assert over.wait(SAFETY_SECONDS)
        call = audit.record("tool", "third")
        call._begin()
        told = threading.Event()
        writer.call_when(lambda: call.number in writer.begun.on_record, told.set)
        begun.set()
        assert told.wait(SAFETY_SECONDS / 4)
        call.end()


def test_calls_that_end_soon_leave_no_trace(db: Path) -> None:
    with m.AuditLogger(db) as audit:
        for number in range(1000):
            with audit.record("tool", str(number)):
                pass
        begun = audit._writer._appender.begun
        assert not begun._running
        audit.flush()
        assert not begun._refs and not begun._over and not begun.on_record
    assert len(rows_of_all(db)) == 1000


# --- strict


def in_the_way(db: Path) -> Path:
    """Make a journal that can't be written."""
    path = Path(f"{db}.journal")
    path.write_text("in the way")
    return path


def wait_for(audit: m.AuditLogger, seconds: float) -> None:
    """Set how long strict calls wait: long where they shall succeed, whatever the machine's load."""
    audit.config = audit.config._replace(strict_timeout=seconds)


def as_with(audit: m.AuditLogger, ran: list[str]) -> None:
    with audit.record("tool", "guarded"):
        ran.append("ran")


def as_async_with(audit: m.AuditLogger, ran: list[str]) -> None:
    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(TIMEOUT / 10)

        ticking = asyncio.create_task(tick())
        try:
            async with audit.record("tool", "guarded"):
                ran.append("ran")
        finally:
            ticking.cancel()
            assert ran or ticks > 2  # the event loop went on

    asyncio.run(main())


def as_function(audit: m.AuditLogger, ran: list[str]) -> None:
    audit.tool("guarded")(lambda: ran.append("ran"))()


def as_coroutine(audit: m.AuditLogger, ran: list[str]) -> None:
    @audit.tool("guarded")
    async def tool() -> None:
        ran.append("ran")

    asyncio.run(tool())


def as_generator(audit: m.AuditLogger, ran: list[str]) -> None:
    @audit.tool("guarded")
    def tool() -> Iterator[int]:
        ran.append("ran")
        yield 1

    list(tool())


def as_async_generator(audit: m.AuditLogger, ran: list[str]) -> None:
    @audit.tool("guarded")
    async def tool() -> Any:
        ran.append("ran")
        yield 1

    async def main() -> None:
        async for _ in tool():
            pass

    asyncio.run(main())


def as_middleware(audit: m.AuditLogger, ran: list[str]) -> None:
    class Message:
        name = "guarded"
        arguments = None

    class Context:
        method = "tools/call"
        message = Message()

    async def call_next(context: object) -> dict[str, object]:
        ran.append("ran")
        return {}

    asyncio.run(audit.middleware()(Context(), call_next))  # type: ignore[arg-type]


WAYS = [as_with, as_async_with, as_function, as_coroutine, as_generator, as_async_generator, as_middleware]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("durable", [False, True])
def test_strict_call_runs_only_if_it_is_on_record(db: Path, way: Any, durable: bool) -> None:
    obstacle, ran = in_the_way(db), list[str]()
    with m.AuditLogger(db, strict=["guard*"], strict_timeout=TIMEOUT, durable=durable) as audit:
        with pytest.raises(m.AuditUnavailableError, match="tool guarded can't be put on record within 0.3 s"):
            way(audit, ran)
        assert not ran and audit.counters.refused == 1 and not audit._writer._waiting
        if not durable:
            with audit.record("tool", "another"):
                ran.append("another")
            assert ran.pop() == "another"
        obstacle.unlink()
        wait_until(lambda: audit.wait_written(0.1))  # by itself
        wait_for(audit, SAFETY_SECONDS)
        way(audit, ran)
        assert ran == ["ran"]
    rows = [(row["name"], row["status"], row["error_type"]) for row in rows_of(db)]
    assert ("guarded", "error", "AuditUnavailableError") in rows and ("guarded", "success", None) in rows
    assert len(rows) == 3 - durable


@pytest.mark.parametrize("fault", ["full", "read-only", "hangs", "removed", "no locks"])
def test_strict_faults_of_the_disk(db: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    mended, real = threading.Event(), (os.write, os.open)
    codes = {"full": errno.ENOSPC, "read-only": errno.EROFS}

    def broken(call: Any) -> Any:
        def replacement(*arguments: Any, **more: Any) -> Any:
            if not mended.is_set() and threading.current_thread().name == "mxcp_audit writer":
                if fault == "hangs":
                    mended.wait(SAFETY_SECONDS)
                elif fault in codes:
                    raise OSError(codes[fault], os.strerror(codes[fault]))
            return call(*arguments, **more)

        return replacement

    options = {"strict": ["guarded"], "strict_timeout": SAFETY_SECONDS, "flush_interval": 3600}
    with m.AuditLogger(db, **options) as audit:  # type: ignore[arg-type]
        as_with(audit, [])
        monkeypatch.setattr(os, "write", broken(os.write))
        if fault == "read-only":
            monkeypatch.setattr(os, "open", broken(os.open))
        elif fault == "removed":
            shutil.rmtree(f"{db}.journal")
        elif fault == "no locks":
            monkeypatch.setattr(
                m, "try_lock", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOLCK, ""))
            )
        ran: list[str] = []
        if fault in ("removed", "no locks"):  # a new directory is made; and only an ingest needs locks
            as_with(audit, ran)
        else:
            wait_for(audit, TIMEOUT)
            with pytest.raises(m.AuditUnavailableError):
                as_with(audit, ran)
            assert not ran and audit.counters.refused == 1
            with audit.record("tool", "another"):
                ran.append("another")
        assert len(ran) == 1
        mended.set()
        wait_for(audit, SAFETY_SECONDS)
        as_with(audit, ran)
        assert audit.wait_written(SAFETY_SECONDS)
        assert (os.write, os.open) != real and len(ran) == 2
    names = [(row["name"], row["error_type"]) for row in rows_of(db)]
    assert names.count(("guarded", None)) == (3 if fault in ("removed", "no locks") else 2)
    assert names.count(("guarded", "AuditUnavailableError")) == (fault not in ("removed", "no locks"))


@pytest.mark.parametrize("way", [as_with, as_async_with])
def test_strict_answer_that_cannot_be_recorded_is_withheld(db: Path, way: Any) -> None:
    options = {"strict": True, "strict_timeout": SAFETY_SECONDS, "flush_interval": 3600}
    with m.AuditLogger(db, **options) as audit:  # type: ignore[arg-type]
        way(audit, [])

        class Breaking(list[str]):
            fails = False

            def append(self, text: str) -> None:
                shutil.rmtree(f"{db}.journal")
                in_the_way(db)
                wait_for(audit, TIMEOUT)
                if self.fails:
                    raise ValueError("the body's own")

        for expected in (m.AuditUnavailableError, ValueError):
            with pytest.raises(expected):
                way(audit, Breaking())
            Path(f"{db}.journal").unlink()
            wait_for(audit, SAFETY_SECONDS)
            wait_until(lambda: audit.wait_written(0.1))
            Breaking.fails = True
    # They happened, and are on record as what they were.
    assert [row["error_type"] for row in rows_of(db)] == [None, None, "ValueError"]


def test_strict_takes_true_false_and_names(db: Path) -> None:
    for strict, name, expected in (
        (True, "anything\n", True),
        (False, "anything", False),
        (["delete_*", "a.c"], "delete_user", True),
        (["delete_*", "a.c"], "abc", False),
        (["*://secret/*"], "file://secret/x", True),
        (True, 7, True),  # whatever is given as a name
    ):
        audit = m.AuditLogger(db, strict=strict)  # type: ignore[arg-type]
        with audit.record("tool", name) as call:
            assert call.strict is expected
    with pytest.raises(m.ConfigError, match="strict: must be true, false, or a list of names"):
        m.AuditLogger(db, strict="yes")
