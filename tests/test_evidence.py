"""The ledger, verify and checkpoints: whatever is changed shows, and nothing else does."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from pathlib import Path

import duckdb
import pytest
from conftest import ROOT
from evidence import DAY_NS, START_NS, ingest, moment, store_of, write_segment

import mxcp_audit as m

spec = importlib.util.spec_from_file_location("independent", ROOT / "tools" / "verify_independently.py")
assert spec is not None and spec.loader is not None
independent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(independent)

TAMPERINGS = int(os.environ.get("MXCP_TEST_TAMPERINGS", "1000"))
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
    session = m.open_engine()
    session.execute(f"ATTACH {m.sql_literal(str(database))} AS audit")
    seed = random.randrange(2**32)
    tamperer = Tamperer(session, seed)
    before = session.execute(STATE)
    assert m.Verifier(session, keys).run(checkpoint=checkpoint).intact
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
        if engine == "package":
            connection = session._connection  # type: ignore[attr-defined]
            wrong = independent.verify(connection, keys=keys, checkpoints=noted if needs_checkpoint else ())
            assert bool(wrong) is changed, said
            if kind != "table" and "audit.ledger" not in statements[-1]:
                segments = {finding.segment for finding in verdict.findings}
                assert segments == {where for what, where in wrong if what == "segment"}, said
        session.execute("ROLLBACK")
        done += changed
    session.close()


def make_keyed(database: Path) -> None:
    """Make a log of one journal whose chain has a key from the start."""
    for number in range(4):
        write_segment(database, START_NS + number * DAY_NS, 3)
        ingest(database)
    assert store_of(database).purge(moment(START_NS + DAY_NS + 90 * 10**9)).events == 5
