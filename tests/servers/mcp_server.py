"""A real MCP server that is audited: `mcp_server.py fastmcp|sdk DATABASE`, over stdio.

It runs in environments with FastMCP 2 to 4 and the `mcp` SDK 1 and 2.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import mxcp_audit

kind, database = sys.argv[1:]
audit = mxcp_audit.AuditLogger(database)


def fastmcp_server() -> Any:
    from fastmcp import FastMCP

    server = FastMCP("audited")
    server.add_middleware(audit.middleware())
    return server


def sdk_server() -> Any:
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        from mcp.server.fastmcp import FastMCP

        server = FastMCP("audited")
        audit.instrument(server)
    else:
        server = MCPServer("audited")
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


server.run(transport="stdio")
