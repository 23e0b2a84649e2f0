"""What operators do around a log: copies put back, commands as root, readers without a break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, child_environment, table_rows
from evidence import DAY_NS, START_NS, ingest, store_of, write_segment

import mxcp_audit as m

Cli = Any


@pytest.fixture
def log(engine: str, tmp_path: Path) -> Path:
    """A database of two segments of four events."""
    database = tmp_path / "log.duckdb"
    for number in range(2):
        write_segment(database, START_NS + number * DAY_NS, 4)
        ingest(database)
    return database


def events(database: Path) -> list[tuple[Any, ...]]:
    return sorted(table_rows(database, "SELECT name, timestamp::VARCHAR, duration_ms FROM logs"))


# --- restore


def live_lines(segment: m.Segment, first: int, last: int) -> None:
    """Append lines to a segment that its server goes on writing."""
    line = b'{"timestamp":"2026-06-01T00:00:00.%06dZ","name":"live-%d","input_json":"{}"'
    for number in range(first, last + 1):
        segment.append(m.finish_line(line % (number, number), number), 1)


def test_restore_beside_a_server_that_went_on_loses_and_doubles_nothing(
    log: Path, tmp_path: Path, cli: Cli
) -> None:
    """The backup had the first lines of a segment whose server wrote more: these were destroyed."""
    segment = m.Journal(f"{log}.journal").open_segment()
    live_lines(segment, 1, 8)
    store_of(log).backup(str(tmp_path / "b.duckdb"))
    live_lines(segment, 9, 103)
    log.unlink()
    done = cli("restore", "--db", str(log), str(tmp_path / "b.duckdb"))
    assert (done.returncode, done.stderr) == (0, "") and "16 events restored" in done.stdout
    segment.seal()
    ingest(log)
    names = [name for name, *_ in events(log) if name.startswith("live")]
    assert sorted(names) == sorted(f"live-{number}" for number in range(1, 104))
    assert len(events(log)) == 111 and store_of(log).verify().intact


def test_restore_adds_what_came_after_the_database_was_lost(log: Path, tmp_path: Path) -> None:
    store = store_of(log)
    store.backup(str(tmp_path / "b.duckdb"))
    before = events(log)
    log.unlink()
    write_segment(log, START_NS + 5 * DAY_NS, 3)  # a new database, by the same journal
    store.journal.record_loss(m.Loss(5, "2026-01-01", "2026-01-02", "no space"))
    ingest(log)
    new = events(log)
    restored = store.restore(str(tmp_path / "b.duckdb"))
    assert restored[:2] == (11, 8) and restored.kept is not None
    assert events(log) == sorted([*before, *new]) and events(Path(restored.kept)) == new
    verdict = store.verify()
    assert verdict.intact and verdict.lost == 5
    ingest(log)
    assert store.verify().intact
    assert store.restore(str(tmp_path / "b.duckdb")) == (11, 0, None)  # it holds all of it


def test_restore_of_an_earlier_version_s_backup_takes_its_journal_in(log: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.duckdb"
    shutil.copy(log, old)
    write_segment(old, START_NS + 3 * DAY_NS, 2)
    log.unlink()
    assert store_of(log).restore(str(old)).events == 10 and store_of(log).verify().intact
    assert len(store_of(old).journal.segments()) == 1  # a backup is not changed


def test_restore_that_would_lose_a_row_changes_nothing(log: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    store_of(log).backup(str(tmp_path / "b.duckdb"))
    write_segment(log, START_NS + 3 * DAY_NS, 2)
    ingest(log)
    with duckdb.connect(str(tmp_path / "b.duckdb")) as connection:
        connection.execute("DELETE FROM logs WHERE seq = 1")
        connection.execute("INSERT INTO logs BY NAME SELECT 'x' AS name")
    before = events(log)
    with pytest.raises(m.StoreError, match="2 rows that would be lost"):
        store_of(log).restore(str(tmp_path / "b.duckdb"))
    assert events(log) == before
    for bad in ("nowhere.duckdb", "text"):
        (tmp_path / "text").write_text("no database")
        with pytest.raises(m.AuditError):
            store_of(log).restore(str(tmp_path / bad))
    assert events(log) == before and not list(tmp_path.glob("*.restore*"))


# --- root


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_commands_as_root_leave_everything_to_the_owner_of_the_directory(tmp_path: Path, cli: Cli) -> None:
    """A purge by root before the first event made a journal that the service could not use."""
    home = tmp_path / "service"
    home.mkdir(mode=0o700)
    os.chown(home, 4321, 4322)
    database = home / "log.duckdb"
    for command in (["log"], ["stats"], ["doctor"], ["sql", "SELECT 1"]):
        cli(*command, "--db", str(database))
    assert list(home.iterdir()) == []  # reading makes nothing
    cli("purge", "--older-than", "90d", "--db", str(database))
    write_segment(database, START_NS, 3)
    for command in (["log"], ["doctor"], ["ingest"], ["compact"], ["purge", "--older-than", "1d"]):
        assert cli(*command, "--db", str(database)).returncode == 0, command
    made = [home, *home.rglob("*")]
    assert database in made and {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(4321, 4322)}


# --- readers without a break


def test_ingest_that_waits_is_let_pass_by_readers(log: Path, tmp_path: Path) -> None:
    store = store_of(log)
    with store.reading() as reading:
        assert list(reading.rows(m.Filter()))
        write_segment(log, START_NS + 3 * DAY_NS, 1)
        code = f"import mxcp_audit as m; m.Store(m.Config({str(log)!r})).ingest(wait=60)"
        environment = child_environment(PYTHONPATH=str(ROOT))
        child = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while not store.journal.is_ingest_waiting():  # it asks as soon as it was refused
            assert child.poll() is None
            time.sleep(0.01)
        seen: list[int] = []

        def read() -> None:
            with store_of(log).reading() as later:
                assert later.problem is None
                seen.append(len(list(later.rows(m.Filter()))))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    assert child.wait() == 0 and seen == [9]
    assert len(events(log)) == 9
    assert not store.journal.is_ingest_waiting()
