"""Ingest: each event once, whatever is in the way; what is in the way is never destroyed."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import child_environment, held_database, one_engine, table_rows, write_table_of_mxcp

import mxcp_audit
from mxcp_audit import (
    DatabaseCorruptError,
    DatabaseLockedError,
    Diagnostics,
    Journal,
    Loss,
    QueryError,
    Store,
    StoreError,
)
from tools.judge import journal_line, judge
from tools.read_journal import read_journal


def store_of(db: Path) -> Store:
    return Store(mxcp_audit.config_from_arguments(path=str(db)), diagnostics=Diagnostics())


def told(store: Store) -> Diagnostics:
    return store._diagnostics


def segment(db: Path, *names: str, raw: bytes = b"") -> Path:
    lines = [journal_line(name, seq) for seq, name in enumerate(names, 1)]
    opened = Journal(f"{db}.journal").open_segment()
    opened.append(b"".join(lines) + raw, len(lines))
    opened.seal()
    return Path(opened.path)


def test_ingest_moves_segments_once_and_removes_them(db: Path, engine: str) -> None:
    paths = [segment(db, f"{n}-a", f"{n}-b") for n in range(5)]
    store = store_of(db)
    assert store.ingest() and told(store).ingested == 10
    assert not any(path.exists() for path in paths)
    assert store.ingest() and told(store).ingested == 10
    verdict = judge(db)
    assert verdict.in_table == 10 and verdict.doubled == 0
    assert stat.S_IMODE(os.stat(db).st_mode) == 0o600
    assert sorted(path.name for path in db.parent.iterdir()) == ["log.duckdb", "log.duckdb.journal"]


def test_ingest_segment_that_comes_back_is_known(db: Path, engine: str) -> None:
    path = segment(db, "x")
    data = path.read_bytes()
    store_of(db).ingest()
    path.write_bytes(data)  # a crash between commit and removal
    store = store_of(db)
    assert store.ingest() and told(store).ingested == 0
    assert not path.exists() and judge(db).in_table == 1


def test_ingest_bad_lines_are_kept_and_on_record(db: Path, engine: str) -> None:
    path = segment(db, "a", "b", raw=b'{"broken\n\xff\n[]\n\n{"seq":1}\nhalf')
    store = store_of(db)
    assert store.ingest()
    assert (told(store).ingested, told(store).rejected) == (2, 5)
    kept = [json.loads(line) for line in path.with_suffix(".rejected").read_text().splitlines()]
    assert [entry["line"] for entry in kept] == [3, 4, 5, 6, 7] and all(entry["reason"] for entry in kept)
    assert kept[1]["text"].encode("utf-8", "surrogateescape") == b"\xff"
    assert path.with_suffix(".torn").read_bytes() == b"half"
    assert judge(db).losses == 5


@pytest.mark.parametrize(
    "damage", [b"\0", b"\0" * 4096, b'{"timestamp":"2026-' + b"\0" * 512], ids=["one", "block", "half a line"]
)
def test_ingest_line_behind_nuls_of_a_power_loss_is_taken_in(db: Path, engine: str, damage: bytes) -> None:
    path = segment(db, "a", raw=damage + journal_line("b", 2) + journal_line("c", 3))
    assert [event["name"] for event in read_journal(path.parent)] == ["a", "b", "c"]
    store = store_of(db)
    assert store.ingest()
    assert (told(store).ingested, told(store).rejected) == (3, 1)
    (kept,) = map(json.loads, path.with_suffix(".rejected").read_text().splitlines())
    assert (kept["line"], kept["text"].encode()) == (2, damage[:-1])
    assert set(judge(db).names) == {"a", "b", "c"}


def test_ingest_loss_is_entered_once(db: Path, engine: str) -> None:
    segment(db, "x")
    journal = Journal(f"{db}.journal")
    journal.record_loss(Loss(7, "2026-01-31 12:00:00", "2026-01-31 12:00:09", "the queue was full"))
    (path,) = journal.losses()
    data = Path(path).read_bytes()
    store = store_of(db)
    store.ingest()
    Path(path).write_bytes(data)
    store.ingest()
    assert judge(db).losses == 7 and not journal.losses()
    with store.reading() as reading:
        ((_, count, detail),) = reading.losses()
    assert count == 7 and "2026-01-31 12:00:09" in detail and "full" in detail


def test_ingest_loss_alone_makes_a_database(db: Path) -> None:
    Journal(f"{db}.journal").record_loss(Loss(1, "2026-01-31", "2026-01-31", "why"))
    store_of(db).ingest()
    assert judge(db).losses == 1


def test_ingest_undeletable_segments_do_not_keep_the_others_waiting(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        segment(db, str(n))
    monkeypatch.setattr(mxcp_audit, "INGEST_BYTES", 400)  # two segments a batch

    true_unlink = os.unlink

    def unlink(path: Any) -> None:
        if str(path).endswith(".jsonl"):
            raise PermissionError(1, "no", path)
        true_unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        store = store_of(db)
        assert store.ingest() and told(store).ingested == 6  # and came to an end
    store_of(db).ingest()
    assert judge(db).in_table == 6 and not list(Path(f"{db}.journal").glob("*.jsonl"))


def test_ingest_that_is_interrupted_rejects_nothing(db: Path, engine: str) -> None:
    path = segment(db, *map(str, range(100)))
    store = store_of(db)

    def opener(**how: bool) -> Any:
        opened = mxcp_audit.open_engine(**how)
        true_execute = opened.execute

        def execute(sql: str, params: Any = {}) -> Any:
            if sql == mxcp_audit.STAGE:
                raise mxcp_audit.store_error("INTERRUPT Error: Interrupted!")
            return true_execute(sql, params)

        opened.execute = execute  # type: ignore[method-assign]
        return opened

    store.target.open_engine = opener
    with pytest.raises(mxcp_audit.StoreError, match="Interrupted"):
        store.ingest()
    assert path.exists() and not path.with_suffix(".rejected").exists() and told(store).rejected == 0
    store_of(db).ingest()
    assert judge(db).in_table == 100


def test_ingest_old_ten_column_table_is_widened(db: Path, engine: str) -> None:
    write_table_of_mxcp(db)
    segment(db, "new")
    store_of(db).ingest()
    assert table_rows(db, "SELECT name, seq FROM logs ORDER BY name") == [("new", 1), ("old", None)]


def test_ingest_empty_file_counts_as_absent(db: Path, engine: str) -> None:
    db.touch()
    segment(db, "x")
    store_of(db).ingest()
    assert judge(db).in_table == 1


def test_ingest_wal_without_its_database_is_not_destroyed(db: Path) -> None:
    Path(f"{db}.wal").write_bytes(b"precious")
    path = segment(db, "x")
    with pytest.raises(DatabaseCorruptError, match="wal"):
        store_of(db).ingest()
    assert Path(f"{db}.wal").read_bytes() == b"precious" and path.exists() and not db.exists()


def test_ingest_half_made_database_of_a_killed_process_is_no_obstacle(db: Path) -> None:
    segment(db, "x")
    store = store_of(db)
    scratch = db.parent / f".{db.name}.{store.journal.identity()}.new"
    scratch.mkdir()
    (scratch / "new").write_bytes(b"half a database")
    (scratch / "new.wal").write_bytes(b"half a wal")
    assert store.ingest()
    assert judge(db).in_table == 1 and not scratch.exists()


def test_ingest_locked_database_leaves_everything_and_names_the_holder(db: Path, engine: str) -> None:
    segment(db, "first")
    store_of(db).ingest()
    path = segment(db, "second")
    with held_database(db) as holder:
        with pytest.raises(DatabaseLockedError, match=str(holder.pid)):
            store_of(db).ingest()
        assert path.exists()
    store_of(db).ingest()
    assert judge(db).in_table == 2


def test_ingest_while_another_ingests_is_left_to_it(db: Path) -> None:
    path = segment(db, "x")
    store = store_of(db)
    with Journal(f"{db}.journal").ingest_lock() as mine:
        assert mine and not store.ingest() and path.exists()
    assert store.ingest() and not path.exists()


def test_ingest_several_processes_at_once_take_each_event_once(db: Path) -> None:
    for n in range(40):
        segment(db, *(f"{n}-{line}" for line in range(20)))
    command = [sys.executable, "-m", "mxcp_audit", "ingest", "--db", str(db)]
    several = [
        subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL) for _ in range(4)
    ]
    assert {process.wait(120) for process in several} <= {0, 75}
    store_of(db).ingest()
    verdict = judge(db)
    assert (verdict.in_table, len(verdict.names), verdict.doubled) == (800, 800, 0)


def test_reading_before_the_first_ingest_keeps_the_segments_in_place(db: Path) -> None:
    path = segment(db, "x")
    with store_of(db).reading() as reading:
        assert not store_of(db).ingest() and path.exists()  # it would pull the files from under the reader
        assert len(list(reading.rows(mxcp_audit.Filter()))) == 1
    assert store_of(db).ingest()


def test_doctor_healthy_log_is_healthy(db: Path, engine: str) -> None:
    segment(db, "x")
    store_of(db).ingest()
    report = mxcp_audit.check_up(mxcp_audit.config_from_arguments(path=str(db)), wait=1)
    space = [fault for fault in report["faults"] if "MiB are free" in fault["problem"]]
    assert report["faults"] == space
    assert report["database"]["events"] == 1 and report["engine"]["name"] == engine


def test_doctor_names_every_fault_with_its_remedy(db: Path) -> None:
    path = segment(db, "x", raw=b"broken\n")
    store_of(db).ingest()
    os.chmod(db, 0o644)
    waiting = segment(db, "waiting")
    os.utime(waiting, (0, 0))
    report = mxcp_audit.check_up(mxcp_audit.config_from_arguments(path=str(db), enabled=False), wait=1)
    text = "\n".join(fault["problem"] for fault in report["faults"])
    for sign in (
        "not enabled",
        "open to other users",
        "1 segment since",
        "could not be ingested",
        "events were lost",
    ):
        assert sign in text
    assert all(fault["remedy"] for fault in report["faults"]) and not report["healthy"]
    assert path.with_suffix(".rejected").exists()


def said_by_doctor(db: Path) -> tuple[dict[str, Any], str]:
    report = mxcp_audit.check_up(mxcp_audit.config_from_arguments(path=str(db)), wait=0)
    assert all(fault["remedy"] for fault in report["faults"])
    return report, "\n".join(fault["problem"] for fault in report["faults"])


def test_doctor_of_a_log_that_was_never_written_finds_nothing_wrong(
    db: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "_LITTLE_SPACE_BYTES", 0)
    report, faults = said_by_doctor(db)
    assert report["healthy"] and report["database"]["events"] == 0 and not faults


def test_doctor_of_a_database_that_cannot_be_had_says_why(db: Path, engine: str) -> None:
    segment(db, "x")
    store_of(db).ingest()
    with held_database(db) as holder:
        report, faults = said_by_doctor(db)
    assert f"PID {holder.pid}" in faults and not report["database"]["readable"]
    db.write_bytes(b"garbage" * 3000)
    report, faults = said_by_doctor(db)
    assert "not a valid DuckDB database" in faults and not report["healthy"]
    db.unlink()
    db.mkdir()
    report, faults = said_by_doctor(db)
    assert str(db) in faults and not report["healthy"]


def test_doctor_without_an_engine_names_it_and_goes_on(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment(db, "x")
    monkeypatch.setenv("MXCP_AUDIT_ENGINE", "cli")
    monkeypatch.setenv("MXCP_AUDIT_DUCKDB", str(db.parent / "none"))
    report, faults = said_by_doctor(db)
    assert "can't be run" in faults and report["engine"] is None and report["journal"]["sealed"] == 1


def test_doctor_of_a_journal_that_is_none_says_so(db: Path, engine: str) -> None:
    Path(f"{db}.journal").write_text("in the way")
    report, faults = said_by_doctor(db)
    assert "can't be read" in faults and not report["healthy"]


def test_doctor_sees_rights_space_and_half_lines(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(db, "x")
    store_of(db).ingest()
    path.with_suffix(".torn").write_text("half")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != db)  # root may everything
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=2**20))
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_files=40, f_favail=0))
    report, faults = said_by_doctor(db)
    assert f"only 0 inodes are free in {db.parent}" in faults  # FX-087
    assert f"{db} can't be read and written" in faults and "only 1 MiB are free" in faults
    assert report["journal"]["torn"] == 1


def test_fx_097_short_memory_is_not_told_as_a_foreign_table(db: Path) -> None:
    for text in ("Out of Memory Error: none", "the duckdb program ended without a word (was it killed?)"):

        def fail(statement: str, text: str = text) -> None:
            raise QueryError(text)

        engine: Any = types.SimpleNamespace(execute=fail)
        with pytest.raises(QueryError) as caught:
            store_of(db).target.change_logs(engine, "")
        assert str(caught.value) == text


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "link"])
def test_ingest_leaves_what_is_no_regular_file_alone(
    db: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing hangs on it, follows it or counts it: it is not ours, whatever its name is."""
    path = segment(db, "x")
    bad = path.with_name("20260131T120000000000Z-00000000.jsonl")
    if kind == "directory":
        bad.mkdir()
    elif kind == "fifo":
        os.mkfifo(bad)
    elif kind == "socket":
        monkeypatch.chdir(bad.parent)  # the name of a socket may not be long
        socket.socket(socket.AF_UNIX).bind(bad.name)
    else:
        (db.parent / "secret").write_bytes(journal_line("secret", 1))
        bad.symlink_to(db.parent / "secret")
    assert store_of(db).ingest()
    with store_of(db).reading() as reading:
        assert [row[3] for row in reading.rows(mxcp_audit.Filter())] == ["x"]
    assert store_of(db).journal.survey()["bytes"] == 0 and os.path.lexists(bad) and not path.exists()


def test_ingest_of_a_cloned_segment_takes_the_new_lines_of_both(db: Path, engine: str) -> None:
    """A segment that was copied while it was live goes on in both places: the ledger knows one of them."""
    path = segment(db, "a", "b")
    copy = path.read_bytes()
    assert store_of(db).ingest()
    path.write_bytes(copy + journal_line("c", 3) + journal_line("d", 4))
    assert store_of(db).ingest()
    assert sorted(name for (name,) in table_rows(db, "SELECT name FROM logs")) == ["a", "b", "c", "d"]
    assert store_of(db).verify().intact and not path.exists()
    path.write_bytes(copy)
    assert store_of(db).ingest() and len(table_rows(db)) == 4 and not path.exists()


def test_ingest_of_a_cloned_segment_that_fails_at_first_takes_the_new_lines_once(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = segment(db, "a")
    copy = path.read_bytes()
    assert store_of(db).ingest()
    path.write_bytes(copy + journal_line("b", 2))

    def full(*_: object) -> None:
        raise StoreError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            mxcp_audit.PackageEngine,
            "execute",
            lambda engine, sql, params={}: (
                full() if sql.startswith("COMMIT") else list(engine.stream(sql, params))
            ),
        )
        with pytest.raises(StoreError):
            store_of(db).ingest()
    assert store_of(db).ingest()
    assert sorted(name for (name,) in table_rows(db, "SELECT name FROM logs")) == ["a", "b"]


def test_ingest_of_a_known_name_with_other_lines_puts_them_aside(db: Path, engine: str) -> None:
    path = segment(db, "a", "b")
    assert store_of(db).ingest()
    path.write_bytes(journal_line("x", 1) + journal_line("y", 2))
    store = store_of(db)
    assert store.ingest()
    assert sorted(name for (name,) in table_rows(db, "SELECT name FROM logs")) == ["a", "b"]
    kept = [json.loads(line) for line in path.with_suffix(".rejected").read_text().splitlines()]
    assert [json.loads(each["text"])["name"] for each in kept] == ["x", "y"]
    assert "other lines" in kept[0]["reason"]
    assert table_rows(db, "SELECT events FROM ledger WHERE kind = 'loss'") == [(2,)]


def test_ingest_narrows_a_fault_down_to_its_line(db: Path, engine: str) -> None:
    """Twenty segments, one of which holds a line that passes our own check and not DuckDB's."""
    for number in range(20):
        segment(db, f"t{number}")
    bad = segment(db, "good", "bad", "fine")
    bad.write_bytes(
        bad.read_bytes()
        .replace(b'"input_json":"null"', b'"input_json":"\\ud800"', 2)
        .replace(b'"\\ud800"', b'"null"', 1)
    )
    assert store_of(db).ingest()
    names = {name for (name,) in table_rows(db, "SELECT name FROM logs")}
    assert len(names) == 22 and "bad" not in names
    assert len(bad.with_suffix(".rejected").read_text().splitlines()) == 1


def test_many_small_segments_are_read_and_ingested_with_few_descriptors(db: Path) -> None:
    for number in range(300):
        segment(db, f"t{number}")
    script = (
        "import resource, sys, mxcp_audit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "store = mxcp_audit.Store(mxcp_audit.config_from_arguments(sys.argv[1]))\n"
        "with store.reading() as reading: print(len(list(reading.rows(mxcp_audit.Filter(), count=None))))\n"
        "print(store.ingest(), store.journal.segments())"
    )
    command = [sys.executable, "-c", script, str(db)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.stdout == "300\nTrue []\n", done.stderr
    assert len(table_rows(db)) == 300


def test_ingest_where_the_database_has_no_directory_says_so(db: Path, engine: str) -> None:
    segment(db, "x")
    (db.parent / "file").write_text("")
    config = mxcp_audit.config_from_arguments(
        path=str(db.parent / "file" / "log.duckdb"), journal=f"{db}.journal"
    )
    with pytest.raises(StoreError, match="check the path and its permissions"):
        Store(config).ingest()
    assert len(Journal(f"{db}.journal").segments()) == 1


@one_engine
def test_fx_230_file_system_without_modes_takes_the_log_and_its_copies(
    db: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "no modes here")

    monkeypatch.setattr(os, "chmod", refuse)
    with mxcp_audit.AuditLogger(db, flush_interval=60) as logger:
        logger.log_event(caller="cli", event_type="tool", name="one")
    store = Store(mxcp_audit.config_from_arguments(db))
    assert store.ingest() and store.backup(str(db.with_name("copy.duckdb"))) == 1
    store.compact()
    assert not store.verify(wait=0).findings
