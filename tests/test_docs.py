"""Every command and every Python example in README.md and docs/ runs, in order, page by page.

A block marked `bash` is run by bash, one marked `python` by Python, in a folder with the file, a site
file and some events. What can't be run here (installing, other people's servers) is marked `text`.
Site files are loaded, other YAML is parsed, systemd verifies its units, a crontab's commands run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT, SITE, child_environment

import mxcp_audit
from mxcp_audit import AuditLogger, load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


def fill(database: Path) -> None:
    folder = database.parent
    shutil.copy(ROOT / "mxcp_audit.py", folder)
    shutil.copytree(ROOT / "tools", folder / "tools")
    (folder / "mxcp-site.yml").write_text(SITE)
    bin_folder = folder / ".bin"
    bin_folder.mkdir()
    for name, arguments in (("python", ""), ("python3", ""), ("mxcp-audit", " -m mxcp_audit")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        script.chmod(0o755)
    for profile in ("default", "production"):
        with AuditLogger.from_config(folder / "mxcp-site.yml", profile=profile) as audit:
            audit.log_event("cli", "tool", "get_user", {"id": 7, "password": "hunter2"}, 12, session_id="s1")
            audit.log_event(
                "http", "tool", "delete_user", {"id": 7}, 1, "deny", "not an admin", "error", "no"
            )
            audit.log_event("http", "resource", "reports/{report_id}", {"report_id": "x"}, 3)
            audit.log_event("stdio", "prompt", "generate_summary", {"text": "long"}, 5)


@pytest.fixture
def folder(copy_of: Callable[..., Path]) -> Path:
    return copy_of(fill).parent


def environment(folder: Path) -> dict[str, str]:
    found = child_environment(
        PATH=f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(folder)
    )
    return {**found, "MXCP_DOCS_TEST": "1"}


def run(command: list[str], folder: Path) -> str:
    """Run a command of the docs, which must succeed; return what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    assert not re.search("^Traceback", done.stderr, re.MULTILINE)  # FastMCP shows those of tools in boxes
    return done.stdout


def check_yaml(code: str, folder: Path) -> None:
    """A site file must load, in each of its profiles; what is no site file is an object of Kubernetes."""
    yaml = pytest.importorskip("yaml")
    document = yaml.safe_load(code)
    if "profiles" not in document:
        assert document["kind"] in ("Deployment", "CronJob") and document["metadata"]["name"]
        return
    site = folder / "of-the-docs.yml"
    site.write_text(code)
    for profile in document["profiles"]:
        assert load_config(config=site, profile=profile).enabled


def check_unit(code: str, folder: Path) -> None:
    """A unit of systemd, its name in the first line; verified where systemd is there."""
    name = Path(code.splitlines()[0].removeprefix("# ")).name
    units = folder / "units"
    units.mkdir(exist_ok=True)
    python = folder / ".venv" / "bin" / "python"
    if not python.exists():
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    (units / name).write_text(code.replace("/srv/shop", str(folder)))
    service = units / name.replace(".timer", ".service")
    if shutil.which("systemd-analyze") and service.exists():
        command = ["systemd-analyze", "verify", "--man=no", str(units / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and str(units) not in done.stderr, (
            done.stderr
        )  # an unknown key is a warning


def check_crontab(code: str, folder: Path) -> None:
    """Five fields and a command, which runs, with the paths of this folder."""
    places = {"/srv/shop": str(folder), "/srv": str(folder), ".venv/bin/python": "python", r"\%": "%"}
    for line in code.splitlines():
        if line.startswith("#"):
            continue
        *fields, command = line.split(maxsplit=5)
        assert len(fields) == 5 and re.fullmatch(r"[0-9*/, ]+", " ".join(fields))
        for place, here in places.items():
            command = command.replace(place, here)
        (folder / "backup").mkdir(exist_ok=True)
        run(["sh", "-c", command], folder)


CHECKS = {"yaml": check_yaml, "ini": check_unit, "cron": check_crontab}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_every_command_and_example_runs(page: Path, request: pytest.FixtureRequest) -> None:
    ran, blocks = 0, BLOCK.findall(page.read_text(encoding="utf-8"))
    if not {"bash", "python", *CHECKS}.isdisjoint(language for language, _ in blocks):
        folder = request.getfixturevalue("folder")
    for language, code in blocks:
        if language == "bash":
            run(["bash", "-euo", "pipefail", "-c", code], folder)
        elif language == "python":
            run([sys.executable, "-c", code], folder)
        elif language == "json":
            json.loads(code)
        elif language in CHECKS:
            CHECKS[language](code, folder)
        else:
            assert language in ("text", "sql", "console", "mermaid", "toml"), language
            continue
        ran += 1
    print(f"{page.name}: {ran} blocks ran")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_every_link_leads_to_a_file(page: Path) -> None:
    for target, fragment in LINK.findall(page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        if there.suffix == ".svg":
            assert ElementTree.parse(there).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        if fragment:
            headings = re.findall("^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert fragment in anchors, f"{target}#{fragment}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_every_row_of_a_table_has_the_cells_of_its_head(page: Path) -> None:
    """A `|` in a cell must be written with a backslash, in code as well."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert [row for row, count in zip(table.splitlines(), cells) if count != cells[0]] == []


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
    absent = dict.fromkeys(column.name for column in mxcp_audit.NEW_COLUMNS)
    assert [{**absent, **event} for event in theirs] == json.loads(ours.stdout)[::-1]


def test_journal_format_page_members_and_pattern_are_the_written_ones(tmp_path: Path) -> None:
    """The page's example, pattern and members, against what a logger writes."""
    page = (ROOT / "docs" / "journal-format.md").read_text(encoding="utf-8")
    (example,) = re.findall(r'^\{"timestamp".*\}$', page, re.MULTILINE)
    table = page[page.index("| member | type |") : page.index("No string holds NUL")]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    members = [name for cell in cells for name in re.findall(r"`(\w+)`", cell) if name != "call"]
    audit = AuditLogger(tmp_path / "log.duckdb", flush_interval=3600)
    more = {**dict.fromkeys(("client", "agent", "address", "server", "request_id", "error_type"), "x")}
    audit.log_event("stdio", "tool", "é", {"n": 1}, 1, **more, result_bytes=1, context={"x": 1})
    while audit.counters.written < 1:
        time.sleep(0.01)
    (segment,) = (tmp_path / "log.duckdb.journal").glob("*.jsonl")
    line = segment.read_bytes()
    assert [path.stat().st_mode & 0o777 for path in (segment.parent, segment)] == [0o700, 0o600]
    audit.shutdown()
    assert list(json.loads(line)) == members == list(json.loads(example))
    (pattern,) = re.findall(r"a pattern: `(.*?)`", page)
    assert re.fullmatch(pattern, segment.stem)
    assert line.startswith(b'{"timestamp":"2') and line.endswith(b',"seq":1}\n') and "é".encode() in line
