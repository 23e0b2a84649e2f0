"""Each labelled situation from a public bug thread has a test, named after its id.

BC-133 and BC-135 are in test_store_reading.py. Where a situation can't be a test, docs/operations.md
says what is promised instead. Sizes are scaled down so that all runs in minutes; `tools/torture.py`
runs the large ones. Real processes, real kills; counted by `tools/judge.py`, which shares no code with
the module.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import decimal
import enum
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest.mock
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    SAFETY_SECONDS,
    child_environment,
    in_threads,
    make_environment,
    run_process,
    table_rows,
    wait_until,
)

import mxcp_audit
from mxcp_audit import AuditLogger, Store, main
from tools.judge import Verdict, journal_line, judge

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux tools")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
package = pytest.mark.skipif(not importlib.util.find_spec("duckdb"), reason="needs the duckdb package")
needs = {
    tool: pytest.mark.skipif(not shutil.which(tool), reason=f"needs {tool}")
    for tool in ("strace", "unshare", "chattr", "cc")
}

PREAMBLE = """\
import atexit, contextlib, gc, multiprocessing, os, signal, sys, threading, time
import mxcp_audit
from mxcp_audit import AuditLogger
db = sys.argv[1]
def slow_writes(seconds):
    true_write = os.write
    def write(fd, data):
        if fd > 2: time.sleep(seconds)
        return true_write(fd, data)
    os.write = write
def log(name, **more): audit.log_event("cli", "tool", str(name), more or None)
"""
AUDIT = "audit = AuditLogger(db)\n"


def script(body: str, *, audit: bool = True) -> str:
    return PREAMBLE + (AUDIT if audit else "") + textwrap.dedent(body)


def run(
    body: str, db: Path, *args: str, options: tuple[str, ...] = (), audit: bool = True, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a program of its own, from a file: multiprocessing's `spawn` needs one."""
    path = db.parent / f"script{os.urandom(4).hex()}.py"
    path.write_text(script(body, audit=audit))
    return run_process([sys.executable, *options, str(path), str(db), *args], cwd=db.parent, **changes)


@contextlib.contextmanager
def started(
    body: str, db: Path, *args: str, audit: bool = True, prefix: tuple[str, ...] = (), **changes: str
) -> Iterator[Any]:
    """Start a script; `process.stdout.readline()` synchronises. It is killed at the end."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", script(body, audit=audit), str(db), *args],
        env=child_environment(**changes),
        cwd=db.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def clean(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")


def run_clean(body: str, db: Path, *args: str, **options: Any) -> None:
    clean(run(body, db, *args, **options))


def assert_whole(verdict: Verdict, expected: set[str] | int) -> None:
    if isinstance(expected, int):
        assert len(verdict.names) == expected
    else:
        assert set(verdict.names) == expected
    assert verdict.doubled == 0
    assert verdict.torn == 0


def ingest(db: Path) -> mxcp_audit.Diagnostics:
    told = mxcp_audit.Diagnostics()
    config = mxcp_audit.config_from_arguments(path=str(db))
    assert Store(config, diagnostics=told).ingest()
    return told


def journal_of(db: Path) -> mxcp_audit.Journal:
    return mxcp_audit.Journal(f"{db}.journal")


def write_segment(db: Path, names: list[str]) -> Path:
    segment = journal_of(db).open_segment()
    lines = [journal_line(name, seq) for seq, name in enumerate(names, 1)]
    segment.append(b"".join(lines), len(lines))
    segment.seal()
    return Path(segment.path)


def shown(cli: Any, db: Path, *options: str) -> list[dict[str, Any]]:
    done = cli("log", "--db", str(db), "--json", "--limit", "100000", *options)
    return list(json.loads(done.stdout))


# --- shutdown


def test_bc_001_first_event_in_an_exit_handler_is_stored(db: Path) -> None:
    body = """
        atexit.register(lambda: log("before"))
        audit = AuditLogger(db)
        atexit.register(lambda: log("after"))
    """
    # the module's own hook comes between handlers registered before and after its import
    early = "import atexit; atexit.register(lambda: log('earliest'))\n"
    path = db.parent / "early.py"
    path.write_text(early + script(body, audit=False))
    done = run_process([sys.executable, path, db])
    clean(done)
    assert_whole(judge(db), {"earliest", "before", "after"})


@pytest.mark.parametrize("first", ["main", "thread"])
def test_bc_002_thread_outlives_main_and_logs(db: Path, first: str) -> None:
    body = """
        if sys.argv[2] == "main": log("main")
        def later():
            time.sleep(0.2)
            for n in range(100): log(n)
        threading.Thread(target=later).start()
    """
    run_clean(body, db, first)
    assert_whole(judge(db), {str(n) for n in range(100)} | ({"main"} if first == "main" else set()))


@pytest.mark.parametrize("end", ["", "sys.exit()"])
def test_bc_004_one_event_and_out_is_stored(tmp_path: Path, end: str) -> None:
    for number in range(2):
        db = tmp_path / f"{number}.duckdb"
        run_clean(f"log('only'); {end}", db)
        assert_whole(judge(db), {"only"})


def test_bc_005_close_after_a_burst_stores_all_and_close_twice_is_harmless(db: Path) -> None:
    body = """
        def work(t):
            for n in range(1000): log(f"{t}-{n}")
        threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        audit.close(); audit.close()
        log("late")
    """
    run_clean(body, db)
    assert_whole(judge(db), {f"{t}-{n}" for t in range(8) for n in range(1000)} | {"late"})


def test_bc_007_second_interrupt_at_exit_is_prompt_and_says_what_is_left(db: Path) -> None:
    body = """
        log("written"); audit.flush()
        slow_writes(30)
        for n in range(200): log(n)
        true_shutdown = audit.shutdown
        def shutdown(*args, **options): print("ending", flush=True); return true_shutdown(*args, **options)
        audit.shutdown = shutdown
        try: print("ready", flush=True); time.sleep(60)
        except KeyboardInterrupt: pass
    """
    with started(body, db) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ending\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=25)  # well before the slow write ends
        assert "Traceback" not in errors and "ignored" not in errors
        assert errors.count("200 events were not written") == 1
    assert_whole(judge(db), {"written"})


def test_bc_011_flush_while_the_journal_is_unwritable_ends_in_time_and_succeeds_later(db: Path) -> None:
    blocker = Path(f"{db}.journal")
    blocker.write_text("in the way")
    audit = AuditLogger(db)
    for n in range(10):
        audit.log_event("cli", "tool", str(n))
    begun = time.monotonic()
    assert not audit.flush(timeout=1)
    assert time.monotonic() - begun >= 1
    blocker.unlink()
    assert audit.flush(timeout=SAFETY_SECONDS)
    audit.shutdown()
    assert_whole(judge(db), {str(n) for n in range(10)})


@package
@linux
def test_bc_012_many_loggers_leave_no_thread_descriptor_or_segment(db: Path) -> None:
    body = """
        def count(): return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        def use(path, n):
            pair = [AuditLogger(path), AuditLogger(path)] if n % 4 == 0 else [AuditLogger(path)]
            for i, audit in enumerate(pair): audit.log_event("cli", "tool", f"{n}-{i}")
            for audit in pair: audit.close()
        use(db, 0)
        before = count()
        for n in range(1, 9): use(db, n)
        for n in range(4): use(f"{db}.{n}", n)
        for n in range(200): AuditLogger(db).close()
        def more(): return any(now > then for now, then in zip(count(), before))
        end = time.monotonic() + 60  # a thread that was joined may be listed for a moment
        while more() and time.monotonic() < end: time.sleep(0.05)
        print(not more(), before, count())
    """
    done = run(body, db, audit=False, MXCP_AUDIT_ENGINE="package")
    clean(done)
    assert done.stdout.startswith("True"), done.stdout
    assert_whole(judge(db), {f"{n}-0" for n in range(9)} | {f"{n}-1" for n in range(0, 9, 4)})
    assert not list(Path(f"{db}.journal").glob("*.jsonl"))


def test_bc_014_server_that_cannot_stop_and_is_killed_keeps_its_events(db: Path) -> None:
    body = """
        import http.server, urllib.request
        class Endless(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path != "/stream": log(self.path)
                self.send_response(200); self.end_headers()
                if self.path != "/stream": return
                while True: self.wfile.write(b"data: x\\n\\n"); time.sleep(0.05)
            def log_message(self, *args): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless); server.daemon_threads = False
        def end():
            while audit.counters.written < 50: time.sleep(0.01)
            print("written", flush=True); server.shutdown(); server.server_close()
        def stop(*_): threading.Thread(target=end).start()
        signal.signal(signal.SIGTERM, stop)
        print(server.server_port, flush=True)
        server.serve_forever()
    """
    with started(body, db) as process:
        import urllib.request

        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/stream"):
            for n in range(50):
                urllib.request.urlopen(f"{url}/{n}").close()
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "written\n"
            assert process.poll() is None
            process.kill()
    assert_whole(judge(db), {f"/{n}" for n in range(50)})


def test_bc_015_workers_killed_at_reload_lose_only_their_last_moments(db: Path) -> None:
    body = """
        said = os.open(db + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        log("master")
        for generation in range(4):
            workers = []
            for worker in range(4):
                pid = os.fork()
                if pid == 0:
                    for n in range(10**6):
                        log(f"{generation}.{worker}-{n}")
                        os.write(said, f"{generation}.{worker}-{n}\\n".encode())
                        time.sleep(0.002)
                workers.append(pid)
            time.sleep(0.5)
            for pid in workers: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        audit.flush(60)
    """
    done = run(body, db)
    told = [line for line in done.stderr.splitlines() if not line.endswith("kept in .torn")]
    assert (done.returncode, told) == (0, [])  # a killed worker may leave half a line, and that is said
    ingest(db)
    assert not list(Path(f"{db}.journal").glob("*.jsonl"))  # the dead workers' too
    verdict = judge(db)
    assert verdict.doubled == verdict.torn == 0
    last: dict[str, int] = {}
    for name in verdict.names - Counter(["master"]):
        worker, _, number = name.partition("-")
        last[worker] = max(last.get(worker, 0), int(number))
    for name in verdict.lost(set(Path(f"{db}.said").read_text().split())):
        worker, _, number = name.partition("-")
        assert int(number) > last.get(worker, -1)  # nothing is missing but what came last


@pytest.mark.parametrize("flush", [True, False])
def test_bc_016_forked_task_that_leaves_by_os_exit(db: Path, flush: bool) -> None:
    body = """
        log("parent")
        for child in range(6):
            pid = os.fork()
            if pid == 0:
                for n in range(5): log(f"{child}-{n}")
                if sys.argv[2] == "True": audit.flush(60)
                os._exit(0)
            os.waitpid(pid, 0)
    """
    run_clean(body, db, str(flush))
    verdict = judge(db)
    expected = {f"{child}-{n}" for child in range(6) for n in range(5)} | {"parent"}
    if flush:
        assert_whole(verdict, expected)
    else:  # the window applies: an event may be lost, never doubled or torn
        assert set(verdict.names) <= expected and verdict.doubled == verdict.torn == 0


def test_bc_017_frozen_after_flush_is_readable_and_survives_the_kill(db: Path, cli: Any) -> None:
    body = """
        for n in range(20): log(n)
        audit.flush(60); print("done", flush=True); time.sleep(60)
    """
    with started(body, db) as process:
        assert process.stdout.readline() == "done\n"
        process.send_signal(signal.SIGSTOP)
        assert {event["name"] for event in shown(cli, db)} == {str(n) for n in range(20)}
    assert_whole(judge(db), {str(n) for n in range(20)})


# --- fork


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "pool"])
def test_bc_018_multiprocessing_children_lose_nothing(db: Path, method: str) -> None:
    body = """
        def task(child):
            for n in range(3): log(f"{child}-{n}")
        if __name__ == "__main__":
            method = sys.argv[2]
            context = multiprocessing.get_context("fork" if method == "pool" else method)
            if method == "pool":
                pool = context.Pool(3); pool.map(task, range(3)); pool.close(); pool.join()
            else:
                children = [context.Process(target=task, args=(child,)) for child in range(3)]
                for child in children: child.start()
                for child in children: child.join()
    """
    run_clean(body, db, method, options=("-W", "ignore::DeprecationWarning"))
    assert_whole(judge(db), {f"{child}-{n}" for child in range(3) for n in range(3)})


@pytest.mark.parametrize("way", ["sys.exit", "end", "multiprocessing"])
def test_bc_019_child_never_writes_what_the_parent_had_queued(db: Path, way: str) -> None:
    body = """
        slow_writes(0.3)
        log("first"); time.sleep(0.1)
        for n in range(1000): log(n)
        if sys.argv[2] == "multiprocessing":
            children = [multiprocessing.get_context("fork").Process(target=int) for _ in range(2)]
            for child in children: child.start()
            for child in children: child.join()
        else:
            for _ in range(2):
                if os.fork() == 0:
                    if sys.argv[2] == "sys.exit": sys.exit(0)
                    break
            else:
                for _ in range(2): os.wait()
    """
    run_clean(body, db, way)
    assert_whole(judge(db), {str(n) for n in range(1000)} | {"first"})


def test_bc_020_children_that_drop_an_inherited_logger_double_nothing(db: Path) -> None:
    body = """
        stop = False; counts = [0, 0]
        def work(t):
            while not stop: log(f"{t}-{counts[t]}"); counts[t] += 1; time.sleep(0.0002)
        threads = [threading.Thread(target=work, args=(t,)) for t in (0, 1)]
        for t in threads: t.start()
        for child in range(12):
            pid = os.fork()
            if pid == 0:
                if child % 2: audit = AuditLogger(db)
                else: del audit; gc.collect()
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        stop = True
        for t in threads: t.join()
        print(*counts)
    """
    done = run(body, db)
    clean(done)
    zero, one = map(int, done.stdout.split())
    assert_whole(judge(db), {f"0-{n}" for n in range(zero)} | {f"1-{n}" for n in range(one)})


def test_bc_024_fork_while_a_large_event_is_encoded(db: Path) -> None:
    body = """
        large = {str(n): n for n in range(3000)}; stop = False
        def work():
            n = 0
            while not stop: log(f"large-{n}", **large); n += 1; time.sleep(0.01)
        thread = threading.Thread(target=work); thread.start()
        for child in range(5):
            pid = os.fork()
            if pid == 0: log(f"small-{child}"); sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        stop = True; thread.join()
    """
    done = run(body, db)
    assert done.returncode == 0  # on a slow machine a fork may interrupt an ingest, which it says
    verdict = judge(db)
    assert verdict.doubled == verdict.torn == 0
    assert not verdict.lost({f"small-{child}" for child in range(5)})


def test_bc_026_pool_of_forked_workers_mixes_no_lines(db: Path) -> None:
    body = """
        def task(t):
            for n in range(10): log(f"{t}-{n}", text="x" * 10000)
        if __name__ == "__main__":
            log("parent")
            pool = multiprocessing.get_context("fork").Pool(8)
            pool.map(task, range(30), chunksize=1); pool.close(); pool.join()
    """
    run_clean(body, db)
    assert_whole(judge(db), {f"{t}-{n}" for t in range(30) for n in range(10)} | {"parent"})
    assert {
        len(text) for (text,) in table_rows(db, "SELECT input_json FROM logs WHERE name <> 'parent'")
    } == {10011}


def test_bc_027_parent_and_child_both_use_the_database(db: Path) -> None:
    body = """
        for round in range(2):
            log(f"{round}-first"); audit.flush(60)
            pid = os.fork()
            if pid == 0:
                for n in range(50): log(f"{round}-child-{n}")
                audit.flush(60)
                if round % 2: os._exit(0)
                sys.exit()
            for n in range(50): log(f"{round}-parent-{n}")
            assert os.waitpid(pid, 0)[1] == 0
            audit.flush(60)
    """
    run_clean(body, db)
    sides = {f"{r}-{side}-{n}" for r in range(2) for side in ("child", "parent") for n in range(50)}
    assert_whole(judge(db), sides | {f"{r}-first" for r in range(2)})


@package
@pytest.mark.parametrize("way", ["exit", "collect"])
def test_bc_028_child_of_a_process_with_an_open_query_ends_without_a_signal(db: Path, way: str) -> None:
    body = """
        log("first"); audit.flush(60)
        store = mxcp_audit.Store(audit.config)
        with store.reading() as reading:
            rows = reading.rows(mxcp_audit.Filter()); next(rows)
            for child in range(1):
                pid = os.fork()
                if pid == 0:
                    log(child)
                    if sys.argv[2] == "collect": rows.close(); del reading, rows, store; gc.collect()
                    sys.exit()
                assert os.waitpid(pid, 0)[1] == 0
    """
    done = run(body, db, way, MXCP_AUDIT_ENGINE="package")
    # DuckDB believes in the child that the file is open, so that its events stay in the journal for now.
    assert done.returncode == 0, done.stderr
    assert_whole(judge(db), {"0", "first"})


@linux
def test_bc_029_import_and_construction_start_nothing(db: Path) -> None:
    body = """
        assert len(os.listdir("/proc/self/task")) == 1
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
        child = multiprocessing.get_context("fork").Process(target=int); child.start(); child.join()
        assert len(os.listdir("/proc/self/task")) == 1
        assert not os.path.exists(db) and "duckdb" not in sys.modules
    """
    run_clean(body, db, options=("-W", "error"))


# --- threads


def test_bc_030_destructor_that_logs_never_deadlocks(db: Path) -> None:
    body = """
        class Noisy:
            def __init__(self, name): self.me = self; self.name = name
            def __del__(self): log(self.name)
        gc.set_threshold(1, 1, 1)
        def work(t):
            for n in range(300): Noisy(f"d{t}-{n}"); log(f"{t}-{n}")
        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        gc.collect()
    """
    run_clean(body, db)
    assert_whole(judge(db), {f"{d}{t}-{n}" for d in ("", "d") for t in range(4) for n in range(300)})


@pytest.mark.parametrize("durable", [False, True])
def test_bc_031_signal_handler_logs_while_main_logs(db: Path, durable: bool) -> None:
    body = """
        audit = AuditLogger(db, durable=sys.argv[2] == "True")
        import itertools
        handled = itertools.count()
        def handle(*_):
            log(f"handler-{next(handled)}")
            if running: signal.setitimer(signal.ITIMER_REAL, 0.001)
        running = True
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        n = 0
        while n < 20 or audit.counters.accepted < n + 20: log(f"main-{n}"); n += 1
        running = False; signal.setitimer(signal.ITIMER_REAL, 0)
        handled = next(handled)
        assert audit.counters.accepted == n + handled, (audit.counters, n, handled)
        def stop(*_): log("term"); raise SystemExit(0)
        signal.signal(signal.SIGTERM, stop)
        print(n, handled, flush=True)
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
    """
    done = run(body, db, str(durable), audit=False)
    clean(done)
    main_events, handled = map(int, done.stdout.split())
    assert handled >= 20
    assert_whole(
        judge(db),
        {f"main-{n}" for n in range(main_events)} | {f"handler-{n}" for n in range(handled)} | {"term"},
    )


def evil_objects() -> list[object]:
    class Raises:
        def __repr__(self) -> str:
            raise ValueError("no text")

        __str__ = __repr__

        @property
        def value(self) -> object:
            raise RuntimeError("no value")

    class Liar:
        @property
        def __class__(self) -> Any:
            return dict

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            raise RuntimeError("broken")

        def __subclasscheck__(cls, subclass: type) -> bool:
            raise RuntimeError("broken")

    class Broken(metaclass=Meta):
        def __repr__(self) -> str:
            raise MemoryError

    return [Raises(), Liar(), Broken(), {Raises: Raises()}, [Broken()] * 2]


def test_bc_033_event_that_breaks_the_encoder_silences_nothing(db: Path, logger: AuditLogger) -> None:
    def log_all(thread: int) -> None:
        for n, evil in enumerate(evil_objects()):
            logger.log_event("cli", "tool", f"{thread}-{n}-before")
            logger.log_event("cli", "tool", f"{thread}-{n}-evil", {"x": evil})
            logger.log_event("cli", "tool", f"{thread}-{n}-after")

    in_threads(log_all, range(3))
    assert logger.shutdown()
    rows = table_rows(db, "SELECT name FROM logs")
    sound = {f"{t}-{n}-{w}" for t in range(3) for n in range(5) for w in ("before", "after")}
    assert len(rows) == 45 and sound <= {name for (name,) in rows}


@package
@linux
@root
def test_bc_036_no_thread_allowed_writes_in_the_caller_and_says_why(tmp_path: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="mxcp"))
    home.chmod(0o777)
    try:
        body = """
            import asyncio, ctypes, duckdb, json, logging, resource, tempfile, traceback
            log("0"); audit.flush(60); audit.shutdown()  # everything is imported now
            os.chmod(db + ".journal", 0o777); os.chown(db + ".journal", 65534, 65534)
            for name in os.listdir(db + ".journal"): os.chown(f"{db}.journal/{name}", 65534, 65534)
            os.chown(db, 65534, 65534)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 1000)); os.setuid(65534)
            audit = AuditLogger(db)
            threads = threading.active_count()
            for n in range(1, 20): log(n)
            assert threading.active_count() <= threads
            resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
            for n in range(20, 40): log(n)
            assert audit.flush(60), audit.counters
            assert threading.active_count() > threads
        """
        done = run(body, home / "log.duckdb", MXCP_AUDIT_ENGINE="package", OPENBLAS_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("callers write themselves") == 1
        assert_whole(judge(home / "log.duckdb"), {str(n) for n in range(40)})
    finally:
        shutil.rmtree(home)


def test_bc_041_diagnostics_that_come_back_as_events_stay_few(db: Path) -> None:
    body = """
        import logging
        class Feedback:
            def write(self, text): log(f"stderr {text}")
            def flush(self): pass
        class Handler(logging.Handler):
            def emit(self, record): log(f"handler {record.getMessage()}")
        sys.stderr = Feedback(); logging.getLogger().addHandler(Handler()); logging.lastResort.emit
        open(db + ".journal", "w").close()
        for n in range(10): log(n)
        time.sleep(2)
        print(audit.counters.accepted)
        os.unlink(db + ".journal")
    """
    done = run(body, db)
    assert done.returncode == 0
    assert 10 <= int(done.stdout) < 30


def test_bc_042_standard_error_that_nobody_reads_blocks_nothing(db: Path) -> None:
    body = """
        open(db + ".journal", "w").close()
        for n in range(5000): log(n)
        audit.shutdown(timeout=0.2); print("through", flush=True)
    """
    with started(body, db) as process:
        assert process.stdout.readline() == "through\n"
        process.wait(SAFETY_SECONDS)
        assert len(process.stderr.read()) < 65536


# --- what is recorded of odd input


@pytest.fixture
def stored(db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that logs inputs between sound events, and returns what is recorded of them.

    It asserts that the journal and the table say the same, that all neighbours are there, and that
    the JSON is strict.
    """

    def fail(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    def view() -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["log", "--db", str(db), "--json", "--limit", "100000"]) == 0
        return list(json.loads(capsys.readouterr().out, parse_constant=fail))

    def store(*inputs: object, **fields: Any) -> list[Any]:
        monkeypatch.setattr(AuditLogger, "_ingest", None)
        audit = AuditLogger(db)
        for n, value in enumerate(inputs):
            audit.log_event("cli", "tool", f"before-{n}")
            audit.log_event("cli", "tool", fields.pop("name", f"odd-{n}"), value, **fields)
            audit.log_event("cli", "tool", f"after-{n}")
        assert audit.shutdown()
        early = view()
        ingest(db)
        assert not list(Path(f"{db}.journal").glob("*.jsonl"))
        assert view() == early
        assert len(early) == 3 * len(inputs)
        return [
            json.loads(e["input_json"], parse_constant=fail)
            for e in reversed(early)
            if not re.match("before-|after-", e["name"])
        ]

    return store


def test_bc_043_input_that_contains_itself(stored: Any) -> None:
    loop: dict[str, Any] = {"x": 1}
    loop["me"] = loop
    ring: list[Any] = [1]
    ring.append(ring)
    one: dict[str, Any] = {}
    two = {"one": one}
    one["two"] = two
    shared = {"kept": "whole"}
    found = stored(loop, {"ring": ring}, one, {"a": shared, "b": shared})
    assert found[0]["x"] == 1
    assert found[3] == {"a": shared, "b": shared}


def test_bc_046_repr_that_itself_logs(db: Path, logger: AuditLogger) -> None:
    class Chatty:
        def __repr__(self) -> str:
            with logger.record("tool", "inner", {"self": self}):
                return "chatty"

        @property
        def value(self) -> str:
            logger.log_event("cli", "tool", "getter", {"self": self})
            return "value"

    logger.log_event("cli", "tool", "outer", {"x": Chatty()})
    assert logger.shutdown()
    names = Counter(name for (name,) in table_rows(db, "SELECT name FROM logs"))
    unreadable = {name for name in names if name.startswith("<unreadable text: ")}  # where the stack ended
    assert names["outer"] == 1 and set(names) - unreadable <= {"outer", "inner", "getter"}
    assert names.total() < 1000


def test_bc_047_exceptions_that_no_pickle_rebuilds(db: Path, logger: AuditLogger) -> None:
    class Demanding(Exception):
        def __init__(self, *, needed: object) -> None:
            super().__init__("demanding")
            self.needed = needed

    chain: BaseException | None = None
    for n in range(50):
        link = ValueError(f"link {n}")
        link.__cause__ = link.__context__ = chain
        chain = link
    errors: list[BaseException] = [Demanding(needed=threading.Lock()), chain or ValueError()]
    if sys.version_info >= (3, 11):
        errors.append(ExceptionGroup("group", [ValueError("one"), TypeError("two")]))  # noqa: F821
    for n, error in enumerate(errors):
        with pytest.raises(type(error)) as caught, logger.record("tool", str(n)):
            raise error
        assert caught.value is error
    logger.log_event("cli", "tool", "after")
    assert logger.shutdown()
    rows = dict(table_rows(db, "SELECT name, error FROM logs"))
    assert (
        rows["0"] == "Demanding: demanding" and rows["1"] == "ValueError: link 49" and rows["after"] is None
    )
    assert len(rows) == len(errors) + 1


def test_bc_050_nan_and_infinity_stay_json_and_distinct(stored: Any) -> None:
    (found,) = stored({"a": float("nan"), "b": [float("inf"), {"c": float("-inf")}], "zero": 0, "none": None})
    values = [found["a"], found["b"][0], found["b"][1]["c"]]
    assert len({repr(value) for value in (*values, 0, None)}) == 5


def test_bc_051_integers_beyond_63_bits_keep_their_digits(stored: Any) -> None:
    numbers = [2**63, 2**64, 10**29, -(2**63) - 1, 9007199254740993]
    (found,) = stored({"n": numbers, "half": 1.5})
    assert [int(number) for number in found["n"]] == numbers and found["half"] == 1.5


def test_bc_052_many_keys_change_no_value(stored: Any) -> None:
    wide: dict[str, Any] = {f"k{n}": 2**53 + 1 for n in range(250)} | {"k7": 1.5}
    found = stored(wide, *({f"own-{n}": n} for n in range(300)), {"x": 1}, {"x": "text"})
    assert found[0] == wide and found[-2:] == [{"x": 1}, {"x": "text"}]
    assert found[1:-2] == [{f"own-{n}": n} for n in range(300)]


def test_bc_053_integer_of_more_than_4300_digits(stored: Any) -> None:
    huge = 10**5000
    found = stored({"x": huge}, {huge: 1}, [huge], {"e": ValueError(huge)}, [(huge,)])
    text = hex(huge)  # a decimal of that length can't be made
    assert found[:3] + found[4:] == [{"x": text}, {text: 1}, [text], [[text]]]
    assert "ValueError" in found[3]["e"]


def test_bc_055_no_entry_is_lost_whatever_its_key(stored: Any) -> None:
    colour = enum.Enum("Colour", "RED")
    keys = [
        *(("a", 1), 1, float("nan"), b"bytes", colour.RED, uuid.UUID(int=1), datetime.date(2026, 1, 1)),
        *(frozenset([1]), None),
    ]
    (found,) = stored({key: n for n, key in enumerate(keys)})
    assert sorted(found.values()) == list(range(len(keys)))


def test_bc_056_keys_that_become_the_same_text(stored: Any) -> None:
    class Name(str):
        __hash__ = object.__hash__

    found = stored({1: "x", "1": "y", "true": "w", 2.0: "z"}, {Name("k"): 1, "k": 2})
    assert len(found) == 2 and set(found[0].values()) >= {"w"}


def test_bc_057_half_of_an_emoji(stored: Any, db: Path) -> None:
    half = "\ud83d"
    stored(
        {"x": half},
        {half: 1},
        {"x": "\udc00"},
        {"a": half, "b": "\ude00"},
        name=f"tool{half}",
        user_id=half,
        error=f"bad {half}",
        status="error",
    )
    assert judge(db).in_table == 12


def test_bc_060_keys_that_differ_by_case(stored: Any) -> None:
    first, second = {"id": 1, "Id": 2, "ID": {"x": 1, "X": 2}}, {"Id": 3}
    assert stored(first, second) == [first, second]


def test_bc_062_lazy_objects_are_left_alone(stored: Any) -> None:
    touched = Counter[str]()

    class Lazy:
        def __repr__(self) -> str:
            touched["repr"] += 1
            return "lazy"

        def __iter__(self) -> Any:
            touched["iter"] += 1
            return iter([1])

        def __len__(self) -> int:
            touched["len"] += 1
            return 1

    generator = (touched.update(["generator"]) or n for n in range(3))
    with open(__file__) as file:
        stored({"lazy": Lazy(), "generator": generator, "file": file, "mock": unittest.mock.MagicMock()})
        assert file.tell() == 0
    assert touched["generator"] == touched["iter"] == 0 and touched["repr"] <= 1
    assert list(generator) == [0, 1, 2]


def test_bc_063_everyday_objects_that_json_does_not_know(stored: Any) -> None:
    kind = enum.IntEnum("Kind", {"ONE": 1})
    (found,) = stored(
        {
            **{"error": ValueError("x"), "bytes": b"\xff", "naive": datetime.datetime(2026, 1, 1)},
            **{"delta": datetime.timedelta(1), "decimal": decimal.Decimal("1.10")},
            **{"uuid": uuid.UUID(int=1), "path": Path("/x"), "kind": kind.ONE, "set": {3, 1, 2}},
            **{"complex": 1j, "range": range(3), "pattern": re.compile("x"), "type": int, "function": len},
        }
    )
    assert len(found) == 14 and "1.10" in str(found["decimal"])


MARKER = "hunter2-ZzQ9-marker"


def test_bc_064_secret_several_levels_down_is_nowhere(tmp_path: Path) -> None:
    secret: dict[str, Any] = {"password": MARKER}
    values = ({"b": secret}, [[secret]], ((secret,),), json.dumps(secret))
    audit = AuditLogger(tmp_path / "log.duckdb")
    for _ in range(2):  # in the table and in the journal
        audit.flush(SAFETY_SECONDS)
        for value in values:
            audit.log_event("cli", "tool", "x", {"a": value})
    assert audit.wait_written()
    assert len(table_rows(tmp_path / "log.duckdb")) == 4
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or MARKER.encode() not in path.read_bytes(), path
    audit.shutdown()


def test_bc_065_short_secret_under_a_telling_name(stored: Any) -> None:
    keys = [
        *("password", "PASSWORD", "passWord", "db_password", "apiKey", "API-KEY", "x-api-key"),
        *("aws_session_token", "gitlab_api_token"),
    ]
    harmless = {"token_count": 7, "primary_key": 8, "passenger": "Ann", "author": "Bob"}
    secrets = ["hunter2", ["hunter2"], {"x": "hunter2"}]
    for found in stored(*({**dict.fromkeys(keys, secret), **harmless} for secret in secrets)):
        assert "hunter2" not in json.dumps(found)
        assert {key: found[key] for key in harmless} == harmless


def test_bc_068_one_secret_is_part_of_another(db: Path, logger: AuditLogger) -> None:
    for secrets in (
        ["abc123", "abc123-LONG-TAIL"],
        ["abc123-LONG-TAIL", "abc123"],
        ["", "e", "abc123-LONG-TAIL"],
    ):
        logger.log_event(
            "cli",
            "tool",
            "x",
            {"password": secrets[0], "secret": secrets[1], "token": secrets[-1]},
            status="error",
            error="refused abc123-LONG-TAIL for the new user",
        )
    assert logger.shutdown()
    for text, error in table_rows(db, "SELECT input_json, error FROM logs"):
        assert "LONG" not in text + error and "TAIL" not in text + error
        assert error.startswith("refused ") and "for the new user" in error


def test_bc_069_numbers_as_keys_and_as_secrets(stored: Any) -> None:
    found = stored(
        {123: {"password": 9876}},
        {"password": [1234567, 2, "x"]},
        {b"token": "s3cr3t"},
        {("a", "b"): {"secret": "s3cr3t"}},
        {"password": 0.5, "kept": "yes"},
    )
    text = json.dumps(found)
    assert not [secret for secret in ("9876", "1234567", "s3cr3t", "0.5") if secret in text]
    assert "yes" in text


# --- calls


class Custom(BaseException):
    """Neither an Exception nor one of Python's own."""


def test_bc_072_exceptions_that_are_no_failures_pass_unchanged(db: Path, logger: AuditLogger) -> None:
    async def work(error: BaseException) -> None:
        async with logger.record("tool", "t"):
            raise error

    errors = [SystemExit(0), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Custom("x")]
    for error in errors:
        with pytest.raises(type(error)) as caught, logger.record("tool", "t"):
            raise error
        assert caught.value is error
        with pytest.raises(type(error)) as caught:
            work(error).send(None)
        assert caught.value is error
    assert logger.shutdown()
    assert len(table_rows(db)) == 2 * len(errors)


def test_bc_074_decorated_generator_keeps_its_protocol(logger: AuditLogger) -> None:
    events = []

    @logger.tool()
    def echo(start: int) -> Any:
        try:
            got = yield start
            while got != "stop":
                got = yield got
            return "returned"
        finally:
            events.append("closed")

    generator = echo(1)
    assert next(generator) == 1 and generator.send("x") == "x"
    with pytest.raises(StopIteration) as stop:
        generator.send("stop")
    assert stop.value.value == "returned" and events == ["closed"]
    generator = echo(1)
    next(generator)
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        generator.throw(error)
    assert caught.value is error
    generator = echo(1)
    next(generator)
    generator.close()
    assert events == ["closed"] * 3


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_bc_075_generator_open_at_the_end_makes_no_noise(db: Path, kind: str) -> None:
    body = """
        import asyncio
        @audit.tool()
        def plain():
            yield 1; yield 2
        @audit.tool()
        async def unplain():
            yield 1; yield 2
        async def main():
            global kept
            kept = unplain()
            await kept.__anext__()
        if sys.argv[2] == "sync": kept = plain(); next(kept)
        else: asyncio.run(main())
        log("after")
    """
    run_clean(body, db, kind)
    verdict = judge(db)
    assert verdict.names["after"] == 1 and verdict.names.total() <= 2


def test_bc_076_decorated_tool_keeps_its_signature(logger: AuditLogger) -> None:
    def tool(a: int, /, b: str = "x", *, c: float = 1.5) -> str:
        """Say it."""
        return f"{a}{b}{c}"

    async def slow(a: int) -> int:
        return a

    for function in (tool, slow):
        wrapped = logger.tool()(function)
        assert inspect.signature(wrapped) == inspect.signature(function)
        assert (wrapped.__doc__, wrapped.__name__) == (function.__doc__, function.__name__)
        assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(function)
    assert logger.tool()(tool)(1, "y", c=2) == "1y2"


def test_bc_078_each_event_carries_the_values_of_its_own_call(db: Path, logger: AuditLogger) -> None:
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")

    async def task(n: int) -> None:
        user.set(f"user-{n}")
        await asyncio.sleep(0)
        async with logger.record("tool", f"task-{n}", {"n": [n]}, user_id=user.get()):
            await asyncio.sleep(0)
        await asyncio.to_thread(lambda: logger.log_event("cli", "tool", f"thread-{n}", user_id=user.get()))
        user.set("changed")

    async def everything() -> None:
        await asyncio.gather(*(task(n) for n in range(200)))

    asyncio.run(everything())
    assert logger.shutdown()
    rows = table_rows(db, "SELECT name, user_id FROM logs")
    assert len(rows) == 400
    assert all(name.split("-")[1] == who.split("-")[1] for name, who in rows)


# --- the journal and the disk


def test_bc_081_short_writes_leave_no_hole_and_repeat_nothing(db: Path) -> None:
    body = """
        true_write = os.write; calls = 0
        def write(fd, data):
            global calls
            if fd < 3: return true_write(fd, data)
            calls += 1
            if calls % 35 == 0: return 0
            if calls % 49 == 0: raise BlockingIOError(11, "again")
            return true_write(fd, data[:len(data) // 2] if calls % 7 == 0 else data)
        os.write = write
        import logging; logging.disable()
        for n in range(5000):
            log(n)
            if n % 10 == 0: time.sleep(0.001)
        assert audit.flush(60)
    """
    run_clean(body, db)
    assert_whole(judge(db), {str(n) for n in range(5000)})


@linux
@pytest.mark.parametrize("fatal", [False, True])
def test_bc_082_file_size_limit_starts_new_segments_and_kills_nobody(db: Path, fatal: bool) -> None:
    body = """
        import resource
        if sys.argv[2] == "True": signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, -1))
        for n in range(2000): log(n, text="x" * 1000)
        assert audit.flush(60)
        log("huge", text="x" * 300000); log("last")
        assert audit.flush(60)
        assert audit.counters.dropped == 1, audit.counters
    """
    done = run(body, db, str(fatal), MXCP_AUDIT_ENGINE="package")
    assert done.returncode == 0, done.stderr
    assert_whole(judge(db), {str(n) for n in range(2000)} | {"last"})
    ingest(db)  # without the limit
    verdict = judge(db)
    assert_whole(verdict, {str(n) for n in range(2000)} | {"last"})
    assert verdict.in_table == 2001 and verdict.losses == 1


@pytest.mark.parametrize("damage", ["cut", "random", "zero", "empty"])
def test_bc_083_damaged_segments_never_stop_the_start(db: Path, cli: Any, damage: str) -> None:
    sound = set()
    for n in range(10):
        path = write_segment(db, [f"{n}-{line}" for line in range(30)])
        data = bytearray(path.read_bytes())
        at = 37 + n * len(data) // 11
        if damage == "cut":
            del data[at:]
        elif damage == "random":
            data += os.urandom(100) + b"\n"
            at = len(data)
        elif damage == "zero":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        else:
            at, data = 0, bytearray()
        path.write_bytes(data)
        sound |= {f"{n}-{line}" for line in range(data[:at].count(b"\n") if damage != "random" else 30)}
    names = {event["name"] for event in shown(cli, db)} if sound else set()
    assert sound <= names
    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "new")
    assert audit.flush(SAFETY_SECONDS)
    counters = audit.counters
    audit.shutdown()
    verdict = judge(db)
    assert not verdict.lost(sound | {"new"}) and verdict.doubled == 0
    assert not list(Path(f"{db}.journal").glob("*.jsonl"))
    if damage != "empty":
        assert counters.errors and list(Path(f"{db}.journal").glob("*.torn" if damage == "cut" else "*.re*"))


@pytest.mark.parametrize("place", ["between", "inside", "end"])
def test_bc_084_blocks_of_nul_bytes_cost_no_intact_line(db: Path, cli: Any, place: str) -> None:
    path = write_segment(db, [str(n) for n in range(20)])
    data = path.read_bytes()
    feed = data.index(b"\n", len(data) // 2) + 1
    at = {"between": feed, "inside": feed + 50, "end": len(data)}[place]
    path.write_bytes(data[:at] + bytes(4096) + data[at:])
    assert len(shown(cli, db)) >= 18
    told = ingest(db)
    assert told.ingested == judge(db).in_table >= 19
    assert not path.exists() and told.last_error is not None and path.stem in told.last_error
    assert ingest(db).ingested == 0


@pytest.mark.parametrize("how", ["unlink", "remove", "rename"])
def test_bc_085_journal_that_is_deleted_under_a_running_writer(
    db: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    audit = AuditLogger(db, flush_interval=60)
    audit.log_event("cli", "tool", "early")
    directory = Path(f"{db}.journal")
    wait_until(lambda: audit.counters.written == 1)
    if how == "unlink":
        next(directory.glob("*.jsonl")).unlink()
    elif how == "remove":
        shutil.rmtree(directory)
    else:
        directory.rename(f"{db}.away")
        directory.mkdir(0o700)
    for n in range(10):
        audit.log_event("cli", "tool", str(n))
        time.sleep(0.01)
    assert audit.shutdown()
    # What was in a segment that no path leads to is written again, and is nowhere twice.
    assert_whole(judge(db), {str(n) for n in range(10)} | {"early"})
    assert not [path for path in Path(f"{db}.away").glob("*.jsonl") if path.stat().st_size]
    assert sum("deleted or replaced" in record.message for record in caplog.records) == 1


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Callable[[str], None]]:
    path.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True
        ).returncode
    ):
        pytest.skip("can't mount a tmpfs here")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", path], check=True) and None
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@linux
def test_bc_086_full_disk_blocks_no_caller_and_needs_no_restart(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "200k") as resize:
        db = tmp_path / "disk" / "log.duckdb"
        audit = AuditLogger(db, flush_interval=0.1)
        for n in range(2000):
            audit.log_event("cli", "tool", str(n), {"text": "x" * 500})
        assert not audit.flush(timeout=0.5)
        counters = audit.counters
        assert counters.accepted == 2000 and counters.written < 2000 and counters.dropped == 0
        assert counters.last_error is not None
        resize("64m")
        assert audit.flush(SAFETY_SECONDS)
        audit.shutdown()
        assert_whole(judge(db), {str(n) for n in range(2000)})


@linux
@needs["strace"]
@pytest.mark.parametrize("when", [1, 2, 3])
def test_bc_090_failed_fsync_loses_nothing(db: Path, when: int) -> None:
    write_segment(db, [str(n) for n in range(100)])
    command = [sys.executable, "-m", "mxcp_audit", "ingest", "--db", str(db)]
    inject = ["strace", "-f", "-o", os.devnull, "-e", f"inject=fsync,fdatasync:error=EIO:when={when}"]
    subprocess.run(
        [*inject, *command],
        env=child_environment(MXCP_AUDIT_ENGINE="package"),
        capture_output=True,
        timeout=SAFETY_SECONDS,
    )
    assert_whole(judge(db), 100)
    ingest(db)
    verdict = judge(db)
    assert_whole(verdict, 100)
    assert verdict.in_table == 100


def test_bc_090_failed_fsync_of_the_journal_moves_to_a_new_segment(db: Path) -> None:
    body = """
        import logging; logging.disable()
        true_sync = os.fsync; calls = 0
        def fsync(fd):
            global calls; calls += 1
            if calls % 3 == 0: raise OSError(5, "EIO")
            return true_sync(fd)
        audit = AuditLogger(db, durable=True); os.fsync = fsync
        for n in range(30): log(n)
    """
    run_clean(body, db, audit=False)
    assert_whole(judge(db), {str(n) for n in range(30)})


@linux
def test_bc_091_full_database_volume_loses_nothing(tmp_path: Path, cli: Any) -> None:
    with tmpfs(tmp_path / "disk", "1m") as resize:
        db, journal = tmp_path / "disk" / "log.duckdb", tmp_path / "journal"
        site = tmp_path / "mxcp-site.yml"
        site.write_text(
            "mxcp: 1\nprofiles:\n  default:\n    audit:\n      enabled: true\n"
            f"      path: {db}\n      journal: {journal}\n"
        )
        audit = AuditLogger(db, journal=journal, flush_interval=0.1)
        for n in range(6000):
            audit.log_event("cli", "tool", str(n), {"text": os.urandom(300).hex()})
        assert audit.flush(SAFETY_SECONDS)
        wait_until(lambda: audit.counters.errors)
        done = cli("log", "--json", "--limit", "100000")
        assert len(json.loads(done.stdout)) == 6000
        audit.shutdown()
        resize("64m")
        Store(audit.config).ingest()
        verdict = judge(db, journal)
        assert_whole(verdict, {str(n) for n in range(6000)})
        assert verdict.in_table == 6000


def test_bc_092_broken_store_is_reported_as_broken(db: Path, cli: Any) -> None:
    write_segment(db, ["kept"])
    db.write_bytes(b"this is no database" * 1000)
    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "new")
    audit.flush(SAFETY_SECONDS)
    assert audit.counters.errors and "kept" not in str(audit.counters.last_error)
    audit.shutdown()
    done = cli("doctor", "--db", str(db), "--json")
    state = json.loads(done.stdout)
    assert done.returncode == 1 and state["healthy"] is False
    assert state["journal"]["sealed"] >= 1 and state["journal"]["oldest_pending"]
    assert any(str(db) in fault["problem"] and fault["remedy"] for fault in state["faults"])


def test_bc_093_slow_disk_never_takes_endless_memory(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 2**20)
    thaw, true_write = threading.Event(), os.write

    def write(fd: int, data: Any) -> int:
        thaw.wait(SAFETY_SECONDS)
        return true_write(fd, data)

    monkeypatch.setattr(os, "write", write)
    audit = AuditLogger(db, on_full="drop")
    for n in range(1000):
        audit.log_event("cli", "tool", str(n), {"text": "x" * 10000})
    held = audit._writer._queued_bytes
    assert held < 2**20 + 11000 and audit.counters.dropped > 800
    thaw.set()
    assert audit.flush(SAFETY_SECONDS)
    audit.shutdown()
    verdict = judge(db)
    assert verdict.in_table + verdict.losses == 1000 and verdict.losses == audit.counters.dropped


@pytest.mark.parametrize("on_full", ["block", "drop"])
def test_bc_094_burst_loses_nothing_or_says_how_much(
    db: Path, on_full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 200_000)
    audit = AuditLogger(db, on_full=on_full)
    true_write, deadline = os.write, time.monotonic() + SAFETY_SECONDS

    def write(fd: int, data: Any) -> int:  # slow, until the queue was full for certain
        while on_full == "drop" and not audit.counters.dropped and time.monotonic() < deadline:
            time.sleep(0.01)
        return true_write(fd, data)

    monkeypatch.setattr(os, "write", write)

    def work(thread: int) -> None:
        for n in range(500):
            audit.log_event("cli", "tool", f"{thread}-{n}")

    in_threads(work, range(16))
    audit.shutdown()
    verdict = judge(db)
    assert verdict.doubled == verdict.torn == 0
    assert verdict.in_table + verdict.losses == 8000
    assert (verdict.losses == 0) == (on_full == "block")


# --- ingest


def test_bc_096_killed_ingest_takes_every_event_once(tmp_path: Path) -> None:
    for round_number in range(4):
        db = tmp_path / f"{round_number}.duckdb"
        for n in range(20):
            write_segment(db, [f"{n}-{line}" for line in range(50)])
        command = [sys.executable, "-m", "mxcp_audit", "ingest", "--db", str(db)]
        process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL)
        wait_until(lambda db=db, process=process: db.exists() or process.poll() is not None)
        time.sleep(0.004 * round_number)
        process.kill()
        process.wait()
        ingest(db)
        verdict = judge(db)
        assert_whole(verdict, 1000)
        assert verdict.in_table == 1000


def test_bc_099_one_bad_line_costs_one_line(db: Path) -> None:
    bad: list[bytes | dict[str, Any]] = [
        b'{"broken',
        b'{"unknown": 1}',
        {"duration_ms": "soon"},
        {"seq": None},
    ]
    bad += [{"timestamp": text} for text in ("2026-01-31T23:59:60.000000Z", "")] + [{"seq": 10}]
    far = {"timestamp": "10000-01-01T00:00:00.000000Z"}  # DuckDB has such a year
    sound, segments = {"later"}, []
    for number, change in enumerate([*bad, far]):
        segments.append(journal_of(db).open_segment())
        lines = [journal_line(f"{number}-{n}", n) for n in range(1, 101)]
        if isinstance(change, bytes):
            lines[49] = change + b"\n"
        else:
            lines[49] = journal_line(f"{number}-50", **{"seq": 50, **change})
        sound |= {f"{number}-{n}" for n in range(1, 101) if n != 50 or change is far}
        segments[-1].append(b"".join(lines), 100)
        segments[-1].seal()
    write_segment(db, ["later"])
    told = ingest(db)
    verdict = judge(db)
    assert verdict.losses == told.rejected == len(bad)
    assert_whole(verdict, sound)
    for segment in segments[:-1]:
        kept = Path(segment.path).with_suffix(".rejected")
        (rejected,) = map(json.loads, kept.read_text().splitlines())
        assert rejected["line"] == 50 and rejected["reason"]
    assert len(list(Path(f"{db}.journal").glob("*.rejected"))) == len(bad)
    assert ingest(db).ingested == 0


def test_bc_100_retry_in_the_same_process_meets_no_constraint(db: Path) -> None:
    write_segment(db, [str(n) for n in range(100)])
    failures = iter(["INSERT INTO audit.logs", "COMMIT", "CHECKPOINT"])
    failing = next(failures)

    def opener(**how: bool) -> Any:
        engine = mxcp_audit.open_engine(**how)
        true_execute = engine.execute

        def execute(sql: str, params: Any = {}) -> Any:
            nonlocal failing
            if sql.startswith(failing):
                failing = next(failures, "nothing")
                raise mxcp_audit.StoreError("injected")
            return true_execute(sql, params)

        engine.execute = execute  # type: ignore[method-assign]
        return engine

    store = Store(mxcp_audit.config_from_arguments(path=str(db)), opener=opener)
    for _ in range(3):
        with pytest.raises(mxcp_audit.StoreError, match="injected"):
            store.ingest()
    assert store.ingest()
    verdict = judge(db)
    assert_whole(verdict, 100)
    assert verdict.in_table == 100


def half_ingested(db: Path, sql: str) -> None:
    """Leave a WAL behind: a process that is killed with a committed transaction in it."""
    code = (
        f"import duckdb, os, signal; c = duckdb.connect({str(db)!r});"
        f"c.execute('PRAGMA disable_checkpoint_on_shutdown'); c.execute({sql!r});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=SAFETY_SECONDS)
    assert os.stat(f"{db}.wal").st_size


@package
def test_bc_091_damaged_wal_that_only_we_wrote_is_moved_aside(db: Path, caplog: Any) -> None:
    write_segment(db, ["table"])
    ingest(db)
    write_segment(db, [str(number) for number in range(500)])
    code = (  # killed in the midst of a checkpoint that the disk had no room for
        "import os, sys, signal, mxcp_audit as m\n"
        "real = m.PackageEngine.execute\n"
        "def execute(self, sql, *rest):\n"
        "    if sql.startswith('CHECKPOINT'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, sql, *rest)\n"
        "m.PackageEngine.execute = execute\n"
        "m.Store(m.config_from_arguments(sys.argv[1])).ingest()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(db)], env=child_environment(), timeout=SAFETY_SECONDS)
    wal = Path(f"{db}.wal")
    data = bytearray(wal.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - byte for byte in data[middle : middle + 16])
    wal.write_bytes(data)
    ingest(db)
    assert_whole(judge(db), {str(number) for number in range(500)} | {"table"})
    (aside,) = db.parent.glob("*.damaged-*")
    assert aside.read_bytes() == data and str(aside) in caplog.text
    assert not Path(f"{db}.journal", "journal.wal").exists()


@package
def test_bc_101_damaged_wal_stops_no_logging_and_deletes_nothing(db: Path, cli: Any) -> None:
    write_segment(db, ["table"])
    ingest(db)
    half_ingested(db, "CREATE TABLE other AS SELECT i, 'text' || i FROM range(1000) t(i)")
    wal = Path(f"{db}.wal")
    data = bytearray(wal.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - byte for byte in data[middle : middle + 16])
    wal.write_bytes(data)
    audit = AuditLogger(db)
    for n in range(100):
        audit.log_event("cli", "tool", str(n))
    assert audit.flush(SAFETY_SECONDS)
    audit.shutdown()
    if audit.counters.ingested == 100:  # this DuckDB repaired it by dropping the damaged transaction
        assert_whole(judge(db), {str(n) for n in range(100)} | {"table"})
        return
    assert wal.read_bytes() == data
    done = cli("log", "--db", str(db), "--json", "--limit", "1000")
    assert {event["name"] for event in json.loads(done.stdout)} == {str(n) for n in range(100)}
    assert done.returncode == 1 and f"mv '{wal}' '{wal}.damaged'" in done.stderr
    wal.rename(f"{wal}.damaged")
    ingest(db)
    assert_whole(judge(db), {str(n) for n in range(100)} | {"table"})


@pytest.mark.parametrize("kind", ["text", "random", "half", "sqlite", "empty"])
def test_bc_103_file_that_is_no_database_is_left_alone(db: Path, cli: Any, kind: str) -> None:
    if kind == "half":
        write_segment(db, [str(n) for n in range(2000)])
        ingest(db)
        db.write_bytes(db.read_bytes()[: os.stat(db).st_size // 2])
    elif kind == "sqlite":
        import sqlite3

        with contextlib.closing(sqlite3.connect(db)) as connection:
            connection.execute("CREATE TABLE logs (x)")
    else:
        db.write_bytes({"text": b"hello\n" * 3000, "random": os.urandom(20000), "empty": b""}[kind])
    before = db.read_bytes()
    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "kept")
    assert audit.flush(SAFETY_SECONDS)
    audit.shutdown()
    done = cli("log", "--db", str(db), "--json")
    if kind == "empty":  # counts as absent
        assert_whole(judge(db), {"kept"})
        return
    assert db.read_bytes() == before
    assert [event["name"] for event in json.loads(done.stdout)] == ["kept"]
    assert done.returncode == 1 and str(db) in done.stderr and "Traceback" not in done.stderr


def test_bc_104_damage_inside_a_block_is_reported_and_not_rewritten(db: Path, cli: Any) -> None:
    segment = write_segment(db, [os.urandom(100).hex() for _ in range(5000)])
    assert segment
    ingest(db)
    sound = db.read_bytes()
    reported = 0
    for part in (3, 5, 7):
        data = bytearray(sound)
        at = len(data) * part // 9
        data[at : at + 64] = bytes(255 - byte for byte in data[at : at + 64])
        db.write_bytes(data)
        done = cli("log", "--db", str(db), "--json", "--limit", "100000")
        assert "Traceback" not in done.stderr and db.read_bytes() == data
        if done.returncode:
            reported += 1
        else:
            assert len(json.loads(done.stdout)) == 5000
    assert reported


# --- locks


@package
def test_bc_105_reader_against_a_stopped_owner_answers_from_the_journal(db: Path, cli: Any) -> None:
    write_segment(db, ["table"])
    ingest(db)
    write_segment(db, ["journal"])
    body = """
        import duckdb; connection = duckdb.connect(db); print("open", flush=True); time.sleep(600)
    """
    with started(body, db, audit=False) as process:
        assert process.stdout.readline() == "open\n"
        process.send_signal(signal.SIGSTOP)
        done = cli("log", "--db", str(db), "--json", "--wait", "0.2")
        assert [event["name"] for event in json.loads(done.stdout)] == ["journal"]
        assert done.returncode == 75 and "only events of the journal" in done.stderr
    assert len(shown(cli, db)) == 2


@package
@pytest.mark.parametrize("read_only", [True, False])
def test_bc_106_forgotten_viewer_delays_only_the_ingest(db: Path, cli: Any, read_only: bool) -> None:
    write_segment(db, ["table"])
    ingest(db)
    with (
        started(
            f"""
        import duckdb; connection = duckdb.connect(db, read_only={read_only}); print("open", flush=True)
        time.sleep(600)
    """,
            db,
            audit=False,
        ) as viewer,
        started(
            """
        sys.stdin.readline()
        audit = AuditLogger(db, flush_interval=0.05)
        for n in range(200): log(n); time.sleep(0.002)
        audit.flush(3); print("logged", flush=True); sys.stdin.readline(); log("last"); audit.flush(3)
    """,
            db,
            audit=False,
        ) as server,
    ):
        assert viewer.stdout.readline() == "open\n"
        server.stdin.write("\n")
        server.stdin.flush()
        assert server.stdout.readline() == "logged\n"
        done = cli("log", "--db", str(db), "--json", "--limit", "1000", "--wait", "0.1")
        assert len(json.loads(done.stdout)) == (201 if read_only else 200)
        viewer.kill()
        viewer.wait()
        _, errors = server.communicate("\n", timeout=SAFETY_SECONDS)
        assert len(errors.splitlines()) <= 1 and ("in use by" in errors or not errors)
    verdict = judge(db)
    assert_whole(verdict, {str(n) for n in range(200)} | {"table", "last"})
    assert verdict.in_table == 202


def test_bc_109_closing_a_descriptor_of_the_database_drops_no_rows(db: Path) -> None:
    body = """
        for side in range(3):
            for n in range(100): log(f"a-{side}-{n}")
            audit.flush(60)
            with open(db, "rb") as file: file.read(16)
            print("turn", flush=True); sys.stdin.readline()
        audit.shutdown()
    """
    with started(body, db) as process:
        other = AuditLogger(db)
        for side in range(3):
            assert process.stdout.readline() == "turn\n"
            for n in range(100):
                other.log_event("cli", "tool", f"b-{side}-{n}")
            assert other.flush(SAFETY_SECONDS)
            process.stdin.write("\n")
            process.stdin.flush()
        other.shutdown()
        process.wait(SAFETY_SECONDS)
    assert_whole(judge(db), {f"{who}-{side}-{n}" for who in "ab" for side in range(3) for n in range(100)})


@linux
@needs["cc"]
@pytest.mark.parametrize("calls", ["flock", "fcntl", "both"])
def test_bc_110_file_system_without_locks_still_records_and_shows(
    db: Path, process_cli: Any, calls: str
) -> None:
    source = """
        #define _GNU_SOURCE
        #include <errno.h>
        #include <fcntl.h>
        #include <stdarg.h>
        #include <dlfcn.h>
        #ifdef NO_FLOCK
        int flock(int fd, int operation) { errno = ENOLCK; return -1; }
        #endif
        #ifdef NO_FCNTL
        static int deny(int fd, int command, long argument, const char *name) {
            if (command == F_SETLK) { errno = EOPNOTSUPP; return -1; }
            return ((int (*)(int, int, long))dlsym(RTLD_NEXT, name))(fd, command, argument);
        }
        #define TAKE va_list a; va_start(a, c); long x = va_arg(a, long); va_end(a)
        int fcntl(int fd, int c, ...) { TAKE; return deny(fd, c, x, "fcntl"); }
        int fcntl64(int fd, int c, ...) { TAKE; return deny(fd, c, x, "fcntl64"); }
        #endif
    """
    library = db.parent / "nolocks.so"
    flags = {"flock": ["-DNO_FLOCK"], "fcntl": ["-DNO_FCNTL"], "both": ["-DNO_FLOCK", "-DNO_FCNTL"]}[calls]
    subprocess.run(
        ["cc", "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", library, "-ldl"],
        input=textwrap.dedent(source),
        text=True,
        check=True,
    )
    body = """
        for n in range(100): log(n)
        audit.flush(1)
    """
    done = run(body, db, LD_PRELOAD=str(library), MXCP_AUDIT_ENGINE="package")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) <= 2  # told once, and what is left at the end
    if calls != "fcntl":
        assert "lock" in done.stderr and not db.exists()
    seen = json.loads(
        process_cli(
            "log", "--db", str(db), "--json", "--limit", "1000", "--wait", "0.1", LD_PRELOAD=str(library)
        ).stdout
    )
    assert {event["name"] for event in seen} == {str(n) for n in range(100)}
    assert_whole(judge(db), {str(n) for n in range(100)})


# --- containers, hostile files


def test_bc_112_same_clock_and_name_never_overwrite_a_segment(db: Path) -> None:
    frozen = [mxcp_audit.Journal(f"{db}.journal", clock=lambda: 0) for _ in range(200)]
    segments = [journal.open_segment() for journal in frozen]
    for n, segment in enumerate(segments):
        segment.append(journal_line(str(n), 1), 1)
        segment.seal()
    assert_whole(judge(db), {str(n) for n in range(200)})


@linux
@root
@needs["unshare"]
def test_bc_113_two_containers_share_one_journal(db: Path) -> None:
    body = """
        assert os.getpid() == 1
        print("ready", flush=True); sys.stdin.readline()
        for n in range(500): log(f"{sys.argv[2]}-{n}")
        audit.flush(60)
    """
    namespace = ("unshare", "-pf", "--mount-proc")
    with started(body, db, "a", prefix=namespace) as one, started(body, db, "b", prefix=namespace) as two:
        for process in (one, two):
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in (one, two):
            process.stdin.write("\n")
            process.stdin.flush()
        with contextlib.suppress(mxcp_audit.StoreError):
            Store(mxcp_audit.config_from_arguments(path=str(db))).ingest()
        assert [process.wait(SAFETY_SECONDS) for process in (one, two)] == [0, 0]
    ingest(db)
    assert_whole(judge(db), {f"{who}-{n}" for who in "ab" for n in range(500)})


def test_bc_114_locks_and_not_process_ids_tell_who_lives(db: Path) -> None:
    body = """
        audit = AuditLogger(db, flush_interval=600); log("live"); log("live too")
        while audit.counters.written < 2: time.sleep(0.01)
        print("logged", flush=True); time.sleep(600)
    """
    with started(body, db, audit=False) as process:
        assert process.stdout.readline() == "logged\n"
        assert ingest(db).ingested == 0  # alive, so left alone
        process.kill()
        process.wait()
        assert ingest(db).ingested == 2  # dead, whatever has its process id now


def test_bc_117_planted_links_lead_to_no_victim(db: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path(f"{db}.journal").mkdir(0o700)
    for name in ("ingest.lock", "20260131T120000000000Z-00000000.jsonl"):
        Path(f"{db}.journal", name).symlink_to(victim)
    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "x")
    audit.shutdown()
    assert victim.read_text() == "precious"
    shutil.rmtree(f"{db}.journal")
    (tmp_path / "elsewhere").mkdir()
    Path(f"{db}.journal").symlink_to(tmp_path / "elsewhere")
    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "x")
    assert not audit.flush(timeout=0.3)
    assert "symbolic link" in str(audit.counters.last_error) and not list((tmp_path / "elsewhere").iterdir())
    Path(f"{db}.journal").unlink()
    assert audit.flush(SAFETY_SECONDS)
    audit.shutdown()


def test_bc_119_line_breaks_forge_no_event(stored: Any, db: Path) -> None:
    forged = "x\n" + journal_line("forged", 2).decode()
    stored(
        {"text": forged},
        {"text": "a\r\nb\x0b\x85\u2028"},
        name=forged,
        user_id=forged,
        error=forged,
        status="error",
    )
    assert judge(db).in_table == 6 and "forged" not in judge(db).names


ESCAPES = "\x1b[2J \x1b]0;t\x07 \x1b]52;c;aGk=\x07 \r \x08 \x9b \u202e"


def test_bc_121_escape_sequences_reach_no_terminal(db: Path, logger: AuditLogger, cli: Any) -> None:
    logger.log_event(
        ESCAPES, "tool", f"x{ESCAPES}", {"x": ESCAPES}, status="error", error=ESCAPES, user_id=ESCAPES
    )
    assert logger.shutdown()
    for done in (
        cli("log", "--db", str(db)),
        cli("log", "--db", str(db), "--since", ESCAPES),
        cli("log", "--db", f"{db}{ESCAPES}"),
    ):
        assert not set(done.stdout + done.stderr) & set("\x1b\x07\r\x08\x9b\u202e")
    (event,) = shown(cli, db)
    assert event["name"] == f"x{ESCAPES}"


@linux
@root
@needs["chattr"]
def test_bc_123_undeletable_segment_stops_nothing_and_is_taken_once(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = write_segment(db, ["stuck"])
    for n in range(3):
        write_segment(db, [str(n)])
    true_unlink = os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if str(path) == str(stuck):
            raise PermissionError(1, "Operation not permitted", path)
        true_unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)  # as chattr +i has it, on file systems that know it
    told = ingest(db)
    assert told.ingested == 4 and told.errors == 1
    assert [path.name for path in Path(f"{db}.journal").glob("*.jsonl")] == [stuck.name]
    assert ingest(db).ingested == 0
    assert_whole(judge(db), {"stuck", "0", "1", "2"})


# --- reading


def test_bc_124_every_field_is_shown_before_and_after_ingest(
    db: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.setattr(AuditLogger, "_ingest", None)
    audit = AuditLogger(db)
    same = {"caller": "http", "name": "the name", "duration_ms": 12, "policy_decision": "warn"}
    same |= {"reason": "the reason", "status": "error", "error": "the error", "user_id": "the user"}
    same |= {"session_id": "the session", "trace_id": "the trace"}
    audit.log_event(event_type="prompt", input_params={"in": "put"}, **same)  # type: ignore[arg-type]
    audit.shutdown()
    expected = {**same, "type": "prompt", "input_json": '{"in":"put"}'}
    views = []
    for step in range(2):
        (event,) = shown(cli, db)
        assert {key: event[key] for key in expected} == expected
        assert cli("log", "--db", str(db), "--export", f"{step}.csv").returncode == 0
        views.append((event, (db.parent / f"{step}.csv").read_text()))
        ingest(db)
    assert views[0] == views[1]


@pytest.mark.parametrize("since", ["5M x", "5 m m", "-5m", "9999999999d", "1e9h", "", " ", "1y", "fortnight"])
def test_bc_125_unknown_span_of_time_is_refused_with_an_example(db: Path, cli: Any, since: str) -> None:
    Path(f"{db}.journal").mkdir()
    done = cli("log", "--db", str(db), f"--since={since}")
    assert done.returncode == 2 and "1d" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "since, seconds", [("1d", 86400), ("2w", 1209600), ("1h30m", 5400), ("90m", 5400), ("1d12h", 129600)]
)
def test_bc_125_days_and_sums_are_exact(since: str, seconds: int) -> None:
    now = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.timezone.utc)
    assert mxcp_audit.parse_time(since, now=now) == mxcp_audit.sql_time(
        now - datetime.timedelta(seconds=seconds)
    )


@pytest.mark.parametrize(
    "options",
    [
        *("--since 1x", "--since abc", "--limit -1", "--limit 0", "--limit abc", "--status sucess"),
        *("--type tol", "--since 1h --until 2h"),
    ],
)
def test_bc_126_wrong_option_never_looks_like_an_empty_log(db: Path, cli: Any, options: str) -> None:
    Path(f"{db}.journal").mkdir()
    done = cli("log", "--db", str(db), *options.split())
    assert done.returncode == 2 and done.stdout == "" and done.stderr


def test_bc_128_zones_of_a_filter_are_exact_wherever_one_is(db: Path, cli: Any) -> None:
    write_segment(db, ["noon"])  # 2026-01-31T12:00:00Z
    for zone in ("America/New_York", "Asia/Kolkata"):
        for text, found in (
            ("2026-01-31T12:00:00Z", 1),
            ("2026-01-31T07:00:00-05:00", 1),
            ("2026-01-31T07:00:01-05:00", 0),
            ("2026-01-31T12:00:00", 1),
            ("2026-01-31T17:30:00+05:30", 1),
            ("2026-02-01", 0),
        ):
            done = cli("log", "--db", str(db), "--json", "--since", text, TZ=zone)
            assert len(json.loads(done.stdout)) == found, (zone, text)


def test_bc_130_clock_that_jumps_stops_neither_sealing_nor_ingest(db: Path) -> None:
    body = """
        import itertools
        true_time = time.time_ns; offset = 0
        audit = AuditLogger(db, flush_interval=0.05)
        audit._encoder._clock = audit._writer._appender.journal._clock = lambda: true_time() + offset
        mxcp_audit._CPU_SHARE = 1000
        for n, offset in enumerate([0, -86400 * 10**9, 86400 * 3650 * 10**9, 0]):
            log(n); time.sleep(0.3)
            end = time.monotonic() + 60
            while audit.counters.ingested <= n and time.monotonic() < end: time.sleep(0.02)
            assert audit.counters.ingested == n + 1, audit.counters
    """
    run_clean(body, db, audit=False)
    assert_whole(judge(db), {"0", "1", "2", "3"})


def test_bc_131_repeated_hour_is_told_apart(db: Path, cli: Any) -> None:
    segment = journal_of(db).open_segment()
    for seq, hour in enumerate(("05:30", "06:30"), 1):  # both are 01:30 in New York on that day
        segment.append(journal_line(hour, seq, timestamp=f"2026-11-01T{hour}:00.000000Z"), 1)
    segment.seal()
    for _ in range(2):
        done = cli("log", "--db", str(db), "--json", TZ="America/New_York")
        times = [event["timestamp"] for event in json.loads(done.stdout)]
        assert times == ["2026-11-01T06:30:00.000000Z", "2026-11-01T05:30:00.000000Z"]
        ingest(db)


# --- export, command line, configuration


def test_bc_137_export_is_whole_or_absent(db: Path, cli: Any) -> None:
    write_segment(db, [os.urandom(100).hex() for _ in range(5000)])
    ingest(db)
    data = bytearray(db.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = os.urandom(4096)
    db.write_bytes(data)
    target = db.parent / "out.csv"
    target.write_text("older")
    done = cli("log", "--db", str(db), "--export", str(target))
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert target.read_text() == "older"
    else:
        assert len(target.read_text().splitlines()) == 5001
    assert not list(db.parent.glob(".*.part"))


def test_bc_138_export_that_cannot_be_written_fails_and_destroys_nothing(db: Path, cli: Any) -> None:
    write_segment(db, ["table"])
    ingest(db)
    write_segment(db, ["journal"])
    before = db.read_bytes()
    targets = [".", "missing/out.csv", "log.duckdb", "log.duckdb.journal/x.csv"]
    if not os.geteuid():
        os.mknod(db.parent / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # as /dev/full
        targets.append("full")
    for target in targets:
        done = cli("log", "--db", str(db), "--export", target)
        assert done.returncode and done.stderr and "Traceback" not in done.stderr, target
        assert db.read_bytes() == before, target
    assert "full" not in targets or stat.S_ISCHR(os.stat(db.parent / "full").st_mode)
    assert_whole(judge(db), {"table", "journal"})


def test_bc_139_output_that_nobody_reads_to_the_end(db: Path) -> None:
    write_segment(db, [str(n) for n in range(4000)])
    command = f"{sys.executable} -m mxcp_audit log --db {db} --limit 4000"
    environment = child_environment(PYTHONUNBUFFERED="1")
    for line in (
        f"{command} | head -1",
        f"{command} --json | head -c 10",
        f"{command} >&-",
        f"{command} --json >&-",
    ):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=SAFETY_SECONDS,
        )
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
        assert done.returncode in (0, 1, 141)


@package
def test_bc_142_read_only_open_with_a_wal_shows_rows_and_changes_nothing(db: Path, cli: Any) -> None:
    write_segment(db, ["table"])
    ingest(db)
    half_ingested(db, "INSERT INTO logs SELECT * REPLACE ('in the wal' AS name, 2 AS seq) FROM logs")
    write_segment(db, ["journal"])
    before = {path: path.read_bytes() for path in (db, Path(f"{db}.wal"))}
    done = cli("log", "--db", str(db), "--json")
    assert {event["name"] for event in json.loads(done.stdout)} >= {"journal"}
    assert done.returncode == 0 or done.stderr
    assert {path: path.read_bytes() for path in before} == before


@linux
@root
def test_bc_143_read_only_disk_needs_no_temporary_files_beside_the_data(tmp_path: Path, cli: Any) -> None:
    with tmpfs(tmp_path / "disk", "64m") as _:
        db = tmp_path / "disk" / "log.duckdb"
        write_segment(db, [os.urandom(20).hex() for _ in range(3000)])
        ingest(db)
        write_segment(db, ["journal"])
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert len(shown(cli, db)) == 3001


@pytest.mark.parametrize("value", ["'false'", '"no"', "off", "0", "''", "null", "[]", "False"])
def test_bc_144_false_in_any_spelling_never_means_true(tmp_path: Path, value: str) -> None:
    site = tmp_path / "mxcp-site.yml"
    site.write_text(f"mxcp: 1\nprofiles:\n  default:\n    audit:\n      enabled: {value}\n")
    try:
        config = mxcp_audit.load_config(config=site)
    except mxcp_audit.ConfigError as error:
        assert "enabled" in str(error)
    else:
        assert config.enabled is False


@pytest.mark.parametrize("word", ["no", "on", "yes", "1.10", "2026-01-01", "null", "0x1F", "~"])
def test_bc_146_names_that_look_like_other_types_stay_text_or_are_refused(tmp_path: Path, word: str) -> None:
    site = tmp_path / "mxcp-site.yml"
    site.write_text(
        f"mxcp: 1\nprofiles:\n  default:\n    audit:\n      enabled: true\n      redact: [{word}]\n"
    )
    try:
        config = mxcp_audit.load_config(config=site)
    except mxcp_audit.ConfigError as error:
        assert "redact" in str(error) or error.line == 6  # the file, the line and the remedy
    else:
        assert tuple(config.redact) == (word,)


def test_bc_147_files_that_others_hold_open_cannot_be_removed_or_renamed(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, true_unlink = [True], os.unlink

    def unlink(path: Any, **options: Any) -> None:
        if held[0] and str(path).endswith(".jsonl"):
            raise PermissionError(13, "in use by another process", path)
        true_unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    audit = AuditLogger(db, flush_interval=0.05)
    for n in range(20):
        audit.log_event("cli", "tool", str(n))
        time.sleep(0.02)
    assert audit.flush(SAFETY_SECONDS)
    held[0] = False
    audit.log_event("cli", "tool", "last")
    assert audit.shutdown()
    assert_whole(judge(db), {str(n) for n in range(20)} | {"last"})
    assert not list(Path(f"{db}.journal").glob("*.jsonl"))


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_bc_149_journal_is_utf_8_in_any_locale(db: Path, locale: str) -> None:
    body = 'log("\\U0001f600\\u2260\\u0645"); audit.flush(60)'
    strict = {"PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    run_clean(body, db, options=("-W", "error::EncodingWarning"), LC_ALL=locale, **strict)
    assert_whole(judge(db), {"\U0001f600\u2260\u0645"})


@pytest.mark.parametrize("trouble", ["journal", "corrupt", "fork", "input", "closed"])
def test_bc_151_nothing_ever_reaches_standard_output(db: Path, trouble: str) -> None:
    body = """
        trouble = sys.argv[2]
        if trouble == "journal": open(db + ".journal", "w").close()
        if trouble == "corrupt": open(db, "w").write("no database" * 1000)
        if trouble == "closed": os.close(1)
        log("x", odd=object(), nan=float("nan")); audit.flush(0.3)
        if trouble == "fork" and os.fork() == 0: log("child"); sys.exit()
        audit.log_event(object(), 1, [], status={}, duration_ms="soon")
        audit.shutdown(0.3)
    """
    done = run(body, db, trouble)
    assert done.returncode in (0, 120) and done.stdout == ""


# --- gevent


@pytest.fixture(scope="session")
def gevent_python() -> str:
    """An environment of its own: patching is for ever."""
    return make_environment("gevent", "gevent", "gunicorn", "packaging", "duckdb")


@linux
@pytest.mark.parametrize("imported", ["before", "after"])
def test_bc_038_greenlets_and_real_threads_log_together(db: Path, gevent_python: str, imported: str) -> None:
    lines = ["import mxcp_audit", "from gevent import monkey; monkey.patch_all()"]
    body = script("""
        import gevent, gevent.threadpool
        def greenlet(t):
            for n in range(20): log(f"g{t}-{n}"); gevent.sleep(0.001)
        def thread(t):
            for n in range(20): log(f"t{t}-{n}")
        pool = gevent.threadpool.ThreadPool(4)
        for t in range(8): pool.spawn(thread, t)
        gevent.joinall([gevent.spawn(greenlet, t) for t in range(100)]); pool.join()
        assert audit.flush(60)
    """)
    path = db.parent / "gevented.py"
    path.write_text("\n".join(lines if imported == "before" else lines[1:]) + "\n" + body)
    clean(run_process([gevent_python, path, db], MXCP_AUDIT_ENGINE="package"))
    names = {f"g{t}-{n}" for t in range(100) for n in range(20)} | {
        f"t{t}-{n}" for t in range(8) for n in range(20)
    }
    assert_whole(judge(db), names)


@linux
def test_bc_039_gunicorn_with_gevent_workers_that_are_renewed(db: Path, gevent_python: str) -> None:
    (db.parent / "app.py").write_text(
        textwrap.dedent(f"""
        from mxcp_audit import AuditLogger
        audit = AuditLogger({str(db)!r})
        def app(environ, start_response):
            audit.log_event("http", "tool", environ["PATH_INFO"])
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        """)
    )
    command = [
        *(gevent_python, "-m", "gunicorn", "-k", "gevent", "-w", "2", "--max-requests", "40", "-b"),
        *("127.0.0.1:0", "app:app"),
    ]
    with subprocess.Popen(
        command,
        cwd=db.parent,
        env=child_environment(MXCP_AUDIT_ENGINE="package"),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            url = next(
                match[1]
                for line in server.stderr
                if (match := re.search(r"Listening at: (http://\S+)", line))
            )
            threading.Thread(target=server.stderr.read, daemon=True).start()
            answered = set()
            for n in range(200):
                with contextlib.suppress(OSError):  # a worker that is being renewed may refuse
                    urllib.request.urlopen(f"{url}/{n}", timeout=SAFETY_SECONDS).close()
                    answered.add(f"/{n}")
        finally:
            server.terminate()
            server.wait(SAFETY_SECONDS)
    assert len(answered) > 150
    ingest(db)
    verdict = judge(db)
    assert verdict.doubled == verdict.torn == 0 and not verdict.lost(answered)
