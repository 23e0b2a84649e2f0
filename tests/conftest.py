"""What all tests share: both engines, the command line as a process, the labelled cases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = Path(os.environ.get("MXCP_AUDIT_CASES", ROOT.parent / "shared" / "cases"))
DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(ROOT))


def load_cases(name: str) -> Any:
    """Return the labelled third-party cases of a file, or skip the test where they are absent."""
    path = CASES / name
    if not path.exists():
        pytest.skip(f"{path} is absent: it holds third-party data and is not part of the project")
    return json.loads(path.read_text(encoding="utf-8"))


def child_environment(**changes: str) -> dict[str, str]:
    """Return an environment in which a child finds the module, and nothing of ours is set but `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MXCP_")}
    kept["PYTHONPATH"] = str(ROOT)
    return {**kept, **changes}


def find_pythons() -> dict[str, str]:
    """Return the interpreters from 3.10 on that this machine has, by version."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    homes = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python"))
    for minor in range(10, 20):
        version = f"3.{minor}"
        for home in homes:
            if home.parent.parent.name.startswith(version + "."):
                found.setdefault(version, str(home))
        there = shutil.which(f"python{version}")
        if there and subprocess.run([there, "-c", ""], capture_output=True).returncode == 0:
            found.setdefault(version, there)
    return found


PYTHONS = find_pythons()


def make_environment(name: str, *requirements: str, python: str = sys.executable) -> str:
    """Return the Python of a virtual environment with these packages, or skip if they can't be had."""
    made = subprocess.run(
        [str(ROOT / "tools" / "environment"), name, *requirements],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no environment with {', '.join(requirements)}: {made.stderr.strip()[-300:]}")
    return made.stdout.strip()


def find_duckdb_program() -> str:
    """Return the path of the real program, from the package `duckdb-cli`."""
    import mxcp_audit

    program = mxcp_audit.find_program({"PATH": ""})
    if program is None:
        pytest.skip("the package duckdb-cli is not installed")
    return program


@pytest.fixture(params=["package", "cli"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once on each engine, in this process and in its children."""
    monkeypatch.setenv("MXCP_AUDIT_ENGINE", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the person who runs the tests has set may matter."""
    for name in list(os.environ):
        if name.startswith("MXCP_") and name not in ("MXCP_AUDIT_CASES", "MXCP_AUDIT_ENGINE"):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


# The site file that most tests of the command line begin with.
SITE = """\
mxcp: 1
project: shop
profile: default
profiles:
  default:
    audit:
      enabled: true
  production:
    audit:
      enabled: true
"""

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a function that runs `python -m mxcp_audit` as a process of its own, in `tmp_path`."""

    def run(*arguments: str, cwd: Path = tmp_path, **changes: str) -> subprocess.CompletedProcess[str]:
        chosen = os.environ.get("MXCP_AUDIT_ENGINE")
        if chosen:
            changes.setdefault("MXCP_AUDIT_ENGINE", chosen)
        return subprocess.run(
            [sys.executable, "-m", "mxcp_audit", *arguments],
            cwd=cwd,
            env=child_environment(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[Any]:
    """Yield a logger into `tmp_path/log.duckdb`, shut down afterwards."""
    from mxcp_audit import AuditLogger

    audit = AuditLogger(tmp_path / "log.duckdb")
    yield audit
    audit.shutdown()


def table_rows(path: Path, sql: str = "SELECT * FROM logs ORDER BY timestamp, segment, seq") -> list[Any]:
    """Return rows of a database, read with the real package and none of our code."""
    import duckdb

    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what of the matrix was there: a green run says little where half of it was missing."""
    import mxcp_audit

    program = mxcp_audit.find_program({"PATH": ""})
    version = subprocess.run([program, "-version"], capture_output=True, text=True).stdout if program else ""
    found = sorted(path.name for path in (ROOT / ".venv").glob("*") if (path / "stamp").exists())
    terminalreporter.write_line(
        f"matrix: Python {', '.join(PYTHONS)}; program {version.split(' ')[0] or 'none'}"
    )
    terminalreporter.write_line(f"matrix: environments {', '.join(found) or 'none'}")
