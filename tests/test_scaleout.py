"""All targets, with the real engines: a file, DuckLake in a file and on PostgreSQL, PostgreSQL, quack.

The extensions come as packages for one version of DuckDB, so the hosts are processes of an environment
of their own. The PostgreSQL server is ours, on a free port. MXCP_AUDIT_SCALE sets the number of events
of the test with three hosts (default 6,000), MXCP_AUDIT_ROUNDS how often a host is cloned
(default 1; with more, every form of export is tried on each target).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, child_environment, make_environment
from evidence import write_segment

import mxcp_audit as m

sys.path.insert(0, str(ROOT / "tools"))
from postgres_server import PASSWORD, Postgres, find_programs

PACKAGES = (
    "duckdb==1.5.5",
    "duckdb-cli==1.5.5",
    *(f"duckdb-extension-{name}==1.5.5" for name in ("ducklake", "postgres-scanner", "quack", "httpfs")),
)
EVENTS = int(os.environ.get("MXCP_AUDIT_SCALE", "6000"))
KINDS = ("postgres", "ducklake")
ROUNDS = int(os.environ.get("MXCP_AUDIT_ROUNDS", "1"))  # of what is random
IS_WHOLE = ROUNDS > 1  # else what differs between targets, and each target with one of the engines
TARGETS = ("file", *KINDS, *(["lake-file"] if IS_WHOLE else []))
PAIRS = [("postgres", "cli"), ("ducklake", "package")]
if IS_WHOLE:
    PAIRS += [("postgres", "package"), ("ducklake", "cli"), ("file", "package"), ("lake-file", "cli")]


@pytest.fixture(scope="module")
def python() -> str:
    return make_environment("scaleout", *PACKAGES)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    programs = find_programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    running = Postgres(programs, fsync="off")
    yield running
    running.close()


# Runs commands, and scripts that change nothing, in one process: starting it takes longer than most of them.
SHELL = """
import contextlib, io, json, sys, traceback
import mxcp_audit
for line in sys.stdin:
    words = json.loads(line)
    said = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            code = exec(words, {}) or 0 if isinstance(words, str) else mxcp_audit.main(words)
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = traceback.print_exc() or 1
        for stream in said:
            stream.flush()
    print(json.dumps([code, *(stream.buffer.getvalue().decode() for stream in said)]), flush=True)
"""


class Host:
    """A folder with a site file, and processes that work in it."""

    shell: subprocess.Popen[str] | None = None

    def __init__(
        self, python: str, folder: Path, path: str, attach: dict[str, object], password: str
    ) -> None:
        self.python = python
        self.folder = folder
        self.password = password
        self.path = path
        folder.mkdir(exist_ok=True)
        audit = {"enabled": True, "path": path, "attach": attach, "flush_interval": "300ms"}
        site = {"profiles": {"default": {"audit": audit}}}
        (folder / "mxcp-site.yml").write_text(json.dumps(site))  # JSON is YAML

    def environment(self, **changes: str) -> dict[str, str]:
        home = {"HOME": str(self.folder), "PGPASSWORD": changes.pop("PGPASSWORD", self.password)}
        chosen = {name: os.environ[name] for name in ("MXCP_AUDIT_ENGINE",) if name in os.environ}
        return child_environment(**home, **chosen, **changes)

    @property
    def database(self) -> str:
        return self.path.partition("dbname=")[2].split()[0]

    @property
    def journal(self) -> Path:
        at_file = self.path.endswith("log.duckdb")
        return Path(f"{self.path}.journal") if at_file else self.folder / "logs-default.journal"

    def start(self, script: str, *arguments: object, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-c", script, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(**changes),
            stdin=subprocess.PIPE if script is SHELL else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if script is SHELL else subprocess.PIPE,
            encoding="utf-8",
        )

    def ask(self, words: tuple[str, ...] | str) -> subprocess.CompletedProcess[str]:
        """Have the shell run a command or a script."""
        if self.shell is None:
            self.shell = self.start(SHELL)
        assert self.shell.stdin is not None and self.shell.stdout is not None
        print(json.dumps(words), file=self.shell.stdin, flush=True)
        return subprocess.CompletedProcess(words, *json.loads(self.shell.stdout.readline()))

    def counts(self) -> Any:
        done = self.ask(COUNTS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run(self, script: str, *arguments: object, **changes: str) -> Any:
        """Run a script to its end and return the JSON that it prints."""
        child = self.start(script, *arguments, **changes)
        out, err = child.communicate(timeout=600)
        assert child.returncode == 0, err
        return json.loads(out)

    def cli(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        if not changes:
            return self.ask(arguments)
        return subprocess.run(
            [self.python, "-m", "mxcp_audit", *arguments],
            cwd=self.folder,
            env=self.environment(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )

    def segments(self) -> list[Path]:
        return sorted(self.journal.glob("*.jsonl"))

    def leave(self, count: int) -> None:
        """Leave events in the journal, as a process that was killed does."""
        past = time.time_ns() - count * 60 * 10**9
        write_segment(self.folder, past, count, journal=self.journal, name="left")

    def ingest(self) -> None:
        """Ingest until nothing is left; another host may be in the way for a while."""
        deadline = time.monotonic() + 120
        while self.segments():
            done = self.cli("ingest")
            assert time.monotonic() < deadline, done.stderr


Make = Any


@pytest.fixture
def make_host(python: str, server: Postgres, tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Return a function that makes a host of a kind of target; hosts of one test share the target."""
    database = f"test_{os.urandom(4).hex()}"

    def make(kind: str, name: str = "a") -> Host:
        path = server.target(database)
        attach: dict[str, object] = {}
        if kind == "ducklake":
            path, attach = "ducklake:" + path, {"DATA_PATH": str(tmp_path / "lake")}
        if kind == "file":
            path = str(tmp_path / "log.duckdb")
        if kind == "lake-file":
            path, attach = f"ducklake:{tmp_path}/meta.ducklake", {"DATA_PATH": str(tmp_path / "lake")}
        return Host(python, tmp_path / name, path, attach, PASSWORD)

    return make


@pytest.fixture(params=PAIRS, ids="-".join)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of target, and an engine for this process and its children."""
    monkeypatch.setenv("MXCP_AUDIT_ENGINE", request.param[1])
    return str(request.param[0])


LOG = """
import sys, time
from mxcp_audit import AuditLogger
name, count, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with AuditLogger.from_config() as audit:
    for i in range(count):
        audit.log_event("http", "tool", f"tool_{i % 7}", {"host": name, "i": i}, i % 100)
        if i % (count // 20) == count // 20 - 1:
            time.sleep(pause)
            print(i + 1, flush=True)
    audit.flush(60)
"""
INGEST = """
import json
from mxcp_audit import Store, load_config
print(json.dumps(Store(load_config()).ingest()))
"""
COUNTS = """
import json
from mxcp_audit import Store, load_config
with Store(load_config()).reading(wait=60) as reading:
    if reading.problem: raise reading.problem
    rows = reading.engine.execute(
        "SELECT count(*)::BIGINT AS a, count(DISTINCT segment || ':' || seq)::BIGINT AS b, "
        "count(DISTINCT input_json)::BIGINT AS c "
        "FROM (FROM sound_logs UNION ALL BY NAME FROM journal_rows)")
    entries = [] if not reading.has_table else reading.engine.execute(
        "SELECT count(*)::BIGINT AS a, count(DISTINCT segment)::BIGINT AS b, "
        "count(DISTINCT journal)::BIGINT AS c, sum(events)::BIGINT AS d "
        "FROM audit.ledger WHERE kind = 'segment'")
    print(json.dumps([list(rows[0]), *map(list, entries)]))
"""
# Reads over and over while others write, until a file appears: how often, and how often an event came twice.
# Only what a restarted server explains may go wrong.
WATCH = """
import json, os, time
from mxcp_audit import DatabaseLockedError, DatabaseUnreachableError, Store, load_config
count = ("SELECT count(*)::BIGINT AS a, count(DISTINCT segment || ':' || seq)::BIGINT AS b "
         "FROM (FROM sound_logs UNION ALL BY NAME FROM journal_rows)")
reads = twice = 0
while not os.path.exists("stop"):
    try:
        with Store(load_config()).reading(wait=60) as reading:
            if reading.problem is None:
                ((rows, events),) = reading.engine.execute(count)
                reads += 1
                twice += rows != events
    except (DatabaseLockedError, DatabaseUnreachableError):
        pass
    time.sleep(1)  # for the others
print(json.dumps([reads, twice]))
"""


def line_of(child: subprocess.Popen[str], wanted: int) -> None:
    """Wait until a child of LOG says that it has logged that many."""
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= wanted:
            return
    raise AssertionError(child.stderr.read() if child.stderr else "")


@pytest.mark.parametrize("kind", KINDS)
def test_three_hosts_with_a_restart_and_a_kill_record_every_event_exactly_once(
    make_host: Make, server: Postgres, kind: str
) -> None:
    hosts = [make_host(kind, name) for name in "abc"]
    each = EVENTS // 3
    pause = max(0.1, each / 100_000)
    watch = hosts[0].start(WATCH)
    children = [host.start(LOG, name, each, pause) for host, name in zip(hosts, "abc")]
    line_of(children[0], each // 4)
    server.stop(signal.SIGQUIT)
    time.sleep(0.5)
    server.start()
    line_of(children[2], each // 2)
    children[2].kill()
    killed_at = each // 2
    errors = [child.communicate(timeout=600)[1] for child in children]
    (hosts[0].folder / "stop").touch()
    watched, complaint = watch.communicate(timeout=600)
    assert watch.returncode == 0, complaint
    reads, twice = json.loads(watched)
    for host in hosts:
        host.ingest()

    assert children[0].returncode == children[1].returncode == 0
    assert not any(PASSWORD in text or "Traceback" in text for text in errors)
    assert reads > 0 and twice == 0
    shown = json.loads(hosts[1].cli("log", "--json", "--limit", str(EVENTS * 2)).stdout)
    ids = {event["event_id"] for event in shown}
    by_host: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for event in shown:
        recorded = json.loads(event["input_json"])
        by_host[recorded["host"]].append(recorded["i"])
    assert len(ids) == len(shown)
    assert sorted(by_host["a"]) == sorted(by_host["b"]) == list(range(each))
    # What the killed host wrote before its last line on standard output is there; nothing after a gap.
    assert sorted(by_host["c"]) == list(range(len(by_host["c"])))
    assert len(by_host["c"]) >= killed_at
    (rows, events, inputs), (entries, segments, journals, entered) = hosts[2].counts()
    assert rows == events == inputs == entered == len(shown)
    assert entries == segments and journals == 3
    verified = hosts[0].cli("verify", "--json", "--wait", "60")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    print(f"{kind}: {len(shown)} events, {reads} reads meanwhile, {entries} segments")


@pytest.mark.parametrize("kind", KINDS)
def test_ingest_killed_while_the_server_commits_is_not_repeated(
    make_host: Make, server: Postgres, kind: str
) -> None:
    host = make_host(kind)
    host.leave(10)
    host.ingest()  # tables are there now
    host.leave(100)
    server.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")  # from now on, no COMMIT returns
    try:
        server.sql("SELECT pg_reload_conf()")
        first = host.start(INGEST)
        wait_for_commits(server, 1)
        # The process alone, and not the engine below it, which goes on with the commit.
        first.kill()
        first.communicate()
        second = host.start(INGEST)
        # It waits for the first: in PostgreSQL for an equal key, in DuckLake for the number of the commit.
        time.sleep(2)
        assert second.poll() is None
    finally:
        server.sql("ALTER SYSTEM RESET synchronous_standby_names")
        server.sql("SELECT pg_reload_conf()")
    out, err = second.communicate(timeout=120)
    assert (out.strip(), second.returncode) == ("true", 0), err
    (rows, events, _), (entries, segments, _, entered) = host.counts()
    assert rows == events == entered == 110
    assert entries == segments == 2


def wait_for_commits(server: Postgres, wanted: int) -> None:
    deadline = time.monotonic() + 120
    while (
        int(server.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")) < wanted
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)


HOSTILE = r"""
import json, sys
from mxcp_audit import AuditLogger, Store, Filter, load_config, Config
texts = ["", "\0", "a\0b", "\ud800", "\udfff\ud83d", "\U0001f600", "\uffff", "\u202e", "\x1b[31m", "\\u0000",
         "\\N", "\\.", "\t\r\n\x0b\x0c", "'; DROP TABLE logs; --", "$$ $1 ${x} %s {0}", '"', "NULL", "NaN",
         "\x7f\x80\x9f", "e\u0301", "x" * 100_000, "=cmd()", "\N{ZERO WIDTH JOINER}", "\ufeff"]
inputs = [None, [], {}, "\0", float("nan"), 2**200, -0.0, {"\0": {"\ud800": ["\0"]}}, {"x": "y" * 3_000_000},
          {str(n): n for n in range(5000)}, {"b": b"\xff\x00"}, [[[[]]]] * 50]
with AuditLogger.from_config() as audit:
    for text in texts:
        audit.log_event(text, text, text, {text: text}, 1, text, text, text, text, None, text, text, text)
    for value in inputs:
        audit.log_event("cli", "tool", "t", value, 2**40)
    audit.log_event("cli", "tool", "t", {}, -5)
    audit.log_event("cli", "tool", "t", {}, None)
    audit.flush(120)
with Store(load_config()).reading() as reading:
    if reading.problem: raise reading.problem
    assert reading.has_table and not reading.has_journal
    rows = [row[1:-1] for row in reading.rows(Filter(), count=None, oldest_first=True)]
    kinds = reading.engine.execute(
        "SELECT DISTINCT typeof(timestamp)::VARCHAR AS a, typeof(duration_ms)::VARCHAR AS b, "
        "typeof(seq)::VARCHAR AS c, typeof(input_json)::VARCHAR AS d FROM sound_logs")
print(json.dumps([rows, kinds]))
"""


def test_hostile_input_comes_through_as_into_a_file(
    make_host: Make, kind: str, tmp_path: Path, python: str
) -> None:
    there = make_host(kind).run(HOSTILE)
    here = Host(python, tmp_path / "file", "log.duckdb", {}, "").run(HOSTILE)
    assert len(here[0]) == 38
    assert there[0] == here[0]
    assert there[1] == here[1] == [["TIMESTAMP", "INTEGER", "INTEGER", "VARCHAR"]]


FORMS = m.EXPORT_FORMATS if IS_WHOLE else ("csv", "duckdb", "sqlite")
OF_MXCP = {"timestamp": "2026-01-02T03:04:05.000Z", "caller": "cli", "type": "tool", "name": "of_mxcp"}


ASK = """
import json
from mxcp_audit import PUBLIC_COLUMNS, Filter, Store, load_config, parse_time
with Store(load_config()).reading() as reading:
    def ask(what, **how):
        return [dict(zip(PUBLIC_COLUMNS, row)) for row in reading.rows(what, **how)]
    found = ask(Filter(text="TOOL_3"))
    oldest = [json.loads(event["input_json"])["i"] for event in ask(Filter(), count=3, oldest_first=True)]
    one = ask(Filter(event_id=found[0]["event_id"]))
    print(json.dumps([ask(Filter(until=parse_time("1h"))), found[0]["name"], len(found), oldest, len(one)]))
"""


def test_every_command_works_on_every_target(make_host: Make, kind: str) -> None:
    host = make_host(kind)
    empty = host.cli("log")
    assert empty.returncode == 1 and "Audit database not found" in empty.stderr
    host.start(LOG, "a", 100, 0).communicate(timeout=120)

    def answer(*words: str, code: int = 0) -> str:
        done = host.cli(*words)
        assert done.returncode == code and "Traceback" not in done.stderr, done
        return done.stdout

    found = json.loads(answer("log", "--tool", "tool_3", "--since", "1h", "--json"))
    assert [json.loads(event["input_json"])["i"] for event in found] == list(range(94, 0, -7))
    asked = host.ask(ASK)
    assert json.loads(asked.stdout) == [[], found[0]["name"], 14, [0, 1, 2], 1], asked
    one = found[0]["event_id"]
    assert one in answer("show", one)
    (host.folder / "mxcp.jsonl").write_text(
        json.dumps({**OF_MXCP, "input_json": "{}", "duration_ms": 1}) + "\n"
    )
    answer("import", "mxcp.jsonl")
    assert json.loads(answer("stats", "--json", "--by", "type"))[0]["calls"] == 101
    for form in FORMS:
        answer("log", "--export", f"out.{form}")
    assert len((host.folder / "out.csv").read_text().splitlines()) == 102
    assert len(json.loads(host.cli("log", "--db", "out.duckdb", "--limit", "200", "--json").stdout)) == 101
    for form in ("jsonl", "ocsf", "ecs", "otlp") if IS_WHOLE else ("ocsf",):
        assert len(answer("log", "--format", form, "--cursor-file", f"cursor.{form}").splitlines()) >= 1
        assert answer("log", "--format", form, "--cursor-file", f"cursor.{form}") == ""
    assert json.loads(answer("sql", "SELECT count(*) AS n FROM logs WHERE name = 'tool_3'", "--json")) == [
        {"n": 14}
    ]
    (host.folder / "secret.csv").write_text("secret")
    assert "secret" not in answer("sql", "SELECT * FROM read_csv('secret.csv')", code=1)
    answer("report", "--out", "report.html")
    assert json.loads(answer("doctor", "--json"))["database"]["events"] == 101
    (host.folder / "head.json").write_text(answer("checkpoint"))
    follow = subprocess.Popen(
        [host.python, "-m", "mxcp_audit", "log", "-f", "-n", "1", "--json"],
        cwd=host.folder,
        env=host.environment(PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follow.stdout is not None and "tool_" in follow.stdout.readline()
        host.start(LOG, "later", 20, 0).communicate(timeout=120)
        seen = [json.loads(follow.stdout.readline()) for _ in range(20)]
        assert [json.loads(event["input_json"])["i"] for event in seen] == list(range(20))
    finally:
        follow.kill()
        follow.communicate()
    host.ingest()
    assert "121" in answer("verify", "--checkpoint", "head.json")
    time.sleep(1.5)
    answer("purge", "--older-than", "1s", "--archive", "archive")
    assert json.loads(answer("log", "--json")) == [] and list((host.folder / "archive").rglob("*.parquet"))
    answer("verify", "--checkpoint", "head.json")
    for command in ("backup copy.duckdb", "compact"):
        done = host.cli(*command.split())
        assert done.returncode == (kind != "file"), done
        assert kind == "file" or f"{command.split()[0]} is for database files" in done.stderr, done


CLONED = """
import os, sys, time
from mxcp_audit import AuditLogger, load_config
config = load_config()
audit = AuditLogger(config.path, journal=config.journal_directory, attach=config.attach, flush_interval=3600)
for i in range(40):
    audit.log_event("cli", "tool", "cloned", {"i": i}, 1)
    if i == 19:
        while audit.counters.written < 20: time.sleep(0.01)
        print("20", flush=True)
        while not os.path.exists("go"): time.sleep(0.01)
audit.flush(60)
audit.shutdown()
"""


@pytest.mark.parametrize("kind", TARGETS)
def test_host_that_is_cloned_records_every_event_once(make_host: Make, kind: str, tmp_path: Path) -> None:
    """Its journal is copied while it is written; both go on to the same target."""
    for number in range(ROUNDS):
        host = make_host(kind, f"a{number}")
        clone = make_host(kind, f"b{number}")
        if kind == "file":  # a clone of the machine has the same path, for which a journal elsewhere stands
            site = json.loads((clone.folder / "mxcp-site.yml").read_text())
            site["profiles"]["default"]["audit"]["journal"] = str(clone.folder / "copy.journal")
            (clone.folder / "mxcp-site.yml").write_text(json.dumps(site))
        child = host.start(CLONED)
        line_of(child, 20)
        copied = clone.folder / "copy.journal" if kind == "file" else clone.journal
        shutil.copytree(host.journal, copied)
        done = clone.cli("ingest")
        assert done.returncode == 0, done
        (host.folder / "go").touch()
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        host.ingest()
        rows = json.loads(
            host.cli("sql", "SELECT input_json, count(*) AS n FROM logs GROUP BY ALL", "--json").stdout
        )
        assert sorted(json.loads(row["input_json"])["i"] for row in rows) == list(range(40))
        assert {row["n"] for row in rows} == {number + 1}
        assert host.cli("verify").returncode == 0 and not list(tmp_path.rglob("*.rejected"))


@pytest.mark.parametrize("kind", TARGETS)
def test_ingest_that_is_stopped_and_goes_on_takes_nothing_twice(make_host: Make, kind: str) -> None:
    hosts = [make_host(kind, name) for name in ("a" if kind == "file" else "ab")]
    hosts[0].leave(1)
    hosts[0].ingest()
    for number in range(ROUNDS):
        for host in hosts:
            host.leave(20)
        first = hosts[0].start(INGEST)
        time.sleep(0.2 + 0.2 * number)
        first.send_signal(signal.SIGSTOP)
        try:
            hosts[-1].cli("ingest", "--wait", "1")
            hosts[-1].cli("log", "--wait", "1")
        finally:
            first.send_signal(signal.SIGCONT)
            first.communicate(timeout=120)
        for host in hosts:
            host.ingest()
        assert hosts[0].counts()[0][:2] == [1 + 20 * len(hosts) * (number + 1)] * 2
        assert hosts[-1].cli("verify").returncode == 0


SMALL = """
import json, sys
import mxcp_audit
from mxcp_audit import AuditLogger, Store, load_config
chores = mxcp_audit.lake_chores
mxcp_audit.lake_chores = lambda commit: chores(0 if commit % 16 == 0 else 256 if commit % 4 == 0 else 1)
AuditLogger._ingest = None
config = load_config()
for i in range(int(sys.argv[1])):
    with AuditLogger(config.path, journal=config.journal_directory, attach=config.attach) as audit:
        for j in range(20):
            audit.log_event("cli", "tool", "small", {"i": i, "j": j}, 1)
    assert Store(config).ingest()
print("{}")
"""


@pytest.mark.parametrize("kind", ["ducklake", "lake-file"] if IS_WHOLE else ["lake-file"])
def test_small_ingests_into_a_lake_make_few_files(make_host: Make, tmp_path: Path, kind: str) -> None:
    hosts = [make_host(kind, name) for name in "ab"]
    for host in hosts:
        host.run(SMALL, 4)
    files = list((tmp_path / "lake").rglob("*.parquet"))
    assert files, "what lies in the catalogue was never written to a file"
    live = hosts[0].run(
        "import json; from mxcp_audit import Store, load_config\n"
        "with Store(load_config()).reading() as reading: print(json.dumps(reading.engine.execute("
        "\"SELECT sum(file_count)::BIGINT FROM ducklake_table_info('audit')\")))"
    )
    assert live[0][0] <= 4
    for host in hosts:
        assert host.counts()[0] == [160, 160, 80]
        assert host.cli("verify").returncode == 0


CLEAN = """
import json
import mxcp_audit as m
store, seen = m.Store(m.load_config()), []
for name in ("turn_one", "turn_two"):
    m.LAKE_CLEANING = (f"CREATE TABLE audit.{name} (a INT)",)  # leaves a trace
    store.target.commits = [4096]
    store.target.tend_lake()
    with store.target.session(5, write=True) as engine:
        found = engine.execute("SELECT table_name::VARCHAR FROM duckdb_tables()")
        seen.append([name for (name,) in found if name in ("turn_one", "turn_two")])
        engine.execute("CREATE TABLE IF NOT EXISTS audit.theirs (a INT)")
print(json.dumps(seen))
"""


def test_cleaning_of_a_lake_leaves_one_with_other_tables_alone(make_host: Make) -> None:
    host = make_host("lake-file")
    host.leave(1)
    host.ingest()
    assert host.run(CLEAN) == [["turn_one"], ["turn_one"]]
    assert m.lake_chores(255) == [] and not set(m.LAKE_CLEANING) & set(m.lake_chores(256))
    assert set(m.LAKE_CLEANING) < set(m.lake_chores(4096))


@pytest.mark.parametrize(("kind", "table"), [("postgres", "logs"), ("ducklake", "ducklake_snapshot")])
def test_lock_of_somebody_else_holds_nothing_up(
    make_host: Make, server: Postgres, kind: str, table: str
) -> None:
    host = make_host(kind)
    host.leave(20)
    host.ingest()
    host.leave(5)
    holder = subprocess.Popen(
        [server._program("psql"), "-XAtq", "-f", "-"],
        env={**os.environ, **server.environment(host.database)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdin.write(f"BEGIN; LOCK TABLE {table}; SELECT 'held';\n")
        holder.stdin.flush()
        while "held" not in holder.stdout.readline():
            assert holder.poll() is None
        for command in ("ingest --wait 0", "stats --wait 0"):
            done = host.cli(*command.split())
            assert done.returncode == 75 and "lock timeout" in done.stderr, done
            assert re.search(r"held by PID \d+, audit, psql, idle in transaction since 2", done.stderr), done
    finally:
        holder.kill()
        holder.communicate()
    host.ingest()
    assert host.counts()[0][:2] == [25, 25]


def test_postgresql_filters_and_finds_the_first_events_by_its_index(
    make_host: Make, server: Postgres
) -> None:
    """DuckDB's scan gives PostgreSQL no ORDER BY and no LIMIT, and reads the whole table."""
    host = make_host("postgres")
    host.start(LOG, "a", 200, 0).communicate(timeout=120)
    host.ingest()
    server.sql("UPDATE logs SET timestamp = NULL WHERE name = 'tool_5'; ANALYZE logs", host.database)
    script = """
import json, sys
from mxcp_audit import Filter, Store, load_config
filters = (Filter(), Filter(tools=("tool_1", "tool_5*")), Filter(user="o'\\\\hara\\r"))
with Store(load_config()).reading() as reading:
    answers = []
    for schema in (reading.schema, None):
        reading.schema = schema
        answers.append([
            list(reading.rows(what, count=count, oldest_first=oldest))
            for what in filters for oldest in (False, True) for count in (1, 10, 1000)
        ])
    sql = reading._select("name", Filter(tools=("x",), since="2020-01-01 00:00:00"), None, False)
    plan = reading.engine.execute("EXPLAIN " + sql)
print(json.dumps([answers[0] == answers[1], list(map(len, answers[0])), plan]))
"""
    same, counts, plan = host.run(script)
    scan = json.dumps(plan, ensure_ascii=False).partition("POSTGRES_SCAN")[2]
    assert "Filters:" in scan and "timestamp>=" in scan and "type=" in scan
    assert same and counts[:6] == [1, 10, 200] * 2
    used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'logs_timestamp'"
    deadline = time.monotonic() + 30
    while server.sql(used, host.database) in ("", "0"):  # counted when the client is gone
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_tables_of_other_schemas_do_not_confuse(make_host: Make, server: Postgres) -> None:
    host = make_host("postgres")
    name = host.database
    server.sql(
        "CREATE SCHEMA other; CREATE TABLE other.logs (user_id INT); CREATE TABLE other.ledger (x INT)", name
    )
    host.leave(20)
    host.ingest()
    assert server.sql("SELECT count(*) FROM public.logs", name) == "20"
    assert server.sql("SELECT count(*) FROM other.logs", name) == "0"
    server.sql("ALTER TABLE public.logs ADD COLUMN tenant text DEFAULT 'x'", name)  # somebody's own
    assert host.cli("verify").returncode == 0
    server.sql("ALTER TABLE public.logs ALTER COLUMN caller SET DEFAULT 'x'", name)
    assert "has a default" in host.cli("verify").stdout


def test_schema_of_ones_own_is_used(make_host: Make, server: Postgres) -> None:
    host = make_host("postgres")
    server.sql("CREATE SCHEMA ours", host.database)
    there = Host(host.python, host.folder, host.path, {"SCHEMA": "ours"}, PASSWORD)
    for count in (20, 40):
        there.leave(20)
        there.ingest()
        assert server.sql("SELECT count(*) FROM ours.logs", host.database) == str(count)
    assert there.cli("verify").returncode == 0
    assert len(json.loads(there.cli("log", "--json").stdout)) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_any_host_verifies_and_purges_what_all_recorded(make_host: Make, kind: str) -> None:
    hosts = [make_host(kind, name) for name in "ab"]
    for host, name in zip(hosts, "ab"):
        host.start(LOG, name, 20, 0).communicate(timeout=120)
    time.sleep(1.5)
    purged = hosts[0].cli("purge", "--older-than", "1s")
    assert purged.returncode == 0, purged.stderr
    hosts[1].start(LOG, "b", 20, 0).communicate(timeout=120)
    for host in hosts:
        verified = host.cli("verify")
        assert verified.returncode == 0, verified.stdout
        assert host.counts()[0] == [20, 20, 20]


def test_unreachable_target_leaves_everything_in_the_journal(
    make_host: Make, server: Postgres, kind: str
) -> None:
    host = make_host(kind)
    server.stop()
    try:
        child = host.start(LOG, "a", 40, 0)
        err = child.communicate(timeout=300)[1]
        assert child.returncode == 0 and "events stay in the journal" in err and PASSWORD not in err
        shown = host.cli("log", "--json")
        assert shown.returncode == 1 and "only events of the journal" in shown.stderr
        assert len(json.loads(shown.stdout)) == 40
        refused = host.cli("ingest")
        assert refused.returncode == 1 and "events wait in the journal" in refused.stderr
        ill = host.cli("doctor", "--json")
        found = json.loads(ill.stdout)
        assert ill.returncode == 1 and not found["database"]["readable"]
        assert any("events wait in the journal" in fault["remedy"] for fault in found["faults"])
    finally:
        server.start()
    host.ingest()
    well = host.cli("doctor", "--json")
    assert (well.returncode, json.loads(well.stdout)["database"]["events"]) == (0, 40), well.stdout
    assert host.counts()[0] == [40, 40, 40]


SECRET_TARGETS = (
    "postgres:dbname=nowhere host=127.0.0.1 port={port} user=audit password={secret}",
    "postgres:dbname=nowhere host=127.0.0.1 port=1 user=audit password='{secret} und' mehr",
    "postgres:{secret}",
    "postgresql://audit:{secret}@127.0.0.1:{port}/nowhere",
    "postgres:postgresql://audit:{secret}@127.0.0.1:{port}/nowhere?bad={secret}",
    "ducklake:postgres:dbname=nowhere host=127.0.0.1 port={port} user=audit password={secret}",
    "quack:{secret}@127.0.0.1:1",
    "md:my_db?motherduck_token={secret}",
    "nosuch:db?x={secret}",
    "mysql:host=127.0.0.1 passwd={secret}",
)
USE_ALL = """
import json, logging, os, sys, traceback
logging.basicConfig(level=logging.DEBUG)
os.dup2(1, 2)
sys.stderr = sys.stdout
from mxcp_audit import AuditLogger, Store, load_config, main
for folder in sys.argv[1:]:
    os.chdir(folder)
    config = load_config()
    print("\\0", repr(config))
    with AuditLogger.from_config() as audit:
        audit.log_event("cli", "tool", "t", {}, 1)
        audit.flush(60)
        print(audit.counters)
    commands = [lambda words=words: print(words, main(words)) for words in (["log"], ["doctor"], ["config"])]
    commands += [lambda: main(["ingest", "--debug"]), lambda: Store(config).reading(wait=0).__enter__()]
    for work in commands:
        try:
            work()
        except Exception:
            traceback.print_exc()
"""


@pytest.mark.parametrize("engine", ["package", "cli"])
def test_secret_of_a_target_gets_out_nowhere(
    engine: str, python: str, server: Postgres, tmp_path: Path
) -> None:
    secret = "Zq7-Kennwort"
    hosts = [
        Host(python, tmp_path / f"{n}", path.format(secret=secret, port=server.port), {"TOKEN": secret}, "")
        for n, path in enumerate(SECRET_TARGETS)
        if ("postgres:" in path) == (engine == "package")
    ]
    child = hosts[0].start(USE_ALL, *(host.folder for host in hosts), MXCP_AUDIT_ENGINE=engine)
    _, *said = child.communicate(timeout=600)[0].split("\0")
    assert len(said) == len(hosts)
    for text in said:
        assert "Kennwort" not in text and "Zq7" not in text, text
        assert "events stay in the journal" in text and "Traceback" in text
        assert "['log'] 1" in text and "['doctor'] 1" in text and "['config'] 0" in text


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("log.duckdb", "log.duckdb"),
        ("/a/b=c@d?e.duckdb", "/a/b=c@d?e.duckdb"),
        ("postgres:dbname=a host=h password=x", "postgres:dbname=a host=h password=…"),
        ("postgres:password='a b' dbname=a", "postgres:password=… dbname=a"),
        ("postgres:dbname=a password=x y", "postgres:dbname=a password=… …"),
        ("postgres:", "postgres:"),
        ("postgresql://u:p@h:5/d?password=x", "postgresql://…@h:5/d?…"),
        ("postgres:postgresql://u:p/@x@h/d", "postgres:postgresql://…@h/d"),
        ("ducklake:postgres:dbname=a PASSWORD=x", "ducklake:postgres:dbname=a PASSWORD=…"),
        ("ducklake:/lake/meta.ducklake", "ducklake:/lake/meta.ducklake"),
        ("md:db?motherduck_token=x", "md:db?…"),
        ("quack:t@host:9494", "quack:…@host:9494"),
    ],
)
def test_public_target_shows_the_place_and_no_secret(target: str, shown: str) -> None:
    from mxcp_audit import public_target

    assert public_target(target) == shown


def test_hide_secrets_withholds_what_repeats_a_piece() -> None:
    from mxcp_audit import hide_secrets

    target = "postgres:dbname=a password=tiger lily"
    assert hide_secrets("no server", target, {}) == "no server"
    assert (
        hide_secrets('at "dbname=a password=tiger lily": no', target, {}) == 'at "dbname=a password=… …": no'
    )
    assert "lily" not in hide_secrets('missing "=" after "lily"', target, {})
    assert "tok3n" not in hide_secrets("bad token tok3n", "md:x", {"TOKEN": "tok3n"})
    assert hide_secrets("lake/ is gone", "ducklake:x", {"data_path": "lake/"}) == "lake/ is gone"


@pytest.mark.parametrize(
    ("path", "extension"),
    [
        ("ducklake:meta.ducklake", "ducklake"),
        ("ducklake:postgres:dbname=a", "ducklake"),
        ("postgres:dbname=a", "postgres_scanner"),
        ("postgresql://h/a", "postgres_scanner"),
        ("quack:host", "httpfs"),
        ("md:db", "motherduck"),
    ],
)
def test_missing_extension_is_named_with_its_install_command(
    tmp_path: Path, engine: str, run: Any, path: str, extension: str
) -> None:
    host = Host(sys.executable, tmp_path, path, {}, "")  # here no packages hold extensions
    host.leave(3)
    shown = run("log", "--json", HOME=str(tmp_path))
    assert len(json.loads(shown.stdout)) == 3
    assert f"run `INSTALL {extension}` in it once" in shown.stderr and shown.stderr.count("\n") == 1
    if path.startswith("quack"):
        return  # refuses to be written before it needs anything
    refused = run("ingest", HOME=str(tmp_path))
    assert refused.returncode == 1 and f"INSTALL {extension}" in refused.stderr and host.segments()


QUACK = """
import sys, time, duckdb, glob, os, importlib.util
from mxcp_audit import file_of_package
def extension(name):
    file = name + ".duckdb_extension"
    return file_of_package("duckdb_extension_" + name, "extensions", "v" + duckdb.__version__, file)
connection = duckdb.connect("log.duckdb", read_only=True)
for name in ("httpfs", "quack"):
    connection.execute(f"LOAD '{extension(name)}'")
port = int(sys.argv[1])
connection.execute(f"CALL quack_serve('quack:127.0.0.1:{port}', token = 'Zq7-Kennwort')")
print(0, flush=True)
time.sleep(600)
"""


def test_quack_reads_and_refuses_to_write(python: str, tmp_path: Path, engine: str) -> None:
    served = Host(python, tmp_path / "served", "log.duckdb", {}, "")
    served.start(LOG, "a", 100, 0).communicate(timeout=120)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = served.start(QUACK, port)
    try:
        line_of(child, 0)
        host = Host(python, tmp_path / "a", f"quack:127.0.0.1:{port}", {"TOKEN": "Zq7-Kennwort"}, "")
        shown = host.cli("log", "--tool", "tool_3", "--json")
        assert len(json.loads(shown.stdout)) == 14, shown.stderr
        host.leave(3)
        assert len(json.loads(host.cli("log", "--json", "--limit", "500").stdout)) == 103
        refused = host.cli("ingest")
        assert refused.returncode == 1 and "quack: is for reading only" in refused.stderr
        assert host.segments() and "Kennwort" not in refused.stderr
    finally:
        child.kill()
        child.communicate()


def test_log_with_db_reads_a_target_without_any_site_file_until_it_is_dropped(
    make_host: Make, server: Postgres, tmp_path: Path
) -> None:
    host = make_host("postgres")
    host.leave(20)
    host.ingest()
    elsewhere = Host(host.python, tmp_path / "elsewhere", "x.duckdb", {}, PASSWORD)
    shown = elsewhere.cli("log", "--db", host.path, "--json")
    assert len(json.loads(shown.stdout)) == 20, shown.stderr
    assert sorted(file.name for file in elsewhere.folder.iterdir()) == ["mxcp-site.yml"]
    server.sql("DROP TABLE logs", host.database)
    gone = host.cli("log")
    assert gone.returncode == 1 and "logs is missing beside its ledger" in gone.stderr


def test_follow_of_a_target_without_a_log_waits_and_shows_no_secret(make_host: Make) -> None:
    host = make_host("ducklake")
    child = host.start(
        "import sys; from mxcp_audit import main; main(['log', '-f', '--db', sys.argv[1]])",
        f"{host.path} password={PASSWORD}",
    )
    assert child.stderr
    told = child.stderr.readline()
    child.kill()
    child.communicate()
    assert "there is no log at ducklake:" in told and PASSWORD not in told


def test_segment_with_a_nul_from_elsewhere_does_not_stop_postgresql(make_host: Make) -> None:
    host = make_host("postgres")
    host.leave(3)
    (segment,) = host.segments()
    segment.write_bytes(segment.read_bytes().replace(b'"left"', rb'"le\u0000ft"'))
    host.ingest()
    names = {event["name"] for event in json.loads(host.cli("log", "--json").stdout)}
    assert names == {"le\ufffdft"}


def test_secret_of_duckdbs_own_opens_postgresql(make_host: Make, server: Postgres, python: str) -> None:
    host = make_host("postgres")
    name = host.database
    script = f"""
import duckdb
from mxcp_audit import file_of_package
def extension(name):
    file = name + ".duckdb_extension"
    return file_of_package("duckdb_extension_" + name, "extensions", "v" + duckdb.__version__, file)
connection = duckdb.connect()
connection.execute(f"LOAD '{{extension('postgres_scanner')}}'")
connection.execute('''CREATE PERSISTENT SECRET audit_database (TYPE postgres, HOST '127.0.0.1',
    PORT {server.port}, DATABASE '{name}', USER 'audit', PASSWORD '{PASSWORD}')''')
print("{{}}")
"""
    host.run(script)
    plain = Host(python, host.folder, "postgres:", {"SECRET": "audit_database"}, "")
    plain.start(LOG, "a", 20, 0).communicate(timeout=120)
    assert plain.counts()[0] == [20, 20, 20]
    assert server.sql("SELECT count(*) FROM logs", name) == "20"


def test_a_file_can_be_encrypted_and_so_are_its_copies(python: str, tmp_path: Path, engine: str) -> None:
    path = tmp_path / "log.duckdb"
    host = Host(python, tmp_path, str(path), {"encryption_key": "sesame"}, "")
    host.start(LOG, "needle", 20, 0).communicate(timeout=120)
    assert host.cli("backup", "copy.duckdb").returncode == 0
    host.start(LOG, "needle", 20, 0).communicate(timeout=120)
    for command in (["compact"], ["restore", "copy.duckdb"], ["verify"], ["doctor"]):
        done = host.cli(*command)
        assert done.returncode == 0, (command, done)
    path.unlink()
    done = host.cli("restore", "copy.duckdb")
    assert done.returncode == 0 and "holds 20" in done.stdout, done
    assert not [
        file for file in tmp_path.glob("*.duckdb*") if file.is_file() and b"needle" in file.read_bytes()
    ]


def test_engines_print_nothing_of_their_own(python: str, tmp_path: Path, engine: str) -> None:
    script = """
import json
from mxcp_audit import open_engine
bars = []
for apart in (False, True):
    engine = open_engine(apart=apart)
    bars += engine.execute("SELECT current_setting('enable_progress_bar')::BOOLEAN AS bar")
    engine.close()
print(json.dumps(bars))
"""
    assert Host(python, tmp_path / "a", "x.duckdb", {}, "").run(script) == [[False], [False]]


PAGE = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
SQL_BLOCKS = re.findall(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RUN_SQL = """
import json, sys, duckdb
from mxcp_audit import file_of_package
def extension(name):
    file = name + ".duckdb_extension"
    return file_of_package("duckdb_extension_" + name, "extensions", "v" + duckdb.__version__, file)
connection = duckdb.connect()
for name in ("ducklake", "postgres_scanner"):
    connection.execute(f"LOAD '{extension(name)}'")
print(json.dumps(connection.execute(sys.argv[1]).fetchall(), default=str))
"""


def test_docs_every_statement_and_setting_works(make_host: Make, server: Postgres, python: str) -> None:
    host = make_host("postgres")  # for its database
    there = f"dbname={host.database} host=127.0.0.1 port={server.port} user=audit"
    lake = host.folder.parent / "lake"

    def placed(text: str) -> str:
        text = text.replace("dbname=audit host=db.internal user=audit", there)
        text = text.replace("/mnt/audit/lake/", f"{lake}/")
        return text.replace("flush_interval: 1m", "flush_interval: 1s")

    (site,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (host.folder / "mxcp-site.yml").write_text(placed(site))
    host.start(LOG, "a", 100, 0).communicate(timeout=120)
    assert host.counts()[0] == [100, 100, 100]
    plain = Host(python, host.folder.parent / "plain", "postgres:" + there, {}, PASSWORD)
    plain.start(LOG, "a", 20, 0).communicate(timeout=120)
    ran = 0
    for block in SQL_BLOCKS:
        if "ROLE" in block:  # see below
            continue
        if "ATTACH" in block or "SECRET" in block:
            host.run(RUN_SQL, placed(block))
        else:
            server.sql(placed(block), host.database)
        ran += 1
    assert ran == 3
    assert host.counts()[0] == [100, 100, 100]
    host.start(LOG, "a", 20, 0).communicate(timeout=120)
    assert host.counts()[0][:2] == [120, 120]


def test_docs_rights_are_the_least_that_work(
    make_host: Make, server: Postgres, python: str, tmp_path: Path
) -> None:
    name = make_host("postgres").database

    def placed(text: str) -> str:
        text = re.sub(r"\baudit(_host|_reader)?\b|\blake_reader\b", lambda found: f"{name}_{found[0]}", text)
        return text.replace("…", PASSWORD)

    made, given, of_lake = (block for block in SQL_BLOCKS if "ROLE" in block)
    for statement in placed(made).split(";\n"):
        server.sql(statement)
    database = f"{name}_audit"

    def user(role: str, scheme: str = "postgres", **attach: object) -> Host:
        path = f"{scheme}:dbname={database} host=127.0.0.1 port={server.port} user={placed(role)}"
        return Host(python, tmp_path / role, path, attach, PASSWORD)

    def refused(host: Host, *words: str) -> bool:
        done = host.cli(*words)
        assert done.returncode == 1 and len(done.stderr) < 500, done
        return "permission denied for table" in done.stderr

    owner, host, reader = user("audit"), user("audit_host"), user("audit_reader")
    assert owner.cli("purge", "--older-than", "90d").returncode == 0
    server.sql(placed(given), database)
    host.leave(10)
    host.ingest()
    time.sleep(1.5)
    assert refused(host, "purge", "--older-than", "1s")
    for each in (host, reader):
        assert len(json.loads(each.cli("log", "--json").stdout)) == 10
        assert each.cli("verify").returncode == 0
    reader.leave(1)
    assert refused(reader, "ingest")
    assert owner.cli("purge", "--older-than", "1s").returncode == 0
    assert owner.cli("verify").returncode == 0
    wrong = owner.cli("log", PGPASSWORD="wrong")
    assert "password authentication failed" in wrong.stderr and wrong.returncode == 1

    server.sql(f"CREATE DATABASE {name}_lake OWNER {database}")
    database = f"{name}_lake"
    lakes = [
        user("audit", "ducklake:postgres", DATA_PATH=str(tmp_path / "lake")),
        user("lake_reader", "ducklake:postgres"),
    ]
    lakes[0].leave(10)
    lakes[0].ingest()
    server.sql(placed(of_lake), database)
    lakes[0].leave(10)  # what comes later is covered
    lakes[0].ingest()
    for command in ("log --json", "verify", "stats", "doctor"):
        assert lakes[1].cli(*command.split()).returncode == 0
    assert len(json.loads(lakes[1].cli("log", "--json").stdout)) == 20


HANG = """
import json, time
from mxcp_audit import AuditLogger
audit = AuditLogger.from_config()
audit.log_event("cli", "tool", "t", {}, 1)
audit.flush(1)
print(json.dumps(audit.shutdown(timeout=1)))
"""


def test_shutdown_while_the_server_does_not_answer_ends(make_host: Make, server: Postgres) -> None:
    host = make_host("postgres")
    audit = {"enabled": True, "path": host.path + " connect_timeout=3600", "flush_interval": "100ms"}
    (host.folder / "mxcp-site.yml").write_text(json.dumps({"profiles": {"default": {"audit": audit}}}))
    server.pause()
    try:
        host.run(HANG)
        assert len(host.segments()) == 1
    finally:
        server.resume()
    host.ingest()
    assert host.counts()[0] == [1, 1, 1]
