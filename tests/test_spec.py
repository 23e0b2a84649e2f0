"""Every command line of the specification, with `mxcp` read as `python -m mxcp_audit`, and its snippets."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SITE, Cli, table_rows

from mxcp_audit import AuditLogger

# name, type, status, policy: old ones first, then those of the last minute.
EVENTS = (
    ("my_analysis_tool", "tool", "success", "allow"),
    ("reports/{report_id}", "resource", "success", "n/a"),
    ("generate_summary", "prompt", "success", "n/a"),
    ("data_processor", "tool", "error", "n/a"),
    ("data_processor", "tool", "error", "deny"),
)
OLD = ("data_processor", "tool", "error", "deny")  # ten days ago


def fill(database: Path) -> None:
    (database.parent / "mxcp-site.yml").write_text(SITE)
    for profile, ago, events in (
        ("default", 10 * 86400, (OLD,) * 120),
        ("default", 1, EVENTS),
        ("production", 1, EVENTS[:1]),
    ):
        with AuditLogger(database.parent / f"logs-{profile}.duckdb") as audit:
            audit._encoder._clock = lambda ago=ago: time.time_ns() - ago * 10**9  # type: ignore[misc]
            for name, kind, status, policy in events:
                why, error = "no" * (policy == "deny") or None, "boom" * (status == "error") or None
                audit.log_event("http", kind, name, {"q": 1, "password": "x"}, 5, policy, why, status, error)


@pytest.fixture
def site(engine: str, copy_of: Callable[..., Path]) -> Path:
    """A folder with the specification's site file and a log: 120 old events, then EVENTS now."""
    return copy_of(fill).parent


# The command lines of the specification, and how many events each answers with.
SHOWN = {
    "mxcp log": 100,
    "mxcp log --profile production": 1,
    "mxcp log --tool my_analysis_tool": 1,
    'mxcp log --resource "reports/{report_id}"': 1,
    "mxcp log --prompt generate_summary": 1,
    "mxcp log --type tool": 100,
    "mxcp log --policy denied": 100,
    "mxcp log --status error": 100,
    "mxcp log --since 10m": 5,
    "mxcp log --since 2h": 5,
    "mxcp log --since 1d": 5,
    "mxcp log --type tool --status error --since 1h": 2,
    "mxcp log --json": 100,
    "mxcp log --limit 500": 125,
    "mxcp log --limit 20": 20,
    "mxcp log --tool data_processor --status error --since 1d": 2,
}
EXPORTED = {
    "mxcp log --export audit-report.csv": 125,
    "mxcp log --policy denied --export denied-requests.csv": 121,
    "mxcp log --policy denied --since 7d --export security-audit.csv": 1,
    "mxcp log --type tool --status success --export tool-usage.csv": 1,
    "mxcp log --type tool --export performance.csv": 123,
    "mxcp log --export archive-2024.csv": 125,
}
TEN = [
    *("timestamp", "caller", "type", "name", "input_json", "duration_ms", "policy_decision", "reason"),
    *("status", "error"),
]


def words(line: str) -> list[str]:
    program, *arguments = shlex.split(line)
    assert program == "mxcp"
    return arguments


def test_spec_each_query_shows_its_events(site: Path, cli: Cli) -> None:
    for line, expected in SHOWN.items():
        done = cli(*words(line))
        assert done.returncode == 0, (line, done.stderr)
        if "--json" in line:
            events = json.loads(done.stdout)
            assert len(events) == expected and list(events[0])[:10] == TEN
            continue
        rows = [text for text in done.stdout.splitlines()[1:] if not text.startswith("    ")]
        assert len(rows) == expected, line
        assert done.stderr.startswith(f"{expected} event"), line
        as_json = json.loads(cli(*words(line), "--json").stdout) if expected < 20 else []
        for option, column in (("--tool", "name"), ("--status", "status"), ("--prompt", "name")):
            if option in words(line):
                wanted = words(line)[words(line).index(option) + 1]
                assert all(event[column] == wanted for event in as_json), line


def test_spec_each_export_writes_its_events(site: Path, cli: Cli) -> None:
    for line, expected in EXPORTED.items():
        done = cli(*words(line))
        assert done.returncode == 0 and done.stdout == "", (line, done.stderr)
        with open(site / words(line)[-1], newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == expected, line
        assert list(rows[0])[:10] == TEN
        assert {row["input_json"] for row in rows} == {'{"q":1,"password":"[REDACTED]"}'}


def test_spec_table_has_the_documented_columns_and_types(site: Path) -> None:
    columns = table_rows(site / "logs-default.duckdb", "SELECT column_name, column_type FROM (DESCRIBE logs)")
    assert columns[:10] == [
        (name, {"timestamp": "TIMESTAMP", "duration_ms": "INTEGER"}.get(name, "VARCHAR")) for name in TEN
    ]


def test_spec_backup_by_copy_is_a_log(site: Path, cli: Cli) -> None:
    """cp logs-production.duckdb logs-production-backup-$(date +%Y%m%d).duckdb"""
    shutil.copy(site / "logs-production.duckdb", site / "logs-production-backup-20260101.duckdb")
    done = cli("log", "--json", "--db", "logs-production-backup-20260101.duckdb")
    assert [event["name"] for event in json.loads(done.stdout)] == ["my_analysis_tool"]


def test_spec_truncation_by_sql_keeps_the_rest(site: Path, cli: Cli) -> None:
    """DELETE FROM logs WHERE timestamp < '2024-01-01', with a day that deletes something here."""
    import duckdb

    with duckdb.connect(str(site / "logs-default.duckdb")) as connection:
        connection.execute("DELETE FROM logs WHERE timestamp < '2024-01-01'")
        connection.execute("DELETE FROM logs WHERE timestamp < now()::TIMESTAMP - INTERVAL 5 DAY")
    assert len(json.loads(cli("log", "--json", "--limit", "500").stdout)) == 5
    with AuditLogger(site / "logs-default.duckdb") as audit:
        audit.log_event("cli", "tool", "after")
    assert len(json.loads(cli("log", "--json", "--limit", "500").stdout)) == 6


def test_spec_database_not_found_names_both_reasons(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mxcp-site.yml").write_text(SITE + "  silent: {}\n")
    done = cli("log")
    assert done.returncode == 1 and "Audit database not found" in done.stderr
    assert "not enabled for the profile" in done.stderr and "no events have been logged yet" in done.stderr
    disabled = cli("log", "--profile", "silent")
    assert disabled.returncode == 2 and "not enabled" in disabled.stderr
    assert os.listdir(tmp_path) == ["mxcp-site.yml"]


def test_spec_default_path_is_named_after_the_profile(tmp_path: Path) -> None:
    (tmp_path / "mxcp-site.yml").write_text(SITE)
    with AuditLogger.from_config(tmp_path / "mxcp-site.yml", profile="production") as audit:
        audit.log_event("cli", "tool", "x")
    assert (tmp_path / "logs-production.duckdb").exists()


def test_spec_lists_no_command_that_is_not_tested_here() -> None:
    """Where the specification itself can be read: its list of commands is the one above."""
    path = Path(os.environ.get("MXCP_AUDIT_CASES", "/nowhere")).parent / "spec.md"
    if not path.exists():
        pytest.skip("the specification is absent")
    found = re.findall(r"^(mxcp (?!serve).*?)\s*(?:#.*)?$", path.read_text(), re.MULTILINE)
    assert {line.strip() for line in found} == {*SHOWN, *EXPORTED}
