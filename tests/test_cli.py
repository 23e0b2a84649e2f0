"""The command line as processes: answers, exit codes, terminals, pipes; every command on both engines."""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import gzip
import hashlib
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Cli, child_environment, held_database, one_engine, run_process, words

import mxcp_audit
from mxcp_audit import STREAM_FORMS, AuditLogger, build_parser, parse_time

COMMANDS = (
    *("log", "show", "stats", "sql", "config", "redact", "completion", "ingest", "doctor", "import"),
    *("wrap", "verify", "checkpoint", "prove", "purge", "backup", "restore", "compact", "report"),
)
NASTY = "x\x1b[2J\x1b]0;title\x07\x1b]52;c;aGk=\x07\r\x08\x9b31m\n\u202e"


def fill(path: Path) -> None:
    with AuditLogger(path) as audit:
        audit.log_event("cli", "tool", "get_user", {"id": 7, "password": "hunter2"}, 12, session_id="s1")
        audit.log_event("http", "tool", "delete_user", {"id": 7}, 1, "deny", "not an admin", "error", "no")
        audit.log_event(
            *("http", "resource", "reports/{report_id}", {"report_id": "日本"}, 300),
            **{"user_id": "ann", "client": "claude-ai/1.2", "agent": "a1", "address": "::1"},
            **{"server": "shop", "request_id": "7", "error_type": "ValueError"},
            **{"result_bytes": 5, "context": {"k": [1]}},
        )
    code = (
        "import os, sys; from mxcp_audit import AuditLogger;"
        "a = AuditLogger(sys.argv[1], flush_interval=3600, durable=True);"
        "a.log_event('stdio', 'prompt', 'generate_summary', {'text': 'long'}, 5, 'warn', 'be careful');"
        "a.log_event('cli', 'tool', 'get_user', {'id': 8}, 20, trace_id='t1'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, path], env=child_environment(), check=True, timeout=60)
    assert list(Path(f"{path}.journal").glob("*.jsonl"))


@pytest.fixture
def filled(engine: str, copy_of: Callable[..., Path]) -> Path:
    """A folder with `log.duckdb`: three tools, a resource, a prompt; two in a journal."""
    return copy_of(fill).parent


DB = ("--db", "log.duckdb")


def names(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [event["name"] for event in json.loads(done.stdout)]


FILTERS = {
    ("--tool", "get_user"): ["get_user", "get_user"],
    ("--tool", "*user"): ["get_user", "delete_user", "get_user"],
    ("--tool", "delete_user", "--prompt", "generate_summary"): ["generate_summary", "delete_user"],
    ("--resource", "reports/{report_id}"): ["reports/{report_id}"],
    ("--resource", "get_user"): [],
    ("--tool", "get_user", "--type", "resource"): [],
    ("--type", "prompt"): ["generate_summary"],
    ("--policy", "denied"): ["delete_user"],
    ("--policy", "warned"): ["generate_summary"],
    ("--policy", "deny"): ["delete_user"],
    ("--status", "error"): ["delete_user"],
    ("--caller", "stdio"): ["generate_summary"],
    ("--user", "ann"): ["reports/{report_id}"],
    ("--session", "s1"): ["get_user"],
    ("--trace", "t1"): ["get_user"],
    ("--client", "claude-ai/*"): ["reports/{report_id}"],
    ("--client", "claude-ai"): [],
    ("--agent", "a1", "--address", "::1", "--server", "s*p"): ["reports/{report_id}"],
    ("--error-type", "ValueError"): ["reports/{report_id}"],
    ("--grep", "NOT AN"): ["delete_user"],
    ("--grep", "日本"): ["reports/{report_id}"],
    ("--min-ms", "13"): ["get_user", "reports/{report_id}"],
    ("--since", "1h", "--limit", "2"): ["get_user", "generate_summary"],
    ("--since", "2999-01-01"): [],
    ("--until", "1h"): [],
    ("--oldest-first", "--limit", "2"): ["get_user", "delete_user"],
    ("--user", ""): [],
    ("--address", "", "--grep", ""): [],
}


@one_engine
def test_log_each_filter_finds_its_events(filled: Path, run: Cli) -> None:
    for options, expected in FILTERS.items():
        assert names(run("log", "--json", *DB, *options)) == expected, options


@one_engine
def test_log_event_filter_and_show_find_the_same_event(filled: Path, run: Cli) -> None:
    for event in json.loads(run("log", "--json", *DB).stdout):
        assert [event] == json.loads(run("log", "--json", *DB, "--event", event["event_id"]).stdout)
        assert json.loads(run("show", "--json", *DB, event["event_id"]).stdout) == event
    done = run("show", *DB, event["event_id"])
    assert done.returncode == 0 and done.stderr == ""
    assert '    "password": "[REDACTED]"' in done.stdout and "session_id       s1" in done.stdout
    shown = [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert shown[0] == "event_id" and sorted(shown) == sorted(mxcp_audit.PUBLIC_COLUMNS)
    done = run("show", "20260131T120000000000Z-00000000:1", *DB)
    assert (done.returncode, done.stdout) == (1, "") and "there is no event 20260131T" in done.stderr


@one_engine
def test_log_json_has_the_documented_names_in_order(filled: Path, run: Cli) -> None:
    (event,) = json.loads(run("log", "--json", *DB, "--limit", "1").stdout)
    assert list(event) == [
        *("timestamp", "caller", "type", "name", "input_json", "duration_ms", "policy_decision", "reason"),
        *("status", "error", "user_id", "session_id", "trace_id", "client", "agent", "address"),
        *("server", "request_id", "error_type", "result_bytes", "context", "event_id"),
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["timestamp"])
    (event,) = json.loads(run("log", "--json", *DB, "--limit", "1", "--columns", "name,event_id").stdout)
    assert list(event) == ["name", "event_id"]


@one_engine
def test_log_table_columns_wide_and_input(filled: Path, run: Cli) -> None:
    done = run("log", *DB)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == words("TIME (UTC) TYPE NAME STATUS POLICY MS CALLER")
    assert done.stderr == "5 events\n"
    assert run("log", *DB, "--columns", "name, status", "--limit", "1").stdout == (
        "NAME      STATUS\nget_user  success\n"
    )
    denied = ("--policy", "deny", "--columns", "name")
    assert run("log", *DB, *denied).stdout == "NAME\ndelete_user\n"  # no reason, no error
    assert run("log", *DB, *denied, "--input").stdout == 'NAME\ndelete_user\n    {"id":7}\n'
    wide = run("log", *DB, "--wide", COLUMNS="50").stdout
    assert "EVENT_ID" in wide and max(map(len, wide.splitlines())) > 100
    assert '    {"id":7,"password":"[REDACTED]"}' in run("log", *DB, "--input").stdout
    narrow = run("log", *DB, COLUMNS="50").stdout
    assert all(mxcp_audit.display_width(line) <= 50 for line in narrow.splitlines())
    assert run("log", *DB, COLUMNS="9" * 15).returncode == 0


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_log_export_to_file_and_to_standard_output_are_the_same(filled: Path, run: Cli, form: str) -> None:
    done = run("log", *DB, "--export", f"out.{form}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"5 events written to out.{form}\n")
    through = run("log", *DB, "--export", "-", "--format", form)
    assert through.returncode == 0
    assert through.stdout == (filled / f"out.{form}").read_text()
    assert run("log", *DB, "--export", f"out2.{form}", "--limit", "2").stderr.startswith("2 events")


def test_log_export_bad_targets_exit_with_the_reason(filled: Path, run: Cli) -> None:
    unknown = run("log", *DB, "--export", "out.txt")
    assert unknown.returncode == 2 and "csv, csv.gz" in unknown.stderr and "--format" in unknown.stderr
    assert run("log", *DB, "--export", "out.txt", "--format", "csv").returncode == 0
    before = (filled / "log.duckdb").stat()
    for target in ("log.duckdb", "missing/out.csv", "log.duckdb.journal/x.csv", "/dev/full"):
        done = run("log", *DB, "--export", target, "--format", "csv")
        assert done.returncode == 1 and target in done.stderr and done.stdout == "", target
    after = (filled / "log.duckdb").stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (
        after.st_mtime_ns,
        after.st_size,
        after.st_ino,
    )


@one_engine
def test_stats_table_and_json(filled: Path, run: Cli) -> None:
    rows = json.loads(run("stats", *DB, "--json", "--type", "tool").stdout)
    assert [(row["name"], row["calls"], row["errors"], row["denied"], row["max_ms"]) for row in rows] == [
        ("get_user", 2, 0, 0, 20),
        ("delete_user", 1, 1, 1, 1),
    ]
    for by in mxcp_audit.STATS_BY:
        done = run("stats", *DB, "--by", by, "--sort", "p95", COLUMNS="120")
        assert done.returncode == 0 and by.upper() in done.stdout and "█" in done.stdout, by
    assert json.loads(run("stats", *DB, "--by", "hour", "--json").stdout)[0]["hour"].endswith(":00Z")


def test_sql_in_each_form(filled: Path, run: Cli) -> None:
    question = "SELECT name, count(*) AS n FROM logs GROUP BY name ORDER BY n DESC, name"
    assert run("sql", question, *DB).stdout.splitlines()[1] == "get_user             2"
    assert json.loads(run("sql", question, *DB, "--json").stdout)[0] == {"name": "get_user", "n": 2}
    rows = list(csv.reader(io.StringIO(run("sql", question, *DB, "--csv").stdout)))
    assert rows[:2] == [["name", "n"], ["get_user", "2"]]
    for text, shown in (("[1e400]", [None]), ("9" * 5000, "9" * 5000), ("[" * 3000 + "]" * 3000, "[" * 3000)):
        done = run("sql", f"SELECT '{text}'::JSON AS x", *DB, "--json")
        assert str(json.loads(done.stdout, parse_constant=pytest.fail)[0]["x"]).startswith(str(shown))
    refused = run("sql", "DROP TABLE audit.logs", *DB)
    assert refused.returncode == 1 and refused.stdout == "" and "LINE" not in refused.stderr
    assert "SELECT" in refused.stderr


@one_engine
def test_commands_without_a_log_say_why(engine: str, run: Cli) -> None:
    for command in (["log"], ["log", "--export", "x.csv"], ["stats"], ["sql", "SELECT 1"]):
        done = run(*command, "--db", "none.duckdb", "--wait", "0")
        assert done.returncode == 1 and "Audit database not found" in done.stderr, command
        assert done.stdout == ""
    with pytest.raises(mxcp_audit.DatabaseNotFoundError):
        run("log", "--db", "none.duckdb", "--debug")


@pytest.fixture
def held(filled: Path) -> Iterator[int]:
    """Hold the database as another process and yield its pid."""
    with held_database(filled / "log.duckdb") as holder:
        yield holder.pid


def test_commands_while_locked_name_the_holder_and_exit_75(held: int, filled: Path, run: Cli) -> None:
    done = run("log", *DB, "--json", "--wait", "0.1")
    assert done.returncode == 75 and f"PID {held}" in done.stderr
    assert [event["name"] for event in json.loads(done.stdout)] == ["get_user", "generate_summary"]
    event_id = json.loads(done.stdout)[0]["event_id"]
    assert run("show", event_id, *DB, "--wait", "0.1").returncode == 0
    missing = event_id.rpartition(":")[0] + ":999"
    for command in (
        *(
            ["show", missing],
            ["stats"],
            ["sql", "SELECT 1"],
            ["log", "--export", "x.csv"],
            ["log", "--export", "-"],
        ),
    ):
        done = run(*command, *DB, "--wait", "0.1")
        assert (done.returncode, done.stdout) == (75, ""), command
        assert f"PID {held}" in done.stderr
    assert not (filled / "x.csv").exists()


@pytest.mark.parametrize("held", ["database", "lock"])
@one_engine
def test_ingest_wait_tries_again_until_it_can(
    filled: Path, run: Cli, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    with contextlib.ExitStack() as stack:
        if held == "database":
            holder = stack.enter_context(held_database(filled / "log.duckdb"))
            said = f"PID {holder.pid}"
        else:
            lock = stack.enter_context(open(filled / "log.duckdb.journal" / "ingest.lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = "another process is ingesting"
        done = run("ingest", *DB, "--wait", "0")
        assert done.returncode == 75 and said in done.stderr

        def tries(wait: float) -> Iterator[bool]:
            yield False
            if held == "database":
                holder.kill()
                holder.wait()
            else:
                fcntl.flock(lock, fcntl.LOCK_UN)
            yield True

        monkeypatch.setattr(mxcp_audit, "tries", tries)
        done = run("ingest", *DB)
        assert (done.returncode, done.stderr) == (0, "2 events ingested\n")


def test_options_that_would_do_nothing_are_refused(run: Cli) -> None:
    for command in (["config"], ["redact"], ["wrap"]):
        done = run(*command, *DB, "--wait", "1")
        assert done.returncode == 2 and "--wait" in done.stderr, command
    for option in ("--columns=name", "--wide", "--input", "--json"):
        assert run("log", *DB, "--format", "ecs", option).returncode == 2, option
    commands = ["purge --older-than 1d --archive", "verify --checkpoint", "checkpoint --sign", "log --export"]
    for command in map(str.split, (*commands, "report --out", "log --format ecs --cursor-file", "backup")):
        done = run(*command, "", *DB)  # "$ARCHIVE", of a variable that is not set
        assert (done.returncode, done.stdout) == (2, "") and "empty" in done.stderr, command


@one_engine
def test_one_of_anything_is_told_in_the_singular(engine: str, tmp_path: Path, run: Cli) -> None:
    code = (
        "import os, sys; from mxcp_audit import AuditLogger;"
        "a = AuditLogger(sys.argv[1], flush_interval=3600, durable=True);"
        "a.log_event('cli', 'tool', 'once', {}, 5); os._exit(0)"
    )
    run_process([sys.executable, "-c", code, "log.duckdb"], cwd=tmp_path, check=True)
    (segment,) = (tmp_path / "log.duckdb.journal").glob("*.jsonl")
    with open(segment, "ab") as file:
        file.write(b"{}\n")
    os.utime(segment, (0, 0))
    said = []
    for command in (
        ["doctor"],
        ["ingest"],
        ["doctor"],
        ["log"],
        ["stats"],
        ["verify"],
        ["log", "--export", "one.csv"],
        ["backup", "backup.duckdb"],
        ["purge", "--older-than", mxcp_audit.utc_now().isoformat()[:19] + ".999999Z", "--dry-run"],
    ):
        done = run(*command, *DB)
        assert "Traceback" not in done.stderr
        said += [f"{command[0]}: {line}" for line in (done.stdout + done.stderr).splitlines()]
    assert (
        sum(bool(re.search(r"\b1 (event|segment|journal|line|file|group)\b", line)) for line in said) >= 8
    ), said
    plurals = [
        line for line in said if re.search(r"\b1 (event|segment|journal|line|file|group|byte)s\b", line)
    ]
    assert plurals == []


def test_log_corrupt_database_shows_the_journal_and_exits_1(filled: Path, run: Cli) -> None:
    (filled / "log.duckdb").write_bytes(b"garbage" * 3000)
    done = run("log", *DB, "--json")
    assert done.returncode == 1 and "log.duckdb" in done.stderr
    assert [event["name"] for event in json.loads(done.stdout)] == ["get_user", "generate_summary"]
    assert run("stats", *DB).returncode == 1
    assert (filled / "log.duckdb").read_bytes() == b"garbage" * 3000


WRONG: list[list[str]] = [
    [],
    ["nothing"],
    ["log", "--nothing"],
    ["log", "--lim", "3"],
    ["log", "--limit", "0"],
    ["log", "--limit", "x"],
    ["log", "--limit", "-1"],
    ["log", "--since", "1h", "--until", "2h"],
    ["log", "--status", "sucess"],
    ["log", "--since", "fortnight"],
    ["log", "--type", "tools"],
    ["log", "--policy", "maybe"],
    ["log", "--event", "no id"],
    ["log", "--min-ms", "-1"],
    ["log", "--columns", "name,nothing"],
    ["log", "--wait", "soon"],
    ["log", "--format", "csv"],
    ["log", "--raw"],
    ["log", "--json", "--export", "x.csv"],
    ["log", "--follow", "--until", "1h"],
    ["log", "--follow", "--export", "x.csv"],
    ["log", "--profile", "p"],
    ["log", "--user", "\udcff"],
    ["log", "--tool", "x", "--tool", "\udcff"],
    ["show"],
    ["show", "no id"],
    ["stats", "--by", "week"],
    ["stats", "--sort", "name"],
    ["sql"],
    ["sql", "SELECT 1", "--json", "--csv"],
    ["completion", "fish"],
    ["verify", "--db", "log.duckdb", "--checkpoint", "heads.json"],
]


def test_wrong_usage_exits_2_without_a_traceback(run: Cli, tmp_path: Path) -> None:
    head = '{"journal": "x", "position": 1e400, "events": 1, "seal": ""}'
    (tmp_path / "heads.json").write_text(f'{{"journals": [{head}]}}')
    for arguments in WRONG:
        done = run(*arguments, *(DB if arguments[:1] in (["log"], ["show"], ["stats"], ["sql"]) else ()))
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stdout == "" and "Traceback" not in done.stderr, arguments
    assert "see mxcp-audit log --help" in run("log", "--limit", "0").stderr


def test_help_teaches_and_needs_no_duckdb(run: Cli) -> None:
    for command in ("", *COMMANDS):
        done = run(*([command] if command else []), "--help", PATH="", MXCP_AUDIT_ENGINE="none")
        assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii()
        assert "examples:\n  mxcp-audit " in done.stdout, command
    code = (
        "import sys, mxcp_audit\n"
        "try: mxcp_audit.main(['log', '--help'])\n"
        "except SystemExit: sys.exit('duckdb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=child_environment(), timeout=60).returncode == 0


def examples() -> list[list[str]]:
    found = []
    for action in build_parser()._actions:
        for parser in (action.choices or {}).values() if action.dest == "command" else ():  # type: ignore[attr-defined]
            for line in (parser.epilog or "").splitlines():
                words = shlex.split(line.strip())
                if words[:1] == ["mxcp-audit"]:
                    cut = [n for n, word in enumerate(words) if word in ("<", ">", ">>")]
                    found.append(words[1 : cut[0] if cut else None])
    return found


def test_help_examples_are_valid_commands() -> None:
    assert len(examples()) > 15
    for example in examples():
        build_parser().parse_args(example)


def test_version_shows_an_edited_copy(tmp_path: Path, process_cli: Cli) -> None:
    digest = hashlib.sha256((ROOT / "mxcp_audit.py").read_bytes()).hexdigest()[:12]
    expected = f"mxcp_audit {mxcp_audit.__version__}, journal format 2, file {digest}\n"
    done = process_cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    (tmp_path / "mxcp_audit.py").write_text((ROOT / "mxcp_audit.py").read_text() + "# edited\n")
    assert process_cli("--version", PYTHONPATH=str(tmp_path)).stdout != expected


SITE = """\
profile: default
profiles:
  default:
    audit:
      enabled: true
      redact: [nickname]
      attach: {ENCRYPTION_KEY: tell-nobody}
  silent: {}
"""


def test_config_shows_values_and_sources_but_no_secret(tmp_path: Path, run: Cli) -> None:
    (tmp_path / "mxcp-site.yml").write_text(SITE)
    done = run("config", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    assert settings["redact"] == {"value": ["nickname"], "source": "mxcp-site.yml:6"}
    assert settings["durable"] == {"value": False, "source": "default"}
    assert settings["attach"]["value"] == {"ENCRYPTION_KEY": "[REDACTED]"}
    table = run("config")
    assert "tell-nobody" not in table.stdout + done.stdout
    assert "mxcp-site.yml:5" in table.stdout
    off = run("config", "--profile", "silent")
    assert off.returncode == 0 and "false" in off.stdout
    assert run("config", "--profile", "none").returncode == 2
    (tmp_path / "mxcp-site.yml").write_text(
        SITE.replace("redact:", "path: 'postgres:host=h password=tell-nobody'\n      redact:")
    )
    assert "tell-nobody" not in run("config").stdout


def test_log_profile_that_is_not_enabled_says_what_to_add(tmp_path: Path, run: Cli) -> None:
    (tmp_path / "mxcp-site.yml").write_text(SITE)
    done = run("log", "--profile", "silent")
    assert done.returncode == 2 and "enabled: true" in done.stderr


def test_redact_shows_what_would_be_recorded_and_why(
    tmp_path: Path, run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def redact(text: str, *options: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return run("redact", *options)

    done = redact('{"user": "ann", "password": "hunter2"}')
    assert done.returncode == 0 and "hunter2" not in done.stdout
    assert '"password": "[REDACTED]"' in done.stdout and "$.password" in done.stdout
    (tmp_path / "mxcp-site.yml").write_text(SITE.replace("[nickname]", "[login.nickname]"))
    for options, expected in (((), "al"), (("--tool", "login"), "[REDACTED]")):
        answer = json.loads(redact('{"nickname": "al"}', "--json", *options).stdout)
        assert answer["recorded"] == {"nickname": expected}
        assert len(answer["redacted"]) == (expected != "al")
    assert redact("null").stdout == "null\n"
    wrong = redact("no JSON")
    assert wrong.returncode == 2 and "no JSON" in wrong.stderr


@one_engine
def test_nothing_in_the_log_reaches_the_terminal_as_a_command(engine: str, tmp_path: Path, run: Cli) -> None:
    with AuditLogger(tmp_path / "log.duckdb") as audit:
        audit.log_event(NASTY, NASTY, NASTY, {NASTY: NASTY}, 1, NASTY, NASTY, NASTY, NASTY, user_id=NASTY)
    event_id = json.loads(run("log", "--json", *DB).stdout)[0]["event_id"]
    for command in (
        *(["log", *DB], ["log", *DB, "--wide", "--input"], ["log", *DB, "--json"]),
        *(["log", *DB, "--format", "jsonl"], ["show", event_id, *DB], ["show", event_id, *DB, "--json"]),
        *(["stats", *DB], ["stats", *DB, "--json"], ["sql", "SELECT * FROM logs", *DB]),
        *(["sql", 'SELECT name AS "a\x1bb" FROM logs', *DB], ["sql", f"SELECT '{NASTY}' + nothing", *DB]),
        *(["log", *DB, "--type", NASTY], ["log", *DB, "--since", NASTY], ["log", *DB, "--event", NASTY]),
        *(["log", *DB, "--columns", NASTY], ["log", "--db", NASTY], ["log", *DB, "--export", NASTY]),
        ["log", NASTY],
    ):
        done = run(*command)
        text = done.stdout + done.stderr
        assert all(c.isprintable() or c == "\n" for c in text), command
        assert "Traceback" not in done.stderr


@one_engine
def test_output_into_a_closed_pipe_ends_quietly(filled: Path) -> None:
    for command in (["log", *DB, "--json"], ["log", "--help"], ["log", *DB, "--export", "-"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "mxcp_audit", *command],
            cwd=filled,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) in (0, -signal.SIGPIPE)
        assert b"Traceback" not in error and b"BrokenPipe" not in error


@one_engine
def test_output_without_standard_streams_is_no_failure(filled: Path) -> None:
    for command, streams, code in (
        ("log", ">&-", 0),
        ("log --export -", ">&-", 2),
        ("log", "2>&- <&-", 0),
        ("sql -", "<&-", 2),
        ("sql -", r"<<<$'SELECT \xff'", 2),
        ("sql -", r"<<<$'\ufeffSELECT 1'", 0),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m mxcp_audit {command} --db log.duckdb {streams}"],
            cwd=filled,
            env=child_environment(PYTHONIOENCODING="utf-8"),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == code and b"Traceback" not in done.stderr, (streams, done.stderr)


@one_engine
def test_output_to_a_full_device_fails_with_a_message(filled: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mxcp_audit", "log", *DB],
            cwd=filled,
            env=child_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr and b"Traceback" not in done.stderr


@pytest.fixture
def run_in(run: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command with a standard output of this encoding, and returns its text."""

    def run_in(encoding: str, *arguments: str) -> str:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert run(*arguments, *DB).returncode in (0, 1)
        stdout.flush()
        return stdout.buffer.getvalue().decode(stdout.encoding)  # type: ignore[attr-defined,no-any-return]

    return run_in


@one_engine
def test_output_has_the_encoding_of_the_terminal(filled: Path, run_in: Callable[..., str]) -> None:
    head = {"journal": "é", "position": 1, "events": 1, "seal": ""}
    (filled / "heads.json").write_text(json.dumps({"journals": [head]}))
    verify = ["verify", "--checkpoint", "heads.json"]
    commands = (["log"], ["log", "--json"], ["stats"], ["sql", "SELECT '日本é' AS \"é\""], verify)
    for encoding in ("ascii", "latin-1"):
        for command in commands:
            assert run_in(encoding, *command), (encoding, command)
    for command in (verify, [*verify, "--json"], ["backup", "é.duckdb"]):
        assert re.search(r"\\xe9|\\u00e9", run_in("ascii", *command)), command
    assert (filled / "é.duckdb").exists()
    for form in STREAM_FORMS:
        plain, whole = (run_in(encoding, "log", "--format", form) for encoding in ("ascii", "utf-8"))
        assert plain != whole and list(map(json.loads, plain.split("\n")[:-1])) == list(
            map(json.loads, whole.split("\n")[:-1])
        )
    # CSV is UTF-8 whatever the locale says
    assert run_in("ascii", "sql", "SELECT '日本é' AS \"é\"", "--csv") == "é\n日本é\n"


# --- a terminal


class Session:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], folder: Path, *, columns: int = 80, **changes: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.process, self._fd = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            engine = os.environ.get("MXCP_AUDIT_ENGINE", "")
            os.execvpe(
                command[0], command, child_environment(TERM="xterm", MXCP_AUDIT_ENGINE=engine, **changes)
            )
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.text = ""

    def read_until(self, wanted: Callable[[str], object]) -> str:
        end = time.monotonic() + 60
        while not wanted(self.text):
            assert time.monotonic() < end, self.text
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    break
                self.text += data.decode()
        return self.text

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        self.read_until(lambda _: False)
        _, status = os.waitpid(self.process, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


@one_engine
def test_terminal_table_fits_and_is_coloured(filled: Path) -> None:
    session = Session(
        ["bash", "-c", f"sleep 0.3; {sys.executable} -m mxcp_audit log --db log.duckdb"], filled
    )
    assert session.end() == 0
    assert "\x1b[31m" in session.text
    lines = re.sub(r"\x1b\[\d*m", "", session.text).replace("\r\n", "\n").splitlines()
    assert all(mxcp_audit.display_width(line) <= 80 for line in lines) and len(lines) > 5
    plain = Session([sys.executable, "-m", "mxcp_audit", "log", *DB], filled, NO_COLOR="1")
    assert plain.end() == 0 and "\x1b" not in plain.text


@one_engine
def test_terminal_follow_shows_new_events_until_ctrl_c(filled: Path) -> None:
    session = Session([sys.executable, "-m", "mxcp_audit", "log", *DB, "-f", "--limit", "1"], filled)
    session.read_until(lambda text: "get_user" in text)
    with AuditLogger(filled / "log.duckdb") as audit:
        audit.log_event("http", "tool", f"new{NASTY}", None, 1)
    session.read_until(lambda text: "newx" in text)
    session.type("\x03")
    assert session.end() == 130
    assert "\x1b[2J" not in session.text and "Traceback" not in session.text


@one_engine
def test_terminal_follow_replaces_a_running_call_when_it_ends(filled: Path) -> None:
    session = Session([sys.executable, "-m", "mxcp_audit", "log", *DB, "-f", "--limit", "1"], filled)
    with AuditLogger(filled / "log.duckdb") as audit:
        with audit.record("tool", "long"):
            session.read_until(lambda text: re.search("running since .*Z, [1-9] s: tool long\r\n", text))
        session.read_until(lambda text: re.search("\x1b\\[1F\x1b\\[2K[^\n]* long +success", text))
    session.type("\x03")
    assert session.end() == 130


@one_engine
def test_terminal_export_to_it_is_refused(filled: Path) -> None:
    refused = Session([sys.executable, "-m", "mxcp_audit", "log", *DB, "--export", "-"], filled)
    assert refused.end() == 2 and "goes to no terminal" in refused.text


@pytest.mark.parametrize("pause", [0, 0.5])  # before the query has begun, and while it runs
def test_terminal_interrupted_sql_ends_soon(filled: Path, pause: float) -> None:
    endless = "SELECT count(*) FROM range(300000) a, range(1000000000) b WHERE hash(a.range, b.range) = 7"
    marked = (
        "import sys, mxcp_audit; real = mxcp_audit.Reading.query;"
        "mxcp_audit.Reading.query = lambda *a: (print('asking', flush=True), real(*a))[1];"
        "sys.exit(mxcp_audit.main(sys.argv[1:]))"
    )
    session = Session([sys.executable, "-c", marked, "sql", endless, *DB], filled)
    session.read_until(lambda text: "asking" in text)
    time.sleep(pause)
    session.type("\x03")
    assert session.end() == 130
    assert "Traceback" not in session.text


# --- completion


def test_completion_completes_commands_options_and_values(run: Cli, tmp_path: Path) -> None:
    done = run("completion", "bash")
    assert done.returncode == 0
    (tmp_path / "script").write_text(done.stdout)

    def complete(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        code = f". ./script; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _mxcp_audit; "
        code += "echo ${COMPREPLY[@]}"
        answer = subprocess.run(
            ["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert answer.stderr == ""
        return answer.stdout.split()

    assert complete("mxcp-audit", "s") == ["show", "stats", "sql"]
    assert complete("mxcp-audit", "log", "--st") == ["--status"]
    assert complete("mxcp-audit", "log", "--status", "") == ["success", "error"]
    assert complete("mxcp-audit", "stats", "--by", "ho") == ["hour"]
    assert complete("mxcp-audit", "log", "--export", "x") == []
    assert "bashcompinit" in run("completion", "zsh").stdout


ZSH = """
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell "autoload -Uz compinit; compinit -u; source $1; mxcp-audit() { : }; print ready-$((1 + 1))"
typeset seen=""
until_seen() {
    integer tries=600
    while [[ $seen != *$1* ]] && (( tries-- )); do
        zpty -r -t shell part && seen+=$part || sleep 0.1
    done
}
until_seen ready-2
zpty -w -n shell $'mxcp-audit stats --by ho\t'
until_seen hour
print -r -- $seen
zpty -d shell
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_completion_works_in_a_real_zsh(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(run("completion", "zsh").stdout)
    words = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path / "script")]
    shown = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "TERM": "dumb"}, capture_output=True, text=True, timeout=120
    )
    assert "--by hour " in shown.stdout, shown.stderr


# --- times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", "2026-01-02 02:54:05.000000"),
        ("90min", "2026-01-02 01:34:05.000000"),
        ("1h30m", "2026-01-02 01:34:05.000000"),
        ("1d12h", "2025-12-31 15:04:05.000000"),
        ("2w", "2025-12-19 03:04:05.000000"),
        ("today", "2026-01-02 00:00:00.000000"),
        ("yesterday", "2026-01-01 00:00:00.000000"),
        ("15:00:30+02:00", "2026-01-02 13:00:30.000000"),
        ("2026-01-31t12:00:00.123456789z", "2026-01-31 12:00:00.123456"),
        ("2026-01-31 12:00:00,5", "2026-01-31 12:00:00.500000"),
        ("2026-01-31", "2026-01-31 00:00:00.000000"),
        ("0999-01-31", "0999-01-31 00:00:00.000000"),
        ("2026-01-31T12:00", "2026-01-31 12:00:00.000000"),
        ("2026-01-31 12:00:01.5Z", "2026-01-31 12:00:01.500000"),
        ("2026-01-31T12:00:00+02:00", "2026-01-31 10:00:00.000000"),
        ("2026-01-31T12:00:00-0530", "2026-01-31 17:30:00.000000"),
    ],
)
def test_parse_time_durations_and_iso(text: str, expected: str) -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    assert parse_time(text, now=now) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "x",
            "10",
            "-1h",
            "2026-13-01",
            "2026-01-31T25:00",
            "9999999d",
            "2026-01-31T12",
            "1h 30m x",
        ),
        *("5M x", "5 m m", "1e9h", "1y", "fortnight"),
    ],
)
def test_parse_time_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="10m, 2h"):
        parse_time(text)


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be nine hours before UTC."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31T12:00", "2026-01-31 03:00:00.000000"),
        ("2026-01-31T12:00:00Z", "2026-01-31 12:00:00.000000"),
        ("today", "2026-01-02 15:00:00.000000"),  # it is the 3rd there
        ("yesterday", "2026-01-01 15:00:00.000000"),
        ("15:00", "2026-01-03 06:00:00.000000"),
        ("1h", "2026-01-02 19:04:05.000000"),
    ],
)
def test_parse_time_local(tokyo: None, text: str, expected: str) -> None:
    now = datetime.datetime(2026, 1, 2, 20, 4, 5, tzinfo=datetime.timezone.utc)
    assert parse_time(text, now=now, local=True) == expected


@one_engine
def test_local_times_are_read_and_shown(filled: Path, run: Cli, tokyo: None) -> None:
    event = json.loads(run("log", *DB, "--json", "--limit", "1").stdout)[0]
    moment = event["timestamp"]
    local = mxcp_audit.local_time(moment)
    assert local.endswith("+09:00") and local[:19] != moment[:19]
    columns = ("--columns", "timestamp", "--limit", "1")
    shown = f"TIME (local)\n{local[:19].replace('T', ' ')}\n"
    assert run("log", *DB, *columns, "--local").stdout.replace("TIME (local)       ", "TIME (local)") == shown
    assert run("log", *DB, *columns, "--utc").stdout.startswith("TIME (UTC)\n" + moment[:10])
    for options, count in ((("--local",), 1), (("--utc",), 0), ((), 0)):
        found = run("log", *DB, "--json", "--event", event["event_id"], "--since", local[:26], *options)
        assert len(json.loads(found.stdout)) == count, options
    assert local in run("show", *DB, "--local", event["event_id"]).stdout
    assert local[:16].replace("T", " ") in run("stats", *DB, "--local", COLUMNS="150").stdout
    assert run("log", *DB, "--local", "--utc").returncode == 2


@pytest.mark.parametrize("form", ["csv", "csv.gz"])
@one_engine
def test_export_begins_with_a_byte_order_mark(filled: Path, run: Cli, form: str) -> None:
    read = gzip.open if form == "csv.gz" else open
    assert run("log", *DB, "--export", f"a.{form}").returncode == 0
    assert run("log", *DB, "--export", f"b.{form}", "--bom").returncode == 0
    with read(filled / f"a.{form}", "rb") as a, read(filled / f"b.{form}", "rb") as b:
        assert b.read() == b"\xef\xbb\xbf" + a.read()
    assert run("log", *DB, "--export", "c.json", "--bom").returncode == 2
    assert run("log", *DB, "--bom").returncode == 2


# --- the page


def test_docs_page_has_the_options_of_every_command(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    (tmp_path / "cli.md").write_text(re.sub(r"(?m)^\|.*\| .*with this text in name.*\n", "", page))
    subprocess.run([sys.executable, ROOT / "tools" / "make_cli", tmp_path / "cli.md"], check=True)
    assert (tmp_path / "cli.md").read_text() == page, "run tools/make_cli"
    for name, lines in mxcp_audit.option_blocks().items():
        if name[0] == "@":
            assert f"\n## `{name[1:]}`\n" in page
        if any(" | " in line and line[0] != ">" for line in lines[1:]):
            assert f"<!-- options: {name[1:]} -->" in page
    flags = set(re.findall(r" (--?[a-z][a-z-]*)", "\n ".join(mxcp_audit._OPTIONS.split("\n"))))
    assert set(re.findall(r"`(--?[a-z][a-z-]*)", page)) <= flags | {"--help", "--version"}


@one_engine
def test_doctor_says_in_words_what_is_and_what_to_do(
    filled: Path, run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "_LITTLE_SPACE_BYTES", 0)
    done = run("doctor", *DB)
    assert done.returncode == 0 and done.stdout.endswith("\nhealthy\n")
    assert re.search(r"^database: path .*log.duckdb, readable True, events 3$", done.stdout, re.MULTILINE)
    (filled / "log.duckdb.journal" / "20260131T120000000000Z-00000000.rejected").write_text("{}")
    done = run("doctor", *DB)
    assert done.returncode == 1 and done.stdout.endswith("\nnot healthy\n")
    assert re.search(r"^fault: .*: 1 file in .*; remedy: read the \.rejected", done.stdout, re.MULTILINE)


@one_engine
def test_log_points_out_what_was_lost(filled: Path, run: Cli) -> None:
    loss = mxcp_audit.Loss(3, "2026-01-31 12:00:00", "2026-01-31 12:00:01", "the queue was full")
    mxcp_audit.Journal(filled / "log.duckdb.journal").record_loss(loss)
    done = run("log", *DB)
    assert done.returncode == 0 and "3 events lost in the last 30 days" in done.stderr


def test_commands_of_a_program_answer_in_any_of_its_threads(filled: Path, run: Cli) -> None:
    """Signals are the main thread's alone."""
    done: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: done.append(run("sql", "SELECT count(*) AS n FROM logs", *DB)))
    thread.start()
    thread.join()
    assert done[0].returncode == 0 and "5" in done[0].stdout


@one_engine
def test_terminal_csv_and_progress_of_verify(filled: Path) -> None:
    with AuditLogger(filled / "log.duckdb") as audit:
        audit.log_event("http", "tool", NASTY)
    module = [sys.executable, "-m", "mxcp_audit"]
    shown = Session([*module, "sql", "SELECT name FROM logs", "--csv", *DB], filled)
    assert shown.end() == 0 and "get_user" in shown.text and "\x1b[2J" not in shown.text
    verified = Session([*module, "verify", *DB], filled)
    assert verified.end() == 0 and re.search(r"\rverified (\d+) of \1 events\S*\r\n", verified.text)


def test_version_of_a_module_inside_of_an_archive(tmp_path: Path, process_cli: Cli) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(ROOT / "mxcp_audit.py", "mxcp_audit.py")
    done = process_cli("--version", PYTHONPATH=str(tmp_path / "all.zip"))
    assert done.returncode == 0 and done.stdout.endswith(", file unknown\n")


@one_engine
@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process at once there")
def test_fx_134_sigterm_leaves_no_half_file_and_the_old_one(filled: Path) -> None:
    code = (
        "import os, signal, mxcp_audit\n"
        "def write(*args, **more):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "mxcp_audit.Reading._write = write\n"
        "mxcp_audit.main(['log', '--db', 'log.duckdb', '--export', 'old.csv'])\n"
    )
    (filled / "old.csv").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=filled, env=child_environment(), capture_output=True
    )
    assert done.returncode == -signal.SIGTERM and done.stderr == b""
    assert (filled / "old.csv").read_text() == "old" and not list(filled.glob(".old.csv*"))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "command",
    ["log", "stats", "verify", "checkpoint", "purge --older-than 1d", "compact", "backup copy", "ingest"],
)
def test_fx_234_commands_without_a_database_make_nothing_and_say_why(
    tmp_path: Path, run: Cli, command: str, enabled: bool
) -> None:
    site = f"profiles: {{default: {{audit: {{enabled: {str(enabled).lower()}, path: no/where.duckdb}}}}}}\n"
    (tmp_path / "mxcp-site.yml").write_text(site)
    done = run(*command.split())
    if command != "ingest":
        assert done.returncode == 2 - enabled
        assert ("Audit database not found" if enabled else "is not enabled") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mxcp-site.yml"]
