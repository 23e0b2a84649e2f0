"""Real servers of FastMCP 2 to 4 and of the `mcp` SDK 1 and 2, real clients, stdio and HTTP; and MXCP 0.2.2.

The environments are made by tools/environment; where one can't be made, its tests are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SITE, Cli, child_environment, run_process, words
from environments import OUTCOMES, SERVERS, outcomes_of, python_with
from forms import CHECKS

TRACE = "0af7651916cd43dd8448eb211c80319c"
VALIDATION = "valid integer"
# type, name, input_json, policy_decision, reason, status, a part of the error, trace_id
EXPECTED = [
    ("tool", "add", '{"a":1,"b":2}', "n/a", None, "success", None, None),
    ("tool", "fail", '{"password":"[REDACTED]"}', "n/a", None, "error", "fail", None),
    ("tool", "refuse", "{}", "deny", "not an admin", "error", "not an admin", None),
    ("tool", "decide", "{}", "warn", "outside of office hours", "success", None, TRACE),
    ("tool", "nosuch", '{"x":1}', "n/a", None, "error", "Unknown tool", None),
    ("tool", "add", '{"a":"one","b":2}', "n/a", None, "error", VALIDATION, None),
    ("resource", "reports://{report_id}", '{"report_id":"7"}', "n/a", None, "success", None, None),
    ("resource", "nosuch://7", None, "n/a", None, "error", "Unknown resource", None),
    ("prompt", "greet", '{"name":"Ada"}', "n/a", None, "success", None, None),
    ("prompt", "nosuch", None, "n/a", None, "error", "Unknown prompt", None),
]
CANCELLED = ("tool", "wait", "{}", "n/a", None, "error", "cancelled", None)
MATRIX = [
    ("fastmcp4", "fastmcp"),
    ("fastmcp4", "sdk"),
    ("fastmcp3", "fastmcp"),
    ("fastmcp2", "fastmcp"),
    ("fastmcp2", "sdk"),
]


def shown(first_line: str) -> str:
    """Return the example of docs/integrations.md that begins with this line."""
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (example,) = re.findall(rf"^```text\n({re.escape(first_line)}\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(example)


def events(cli: Cli, database: str) -> list[dict[str, Any]]:
    shown = cli("log", "--db", database, "--json")
    assert shown.returncode == 0, shown.stderr
    return list(reversed(json.loads(shown.stdout)))


def compare(found: list[dict[str, Any]], expected: list[tuple[Any, ...]]) -> None:
    assert [event["name"] for event in found] == [row[1] for row in expected]
    for event, (kind, name, given, policy, reason, status, error, trace) in zip(found, expected):
        assert (event["type"], event["policy_decision"], event["reason"]) == (kind, policy, reason), event
        assert event["status"] == status, event
        assert (event["input_json"] or given) == (given or event["input_json"]), event
        assert event["trace_id"] == trace, event
        assert (event["error"] is None) if error is None else (error in event["error"]), event
        assert "hunter2" not in json.dumps(event), name


def check_stdio(found: list[dict[str, Any]], client: tuple[str, ...]) -> None:
    assert len({event["session_id"] for event in found}) == 1
    assert all(event["client"].startswith(client) for event in found)
    origins = {(event["caller"], event["user_id"], event["server"]) for event in found}
    assert origins == {("stdio", None, "audited")}


def test_middleware_stdio_real_client_every_call_one_row(tmp_path: Path, cli: Cli) -> None:
    python = python_with("fastmcp")
    server = [python, str(SERVERS / "mcp_server.py"), "sdk", str(tmp_path / "log.duckdb")]
    outcomes = outcomes_of(python, "mcp_client.py", server, tmp_path, WAITING=str(tmp_path / "waiting"))
    assert [outcome[0] for outcome in outcomes[:10]] == OUTCOMES
    found = events(cli, "log.duckdb")
    compare(found, [*EXPECTED, CANCELLED])
    check_stdio(found, ("fastmcp/", "mcp/"))


@pytest.mark.parametrize("made", ["fastmcp3", "fastmcp2"])
def test_middleware_stdio_of_older_servers_every_call_one_row(made: str, tmp_path: Path, cli: Cli) -> None:
    """By a client of our own: importing theirs takes longer than all the calls."""
    trace = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    requests: list[dict[str, Any]] = [
        {"method": "tools/call", "params": {"name": name, "arguments": arguments, **more}}
        for name, arguments, more in (
            ("add", {"a": 1, "b": 2}, {}),
            ("fail", {"password": "hunter2"}, {}),
            ("refuse", {}, {}),
            ("decide", {}, {"_meta": trace}),
            ("nosuch", {"x": 1}, {}),
            ("add", {"a": "one", "b": 2}, {}),
        )
    ]
    requests += [
        {"method": "resources/read", "params": {"uri": f"{uri}://7"}} for uri in ("reports", "nosuch")
    ]
    greet = {"name": "greet", "arguments": {"name": "Ada"}}
    requests += [{"method": "prompts/get", "params": params} for params in (greet, {"name": "nosuch"})]
    server = [python_with(made), str(SERVERS / "mcp_server.py"), "fastmcp", "log.duckdb"]
    answers = exchange(server, tmp_path, requests)
    is_answered = ["error" not in answer and not answer["result"].get("isError") for answer in answers]
    assert is_answered == [outcome == "answered" for outcome in OUTCOMES]
    found = events(cli, "log.duckdb")
    compare(found, EXPECTED)
    check_stdio(found, ("c/1",))


@pytest.mark.parametrize(("made", "kind"), MATRIX)
def test_matrix_every_kind_of_call_has_one_row_that_says_what_it_was(
    made: str, kind: str, tmp_path: Path, cli: Cli
) -> None:
    """Every framework, over memory, HTTP and SSE; what came of each call is a line of the table."""
    done = run_process(
        [python_with(made), "-W", "ignore", str(SERVERS / "matrix.py"), kind, str(tmp_path)],
        FASTMCP_LOG_ENABLED="false",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("\nok ") > 25
    (log,) = tmp_path.glob("*.duckdb")
    for form, check in CHECKS.items():
        told = cli("log", "--db", str(log), "--format", form, "--limit", "1000")
        events = [json.loads(line) for line in told.stdout.splitlines()]
        assert len(events) > 25 and "unfinished" not in str(events)
        check(events)


LOW_LEVEL = """
import asyncio, sys
import mcp.types as types
from mcp.server.lowlevel import Server
from mcp.shared.memory import create_connected_server_and_client_session as connected
from mxcp_audit import AuditLogger

audit = AuditLogger("log.duckdb")
server = Server("low")
audit.instrument(server)  # before the handlers are registered

@server.list_tools()
async def tools():
    return [types.Tool(name="t", inputSchema={"type": "object"})]

@server.call_tool()
async def call(name, arguments):
    return [types.TextContent(type="text", text="done")]

@server.read_resource()
async def read(uri):
    raise LookupError("nothing there")

async def main():
    async with connected(server) as client:
        print((await client.call_tool("t", {"a": 1})).content[0].text)
        try:
            await client.read_resource("x://y")
        except Exception as error:
            print(type(error).__name__)

asyncio.run(main())
audit.shutdown()
"""


def test_instrument_low_level_sdk_1_handlers_registered_later(tmp_path: Path, cli: Cli) -> None:
    done = run_process([python_with("fastmcp2"), "-c", LOW_LEVEL], cwd=tmp_path)
    assert done.stdout.split() == ["done", "McpError"], done.stderr
    found = [(e["type"], e["name"], e["input_json"], e["error"]) for e in events(cli, "log.duckdb")]
    assert found == [
        ("tool", "t", '{"a":1}', None),
        ("resource", "x://y", None, "LookupError: nothing there"),
    ]


def exchange(server: list[str], folder: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say hello to a stdio server, send the requests by hand, and return its answers to them."""
    hello = {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
    messages = [
        {"id": 0, "method": "initialize", "params": hello},
        {"method": "notifications/initialized"},
        *({"id": n, "method": "tools/call", **request} for n, request in enumerate(requests, 1)),
    ]
    answers: dict[int, dict[str, Any]] = {}
    running = subprocess.Popen(
        server, cwd=folder, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert running.stdin and running.stdout
    for message in messages:
        running.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        running.stdin.flush()
        while "id" in message and message["id"] not in answers:
            answer = json.loads(running.stdout.readline())
            answers[answer.get("id")] = answer
    running.communicate(timeout=60)
    return [answers[n] for n in range(1, len(requests) + 1)]


def test_instrument_example_of_the_docs_audits(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "server.py").write_text(shown("# with mcp 1"))
    request = {"params": {"name": "get_user", "arguments": {"user_id": 7}}}
    exchange([python_with("fastmcp2"), "server.py"], tmp_path, [request])
    (event,) = events(cli, "logs-default.duckdb")
    assert (event["name"], event["input_json"]) == ("get_user", '{"user_id":7}')


@pytest.mark.parametrize("kind", ["fastmcp", "sdk"])
def test_middleware_malformed_call_recorded_once(kind: str, tmp_path: Path, cli: Cli) -> None:
    """What no client of good faith sends; SDK 1 answers such a thing before anybody can see it."""
    answers = exchange(
        [python_with("fastmcp"), str(SERVERS / "mcp_server.py"), kind, "log.duckdb"],
        tmp_path,
        [{"params": {"arguments": {"a": 1}}}, {"params": {"name": 7}}]
        + [{"params": {"name": "add", "arguments": [1]}}],
    )
    assert [answer["error"]["code"] for answer in answers] == [-32602] * 3
    found = [(e["name"], e["input_json"], e["status"], e["client"]) for e in events(cli, "log.duckdb")]
    assert found == [
        ("", '{"a":1}', "error", "c/1"),
        ("7", None, "error", "c/1"),
        ("add", "[1]", "error", "c/1"),
    ]


def test_instrument_something_else_refused_with_remedy(tmp_path: Path) -> None:
    from mxcp_audit import AuditError, AuditLogger

    with pytest.raises(AuditError, match="decorate the tools"):
        AuditLogger(tmp_path / "log.duckdb").instrument(object())


# --- MXCP itself

USER_CONFIG = "mxcp: 1\nprojects:\n  shop:\n    profiles:\n      default: {}\n"
TOOL = """\
mxcp: 1
tool:
  name: greet
  description: Greet somebody
  parameters:
    - name: who
      type: string
      description: whom
    - name: pin
      type: string
      description: secret
      sensitive: true
  return:
    type: string
  source:
    code: SELECT 'Hello ' || $who || repeat('', length($pin))
"""
MXCP_CLIENT = """
import asyncio, os, sys
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main():
    server = StdioServerParameters(command=sys.executable, args=sys.argv[1:], env=dict(os.environ))
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        await session.initialize()
        for who in ("Ada", "Grace"):
            result = await session.call_tool("greet", {"who": who, "pin": "1234"})
            print(result.content[0].text)

asyncio.run(main())
"""


def serve_with_mxcp(folder: Path, whose: str) -> str:
    """Let MXCP 0.2.2 serve a tool to a real client and return what the client saw."""
    (folder / "mxcp-site.yml").write_text(SITE)
    (folder / "config.yml").write_text(USER_CONFIG)
    (folder / "tools").mkdir(exist_ok=True)
    (folder / "tools" / "greet.yml").write_text(TOOL)
    (folder / "audit").mkdir(exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    launcher = shown("# with MXCP 0.1 to 0.3")
    if whose == "theirs":
        launcher = launcher.replace("mxcp.server.mcp.AuditLogger = mxcp_audit.AuditLogger\n", "")
    (folder / "launcher.py").write_text(launcher)
    done = run_process(
        [python_with("mxcp022"), "-c", MXCP_CLIENT, "launcher.py", "serve", "--transport", "stdio"],
        cwd=folder,
        MXCP_CONFIG=str(folder / "config.yml"),
        MXCP_DISABLE_ANALYTICS="1",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_logger_log_path_of_mxcp_becomes_a_database_beside_it(tmp_path: Path) -> None:
    from mxcp_audit import AuditLogger, ConfigError

    audit = AuditLogger(log_path=tmp_path / "audit" / "logs-default.jsonl", enabled=True)
    audit.log_event(
        caller="stdio",
        event_type="tool",
        name="t",
        input_params={},
        duration_ms=1,
        endpoint_def={"name": "t"},
    )
    audit.shutdown()
    assert audit.config.path == str(tmp_path / "audit" / "logs-default.duckdb")
    assert [path.name for path in (tmp_path / "audit").glob("*.*")].count("logs-default.duckdb") == 1
    assert AuditLogger(log_path=tmp_path / "x.duckdb").config.path == str(tmp_path / "x.duckdb")
    with pytest.raises(ConfigError, match="name the database file"):
        AuditLogger()


def test_mxcp_logger_replaced_by_ours_call_in_log(tmp_path: Path, cli: Cli) -> None:
    assert "Hello Ada" in serve_with_mxcp(tmp_path, "ours")
    found = events(cli, str(tmp_path / "audit" / "logs-default.duckdb"))
    assert [(e["caller"], e["type"], e["name"], e["status"]) for e in found] == [
        ("stdio", "tool", "greet", "success")
    ] * 2
    assert [json.loads(e["input_json"]) for e in found] == [
        {"who": "Ada", "pin": "[REDACTED]"},
        {"who": "Grace", "pin": "[REDACTED]"},
    ]
    assert not list((tmp_path / "audit").glob("*.jsonl"))


def test_mxcp_own_log_imports_completely(tmp_path: Path, cli: Cli) -> None:
    assert "Hello Ada" in serve_with_mxcp(tmp_path, "theirs")
    (theirs,) = (tmp_path / "audit").glob("*.jsonl")
    done = cli("import", str(theirs))  # into the database that mxcp-site.yml names
    assert (done.returncode, "2 events imported" in done.stderr) == (0, True), done.stderr
    found = list(reversed(json.loads(cli("log", "--json").stdout)))
    for event, line in zip(found, theirs.read_text().splitlines(), strict=True):
        original = json.loads(line)
        assert event["timestamp"] == original["timestamp"].replace("+00:00", "Z")
        assert json.loads(event["input_json"]) == json.loads(original["input_json"])
        for column in words("caller type name duration_ms policy_decision reason status error"):
            assert event[column] == original[column]
