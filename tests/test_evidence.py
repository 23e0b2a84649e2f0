"""The ledger, verify and checkpoints: whatever is changed shows, and nothing else does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, child_environment
from evidence import DAY_NS, START_NS, ingest, moment, store_of, write_segment

import mxcp_audit as m

duckdb = pytest.importorskip("duckdb")

spec = importlib.util.spec_from_file_location("independent", ROOT / "tools" / "verify_independently.py")
assert spec is not None and spec.loader is not None
independent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(independent)

# With a key and without: 1,000 on each engine.
TAMPERINGS = int(os.environ.get("MXCP_TEST_TAMPERINGS", "500"))
LEGACY = """\
CREATE TABLE logs (timestamp TIMESTAMP, caller VARCHAR, type VARCHAR, name VARCHAR, input_json VARCHAR,
    duration_ms INTEGER, policy_decision VARCHAR, reason VARCHAR, status VARCHAR, error VARCHAR);
INSERT INTO logs SELECT TIMESTAMP '2026-05-01' + INTERVAL (i * 7) HOUR, 'cli', 'tool', 'old' || i, '{}', i,
    'n/a', NULL, 'success', NULL FROM range(6) t(i)"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with everything in it: old rows, two journals, a loss, a purge that split segments."""
    database = tmp_path_factory.mktemp("sample") / "log.duckdb"
    other = database.parent / "other.journal"
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{database}' AS old (STORAGE_VERSION 'v1.0.0')")
        connection.execute(f"USE old; {LEGACY}; CHECKPOINT old")
    for number in range(3):
        write_segment(database, START_NS + number * DAY_NS, 2 + number)
        ingest(database)
    write_segment(database, START_NS + DAY_NS, 3, journal=other)
    broken = write_segment(database, START_NS + 3 * DAY_NS, 3)
    path = Path(f"{database}.journal", broken + ".jsonl")
    path.write_bytes(path.read_bytes().replace(b'"seq":2}', b'"seq":"2"}'))
    ingest(database, journal=other)
    ingest(database)
    removal = store_of(database).purge(moment(START_NS + DAY_NS + 90 * 10**9))
    assert removal.events == 6 + 2 + 2 + 2 and not removal.wrong
    write_segment(database, START_NS + 4 * DAY_NS, 1)
    write_segment(database, START_NS + 4 * DAY_NS, 5, journal=other)
    ingest(database, journal=other)
    ingest(database)
    return database


class Tamperer:
    """Makes random statements, each a change of one cell, row, pair or end of a table."""

    def __init__(self, engine: m.Engine, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = engine
        self.counts = {
            table: engine.execute(f"SELECT count(*)::BIGINT FROM audit.{table}")[0][0]
            for table in ("logs", "ledger")
        }

    def row(self, table: str) -> str:
        """Return a condition that holds for one row."""
        return f"rowid = {self.rows(table, 1)[0]}"

    def rows(self, table: str, count: int) -> list[int]:
        found = self.engine.execute(f"SELECT rowid::BIGINT FROM audit.{table} ORDER BY rowid")
        return self.random.sample([rowid for (rowid,) in found], count)

    def cell(self) -> list[str]:
        table = self.random.choice(("logs", "ledger"))
        column = self.random.choice(m.COLUMNS if table == "logs" else m.LEDGER_COLUMNS)
        where, name = self.row(table), column.name
        value = self.random.choice(
            {
                "TIMESTAMP": [
                    "NULL",
                    "'infinity'",
                    "'-infinity'",
                    f"coalesce({name}, TIMESTAMP '2026-01-01') + INTERVAL 1 MICROSECOND",
                    f"{name} - INTERVAL 1 DAY",
                ],
                "VARCHAR": [
                    "NULL",
                    "''",
                    f"coalesce({name}, '') || ' '",
                    f"{name}[2:]",
                    "'|'",
                    f"upper({name})",
                    f"(SELECT max({name}) FROM audit.{table})",
                ],
            }.get(column.sql_type, ["NULL", "0", "-1", f"coalesce({name}, 0) + 1", "2147483647"])
        )
        return [f"UPDATE audit.{table} SET {name} = {value} WHERE {where}"]

    def boundary(self) -> list[str]:
        """Move a character from the end of one text to the beginning of the next."""
        where = self.row("logs")
        return [f"UPDATE audit.logs SET caller = caller[:-2], type = caller[-1:] || type WHERE {where}"]

    def delete(self) -> list[str]:
        table = self.random.choice(("logs", "logs", "ledger"))
        gone = self.rows(table, self.random.randint(1, min(3, self.counts[table] - 1)))
        return [f"DELETE FROM audit.{table} WHERE rowid IN ({', '.join(map(str, gone))})"]

    def insert(self) -> list[str]:
        table = self.random.choice(("logs", "logs", "ledger"))
        change = self.random.choice(
            {
                "logs": [
                    "",
                    "REPLACE (seq + 1000 AS seq)",
                    "REPLACE ('20260101T000000000000Z-00000000' AS segment)",
                    "REPLACE (NULL AS segment, NULL AS seq)",
                    "REPLACE ('legacy-2026-05-01' AS segment)",
                    "REPLACE ('' AS segment)",
                    "REPLACE (NULL AS timestamp, NULL AS segment)",
                    "REPLACE (NULL AS seq)",
                ],
                "ledger": [
                    "",
                    "REPLACE (position + 1 AS position)",
                    "REPLACE (position + 100 AS position)",
                    "REPLACE ('x' AS journal)",
                    "REPLACE (NULL AS journal)",
                    "REPLACE ('purge' AS kind, 'x' AS detail)",
                ],
            }[table]
        )
        return [f"INSERT INTO audit.{table} SELECT * {change} FROM audit.{table} WHERE {self.row(table)}"]

    def swap(self) -> list[str]:
        table = self.random.choice(("logs", "ledger"))
        columns = m.COLUMNS if table == "logs" else m.LEDGER_COLUMNS
        names = [column.name for column in columns]
        chosen = self.random.choice(
            ([self.random.choice(names)], ["segment", "seq"] if table == "logs" else names[:2])
        )
        one, two = self.rows(table, 2)
        return [
            f"CREATE OR REPLACE TEMP TABLE pair AS "
            f"SELECT rowid AS r, * FROM audit.{table} WHERE rowid IN ({one}, {two})",
            f"UPDATE audit.{table} SET {', '.join(f'{name} = pair.{name}' for name in chosen)} "
            f"FROM pair WHERE pair.r = {one} + {two} - {table}.rowid AND {table}.rowid IN ({one}, {two})",
        ]

    def table(self) -> list[str]:
        table = self.random.choice(("logs", "ledger"))
        column = self.random.choice(("segment", "events", "host", "detail"))
        return self.random.choice(
            [
                [f"DELETE FROM audit.{table}"],
                [f"ALTER TABLE audit.ledger DROP COLUMN {column}"],
                ["ALTER TABLE audit.logs DROP COLUMN trace_id"],
                [f"ALTER TABLE audit.{table} RENAME COLUMN segment TO segments"],
                ["ALTER TABLE audit.logs ALTER COLUMN duration_ms TYPE VARCHAR"],
                ["UPDATE audit.logs SET error = coalesce(error, '') || 'x' WHERE hash(rowid) % 2 = 0"],
            ]
        )

    def truncate(self) -> list[str]:
        """Cut off the newest entries of a journal, with their events: what only a checkpoint shows."""
        count = self.random.randint(1, 3)
        journals = self.engine.execute("SELECT DISTINCT journal::VARCHAR FROM audit.ledger ORDER BY 1")
        cut = (
            f"journal = '{self.random.choice(journals)[0]}' AND position > "
            f"(SELECT max(position) - {count} FROM audit.ledger l WHERE l.journal = ledger.journal)"
        )
        return [
            f"DELETE FROM audit.logs WHERE segment IN (SELECT segment FROM audit.ledger WHERE {cut})",
            f"DELETE FROM audit.ledger WHERE {cut}",
        ]


STATE = """\
SELECT (SELECT md5(string_agg(x::VARCHAR, '' ORDER BY x::VARCHAR)) FROM audit.logs x)::VARCHAR,
       (SELECT md5(string_agg(x::VARCHAR, '' ORDER BY x::VARCHAR)) FROM audit.ledger x)::VARCHAR"""
KINDS = ("cell", "cell", "cell", "boundary", "delete", "insert", "swap", "table", "truncate")


@pytest.mark.parametrize("key", [None, "secret"])
def test_verify_random_tampering_is_reported_and_nothing_else(
    engine: str, sample: Path, tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "log.duckdb"
    if key is None:
        shutil.copy(sample, database)
    else:
        monkeypatch.setenv("MXCP_AUDIT_KEY", key)
        make_keyed(database)
    keys = m.seal_keys()
    checkpoint = store_of(database).heads()
    noted = [head._asdict() for head in checkpoint]
    twin = shutil.copy(database, tmp_path / "twin.duckdb")
    session = m.open_engine()
    session.execute(f"ATTACH {m.sql_literal(str(database))} AS audit")
    # The independent verifier needs the package: for the program it sees the same change in a copy.
    connection = session._connection if engine == "package" else duckdb.connect()  # type: ignore[attr-defined]
    if engine == "cli":
        connection.execute(f"ATTACH {m.sql_literal(str(twin))} AS audit")
    seed = random.randrange(2**32)
    tamperer = Tamperer(session, seed)
    before = session.execute(STATE)
    assert m.Verifier(session, keys).run(checkpoint=checkpoint).intact
    assert not independent.verify(connection, keys=keys, checkpoints=noted)
    done = 0
    while done < TAMPERINGS // 2:
        kind = tamperer.random.choice(KINDS)
        session.execute("BEGIN")
        statements = getattr(tamperer, kind)()
        for statement in statements:
            session.execute(statement)
        changed = kind == "table" or session.execute(STATE) != before
        needs_checkpoint = kind == "truncate" or "DELETE FROM audit.ledger" in statements[-1]
        verdict = m.Verifier(session, keys).run(checkpoint=checkpoint if needs_checkpoint else ())
        said = f"seed {seed}, {statements}: {verdict.findings}"
        assert verdict.intact is not changed, said
        if engine == "cli":
            for statement in ("BEGIN", *statements):
                connection.execute(statement)
        wrong = independent.verify(connection, keys=keys, checkpoints=noted if needs_checkpoint else ())
        assert bool(wrong) is changed, said
        if kind != "table" and "audit.ledger" not in statements[-1]:
            segments = {finding.segment for finding in verdict.findings}
            assert segments == {where for what, where in wrong if what == "segment"}, said
        session.execute("ROLLBACK")
        if engine == "cli":
            connection.execute("ROLLBACK")
        done += changed
    session.close()
    connection.close()


def make_keyed(database: Path) -> None:
    """Make a log of one journal whose chain has a key from the start."""
    for number in range(4):
        write_segment(database, START_NS + number * DAY_NS, 3)
        ingest(database)
    assert store_of(database).purge(moment(START_NS + DAY_NS + 90 * 10**9)).events == 5


def test_verify_table_of_an_earlier_version_is_intact_and_stays_so(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    gone = [f"ALTER TABLE logs DROP COLUMN {column.name}" for column in m.NEW_COLUMNS]

    def verdicts() -> tuple[bool, bool]:
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH '{database}' AS audit (READ_ONLY)")
            return store_of(database).verify().intact, not independent.verify(connection, keys=[])

    write_segment(database, START_NS, 3, more=(None,) * 8)
    ingest(database)
    change(database, *gone)
    assert verdicts() == (True, True)
    write_segment(database, START_NS + DAY_NS, 4)
    ingest(database)
    assert verdicts() == (True, True)
    change(database, *gone)  # which now held something
    assert verdicts() == (False, False)


def test_purge_with_archive_of_an_earlier_version_s_table_works(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    write_segment(database, START_NS, 3, more=(None,) * 8)
    ingest(database)
    change(database, *(f"ALTER TABLE logs DROP COLUMN {column.name}" for column in m.NEW_COLUMNS))
    removal = store_of(database).purge(moment(START_NS + 90 * 10**9), archive=str(tmp_path / "old"))
    assert removal.events == 2 and store_of(database).verify().intact


# --- what is said


@pytest.fixture
def log(engine: str, tmp_path: Path) -> Path:
    """A database of two segments of four events."""
    database = tmp_path / "log.duckdb"
    for number in range(2):
        write_segment(database, START_NS + number * DAY_NS, 4)
        ingest(database)
    return database


def change(database: Path, *statements: str) -> None:
    """Do what somebody with the file and the `duckdb` package does."""
    with duckdb.connect(str(database)) as connection:
        for statement in statements:
            connection.execute(statement)


def segments_of(database: Path) -> list[str]:
    with duckdb.connect(str(database), read_only=True) as connection:
        rows = connection.execute("SELECT segment FROM ledger WHERE kind = 'segment' ORDER BY segment")
        return [segment for (segment,) in rows.fetchall()]


def said(database: Path, **options: Any) -> set[tuple[str, tuple[str, ...]]]:
    """Return kind and events of each finding."""
    verdict = store_of(database).verify(**options)
    return {(finding.kind, tuple(finding.event_ids)) for finding in verdict.findings}


def test_row_hash_documented_example_has_the_documented_form(engine: str) -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    form = "1000000|3|4|2|2|5|3||7|||||1|1|clitoolé{}n/asuccess"
    assert f"`{form}`" in page
    values = (
        "TIMESTAMP '1970-01-01 00:00:01' AS timestamp, 'cli' AS caller, 'tool' AS type, 'é' AS name, "
        "'{}' AS input_json, 5 AS duration_ms, 'n/a' AS policy_decision, NULL::VARCHAR AS reason, "
        "'success' AS status, NULL::VARCHAR AS error, NULL::VARCHAR AS user_id, NULL::VARCHAR AS session_id, "
        "NULL::VARCHAR AS trace_id, 'S' AS segment, 1 AS seq"
    )
    nulls = ", ".join(f"NULL::{c.sql_type} AS {c.name}" for c in m.NEW_COLUMNS)
    with_more = form + "|client:4:é/1|result_bytes:9"
    assert f"`{with_more}`" in page
    session = m.open_engine()
    for instead, text in (("", form), ("REPLACE ('é/1' AS client, 9::BIGINT AS result_bytes)", with_more)):
        source = f"SELECT * {instead} FROM (SELECT {values}, {nulls})"
        ((found,),) = session.execute(f"SELECT {m.row_hash(m.COLUMNS)}::VARCHAR AS hash FROM ({source})")
        assert found == hashlib.sha256(text.encode()).hexdigest()
    session.close()


def test_verify_log_of_the_other_engine_is_intact(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"package": "cli", "cli": "package"}[os.environ["MXCP_AUDIT_ENGINE"]]
    monkeypatch.setenv("MXCP_AUDIT_ENGINE", other)
    verdict = store_of(log).verify()
    assert verdict.intact and (verdict.events, verdict.segments, verdict.entries) == (8, 2, 2)


def test_verify_changed_removed_and_inserted_events_are_named(log: Path) -> None:
    first, second = segments_of(log)
    change(
        log,
        f"UPDATE logs SET name = 'x' WHERE segment = '{first}' AND seq = 2",
        f"DELETE FROM logs WHERE segment = '{first}' AND seq = 4",
        f"INSERT INTO logs SELECT * REPLACE (7 AS seq) FROM logs WHERE segment = '{second}' AND seq = 1",
        f"INSERT INTO logs SELECT * REPLACE ('y' AS name) FROM logs WHERE segment = '{second}' AND seq = 3",
    )
    assert said(log) == {
        ("changed", (f"{first}:2",)),
        ("removed", (f"{first}:4",)),
        ("inserted", (f"{second}:3", f"{second}:7")),
    }


def test_verify_events_that_changed_places_are_called_reordered(log: Path) -> None:
    first, second = segments_of(log)
    swap = "UPDATE logs SET seq = CASE seq WHEN 2 THEN 3 WHEN 3 THEN 2 ELSE seq END"
    change(log, f"{swap} WHERE segment = '{first}'", f"UPDATE logs SET name = 'x' WHERE segment = '{second}'")
    assert said(log) == {
        ("reordered", (f"{first}:2", f"{first}:3")),
        ("changed", tuple(f"{second}:{seq}" for seq in range(1, 5))),
    }


def test_verify_manual_delete_of_whole_segments_is_reported_as_removed(log: Path) -> None:
    change(log, f"DELETE FROM logs WHERE timestamp < '{moment(START_NS + DAY_NS)}'")
    (finding,) = store_of(log).verify().findings
    assert (finding.kind, finding.segment) == ("removed", segments_of(log)[0])
    assert "nothing is left of 4 events" in finding.text


def test_verify_rows_of_unknown_segment_are_reported_as_inserted(log: Path) -> None:
    change(log, "INSERT INTO logs SELECT * REPLACE ('20270101T000000000000Z-00000000' AS segment) FROM logs")
    (finding,) = store_of(log).verify().findings
    assert finding.kind == "inserted" and "8 events" in finding.text


def test_verify_since_looks_at_newer_segments_only(log: Path) -> None:
    first, second = segments_of(log)
    change(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    assert said(log, since=moment(START_NS + DAY_NS)) == {("changed", (f"{second}:1",))}
    assert said(log) == {("changed", (f"{first}:1",)), ("changed", (f"{second}:1",))}


def test_verify_cut_end_is_seen_with_a_checkpoint_only(log: Path) -> None:
    noted = store_of(log).heads()
    segment = segments_of(log)[1]
    change(
        log,
        f"DELETE FROM logs WHERE segment = '{segment}'",
        f"DELETE FROM ledger WHERE segment = '{segment}'",
    )
    assert said(log) == set()  # as docs/security.md says
    assert said(log, checkpoint=noted) == {("cut", ())}


def test_verify_checkpoint_stays_good_when_the_log_grows(log: Path) -> None:
    noted = store_of(log).heads()
    write_segment(log, START_NS + 5 * DAY_NS, 3)
    ingest(log)
    assert store_of(log).verify(checkpoint=noted).intact
    assert store_of(log).heads()[0].events == 11


def forge(database: Path) -> None:
    """Change an event and recompute everything that can be without a key."""
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{database}' AS audit")
        connection.execute("UPDATE audit.logs SET name = 'forged' WHERE seq = 1")
        found = connection.execute(m.digests("audit.logs")).fetchall()
        for segment, _, _, _, digest, marks in found:
            connection.execute(
                "UPDATE audit.ledger SET digest = ?, marks = ? WHERE segment = ?", [digest, marks, segment]
            )
        previous = ""
        rows = connection.execute(
            f"SELECT position, {m.row_hash(m.LEDGER_COLUMNS[:-1])} FROM audit.ledger ORDER BY position"
        ).fetchall()
        for position, row in rows:
            previous = m.make_seal(previous, row, None)
            connection.execute("UPDATE audit.ledger SET seal = ? WHERE position = ?", [previous, position])


def test_verify_forged_chain_without_key_is_seen_with_a_checkpoint_only(log: Path) -> None:
    noted = store_of(log).heads()
    forge(log)
    assert said(log) == set()  # as docs/security.md says
    assert said(log, checkpoint=noted) == {("cut", ())}


def test_verify_forged_chain_with_key_is_reported(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
    database = tmp_path / "log.duckdb"
    write_segment(database, START_NS, 3)
    ingest(database)
    assert store_of(database).verify().intact
    forge(database)
    assert said(database) == {("chain", ())}


def test_verify_chain_older_than_its_key_needs_a_checkpoint(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = store_of(log).heads()
    monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
    write_segment(log, START_NS + 5 * DAY_NS, 3)
    ingest(log)
    assert said(log) == {("chain", ())}
    assert store_of(log).verify(checkpoint=noted).intact


def test_ingest_without_the_key_of_the_chain_leaves_events_in_the_journal(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
    write_segment(log, START_NS, 1)
    ingest(log)
    monkeypatch.delenv("MXCP_AUDIT_KEY")
    write_segment(log, START_NS, 2)
    with pytest.raises(m.StoreError, match="MXCP_AUDIT_KEY"):
        store_of(log).ingest()
    assert len(store_of(log).journal.segments()) == 1
    verdict = store_of(log).verify()
    assert "a key that is not given" in verdict.findings[0].text and verdict.waiting_bytes


def test_key_file_first_line_seals_and_the_others_still_open(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, keys = tmp_path / "log.duckdb", tmp_path / "keys"
    monkeypatch.setenv("MXCP_AUDIT_KEY_FILE", str(keys))
    for text in ("old\n", "new\nold\n"):
        keys.write_text(text)
        keys.chmod(0o600)
        write_segment(database, START_NS, 2)
        ingest(database)
    assert store_of(database).verify().intact
    keys.write_text("new\n")
    assert said(database) == {("chain", ())}


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
@pytest.mark.parametrize(("text", "mode", "problem"), [("k", 0o644, "chmod 600"), ("\n", 0o600, "is empty")])
def test_key_file_open_to_others_or_empty_is_refused(
    tmp_path: Path, text: str, mode: int, problem: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(m.ConfigError, match=problem):
        m.seal_keys({"MXCP_AUDIT_KEY_FILE": str(path)})


def test_legacy_rows_are_counted_and_covered_from_the_first_ingest(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "_LEGACY_ROWS", 4)  # several entries' worth
    database = tmp_path / "log.duckdb"
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{database}' AS old (STORAGE_VERSION 'v1.0.0'); USE old; {LEGACY}")
    verdict = store_of(database).verify()
    assert verdict.intact and verdict.legacy == 6 and not verdict.entries
    write_segment(database, START_NS, 1)
    ingest(database)
    verdict = store_of(database).verify()
    assert verdict.intact and (verdict.legacy, verdict.entries, verdict.events) == (6, 3, 1)
    change(database, "UPDATE logs SET name = 'x' WHERE name = 'old1'")
    (finding,) = store_of(database).verify().findings
    assert finding.segment == "legacy-2026-05-01"


def test_ledger_of_lost_events_holds_a_loss_once(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    for lost in (3, 0, 2):
        if lost:
            store_of(database).journal.record_loss(m.Loss(lost, "2026-01-01", "2026-01-02", "test"))
        write_segment(database, START_NS, 1)
        ingest(database)
    verdict = store_of(database).verify()
    assert verdict.intact and verdict.lost == 5 and verdict.entries == 5


def test_verify_without_ledger_is_bad_news(log: Path) -> None:
    change(log, "DROP TABLE ledger")
    assert not store_of(log).verify().intact


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("DELETE FROM ledger WHERE position = 1", "entry 1 is missing"),
        ("INSERT INTO ledger SELECT * FROM ledger WHERE position = 2", "entry 2 stands twice"),
        ("UPDATE ledger SET first_event = 'infinity' WHERE position = 3", "entry 3 of journal"),
    ],
)
def test_verify_changed_ledger_is_told_by_its_entry(log: Path, statement: str, text: str) -> None:
    broken = write_segment(log, START_NS, 1)
    Path(f"{log}.journal", broken + ".jsonl").write_bytes(b"no line\n")  # an entry without times
    ingest(log)
    assert intact_but_for_a_loss(log)
    change(log, statement)
    assert text in " ".join(finding.text for finding in store_of(log).verify().findings)


def intact_but_for_a_loss(database: Path) -> bool:
    verdict = store_of(database).verify()
    return verdict.intact and verdict.lost == 1 and verdict.entries == 4


def test_verify_damaged_ledger_gives_findings_and_no_traceback(log: Path) -> None:
    store_of(log).purge(moment(START_NS + 90 * 10**9))
    for detail in (
        "x",
        "[]",
        '{"before": "x"}',
        '{"before": 1e999, "heads": {}, "left": {}, "wrong": {}}',
        "[" * 9999,
    ):
        change(log, f"UPDATE ledger SET detail = '{detail}' WHERE kind = 'purge'")
        assert "chain" in {kind for kind, _ in said(log)}


def test_cli_verify_says_intact_or_what_is_not(log: Path, cli: Any) -> None:
    done = cli("verify", "--db", str(log))
    assert (done.returncode, done.stdout) == (0, "intact; 8 events in 2 segments of 1 journal\n"), done
    change(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    done = cli("verify", "--db", str(log))
    assert done.returncode == 1 and "NOT intact, 2 findings" in done.stdout
    done = cli("verify", "--db", str(log), "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and answer["intact"] is False
    assert answer["findings"][0]["events"] == [f"{segments_of(log)[0]}:1"]


def test_cli_checkpoint_is_what_verify_takes(log: Path, cli: Any, tmp_path: Path) -> None:
    done = cli("checkpoint", "--db", str(log))
    noted = tmp_path / "checkpoint.json"
    noted.write_text(done.stdout)
    assert done.returncode == 0 and json.loads(done.stdout)["journals"][0]["position"] == 2
    assert cli("verify", "--db", str(log), "--checkpoint", str(noted)).returncode == 0
    script = [sys.executable, str(ROOT / "tools" / "verify_independently.py"), str(log), str(noted)]
    assert subprocess.run(script, env=child_environment(), capture_output=True).returncode == 0
    change(log, "DELETE FROM logs", "DELETE FROM ledger")
    assert cli("verify", "--db", str(log), "--checkpoint", str(noted)).returncode == 1
    assert subprocess.run(script, env=child_environment(), capture_output=True).returncode == 1
    noted.write_text("{}")
    assert cli("verify", "--db", str(log), "--checkpoint", str(noted)).returncode == 2


def test_cli_verify_missing_database_says_so(engine: str, cli: Any) -> None:
    done = cli("verify", "--db", "none.duckdb")
    assert done.returncode == 1 and "not found" in done.stderr and "Traceback" not in done.stderr


def test_logger_tells_the_checkpoint_at_shutdown(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "log.duckdb"
    with caplog.at_level("INFO", "mxcp_audit"):
        audit = m.AuditLogger(database)
        audit.log_event("cli", "tool", "t")
        audit.flush()
        audit.log_event("cli", "tool", "t")
        audit.shutdown()
        audit.shutdown()
    told = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    (head,) = store_of(database).heads()
    path = tmp_path / "told"
    path.write_text(told[-1])
    assert len(told) == 2 and m._read_checkpoint(str(path)) == [head] and head.events == 2


def test_cli_verify_more_findings_than_anybody_reads_are_counted(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "_MAX_FINDINGS", 1)
    change(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    assert m.main(["verify", "--db", str(log)]) == 1
    assert "\nand 1 more\nNOT intact, 2 findings; " in capsys.readouterr().out


def test_cli_verify_since_says_what_it_left_out(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(log, f"UPDATE logs SET name = 'x' WHERE segment = '{segments_of(log)[0]}'")
    assert m.main(["verify", "--db", str(log), "--since", moment(START_NS + DAY_NS - 1000)]) == 0
    assert "segments before 2026-05-29" in capsys.readouterr().out


def test_cli_verify_checkpoint_that_cannot_be_read_is_wrong_use(log: Path, cli: Any, tmp_path: Path) -> None:
    done = cli("verify", "--db", str(log), "--checkpoint", str(tmp_path))
    assert done.returncode == 2 and "can't be read" in done.stderr and "Traceback" not in done.stderr


def test_verify_database_without_ledger_is_no_proof_of_a_checkpoint(log: Path) -> None:
    heads = store_of(log).heads()
    change(log, "DROP TABLE ledger", "DROP TABLE logs")
    change(log, "CREATE TABLE logs (timestamp TIMESTAMP, name TEXT)")
    texts = [finding.text for finding in store_of(log).verify(checkpoint=heads).findings]
    assert "there is no ledger, so that nothing can be proved" in texts


def test_key_file_that_is_absent_is_refused(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXCP_AUDIT_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(m.ConfigError, match="none"):
        store_of(log).verify()


def test_iso_time_of_moments_that_no_calendar_has() -> None:
    assert m.iso_time(None) is None and m.iso_time(2**62) == f"{2**62} microseconds"
