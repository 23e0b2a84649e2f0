"""Writer: nothing that is put is lost or written twice, whoever interrupts, fails or forks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SAFETY_SECONDS, in_threads, wait_until

import mxcp_audit
from mxcp_audit import Appender, Diagnostics, Ingester, Journal, Writer


class Attempts(Ingester):
    """An ingester whose attempts are answered by the test, without a child."""

    answers: Any = ()
    begun = 0

    def _start(self) -> None:
        self.begun += 1
        answer = next(self.answers, {"done": True})
        if answer.get("done"):
            for path in self._appender.sealed:
                os.rename(path, path + ".ingested")
        self._answered(answer)


class Bench:
    """A writer with what it needs, and what is in its journal."""

    def __init__(
        self, folder: Path, *answers: Any, interval: float = 60.0, drop_when_full: bool = False
    ) -> None:
        self.journal = Journal(folder / "journal")
        self.told = Diagnostics()
        self.appender = Appender(self.journal, durable=False, diagnostics=self.told)
        self.ingester = Attempts(self.appender, {"retention": None} if answers else None, interval=interval)
        self.ingester.answers = iter(answers)
        self.writer = Writer(
            self.appender, self.ingester, drop_when_full=drop_when_full, on_start=lambda: True
        )

    def lines(self) -> list[bytes]:
        return [
            line.split(b",")[0]
            for path in self.journal.segments()
            for line in Path(path).read_bytes().splitlines()
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def fail_first(patch: pytest.MonkeyPatch, owner: Any, name: str, times: int, error: Exception) -> None:
    """Let a function raise at its first calls."""
    true, left = getattr(owner, name), [times]

    def failing(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return true(*args, **options)

    patch.setattr(owner, name, failing)


@contextlib.contextmanager
def handling(emit: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """Have a handler of our logger."""
    handler = logging.Handler()
    handler.emit = emit  # type: ignore[method-assign,assignment]
    logging.getLogger("mxcp_audit").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("mxcp_audit").removeHandler(handler)


FULL = OSError(errno.ENOSPC, "full")


def line(n: int) -> bytes:
    return b'{"n":%d' % n


def test_put_many_threads_every_line_once_in_order(bench: Bench) -> None:
    def work(thread: int) -> None:
        for n in range(2000):
            bench.writer.put(line(thread * 10**6 + n))

    in_threads(work, range(4))
    assert bench.writer.close(SAFETY_SECONDS) == 0
    found = bench.lines()
    for thread in range(4):
        mine = [entry for entry in found if int(entry[5:]) // 10**6 == thread]
        assert mine == [line(thread * 10**6 + n) for n in range(2000)]
    assert bench.writer.accepted == bench.writer.written == 8000


@pytest.mark.parametrize("wait", ["wait_written", "flush"])
def test_waiting_ends_the_gathering(bench: Bench, monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    monkeypatch.setattr(mxcp_audit, "_GATHER_SECONDS", 3600.0)
    for n in range(200):  # whether the writer gathers already or is about to
        ticket = bench.writer.put(line(n))
        if n % 2:
            time.sleep(0.001)
        if wait == "flush":
            assert bench.writer.flush(SAFETY_SECONDS)
        else:
            assert bench.writer.wait_written(ticket, SAFETY_SECONDS)
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(n) for n in range(200)]


def test_fx_022_who_waits_for_an_ingest_and_the_writer_do_not_wake_each_other_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, {"done": True})
    rounds, work = itertools.count(), bench.writer._work
    monkeypatch.setattr(bench.writer, "_work", lambda: (next(rounds), work())[1])
    monkeypatch.setattr(bench.ingester, "_look", lambda: None)
    monkeypatch.setattr(bench.ingester, "_start", lambda: setattr(bench.ingester, "_child", object()))
    bench.writer.put(line(1))
    assert bench.writer.flush(0.5)
    assert next(rounds) < 50  # a look at the child each 0.1 s; it was thousands, and the child starved
    bench.writer.close(SAFETY_SECONDS)
    bench.ingester._child = None


def test_put_interrupted_on_its_way_to_wake_leaves_a_writer_that_the_next_wakes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.writer.put(line(1))
    assert bench.writer.flush(SAFETY_SECONDS)
    wait_until(lambda: bench.writer._asleep)
    with monkeypatch.context() as patched:

        def interrupted() -> None:
            raise KeyboardInterrupt

        patched.setattr(bench.writer, "_release_wake", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.writer.put(line(2))
    ticket = bench.writer.put(line(3))
    bench.writer.wait_written(ticket)
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(1), line(2), line(3)]


def test_write_interrupted_after_the_segment_took_it_is_not_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.writer, "_start_thread", lambda: False)  # the caller writes
    true_append = mxcp_audit.Segment.append

    def append(self: Any, *args: Any, **options: Any) -> None:
        true_append(self, *args, **options)
        monkeypatch.setattr(mxcp_audit.Segment, "append", true_append)
        raise KeyboardInterrupt

    monkeypatch.setattr(mxcp_audit.Segment, "append", append)
    with pytest.raises(KeyboardInterrupt):
        bench.writer.put(line(1))
    bench.writer.put(line(2))
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(1), line(2)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_write_that_fails_is_repeated_until_it_succeeds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    fail_first(monkeypatch, os, "write", 3, OSError(code, os.strerror(code)))
    for n in range(10):
        bench.writer.put(line(n))
    assert bench.writer.flush(SAFETY_SECONDS)
    assert bench.lines() == [line(n) for n in range(10)]
    bench.writer.close(SAFETY_SECONDS)
    assert bench.told.errors >= 3 and len(caplog.records) == 1  # counted each time, told once


def test_full_queue_without_a_writer_thread_goes_on_once_the_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 50)
    monkeypatch.setattr(bench.writer, "_start_thread", lambda: False)
    Path(bench.journal.directory).write_text("in the way")
    threading.Timer(0.3, lambda: os.unlink(bench.journal.directory)).start()
    for n in range(30):
        bench.writer.put(line(n))  # waits, and must not wait for ever
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(n) for n in range(30)]


def test_drop_when_full_counts_and_puts_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, drop_when_full=True)
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 50)
    Path(bench.journal.directory).write_text("in the way")
    tickets = [bench.writer.put(line(n)) for n in range(30)]
    assert tickets.count(0) == bench.told.dropped > 0
    os.unlink(bench.journal.directory)
    assert bench.writer.close(SAFETY_SECONDS) == 0
    (loss,) = bench.journal.losses().values()
    assert loss.events == tickets.count(0) and loss.first <= loss.last and "full" in loss.reason
    assert len(bench.lines()) + loss.events == 30


def test_segment_that_was_deleted_is_written_again_once(bench: Bench) -> None:
    bench.writer.wait_written(bench.writer.put(line(1)))
    os.unlink(bench.journal.segments()[0])
    bench.writer.wait_written(bench.writer.put(line(2)))
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(1), line(2)]


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_fx_080_what_was_cut_off_a_segment_is_a_loss(bench: Bench, kept: int) -> None:
    for n in range(3):
        bench.writer.wait_written(bench.writer.put(line(n)))
    (path,) = bench.journal.segments()
    size = len(Path(path).read_bytes()) // 3
    os.truncate(path, min(kept, 1) * size + kept // 2)  # nothing, a line, and a line and a half
    bench.writer.wait_written(bench.writer.put(line(3)))
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert [each for each in bench.lines() if each in (line(0), line(3))] == [line(0), line(3)][kept == 0 :]
    (loss,) = bench.journal.losses().values()
    assert loss.events == (2 if kept else 3) and "cut them off" in loss.reason


def test_close_in_a_signal_handler_within_put_ends_the_writer(bench: Bench) -> None:
    bench.writer.put(line(1))
    with bench.writer._lock:  # as `put` holds it
        bench.writer.put(line(2))
        assert bench.writer.close(2.0) == 0
    assert bench.lines() == [line(1), line(2)]


def test_idle_writer_never_wakes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.writer.put(line(1))
    assert bench.writer.flush(SAFETY_SECONDS)
    wait_until(lambda: bench.writer._asleep)
    rounds: list[int] = []
    true_work = bench.writer._work
    monkeypatch.setattr(bench.writer, "_work", lambda: rounds.append(1) or true_work())
    time.sleep(0.3)
    assert not rounds
    bench.writer.close(SAFETY_SECONDS)


def test_late_put_is_written_at_once_and_close_twice_is_harmless(bench: Bench) -> None:
    bench.writer.put(line(1))
    assert bench.writer.close(SAFETY_SECONDS) == bench.writer.close(SAFETY_SECONDS) == 0
    bench.writer.put(line(2))
    assert bench.lines() == [line(1), line(2)] and bench.writer._thread is None


def test_close_in_limited_time_says_what_is_left(bench: Bench) -> None:
    Path(bench.journal.directory).write_text("in the way")
    for n in range(5):
        bench.writer.put(line(n))
    assert bench.writer.close(0.2) == 5


def test_call_when_is_called_once_from_any_state(bench: Bench) -> None:
    called: list[int] = []
    ticket = bench.writer.put(line(1))
    bench.writer.call_when(lambda: bench.writer.written >= ticket, lambda: called.append(1))
    bench.writer.wait_written(ticket)
    bench.writer.call_when(lambda: bench.writer.written >= ticket, lambda: called.append(2))
    bench.writer.call_when(lambda: False, lambda: called.append(3))  # never written
    bench.writer.close(SAFETY_SECONDS)
    assert called == [1, 2, 3]  # closing leaves nobody waiting


def test_call_when_of_a_closed_event_loop_stops_nobody(bench: Bench) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    bench.writer.call_when(lambda: bench.writer.written >= 1, lambda: loop.call_soon_threadsafe(print))
    bench.writer.wait_written(bench.writer.put(line(1)))
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_diagnostics_tell_each_kind_once_a_minute_and_count_all(caplog: pytest.LogCaptureFixture) -> None:
    told = Diagnostics()
    for _ in range(5):
        told.report("one", "first", error=ValueError("cause"))
        told.report("two", "second")
    assert told.errors == 10 and told.last_error == "second"
    assert [record.message for record in caplog.records] == ["mxcp_audit: first: cause", "mxcp_audit: second"]


def test_diagnostics_handler_that_raises_reaches_nobody() -> None:
    def emit(record: logging.LogRecord) -> None:
        raise RuntimeError("broken")

    with handling(emit):
        Diagnostics().report("kind", "message")


def test_diagnostics_are_told_with_no_lock_held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler has a lock of its own, under which another thread may be logging an event."""
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 50)
    bench.writer._drop_when_full = True
    others: list[bool] = []

    def look(record: logging.LogRecord) -> None:
        others.append(bench.writer._lock.acquire(timeout=5))
        if others[-1]:
            bench.writer._lock.release()

    with handling(lambda record: in_threads(look, [record])):
        Path(bench.journal.directory).write_text("in the way")
        for n in range(20):
            bench.writer.put(line(n))
        bench.writer.close(0.1)
    assert others and all(others)


def test_write_interrupted_at_any_moment_loses_and_repeats_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl+C may come at each call, in the thread of a caller who writes: each is tried in turn."""
    monkeypatch.setattr(mxcp_audit, "SEGMENT_BYTES", 1)  # each write seals
    for moment in itertools.count(1):
        bench = Bench(tmp_path / str(moment))
        bench.writer._start_thread = lambda: False  # type: ignore[method-assign]
        passed = 0

        def interrupt(frame: Any, event: str, argument: Any, moment: int = moment) -> None:
            nonlocal passed
            if event in ("call", "c_return") and frame.f_globals is vars(mxcp_audit):
                passed += 1
                if passed == moment:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        queued = 0
        for n in range(3):
            sys.setprofile(interrupt if n == 1 else None)
            try:
                bench.writer.put(line(n))
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
            queued += bench.writer.accepted > queued  # it may have come before the line was taken
        assert bench.writer.close(SAFETY_SECONDS) == 0, moment
        found = bench.lines()
        assert len(found) == queued, moment
        assert found == sorted({line(0), line(2), *found}), moment
        if passed < moment:
            break
    assert moment > 50  # there were such moments


def test_wait_written_without_a_thread_goes_on_trying(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_first(monkeypatch, mxcp_audit.Segment, "append", 3, FULL)
    monkeypatch.setattr(bench.writer, "_start_thread", lambda: False)
    ticket = bench.writer.put(line(1))
    assert bench.writer.wait_written(ticket, SAFETY_SECONDS)
    assert bench.lines() == [line(1)]


def test_wait_written_after_the_thread_died_starts_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_first(monkeypatch, mxcp_audit.Segment, "append", 1, ValueError("what nobody foresaw"))
    ticket = bench.writer.put(line(1))
    assert bench.writer.wait_written(ticket, SAFETY_SECONDS)
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(1)]


def test_fork_in_two_threads_at_once_leaves_the_writer_free(bench: Bench) -> None:
    bench.writer.before_fork()
    other = threading.Thread(target=lambda: (bench.writer.before_fork(), bench.writer.after_fork_in_parent()))
    other.start()  # waits a second in vain
    other.join()
    bench.writer.after_fork_in_parent()
    bench.writer.put(line(1))
    assert bench.writer.flush(SAFETY_SECONDS)
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(1)]


def test_full_queue_that_nobody_woke_the_writer_for_is_emptied(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 5)
    assert bench.writer.wait_written(bench.writer.put(line(0)), SAFETY_SECONDS)
    wait_until(lambda: bench.writer._asleep)
    with monkeypatch.context() as patched:
        patched.setattr(bench.writer, "_rouse", lambda: None)  # as after Ctrl+C
        bench.writer.put(line(1))
    caller = threading.Thread(target=lambda: bench.writer.put(line(2)), daemon=True)
    caller.start()
    caller.join(SAFETY_SECONDS)
    assert not caller.is_alive()
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(n) for n in range(3)]


@pytest.mark.parametrize("where", ["_rouse", "_work"])
def test_put_that_fails_after_the_line_was_queued_returns_its_ticket(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(bench.writer, "_start_thread", lambda: False)
    with monkeypatch.context() as patched:

        def fail() -> None:
            raise RecursionError if where == "_rouse" else ValueError("what nobody foresaw")

        patched.setattr(bench.writer, where, fail)
        assert bench.writer.put(line(1)) == 1
    assert bench.writer.put(line(2)) == 2
    assert bench.lines() == [line(1), line(2)]
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_thread_whose_start_is_interrupted_is_started_by_the_next_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        bench.writer.put(line(1))
    monkeypatch.undo()
    bench.writer.put(line(2))
    assert bench.writer.flush(SAFETY_SECONDS) and bench.lines() == [line(1), line(2)]
    bench.writer.close(SAFETY_SECONDS)


def test_no_thread_to_be_had_callers_write_themselves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    bench.writer.put(line(1))
    assert bench.lines() == [line(1)] and "callers write themselves" in caplog.text
    assert bench.writer.flush(SAFETY_SECONDS)
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_event_logged_within_the_callers_own_write_is_written_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler or a destructor does it."""
    monkeypatch.setattr(bench.writer, "_start_thread", lambda: False)
    true, within = os.write, [line(2)]

    def write(fd: int, data: Any) -> int:
        while within:
            bench.writer.put(within.pop())
        return true(fd, data)

    monkeypatch.setattr(os, "write", write)
    bench.writer.put(line(1))
    assert bench.lines() == [line(1), line(2)]
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_handler_in_the_writing_thread_never_waits_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr(mxcp_audit, "QUEUE_BYTES", 1)
    said: list[bool] = []

    def emit(record: logging.LogRecord) -> None:
        if not said and threading.current_thread() is not threading.main_thread():
            ticket = bench.writer.put(line(2))  # though the queue is full
            said.extend([bench.writer.wait_written(ticket), bench.writer.flush(SAFETY_SECONDS)])
            os.unlink(bench.journal.directory)

    with handling(emit):
        Path(bench.journal.directory).write_text("in the way")
        bench.writer.put(line(1))
        wait_until(lambda: len(said) == 2)
        assert bench.writer.close(SAFETY_SECONDS) == 0
    assert said == [True, False] and bench.lines() == [line(1), line(2)]


def test_writer_thread_that_dies_is_replaced_by_the_next_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die() -> bool:
        raise SystemExit

    monkeypatch.setattr(bench.writer, "_work", die)
    bench.writer.put(line(1))
    wait_until(lambda: "the writer thread ended" in caplog.text)
    monkeypatch.undo()
    bench.writer.put(line(2))
    assert bench.writer.flush(SAFETY_SECONDS) and bench.lines() == [line(1), line(2)]
    bench.writer.close(SAFETY_SECONDS)


def test_directory_that_is_taken_away_while_nobody_writes_is_made_and_what_waited_in_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside an ingest that lasts, and while a caller waits for its turn, no line comes to show it."""
    bench = Bench(tmp_path, {}, interval=0.01)
    sealed = bench.writer.put(line(1))
    assert bench.writer.wait_written(sealed, SAFETY_SECONDS)
    wait_until(lambda: bench.appender.sealed)
    monkeypatch.setattr(bench.ingester, "_look", lambda: None)
    bench.ingester._child = object()  # type: ignore[assignment]
    assert bench.writer.wait_written(bench.writer.put(line(2)), SAFETY_SECONDS)
    Path(bench.journal.directory).rename(tmp_path / "away")
    wait_until(lambda: bench.lines() == [line(2)] and not bench.appender.sealed)
    wait_until(lambda: "1 event went away with" in caplog.text)
    bench.ingester._child = None
    assert bench.writer.close(SAFETY_SECONDS) == 0
    assert bench.lines() == [line(2)]


def test_segment_that_cannot_be_sealed_is_sealed_once_it_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.writer.wait_written(bench.writer.put(line(1)))
    true_write, true_truncate, failures = os.write, os.ftruncate, [3]

    def write(fd: int, data: Any) -> int:
        if failures[0] > 0:
            true_write(fd, b"half a ")
            raise OSError(errno.ENOSPC, "full")
        return true_write(fd, data)

    def ftruncate(fd: int, size: int) -> None:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.EIO, "broken")
        true_truncate(fd, size)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "ftruncate", ftruncate)
    bench.writer.put(line(2))
    assert bench.writer.flush(SAFETY_SECONDS)
    assert bench.lines() == [line(1), line(2)]
    bench.writer.close(SAFETY_SECONDS)
    assert "could not be sealed" in caplog.text


def test_segment_that_was_deleted_before_its_seal_is_written_again(bench: Bench) -> None:
    bench.writer.wait_written(bench.writer.put(line(1)))
    os.unlink(bench.journal.segments()[0])
    assert bench.writer.close(SAFETY_SECONDS) == 0 and bench.lines() == [line(1)]


def test_deleted_segment_whose_copy_fails_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.writer.wait_written(bench.writer.put(line(1)))
    os.unlink(bench.journal.segments()[0])
    fail_first(monkeypatch, os, "write", 2, FULL)
    bench.writer.put(line(2))
    assert bench.writer.flush(SAFETY_SECONDS) and bench.lines() == [line(1), line(2)]
    assert len(bench.journal.segments()) == 1  # what failed left nothing
    bench.writer.close(SAFETY_SECONDS)


def test_segment_that_is_large_enough_is_sealed_without_being_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "SEGMENT_BYTES", 1)
    for n in range(3):
        bench.writer.wait_written(bench.writer.put(line(n)))
    assert len(bench.journal.segments()) == len(bench.appender.sealed) == 3 and bench.lines() == [
        line(n) for n in range(3)
    ]
    bench.writer.close(SAFETY_SECONDS)


# --- the ingest


def file_count(bench: Bench) -> int:
    return len(bench.journal.segments())


def test_ingest_comes_an_interval_after_the_first_event_and_then_by_the_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"done": True, "cpu": 0.3}, interval=0.05)
    for n in range(3):
        bench.writer.wait_written(bench.writer.put(line(n)))
    wait_until(lambda: bench.ingester.begun)
    bench.writer.wait_written(bench.writer.put(line(3)))
    due = bench.ingester.due_in()
    assert due is not None and 25 < due <= 30  # 1 % of a core
    assert bench.writer.flush(SAFETY_SECONDS) and bench.ingester.begun == 2  # who asks need not wait for it
    bench.writer.close(SAFETY_SECONDS)


@pytest.mark.parametrize("answer", [{"fault": "locked", "locked": True}, {"fault": "broken"}, {"busy": True}])
def test_segments_stay_few_however_often_an_ingest_fails(tmp_path: Path, answer: dict[str, Any]) -> None:
    bench = Bench(tmp_path, *[answer] * 30, interval=0.0)
    for n in range(30):
        bench.writer.put(line(n))
        bench.writer.flush(0.05 if answer.get("busy") else SAFETY_SECONDS)
        bench.ingester._busy_until = 0.0
    assert file_count(bench) <= 2 and bench.ingester.begun >= 10
    bench.ingester.answers = iter(())
    assert bench.writer.flush(SAFETY_SECONDS)
    wait_until(lambda: not file_count(bench) or not bench.writer.flush(1))
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_no_segment_is_sealed_while_another_process_ingests(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"done": True}, interval=0.01)
    bench.writer.wait_written(bench.writer.put(line(1)))
    with bench.journal.ingest_lock() as mine:
        assert mine
        for n in range(5):
            bench.writer.put(line(n))
            assert bench.writer.flush(0.1)
        assert not bench.ingester.begun and not bench.appender.sealed and file_count(bench) == 1
    assert bench.writer.flush(SAFETY_SECONDS) and bench.ingester.begun == 1
    bench.writer.close(SAFETY_SECONDS)


def test_ingest_of_a_full_segment_waits_for_no_budget_but_for_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "SEGMENT_BYTES", 1)
    bench = Bench(tmp_path, {"done": True, "cpu": 9.0}, {"fault": "no", "cpu": 9.0}, interval=60.0)
    for n in range(2):
        bench.writer.wait_written(bench.writer.put(line(n)))
        wait_until(lambda n=n: bench.ingester.begun == n + 1)
    bench.writer.wait_written(bench.writer.put(line(2)))
    due = bench.ingester.due_in()
    assert due is not None and due > 50
    bench.writer.close(SAFETY_SECONDS)


def test_child_that_answers_nonsense_or_cannot_be_started_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, {}, interval=3600.0)
    bench.ingester._start = Ingester._start.__get__(bench.ingester)  # type: ignore[method-assign]
    for child in ("raise SystemExit('what nobody foresaw')", "print('{}')", "import os; os.abort()"):
        monkeypatch.setattr(mxcp_audit, "_CHILD", child)
        bench.writer.put(line(1))
        assert bench.writer.flush(SAFETY_SECONDS)
        assert bench.told.last_error is not None and "ended with code" in bench.told.last_error
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python-that-is-gone"))
    assert bench.writer.flush(SAFETY_SECONDS) and "python-that-is-gone" in str(bench.told.last_error)
    monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
    assert bench.writer.flush(SAFETY_SECONDS) and "sys.executable is no Python" in str(bench.told.last_error)
    assert bench.told.errors == 5 and file_count(bench) <= 2
    assert bench.writer.close(SAFETY_SECONDS) == 0


def test_foreign_file_under_the_number_of_ours_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    bench.writer.wait_written(bench.writer.put(line(1)))
    segment = bench.appender._segment
    assert segment is not None
    ours = os.dup(segment._fd)
    with open(tmp_path / "foreign", "w+b") as foreign:
        os.dup2(foreign.fileno(), segment._fd)  # as after os.closerange and the next open()
        bench.writer.wait_written(bench.writer.put(line(2)))
        assert bench.writer.close(SAFETY_SECONDS) == 0
        assert os.fstat(segment._fd if segment._fd >= 0 else foreign.fileno()).st_size == 0
    os.close(ours)
    assert (tmp_path / "foreign").read_bytes() == b"" and bench.lines() == [line(1), line(2)]
