"""Each labelled situation from a public bug thread has a test here, named after its id.

Where a situation can't be a test, docs/operations.md says what is promised instead. Sizes are scaled
down so that all runs in minutes; `tools/torture.py` runs the large ones. Real processes, real kills;
counted by `tools/judge.py`, which shares no code with the module.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, child_environment, load_cases, table_rows

import mxcp_audit
from mxcp_audit import AuditLogger, Store, main
from tools.judge import Verdict, judge, pythons

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux tools")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs = {
    tool: pytest.mark.skipif(not shutil.which(tool), reason=f"needs {tool}")
    for tool in ("strace", "unshare", "chattr", "cc")
}
every_python = pytest.mark.parametrize("python", pythons(), ids=lambda path: path.split("/")[-3])
SAFETY_SECONDS = 120

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


def environment_of(python: str, **changes: str) -> dict[str, str]:
    """The other Pythons have no duckdb package: they use the program."""
    if python != sys.executable:
        changes.update(MXCP_AUDIT_ENGINE="cli", MXCP_AUDIT_DUCKDB=mxcp_audit.find_program() or "none")
    return child_environment(**changes)


def run(
    body: str,
    db: Path,
    *args: str,
    python: str = sys.executable,
    options: tuple[str, ...] = (),
    audit: bool = True,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script as a program of its own, from a file: multiprocessing's `spawn` needs one."""
    path = db.parent / f"script{os.urandom(4).hex()}.py"
    path.write_text(script(body, audit=audit))
    return subprocess.run(
        [python, *options, str(path), str(db), *args],
        env=environment_of(python, **changes),
        cwd=db.parent,
        capture_output=True,
        text=True,
        timeout=SAFETY_SECONDS,
        stdin=subprocess.DEVNULL,
    )


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


def event_line(name: str, **changes: object) -> bytes:
    event: dict[str, Any] = {
        "timestamp": "2026-01-31T12:00:00.000000Z",
        "caller": "cli",
        "type": "tool",
        "name": name,
        "input_json": "null",
        "duration_ms": 1,
        "policy_decision": "n/a",
        "reason": None,
        "status": "success",
        "error": None,
        "user_id": None,
        "session_id": None,
        "trace_id": None,
    }
    return json.dumps({**event, **changes}).encode()[:-1]


def write_segment(db: Path, names: list[str]) -> Path:
    segment = journal_of(db).open_segment()
    lines = [mxcp_audit.finish_line(event_line(name), seq) for seq, name in enumerate(names, 1)]
    segment.append(b"".join(lines), len(lines))
    segment.seal()
    return Path(segment.path)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SAFETY_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "log.duckdb"


def shown(cli: Any, db: Path, *options: str) -> list[dict[str, Any]]:
    done = cli("log", "--db", str(db), "--json", "--limit", "100000", *options)
    return list(json.loads(done.stdout))


# --- shutdown


@every_python
def test_bc_001_first_event_in_an_exit_handler_is_stored(db: Path, python: str) -> None:
    body = """
        atexit.register(lambda: log("before"))
        audit = AuditLogger(db)
        atexit.register(lambda: log("after"))
    """
    # the module's own hook comes between handlers registered before and after its import
    early = "import atexit; atexit.register(lambda: log('earliest'))\n"
    path = db.parent / "early.py"
    path.write_text(early + script(body, audit=False))
    done = subprocess.run(
        [python, path, db], env=environment_of(python), capture_output=True, text=True, timeout=SAFETY_SECONDS
    )
    clean(done)
    assert_whole(judge(db), {"earliest", "before", "after"})


@every_python
@pytest.mark.parametrize("first", ["main", "thread"])
def test_bc_002_thread_outlives_main_and_logs(db: Path, python: str, first: str) -> None:
    clean(
        run(
            """
        if sys.argv[2] == "main": log("main")
        def later():
            time.sleep(0.2)
            for n in range(100): log(n)
        threading.Thread(target=later).start()
    """,
            db,
            first,
            python=python,
        )
    )
    assert_whole(judge(db), {str(n) for n in range(100)} | ({"main"} if first == "main" else set()))


@pytest.mark.parametrize("end", ["", "sys.exit()"])
def test_bc_004_one_event_and_out_is_stored(tmp_path: Path, end: str) -> None:
    for number in range(10):
        db = tmp_path / f"{number}.duckdb"
        clean(run(f"log('only'); {end}", db))
        assert_whole(judge(db), {"only"})


def test_bc_005_close_after_a_burst_stores_all_and_close_twice_is_harmless(db: Path) -> None:
    clean(
        run(
            """
        def work(t):
            for n in range(3000): log(f"{t}-{n}")
        threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        audit.close(); audit.close()
        log("late")
    """,
            db,
        )
    )
    assert_whole(judge(db), {f"{t}-{n}" for t in range(8) for n in range(3000)} | {"late"})


def test_bc_007_second_interrupt_at_exit_is_prompt_and_says_what_is_left(db: Path) -> None:
    with started(
        """
        log("written"); audit.flush()
        slow_writes(30)
        for n in range(200): log(n)
        print("ready", flush=True)
        try: time.sleep(60)
        except KeyboardInterrupt: print("ending", flush=True)
    """,
        db,
    ) as process:
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


@linux
def test_bc_012_many_loggers_leave_no_thread_descriptor_or_segment(db: Path) -> None:
    done = run(
        """
        def count(): return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        def use(path, n):
            pair = [AuditLogger(path), AuditLogger(path)] if n % 4 == 0 else [AuditLogger(path)]
            for i, audit in enumerate(pair): audit.log_event("cli", "tool", f"{n}-{i}")
            for audit in pair: audit.close()
        use(db, 0)
        before = count()
        for n in range(1, 100): use(db, n)
        for n in range(30): use(f"{db}.{n}", n)
        for n in range(500): AuditLogger(db).close()
        print(before == count(), before, count())
    """,
        db,
        audit=False,
        MXCP_AUDIT_ENGINE="package",
    )
    clean(done)
    assert done.stdout.startswith("True"), done.stdout
    assert_whole(judge(db), {f"{n}-0" for n in range(100)} | {f"{n}-1" for n in range(0, 100, 4)})
    assert not list(Path(f"{db}.journal").glob("*.jsonl"))


def test_bc_014_server_that_cannot_stop_and_is_killed_keeps_its_events(db: Path) -> None:
    with started(
        """
        import http.server, urllib.request
        class Endless(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200); self.end_headers()
                if self.path != "/stream":
                    log(self.path); return
                while True: self.wfile.write(b"data: x\\n\\n"); time.sleep(0.05)
            def log_message(self, *args): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless); server.daemon_threads = False
        def stop(*_): threading.Thread(target=lambda: (server.shutdown(), server.server_close())).start()
        signal.signal(signal.SIGTERM, stop)
        print(server.server_port, flush=True)
        server.serve_forever()
    """,
        db,
    ) as process:
        import urllib.request

        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with urllib.request.urlopen(f"{url}/stream"):
            for n in range(50):
                urllib.request.urlopen(f"{url}/{n}").close()
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert process.poll() is None
            process.kill()
    assert_whole(judge(db), {f"/{n}" for n in range(50)})


def test_bc_015_workers_killed_at_reload_lose_only_their_last_moments(db: Path) -> None:
    done = run(
        """
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
    """,
        db,
    )
    clean(done)
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
        assert int(number) > last[worker]  # nothing is missing but what came last


@pytest.mark.parametrize("flush", [True, False])
def test_bc_016_forked_task_that_leaves_by_os_exit(db: Path, flush: bool) -> None:
    clean(
        run(
            """
        log("parent")
        for child in range(30):
            pid = os.fork()
            if pid == 0:
                for n in range(5): log(f"{child}-{n}")
                if sys.argv[2] == "True": audit.flush(60)
                os._exit(0)
            os.waitpid(pid, 0)
    """,
            db,
            str(flush),
        )
    )
    verdict = judge(db)
    expected = {f"{child}-{n}" for child in range(30) for n in range(5)} | {"parent"}
    if flush:
        assert_whole(verdict, expected)
    else:  # the window applies: an event may be lost, never doubled or torn
        assert set(verdict.names) <= expected and verdict.doubled == verdict.torn == 0


def test_bc_017_frozen_after_flush_is_readable_and_survives_the_kill(db: Path, cli: Any) -> None:
    with started(
        """
        for n in range(20): log(n)
        audit.flush(60); print("done", flush=True); time.sleep(60)
    """,
        db,
    ) as process:
        assert process.stdout.readline() == "done\n"
        process.send_signal(signal.SIGSTOP)
        assert {event["name"] for event in shown(cli, db)} == {str(n) for n in range(20)}
    assert_whole(judge(db), {str(n) for n in range(20)})


# --- fork


@every_python
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "pool"])
def test_bc_018_multiprocessing_children_lose_nothing(db: Path, python: str, method: str) -> None:
    clean(
        run(
            """
        def task(child):
            for n in range(3): log(f"{child}-{n}")
        if __name__ == "__main__":
            method = sys.argv[2]
            context = multiprocessing.get_context("fork" if method == "pool" else method)
            if method == "pool":
                pool = context.Pool(4); pool.map(task, range(6)); pool.close(); pool.join()
            else:
                children = [context.Process(target=task, args=(child,)) for child in range(6)]
                for child in children: child.start()
                for child in children: child.join()
    """,
            db,
            method,
            python=python,
            options=("-W", "ignore::DeprecationWarning"),
        )
    )
    assert_whole(judge(db), {f"{child}-{n}" for child in range(6) for n in range(3)})


@pytest.mark.parametrize("way", ["sys.exit", "end", "multiprocessing"])
def test_bc_019_child_never_writes_what_the_parent_had_queued(db: Path, way: str) -> None:
    clean(
        run(
            """
        slow_writes(0.3)
        log("first"); time.sleep(0.1)
        for n in range(1000): log(n)
        if sys.argv[2] == "multiprocessing":
            children = [multiprocessing.get_context("fork").Process(target=int) for _ in range(4)]
            for child in children: child.start()
            for child in children: child.join()
        else:
            for _ in range(4):
                if os.fork() == 0:
                    if sys.argv[2] == "sys.exit": sys.exit(0)
                    break
            else:
                for _ in range(4): os.wait()
    """,
            db,
            way,
        )
    )
    assert_whole(judge(db), {str(n) for n in range(1000)} | {"first"})


def test_bc_020_children_that_drop_an_inherited_logger_double_nothing(db: Path) -> None:
    done = run(
        """
        stop = False; counts = [0, 0]
        def work(t):
            while not stop: log(f"{t}-{counts[t]}"); counts[t] += 1; time.sleep(0.0002)
        threads = [threading.Thread(target=work, args=(t,)) for t in (0, 1)]
        for t in threads: t.start()
        for child in range(60):
            pid = os.fork()
            if pid == 0:
                if child % 2: audit = AuditLogger(db)
                else: del audit; gc.collect()
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        stop = True
        for t in threads: t.join()
        print(*counts)
    """,
        db,
    )
    clean(done)
    zero, one = map(int, done.stdout.split())
    assert_whole(judge(db), {f"0-{n}" for n in range(zero)} | {f"1-{n}" for n in range(one)})


def test_bc_024_fork_while_a_large_event_is_encoded(db: Path) -> None:
    clean(
        run(
            """
        large = {str(n): n for n in range(20000)}; stop = False
        def work():
            n = 0
            while not stop: log(f"large-{n}", **large); n += 1; time.sleep(0.01)
        thread = threading.Thread(target=work); thread.start()
        for child in range(20):
            pid = os.fork()
            if pid == 0: log(f"small-{child}"); sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        stop = True; thread.join()
    """,
            db,
        )
    )
    verdict = judge(db)
    assert verdict.doubled == verdict.torn == 0
    assert not verdict.lost({f"small-{child}" for child in range(20)})


def test_bc_026_pool_of_forked_workers_mixes_no_lines(db: Path) -> None:
    clean(
        run(
            """
        def task(t):
            for n in range(10): log(f"{t}-{n}", text="x" * 10000)
        if __name__ == "__main__":
            log("parent")
            pool = multiprocessing.get_context("fork").Pool(16)
            pool.map(task, range(30), chunksize=1); pool.close(); pool.join()
    """,
            db,
        )
    )
    assert_whole(judge(db), {f"{t}-{n}" for t in range(30) for n in range(10)} | {"parent"})
    assert {
        len(text) for (text,) in table_rows(db, "SELECT input_json FROM logs WHERE name <> 'parent'")
    } == {10011}


def test_bc_027_parent_and_child_both_use_the_database(db: Path) -> None:
    clean(
        run(
            """
        for round in range(8):
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
    """,
            db,
        )
    )
    sides = {f"{r}-{side}-{n}" for r in range(8) for side in ("child", "parent") for n in range(50)}
    assert_whole(judge(db), sides | {f"{r}-first" for r in range(8)})


@pytest.mark.parametrize("way", ["exit", "collect"])
def test_bc_028_child_of_a_process_with_an_open_query_ends_without_a_signal(db: Path, way: str) -> None:
    done = run(
        """
        log("first"); audit.flush(60)
        store = mxcp_audit.Store(audit.config)
        with store.reading() as reading:
            rows = reading.rows(mxcp_audit.Filter()); next(rows)
            for child in range(20):
                pid = os.fork()
                if pid == 0:
                    log(child)
                    if sys.argv[2] == "collect": rows.close(); del reading, rows, store; gc.collect()
                    sys.exit()
                assert os.waitpid(pid, 0)[1] == 0
    """,
        db,
        way,
        MXCP_AUDIT_ENGINE="package",
    )
    # DuckDB believes in the child that the file is open, so that its events stay in the journal for now.
    assert done.returncode == 0, done.stderr
    assert_whole(judge(db), {str(n) for n in range(20)} | {"first"})


@linux
@every_python
def test_bc_029_import_and_construction_start_nothing(db: Path, python: str) -> None:
    clean(
        run(
            """
        assert len(os.listdir("/proc/self/task")) == 1
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
        child = multiprocessing.get_context("fork").Process(target=int); child.start(); child.join()
        assert len(os.listdir("/proc/self/task")) == 1 and not os.path.exists(db) and "duckdb" not in sys.modules
    """,
            db,
            python=python,
            options=("-W", "error"),
        )
    )


# --- threads


def test_bc_030_destructor_that_logs_never_deadlocks(db: Path) -> None:
    clean(
        run(
            """
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
    """,
            db,
        )
    )
    assert_whole(judge(db), {f"{d}{t}-{n}" for d in ("", "d") for t in range(4) for n in range(300)})


@pytest.mark.parametrize("durable", [False, True])
def test_bc_031_signal_handler_logs_while_main_logs(db: Path, durable: bool) -> None:
    done = run(
        """
        audit = AuditLogger(db, durable=sys.argv[2] == "True")
        import itertools
        handled = itertools.count()
        def handle(*_): log(f"handler-{next(handled)}")
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + 1.5; n = 0
        while time.monotonic() < end: log(f"main-{n}"); n += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        handled = next(handled)
        assert audit.counters.accepted == n + handled, (audit.counters, n, handled)
        def stop(*_): log("term"); raise SystemExit(0)
        signal.signal(signal.SIGTERM, stop)
        print(n, handled, flush=True)
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
    """,
        db,
        str(durable),
        audit=False,
    )
    clean(done)
    main_events, handled = map(int, done.stdout.split())
    assert handled > 10
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

    threads = [threading.Thread(target=log_all, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logger.flush(SAFETY_SECONDS)
    rows = table_rows(db, "SELECT name FROM logs")
    sound = {f"{t}-{n}-{w}" for t in range(3) for n in range(5) for w in ("before", "after")}
    assert len(rows) == 45 and sound <= {name for (name,) in rows}


@linux
@root
def test_bc_036_no_thread_allowed_writes_in_the_caller_and_says_why(tmp_path: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="mxcp"))
    home.chmod(0o777)
    try:
        done = run(
            """
            import asyncio, ctypes, duckdb, json, logging, resource, tempfile, traceback
            log("0"); audit.flush(60); audit.shutdown()  # everything is imported now
            os.chmod(db + ".journal", 0o777); os.chown(db + ".journal", 65534, 65534)
            for name in os.listdir(db + ".journal"): os.chown(os.path.join(db + ".journal", name), 65534, 65534)
            os.chown(db, 65534, 65534)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 1000)); os.setuid(65534)
            audit = AuditLogger(db)
            threads = len(os.listdir("/proc/self/task"))
            for n in range(1, 20): log(n)
            assert len(os.listdir("/proc/self/task")) == threads
            resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
            for n in range(20, 40): log(n)
            assert audit.flush(60), audit.counters
            assert len(os.listdir("/proc/self/task")) > threads
        """,
            home / "log.duckdb",
            MXCP_AUDIT_ENGINE="package",
            OPENBLAS_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("callers write themselves") == 1 and len(done.stderr.splitlines()) == 1
        assert_whole(judge(home / "log.duckdb"), {str(n) for n in range(40)})
    finally:
        shutil.rmtree(home)


def test_bc_041_diagnostics_that_come_back_as_events_stay_few(db: Path) -> None:
    done = run(
        """
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
    """,
        db,
    )
    assert done.returncode == 0
    assert 10 <= int(done.stdout) < 30


def test_bc_042_standard_error_that_nobody_reads_blocks_nothing(db: Path) -> None:
    with started(
        """
        open(db + ".journal", "w").close()
        for n in range(20000): log(n)
        audit.shutdown(timeout=0.2); print("through", flush=True)
    """,
        db,
    ) as process:
        assert process.stdout.readline() == "through\n"
        process.wait(SAFETY_SECONDS)
        assert len(process.stderr.read()) < 65536
