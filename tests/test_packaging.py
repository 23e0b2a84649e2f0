"""The source archive and the wheel hold the one module and the licence, and install on their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, make_environment

IGNORED = (".venv*", ".git", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis")
SOURCES = {"mxcp_audit.py", "tools/stubs/__init__.pyi", "README.md", "LICENSE"}
SOURCES |= {"setup.cfg", "pyproject.toml", "PKG-INFO"}
USER = """
from mxcp_audit import AuditLogger, Config, load_config

audit = AuditLogger("log.duckdb")
audit.log_event("cli", "tool", "x", {"a": 1}, 5)
done: bool = audit.flush()

@audit.tool()
def double(number: int) -> int:
    return 2 * number

async def main(server: object) -> None:
    async with audit.record("tool", "y", caller="http") as call:
        call.policy("warn", "late")
    audit.instrument(server)

def retention_of(profile: str) -> float | None:
    config: Config = load_config(profile=profile)
    return config.retention

four: int = double(2)
"""
# Each of these lines, added to the program above, is an error that mypy must see.
MISTAKES = (
    *('audit.log_event("cli", 7, "x")', 'audit.log_event("cli", "tool")', 'double("2")'),
    *("five: str = double(2)", "AuditLogger(7)", "audit.no_such_thing", "load_config(profil=None)"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clean copy of the project."""
    folder = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*IGNORED))
    return folder


@pytest.fixture(scope="module")
def builder() -> str:
    """Return a Python that can build without asking anybody for the tools."""
    return make_environment("build", "build", "pip", "setuptools>=77", "wheel")


@pytest.fixture(scope="module")
def archives(source: Path, builder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both archives, once for all workers; return the folder that they are in."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "archives"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            command = [builder, "-m", "build", "--no-isolation", "--outdir", f"{folder}.part", str(source)]
            built = subprocess.run(command, capture_output=True, text=True, cwd=source)
            assert built.returncode == 0, built.stdout + built.stderr
            os.rename(f"{folder}.part", folder)
    return folder


def test_wheel_holds_the_module_its_types_and_the_licence_only(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    assert wheel.name == "mxcp_audit-0.2.0-py3-none-any.whl"
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
    for line in ("Name: mxcp-audit", "Version: 0.2.0", "Requires-Python: >=3.10", "License: MIT"):
        assert line in metadata, line
    assert "Summary: An audit" in metadata
    assert "# mxcp_audit" in metadata and "Provides-Extra: duckdb" in metadata
    assert "Requires-Dist: duckdb>=1.2; extra == " in metadata and metadata.count("Requires-Dist") == 1


def test_source_archive_holds_module_and_licence(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]
    own = {name for name in files if ".egg-info/" not in name}
    assert {name for name in own if not name.startswith("tests/test_")} == SOURCES  # those setuptools adds


@pytest.fixture(scope="module")
def fresh(archives: Path, builder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a fresh environment; return the folder of its programs."""
    (wheel,) = archives.glob("*.whl")
    home = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(home)
    folder = home / ("Scripts" if sys.platform == "win32" else "bin")
    install = [builder, "-m", "pip", "--python", folder / "python", "install", "--quiet", "--no-index"]
    subprocess.run([*install, wheel], check=True)
    return folder


def test_wheel_installed_in_a_fresh_environment_runs(fresh: Path, tmp_path: Path) -> None:
    for command in ([fresh / "mxcp-audit"], [fresh / "python", "-m", "mxcp_audit"]):
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path)
        assert shown.returncode == 0 and shown.stdout.startswith("mxcp_audit 0.2.0"), shown.stderr


def test_wheel_brings_types_for_a_users_program(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER + "\n".join(MISTAKES) + "\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", fresh / "python", "."],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
    )
    first = USER.count("\n") + 1
    lines = {line.split(": error:")[0] for line in checked.stdout.splitlines() if ": error:" in line}
    expected = {f"wrong.py:{first + number}" for number in range(len(MISTAKES))}
    assert lines == expected, checked.stdout


def test_stubs_are_those_of_the_module_as_it_is(tmp_path: Path) -> None:
    subprocess.run([ROOT / "tools" / "make_stubs", tmp_path / "made.pyi"], check=True)
    made = (tmp_path / "made.pyi").read_text()
    assert made == (ROOT / "tools" / "stubs" / "__init__.pyi").read_text(), "run tools/make_stubs"
