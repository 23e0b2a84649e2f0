"""Logger: exit, fork, durability and the loop of asyncio, as the process sees them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SAFETY_SECONDS, child_environment, held_database, run_process, table_rows, wait_until

import mxcp_audit
from mxcp_audit import AuditLogger, Encoder
from tools.judge import judge

PREAMBLE = "import os, signal, sys, threading, time\nfrom mxcp_audit import AuditLogger\n"


def run(body: str, db: Path) -> subprocess.CompletedProcess[str]:
    return run_process([sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(db)])


def log(audit: AuditLogger, name: str) -> None:
    audit.log_event("cli", "tool", name)


def test_log_event_disabled_touches_nothing(db: Path) -> None:
    with AuditLogger(db, enabled=False) as audit:
        log(audit, "x")
        assert audit.flush()
    assert not list(db.parent.iterdir())


def test_flush_then_every_event_is_in_the_database(db: Path, engine: str) -> None:
    with AuditLogger(db) as audit:
        for n in range(10):
            log(audit, str(n))
        assert audit.flush(SAFETY_SECONDS)
        assert audit.counters.ingested == 10
        assert len(table_rows(db)) == 10


def test_shutdown_gives_threads_and_descriptors_back(db: Path) -> None:
    audit = AuditLogger(db)
    log(audit, "x")
    assert audit.shutdown() and audit.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mxcp_audit")]


def test_log_event_after_shutdown_is_in_the_journal_when_it_returns(db: Path) -> None:
    audit = AuditLogger(db)
    audit.shutdown()
    log(audit, "late")
    assert set(judge(db).names) == {"late"}


def test_shutdown_while_the_database_is_held_leaves_all_in_the_journal(db: Path, caplog: Any) -> None:
    audit = AuditLogger(db)
    log(audit, "first")
    assert audit.flush(SAFETY_SECONDS)
    with held_database(db):
        log(audit, "second")
        assert audit.shutdown(timeout=0.5)
        assert "the journal keeps 1 event" in caplog.text and "in use by" in caplog.text
    assert table_rows(db, "SELECT count(*) FROM logs") == [(1,)]
    assert set(judge(db).names) == {"first", "second"}


@pytest.mark.parametrize("way", ["log_event", "record", "async"])
def test_durable_event_survives_the_kill_that_follows_at_once(db: Path, way: str) -> None:
    body = f"""
        import asyncio
        audit = AuditLogger(sys.argv[1], durable=True)
        async def main():
            async with audit.record("tool", "x"): pass
        if {way!r} == "log_event": audit.log_event("cli", "tool", "x")
        elif {way!r} == "record":
            with audit.record("tool", "x"): pass
        else: asyncio.run(main())
        os.kill(os.getpid(), signal.SIGKILL)
        """
    done = run(body, db)
    assert done.returncode == -9 and set(judge(db).names) == {"x"}


def test_durable_events_share_their_fsync(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = AuditLogger(db, durable=True)
    log(audit, "first")
    syncs, true_sync, gate = [0], os.fsync, threading.Event()

    def gated_sync(fd: int) -> None:
        syncs[0] += 1
        gate.wait(SAFETY_SECONDS)
        true_sync(fd)

    monkeypatch.setattr(os, "fsync", gated_sync)
    threads = [threading.Thread(target=log, args=(audit, str(n))) for n in range(40)]
    for thread in threads:
        thread.start()
    wait_until(lambda: audit.counters.accepted == 41)
    gate.set()
    for thread in threads:
        thread.join()
    assert syncs[0] <= 3  # that of the first, and of all that came meanwhile
    monkeypatch.undo()
    audit.shutdown()


def test_durable_in_async_code_does_not_block_the_loop(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = AuditLogger(db, durable=True, flush_interval=60)
    log(audit, "first")
    gate, true_sync = threading.Event(), os.fsync

    def gated_sync(fd: int) -> None:
        gate.wait(SAFETY_SECONDS)
        true_sync(fd)

    monkeypatch.setattr(os, "fsync", gated_sync)

    async def call(n: int) -> None:
        async with audit.record("tool", str(n)):
            pass

    async def everything() -> None:
        calls = [asyncio.create_task(call(n)) for n in range(100)]
        for _ in range(20):
            await asyncio.sleep(0.001)  # the loop goes on
        assert not any(task.done() for task in calls)
        calls[0].cancel()  # one that gives up waiting disturbs nobody
        gate.set()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(everything())
    monkeypatch.undo()
    audit.shutdown()
    assert len(judge(db).names) == 101


def test_fork_while_another_thread_is_inside_of_a_logger_that_never_started(db: Path) -> None:
    """Its lock is held at the fork by a thread that does not exist in the child."""
    body = """
        audit = AuditLogger(sys.argv[1])
        held = threading.Event()
        def hold():
            with audit._writer._lock: held.set(); time.sleep(1)
        threading.Thread(target=hold).start(); held.wait()
        pid = os.fork()
        if pid == 0: audit.log_event("cli", "tool", "child"); audit.flush(60); os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        audit.log_event("cli", "tool", "parent")
        """
    done = run(body, db)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(judge(db).names) == {"child", "parent"}


def test_counters_of_a_child_begin_at_zero(db: Path) -> None:
    body = """
        audit = AuditLogger(sys.argv[1])
        for n in range(5): audit.log_event("cli", "tool", str(n))
        audit.flush(60)
        pid = os.fork()
        if pid == 0:
            audit.log_event("cli", "tool", "child"); audit.flush(60)
            os._exit(audit.counters[:3] != (1, 1, 1))
        assert os.waitpid(pid, 0)[1] == 0 and audit.counters.accepted == 5
        """
    done = run(body, db)
    assert (done.returncode, done.stderr) == (0, "")


def test_logger_that_nobody_holds_is_still_drained_at_exit(db: Path) -> None:
    body = """
        def work():
            for n in range(6): AuditLogger(sys.argv[1]).log_event("cli", "tool", str(n))
        work()
        """
    done = run(body, db)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(judge(db).names) == 6 and judge(db).doubled == 0


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="3.12.1 crashes at its end, all being recorded")
def test_subinterpreter_events_are_recorded(db: Path) -> None:
    inner = (
        f"from mxcp_audit import AuditLogger; a = AuditLogger({str(db)!r});"
        "a.log_event('cli', 'tool', 'x'); assert a.wait_written(); told = a.counters; a.close();"
        "assert told.written == 1 and 'could not' not in str(told), told"
    )
    body = f"""
        try: import _interpreters as interpreters
        except ImportError: import _xxsubinterpreters as interpreters
        problem = interpreters.run_string(interpreters.create(), {inner!r})
        assert problem is None, problem
        """
    done = run(body, db)
    assert done.returncode == 0, done.stderr
    assert set(judge(db).names) == {"x"}


def test_close_is_shutdown_and_the_context_manager_calls_it(db: Path) -> None:
    assert AuditLogger.close is AuditLogger.shutdown
    with AuditLogger(db) as audit:
        log(audit, "x")
    assert judge(db).in_table == 1


def test_log_event_reports_no_recorded_content(db: Path, caplog: Any) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("hunter2")

    audit = AuditLogger(db)
    audit.log_event("cli", "tool", "x", {"a": Broken(), "password": "hunter2"})
    audit.shutdown()
    assert "hunter2" not in caplog.text


def test_logger_that_fails_at_exit_keeps_no_other_from_writing(db: Path) -> None:
    body = """
        audits = [AuditLogger(sys.argv[1] + name, flush_interval=3600) for name in "abc"]
        def fail(*_): raise RuntimeError("what nobody foresaw")
        for audit in audits:
            audit._ingester._tell_head = fail
            audit.log_event("cli", "tool", "t")
        """
    done = run(body, db)
    assert done.returncode == 0
    assert [len(table_rows(Path(f"{db}{name}"))) for name in "abc"] == [1, 1, 1]
    assert done.stderr.count("what nobody foresaw") == 3


def test_encoder_that_fails_tells_no_content(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with AuditLogger(db) as audit:

        def fail(*_: Any) -> str:
            raise ValueError("hunter2")

        with monkeypatch.context() as patched:
            patched.setattr(audit._encoder, "input_json", fail)
            log(audit, "x")
            with audit.record("tool", "x"):
                pass
        assert audit.counters.errors == 2 and "ValueError" in str(audit.counters.last_error)
    assert "hunter2" not in caplog.text and "hunter2" not in str(audit.counters)
    assert len(table_rows(db)) == 2


def test_child_of_multiprocessing_registers_its_exit_once(db: Path) -> None:
    body = """
        import multiprocessing, multiprocessing.util
        def child(db):
            audit = AuditLogger(db)
            for _ in range(3):
                assert audit._activate()
            print(len(multiprocessing.util._finalizer_registry))
        if __name__ == "__main__":
            process = multiprocessing.get_context("fork").Process(target=child, args=(sys.argv[1],))
            process.start(); process.join()
        """
    done = run(body, db)
    assert done.stdout.split() == ["1"], done.stderr


def test_event_that_cannot_be_encoded_is_recorded_without_content(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Nothing is known to do that. If something does, the log must show that there was an event."""
    true_line, true_input, faults = Encoder.line, Encoder.input_json, {"line": 0, "input": 0}

    def line(self: Encoder, *args: Any, **fields: Any) -> bytes:
        faults["line"] -= 1
        if faults["line"] >= 0:
            raise ValueError("unforeseen")
        return true_line(self, *args, **fields)

    def input_json(self: Encoder, *args: Any) -> str:
        if faults["input"]:
            raise ValueError("unforeseen")
        return true_input(self, *args)

    monkeypatch.setattr(Encoder, "line", line)
    monkeypatch.setattr(Encoder, "input_json", input_json)
    audit = AuditLogger(db)
    faults["line"] = 1
    log(audit, "first")
    faults["line"] = 1
    with audit.record("tool", "second"):
        pass
    faults["line"] = 2
    log(audit, "nowhere")
    faults["input"] = 1
    with audit.record("tool", "third", {"password": "hunter2"}):
        pass
    faults["input"] = 0
    audit.shutdown()
    rows = table_rows(db, "SELECT name, status, input_json FROM logs ORDER BY timestamp, segment, seq")
    assert [row[:2] for row in rows] == [("", "error"), ("", "error"), ("third", "success")]
    assert {row[2] for row in rows} == {json.dumps(mxcp_audit._UNENCODABLE)}
    assert audit.counters.errors == 5 and "recorded without content" in caplog.text


def test_durable_in_a_loop_that_is_not_asyncios_waits_all_the_same(db: Path) -> None:
    audit = AuditLogger(db, durable=True)

    async def work() -> None:
        async with audit.record("tool", "x"):
            pass

    with pytest.raises(StopIteration):
        work().send(None)  # as trio's loop does it
    assert audit.counters.written == 1
    audit.shutdown()


def test_first_event_of_a_logger_when_exit_has_passed_is_in_the_journal(db: Path) -> None:
    code = (
        "import atexit, sys\n"
        "def late():\n"
        "    from mxcp_audit import AuditLogger\n"
        "    AuditLogger(sys.argv[1]).log_event('cli', 'tool', 'late')\n"
        "atexit.register(late)\n"  # before ours, so it runs after it
        "import mxcp_audit\n"
    )
    command = [sys.executable, "-c", code, str(db)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(judge(db).names) == ["late"]


def test_events_that_come_while_the_logger_is_shut_down_share_a_segment(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditLogger(db, flush_interval=3600)
    audit.log_event("cli", "tool", "before")
    true_seal, seals = audit._writer._appender.seal, []

    def seal() -> bool:
        seals.append(true_seal())
        if len(seals) < 5:
            audit.log_event("cli", "tool", "meanwhile")
        return seals[-1]

    monkeypatch.setattr(audit._writer._appender, "seal", seal)
    audit.shutdown()
    audit.log_event("cli", "tool", "after")
    assert seals == [True] and len(list(Path(f"{db}.journal").glob("*.jsonl"))) == 1
    assert sorted(judge(db).names) == ["after", "before", "meanwhile"]


def test_daemon_thread_that_logs_on_does_not_hold_up_the_exit(db: Path) -> None:
    with held_database(db):  # so that shutdown takes the time that it has
        begun = time.monotonic()
        body = """
            audit = AuditLogger(sys.argv[1], flush_interval=60)
            true_shutdown = audit.shutdown
            audit.shutdown = lambda: true_shutdown(1.5)
            def work():
                while True: audit.log_event("cli", "tool", "x"); time.sleep(0.01)
            threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)
            """
        done = run(  # with an interval so long that no attempt comes first, which would make one segment more
            body, db
        )
        assert done.returncode == 0 and "in use by" in done.stderr, done.stderr
        assert time.monotonic() - begun < SAFETY_SECONDS / 4
    assert len(list(Path(f"{db}.journal").glob("*.jsonl"))) <= 2


def test_reload_of_the_module_keeps_the_older_loggers_events(db: Path) -> None:
    body = """
        import importlib, mxcp_audit
        audit = AuditLogger(sys.argv[1]); audit.log_event("cli", "tool", "old")
        importlib.reload(mxcp_audit)
        mxcp_audit.AuditLogger(sys.argv[1]).log_event("cli", "tool", "new")
        audit.log_event("cli", "tool", "later")
        """
    done = run(body, db)
    assert (done.returncode, done.stderr) == (0, "") and judge(db).in_table == 3


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda audit: pickle.loads(pickle.dumps(audit))])
def test_logger_travels_as_its_configuration(db: Path, copy_of: Any) -> None:
    with AuditLogger(db, redact=["colour"], attach={}) as audit:
        log(audit, "first")
        with copy_of(audit) as other:
            other.log_event("cli", "tool", "second", {"colour": "red"})
            assert other.config == audit.config and other.counters.accepted == 1
    assert set(judge(db).names) == {"first", "second"} and "red" not in str(table_rows(db))


def test_faults_are_logged_although_dict_config_disables_loggers(db: Path) -> None:
    body = """
        import logging.config
        logging.config.dictConfig({"version": 1, "handlers": {"h": {"class": "logging.StreamHandler"}},
                                   "root": {"handlers": ["h"]}})
        os.mkdir(sys.argv[1])
        AuditLogger(sys.argv[1]).log_event("cli", "tool", "x")
        """
    done = run(body, db)
    assert done.returncode == 0 and done.stderr


def test_place_that_cannot_be_used_is_said_at_the_first_event(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = db.parent / "folder"
    folder.write_text("in the way")
    audit = AuditLogger(folder / "log.duckdb")
    log(audit, "x")
    wait_until(lambda: str(folder) in caplog.text and "is tried again" in caplog.text)
    folder.unlink()
    assert audit.shutdown() and set(judge(folder / "log.duckdb").names) == {"x"}


def test_database_that_is_held_for_long_leaves_few_segments_and_descriptors(db: Path) -> None:
    with held_database(db):
        body = """
            import mxcp_audit, resource
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            mxcp_audit._CHILD_WAIT_SECONDS = mxcp_audit._LOCKED_PAUSE_SECONDS = 0.01
            mxcp_audit._LONGEST_PAUSE_SECONDS = 0.02
            audit = AuditLogger(sys.argv[1], flush_interval=0.01)
            for n in range(100):
                audit.log_event("cli", "tool", str(n)); time.sleep(0.01); open(os.devnull).close()
                if n % 30 == 0: audit.flush()
            audit.wait_written(60); audit.shutdown(0.1)
            """
        done = run(body, db)
        assert done.returncode == 0 and "in use by" in done.stderr, done.stderr
        assert len(list(Path(f"{db}.journal").glob("*.jsonl"))) <= 3
    assert len(judge(db).names) == 100


@pytest.mark.parametrize("held", [False, True])
def test_workers_that_end_at_once_leave_every_event_in_the_table(db: Path, engine: str, held: bool) -> None:
    worker = """
        audit = AuditLogger(sys.argv[1])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        for n in range(50): audit.log_event("cli", "tool", f"{os.getpid()}-{n}")
        audit.wait_written(); print("ready", flush=True); time.sleep(600)
    """
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(worker), str(db)]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
            )
            for _ in range(4)
        ]
        for process in workers:
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with held_database(db) if held else contextlib.nullcontext():
            for process in workers:
                process.terminate()
            time.sleep(1.5 if held else 0)
        for process in workers:
            process.wait(SAFETY_SECONDS)
    verdict = judge(db)
    assert (verdict.in_table, len(verdict.names), verdict.doubled) == (200, 200, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc")
def test_fx_097_where_memory_ends_the_child_goes_before_the_server(db: Path) -> None:
    with held_database(db):
        body = """
            audit = AuditLogger(sys.argv[1], flush_interval=0.01)
            audit.log_event("cli", "tool", "x")
            score, until = "", time.monotonic() + 20
            while score != "1000" and time.monotonic() < until:
                time.sleep(0.01)
                with contextlib.suppress(AttributeError, OSError):  # it has not begun, or has ended
                    score = open(f"/proc/{audit._ingester._child.pid}/oom_score_adj").read().strip()
            print(score); audit.shutdown(0.5)
            """
        assert run("            import contextlib" + body, db).stdout == "1000\n"


def test_child_that_ingests_ends_with_its_process(db: Path) -> None:
    with held_database(db):
        body = """
            audit = AuditLogger(sys.argv[1], flush_interval=0.01)
            audit.log_event("cli", "tool", "x")
            while audit._ingester._child is None: time.sleep(0.01)
            print(audit._ingester._child.pid); audit.shutdown(0.5)
            """
        done = run(body, db)
        with pytest.raises(ProcessLookupError):
            os.kill(int(done.stdout), 0)
