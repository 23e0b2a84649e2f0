"""Every command and every Python example in README.md and docs/ runs, in order, page by page.

A block marked `bash` is run by bash, one marked `python` by Python, in a folder with the file, a site
file and some events. What can't be run here (installing, other people's servers) is marked `text`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, child_environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
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
EVENTS = """
from mxcp_audit import AuditLogger
for profile in ("default", "production"):
    with AuditLogger.from_config(profile=profile) as audit:
        audit.log_event("cli", "tool", "get_user", {"id": 7, "password": "hunter2"}, 12, session_id="s1")
        audit.log_event("http", "tool", "delete_user", {"id": 7}, 1, "deny", "not an admin", "error", "no")
        audit.log_event("http", "resource", "reports/{report_id}", {"report_id": "x"}, 3)
        audit.log_event("stdio", "prompt", "generate_summary", {"text": "long"}, 5)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "mxcp_audit.py", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "mxcp-site.yml").write_text(SITE)
    bin_folder = tmp_path / ".bin"
    bin_folder.mkdir()
    for name, arguments in (("python", ""), ("python3", ""), ("mxcp-audit", " -m mxcp_audit")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    subprocess.run([sys.executable, "-c", EVENTS], cwd=tmp_path, env=environment(tmp_path), check=True)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    found = child_environment(
        PATH=f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(folder)
    )
    return {**found, "MXCP_DOCS_TEST": "1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_every_command_and_example_runs(page: Path, folder: Path) -> None:
    ran = 0
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", code]
        elif language == "python":
            command = [sys.executable, "-c", code]
        elif language == "json":
            json.loads(code)
            continue
        else:
            assert language in ("text", "yaml", "sql", "console", "ini", "mermaid", "toml"), language
            continue
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran += 1
    print(f"{page.name}: {ran} blocks ran")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_every_link_leads_to_a_file(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_read_journal_reads_what_the_logger_wrote(folder: Path) -> None:
    script = (
        "from mxcp_audit import AuditLogger\n"
        "import os\n"
        "audit = AuditLogger('new.duckdb', flush_interval=60)\n"
        "for n in range(3): audit.log_event('cli', 'tool', f'é{n}\\n', {'n': n}, 1)\n"
        "import time\n"
        "while audit.counters.written < 3: time.sleep(0.01)\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment(folder), check=True)
    read = subprocess.run(
        [sys.executable, "tools/read_journal.py", "new.duckdb.journal"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    ours = subprocess.run(
        [sys.executable, "-m", "mxcp_audit", "log", "--db", "new.duckdb", "--json"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    theirs = [json.loads(line) for line in read.stdout.splitlines()]
    assert [event.pop("seq") for event in theirs] == [1, 2, 3]
    assert theirs == json.loads(ours.stdout)[::-1]
