"""The source archive and the wheel hold the one module and the licence, and install on their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, make_environment

FILES = ("mxcp_audit.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tools/stubs/__init__.pyi")
USER = """
from mxcp_audit import AuditLogger

audit = AuditLogger("log.duckdb")
audit.log_event("cli", "tool", "x", {"a": 1}, 5)
done: bool = audit.flush()
audit.log_event("cli", 7, "x")
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both archives from a clean copy; return the folder that they are in."""
    python = make_environment("build", "build", "setuptools>=77", "wheel")
    source = tmp_path_factory.mktemp("source")
    (source / "tools" / "stubs").mkdir(parents=True)
    for name in FILES:
        (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [python, "-m", "build", "--no-isolation", str(source)], capture_output=True, text=True, cwd=source
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return source / "dist"


def test_wheel_holds_the_module_its_types_and_the_licence_only(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    assert wheel.name == "mxcp_audit-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".dist-info/" not in name] == [
        "mxcp_audit.py",
        "mxcp_audit-stubs/__init__.pyi",
    ]
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_metadata_is_complete(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("METADATA"))
        metadata = opened.read(name).decode()
    for line in (
        "Name: mxcp-audit",
        "Version: 0.1.0",
        "Requires-Python: >=3.10",
        "License: MIT",
        "Summary: An audit",
    ):
        assert line in metadata, line
    assert "# mxcp_audit" in metadata and "Provides-Extra: duckdb" in metadata
    assert "Requires-Dist: duckdb>=1.2; extra == " in metadata and metadata.count("Requires-Dist") == 1


def test_source_archive_holds_module_and_licence(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    names = {Path(name).name for name in tarfile.open(archive).getnames()}
    assert {Path(name).name for name in FILES} <= names


def test_wheel_installed_in_a_fresh_environment_runs(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    folder = tmp_path / "fresh" / ("Scripts" if sys.platform == "win32" else "bin")
    subprocess.run([folder / "python", "-m", "pip", "install", "--quiet", "--no-index", wheel], check=True)
    for command in ([folder / "mxcp-audit"], [folder / "python", "-m", "mxcp_audit"]):
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path)
        assert shown.returncode == 0 and shown.stdout.startswith("mxcp_audit 0.1.0"), shown.stderr
    (tmp_path / "user.py").write_text(USER)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", folder / "python", "user.py"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
    )
    assert "user.py:7" in checked.stdout and "Found 1 error" in checked.stdout, checked.stdout


def test_stubs_are_those_of_the_module_as_it_is(tmp_path: Path) -> None:
    subprocess.run([ROOT / "tools" / "make_stubs", tmp_path / "made.pyi"], check=True)
    made = (tmp_path / "made.pyi").read_text()
    assert made == (ROOT / "tools" / "stubs" / "__init__.pyi").read_text(), "run tools/make_stubs"
