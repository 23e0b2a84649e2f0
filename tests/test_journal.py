"""Journal: whole lines whatever interrupts a write, locks that tell the living, names that never collide."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import child_environment

import mxcp_audit
from mxcp_audit import Journal, JournalError, Loss


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "log.journal")


def failing(monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException, *, after: int = 0) -> None:
    """Let one call of `os` fail once, after some that succeed; a write writes half of its data first."""
    true, count = getattr(os, call), [0]

    def fail(fd: int, *rest: Any) -> Any:
        count[0] += 1
        if count[0] == after + 1:
            if call == "write":
                true(fd, bytes(rest[0])[: len(rest[0]) // 2])
            raise error
        return true(fd, *rest)

    monkeypatch.setattr(os, call, fail)


def test_open_segment_makes_private_directory_and_file(journal: Journal) -> None:
    segment = journal.open_segment()
    assert stat.S_IMODE(os.stat(journal.directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(segment.path).st_mode) == 0o600
    segment.seal()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_open_segment_directory_that_is_none_is_refused(journal: Journal, tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").mkdir()
    if kind == "link":
        os.symlink(tmp_path / "victim", journal.directory)
    else:
        Path(journal.directory).write_text("x")
    with pytest.raises(JournalError, match="symbolic link" if kind == "link" else "no directory"):
        journal.open_segment()
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt()]
)
def test_append_that_is_interrupted_leaves_whole_lines_only(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    segment = journal.open_segment()
    segment.append(b"one\n", 1)
    failing(monkeypatch, "write", error)
    with pytest.raises(type(error)):
        segment.append(b"two two two\n", 1)
    assert (segment.size, segment.events) == (4, 1)
    segment.append(b"three\n", 1)
    segment.seal()
    assert Path(segment.path).read_bytes() == b"one\nthree\n"


def test_append_whose_truncation_fails_is_mended_before_sealing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = journal.open_segment()
    segment.append(b"one\n", 1)
    failing(monkeypatch, "write", OSError(errno.ENOSPC, "full"))
    failing(monkeypatch, "ftruncate", OSError(errno.EIO, "broken"))
    with pytest.raises(OSError):
        segment.append(b"two two two\n", 1)
    assert os.stat(segment.path).st_size > 4
    segment.seal()
    assert Path(segment.path).read_bytes() == b"one\n"


def test_append_whose_fsync_fails_is_taken_back(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = journal.open_segment()
    segment.append(b"one\n", 1, durable=True)
    failing(monkeypatch, "fsync", OSError(errno.EIO, "broken"))
    with pytest.raises(OSError):
        segment.append(b"two\n", 1, durable=True)
    assert Path(segment.path).read_bytes() == b"one\n" and segment.events == 1
    segment.seal()


def test_seal_releases_the_lock_although_another_descriptor_is_open(journal: Journal) -> None:
    segment = journal.open_segment()
    segment.append(b"{}\n", 1)
    copy = os.dup(segment._fd)  # what a child has that was forked behind Python's back
    segment.seal()
    claims, problems = journal.claim(limit_bytes=1)
    assert len(claims) == 1 and not problems
    os.close(copy)


def test_forget_leaves_the_lock_to_the_parent(journal: Journal) -> None:
    segment = journal.open_segment()
    segment.append(b"{}\n", 1)
    pid = os.fork()
    if pid == 0:
        segment.forget()
        os._exit(0)
    os.waitpid(pid, 0)
    assert journal.claim(limit_bytes=1) == ([], [])
    segment.seal()


def test_seal_empty_segment_leaves_no_file(journal: Journal) -> None:
    segment = journal.open_segment()
    segment.seal()
    segment.seal()
    assert journal.segments() == []


def test_claim_takes_the_dead_and_leaves_the_living(journal: Journal) -> None:
    code = (
        "import mxcp_audit, os, sys\n"
        "segment = mxcp_audit.Journal(sys.argv[1]).open_segment()\n"
        "segment.append(b'{}\\n{}\\n', 2); os.write(segment._fd, b'{\"half'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, journal.directory], env=child_environment(), check=True)
    living = journal.open_segment()
    living.append(b"{}\n", 1)
    (claim,), problems = journal.claim(limit_bytes=2**20)
    assert not problems and (claim.lines, claim.torn, claim.size) == (2, 6, 6)
    assert Path(claim.path).read_bytes() == b"{}\n{}\n"
    assert Path(claim.path).with_suffix(".torn").read_bytes() == b'{"half'
    assert journal.claim(limit_bytes=2**20, skip={claim.id})[0] == []
    living.seal()


def test_claim_planted_link_is_passed_over(journal: Journal, tmp_path: Path) -> None:
    journal.open_segment().seal()
    (tmp_path / "victim").write_text("{}\n")
    os.symlink(tmp_path / "victim", Path(journal.directory) / "20260131T120000000000Z-00000000.jsonl")
    assert journal.claim(limit_bytes=1) == ([], [])
    assert (tmp_path / "victim").read_text() == "{}\n"


def test_ingest_lock_is_held_by_one(journal: Journal) -> None:
    with journal.ingest_lock() as nobody:
        assert not nobody  # there is no journal yet
    journal.open_segment().seal()
    with journal.ingest_lock() as first, journal.ingest_lock() as second:
        assert first and not second
    with journal.ingest_lock() as third:
        assert third


def test_identity_stays_and_differs_between_journals(journal: Journal, tmp_path: Path) -> None:
    other = Journal(tmp_path / "other")
    for each in (journal, other):
        each.open_segment().seal()
    assert journal.identity() == journal.identity() != other.identity()


def test_losses_are_read_back_and_damaged_ones_are_losses_too(journal: Journal) -> None:
    loss = Loss(3, "2026-01-31 12:00:00", "2026-01-31 12:00:01", "the queue was full")
    journal.record_loss(loss)
    Path(journal.directory, "20260131T120000000000Z-00000000.loss").write_text('{"events": 1')
    damaged, read = journal.losses().values()
    assert read == loss and damaged.events == 0 and "was damaged" in damaged.reason
    assert "3 events" in str(loss) and "full" in str(loss)


def test_survey_tells_live_sealed_orphaned_and_leftovers(journal: Journal) -> None:
    assert set(journal.survey().values()) == {0, None}
    sealed = journal.open_segment()
    sealed.append(b'{"timestamp":"2026-01-31T12:00:00.000000Z"}\n', 1)
    sealed.seal()
    os.utime(sealed.path, (0, 0))
    live = journal.open_segment()
    for suffix in (".torn", ".rejected"):
        Path(sealed.path).with_suffix(suffix).write_text("x")
    found = journal.survey()
    size, oldest = found.pop("bytes"), found.pop("oldest_pending")
    assert found == dict.fromkeys(("live", "sealed", "orphaned", "torn", "rejected"), 1)
    assert size == os.stat(sealed.path).st_size and oldest == "2026-01-31T12:00:00.000000Z"
    live.seal()


def test_file_size_limit_is_respected_before_the_signal_comes(journal: Journal) -> None:
    segment = journal.open_segment()
    segment._limit = 10
    segment.append(b"12345678\n", 1)
    with pytest.raises(OSError) as caught:
        segment.append(b"12345678\n", 1)
    assert caught.value.errno == errno.EFBIG and os.stat(segment.path).st_size == 9
    segment.seal()
    assert mxcp_audit.file_size_limit() > 0


def test_claim_that_runs_out_of_memory_holds_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        segment = journal.open_segment()
        segment.append(b"{}\n", 1)
        segment.seal()
    true_read, left = mxcp_audit.read_file, [1]

    def read_file(path: str) -> bytes:
        if not left:
            raise MemoryError
        left.pop()
        return true_read(path)

    with monkeypatch.context() as patched:
        patched.setattr(mxcp_audit, "read_file", read_file)
        with pytest.raises(MemoryError):
            journal.claim(limit_bytes=2**20)
    claims, problems = journal.claim(limit_bytes=2**20)
    assert (len(claims), problems) == (3, [])


FIRST, SECOND = "20260131T120000000000Z-00000000", "20260131T120000000000Z-00000001"


def test_open_segment_that_a_claimer_deleted_at_once_is_another(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, deleted = mxcp_audit.try_lock, []

    def try_lock(fd: int) -> bool:
        if not deleted:
            deleted.extend(journal.segments())
            os.unlink(deleted[0])
        return true(fd)

    monkeypatch.setattr(mxcp_audit, "try_lock", try_lock)
    segment = journal.open_segment()
    assert journal.segments() == [segment.path] != deleted
    segment.seal()


def test_open_segment_that_is_interrupted_leaves_no_descriptor(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def try_lock(fd: int) -> bool:
        opened.append(fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(mxcp_audit, "try_lock", try_lock)
    with pytest.raises(KeyboardInterrupt):
        journal.open_segment()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_claim_bad_file_does_not_stop_the_rest(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    good = journal.open_segment()
    good.append(b"{}\n", 1)
    good.seal()
    bad = Path(journal.directory, f"{FIRST}.jsonl")
    bad.write_bytes(b"{}\n")
    read_file = mxcp_audit.read_file

    def fail(path: str) -> bytes:
        if path == str(bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_file(path)

    monkeypatch.setattr(mxcp_audit, "read_file", fail)
    (claim,), (problem,) = journal.claim(limit_bytes=2**20)
    assert claim.id == good.id and problem.path == str(bad) and "can't be claimed" in str(problem)


def test_file_system_without_locks_records_and_names_the_remedy(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_lock(fd: int, **how: bool) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(mxcp_audit, "try_lock", try_lock)
    segment = journal.open_segment()
    segment.append(b"{}\n", 1)
    segment.seal()
    claims, (problem,) = journal.claim(limit_bytes=2**20)
    assert claims == [] and Path(segment.path).read_bytes() == b"{}\n" and "set `journal`" in str(problem)
    with pytest.raises(JournalError, match="can't be examined"):
        journal.survey()
    with pytest.raises(JournalError, match="nothing is ingested"), journal.ingest_lock():
        pass


def test_segment_that_vanishes_under_the_look_is_none(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(Path(journal.directory, f"{FIRST}.jsonl"))
    monkeypatch.setattr(journal, "segments", lambda: [gone])
    assert journal.claim(limit_bytes=1) == ([], [])
    assert journal.survey()["sealed"] == journal.waiting_bytes() == 0


def test_names_in_what_is_no_directory_say_so(journal: Journal) -> None:
    Path(journal.directory).write_text("x")
    with pytest.raises(JournalError, match="can't be read"):
        journal.segments()


def test_reading_lock_where_the_reader_may_not_write(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.open_segment().seal()
    with journal.ingest_lock():
        pass  # makes the file
    true = os.open

    def refusing(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return true(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    with journal.ingest_lock(shared=True) as mine:
        assert mine
        monkeypatch.undo()
        with journal.ingest_lock() as other:
            assert not other


def test_segment_on_a_disk_that_answers_no_question_is_left_as_it_is(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = journal.open_segment()
    segment.append(b"{}\n", 1)
    for call, ask in (("lstat", segment.is_in_place), ("fstat", segment.is_open)):
        failing(monkeypatch, call, OSError(errno.EIO, "broken"))
        with pytest.raises(OSError, match="broken"):  # no answer is not the answer no
            ask()
        monkeypatch.undo()
        failing(monkeypatch, call, OSError(errno.ESTALE, "stale"))
        assert ask() is (call == "fstat")
        monkeypatch.undo()
    segment.seal()
    for leave in (segment.seal, segment.close, segment.forget):
        leave()


def test_identity_that_is_empty_is_made_anew(journal: Journal) -> None:
    journal.open_segment().seal()
    place = Path(journal.directory, "journal.id")
    place.write_text("")
    assert journal.identity() == place.read_text().strip() != ""


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_fx_230_directory_that_cannot_be_synced_is_no_fault_but_a_broken_disk_is(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "fsync", OSError(code, "no"))
    with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
        mxcp_audit.sync_directory(str(tmp_path))
