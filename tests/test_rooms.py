"""tools/check_rooms.py: silent on the file as it is, and red on each kind of fault."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCE = (ROOT / "mxcp_audit.py").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("check_rooms", ROOT / "tools" / "check_rooms.py")
assert spec and spec.loader
check_rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_rooms)


def test_check_rooms_on_the_file_as_it_is_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_rooms.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("room", "statement", "reason"),
    [
        ("Events", "_ = AuditLogger", "names point up only"),
        ("Writer", "_ = parse_yaml", "add it to `may name`"),
        ("Journal", "_ = Store", "names point up only"),
        ("Events", "_ = time.time_ns()", "belongs to no room"),
        ("Store", "print(1)", "belongs to Command line"),
        ("Redaction", "import threading", "belongs to"),
        ("Output", "import duckdb", "belongs to Engines"),
        ("Store", "os.fsync(1)", "belongs to Journal"),
    ],
)
def test_check_rooms_on_a_misplaced_name_says_where_and_why(room: str, statement: str, reason: str) -> None:
    lines = SOURCE.splitlines()
    banner = lines.index(f"# === {room} ===")
    lines.insert(banner + 3, statement)
    faults = "\n".join(check_rooms.check("\n".join(lines)))
    assert re.search(reason, faults), faults


def test_check_rooms_on_a_room_that_may_name_one_below_is_red() -> None:
    broken = SOURCE.replace(
        "# === Events ===\n# may name: Errors", "# === Events ===\n# may name: Errors, Store"
    )
    assert any("not above it" in fault for fault in check_rooms.check(broken))


def test_check_rooms_on_a_room_that_may_name_more_than_it_does_is_red() -> None:
    broken = re.sub(r"(# === Output ===\n# may name: )", r"\1Calls, ", SOURCE)
    assert any("Calls, but doesn't" in fault for fault in check_rooms.check(broken))


def test_check_rooms_on_a_part_that_may_name_what_its_room_may_not_is_red() -> None:
    broken = re.sub(r"(# == Target ==\n# may name: )", r"\1Calls, ", SOURCE)
    assert any("Calls, which Store doesn't say" in fault for fault in check_rooms.check(broken))


def test_check_rooms_on_a_part_that_names_one_below_is_red() -> None:
    broken = SOURCE.replace("# == Ingest ==", "_ = Verifier\n# == Ingest ==")
    assert any("Ledger names Verifier of Evidence" in fault for fault in check_rooms.check(broken))


def test_check_rooms_on_a_missing_room_is_red() -> None:
    assert "restore them" in check_rooms.check(SOURCE.replace("# === Output ===", "# Output"))[0]
