"""The ledger, verify and checkpoints: whatever is changed shows, and nothing else does."""

from __future__ import annotations

import contextlib
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
from conftest import ROOT, child_environment, one_engine
from evidence import DAY_NS, START_NS, ingest, make_log, moment, store_of, write_segment

import mxcp_audit as m

duckdb = pytest.importorskip("duckdb")

spec = importlib.util.spec_from_file_location("independent", ROOT / "tools" / "verify_independently.py")
assert spec is not None and spec.loader is not None
independent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(independent)

TAMPERINGS = int(os.environ.get("MXCP_TEST_TAMPERINGS", "120"))  # in all; 2,000 take some minutes
# What `verify` promises to report, of whoever may write the database, where nothing, a checkpoint or the key
# (which the attacker has not) is given; docs/security.md has the same table. "shown" is no finding.
PROMISES: dict[str, tuple[str, str, str, str, str]] = {
    "rows": ("rows", "events changed, removed, inserted, exchanged", "yes", "yes", "yes"),
    "replace": ("rows", "false events under cover of a forged purge", "yes", "yes", "yes"),
    "entries": ("entries", "entries changed, removed from between, inserted, exchanged", "yes", "yes", "yes"),
    "rewrite": ("entries", "rows and entries changed and every seal made anew", "no", "yes", "yes"),
    "old_purge": ("entries", "a forged purge of the form of 0.1, with false rows", "no", "yes", "yes"),
    "purge": ("entries", "a forged purge of genuine segments", "no", "shown", "yes"),
    "append": ("entries", "forged events or losses at the end", "no", "no", "yes"),
    "form": (
        "files",
        "a view, a type of another kind (not a wider integer), a default, a collation for a plain column",
        "yes",
        "yes",
        "yes",
    ),
    "cut": ("files", "an older copy, or the end cut off, or everything removed", "no", "yes", "no"),
}
GIVEN = ("nothing", "checkpoint", "key")
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
    removal = store_of(database).purge(moment(START_NS + DAY_NS + 120 * 10**9))
    assert (removal.events, removal.kept) == (6 + 2, 2 + 2) and not removal.wrong
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

    def act(self, kind: str) -> list[str]:
        """Do something of a kind, and return the statements."""
        self.done: list[str] = []
        self.group = "ledger" if kind == "entries" else "logs"
        if kind in ("rows", "entries"):
            ways = [
                "cell",
                "cell",
                "delete",
                "insert",
                "swap",
                *(["boundary", "many"] if kind == "rows" else []),
            ]
            self.do(*getattr(self, self.random.choice(ways))())
        else:
            getattr(self, kind)()
        return self.done

    def do(self, *statements: str) -> None:
        for statement in statements:
            self.engine.execute(statement)
        self.done += statements

    def cell(self) -> list[str]:
        table = self.group
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
                    *("NULL", "''", f"coalesce({name}, '') || ' '", f"{name}[2:]", "'|'", f"upper({name})"),
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
        table = self.group
        most = min(3, self.counts[table] - 1)
        gone = self.rows(table, self.random.randint(1, most))
        if table == "ledger":  # the last of a journal would be a cut
            last = "SELECT max(rowid)::BIGINT FROM audit.ledger GROUP BY journal"
            ends = {rowid for (rowid,) in self.engine.execute(last)}
            gone = [rowid for rowid in gone if rowid not in ends]
            if not gone:
                return []
        return [f"DELETE FROM audit.{table} WHERE rowid IN ({', '.join(map(str, gone))})"]

    def insert(self) -> list[str]:
        table = self.group
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

    def many(self) -> list[str]:
        return ["UPDATE audit.logs SET error = coalesce(error, '') || 'x' WHERE hash(rowid) % 2 = 0"]

    def swap(self) -> list[str]:
        table = self.group
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

    def form(self) -> None:
        table = self.random.choice(("logs", "ledger"))
        copy = f"CREATE TABLE audit.copy AS FROM audit.{table}; DROP TABLE audit.{table}"
        back = f"INSERT INTO audit.{table} FROM audit.copy; DROP TABLE audit.copy"
        columns = m.COLUMNS if table == "logs" else m.LEDGER_COLUMNS
        named = [f"{column.name} {column.sql_type}" for column in columns]
        odd = self.random.choice((" COLLATE NOCASE", " DEFAULT 'x'"))
        place = next(
            i for i, column in enumerate(columns) if column.name == ("host" if table == "ledger" else "name")
        )
        definitions = ", ".join(text + (odd if i == place else "") for i, text in enumerate(named))
        self.do(
            *self.random.choice(
                [
                    [
                        "ALTER TABLE audit.ledger DROP COLUMN "
                        + self.random.choice(("segment", "events", "host"))
                    ],
                    ["ALTER TABLE audit.logs DROP COLUMN trace_id"],
                    [f"ALTER TABLE audit.{table} RENAME COLUMN segment TO segments"],
                    ["ALTER TABLE audit.logs ALTER COLUMN duration_ms TYPE VARCHAR"],
                    [*copy.split("; "), f"CREATE VIEW audit.{table} AS FROM audit.copy"],
                    [*copy.split("; "), f"CREATE TABLE audit.{table} ({definitions})", *back.split("; ")],
                ]
            )
        )

    def cut(self) -> None:
        """Cut off the newest entries of a journal, or all, with their events."""
        count = self.random.choice((1, 2, 3, 10**9))
        journals = self.engine.execute("SELECT DISTINCT journal::VARCHAR FROM audit.ledger ORDER BY 1")
        cut = (
            f"journal = '{self.random.choice(journals)[0]}' AND position > "
            f"(SELECT max(position) - {count} FROM audit.ledger l WHERE l.journal = ledger.journal)"
        )
        if count > 3 and self.random.random() < 0.5:
            cut = "true"
            self.do("DELETE FROM audit.logs WHERE segment IS NULL")
        self.do(
            f"DELETE FROM audit.logs WHERE segment IN (SELECT segment FROM audit.ledger WHERE {cut})",
            f"DELETE FROM audit.ledger WHERE {cut}",
        )

    # --- well-formed forgeries, by somebody who has no key

    def seal(self, previous: str, source: str) -> str:
        """Return the seal of the entry that a query yields."""
        ((row,),) = self.engine.execute(f"SELECT {m.row_hash(m.LEDGER_COLUMNS[:-1])}::VARCHAR FROM {source}")
        return m.make_seal(previous, str(row), None)

    def enter(
        self, kind: str, segment: str | None, digested: str, detail: str | None, events: str = "events"
    ) -> None:
        """Append an entry to a journal's chain, or to one of its own, over a query of `digests`."""
        journals = self.engine.execute(CHAIN_ENDS)
        journal, last = self.random.choice([*journals, ("f" * 16, 0)])
        sql = "SELECT max(seal) FROM audit.ledger WHERE journal = $journal AND position = $position"
        ((previous,),) = self.engine.execute(sql, {"journal": journal, "position": last})
        values = {
            **{"journal": m.sql_literal(journal), "position": str(int(str(last)) + 1)},
            **{"kind": m.sql_literal(kind), "segment": m.sql_literal(segment), "events": events},
            **{"detail": m.sql_literal(detail), "host": "'vm'", "ingested_at": "TIMESTAMP '2026-11-01'"},
        }
        parts = ", ".join(
            f"({values.get(c.name, c.name if c.name not in ('seal',) else 'NULL')})::{c.sql_type} AS {c.name}"
            for c in m.LEDGER_COLUMNS
        )
        entry = f"SELECT {parts} FROM ({digested})"
        seal = self.seal(str(previous or ""), f"({entry})")
        self.do(f"INSERT INTO audit.ledger SELECT * REPLACE ({m.sql_literal(seal)} AS seal) FROM ({entry})")

    def digested(self, segment: str) -> str:
        where = f"{m.SEGMENT_OR_DAY} = {m.sql_literal(segment)}"
        return m.digests("audit.logs", where, segment=m.SEGMENT_OR_DAY)

    def segment(self) -> tuple[str, str, int, int, int]:
        """Return a segment that has rows, its journal, position, events and last moment."""
        rows = self.engine.execute(
            "SELECT segment::VARCHAR, journal::VARCHAR, position::BIGINT, events::BIGINT, "
            "epoch_us(last_event)::BIGINT FROM audit.ledger WHERE kind = 'segment' AND segment IN "
            "(SELECT segment FROM audit.logs) ORDER BY ALL"
        )
        return self.random.choice(rows)  # type: ignore[return-value]

    def purge(self) -> None:
        segment, journal, position, events, last = self.segment()
        detail = {
            "before": last + 1,
            "removed": {journal: [[position, position]]},
            "wrong": {},
            "archive": None,
        }
        digested = self.digested(segment)
        self.enter("purge", None, digested, json.dumps(detail))
        self.do(f"DELETE FROM audit.logs WHERE segment = {m.sql_literal(segment)}")

    def replace(self) -> None:
        """Name a segment as purged, and put false rows in its place, or leave them there."""
        segment, journal, position, events, last = self.segment()
        change = f"UPDATE audit.logs SET name = name || 'x' WHERE segment = {m.sql_literal(segment)}"
        count, span = self.random.choice(((events, [[position, position]]), (0, [])))
        detail = {"before": last + 1, "removed": {journal: span}, "wrong": {}, "archive": None}
        self.enter("purge", None, self.digested(segment), json.dumps(detail), events=str(count))
        self.do(change)

    def old_purge(self) -> None:
        """False rows that a purge in the form of earlier versions says were left."""
        segment, journal, position, events, last = self.segment()
        self.do(f"UPDATE audit.logs SET name = name || 'x' WHERE segment = {m.sql_literal(segment)}")
        ((left,),) = self.engine.execute(f"SELECT digest::VARCHAR FROM ({self.digested(segment)})")
        heads = dict(self.engine.execute(CHAIN_ENDS))
        detail = {"before": last, "heads": heads, "left": {segment: [events, left]}, "wrong": {}}
        self.enter("purge", None, self.digested(segment), json.dumps(detail), events="0")

    def append(self) -> None:
        segment, *_ = self.segment()
        name = f"20260202T000000000000Z-{self.random.randrange(2**32):08x}"
        if self.random.random() < 0.5:
            self.enter("loss", name, self.digested(segment), "forged")
            return
        self.do(
            f"INSERT INTO audit.logs SELECT * REPLACE ('{name}' AS segment, 'forged' AS name) "
            f"FROM audit.logs WHERE segment = {m.sql_literal(segment)}"
        )
        self.enter("segment", name, self.digested(name), None)

    def rewrite(self) -> None:
        """Change a segment, correct its entry, and seal the rest of the chain anew."""
        segment, journal, position, *_ = self.segment()
        self.do(
            f"UPDATE audit.logs SET name = name || 'x' WHERE segment = {m.sql_literal(segment)}",
            "UPDATE audit.ledger SET digest = new.digest, marks = new.marks "
            f"FROM ({self.digested(segment)}) AS new WHERE ledger.segment = {m.sql_literal(segment)} "
            "AND kind = 'segment'",
        )
        here = f"journal = {m.sql_literal(journal)} AND position"
        ((previous,),) = self.engine.execute(
            f"SELECT max(seal)::VARCHAR FROM audit.ledger WHERE {here} = {position - 1}"
        )
        seal = str(previous or "")
        for (place,) in self.engine.execute(
            f"SELECT position::BIGINT FROM audit.ledger WHERE {here} >= {position} ORDER BY 1"
        ):
            seal = self.seal(seal, f"audit.ledger WHERE {here} = {place}")
            self.do(f"UPDATE audit.ledger SET seal = {m.sql_literal(seal)} WHERE {here} = {place}")


CHAIN_ENDS = "SELECT journal, max(position) FROM audit.ledger GROUP BY journal"
STATE = """\
SELECT (SELECT md5(string_agg(x::VARCHAR, '' ORDER BY x::VARCHAR)) FROM audit.logs x)::VARCHAR,
       (SELECT md5(string_agg(x::VARCHAR, '' ORDER BY x::VARCHAR)) FROM audit.ledger x)::VARCHAR"""


@pytest.mark.parametrize("given", GIVEN)
def test_verify_random_tampering_is_reported_as_promised(
    engine: str, sample: Path, tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "log.duckdb"
    if given == "key":
        monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
        make_keyed(database)
    else:
        shutil.copy(sample, database)
    keys = m.seal_keys()
    checkpoint = store_of(database).heads() if given == "checkpoint" else []
    noted = [head._asdict() for head in checkpoint]
    twin = shutil.copy(database, tmp_path / "twin.duckdb")
    session, target = m.open_engine(), store_of(database).target
    session.execute(f"ATTACH {m.sql_literal(str(database))} AS audit")
    # The independent verifier needs the package: for the program it sees the same change in a copy.
    connection = session._connection if engine == "package" else duckdb.connect()  # type: ignore[attr-defined]
    if engine == "cli":
        connection.execute(f"ATTACH {m.sql_literal(str(twin))} AS audit")
    seed = random.randrange(2**32)
    tamperer = Tamperer(session, seed)
    before = session.execute(STATE)
    verdict = m.Verdict(session, target, keys)
    verdict.run(checkpoint=checkpoint)
    assert verdict.intact
    assert not independent.verify(connection, keys=keys, checkpoints=noted)
    cells: dict[str, int] = dict.fromkeys(("rows", "entries", "files"), 0)
    kinds = list(PROMISES)
    while sum(cells.values()) < TAMPERINGS // 6:
        kind = kinds[tamperer.random.randrange(len(kinds))]
        session.execute("BEGIN")
        statements = tamperer.act(kind)
        changed = kind == "form" or session.execute(STATE) != before
        promise = PROMISES[kind][2 + GIVEN.index(given)]
        verdict = m.Verdict(session, target, keys)
        verdict.run(checkpoint=checkpoint)
        said = f"seed {seed}, {statements}: {[finding.text for finding in verdict.findings]}"
        assert not verdict.intact or not changed or promise != "yes", said
        assert changed or verdict.intact, said
        if promise == "shown" and changed:
            assert verdict.purges, said
        if engine == "cli":
            for statement in ("BEGIN", *statements):
                connection.execute(statement)
        wrong = independent.verify(connection, keys=keys, checkpoints=noted)
        assert bool(wrong) is not verdict.intact, f"{said} {wrong}"
        if kind in ("rows", "replace"):
            segments = {finding.segment for finding in verdict.findings} - {None}
            assert segments == {where for what, where in wrong if what == "segment"}, said
        session.execute("ROLLBACK")
        if engine == "cli":
            connection.execute("ROLLBACK")
        cells[PROMISES[kind][0]] += changed
    print(f"tamperings with {given}: {cells}")
    session.close()
    connection.close()


def test_purge_launders_nothing(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsealed purge that vouches for false rows, removed after the operator's own purge."""
    monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
    database = tmp_path / "keyed.duckdb"
    make_log(database, 2)
    noted = store_of(database).heads()
    segment = segments_of(database)[0]
    with contextlib.closing(m.open_engine()) as session:
        session.execute(f"ATTACH {m.sql_literal(str(database))} AS audit")
        tamperer = Tamperer(session, 1)
        tamperer.done = []
        tamperer.do(f"UPDATE audit.logs SET name = 'x' WHERE segment = '{segment}'")
        ((left,),) = session.execute(f"SELECT digest::VARCHAR FROM ({tamperer.digested(segment)})")
        detail = {"before": START_NS // 1000 + 1, "heads": {}, "left": {segment: [4, left]}, "wrong": {}}
        tamperer.random.seed(2)
        tamperer.enter("purge", None, tamperer.digested(segment), json.dumps(detail), events="0")
        session.execute("UPDATE audit.ledger SET journal = 'f' WHERE kind = 'purge'")
    assert not store_of(database).verify(checkpoint=noted).intact
    removal = store_of(database).purge(moment(START_NS + DAY_NS), archive=str(tmp_path / "archive"))
    assert list(removal.wrong) == [segment] and removal.events == 4
    change(database, "DELETE FROM ledger WHERE journal = 'f'")
    findings = store_of(database).verify(checkpoint=noted).findings
    assert [finding.segment for finding in findings] == [segment]
    folder = tmp_path / "archive" / str(removal.archive)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["not_as_entered"] == [segment]
    assert [file["name"] for file in manifest["files"]] == ["not-as-entered.parquet"]


@one_engine
def test_readers_and_doctor_say_that_the_table_was_taken_away(log: Path, cli: Any) -> None:
    change(log, "DROP TABLE logs")
    for command in (["log"], ["stats"], ["doctor"], ["verify"]):
        done = cli(*command, "--db", str(log))
        assert done.returncode == 1, command
        assert ("logs is missing beside its ledger" in done.stdout + done.stderr) is (command != ["verify"])


@one_engine
def test_readers_and_doctor_say_that_a_table_is_no_table(log: Path, cli: Any, caplog: Any) -> None:
    change(
        log, "ALTER TABLE logs ADD COLUMN tenant VARCHAR DEFAULT 'x'"
    )  # somebody's own, which changes nothing
    told: list[tuple[int, int]] = []
    assert store_of(log).verify(progress=lambda *counts: told.append(counts)).intact
    assert told and told[-1][0] == told[-1][1]
    change(log, "ALTER TABLE logs RENAME TO real", "CREATE VIEW logs AS FROM real WHERE seq > 1")
    for command in (["log"], ["stats"], ["doctor"], ["verify"]):
        done = cli(*command, "--db", str(log))
        assert "logs is a view" in done.stdout + done.stderr + caplog.text, command
        caplog.clear()
        assert done.returncode == 1, command


@one_engine
def test_verify_says_what_it_cannot_know_and_shows_new_purges(
    log: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "heads.json"
    checkpoint.write_text(cli("checkpoint", "--db", str(log)).stdout)
    store_of(log).purge(moment(START_NS + DAY_NS))
    done = cli("verify", "--db", str(log), "--checkpoint", str(checkpoint))
    assert done.returncode == 0 and "4 events at" in done.stdout and "newer than the" in done.stdout
    said = json.loads(cli("verify", "--db", str(log), "--json").stdout)
    assert [purge["events"] for purge in said["purges"]] == [4] and said["notes"] == []
    change(log, "DELETE FROM logs", "DELETE FROM ledger")
    done = cli("verify", "--db", str(log), MXCP_AUDIT_KEY="secret")
    assert done.returncode == 0 and "can't be known whether" in done.stdout


@pytest.mark.parametrize("key", [None, "secret"])
def test_proof_of_one_event_holds_for_it_alone(
    log: Path, tmp_path: Path, cli: Any, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("MXCP_AUDIT_KEY", key)
        write_segment(log, START_NS + 3 * DAY_NS, 4)
        ingest(log)
    event = f"{segments_of(log)[-1]}:2"
    early = json.loads(cli("checkpoint", "--db", str(log)).stdout)
    write_segment(log, START_NS + 5 * DAY_NS, 2)
    ingest(log)
    late = json.loads(cli("checkpoint", "--db", str(log)).stdout)
    proof = json.loads(cli("prove", "--db", str(log), event).stdout)
    assert proof["event"]["segment"] == event.partition(":")[0]
    assert independent.proof_fault(proof, early) is None and independent.proof_fault(proof, late) is None
    for part, name, value in (
        ("event", "name", "other"),
        ("event", "seq", 1),
        ("entry", "events", 5),
        ("entry", "position", 9),
    ):
        forged = {**proof, part: {**proof[part], name: value}}
        assert independent.proof_fault(forged, late) is not None, (part, name)
    assert independent.proof_fault({**proof, "before": "0"}, late) is not None
    old = {**proof, "after": []}
    assert independent.proof_fault(old, {"journals": [late["journals"][-1]]}) is not None
    done = cli("prove", "--db", str(log), "x:1")
    assert done.returncode == 1 and "no segment of the ledger" in done.stderr


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
@one_engine
def test_signed_checkpoint_is_checked_against_allowed_signers(log: Path, tmp_path: Path, cli: Any) -> None:
    for name in ("key", "other"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(tmp_path / name)]
        subprocess.run(made, check=True, stdin=subprocess.DEVNULL)
        public = (tmp_path / f"{name}.pub").read_text()
        (tmp_path / f"{name}.signers").write_text(f"auditor@example.org {public}")
    done = cli("checkpoint", "--db", str(log), "--sign", str(tmp_path / "key"))
    checkpoint = tmp_path / "heads.json"
    checkpoint.write_text(done.stdout)
    verify = ["verify", "--db", str(log), "--checkpoint", str(checkpoint), "--signed-by"]
    done = cli(*verify, str(tmp_path / "key.signers"))
    assert done.returncode == 0 and "signed by auditor@example.org" in done.stderr, done
    assert cli(*verify, str(tmp_path / "other.signers")).returncode == 1
    checkpoint.write_text(checkpoint.read_text().replace('"events": 8', '"events": 9'))
    assert cli(*verify, str(tmp_path / "key.signers")).returncode == 1


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ('IO Error: Cannot open file "/srv/corrupt/x.duckdb": No such file or directory', m.QueryError),
        ("Conversion Error: Could not convert string 'transaction conflict' to INT32", m.QueryError),
        (
            'Binder Error: Referenced column "corrupt" not found\nLINE 1: SELECT corrupt FROM logs',
            m.QueryError,
        ),
        ('IO Error: Could not set lock on file "/x": Conflicting lock is held', m.DatabaseLockedError),
        ("TransactionContext Error: Failed to commit: write-write conflict", m.DatabaseLockedError),
        (
            'IO Error: The file "/x" exists, but it is not a valid DuckDB database file!',
            m.DatabaseCorruptError,
        ),
    ],
)
def test_kind_of_an_error_is_read_from_what_duckdb_says(message: str, kind: type[Exception]) -> None:
    assert type(m.store_error(message)) is kind


def test_docs_threat_table_is_what_the_tamperings_hold() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [f"| {' | '.join(cells)} |" for cells in PROMISES.values()]
    assert "\n".join(rows) in page, "\n".join(rows)


def make_keyed(database: Path) -> None:
    """Make a log of one journal whose chain has a key from the start."""
    for number in range(4):
        write_segment(database, START_NS + number * DAY_NS, 3)
        ingest(database)
    assert store_of(database).purge(moment(START_NS + 2 * DAY_NS)).events == 6


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


@one_engine
def test_purge_with_archive_of_an_earlier_version_s_table_works(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    write_segment(database, START_NS, 3, more=(None,) * 8)
    ingest(database)
    change(database, *(f"ALTER TABLE logs DROP COLUMN {column.name}" for column in m.NEW_COLUMNS))
    removal = store_of(database).purge(moment(START_NS + DAY_NS), archive=str(tmp_path / "old"))
    assert removal.events == 3 and store_of(database).verify().intact


# --- what is said


@pytest.fixture
def log(engine: str, copy_of: Any) -> Path:
    return copy_of(make_log, 2)  # type: ignore[no-any-return]


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
    return {
        (finding.kind, tuple(f"{finding.segment}:{seq}" for seq in finding.seqs))
        for finding in verdict.findings
    }


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


@one_engine
def test_verify_events_that_changed_places_are_called_changed(log: Path) -> None:
    first, second = segments_of(log)
    swap = "UPDATE logs SET seq = CASE seq WHEN 2 THEN 3 WHEN 3 THEN 2 ELSE seq END"
    change(log, f"{swap} WHERE segment = '{first}'", f"UPDATE logs SET name = 'x' WHERE segment = '{second}'")
    assert said(log) == {
        ("changed", (f"{first}:2", f"{first}:3")),
        ("changed", tuple(f"{second}:{seq}" for seq in range(1, 5))),
    }


@one_engine
def test_verify_manual_delete_of_whole_segments_is_reported_as_removed(log: Path) -> None:
    change(log, f"DELETE FROM logs WHERE timestamp < '{moment(START_NS + DAY_NS)}'")
    (finding,) = store_of(log).verify().findings
    assert (finding.kind, finding.segment) == ("removed", segments_of(log)[0])
    assert "0 events, not 4 as recorded" in finding.text


@one_engine
def test_verify_rows_of_unknown_segment_are_reported_as_inserted(log: Path) -> None:
    change(log, "INSERT INTO logs SELECT * REPLACE ('20270101T000000000000Z-00000000' AS segment) FROM logs")
    (finding,) = store_of(log).verify().findings
    assert finding.kind == "inserted" and "8 events" in finding.text


@one_engine
def test_verify_since_looks_at_newer_segments_only(log: Path) -> None:
    first, second = segments_of(log)
    change(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    assert said(log, since=moment(START_NS + DAY_NS)) == {("changed", (f"{second}:1",))}
    assert said(log) == {("changed", (f"{first}:1",)), ("changed", (f"{second}:1",))}


@one_engine
def test_verify_checkpoint_stays_good_when_the_log_grows_and_alone_shows_a_cut_end(log: Path) -> None:
    noted = store_of(log).heads()
    write_segment(log, START_NS + 5 * DAY_NS, 3)
    ingest(log)
    assert store_of(log).verify(checkpoint=noted).intact
    (late,) = store_of(log).heads()
    assert late.events == 11
    cut = f"WHERE segment = '{segments_of(log)[2]}'"
    change(log, f"DELETE FROM logs {cut}", f"DELETE FROM ledger {cut}")
    assert said(log) == said(log, checkpoint=noted) == set()  # as docs/security.md says
    assert said(log, checkpoint=[late]) == {("cut", ())}


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


@one_engine
def test_verify_forged_chain_without_key_is_seen_with_a_checkpoint_only(log: Path) -> None:
    noted = store_of(log).heads()
    forge(log)
    assert said(log) == set()  # as docs/security.md says
    assert said(log, checkpoint=noted) == {("cut", ())}


@one_engine
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


@one_engine
def test_verify_chain_older_than_its_key_needs_a_checkpoint(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = store_of(log).heads()
    monkeypatch.setenv("MXCP_AUDIT_KEY", "secret")
    write_segment(log, START_NS + 5 * DAY_NS, 3)
    ingest(log)
    assert said(log) == {("chain", ())}
    assert store_of(log).verify(checkpoint=noted).intact


@one_engine
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


@one_engine
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
@pytest.mark.parametrize(
    ("text", "mode", "problem"), [("k", 0o644, "chmod 600"), ("\n", 0o600, "is empty"), (None, 0, "keys")]
)
def test_key_file_open_to_others_empty_or_absent_is_refused(
    tmp_path: Path, text: str | None, mode: int, problem: str
) -> None:
    path = tmp_path / "keys"
    if text is not None:
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


@one_engine
def test_ledger_of_lost_events_holds_a_loss_once(engine: str, tmp_path: Path) -> None:
    database = tmp_path / "log.duckdb"
    for lost in (3, 0, 2):
        if lost:
            store_of(database).journal.record_loss(m.Loss(lost, "2026-01-01", "2026-01-02", "test"))
        write_segment(database, START_NS, 1)
        ingest(database)
    verdict = store_of(database).verify()
    assert verdict.intact and verdict.lost == 5 and verdict.entries == 5


@one_engine
def test_verify_without_ledger_is_bad_news(log: Path) -> None:
    change(log, "DROP TABLE ledger")
    assert not store_of(log).verify().intact


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("DELETE FROM ledger WHERE position = 1", "comes after 0"),
        ("INSERT INTO ledger SELECT * FROM ledger WHERE position = 2", "comes after 2"),
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


@one_engine
def test_verify_damaged_ledger_gives_findings_and_no_traceback(log: Path) -> None:
    store_of(log).purge(moment(START_NS + DAY_NS))
    huge = "1" + 30 * "0"
    for detail in (
        "x",
        "[]",
        '{"before": "x"}',
        '{"before": 1e999, "heads": {}, "left": {}, "wrong": {}}',
        "[" * 9999,
        f'{{"before": {huge}, "heads": {{"x": {huge}}}, "left": {{}}, "wrong": {{}}}}',
        f'{{"before": {huge}, "removed": {{"x": [[{huge}, {huge}], [0, 1], [-1, {huge}]]}}, "wrong": {{}}}}',
        f'{{"before": -{huge}, "removed": {{}}, "wrong": {{"x": [{huge}, null, -{huge}]}}}}',
        '{"before": NaN, "removed": {"x": 7}, "wrong": []}',
        '{"before": 1, "removed": {"x": [[1]]}, "wrong": {"x": []}}',
        '{"before": 1, "removed": {"x": [[1, null]], "x": [], "x": [[1, 2]]}, "wrong": {}}',
        '{"before": 1, "heads": {"x": 1}, "wrong": {}}',
    ):
        change(log, f"UPDATE ledger SET detail = '{detail}' WHERE kind = 'purge'")
        assert "chain" in {kind for kind, _ in said(log)}


@one_engine
def test_cli_verify_says_intact_or_what_is_not(
    log: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = ("verify", "--db", str(log))
    done = cli(*verify)
    assert (done.returncode, done.stdout) == (0, "intact; 8 events in 2 segments of 1 journal\n"), done
    change(log, "UPDATE logs SET name = 'x' WHERE seq = 1")
    done = cli(*verify)
    assert done.returncode == 1 and "NOT intact, 2 findings" in done.stdout
    done = cli(*verify, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and answer["intact"] is False
    assert answer["findings"][0]["events"] == [f"{segments_of(log)[0]}:1"]
    monkeypatch.setattr(m, "_MAX_FINDINGS", 1)
    assert "\nand 1 more\nNOT intact, 2 findings; " in cli(*verify).stdout
    done = cli(*verify, "--checkpoint", str(tmp_path))
    assert done.returncode == 2 and "is no checkpoint" in done.stderr and "Traceback" not in done.stderr


@one_engine
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


@one_engine
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


@one_engine
def test_cli_verify_since_says_what_it_left_out(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(log, f"UPDATE logs SET name = 'x' WHERE segment = '{segments_of(log)[0]}'")
    assert m.main(["verify", "--db", str(log), "--since", moment(START_NS + DAY_NS - 1000)]) == 0
    assert "segments before 2026-05-29" in capsys.readouterr().out


@one_engine
def test_verify_database_without_ledger_is_no_proof_of_a_checkpoint(log: Path) -> None:
    heads = store_of(log).heads()
    change(log, "DROP TABLE ledger", "DROP TABLE logs")
    change(log, "CREATE TABLE logs (timestamp TIMESTAMP, name TEXT)")
    texts = [finding.text for finding in store_of(log).verify(checkpoint=heads).findings]
    assert "there is no ledger, so that nothing can be proved" in texts


def test_iso_time_of_moments_that_no_calendar_has() -> None:
    assert m.iso_time(None) is None and m.iso_time(2**62) == f"{2**62} microseconds"
