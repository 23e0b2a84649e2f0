"""What all tests share: both engines, the command line as a process, the labelled cases."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = Path(os.environ.get("MXCP_AUDIT_CASES", ROOT.parent / "shared" / "cases"))
DATA = Path(__file__).resolve().parent / "data"
SAFETY_SECONDS = 120  # for a wait that takes far less; nothing is measured with it
sys.path.insert(0, str(ROOT))

from tools.judge import ask, find_pythons  # noqa: E402

PYTHONS = find_pythons()


def words(text: str) -> list[str]:
    """Return a list of short words, in one line instead of one a word."""
    return text.split()


def load_cases(name: str) -> Any:
    """Return the labelled third-party cases of a file, or skip the test where they are absent."""
    path = CASES / name
    if not path.exists():
        pytest.skip(f"{path} is absent: it holds third-party data and is not part of the project")
    return json.loads(path.read_text(encoding="utf-8"))


def child_environment(**changes: str) -> dict[str, str]:
    """Return an environment in which a child finds the module, and nothing of ours is set but `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MXCP_")}
    # From 3.12 on, Python warns of each fork of a process with threads, which is what some tests are about.
    kept.update(PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore::DeprecationWarning")
    return {**kept, **changes}


def run_process(
    command: Sequence[object], *, cwd: Path | None = None, check: bool = False, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with `child_environment` and no input; return what it said."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        check=check,
        env=child_environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


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
    """Return the path of the real program, of the package `duckdb-cli` or on PATH."""
    import mxcp_audit

    program = mxcp_audit.find_program()
    if program is None:
        pytest.skip("the package duckdb-cli is not installed")
    return program


# tools/matrix.py leaves one out where another cell has it.
ENGINES = os.environ.get("MXCP_TEST_ENGINES", "package cli").split()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once on each engine, in this process and in its children."""
    if request.param == "package":
        pytest.importorskip("duckdb")
    monkeypatch.setenv("MXCP_AUDIT_ENGINE", request.param)
    return str(request.param)


# For what has fixtures of both engines, and does not depend on the engine.
one_engine = pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)


@pytest.fixture(scope="session")
def made_logs(tmp_path_factory: pytest.TempPathFactory) -> dict[object, Path]:
    """The folders of `copy_of`."""
    return {"base": tmp_path_factory.mktemp("made")}


@pytest.fixture
def copy_of(made_logs: dict[object, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that puts copies of logs here, which `fill` makes once for each engine."""

    def copy(fill: Callable[..., object], *arguments: Any) -> Path:
        key = (fill, arguments, os.environ.get("MXCP_AUDIT_ENGINE"))
        if key not in made_logs:
            made_logs[key] = made_logs["base"] / str(len(made_logs))
            made_logs[key].mkdir()
            fill(made_logs[key] / "log.duckdb", *arguments)
        shutil.copytree(made_logs[key], tmp_path, copy_function=shutil.copy, dirs_exist_ok=True)  # as of now
        for place in tmp_path.glob("*.journal/journal.place"):  # without it the journal were another one
            journal = str(place.parent)
            place.write_text(json.dumps([journal, journal.removesuffix(".journal")]))
        return tmp_path / "log.duckdb"

    return copy


def pytest_configure() -> None:
    """Make the suite independent of the shell that starts it: `nohup`, a strict umask, a language; and of the
    machine's load."""
    hypothesis.settings.register_profile(
        "ours", deadline=None, suppress_health_check=list(hypothesis.HealthCheck), max_examples=60
    )
    hypothesis.settings.load_profile("ours")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `command &` hands SIGINT on as ignored
    for name in ("SIGHUP", "SIGQUIT"):  # and `nohup` SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.umask(0o022)
    for name in ("TZ", "LC_ALL", "LC_CTYPE", "LANGUAGE"):
        os.environ.pop(name, None)
    os.environ["LANG"] = "C.UTF-8"
    time.tzset()
    if sys.platform == "linux":  # orphans of a killed child become ours, and end with the test (below)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


PR_SET_CHILD_SUBREAPER = 36


def _children(pid: int) -> set[int]:
    """Return the children of a process, but for a PostgreSQL server, which its module's fixture ends."""
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children.update(map(int, path.read_text().split()))
    return {child for child in children if _name_of(child) != "postgres"}


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _end(pid: int) -> None:
    """Kill a process and all that it started."""
    for child in _children(pid):
        _end(child)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def ended_children(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every process that a test starts ends with it, whatever happens in between."""
    before = _children(os.getpid())
    yield
    if "session" in request.fixturenames:  # an engine that the tests of a module share
        return
    for pid in _children(os.getpid()) - before:
        _end(pid)
        with contextlib.suppress(OSError):
            os.waitpid(pid, 0)  # an orphan that became ours; what `subprocess` knows copes with it


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
def process_cli(tmp_path: Path) -> Cli:
    """Return a function that runs `python -m mxcp_audit` as a process of its own, in `tmp_path`."""

    def run(*arguments: str, cwd: Path = tmp_path, **changes: str) -> subprocess.CompletedProcess[str]:
        chosen = os.environ.get("MXCP_AUDIT_ENGINE")
        if chosen:
            changes.setdefault("MXCP_AUDIT_ENGINE", chosen)
        return run_process([sys.executable, "-m", "mxcp_audit", *arguments], cwd=cwd, **changes)

    return run


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return what `process_cli` returns, but from this process: few commands need one of their own."""
    import mxcp_audit

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as changed:
            for name, value in changes.items():
                changed.setenv(name, value)
            time.tzset()
            try:
                code: Any = mxcp_audit.main(arguments)
            except SystemExit as error:
                code = error.code
        time.tzset()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(list(arguments), code, out, err)

    return run


@pytest.fixture
def cli(run: Cli) -> Cli:
    """Return `run`, in modules that have a function of that name."""
    return run


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "log.duckdb"


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[Any]:
    """Yield a logger into `tmp_path/log.duckdb`, shut down afterwards; it ingests when it is told to."""
    from mxcp_audit import AuditLogger

    audit = AuditLogger(tmp_path / "log.duckdb", flush_interval=3600)
    yield audit
    audit.shutdown()


def table_rows(path: Path, sql: str = "SELECT * FROM logs ORDER BY timestamp, segment, seq") -> list[Any]:
    """Return rows of a database, read by DuckDB itself and none of our code."""
    return ask(path, sql)


def write_table_of_mxcp(path: Path) -> None:
    """Make what MXCP's first logger leaves behind: a database whose table has ten columns, with one row."""
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS old (STORAGE_VERSION 'v1.0.0')")
        connection.execute(
            "CREATE TABLE old.logs (timestamp TIMESTAMP, caller TEXT, type TEXT, name TEXT, input_json TEXT, "
            "duration_ms INTEGER, policy_decision TEXT, reason TEXT, status TEXT, error TEXT)"
        )
        connection.execute(
            "INSERT INTO old.logs VALUES "
            "('2025-01-01', 'cli', 'tool', 'old', '{}', 1, 'n/a', NULL, 'success', NULL)"
        )


HOLD = """
import duckdb, sys, time
for attempt in range(1200):
    try:
        held = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "r")
        break
    except duckdb.IOException:  # an ingest has it for a moment
        time.sleep(0.05)
print("held", flush=True); sys.stdin.read()
"""


@contextlib.contextmanager
def held_database(path: Path, *, read_only: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Hold the database as another process, which the block may stop or kill; yield that process."""
    pytest.importorskip("duckdb")
    command = [sys.executable, "-c", HOLD, str(path), "r" if read_only else "w"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def in_threads(work: Callable[[Any], object], arguments: Iterable[object]) -> None:
    """Call a function in a thread for each argument, and wait for their end."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def wait_until(holds: Callable[[], object], what: str = "it did not happen") -> None:
    """Wait until a condition holds, or fail after a time that is far more than anything takes."""
    end = time.monotonic() + SAFETY_SECONDS
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what of the matrix this run was; tools/matrix.py runs the others."""
    import mxcp_audit

    program = mxcp_audit.find_program()
    version = subprocess.run([program, "-version"], capture_output=True, text=True).stdout if program else ""
    package = importlib.metadata.version("duckdb") if importlib.util.find_spec("duckdb") else "none"
    terminalreporter.write_line(
        f"matrix: Python {sys.version.split()[0]}; duckdb package {package}; "
        f"program {version.split(' ')[0].lstrip('v') or 'none'}"
    )
