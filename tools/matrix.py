"""Run the tests on every Python that is here, each with another DuckDB; print a table of what ran.

    python tools/matrix.py                  the whole suite here, then its core on each cell
    python tools/matrix.py --core           the cells alone
    python tools/matrix.py ARGUMENTS …      the whole suite here alone, with these arguments of pytest

The whole suite needs much beside DuckDB (FastMCP, PostgreSQL, gevent …), which not every old Python has;
its core needs DuckDB alone. Where a Python is missing, the DuckDB of its cell is tried on this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.judge import find_pythons  # noqa: E402

TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "PyYAML")
# What depends on nothing but Python and DuckDB; first what depends on the version of DuckDB most.
STORE = ("engines", "store_ingest", "store_reading")
CORE = (*STORE, "evidence", "purge", "calls", "encoding", "journal", "logger", "writer")
# What is random, large or waits long runs in the whole suite.
LEFT_OUT = "random_ or killed_at_a_system_call or nobody_holds or is_held_for_long or jumped or gives_space"
WORKERS = ("-n", "3", "--dist", "worksteal")  # some of the time is waiting for children


@dataclass(frozen=True)
class Cell:
    """One column of the matrix.

    Args:
        python: the version wanted.
        package: the version of the `duckdb` package, or None to have none.
        program: that of `duckdb-cli`; the oldest that holds the program is 1.4.4.post2.
        tests: which files of the tests: all of the core on the oldest; elsewhere what depends on the cell.
        engines: those that no other cell has in this version; the whole suite has both in the newest.
    """

    python: str
    package: str | None
    program: str
    tests: tuple[str, ...] = CORE
    engines: str = "package"

    @property
    def requirements(self) -> tuple[str, ...]:
        """What is installed for it."""
        package = (f"duckdb=={self.package}",) if self.package else ()
        return (*package, f"duckdb-cli=={self.program}", *TOOLS)

    @property
    def name(self) -> str:
        """The name of its environment."""
        return f"core-{self.package or 'program'}"

    def interpreter(self) -> str:
        """The Python wanted, or this one."""
        return find_pythons().get(self.python, sys.executable)


CELLS = (
    Cell("3.10", "1.2.2", "1.4.4.post2"),
    Cell("3.12", "1.4.4", "1.4.4.post2", STORE, "cli"),
    Cell("3.13", "1.5.5", "1.5.5", ("engines", "store_ingest", "logger")),
    Cell("3.12", None, "1.5.6", ("engines", "cli"), "cli"),
)
VERSIONS = """
import importlib.metadata, importlib.util, subprocess, sys
import mxcp_audit
program = mxcp_audit.find_program()
said = subprocess.run([program, "-version"], capture_output=True, text=True).stdout if program else "none"
package = importlib.metadata.version("duckdb") if importlib.util.find_spec("duckdb") else "none"
print(sys.version.split()[0], package, said.split()[0].lstrip("v"))
"""


@dataclass
class Result:
    """What a run of pytest came to."""

    versions: tuple[str, ...]
    counts: dict[str, int]
    status: int
    note: str = ""

    def row(self) -> str:
        """Its line of the table."""
        cells = (*self.versions, *(str(self.counts.get(key, 0)) for key in ("passed", "skipped", "failed")))
        return "matrix: " + "".join(f"{cell:>10}" for cell in cells) + (f"  {self.note}" if self.note else "")


def run_pytest(python: str, arguments: list[str], note: str, **changes: str) -> Result:
    """Run pytest with a Python, its output to ours; its counts come from the report that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The program of duckdb-cli 1.4.4 lies beside the Python; that of later ones in their package.
        path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **changes}
        command = [python, "-m", "pytest", *WORKERS, f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        counts = {"failed": 0}
        if report.exists():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            assert suite is not None
            found = {key: int(suite.attrib[key]) for key in ("tests", "skipped", "failures", "errors")}
            counts = {"skipped": found["skipped"], "failed": found["failures"] + found["errors"]}
            counts["passed"] = found["tests"] - counts["skipped"] - counts["failed"]
        asked = subprocess.run([python, "-c", VERSIONS], env=environment, capture_output=True, text=True)
        return Result(tuple(asked.stdout.split()), counts, status, note)


def run_cell(cell: Cell) -> Result:
    """Run the core on a cell, in an environment made for it."""
    made = subprocess.run(
        [str(ROOT / "tools" / "environment"), cell.name, *cell.requirements],
        env={**os.environ, "PYTHON": cell.interpreter()},
        stdout=subprocess.PIPE,
        text=True,
    )
    wanted = (cell.python, cell.package or "none", cell.program)
    if made.returncode:
        return Result(wanted, {}, 1, "its environment can't be made")
    note = "core" if cell.tests is CORE else f"of the core {', '.join(cell.tests)}"
    note += "" if cell.python in find_pythons() else f"; Python {cell.python} is absent"
    files = [f"tests/test_{name}.py" for name in cell.tests]
    chosen = ["-k", f"not ({LEFT_OUT})", *files]
    return run_pytest(made.stdout.strip(), chosen, note, MXCP_TEST_ENGINES=cell.engines)


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for; return the exit status."""
    only_core = arguments == ["--core"]
    results = [] if only_core else [run_pytest(sys.executable, arguments, "the whole suite")]
    if only_core or not arguments:
        results += map(run_cell, CELLS)
    heads = ("Python", "package", "program", "passed", "skipped", "failed")
    print("matrix: " + "".join(f"{head:>10}" for head in heads))
    for result in results:
        print(result.row())
    return int(any(result.status for result in results))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
