"""Every kind of call against one framework: `matrix.py fastmcp|sdk FOLDER`, one line a case.

Server and client run in this process, over memory, stdio-like streams and HTTP. After each case, what the
journal gained is compared with what the case expects: so many rows, and of each the columns that are named.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mxcp_audit

try:  # annotations are looked up here
    from fastmcp import Context
except ImportError:
    Context = None

kind, folder = sys.argv[1], Path(sys.argv[2])
audit = mxcp_audit.AuditLogger(
    folder / "log.duckdb", flush_interval=3600, redact=["secretive.note"], strict=True, strict_timeout=60
)
logging.disable(logging.CRITICAL)  # the frameworks draw coloured tracebacks, a second each
failures: list[str] = []
seen = 0
SAME: dict[str, Any] = {"policy_decision": "n/a", "status": "success", "error": None, "error_type": None}


def new_events() -> list[dict[str, Any]]:
    global seen
    audit.wait_written(10)
    lines = [
        json.loads(line)
        for path in sorted((folder / "log.duckdb.journal").glob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
    fresh, seen = lines[seen:], len(lines)
    return fresh


async def compare(label: str, expected: list[dict[str, Any]]) -> None:
    deadline = time.monotonic() + 5
    found = new_events()
    while len(found) < len(expected) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        found += new_events()
    problems = [] if len(found) == len(expected) else [f"{len(found)} rows, not {len(expected)}"]
    rows = sorted(found, key=lambda e: (e["type"], e["name"], e["status"]))
    for row, wanted in zip(rows, sorted(expected, key=lambda e: (e["type"], e["name"], e["status"]))):
        for column, value in {**SAME, **wanted}.items():
            got = row.get(column)
            good = value(got) if callable(value) else got == value
            if not good:
                shown = value if not callable(value) else inspect.getsource(value).strip()[:60]
                problems.append(f"{column}={got!r}, not {shown!r}")
        for column in ("server", "client", "request_id") if row["caller"] != "cli" else ():
            if row.get(column) is None and wanted.get(column, 0) is not None:
                problems.append(f"no {column}")
    failures.extend(f"{label}: {problem}" for problem in problems)
    what = "; ".join(
        f"{r['type']} {r['name']} {r['status']} {r['policy_decision']} {r['duration_ms']} ms "
        f"{r['caller']} {r.get('client')} {r.get('server')} #{r.get('request_id')}"
        for r in found
    )
    print(
        f"{'wrong' if problems else 'ok':6}{label:28}{what}{' ← ' if problems else ''}{', '.join(problems)}"
    )


async def quietly(awaitable: Awaitable[Any]) -> Any:
    """Return a result, or the exception that came instead."""
    try:
        return await awaitable
    except Exception as error:
        return error


def has(text: str) -> Callable[[Any], bool]:
    return lambda got: isinstance(got, str) and text in got


def row(name: str, event_type: str = "tool", **more: Any) -> dict[str, Any]:
    return {"type": event_type, "name": name, "status": "success", **more}


def failed(name: str, text: str, error_type: Any = "ValueError", **more: Any) -> dict[str, Any]:
    return {**row(name), "status": "error", "error": has(text), "error_type": error_type, **more}


def denied(name: str, reason: Any, **more: Any) -> dict[str, Any]:
    return failed(name, "", lambda got: got is not None, policy_decision="deny", reason=reason, **more)


class Token:
    def __repr__(self) -> str:
        return "hunter2"


class Awaitable_:
    def __await__(self) -> Any:
        yield from asyncio.sleep(0.03).__await__()
        return "awaited"


def context_has(**wanted: Any) -> Callable[[Any], bool]:
    return lambda got: (
        got is not None and all(json.loads(got).get(k.replace("__", ".")) == v for k, v in wanted.items())
    )


def add_functions(server: Any) -> None:
    """Add what every framework has: tools of all kinds, a resource, a prompt."""

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    @server.tool()
    async def fail(password: str) -> str:
        raise ValueError("out of order")

    @server.tool()
    @audit.tool()
    def decorated_fail(a: int) -> str:
        raise ValueError("out of order")

    @server.tool()
    @audit.tool()
    def refuse() -> str:
        raise PermissionError("not an admin")

    @server.tool(name="fetch-user")
    @audit.tool()
    def get_user(user_id: int) -> str:
        return helper(user_id)

    @audit.tool()
    def helper(user_id: int) -> str:
        return f"user {user_id}"

    @server.tool()
    def undecorated(user_id: int) -> str:
        return helper(user_id)

    @server.tool()
    async def threaded(user_id: int) -> str:
        return await asyncio.to_thread(helper, user_id)

    @server.tool()
    @audit.tool()
    async def asynchronous(a: int) -> str:
        await asyncio.sleep(0.03)
        return "x" * a

    @server.tool()
    def decide() -> str:
        audit.policy("warn", "late")
        return "done"

    @server.tool()
    async def wait() -> str:
        (folder / "waiting").touch()
        await asyncio.sleep(60)
        return "too late"

    @server.tool()
    def secretive(note: str) -> str:
        return "kept"

    @server.resource("reports://{report_id}")
    @audit.resource("reports://{report_id}")
    def report(report_id: str) -> str:
        return f"report {report_id}"

    @server.resource("plain://{report_id}")
    def plain(report_id: str) -> str:
        return f"report {report_id}"

    @server.prompt()
    def greet(name: str) -> str:
        return f"Say hello to {name}"


async def common_calls(client: Any, way: str, sdk: bool, origin: dict[str, Any]) -> None:
    """The calls that every framework and transport answers alike."""
    error_type: Any = (lambda got: got is not None) if sdk else "ValueError"
    for label, name, arguments, *expected in [
        (
            "success",
            "add",
            {"a": 1, "b": 2},
            row("add", result_bytes=lambda n: 20 < n < 400, context=context_has(mcp__result__items=1)),
        ),
        (
            "failure",
            "fail",
            {"password": "hunter2"},
            failed("fail", "", error_type, input_json='{"password":"[REDACTED]"}'),
        ),
        ("decorated failure", "decorated_fail", {"a": 1}, failed("decorated_fail", "out of order")),
        ("denial", "refuse", {}, denied("refuse", "not an admin")),
        ("other name, helper", "fetch-user", {"user_id": 7}, row("fetch-user"), row("helper")),
        ("undecorated, helper", "undecorated", {"user_id": 7}, row("undecorated"), row("helper")),
        ("helper in a thread", "threaded", {"user_id": 7}, row("threaded"), row("helper")),
        ("asynchronous", "asynchronous", {"a": 3}, row("asynchronous", duration_ms=lambda ms: ms >= 25)),
        ("policy", "decide", {}, row("decide", policy_decision="warn", reason="late")),
        (
            "rule of redaction",
            "secretive",
            {"note": "mine"},
            row("secretive", input_json='{"note":"[REDACTED]"}'),
        ),
        ("unknown tool", "nosuch", {"x": 1}, failed("nosuch", "", lambda got: got is not None)),
        ("wrong arguments", "add", {"a": "one", "b": 2}, failed("add", "", lambda got: got is not None)),
    ]:
        await quietly(client.call_tool(name, arguments))
        helpers = [{**origin, **e} for e in expected[1:]]
        await compare(f"{way}: {label}", [{**origin, **expected[0]}, *helpers])
    for label, awaitable, expected in [
        (
            "resource",
            client.read_resource("reports://7"),
            row("reports://{report_id}", "resource", input_json='{"report_id":"7"}'),
        ),
        (
            "plain resource",
            client.read_resource("plain://7"),
            row("plain://7", "resource", context=context_has(mcp__result__items=1)),
        ),
        (
            "unknown resource",
            client.read_resource("nosuch://7"),
            failed("nosuch://7", "", lambda got: got is not None, type="resource"),
        ),
        ("prompt", client.get_prompt("greet", {"name": "Ada"}), row("greet", "prompt")),
        (
            "unknown prompt",
            client.get_prompt("nosuch", {}),
            failed("nosuch", "", lambda got: got is not None, type="prompt"),
        ),
    ]:
        await quietly(awaitable)
        await compare(f"{way}: {label}", [{**origin, **expected}])


async def cancelled(client: Any) -> None:
    (folder / "waiting").unlink(missing_ok=True)
    waiting = asyncio.ensure_future(client.call_tool("wait", {}))
    while not (folder / "waiting").exists():
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """Serve an ASGI app on a port of its own."""
    import uvicorn

    http = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    task = asyncio.ensure_future(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        http.should_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(task, 5)


async def functions() -> None:
    """What needs no framework: functions that hand over what is awaited later."""

    async def later(fails: bool) -> str:
        await asyncio.sleep(0.03)
        if fails:
            raise ValueError("later")
        return "done"

    class Callable_:
        async def __call__(self, fails: bool) -> str:
            return await later(fails)

    def future(fails: bool) -> Any:
        return asyncio.ensure_future(later(fails))

    def awaitable(fails: bool) -> Any:
        return Awaitable_()

    slow = {"duration_ms": lambda ms: ms >= 25}
    for label, function in [("coroutine", later), ("callable object", Callable_()), ("future", future)]:
        called: Any = audit.tool("f")(
            (lambda made: lambda fails: made(fails))(function) if label == "coroutine" else function
        )
        await quietly(called(fails=False))
        await asyncio.sleep(0)
        await compare(f"function: {label}", [row("f", **slow)])
        await quietly(called(fails=True))
        await asyncio.sleep(0)
        await compare(f"function: {label} fails", [failed("f", "later", **slow)])
    await audit.tool("f")(awaitable)(fails=False)
    await compare("function: awaitable", [row("f", **slow)])


def refused_order(server: Any) -> None:
    def late() -> str:
        return ""

    try:
        audit.tool()(server.tool()(late))
    except mxcp_audit.EventError as error:
        assert "below" in str(error)
    else:
        failures.append("wrong order of decorators: accepted")


# --- FastMCP


async def fastmcp_cases() -> None:
    import fastmcp
    from fastmcp import Client, FastMCP
    from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

    major = int(version("fastmcp").split(".")[0])
    as_client: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        from mcp_types import Implementation

        as_client = {"client_info": Implementation(name="matrix", version="1.0")}
    if not as_client:
        from mcp.types import Implementation

        as_client = {"client_info": Implementation(name="matrix", version="1.0")}
    server: Any = FastMCP("shop")
    middleware = audit.middleware()
    server.add_middleware(middleware)
    add_functions(server)
    refused_order(server)
    child: Any = FastMCP("stock")
    child.add_middleware(audit.middleware())

    @child.tool()
    @audit.tool()
    def count(item: str) -> int:
        return 3

    server.mount(child, **({"namespace": "stock"} if major > 2 else {"prefix": "stock"}))

    @server.tool()
    async def composed(ctx: Context) -> str:
        await ctx.fastmcp.call_tool("add", {"a": 1, "b": 1}) if major > 2 else None
        return "both"

    def secret() -> Token:
        return Token()

    from fastmcp.dependencies import Depends

    @server.tool()
    @audit.tool()
    def injected(a: int, ctx: Context, token: Token = Depends(secret)) -> str:  # noqa: B008
        return "ok"

    who: dict[str, Any] = {"server": "shop", "client": "matrix/1.0"}
    async with Client(server, **as_client) as client:
        quiet = Quiet(client)
        await common_calls(quiet, "memory", False, {**who, "caller": "stdio"})
        await quiet.call_tool("stock_count", {"item": "x"})
        await compare("memory: mounted", [row("stock_count", **who)])
        await quiet.call_tool("injected", {"a": 1})
        await compare("memory: injected", [row("injected", input_json='{"a":1}', **who)])
        if major > 2:
            await quiet.call_tool("composed", {})
            await compare("memory: composed", [row("composed", **who), row("add", **who)])
        await cancelled(quiet)
    await compare("memory: cancelled", [failed("wait", "cancelled", "CancelledError", **who)])
    server.add_middleware(middleware)
    async with Client(server, **as_client) as client:
        await client.call_tool("add", {"a": 1, "b": 1})
        await compare("memory: instrumented twice", [row("add", **who)])
    await tried_again(as_client)
    await validated(as_client, major)
    await proxied(major, as_client)
    await traced(as_client)
    if major > 2:
        await transformed(as_client)
        await refusals(as_client)
    if major > 3:
        await resumed(as_client)
    for instrumented in (False, True) if major == 2 else (False,):
        await tasks(as_client, major, instrumented)
    auth = StaticTokenVerifier({"letmein": {"client_id": "the-app", "scopes": [], "sub": "alice"}})
    for way, options in (
        ("http", {}),
        ("stateless", {"stateless_http": True}),
        ("sse", {"transport": "sse"}),
    ):
        server = FastMCP("shop", auth=auth)
        server.add_middleware(audit.middleware())
        add_functions(server)
        async with serving(server.http_app(**options)) as url:
            from fastmcp.client.transports import SSETransport, StreamableHttpTransport

            headers = {
                "Authorization": "Bearer letmein",
                "X-Forwarded-For": "203.0.113.9",
                "User-Agent": "ua/7",
            }
            transport: Any = (
                SSETransport(url + "/sse", headers=headers)
                if way == "sse"
                else StreamableHttpTransport(url + "/mcp", headers=headers)
            )
            known = {
                "address": "127.0.0.1",
                "user_id": "alice",
                "agent": "the-app",
                "caller": "http",
                "server": "shop",
            }
            known["context"] = context_has(user_agent__original="ua/7")
            if way != "stateless" or major > 3:
                known["client"] = "matrix/1.0"
            else:
                known["client"] = None
            async with Client(transport, **as_client) as client:
                await http_calls(Quiet(client), way, known)
    del fastmcp


async def http_calls(client: Any, way: str, known: dict[str, Any]) -> None:
    await quietly(client.call_tool("add", {"a": 1, "b": 2}))
    await compare(f"{way}: success", [row("add", **known)])
    await quietly(client.call_tool("decorated_fail", {"a": 1}))
    await compare(f"{way}: failure", [failed("decorated_fail", "out of order", **known)])
    await quietly(client.call_tool("refuse", {}))
    await compare(f"{way}: denial", [denied("refuse", "not an admin", **known)])


class Quiet:
    """A client of FastMCP whose calls raise nothing for a result that is an error."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def call_tool(self, name: str, arguments: dict[str, Any], **more: Any) -> Any:
        return self._client.call_tool(name, arguments, raise_on_error=False, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


async def tried_again(as_client: dict[str, Any]) -> None:
    """A middleware that retries, ours and a decorator inside of it; the server masks errors."""
    from fastmcp import Client, FastMCP
    from fastmcp.server.middleware.error_handling import RetryMiddleware

    server: Any = FastMCP("shop", mask_error_details=True)
    server.add_middleware(audit.middleware())
    server.add_middleware(RetryMiddleware(max_retries=2, base_delay=0.001, retry_exceptions=(Exception,)))
    server.add_middleware(audit.middleware())
    attempts = 0

    @server.tool()
    @audit.tool()
    def flaky(a: int) -> str:
        nonlocal attempts
        attempts += 1
        if attempts < a:
            raise ConnectionError(f"refused {attempts}")
        return "at last"

    @server.tool()
    def masked() -> str:
        raise ValueError("out of order")

    async with Client(server, **as_client) as client:
        await client.call_tool("flaky", {"a": 3})
        await compare("tried again: success", [row("flaky")])
        await client.call_tool("masked", {}, raise_on_error=False)
        await compare("tried again: failure", [failed("masked", "ValueError: out of order")])


async def validated(as_client: dict[str, Any], major: int) -> None:
    """Below FastMCP 2 and 3 the SDK refuses arguments and results; `instrument` sees that, too."""
    from fastmcp import Client, FastMCP

    server: Any = FastMCP("shop", strict_input_validation=True)
    audit.instrument(server)

    @server.tool()
    def add(a: int) -> int:
        return a

    @server.tool(output_schema={"type": "object", "properties": {"n": {"type": "integer"}}})
    def misfit() -> dict[str, str]:
        return {"n": "none"}

    @server.tool()
    def refuse() -> str:
        raise PermissionError("not an admin")

    async with Client(server, **as_client) as client:
        await client.call_tool("add", {"a": "one"}, raise_on_error=False)
        await compare("validated: arguments", [failed("add", "valid", lambda got: got is not None)])
        await quietly(client.call_tool("misfit", {}, raise_on_error=False))
        wrong = failed("misfit", "Output validation", "tool_error")
        await compare("validated: result", [wrong if major < 4 else row("misfit")])
        await client.call_tool("refuse", {}, raise_on_error=False)
        await compare(
            "validated: denial", [{**denied("refuse", "not an admin"), "error_type": "PermissionError"}]
        )


async def proxied(major: int, as_client: dict[str, Any]) -> None:
    from fastmcp import Client, FastMCP

    backend: Any = FastMCP("backend")
    add_functions(backend)
    if major > 2:
        from fastmcp.server import create_proxy

        proxy: Any = create_proxy(backend, name="proxy")
    else:
        proxy = FastMCP.as_proxy(backend, name="proxy")
    proxy.add_middleware(audit.middleware())
    async with Client(proxy, **as_client) as client:
        await client.call_tool("add", {"a": 1, "b": 2})
        await compare("proxied: success", [row("add", server="proxy", client="matrix/1.0")])
        await client.call_tool("fail", {"password": "x"}, raise_on_error=False)
        await compare(
            "proxied: failure", [failed("fail", "out of order", lambda got: got is not None, server="proxy")]
        )


async def transformed(as_client: dict[str, Any]) -> None:
    from fastmcp import Client, FastMCP
    from fastmcp.server.transforms import ToolTransform
    from fastmcp.server.transforms.search import RegexSearchTransform
    from fastmcp.tools.tool_transform import ArgTransformConfig, ToolTransformConfig

    child: Any = FastMCP("stock")
    child.add_middleware(audit.middleware())

    @child.tool()
    def count(item: str) -> int:
        return 3

    server: Any = FastMCP("shop")
    server.add_middleware(audit.middleware())
    server.mount(child)
    config = ToolTransformConfig(name="how_many", arguments={"item": ArgTransformConfig(name="what")})
    server.add_transform(ToolTransform({"count": config}))
    async with Client(server, **as_client) as client:
        await client.call_tool("how_many", {"what": "x"})
        await compare("transformed: success", [row("how_many", input_json='{"what":"x"}', server="shop")])
    server = FastMCP("shop")
    server.add_middleware(audit.middleware())
    add_functions(server)
    server.add_transform(RegexSearchTransform())
    async with Client(server, **as_client) as client:
        await client.call_tool("call_tool", {"name": "secretive", "arguments": {"note": "mine"}})
        via = context_has(mcp__via="call_tool")
        await compare(
            "meta tool: success", [row("secretive", input_json='{"note":"[REDACTED]"}', context=via)]
        )
        await client.call_tool(
            "call_tool", {"name": "decorated_fail", "arguments": {"a": 1}}, raise_on_error=False
        )
        await compare("meta tool: failure", [failed("decorated_fail", "out of order")])
        await client.call_tool("call_tool", {"name": "nosuch", "arguments": {"a": 1}}, raise_on_error=False)
        name = "call_tool" if version("fastmcp")[0] > "3" else "nosuch"
        await compare("meta tool: unknown", [failed(name, "", lambda got: got is not None)])


async def traced(as_client: dict[str, Any]) -> None:
    """OpenTelemetry in the server alone; FastMCP has spans of its own from version 3 on."""
    from fastmcp import Client, FastMCP

    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        return
    trace.set_tracer_provider(TracerProvider())
    server: Any = FastMCP("shop")
    server.add_middleware(audit.middleware())
    add_functions(server)
    async with Client(server, **as_client) as client:
        await client.call_tool("add", {"a": 1, "b": 1})
        await compare("traced: success", [row("add", trace_id=lambda got: len(got or "") == 32)])


async def refusals(as_client: dict[str, Any]) -> None:
    from fastmcp import Client, FastMCP
    from fastmcp.client.transports import StreamableHttpTransport
    from fastmcp.server.auth import require_scopes
    from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

    auth = StaticTokenVerifier({"letmein": {"client_id": "the-app", "scopes": [], "sub": "alice"}})
    server: Any = FastMCP("shop", auth=auth)
    server.add_middleware(audit.middleware())

    @server.tool(auth=require_scopes("admin"))
    def wipe() -> str:
        return "gone"

    @server.resource("secret://{name}", auth=require_scopes("admin"))
    def secret(name: str) -> str:
        return "gone"

    @server.prompt(auth=require_scopes("admin"))
    def plan() -> str:
        return "gone"

    async with serving(server.http_app()) as url:
        transport = StreamableHttpTransport(url + "/mcp", headers={"Authorization": "Bearer letmein"})
        async with Client(transport, **as_client) as client:
            who = {"user_id": "alice", "agent": "the-app"}
            await quietly(client.call_tool("wipe", {}, raise_on_error=False))
            await compare("refusal: tool", [denied("wipe", has("auth"), **who)])
            await quietly(client.read_resource("secret://x"))
            await compare("refusal: resource", [denied("secret://x", has("auth"), type="resource", **who)])
            await quietly(client.get_prompt("plan", {}))
            await compare("refusal: prompt", [denied("plan", has("auth"), type="prompt", **who)])
            await quietly(client.call_tool("nosuch", {}, raise_on_error=False))
            await compare("refusal: unknown", [failed("nosuch", "", lambda got: got is not None)])


async def tasks(as_client: dict[str, Any], major: int, instrumented: bool) -> None:
    from fastmcp import Client, FastMCP

    if not __import__("importlib.util").util.find_spec("docket"):
        return
    server: Any = FastMCP("shop")
    audit.instrument(server) if instrumented else server.add_middleware(audit.middleware())
    unknown = major == 2 and not instrumented
    if major > 3:
        from fastmcp_tasks import TasksExtension

        with contextlib.suppress(Exception):
            server.add_extension(TasksExtension())

    @server.tool(task=True)
    async def slow(a: int) -> str:
        await asyncio.sleep(0.1)
        if a < 0:
            raise ValueError("below zero")
        return "done"

    async with Client(server, **as_client) as client:
        for a, expected in (
            (1, row("slow", duration_ms=lambda ms: ms >= 90, input_json='{"a":1}')),
            (
                -1,
                failed(
                    "slow",
                    "below zero",
                    "tool_error" if major > 3 else "ValueError",
                    duration_ms=lambda ms: ms >= 90,
                ),
            ),
        ):
            if major > 3:
                from fastmcp_tasks.client import call_tool_task  # type: ignore[import-not-found]

                task = await call_tool_task(client, "slow", {"a": a})
            else:
                task = await client.call_tool("slow", {"a": a}, task=True)
            await quietly(asyncio.wait_for(task.result(), 20))
            who = {} if unknown else {"server": "shop", "client": "matrix/1.0"}
            if unknown:
                expected = {**expected, "caller": "cli"}
            await compare(f"task: {'success' if a > 0 else 'failure'}", [{**expected, **who}])
        await client.call_tool("slow", {"a": 2})
        await compare("task: called as no task", [row("slow", duration_ms=lambda ms: ms >= 90)])


async def resumed(as_client: dict[str, Any]) -> None:
    from fastmcp import Client, FastMCP
    from mcp_types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult

    server: Any = FastMCP("shop")
    server.add_middleware(audit.middleware())

    @server.tool()
    async def delete_user(user_id: int, ctx: Context) -> Any:
        if not ctx.input_responses:
            await asyncio.sleep(0.03)
            schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}}
            asked = ElicitRequest(params=ElicitRequestFormParams(message="sure?", requested_schema=schema))
            return InputRequiredResult(input_requests={"sure": asked}, request_state="step 1")
        await asyncio.sleep(0.03)
        return "gone"

    async def answer(*args: Any) -> Any:
        return ElicitResult(action="accept", content={"sure": True})

    async def refuse(*args: Any) -> Any:
        raise ValueError("nobody is there")

    async with Client(server, **as_client, elicitation_handler=answer) as client:
        print(await quietly(client.call_tool("delete_user", {"user_id": 7})))
        await compare("resumed: success", [row("delete_user", duration_ms=lambda ms: ms >= 55)])
    async with Client(server, **as_client, elicitation_handler=refuse) as client:
        await quietly(client.call_tool("delete_user", {"user_id": 8}))
        await compare("resumed: never, as yet", [])
        audit.unfinished.close()
        await compare("resumed: never", [failed("delete_user", "not resumed: input required", None)])


# --- the mcp SDK


async def sdk_cases() -> None:
    major = int(version("mcp").split(".")[0])
    who: dict[str, Any] = {"server": "shop", "client": "matrix/1.0"}
    if major == 1:
        from mcp.server.fastmcp import FastMCP as MCPServer
        from mcp.shared.memory import create_connected_server_and_client_session
        from mcp.types import Implementation

        server: Any = MCPServer("shop")
        audit.instrument(server)
        add_functions(server)
        refused_order(server)
        info = Implementation(name="matrix", version="1.0")
        async with create_connected_server_and_client_session(server._mcp_server, client_info=info) as client:
            await common_calls(client, "memory", True, {**who, "caller": "stdio"})
        audit.instrument(server)
        async with create_connected_server_and_client_session(server._mcp_server, client_info=info) as client:
            await client.call_tool("add", {"a": 1, "b": 2})
            await compare("memory: instrumented twice", [row("add", **who)])
        await sdk1_http(info)
    else:
        from mcp.client import Client
        from mcp.server.mcpserver import MCPServer as MCPServer2
        from mcp_types import Implementation as Implementation2

        server = MCPServer2("shop")
        server.middleware.append(audit.middleware())
        add_functions(server)
        refused_order(server)
        info = Implementation2(name="matrix", version="1.0")
        async with Client(server, client_info=info) as client:
            await common_calls(client, "memory", True, {**who, "caller": "stdio"})
            await cancelled(client)
            await compare("memory: cancelled", [failed("wait", "cancelled", "CancelledError", **who)])
        server.middleware.append(audit.middleware())
        async with Client(server, client_info=info) as client:
            await client.call_tool("add", {"a": 1, "b": 2})
            await compare("memory: instrumented twice", [row("add", **who)])
        for way, options in (("http", {}), ("stateless", {"stateless_http": True}), ("sse", None)):
            server = MCPServer2("shop")
            server.middleware.append(audit.middleware())
            add_functions(server)
            app = server.sse_app() if options is None else server.streamable_http_app(**options)
            async with serving(app) as url:
                known = {"address": "127.0.0.1", "caller": "http", "server": "shop", "client": "matrix/1.0"}
                if options is None:
                    from mcp import ClientSession
                    from mcp.client.sse import sse_client

                    async with (
                        sse_client(url + "/sse") as streams,
                        ClientSession(*streams, client_info=info) as session,
                    ):
                        await session.initialize()
                        await http_calls(session, way, known)
                else:
                    async with Client(url + "/mcp", client_info=info) as client:
                        await http_calls(client, way, known)


async def sdk1_http(info: Any) -> None:
    from mcp import ClientSession
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamablehttp_client
    from mcp.server.fastmcp import FastMCP as MCPServer

    for way in ("http", "stateless", "sse"):
        server: Any = MCPServer("shop", stateless_http=way == "stateless")
        audit.instrument(server)
        add_functions(server)
        app = server.sse_app() if way == "sse" else server.streamable_http_app()
        async with serving(app) as url:
            opened = sse_client(url + "/sse") if way == "sse" else streamablehttp_client(url + "/mcp")
            async with opened as streams, ClientSession(streams[0], streams[1], client_info=info) as session:
                await session.initialize()
                known = {"address": "127.0.0.1", "caller": "http", "server": "shop"}
                known["client"] = None if way == "stateless" else "matrix/1.0"
                await http_calls(session, way, known)


async def main() -> None:
    await (fastmcp_cases() if kind == "fastmcp" else sdk_cases())
    await functions()


threading.excepthook = lambda args: failures.append(f"a thread: {args.exc_value!r}")
asyncio.run(main())
audit.shutdown()
print("\n".join(["", *failures, f"{len(failures)} wrong"]))
sys.exit(1 if failures else 0)
