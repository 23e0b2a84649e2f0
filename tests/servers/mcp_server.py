"""A real MCP server that is audited: `mcp_server.py fastmcp|sdk DATABASE [PORT]`; stdio without a port.

It runs in environments with FastMCP 2 to 4 and the `mcp` SDK 1 and 2. Over HTTP it wants the token
"letmein", which is alice's.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import mxcp_audit

kind, database, *ports = sys.argv[1:]
audit = mxcp_audit.AuditLogger(database)
USER = {"client_id": "the-app", "scopes": [], "sub": "alice"}


def fastmcp_server() -> Any:
    from fastmcp import FastMCP
    from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

    auth = StaticTokenVerifier({"letmein": USER}) if ports else None
    server = FastMCP("audited", auth=auth)
    server.add_middleware(audit.middleware())
    return server


def sdk_server() -> Any:
    from mcp.server.auth.provider import AccessToken
    from mcp.server.auth.settings import AuthSettings

    class Verifier:
        async def verify_token(self, token: str) -> AccessToken | None:
            if token != "letmein":
                return None
            known = AccessToken.model_fields
            more = {name: value for name, value in {"subject": "alice"}.items() if name in known}
            return AccessToken(token=token, client_id="the-app", scopes=[], **more)

    url = f"http://127.0.0.1:{ports[0]}" if ports else ""
    auth = (
        {
            "auth": AuthSettings(issuer_url=url, resource_server_url=url, required_scopes=[]),
            "token_verifier": Verifier(),
        }
        if ports
        else {}
    )
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        from mcp.server.fastmcp import FastMCP

        server = FastMCP("audited", port=int(ports[0]) if ports else 8000, **auth)
        audit.instrument(server)
    else:
        server = MCPServer("audited", **auth)
        server.middleware.append(audit.middleware())
    return server


server = fastmcp_server() if kind == "fastmcp" else sdk_server()


@server.tool()
def add(a: int, b: int) -> int:
    return a + b


@server.tool()
async def fail(password: str) -> str:
    raise ValueError("out of order")


@server.tool()
@audit.tool() if kind == "sdk" else lambda function: function  # the SDK swallows what a tool raises
def refuse() -> str:
    raise PermissionError("not an admin")


@server.tool()
async def decide() -> str:
    audit.policy("warn", "outside of office hours")
    return "done"


@server.tool()
async def wait() -> str:
    Path(os.environ["WAITING"]).touch()
    await asyncio.sleep(60)
    return "too late"


@server.resource("reports://{report_id}")
@audit.resource("reports://{report_id}")
def report(report_id: str) -> str:
    return f"report {report_id}"


@server.prompt()
def greet(name: str) -> str:
    return f"Say hello to {name}"


if not ports:
    server.run(transport="stdio")
elif kind == "fastmcp":
    server.run(transport="http", host="127.0.0.1", port=int(ports[0]), show_banner=False)
elif hasattr(server, "settings") and hasattr(server.settings, "port"):
    server.run(transport="streamable-http")
else:
    server.run(transport="streamable-http", host="127.0.0.1", port=int(ports[0]))
