"""The database opens in every DuckDB that people have, and older DuckDBs can write and read it, too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import (
    find_duckdb_program,
    make_environment,
    run_process,
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


def test_database_of_the_newest_duckdb_opens_in_the_program(database: Path) -> None:
    shown = subprocess.run(
        [find_duckdb_program(), "-no-init", "-readonly", "-csv", "-noheader", str(database), COUNT],
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "1\n", shown.stderr


@older
def test_older_duckdb_opens_it_ingests_and_queries(database: Path, cell: Cell) -> None:
    python = make_environment(cell.name, *cell.requirements, python=cell.interpreter())
    script = (
        "import duckdb, sys; from mxcp_audit import AuditLogger, main\n"
        "with duckdb.connect(sys.argv[1], read_only=True) as connection:\n"
        f"    assert connection.execute({COUNT!r}).fetchall() == [(1,)]\n"
        "with AuditLogger(sys.argv[1]) as audit:\n"
        "    audit.log_event('cli', 'tool', 'from an older one', {'id': 8}, 1)\n"
        "assert audit.counters.ingested == 1, audit.counters\n"
        "main(['log', '--json', '--db', sys.argv[1]])"
    )
    done = run_process([python, "-c", script, database], MXCP_AUDIT_ENGINE="package")
    assert (done.returncode, done.stderr) == (0, "")
    assert [event["name"] for event in json.loads(done.stdout)] == ["from an older one", "find me"]
