"""`wrap`: any stdio server, audited from outside; real processes that are really killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Cli, child_environment, wait_until
from environments import OUTCOMES, SERVERS, outcomes_of, python_with

import mxcp_audit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX here")

CAT = """
import os
import random
while data := os.read(0, 65536):
    while data:
        data = data[os.write(1, data):]
"""
# Answers each call with its own arguments; `die`, `hang` and `exit` do what they say.
SERVER = """
import json, os, signal, sys, time
for line in sys.stdin.buffer:
    message = json.loads(line)
    name = message.get("params", {}).get("name")
    if name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        continue
    if name == "exit":
        sys.exit(message["params"]["arguments"]["code"])
    if "id" in message:
        result = {"content": [{"type": "text", "text": json.dumps(message["params"]["arguments"])}]}
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\\n")
        sys.stdout.buffer.flush()
"""


FOR_EVER = "while True: time.sleep(1)"


def wrap(*options: str, server: list[str], database: str | None = "log.duckdb") -> list[str]:
    place = ["--db", database] if database else []
    return [sys.executable, "-m", "mxcp_audit", "wrap", *place, *options, "--", *server]


def start(command: list[str], folder: Path, **more: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=child_environment(), bufsize=0, **{**pipes, **more})


def run(command: list[str], folder: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, cwd=folder, env=child_environment(), input=data, capture_output=True, timeout=120
    )


def call(key: object, name: str = "echo", **arguments: object) -> bytes:
    params = {"name": name, "arguments": arguments}
    return (
        json.dumps({"jsonrpc": "2.0", "id": key, "method": "tools/call", "params": params}).encode() + b"\n"
    )


def events(cli: Cli) -> list[dict[str, Any]]:
    shown = cli("log", "--db", "log.duckdb", "--json", "--limit", "1000")
    assert shown.returncode == 0, shown.stderr
    return list(reversed(json.loads(shown.stdout)))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc").exists()


# --- bytes


def test_wrap_every_byte_both_ways_unchanged(tmp_path: Path) -> None:
    data = os.urandom(3 << 20) + b"\n\0\r\n" + b"x" * (3 << 20) + call(1) + b"no line feed at the end"
    done = run(wrap(server=[sys.executable, "-c", CAT]), tmp_path, data)
    assert (done.stdout == data, done.returncode) == (True, 0)
    assert done.stderr.count(b"is no JSON") == 1  # told once, and passed


def test_wrap_pieces_pass_at_once(tmp_path: Path) -> None:
    """Half a line comes back before the other half is sent: nothing on the way waits for more."""
    process = start(wrap(server=[sys.executable, "-c", CAT]), tmp_path)
    assert process.stdin and process.stdout
    for piece in (b'{"id":', b"1}", b"\n"):
        process.stdin.write(piece)
        assert process.stdout.read(len(piece)) == piece
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_wrap_into_a_target_that_is_no_file_keeps_the_journal_here(tmp_path: Path) -> None:
    command = wrap(server=[sys.executable, "-c", SERVER], database="postgres:host=/nowhere dbname=none")
    done = run(command, tmp_path, call(1))
    assert (done.returncode, json.loads(done.stdout)["id"]) == (0, 1)
    (segment,) = (tmp_path / "logs-default.journal").glob("*.jsonl")
    assert json.loads(segment.read_text())["name"] == "echo"


def test_wrap_answer_of_many_mebibytes_passes_and_is_recorded(tmp_path: Path, cli: Cli) -> None:
    text = "x" * (20 << 20)
    done = run(wrap(server=[sys.executable, "-c", SERVER]), tmp_path, call(1, text=text) + call("1", a=1))
    first, second = done.stdout.splitlines()
    assert json.loads(json.loads(first)["result"]["content"][0]["text"]) == {"text": text}
    assert json.loads(second)["id"] == "1"
    found = events(cli)
    assert [event["status"] for event in found] == ["success", "success"]
    assert found[1]["input_json"] == '{"a":1}'


def test_wrap_batch_and_notification(tmp_path: Path, cli: Cli) -> None:
    server = [sys.executable, "-c", CAT]  # it answers with what it is asked, and so with no result
    batch = [json.loads(call(1, "a")), {"jsonrpc": "2.0", "method": "notifications/initialized"}]
    answers = [{"jsonrpc": "2.0", "id": 1, "result": {}}]
    done = run(
        wrap(server=server), tmp_path, b"".join(json.dumps(m).encode() + b"\n" for m in (batch, answers))
    )
    assert done.stdout.count(b"\n") == 2
    assert [event["name"] for event in events(cli)] == ["a"]


# --- ends


@pytest.mark.parametrize("code", [0, 1, 3, 75, 255])
def test_wrap_exit_code_passes_through(code: int, tmp_path: Path) -> None:
    done = run(wrap(server=[sys.executable, "-c", f"raise SystemExit({code})"]), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGABRT"])
def test_wrap_server_dies_of_signal_so_do_we_and_the_call_is_recorded(
    name: str, tmp_path: Path, cli: Cli
) -> None:
    server = SERVER.replace("signal.SIGKILL", f"signal.{name}")
    done = run(wrap(server=[sys.executable, "-c", server]), tmp_path, call(1, a=1) + call(2, "die"))
    assert done.returncode == -getattr(signal, name)
    assert [(event["name"], event["error"]) for event in events(cli)] == [
        ("echo", None),
        ("die", "the server went away before it was answered"),
    ]


def test_wrap_server_ends_before_a_slow_client_reads_nothing_is_lost(tmp_path: Path) -> None:
    server = "import sys\nsys.stdout.buffer.write(b'x' * 100_000)\nsys.stdout.flush()"
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdout
    time.sleep(2 * mxcp_audit.WrappedServer.GRACE_SECONDS)  # the pipe to us is full, and the server gone
    assert len(process.communicate(timeout=60)[0]) == 100_000


def test_wrap_grandchild_that_holds_the_output_ends_with_its_launcher(tmp_path: Path) -> None:
    server = "import subprocess, sys\nprint(subprocess.Popen(['sleep', '600'], stderr=-3).pid, flush=True)"
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdout
    grandchild = int(process.stdout.readline())
    try:
        assert process.wait(60) == 0
        wait_until(lambda: not is_alive(grandchild))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(grandchild, signal.SIGKILL)
        process.communicate()


def test_wrap_client_that_ends_as_the_sdks_do_leaves_its_pending_call_on_record(
    tmp_path: Path, cli: Cli
) -> None:
    """Close, wait, SIGTERM, wait, SIGKILL, with a server that ignores all of it."""
    server = (
        "import signal, sys, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(600)"
    )
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdin and process.stdout and process.stdout.readline()
    process.stdin.write(call(1))
    process.stdin.close()
    process.send_signal(signal.SIGTERM)
    running = ["log", "--db", "log.duckdb", "--running", "--json"]
    wait_until(lambda: "echo" in cli(*running).stdout)
    process.kill()
    process.wait()
    process.stdout.close()
    assert cli("ingest", "--db", "log.duckdb").returncode == 0
    (event,) = events(cli)
    assert (event["status"], event["error"]) == ("error", mxcp_audit.UNFINISHED)


def calls_of(data: bytes, lines: Iterable[str]) -> list[object]:
    """Return the ids of the calls that a reader with these lines executes."""
    found: list[object] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            messages = value if isinstance(value, list) else [value]
            found += [m["id"] for m in messages if isinstance(m, dict) and m.get("method") == "tools/call"]
    return found


def test_stdio_whatever_a_reader_would_execute_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random streams, in random pieces, against a reader with universal newlines and one with LF alone."""
    count = int(os.environ.get("MXCP_AUDIT_STREAMS", "1500"))
    dice = random.Random(count)
    logger = mxcp_audit.AuditLogger("unused.duckdb", enabled=False)
    for _ in range(count):
        data, number = b"", 0
        for _ in range(dice.randrange(1, 7)):
            if dice.random() < 0.6:
                number += 1
                data += json.dumps({"id": number, "method": "tools/call", "params": {"name": "t"}}).encode()
                if dice.random() < 0.2:
                    data = data.replace(b", ", dice.choice((b",\r", b"\r, ")), dice.randrange(3))
            else:
                data += dice.choice((b"x", b" ", b"{", b"}", b"[", b"]", b"null", b'"a\\nb"', b"[]", b","))
            data += dice.choice((b"\n", b"\r", b"\r\n", b"\n\n", b"", b"\r\r"))
        seen: list[object] = []
        audit = mxcp_audit.StdioAudit(logger)
        monkeypatch.setattr(audit, "_take_request", lambda key, method, params: method and seen.append(key))  # noqa: B023
        start = 0
        while start < len(data):
            end = start + dice.randrange(1, 40)
            audit.from_client(data[start:end])
            start = end
        audit.from_client(None)
        universal = calls_of(data, io.TextIOWrapper(io.BytesIO(data), newline=None))
        expected = {*universal, *calls_of(data, data.decode().split("\n"))}
        assert sorted(map(str, seen)) == sorted(map(str, expected)), data


def test_stdio_line_that_cannot_be_taken_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known to do that."""
    seen: list[object] = []

    def begin(self: object, key: object, method: str, params: object) -> None:
        seen.append(key)
        if key == 1:
            raise ValueError("unforeseen")

    monkeypatch.setattr(mxcp_audit.StdioAudit, "_take_request", begin)
    audit = mxcp_audit.StdioAudit(mxcp_audit.AuditLogger("unused.duckdb", enabled=False))
    with pytest.raises(ValueError):
        audit.from_client(call(1))
    assert audit.from_client(call(2)) is None
    assert seen == [1, 2]


@pytest.mark.parametrize("end", [b"\r", b"\n"])
def test_stdio_call_that_is_sent_twice_is_recorded_twice(end: bytes) -> None:
    audit, seen = mxcp_audit.StdioAudit(mxcp_audit.AuditLogger("unused.duckdb", enabled=False)), []
    audit._take_request = lambda key, method, params: seen.append(key)  # type: ignore[method-assign]
    line = call(1).strip()
    audit.from_client(line + end + line + b"\n")
    assert seen == [1, 1]


@pytest.mark.parametrize(
    "line",
    [
        b"{'method': 'tools/call'}",
        b'{"method": "ping", "method": "tools/call", "id": 1}',
        b'{"method": "ping", "METHOD": "tools/call", "id": 1}',
        b'{"method": "tools/call", "id": 1, "params": {"name": "get"}, "Params": {"name": "delete"}}',
        b'{"method": "tools/call", "id": 1, "params": {"name": "get", "Name": "delete"}}',
        b'{"method": "resources/read", "id": 1, "params": {"uri": "a:b", "uri": "a:c"}}',
        b"{'a':\r'b'}",
        b"{,}",
        b"{'method': 'tools/call'}\r{}",
        b"[" * 200_000 + b"\r{}",
    ],
)
def test_stdio_what_only_some_servers_can_read_is_told(line: bytes) -> None:
    audit = mxcp_audit.StdioAudit(mxcp_audit.AuditLogger("unused.duckdb", enabled=False))
    assert audit.from_client(line + b"\n")


def test_fx_219_resource_is_recorded_by_its_uri_whatever_name_the_client_adds(
    tmp_path: Path, cli: Cli
) -> None:
    line = b'{"id": 1, "method": "resources/read", "params": {"name": "harmless", "uri": "a://secrets"}}\n'
    assert run(wrap(server=[sys.executable, "-c", CAT]), tmp_path, line).stdout == line
    assert [event["name"] for event in events(cli)] == ["a://secrets"]


def test_wrap_signals_reach_the_server(tmp_path: Path) -> None:
    server = (
        "import signal, sys, time\n"
        "seen = []\n"
        "def note(number, frame):\n"
        "    seen.append(number)\n"
        "    print(number, flush=True)\n"
        "    if number == signal.SIGTERM: sys.exit(len(seen))\n"
        "for name in ('SIGTERM', 'SIGHUP', 'SIGINT', 'SIGUSR1'): signal.signal(getattr(signal, name), note)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path, start_new_session=True)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        assert int(process.stdout.readline()) == number
    assert process.wait(60) == 4
    process.stdout.close()


def test_wrap_command_that_is_none(tmp_path: Path) -> None:
    done = run(wrap(server=["no-such-program"]), tmp_path)
    assert done.returncode == 1 and b"no-such-program can't be started" in done.stderr
    done = run(wrap(server=[]), tmp_path)
    assert done.returncode == 2 and b"required: COMMAND; see mxcp-audit wrap --help" in done.stderr
    assert done.stdout == b""


CLIENT = """
import subprocess, sys, time
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
server.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"hang"}}\\n')
server.stdin.flush()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_wrap_client_killed_no_orphan_and_the_call_is_recorded(
    stubborn: bool, tmp_path: Path, cli: Cli
) -> None:
    """A stubborn server ignores the end of its input and SIGTERM."""
    server = f"import os\nopen('pid', 'w').write(str(os.getpid()))\n{SERVER}"
    if stubborn:
        server = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{server}\n{FOR_EVER}"
    command = [sys.executable, "-c", CLIENT, *wrap(server=[sys.executable, "-c", server])]
    client = start(command, tmp_path)
    assert client.stdout
    wrapper = int(client.stdout.readline())
    wait_until(
        lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the server doesn't start"
    )
    child = int((tmp_path / "pid").read_text())
    client.kill()
    client.communicate()
    wait_until(lambda: not is_alive(wrapper) and not is_alive(child), "an orphan is left")
    assert [(event["name"], event["error"]) for event in events(cli)] == [
        ("hang", "the client went away before it was answered")
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_wrap_killed_itself_stubborn_server_dies_too(tmp_path: Path) -> None:
    server = f"import os, time\nprint(os.getpid(), flush=True)\n{FOR_EVER}"
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdout
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(child), "an orphan is left")


def test_wrap_server_that_closes_its_output_seen_by_the_client(tmp_path: Path) -> None:
    server = "import os, sys\nos.close(1)\nsys.stdin.read()\nos._exit(5)"
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdin and process.stdout
    assert process.stdout.read() == b""
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 5
    process.stdout.close()


def test_fx_217_server_that_closed_its_output_does_not_outlive_its_input(tmp_path: Path) -> None:
    server = f"import os, time\nos.close(1)\n{FOR_EVER}"
    process = start(wrap(server=[sys.executable, "-c", server]), tmp_path)
    assert process.stdin and process.stdout
    assert process.stdout.read() == b""
    process.stdin.close()
    assert process.wait(60) == -signal.SIGTERM
    process.stdout.close()


# --- what if auditing fails


def test_wrap_profile_not_enabled_passes_unaudited_or_refuses(tmp_path: Path) -> None:
    (tmp_path / "mxcp-site.yml").write_text("profile: default\nprofiles:\n  default: {}\n")
    server = [sys.executable, "-c", SERVER]
    done = run(wrap(server=server, database=None), tmp_path, call(1, a=1))
    assert (done.returncode, json.loads(done.stdout)["id"]) == (0, 1)
    assert done.stderr.decode().splitlines() == [
        "mxcp-audit: audit logging is not enabled for profile 'default': the traffic passes unaudited"
    ]
    done = run(wrap("--strict", server=server, database=None), tmp_path, call(1, a=1))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"leave --strict out" in done.stderr
    assert not list(tmp_path.glob("logs-*"))


def test_wrap_profile_of_the_site_file(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mxcp-site.yml").write_text(
        "profiles:\n  default: {}\n  other:\n    audit: {enabled: true}\n"
    )
    server = [sys.executable, "-c", SERVER]
    done = run(wrap("--profile", "other", server=server, database=None), tmp_path, call(1, a=1))
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(cli("log", "--profile", "other", "--json").stdout)[0]["name"] == "echo"


def test_wrap_wrong_configuration_refused(tmp_path: Path) -> None:
    (tmp_path / "mxcp-site.yml").write_text("profiles:\n  default:\n    audit: {enabled: maybe}\n")
    done = run(wrap(server=[sys.executable, "-c", SERVER], database=None), tmp_path, call(1))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"mxcp-site.yml:3" in done.stderr and b"Traceback" not in done.stderr


def test_wrap_journal_that_cannot_be_written_traffic_goes_on_or_stops(tmp_path: Path) -> None:
    (tmp_path / "log.duckdb.journal").write_text("in the way")
    server = [sys.executable, "-c", SERVER]
    done = run(wrap(server=server), tmp_path, call(1, a=1) + call(2, a=2))
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 2)
    assert b"the journal can't be written" in done.stderr
    (tmp_path / "mxcp-site.yml").write_text(
        "profiles: {default: {audit: {enabled: yes, path: log.duckdb, strict: [ech*], strict_timeout: 1}}}\n"
    )
    other = call(3).replace(b"tools/call", b"tools/list")
    done = run(wrap(server=server, database=None), tmp_path, call(1, a=1) + other + call(2, a=2))
    answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0 and set(answers) == {1, 2, 3} and "error" not in answers[3]
    for refused in (answers[1], answers[2]):
        assert "can't be put on record within 1 s; it was not executed" in refused["error"]["message"]


def test_fx_wrap_strict_call_without_an_id_is_refused_too(tmp_path: Path) -> None:
    """Some servers execute it."""
    (tmp_path / "log.duckdb.journal").write_text("in the way")
    (tmp_path / "mxcp-site.yml").write_text(
        "profiles: {default: {audit: {enabled: yes, path: log.duckdb, strict: yes, strict_timeout: 1}}}\n"
    )
    without = message(method="tools/call", params={"name": "delete"})
    other = message(method="notifications/initialized")
    done = run(wrap(server=[sys.executable, "-c", CAT], database=None), tmp_path, without + other)
    assert (done.returncode, done.stdout) == (0, other)


def test_fx_wrap_each_kind_of_problem_is_told(tmp_path: Path) -> None:
    deep = b'{"a":' + b"[" * 200_000 + b"\n"
    done = run(wrap(server=[sys.executable, "-c", CAT]), tmp_path, b"{,}\n" * 2 + deep)
    assert done.stderr.count(b"is no JSON") == done.stderr.count(b"nested too deeply") == 1


def test_fx_stdio_names_in_any_case_are_known(tmp_path: Path, cli: Cli) -> None:
    """Servers in Go take them."""
    with mxcp_audit.AuditLogger(tmp_path / "log.duckdb") as audit:
        stdio = mxcp_audit.StdioAudit(audit)
        given = {"NAME": "delete", "Arguments": {"id": 7, "ID": 8}}
        assert stdio.from_client(message(id=1, METHOD="tools/call", Params=given)) is None
        stdio.from_server(message(id=1, result={"content": []}))
    (event,) = events(cli)
    assert (event["name"], event["status"], event["input_json"]) == ("delete", "success", '{"id":7,"ID":8}')


def test_fx_stdio_answer_without_a_result_is_an_error(tmp_path: Path, cli: Cli) -> None:
    with mxcp_audit.AuditLogger(tmp_path / "log.duckdb") as audit:
        stdio = mxcp_audit.StdioAudit(audit)
        stdio.from_client(call(1) + call(2))
        stdio.from_server(message(id=1) + message(id=2, result=None, error=None))
    assert [event["status"] for event in events(cli)] == ["error", "success"]


def test_wrap_message_that_cannot_be_read_traffic_goes_on_or_stops(tmp_path: Path) -> None:
    deep = b'{"a":' + b"[" * 200_000 + b"\n"
    done = run(wrap(server=[sys.executable, "-c", CAT]), tmp_path, deep + call(1))
    assert (done.returncode, done.stdout) == (0, deep + call(1))
    assert b"passed unaudited: it is nested too deeply" in done.stderr
    done = run(wrap("--strict", server=[sys.executable, "-c", CAT]), tmp_path, deep + call(1))
    assert (done.returncode, done.stdout) == (0, call(1))  # the other one does not even reach the server
    assert b"was refused: it is nested too deeply" in done.stderr


def test_wrap_bookkeeping_that_fails_traffic_goes_on_or_stops(tmp_path: Path) -> None:
    """Nothing is known to do that."""
    code = (
        "import sys, mxcp_audit\n"
        "def fail(self, data): raise ValueError('unforeseen')\n"
        "mxcp_audit.StdioAudit.from_client = fail\n"
        "sys.exit(mxcp_audit.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *wrap(server=[sys.executable, "-c", CAT])[3:]]
    done = run(command, tmp_path, call(1))
    assert (done.returncode, done.stdout) == (0, call(1)) and b"passed unaudited: ValueError" in done.stderr
    done = run([*command[:6], "--strict", *command[6:]], tmp_path, call(1))
    assert "was refused: ValueError" in json.loads(done.stdout)["error"]["message"]


def test_wrap_client_that_reads_no_more_is_recorded_to_its_end(tmp_path: Path, cli: Cli) -> None:
    process = start(wrap(server=[sys.executable, "-c", SERVER]), tmp_path)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    show = ["log", "--db", "log.duckdb", "--json", "--status", "success"]
    for number in range(3):  # one by one, so that the answers after the first meet a client that is gone
        process.stdin.write(call(number))
        wait_until(lambda wanted=number + 1: cli(*show).stdout.count('"event_id"') == wanted)  # type: ignore[misc]
    process.stdin.close()
    process.stderr.read()
    process.wait(60)
    process.stderr.close()
    assert [event["status"] for event in events(cli)] == ["success"] * 3


def test_wrap_server_that_closes_its_input_is_seen_by_the_client(tmp_path: Path) -> None:
    code = f"import os, time\nos.close(0)\nos.write(1, b'closed')\n{FOR_EVER}"
    process = start(wrap(server=[sys.executable, "-c", code]), tmp_path)
    assert process.stdin and process.stdout and process.stdout.read(6) == b"closed"
    with pytest.raises(BrokenPipeError):
        while True:
            process.stdin.write(call(1))
            time.sleep(0.01)
    process.terminate()
    process.communicate()


def test_wrap_strict_answer_follows_its_row(tmp_path: Path) -> None:
    """With --strict a client that has its answer can be sure that the journal has the row."""
    process = start(wrap("--strict", server=[sys.executable, "-c", SERVER]), tmp_path)
    assert process.stdin and process.stdout
    process.stdin.write(call(1, a=1))
    process.stdout.readline()
    process.kill()
    process.communicate()
    (segment,) = (tmp_path / "log.duckdb.journal").glob("*.jsonl")
    assert json.loads(segment.read_text())["name"] == "echo"


# --- real servers, real clients


@pytest.mark.parametrize("made", ["fastmcp", "fastmcp2"])
def test_wrap_real_python_server_same_answers_every_call(made: str, tmp_path: Path, cli: Cli) -> None:
    python = python_with(made)
    server = [python, str(SERVERS / "mcp_server.py"), "sdk", str(tmp_path / "inside.duckdb")]
    outcomes = outcomes_of(python, "mcp_client.py", wrap(server=server), tmp_path)
    assert [outcome[0] for outcome in outcomes] == OUTCOMES  # as alone, in test_integrations.py
    found = events(cli)
    assert [(event["type"], event["name"], event["status"]) for event in found] == [
        *(("tool", "add", "success"), ("tool", "fail", "error"), ("tool", "refuse", "error")),
        *(("tool", "decide", "success"), ("tool", "nosuch", "error"), ("tool", "add", "error")),
        *(("resource", "reports://7", "success"), ("resource", "nosuch://7", "error")),
        *(("prompt", "greet", "success"), ("prompt", "nosuch", "error")),
    ]
    assert found[1]["input_json"] == '{"password":"[REDACTED]"}'
    assert found[3]["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert {event["caller"] for event in found} == {"stdio"}


def node_server() -> list[str]:
    """Return the command of a real Node server, installed once; skip where there is no Node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed here")
    home = ROOT / ".venv" / "node"
    package = home / "node_modules" / "@modelcontextprotocol" / "server-everything"
    if not package.exists():
        home.mkdir(parents=True, exist_ok=True)
        made = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "@modelcontextprotocol/server-everything"],
            cwd=home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if made.returncode:
            pytest.skip(f"the Node server can't be installed here: {made.stderr[-300:]}")
    return [node, str(package / "dist" / "index.js")]


def test_wrap_real_node_server_same_answers_every_call(tmp_path: Path, cli: Cli) -> None:
    python, server = python_with("fastmcp"), node_server()
    alone = outcomes_of(python, "everything_client.py", server, tmp_path)
    assert outcomes_of(python, "everything_client.py", wrap(server=server), tmp_path) == alone
    expected = [
        (kind, name, "error" if how in ("raised", "error") else "success") for kind, name, how, _ in alone
    ]
    found = events(cli)
    assert [(event["type"], event["name"], event["status"]) for event in found] == expected
    assert {row[0] for row in expected} == {"tool", "resource", "prompt"}
    assert {row[2] for row in expected} == {"success", "error"}


def message(**members: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **members}).encode() + b"\n"


def test_stdio_legs_of_a_call_that_asks_for_input_are_one_row(tmp_path: Path, cli: Cli) -> None:
    with mxcp_audit.AuditLogger(tmp_path / "log.duckdb") as audit:
        stdio = mxcp_audit.StdioAudit(audit)
        delete = {"name": "delete_user", "arguments": {"id": 7}}
        for key, answers in ((1, True), (3, False)):
            assert not stdio.from_client(message(id=key, method="tools/call", params=delete))
            asks = {"resultType": "input_required", "requestState": f"s{key}", "inputRequests": {}}
            stdio.from_server(message(id=key, result=asks))
            if answers:
                more = {**delete, "requestState": f"s{key}", "inputResponses": {"ok": True}}
                stdio.from_client(message(id=key + 1, method="tools/call", params=more))
                stdio.from_server(message(id=key + 1, result={"content": [{"type": "text", "text": "gone"}]}))
        stdio.close("over")
    assert [(event["status"], event["error"]) for event in events(cli)] == [
        ("success", None),
        ("error", "not resumed: input required"),
    ]


@pytest.mark.parametrize(("status", "expected"), [("completed", "success"), ("failed", "error")])
def test_stdio_task_is_recorded_when_it_ends(tmp_path: Path, cli: Cli, status: str, expected: str) -> None:
    with mxcp_audit.AuditLogger(tmp_path / "log.duckdb") as audit:
        stdio = mxcp_audit.StdioAudit(audit)
        info = {"clientInfo": {"name": "vscode", "version": "1.101"}}
        stdio.from_client(message(id=0, method="initialize", params=info))
        stdio.from_server(message(id=0, result={"serverInfo": {"name": "shop"}}))
        stdio.from_client(message(id=1, method="tools/call", params={"name": "slow", "task": {"ttl": 1}}))
        stdio.from_server(message(id=1, result={"task": {"taskId": "t1", "status": "working"}}))
        stdio.from_client(message(id=2, method="tasks/get", params={"taskId": "t1"}))
        stdio.from_server(message(id=2, result={"taskId": "t1", "status": "working"}))
        assert audit.counters.accepted == 0
        stdio.from_client(message(id=3, method="tasks/get", params={"taskId": "t1"}))
        stdio.from_server(message(id=3, result={"taskId": "t1", "status": status}))
        assert audit.counters.accepted == 1
    (event,) = events(cli)
    assert (event["name"], event["status"]) == ("slow", expected)
    assert (event["client"], event["server"], event["request_id"]) == ("vscode/1.101", "shop", "1")


def test_stdio_task_whose_result_is_an_error_has_failed(tmp_path: Path, cli: Cli) -> None:
    with mxcp_audit.AuditLogger(tmp_path / "log.duckdb") as audit:
        stdio = mxcp_audit.StdioAudit(audit)
        stdio.from_client(message(id=1, method="tools/call", params={"name": "slow", "task": {"ttl": 1}}))
        stdio.from_server(message(id=1, result={"task": {"taskId": "t1", "status": "working"}}))
        stdio.from_client(message(id=2, method="tasks/result", params={"taskId": "t1"}))
        stdio.from_server(message(id=2, error={"code": -32000, "message": "disk full"}))
    (event,) = events(cli)
    assert (event["status"], event["error"], event["error_type"]) == ("error", "disk full", "-32000")
