"""Environments with other versions, made once by `tools/environment`, and what runs in them."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_process, words

SERVERS = Path(__file__).resolve().parent / "servers"
REQUIREMENTS = {
    "fastmcp": ("fastmcp", "duckdb"),
    "fastmcp4": ("fastmcp[tasks]", "duckdb", "opentelemetry-sdk"),
    "fastmcp3": ("fastmcp[tasks]<4", "duckdb", "opentelemetry-sdk"),
    "fastmcp2": ("fastmcp<3", "duckdb"),
    "mxcp022": (
        *("mxcp==0.2.2", "dbt-core<1.10", "dbt-duckdb<1.10", "mcp<1.12", "cel-python<0.4", "pydantic<2.12"),
    ),
}


@functools.cache
def _made(name: str) -> tuple[str | None, str]:
    made = subprocess.run(
        [str(ROOT / "tools" / "environment"), name, *REQUIREMENTS[name]],
        env={**os.environ, "PYTHON": getattr(sys, "_base_executable", sys.executable)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = made.stdout.split()
    return (lines[-1], "") if made.returncode == 0 and lines else (None, made.stderr[-500:])


def python_with(name: str) -> str:
    """Return the Python of an environment; skip the test, with the reason, if it can't be made here."""
    if name == "fastmcp" and importlib.util.find_spec("fastmcp"):
        return sys.executable
    python, reason = _made(name)
    if python is None:
        pytest.skip(f"the environment {name} can't be made here: {reason}")
    return python


# What comes of the calls of servers/mcp_client.py.
OUTCOMES = words("answered error error answered error error answered raised answered raised")


def outcomes_of(python: str, script: str, server: list[str], folder: Path, **changes: str) -> list[Any]:
    """Let a client of tests/servers talk to a server; return what came of each of its calls."""
    done = run_process([python, str(SERVERS / script), *server], cwd=folder, **changes)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))
