"""The promise "copy this one file": alone, under another name, with whatever of DuckDB is there."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PYTHONS, ROOT, child_environment, find_duckdb_program, make_environment

RECORD = """
import our_audit, sys, threading
assert threading.active_count() == 1, "importing must start no thread"
assert "duckdb" not in sys.modules, "importing must not load DuckDB"
audit = our_audit.AuditLogger("log.duckdb")
audit.log_event("cli", "tool", "vendored", {"password": "hunter2"}, 3)
assert audit.flush(30)
print(audit.counters.written, audit.counters.ingested)
"""


LOG = ("-m", "our_audit", "log", "--db", "log.duckdb")


def run(python: str, folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**child_environment(), "PATH": os.defpath, **changes}
    del environment["PYTHONPATH"]
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "mxcp_audit.py", tmp_path / "our_audit.py")
    return tmp_path


def assert_recorded_and_queried(python: str, folder: Path, **changes: str) -> None:
    recorded = run(python, folder, "-W", "error", "-c", RECORD, **changes)
    assert (recorded.returncode, recorded.stdout, recorded.stderr) == (0, "1 1\n", "")
    queried = run(python, folder, *LOG, "--json", **changes)
    assert queried.returncode == 0, queried.stderr
    (event,) = json.loads(queried.stdout)
    assert event["name"] == "vendored" and event["input_json"] == '{"password":"[REDACTED]"}'


def test_vendored_with_the_package_only_works(folder: Path) -> None:
    assert_recorded_and_queried(make_environment("package", "duckdb"), folder)


@pytest.mark.parametrize("version", PYTHONS)
def test_vendored_with_the_program_only_works(folder: Path, version: str) -> None:
    python = make_environment(f"bare-{version}", python=PYTHONS[version])
    assert_recorded_and_queried(python, folder, MXCP_AUDIT_DUCKDB=find_duckdb_program())


def test_vendored_with_the_program_on_path_works(folder: Path) -> None:
    program = Path(find_duckdb_program())
    assert_recorded_and_queried(
        make_environment("bare"), folder, PATH=f"{program.parent}{os.pathsep}{os.defpath}"
    )


def test_vendored_with_neither_records_to_the_journal_and_says_what_to_install(folder: Path) -> None:
    python = make_environment("bare")
    recorded = run(python, folder, "-c", RECORD)
    assert (recorded.returncode, recorded.stdout) == (0, "1 0\n")
    assert recorded.stderr.count("pip install duckdb") == 1  # one warning, however many events
    queried = run(python, folder, *LOG)
    assert queried.returncode == 1 and queried.stdout == ""
    assert "pip install duckdb" in queried.stderr and "Traceback" not in queried.stderr
    later = run(python, folder, *LOG, "--json", MXCP_AUDIT_DUCKDB=find_duckdb_program())
    assert [event["name"] for event in json.loads(later.stdout)] == ["vendored"]


def test_vendored_with_an_engine_asked_for_that_is_missing_says_so(folder: Path) -> None:
    for choice, word in (
        ("package", "pip install duckdb"),
        ("cli", "MXCP_AUDIT_DUCKDB"),
        ("oracle", "package or cli"),
    ):
        queried = run(make_environment("bare"), folder, *LOG, MXCP_AUDIT_ENGINE=choice)
        assert queried.returncode == 1 and word in queried.stderr and "Traceback" not in queried.stderr


def test_vendored_messages_name_no_page_that_was_not_copied() -> None:
    tree = ast.parse((ROOT / "mxcp_audit.py").read_text(encoding="utf-8"))
    texts = {
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    assert [node.value for node in texts - docstrings if "docs/" in node.value or ".md" in node.value] == []
