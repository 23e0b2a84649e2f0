"""tools/check_sections.py: silent on the file as it is, and red on each kind of fault."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

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


def test_check_sections_on_a_section_that_depends_on_one_below_is_red() -> None:
    broken = SOURCE.replace(
        "# === Events ===\n# depends on: Errors", "# === Events ===\n# depends on: Errors, Store"
    )
    assert any("not above it" in fault for fault in check_sections.check(broken))


def test_check_sections_on_a_section_that_depends_on_more_than_it_does_is_red() -> None:
    broken = re.sub(r"(# === Output ===\n# depends on: )", r"\1Calls, ", SOURCE)
    assert any("Calls, but doesn't" in fault for fault in check_sections.check(broken))


def test_check_sections_on_a_part_that_depends_on_what_its_section_may_not_is_red() -> None:
    broken = re.sub(r"(# == Target ==\n# depends on: )", r"\1Calls, ", SOURCE)
    assert any("Calls, which Store doesn't say" in fault for fault in check_sections.check(broken))


def test_check_sections_on_a_part_that_names_one_below_is_red() -> None:
    broken = SOURCE.replace("# == Ingest ==", "_ = Verdict\n# == Ingest ==")
    assert any("Ledger names Verdict of Evidence" in fault for fault in check_sections.check(broken))


def test_check_sections_on_a_missing_section_is_red() -> None:
    assert "restore them" in check_sections.check(SOURCE.replace("# === Output ===", "# Output"))[0]
