"""What operators do around a log: copies put back, commands as root, readers without a break."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ROOT,
    SAFETY_SECONDS,
    child_environment,
    held_database,
    one_engine,
    table_rows,
    wait_until,
)
from evidence import DAY_NS, START_NS, ingest, make_log, store_of, write_segment

import mxcp_audit as m

Cli = Any


@pytest.fixture
def log(engine: str, copy_of: Any) -> Path:
    return copy_of(make_log, 2)  # type: ignore[no-any-return]


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


@one_engine
def test_restore_of_an_earlier_version_s_backup_takes_its_journal_in(log: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.duckdb"
    shutil.copy(log, old)
    write_segment(old, START_NS + 3 * DAY_NS, 2)
    log.unlink()
    assert store_of(log).restore(str(old)).events == 10 and store_of(log).verify().intact
    assert len(store_of(old).journal.segments()) == 1  # a backup is not changed


@one_engine
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


@one_engine
def test_a_path_of_pairs_is_no_partition_whose_values_are_taken_for_columns(
    engine: str, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "name=other" / "filename=x" / "logs.duckdb"
    with m.AuditLogger(path) as audit:
        audit.log_event("cli", "tool", "mine", {})
    store_of(path).ingest()
    segment = write_segment(path, START_NS, 2)
    with store_of(path).reading() as reading:  # what waits in the journal, too
        names = [dict(zip(m.PUBLIC_COLUMNS, row))["name"] for row in reading.rows(m.Filter())]
    assert names[0] == "mine" and "other" not in names and len(names) == 3, (names, segment)
    store_of(path).ingest()
    assert store_of(path).purge("2100-01-01 00:00:00", archive=str(path.parent / "archive")).events == 3


@one_engine
def test_without_a_temporary_directory_the_journal_s_is_used(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # as in a container with a read-only root
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    path = tmp_path / "logs.duckdb"
    for number in range(10):
        write_segment(path, START_NS + number * DAY_NS, 1)
    with store_of(path).reading() as reading:  # small segments are put together
        assert len(list(reading.rows(m.Filter()))) == 10
    assert store_of(path).ingest() and store_of(path).verify().intact and len(events(path)) == 10
    assert not list(tmp_path.glob("*.journal/mxcp_audit-*"))


# --- words and names


@one_engine
def test_show_takes_the_part_of_an_id_that_tells(log: Path, cli: Cli) -> None:
    ids = [event["event_id"] for event in json.loads(cli("log", "--json", "--db", str(log)).stdout)]
    chosen = ids[3]
    for part in (chosen, chosen.rpartition("-")[2]):
        assert json.loads(cli("show", part, "--json", "--db", str(log)).stdout)["event_id"] == chosen
    done = cli("show", chosen[:8], "--db", str(log))
    assert done.returncode == 2 and "may be any of" in done.stderr
    assert cli("show", "0:9", "--db", str(log)).returncode == 1


@one_engine
def test_log_of_a_database_without_our_table_says_so(log: Path, cli: Cli) -> None:
    with store_of(log).target.session(SAFETY_SECONDS, write=True) as engine:
        engine.execute("DROP TABLE audit.logs")
    done = cli("log", "--db", str(log))
    assert done.returncode == 1 and "logs is missing beside its ledger; see what `verify`" in done.stderr


def test_paths_and_keys_that_cannot_be_are_refused_with_the_reason(tmp_path: Path, cli: Cli) -> None:
    for name in ("a?b.duckdb", *(["a\\b.duckdb"] if os.name == "posix" else [])):
        with pytest.raises(m.ConfigError, match="can't write where a path holds"):
            m.AuditLogger(tmp_path / name)
    code = (
        "import sys, mxcp_audit as m\n"
        "with m.AuditLogger(sys.argv[1], redact_mode='hmac') as a: a.log_event('cli', 'tool', 't', {})"
    )
    environment = {**{key.encode(): value.encode() for key, value in child_environment().items()}}
    environment[b"MXCP_AUDIT_KEY"] = b"\xff\xfe"
    command = [sys.executable, "-c", code, str(tmp_path / "k.duckdb")]
    done = subprocess.run(
        command, env={**environment, b"PYTHONPATH": str(ROOT).encode()}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_sql_of_the_last_hour_and_warnings_of_the_program(log: Path, tmp_path: Path, cli: Cli) -> None:
    now = tmp_path / "now.duckdb"
    with m.AuditLogger(now) as audit:
        audit.log_event("cli", "tool", "now", {})
    query = "SELECT count(*) AS n FROM logs WHERE timestamp > now() - INTERVAL 1 HOUR"
    done = cli("sql", query, "--json", "--db", str(now), TZ="Asia/Tokyo")
    assert json.loads(done.stdout) == [{"n": 1}], done
    rows = "SELECT row(1, 'a') AS a, [row(1, 2)] AS b, {'x': 1} AS c"
    said = json.loads(cli("sql", rows, "--json", "--db", str(now)).stdout)[0]
    assert said["a"] in ([1, "a"], "(1, a)") and said["b"] == [[1, 2]] and said["c"] == {"x": 1}
    for command in (["log", "--grep", "\udcff"], ["sql", "SELECT '\udcff'"], ["show", "\udcff"]):
        done = cli(*command, "--db", str(now))
        assert done.returncode == 2 and "is no" in done.stderr, done
    lists = "SELECT list_transform([1, 2], x -> x + 1) AS a FROM range(3)"
    done = cli("sql", lists, "--json", "--db", str(now))
    refused = done.returncode and "lambda" in done.stderr  # since 2.0; before that, a warning at most
    assert refused or json.loads(done.stdout) == [{"a": [2, 3]}] * 3, done
    with contextlib.closing(m.open_engine()) as engine:
        if not refused:  # nor does a warning hide the end of a statement that has no rows
            engine.execute("CREATE TEMP VIEW v AS SELECT list_transform([1], x -> x + 1) AS a")


def test_long_name_pads_no_other_row(tmp_path: Path, cli: Cli) -> None:
    with m.AuditLogger(tmp_path / "x.duckdb") as audit:
        for number in range(50):
            audit.log_event("cli", "tool", "n" * (1000 if number == 7 else 1), {})
    assert len(cli("log", "--db", str(tmp_path / "x.duckdb")).stdout) < 50 * 200


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


# --- tables that others made

_COLUMNS = {column.name: column.sql_type for column in m.COLUMNS[:10]}
_VALUES = "'cli', 'tool', 'n', '{}', 5, 'n/a', NULL, 'success', NULL"


@pytest.mark.parametrize(
    ("table", "changes", "value"),
    [
        ("LOGS", {}, "TIMESTAMP '2026-01-01 12:00'"),
        ("logs", {"TIMESTAMP": "TIMESTAMP"}, "TIMESTAMP '2026-01-01 12:00'"),
        (
            "logs",
            {"timestamp": "TIMESTAMPTZ", "duration_ms": "BIGINT"},
            "TIMESTAMPTZ '2026-01-01 21:00:00+09'",
        ),
        ("logs", {"name": "VARCHAR NOT NULL"}, "TIMESTAMP '2026-01-01 12:00'"),
    ],
)
def test_table_of_somebody_else_is_read_entered_and_verified(
    engine: str, tmp_path: Path, cli: Cli, table: str, changes: dict[str, str], value: str
) -> None:
    duckdb = pytest.importorskip("duckdb")
    database = tmp_path / "log.duckdb"
    columns = {**{k: v for k, v in _COLUMNS.items() if k.upper() not in changes}, **changes}
    if "TIMESTAMP" in changes:
        columns = {name.upper(): columns.get(name, columns.get(name.upper(), "")) for name in _COLUMNS}
    ordered = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    if list(map(str.lower, columns)) != list(_COLUMNS):
        ordered = ", ".join(f"{name} {changes.get(name, kind)}" for name, kind in _COLUMNS.items())
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'Asia/Tokyo'")
        connection.execute(f"ATTACH '{database}' AS old (STORAGE_VERSION 'v1.0.0'); USE old")
        connection.execute(f"CREATE TABLE {table} ({ordered})")
        connection.execute(f"INSERT INTO logs VALUES ({value}, {_VALUES})")
    for expected in (1, 2):
        shown = json.loads(cli("log", "--json", "--db", str(database), TZ="Asia/Tokyo").stdout)
        assert len(shown) == expected and shown[-1]["timestamp"].startswith("2026-01-01T12:00:00")
        assert (shown[-1]["name"], shown[-1]["duration_ms"]) == ("n", 5)
        assert store_of(database).verify().intact
        if expected == 1:
            write_segment(database, START_NS, 1)
            ingest(database)
    removal = store_of(database).purge("2026-02-01 00:00:00.000000")
    assert removal.events == 1 and not removal.wrong and store_of(database).verify().intact


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("CREATE TABLE logs (timestamp TIMESTAMP, name VARCHAR, extra INTEGER NOT NULL)", "takes no events"),
        ("CREATE VIEW logs AS SELECT content AS name FROM read_text('{secret}')", "is a view"),
        ("CREATE TABLE logs (timestamp VARCHAR, name BLOB)", "takes no events"),
    ],
)
@one_engine
def test_table_that_cannot_hold_our_events_is_told_and_harmless(
    engine: str, tmp_path: Path, run: Cli, definition: str, reason: str
) -> None:
    duckdb = pytest.importorskip("duckdb")
    database, secret = tmp_path / "log.duckdb", tmp_path / "secret"
    secret.write_text("hunter2")
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{database}' AS old (STORAGE_VERSION 'v1.0.0'); USE old")
        connection.execute(definition.format(secret=secret))
    write_segment(database, START_NS, 1)
    said = ""
    for command in (["ingest"], ["log"], ["log", "--json"], ["stats"], ["doctor"], ["verify"]):
        done = run(*command, "--db", str(database))
        assert "Traceback" not in done.stderr and "hunter2" not in done.stdout + done.stderr, command
        said += done.stderr
    assert reason in said
    assert len(store_of(database).journal.segments()) == 1


@one_engine
def test_journal_of_one_database_takes_no_other(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.duckdb"
    write_segment(other, START_NS, 1, journal=Path(f"{log}.journal"))
    with pytest.raises(m.JournalError, match=r"holds the events of .*log\.duckdb; .*other\.duckdb needs one"):
        store_of(other, journal=Path(f"{log}.journal")).ingest()
    assert not other.exists()
    log.rename(tmp_path / "moved.duckdb")  # the database has another place from now on
    assert store_of(tmp_path / "moved.duckdb", journal=Path(f"{log}.journal")).ingest()
    assert len(events(tmp_path / "moved.duckdb")) == 9


@pytest.mark.skipif(os.name != "posix", reason="links are those of POSIX")
@one_engine
def test_journal_by_another_name_of_its_folder_stays_the_same(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(tmp_path)
    for number, database in enumerate((other / "log.duckdb", log, other / "log.duckdb"), 1):
        write_segment(database, START_NS + (5 + number) * DAY_NS, 1)
        ingest(database)
    assert len(store_of(log).heads()) == 1 and len(events(log)) == 11


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
@one_engine
def test_link_to_where_no_database_is_yet_stays_one(engine: str, tmp_path: Path) -> None:
    link, there = tmp_path / "log.duckdb", tmp_path / "volume" / "real.duckdb"
    link.symlink_to(there)
    for number in range(2):
        write_segment(link, START_NS + number * DAY_NS, 2)
        ingest(link)
    assert link.is_symlink() and not there.is_symlink() and len(events(there)) == 4
    assert store_of(link).verify().intact and os.listdir(there.parent) == [there.name]


@one_engine
def test_copied_journal_goes_on_under_a_name_of_its_own(log: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(log, copy)
    shutil.copytree(f"{log}.journal", copy / "log.duckdb.journal")
    for database in (log, copy / "log.duckdb"):
        write_segment(database, START_NS + 5 * DAY_NS, 1)
        ingest(database)
        assert store_of(database).verify().intact
    assert len(store_of(copy / "log.duckdb").heads()) == 2 and len(store_of(log).heads()) == 1


@pytest.mark.parametrize(
    "change", [lambda b: b[:20], lambda b: b.replace(b"5", b'"5"'), lambda b: b.replace(b"no", b"\\u0000")]
)
@one_engine
def test_record_of_a_loss_that_was_damaged_is_entered(log: Path, change: Any) -> None:
    journal = store_of(log).journal
    path = Path(journal.record_loss(m.Loss(5, "2026-01-01", "2026-01-02", "no space")))
    path.write_bytes(change(path.read_bytes()))
    ingest(log)
    assert not path.exists() and "damaged" in str(store_of(log).verify().notes) + str(
        table_rows(log, "SELECT detail FROM ledger WHERE kind = 'loss'")
    )


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


# --- at the terminal


def test_show_around_an_event_is_its_session_and_no_other(tmp_path: Path, cli: Cli) -> None:
    database = str(tmp_path / "log.duckdb")
    with m.AuditLogger(database) as audit:
        for number in range(20):
            audit.log_event("cli", "tool", str(number), session_id=f"s{number % 2}")
        audit.log_event("cli", "tool", "alone")
    (event,) = json.loads(cli("log", "--db", database, "--json", "--tool", "10").stdout)
    shown = json.loads(cli("show", event["event_id"], "--db", database, "--around", "2", "--json").stdout)
    assert [row["name"] for row in shown] == ["6", "8", "10", "12", "14"]
    table = cli("show", event["event_id"], "--db", database, "--around", "1").stdout
    assert [line.split()[4] for line in table.splitlines()[1:]] == ["8", "10", "12"]
    (event,) = json.loads(cli("log", "--db", database, "--json", "--tool", "alone").stdout)
    done = cli("show", event["event_id"], "--db", database, "--around", "1")
    assert done.returncode == 2 and "has no session" in done.stderr


def test_csv_is_harmless_whatever_cannot_be_seen_before_a_formula(tmp_path: Path, cli: Cli) -> None:
    database, export = str(tmp_path / "log.duckdb"), tmp_path / "t.csv"
    starts = ("", "\u200b", "\ufeff \u2060", "\u00a0")
    with m.AuditLogger(database) as audit:
        for start in starts:
            audit.log_event("cli", "tool", f"{start}=1+1")
    assert cli("log", "--db", database, "--export", str(export), "--bom").returncode == 0
    assert export.read_bytes().startswith(codecs.BOM_UTF8) and export.stat().st_mode & 0o777 == 0o600
    assert all(f"'{start}=1+1" in export.read_text("utf-8-sig") for start in starts)
    for start in starts:
        out = cli(
            "sql", f'SELECT name AS "{start}=2" FROM logs ORDER BY ALL', "--db", database, "--csv"
        ).stdout
        head, *cells = out.splitlines()
        assert head == f"'{start}=2" and sorted(cells) == sorted(f"'{start}=1+1" for start in starts)


# --- users and groups


def python_for_all() -> tuple[str, str]:
    """Return a Python that any user may run, and where it finds DuckDB."""
    packages = str(Path(pytest.importorskip("duckdb").__file__).parent.parent)
    python = f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    if os.geteuid() or not os.path.exists(python):
        pytest.skip(f"needs root, and {python}")
    return python, packages


SERVE = """
import sys, mxcp_audit
with mxcp_audit.AuditLogger.from_config() as audit:
    for number in range(5):
        audit.log_event("cli", "tool", f"{sys.argv[1]}-{number}", {"number": number}, user_id=sys.argv[1])
"""


EACH = """
import json, sys, mxcp_audit
for command in json.loads(sys.argv[1]):
    assert mxcp_audit.main(command) == 0, command
"""


@pytest.mark.parametrize("group", [False, True])
def test_walk_of_service_root_and_group_ends_with_every_event_and_mode(group: bool) -> None:
    """As in a container: installing, first event, every command, retention, backup, restore, compact."""
    python, packages = python_for_all()
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        home = Path(top, "srv")
        home.mkdir()
        shutil.copy(ROOT / "mxcp_audit.py", home)
        audit = f"{{enabled: true, path: log.duckdb, group: {str(group).lower()}}}"
        site = f"profiles: {{default: {{audit: {audit}}}}}\n"
        (home / "mxcp-site.yml").write_text(site)
        for path in (home, *home.iterdir()):
            os.chown(path, 10001, 5000)
            os.chmod(path, 0o770 if path == home and group else 0o700 if path == home else 0o640)

        def run(user: int, *arguments: str, gid: int = 5000) -> subprocess.CompletedProcess[str]:
            who: dict[str, Any] = {"user": user, "group": gid, "extra_groups": []} if user else {}
            command = [python, *(("-m", "mxcp_audit") if arguments[0] != "-c" else ()), *arguments]
            environment = {"PYTHONPATH": packages, "PATH": os.environ["PATH"], "HOME": str(home)}
            done = subprocess.run(
                command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, **who
            )
            assert "Traceback" not in done.stderr, done.stderr
            return done

        def walk(user: int, *commands: list[str]) -> None:
            done = run(user, "-c", EACH, json.dumps(commands))
            assert done.returncode == 0, (user, commands, done.stderr, done.stdout)

        users = [10001, 10002] if group else [10001]
        assert run(0, "purge", "--older-than", "90d").returncode == 1  # before the first event
        for user in users:
            assert run(user, "-c", SERVE, str(user)).returncode == 0
        old = json.dumps(
            {"timestamp": "2020-01-01T00:00:00Z", "caller": "cli", "type": "tool", "name": "old"}
            | {"input_json": "{}", "duration_ms": 1, "policy_decision": "n/a", "status": "success"}
        )
        (home / "old.jsonl").write_text(old + "\n")
        os.chmod(home / "old.jsonl", 0o644)
        os.chown(home / "old.jsonl", 10001, 5000)
        looks = [["log"], ["doctor"], ["verify"], ["sql", "SELECT count(*) FROM logs"], ["compact"]]
        for user in (users[-1], 0):
            walk(user, ["import", "old.jsonl"], ["ingest"], *looks)
        walk(0, ["backup", "copy.duckdb"])
        assert run(users[-1], "-c", SERVE, "late").returncode == 0
        purge = ["purge", "--older-than", "365d", "--archive", "archive"]
        walk(0, purge, ["log", "--export", "all.csv"], ["report", "--out", "report.html"])
        walk(0, ["restore", "copy.duckdb"])
        assert run(users[-1], "-c", SERVE, "last").returncode == 0
        shown = run(users[0], "log", "--json", "-n", "999")
        assert shown.returncode == 0, shown.stderr
        names = {row["name"] for row in json.loads(shown.stdout)}
        assert names == {"old"} | {f"{who}-{n}" for who in (*users, "late", "last") for n in range(5)}
        walk(users[0], ["verify"])
        assert run(10003, "log", "--db", str(home / "log.duckdb"), gid=5001).returncode != 0
        journal = home / "log.duckdb.journal"
        mode = {path.relative_to(home).as_posix(): path.stat().st_mode & 0o7777 for path in home.rglob("*")}
        private = 0o660 if group else 0o600
        assert mode["log.duckdb"] == private and mode["log.duckdb.journal"] == (0o2770 if group else 0o700)
        assert {mode[f"log.duckdb.journal/{path.name}"] for path in journal.iterdir()} == {private}
        owners = {path.name: path.stat().st_uid for path in home.rglob("*") if "pycache" not in str(path)}
        assert not {name: owner for name, owner in owners.items() if owner not in users}
        assert {path.stat().st_gid for path in journal.iterdir()} == {5000}


# --- what is taken away


@pytest.mark.parametrize("how", ["moved", "mounted over", "unmounted"])
def test_journal_that_is_taken_away_goes_on_and_what_waited_in_it_comes_back_with_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The database is held, so that a sealed segment waits beside the one that is written."""
    database, journal = tmp_path / "log.duckdb", tmp_path / "log.duckdb.journal"
    journal.mkdir(0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "mode=700", "none", str(journal)]
    mounted = how == "unmounted" and not subprocess.run(mount, capture_output=True).returncode
    try:
        audit = m.AuditLogger(database, flush_interval=0.1)
        with held_database(database):
            for number in range(5):
                audit.log_event("cli", "tool", str(number))
            wait_until(lambda: audit._writer._appender.sealed)
            if how == "moved":
                journal.rename(tmp_path / "elsewhere")
            elif how == "mounted over":
                mounted = not subprocess.run(mount, capture_output=True).returncode
            elif mounted:
                mounted = bool(subprocess.run(["umount", "-l", journal]).returncode)
            is_memory = how == "unmounted" and not mounted and not any(journal.iterdir())
            for number in range(5, 10):
                audit.log_event("cli", "tool", str(number))
            wait_until(lambda: audit.counters.written == 10)
        assert audit.shutdown()
        if mounted and how == "mounted over":
            mounted = bool(subprocess.run(["umount", "-l", journal]).returncode)
        for path in (tmp_path / "elsewhere").glob("*.jsonl"):
            shutil.copy(path, journal)
        store_of(database).ingest()
        assert "5 events went away with" in caplog.text
        expected = range(5 if is_memory else 0, 10)  # what was in memory is gone with it
        assert sorted(name for name, *_ in events(database)) == [str(number) for number in expected]
        assert store_of(database).verify().intact
    finally:
        if mounted:
            subprocess.run(["umount", "-l", journal], check=True)


def test_relative_path_is_told_as_an_absolute_one_at_the_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MCP hosts start servers in folders of their own, where a log would be looked for in vain."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "mxcp_audit"), m.AuditLogger("logs.duckdb") as audit:
        monkeypatch.chdir("/")
        audit.log_event("cli", "tool", "t")
        audit.flush()
    assert f"events go to {tmp_path}/logs.duckdb, by way of {tmp_path}/logs.duckdb.journal" in caplog.text
    assert (tmp_path / "logs.duckdb").exists()
