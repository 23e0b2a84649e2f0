"""The database opens in every DuckDB that people have, and older DuckDBs can write and read it, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    child_environment,
    find_duckdb_program,
    make_environment,
    run_process,
    write_table_of_mxcp,
)

from mxcp_audit import AuditLogger
from tools.matrix import CELLS, Cell

OLDER = [cell for cell in CELLS if cell.package]
older = pytest.mark.parametrize("cell", OLDER, ids=lambda cell: cell.package)
COUNT = "SELECT count(*) FROM logs WHERE name = 'find me' AND input_json = '{\"id\":7}'"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "log.duckdb"
    with AuditLogger(path) as audit:
        audit.log_event("cli", "tool", "find me", {"id": 7}, 1)
    return path


@older
def test_database_of_the_newest_duckdb_opens_in_an_older_package(database: Path, cell: Cell) -> None:
    python = make_environment(cell.name, *cell.requirements, python=cell.interpreter())
    script = (
        f"import duckdb; connection = duckdb.connect({str(database)!r}, read_only=True)\n"
        f"print(connection.execute({COUNT!r}).fetchall())"
    )
    assert subprocess.run([python, "-c", script], capture_output=True, text=True).stdout == "[(1,)]\n"


def test_database_of_the_newest_duckdb_opens_in_the_program(database: Path) -> None:
    shown = subprocess.run(
        [find_duckdb_program(), "-no-init", "-readonly", "-csv", "-noheader", str(database), COUNT],
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "1\n", shown.stderr


@older
def test_older_duckdb_ingests_and_queries(tmp_path: Path, database: Path, cell: Cell) -> None:
    python = make_environment(cell.name, *cell.requirements, python=cell.interpreter())
    environment = child_environment(MXCP_AUDIT_ENGINE="package")
    script = (
        "from mxcp_audit import AuditLogger\n"
        f"with AuditLogger({str(database)!r}) as audit:\n"
        "    audit.log_event('cli', 'tool', 'from an older one', {'id': 8}, 1)\n"
        "assert audit.counters.ingested == 1, audit.counters"
    )
    written = subprocess.run([python, "-c", script], env=environment, capture_output=True, text=True)
    assert (written.returncode, written.stderr) == (0, "")
    queried = subprocess.run(
        [python, "-m", "mxcp_audit", "log", "--db", str(database), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert [event["name"] for event in json.loads(queried.stdout)] == ["from an older one", "find me"]


def test_table_of_mxcp_with_ten_columns_is_read_and_widened(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "old.duckdb"
    write_table_of_mxcp(path)

    def names() -> list[str]:
        shown = run_process(
            [sys.executable, "-m", "mxcp_audit", "log", "--db", str(path), "--json"], MXCP_AUDIT_ENGINE=engine
        )
        assert shown.returncode == 0, shown.stderr
        return [event["name"] for event in json.loads(shown.stdout)]

    assert names() == ["old"]
    with AuditLogger(path) as audit:
        audit.log_event("cli", "tool", "new", {}, 1, user_id="u")
        assert audit.flush(60) and audit.counters.ingested == 1, audit.counters
    assert names() == ["new", "old"]
