"""tools/check_sections.py: silent on the file as it is, and red on each kind of fault."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCE = (ROOT / "mxcp_audit.py").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("check_sections", ROOT / "tools" / "check_sections.py")
assert spec and spec.loader
check_sections = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_sections)


def test_check_sections_on_the_file_as_it_is_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_sections.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_each_mutant_of_torture_breaks_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    mutants = importlib.import_module("torture").MUTANTS
    assert [m.name for m in mutants for old, _ in m.patches if SOURCE.count(old) != 1] == []


MISPLACED = (
    (
        "Events",
        "_ = AuditLogger",
        "Events names AuditLogger of Logger; move one of them: names point up only",
    ),
    ("SQL", "_ = parse_yaml", "SQL names parse_yaml of Config; add it to `depends on`"),
    ("Journal", "_ = Store", "Journal names Store of Store; move one of them: names point up only"),
    ("Events", "_ = time.time_ns()", "Events uses time.time_ns, which belongs to no section"),
    ("Store", "print(1)", "Store uses print, which belongs to Command line"),
    ("Redaction", "import threading", "Redaction uses threading, which belongs to Logger"),
    ("Output", "import duckdb", "Output uses duckdb, which belongs to Engines"),
    ("Store", "os.fsync(1)", "Store uses os.fsync, which belongs to Journal"),
)


def test_check_sections_on_misplaced_names_says_where_and_why() -> None:
    lines = SOURCE.splitlines()
    for section, statement, _ in MISPLACED:
        lines.insert(lines.index(f"# === {section} ===") + 3, statement)
    faults = "\n".join(check_sections.check("\n".join(lines)))
    assert [reason for _, _, reason in MISPLACED if reason not in faults] == []


BROKEN = (  # a pattern, what takes its place, and the fault
    (r"(=== Events ===\n# depends on: Errors)", r"\1, Store", "not above it"),
    (r"(=== Output ===\n# depends on: )", r"\1Calls, ", "Calls, but doesn't"),
    (r"(== Target ==\n# depends on: )", r"\1Calls, ", "Calls, which Store doesn't say"),
    (r"# == Ingest ==", r"_ = Verdict\n\g<0>", "Ledger names Verdict of Evidence"),
    (r"# === Output ===", "# Output", "restore them"),
)


@pytest.mark.parametrize(("pattern", "change", "fault"), BROKEN)
def test_check_sections_on_a_broken_heading_is_red(pattern: str, change: str, fault: str) -> None:
    assert any(fault in each for each in check_sections.check(re.sub(pattern, change, SOURCE)))
