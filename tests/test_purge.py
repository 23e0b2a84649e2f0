"""Removing and copying: purge, archive, retention, backup, compact; who may read what."""

from __future__ import annotations

import datetime
import errno
import itertools
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, one_engine, table_rows
from evidence import DAY_NS, START_NS, ingest, make_log, moment, store_of, write_segment

import mxcp_audit as m

duckdb = pytest.importorskip("duckdb")

sys.path.insert(0, str(ROOT / "tools"))

DAY = 24 * 3600.0
MINUTE_NS = 60 * 10**9


@pytest.fixture
def log(engine: str, copy_of: Any) -> Path:
    return copy_of(make_log, 3)  # type: ignore[no-any-return]


def intact(database: Path) -> bool:
    return store_of(database).verify().intact


def count(database: Path) -> int:
    return int(table_rows(database, "SELECT count(*) FROM logs")[0][0])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- purge


def test_purge_takes_whole_segments_and_the_rest_verifies(log: Path) -> None:
    limit = START_NS + DAY_NS + 2 * MINUTE_NS
    planned = store_of(log).purge(moment(limit), dry_run=True)
    assert count(log) == 12 and (planned.events, planned.kept) == (4, 2)
    removal = store_of(log).purge(moment(limit))
    assert removal == planned and removal.segments == 1
    ((oldest,),) = table_rows(log, "SELECT epoch_us(min(timestamp)) FROM logs")
    assert oldest == (START_NS + DAY_NS) // 1000 and count(log) == 8
    verdict = store_of(log).verify()
    assert verdict.intact and verdict.purged == 4
    assert store_of(log).purge(moment(START_NS + DAY_NS + 4 * MINUTE_NS)).events == 4 and intact(log)
    change = "DELETE FROM logs WHERE rowid = (SELECT min(rowid) FROM logs)"
    table_write(log, change)
    assert not intact(log)


def table_write(database: Path, *statements: str) -> None:
    with duckdb.connect(str(database)) as connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize("days", [(1, 2), (2, 1), (1, 1)])
@one_engine
def test_purge_twice_in_any_order_verifies(log: Path, days: tuple[int, int]) -> None:
    for day in days:
        store_of(log).purge(moment(START_NS + day * DAY_NS + 2 * MINUTE_NS))
        assert intact(log)
    assert count(log) == 12 - 4 * max(days)
    write_segment(log, START_NS, 3)  # older than what was purged, but it came later
    ingest(log)
    assert intact(log) and count(log) == 12 - 4 * max(days) + 3
    assert store_of(log).purge(moment(START_NS + 3 * MINUTE_NS)).events == 3
    assert intact(log)


@one_engine
def test_purge_with_nothing_old_enters_nothing(log: Path) -> None:
    assert store_of(log).purge(moment(START_NS)).events == 0
    assert store_of(log).verify().entries == 3


def test_purge_of_changed_rows_keeps_the_evidence(log: Path) -> None:
    table_write(log, "UPDATE logs SET name = 'x' WHERE seq = 1", "DELETE FROM logs WHERE seq = 2")
    removal = store_of(log).purge(moment(START_NS + 2 * DAY_NS))
    assert len(removal.wrong) == 2 and removal.events == 6
    kinds = [finding.kind for finding in store_of(log).verify().findings]
    assert kinds.count("changed") == 3 and "removed" in kinds  # two of the purge, and the third segment


def test_purge_after_a_whole_segment_was_deleted_by_hand_keeps_the_evidence(log: Path) -> None:
    table_write(log, f"DELETE FROM logs WHERE timestamp < '{moment(START_NS + DAY_NS)}'")
    removal = store_of(log).purge(moment(START_NS + 2 * DAY_NS))
    assert (removal.events, removal.wrong) == (4, {})
    assert not intact(log)


def test_purged_rows_that_come_back_are_reported(log: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.duckdb"
    shutil.copy(log, kept)
    store_of(log).purge(moment(START_NS + 2 * DAY_NS))
    back = f"INSERT INTO logs SELECT * FROM kept.logs WHERE timestamp < '{moment(START_NS + DAY_NS)}'"
    table_write(log, f"ATTACH '{kept}' AS kept", back)
    (finding,) = store_of(log).verify().findings
    assert finding.kind == "inserted" and "not 0 as recorded" in finding.text


@one_engine
def test_purge_by_one_host_covers_segments_of_another(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.journal"
    write_segment(log, START_NS, 4, journal=other)
    ingest(log, journal=other)
    assert store_of(log, journal=other).purge(moment(START_NS + DAY_NS)).events == 8
    assert intact(log)
    assert store_of(log).purge(moment(START_NS + 2 * DAY_NS)).events == 4
    assert intact(log) and len(store_of(log).heads()) == 2


def test_cli_purge_of_an_older_table_verifies(engine: str, tmp_path: Path, cli: Any) -> None:
    database = tmp_path / "log.duckdb"
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{database}' AS old (STORAGE_VERSION 'v1.0.0'); USE old")
        columns = ", ".join(f"{column.name} {column.sql_type}" for column in m.COLUMNS[:10])
        connection.execute(f"CREATE TABLE logs ({columns})")
        connection.execute(
            "INSERT INTO logs "
            "SELECT TIMESTAMP '2024-01-01' + INTERVAL (i) HOUR, 'cli', 'tool', 'n', '{}', i, 'n/a', NULL, "
            "'success', NULL FROM range(100) t(i)"
        )
    done = cli("purge", "--db", str(database), "--older-than", "2024-01-03T12:00")
    assert (done.returncode, done.stdout) == (
        0,
        "48 events purged, from 2024-01-01T00:00:00.000000Z to 2024-01-02T23:00:00.000000Z\n"
        "12 events as old stay until the last event of their segment is\n",
    ), done
    verdict = store_of(database).verify()
    assert verdict.intact and count(database) == 52 and verdict.legacy == 100
    assert cli("verify", "--db", str(database)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--older-than", "x"], 2), (["--older-than", "2999-01-01"], 2), ([], 2), (["--older-than", "1d"], 1)],
)
@one_engine
def test_cli_purge_wrong_use_is_refused(
    engine: str, tmp_path: Path, cli: Any, arguments: list[str], code: int
) -> None:
    done = cli("purge", "--db", "none.duckdb", *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert not (tmp_path / "none.duckdb").exists()


@one_engine
def test_cli_purge_of_changed_rows_says_so_and_archive_must_be_a_directory(
    log: Path, tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "file").write_text("")
    everything = ("purge", "--db", str(log), "--older-than", moment(START_NS + 9 * DAY_NS))
    done = cli(*everything, "--archive", "file")
    assert done.returncode == 2 and "is no directory" in done.stderr
    table_write(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    done = cli(*everything)
    assert done.returncode == 0 and "did not match the ledger" in done.stderr


@one_engine
def test_purge_of_other_rows_than_planned_removes_none(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = m.plan_removal
    monkeypatch.setattr(m, "plan_removal", lambda *arguments: true(*arguments)._replace(events=1))
    with pytest.raises(m.StoreError, match=", not 1; try again"):
        store_of(log).purge(moment(START_NS + 9 * DAY_NS))
    assert intact(log)


# --- archive


def test_archive_holds_what_went_and_says_so(log: Path, tmp_path: Path) -> None:
    before = table_rows(log)
    limit = moment(START_NS + 2 * DAY_NS)
    removal = store_of(log).purge(limit, archive=str(tmp_path / "archive"))
    assert removal.archive is not None
    folder = tmp_path / "archive" / removal.archive
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["events"], manifest["digest"]) == (8, removal.digest)
    assert manifest["heads"][0]["position"] == 3
    files = sorted(folder.glob("*.parquet"))
    assert [(file["name"], file["sha256"]) for file in manifest["files"]] == [
        (path.name, m.file_digest(str(path))) for path in files
    ]
    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT * FROM read_parquet(?) ORDER BY timestamp, segment, seq", [list(map(str, files))]
        ).fetchall()
    assert rows == before[:8] and table_rows(log) == before[8:]
    assert intact(log)
    if os.name == "posix":
        assert mode(folder) == mode(folder.parent) == 0o700
        assert {mode(path) for path in folder.iterdir()} == {0o600}


@one_engine
def test_archive_that_cannot_be_written_purges_nothing(log: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("a file")
    with pytest.raises(m.StoreError, match="no archive can be written"):
        store_of(log).purge(moment(START_NS + DAY_NS), archive=str(tmp_path / "archive"))
    assert count(log) == 12 and intact(log)


def test_archive_that_reads_back_differently_purges_nothing(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "OLD_OF_FILE", m.OLD_OF_FILE.replace("ORDER BY", "AND seq > 1 ORDER BY"))
    with pytest.raises(m.StoreError, match="read back"):
        store_of(log).purge(moment(START_NS + DAY_NS), archive=str(tmp_path / "archive"))
    assert count(log) == 12 and intact(log) and not list((tmp_path / "archive").iterdir())


# --- retention


def test_vouched_limit_counts_only_time_that_the_ledger_vouches_for(engine: str) -> None:
    now = 1_899_997_200  # an hour begins
    session = m.open_engine()
    session.execute("ATTACH ':memory:' AS audit")
    for gaps_hours, expected_hours in (  # with 90 days of retention
        ([1] * 2400, 90 * 24),  # busy all the time
        ([24] * 100, 90 * 24),  # an entry a day
        ([24] * 30, None),  # the ledger is younger than that
        ([24] * 89, None),
        ([10 * 8760] + [24] * 60, None),  # the clock jumped ten years, at last
        ([1] * 48 + [10 * 8760] + [24] * 100, 10 * 8760 + 90 * 24),  # two days ago
        ([720] + [24] * 100, 720 + 90 * 24),  # off for a month: events stay a month longer
        ([-24] + [24] * 100, 90 * 24),  # an entry from the future
        ([0], None),
        ([], None),
    ):
        ledger = "(journal VARCHAR, position BIGINT, ingested_at TIMESTAMP)"
        session.execute(f"CREATE OR REPLACE TABLE audit.ledger {ledger}")
        times = itertools.accumulate(gaps_hours, lambda at, gap: at - gap * 3600, initial=now)
        rows = [f"('x', {n}, make_timestamp({at * 10**6}))" for n, at in enumerate([*times][1:])]
        # Of the entries that are not believed, one would make the ledger look older than it is.
        rows.append(f"('forged', 1, make_timestamp({(now - 90 * 86_400) * 10**6}))")
        session.execute(f"INSERT INTO audit.ledger VALUES {', '.join(rows)}")
        limit = m.vouched_limit(session, utc_text(now), 90 * 24 * 3_600_000_000, {("forged", 1)})
        assert limit == (None if expected_hours is None else utc_text(now - expected_hours * 3600)), (
            gaps_hours
        )
    session.close()


def utc_text(seconds: int) -> str:
    return m.sql_time(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc))


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[datetime.datetime]]:
    """Let a test say what the time is."""
    now = [datetime.datetime.fromtimestamp(START_NS / 1e9, datetime.timezone.utc)]
    monkeypatch.setattr(m, "utc_now", lambda: now[0])
    yield now


def live(database: Path, days: int, today: list[datetime.datetime], **settings: Any) -> m.Store:
    """Let a log live: an event and an ingest each day, the first now."""
    for _ in range(days):
        write_segment(database, int(today[0].timestamp()) * 10**9, 1)
        store = ingest(database, **settings)
        today[0] += datetime.timedelta(days=1)
    return store


def test_retention_removes_at_start_what_is_old_and_verifies(
    engine: str, tmp_path: Path, today: list[datetime.datetime]
) -> None:
    database = tmp_path / "log.duckdb"
    live(database, 4, today)
    assert count(database) == 4
    live(database, 1, today, retention="2d")
    assert count(database) == 3 and intact(database)
    live(database, 2, today, retention="2d")
    assert count(database) == 3 and store_of(database).verify().purged == 4


@one_engine
def test_retention_clock_that_jumped_forward_removes_nothing(
    engine: str, tmp_path: Path, today: list[datetime.datetime]
) -> None:
    database = tmp_path / "log.duckdb"
    live(database, 4, today, retention="2d")
    assert count(database) == 3
    today[0] += datetime.timedelta(days=3650)
    live(database, 1, today, retention="2d")
    assert count(database) == 4
    live(database, 2, today, retention="2d")  # a day of life moves the limit by a day, as before
    assert count(database) == 3 and intact(database)


@one_engine
def test_retention_without_events_enters_a_check_a_day(
    engine: str, tmp_path: Path, today: list[datetime.datetime]
) -> None:
    database = tmp_path / "log.duckdb"
    store = live(database, 1, today, retention="90d")
    assert store.ingest() and store.verify().entries == 2  # each store does it once
    assert ingest(database, retention="90d").verify().entries == 3 and store.verify().intact


@one_engine
def test_retention_of_a_logger_goes_by_its_setting(
    engine: str, tmp_path: Path, today: list[datetime.datetime]
) -> None:
    database = tmp_path / "log.duckdb"
    live(database, 4, today)
    with m.AuditLogger(database, retention="2d") as audit:
        audit.log_event("cli", "tool", "new")
    assert [row[3] for row in table_rows(database)][-1] == "new" and count(database) == 3
    assert audit.counters.errors == 0


# --- backup


def test_backup_is_one_file_with_what_running_servers_have_written(
    log: Path, tmp_path: Path, cli: Any
) -> None:
    write_segment(log, START_NS + 3 * DAY_NS, 2)  # sealed
    live_segment = m.Journal(f"{log}.journal").open_segment()
    line = b'{"timestamp":"2026-06-01T00:00:00.000000Z","name":"live","input_json":"{}"'
    live_segment.append(m.finish_line(line, 1) + b'{"half', 1)
    copy = tmp_path / "copies" / "b.duckdb"
    copy.parent.mkdir()
    done = cli("backup", "--db", str(log), str(copy))
    assert done.returncode == 0 and "15 events copied" in done.stdout, done
    assert count(copy) == 15 and intact(copy) and len(store_of(copy).heads()) == 2
    assert table_rows(copy)[:12] == table_rows(log)
    assert mode(copy) == 0o600 and [path.name for path in copy.parent.iterdir()] == ["b.duckdb"]
    live_segment.forget()


@one_engine
def test_backup_overwrites_nothing(log: Path, tmp_path: Path) -> None:
    for name in ("b.duckdb", "c.duckdb.wal", "d.duckdb.journal"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(m.StoreError, match="nothing is overwritten"):
            store_of(log).backup(str(tmp_path / name[:8]))
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(m.StoreError, match="can't be written"):
        store_of(log).backup(str(tmp_path / "nowhere" / "b.duckdb"))


def test_backup_that_differs_is_refused(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dict(
        m.SAME_CONTENT, logs=m.SAME_CONTENT["logs"].replace("fresh.logs t", "fresh.logs t WHERE seq > 1")
    )
    monkeypatch.setattr(m, "SAME_CONTENT", other)
    with pytest.raises(m.StoreError, match="differs"):
        store_of(log).backup(str(tmp_path / "b.duckdb"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".b", "b"))] == []


@one_engine
def test_backup_where_there_are_no_links_overwrites_nothing_either(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "b.duckdb"

    def link(path: str, target: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    store_of(log).backup(str(place))
    assert table_rows(place) == table_rows(log)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OSError, match="no links here"):
        m._put_in_place(str(place), str(tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "mine"


# --- compact


def test_compact_gives_space_back_and_keeps_everything(engine: str, tmp_path: Path, cli: Any) -> None:
    database = tmp_path / "log.duckdb"
    for number in range(2):
        write_segment(database, START_NS + number * 20 * DAY_NS, 2_000, session_id=os.urandom(200).hex())
        ingest(database)
    table_write(database, "CREATE VIEW mine AS SELECT name FROM logs")
    store_of(database).purge(moment(START_NS + 20 * DAY_NS))
    database.chmod(0o640)
    rows = table_rows(database)
    done = cli("compact", "--db", str(database))
    before, after = (int(word) for word in done.stdout.split() if word.isdigit())
    assert done.returncode == 0 and after < 0.8 * before and after == database.stat().st_size, done
    assert table_rows(database) == rows and intact(database)
    assert len(table_rows(database, "SELECT * FROM mine")) == 2_000
    assert mode(database) == 0o640
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"log.duckdb", "log.duckdb.journal"}


@one_engine
def test_compact_that_cannot_be_written_leaves_the_old_one(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = log.read_bytes()

    def replace(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(m.StoreError, match="can't be written anew: full"):
        store_of(log).compact()
    assert log.read_bytes() == before and not list(log.parent.glob("*.compact"))


def test_purge_and_compact_while_another_ingests_wait_and_give_up(log: Path) -> None:
    rows = table_rows(log)
    with store_of(log).journal.ingest_lock():
        for work in (
            lambda store: store.purge(moment(START_NS + 9 * DAY_NS), wait=0),
            lambda store: store.compact(wait=0.1),
        ):
            with pytest.raises(m.DatabaseLockedError, match="another process is ingesting"):
                work(store_of(log))
    assert table_rows(log) == rows


def test_compact_locked_database_says_who_holds_it(log: Path, process_cli: Any) -> None:
    with duckdb.connect(str(log)):
        done = process_cli("compact", "--db", str(log), "--wait", "0.1")
    assert done.returncode == 75 and str(os.getpid()) in done.stderr


def test_random_sequences_of_everything_that_removes_or_copies_stay_intact() -> None:
    import torture_evidence

    assert "each log intact" in torture_evidence.sequences(2)


@pytest.mark.parametrize("operation", ["purge", "archive", "backup", "restore", "compact"])
def test_removal_killed_at_a_system_call_loses_nothing(operation: str) -> None:
    if shutil.which("strace") is None or shutil.which("taskset") is None:
        pytest.skip("strace and taskset are needed to kill a process at a chosen system call")
    import torture_evidence

    assert (
        torture_evidence.torture(operation, sample=2) > 0
    )  # killed so often, and each time nothing was lost


# --- access


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_database_and_its_wal_are_readable_by_their_owner_alone(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "log.duckdb"
    seen = []
    enter = m.Ledger.enter

    def look(self: m.Ledger, *arguments: Any) -> m.Head:
        seen.append(mode(Path(f"{database}.wal")))
        return enter(self, *arguments)

    monkeypatch.setattr(m.Ledger, "enter", look)
    mask = os.umask(0)
    try:
        for _ in range(2):
            write_segment(database, START_NS, 1)
            ingest(database)
    finally:
        os.umask(mask)
    assert seen == [0o600, 0o600] and mode(database) == 0o600
    assert mode(Path(f"{database}.journal")) == 0o700
    assert not Path(f"{database}.wal").exists()


@pytest.mark.skipif(os.name != "posix", reason="links and owners are those of POSIX")
@one_engine
def test_journal_that_is_a_link_is_refused(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    (tmp_path / "elsewhere").mkdir()
    Path(f"{database}.journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(m.JournalError, match="symbolic link"):
        write_segment(database, START_NS, 1)
    with pytest.raises(m.JournalError, match="symbolic link"):
        store_of(database).ingest()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a directory away")
@one_engine
def test_journal_of_another_user_is_refused(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "log.duckdb"
    write_segment(database, START_NS, 1)
    os.chown(f"{database}.journal", 12345, 12345)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(m.JournalError, match="belongs to user 12345"):
        store_of(database).ingest()


@pytest.mark.skipif(os.name != "posix", reason="links are those of POSIX")
@pytest.mark.parametrize("name", ["journal.id", "ingest.lock"])
@one_engine
def test_journal_file_that_is_a_link_is_not_followed(engine: str, tmp_path: Path, name: str) -> None:
    database = tmp_path / "log.duckdb"
    write_segment(database, START_NS, 1)
    target = tmp_path / "target"
    target.write_text("mine")
    Path(f"{database}.journal", name).unlink(missing_ok=True)
    Path(f"{database}.journal", name).symlink_to(target)
    with pytest.raises((m.AuditError, OSError)):
        store_of(database).ingest()
    assert target.read_text() == "mine"


@one_engine
def test_retention_that_fails_does_not_keep_events_out(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def retain(*args: Any) -> None:
        raise m.QueryError("unforeseen")

    monkeypatch.setattr(m, "retain", retain)
    rows = len(table_rows(log))
    write_segment(log, START_NS + 5 * DAY_NS, 3)
    ingest(log, retention="1d")
    assert len(table_rows(log)) == rows + 3 and "old events could not be purged" in caplog.text
