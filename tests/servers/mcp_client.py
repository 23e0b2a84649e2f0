"""A real MCP client: `mcp_client.py COMMAND …`, over stdio.

It does everything a server of ours executes, right and wrong, and prints what came of each, as JSON.
With the environment variable WAITING, a path, it also cancels a call once the server made that file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from fastmcp import Client
from fastmcp.client.transports import StdioTransport

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def outcome(awaitable: Any) -> list[Any]:
    try:
        result = await awaitable
    except Exception as error:
        return ["raised", type(error).__name__]
    if getattr(result, "is_error", False):
        return ["error", getattr(result.content[0], "text", None)]
    return ["answered", str(getattr(result, "data", result))[:200]]


async def cancelled(client: Any) -> list[Any]:
    waiting = asyncio.ensure_future(client.call_tool("wait", {}))
    while not os.path.exists(os.environ["WAITING"]):
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return ["cancelled", None]


async def main() -> None:
    command, *arguments = sys.argv[1:]
    transport = StdioTransport(command, arguments, env=dict(os.environ), keep_alive=False)
    async with Client(transport) as client:
        quiet = {"raise_on_error": False}
        outcomes = [
            await outcome(client.call_tool("add", {"a": 1, "b": 2}, **quiet)),
            await outcome(client.call_tool("fail", {"password": "hunter2"}, **quiet)),
            await outcome(client.call_tool("refuse", {}, **quiet)),
            await outcome(client.call_tool("decide", {}, meta={"traceparent": TRACEPARENT}, **quiet)),
            await outcome(client.call_tool("nosuch", {"x": 1}, **quiet)),
            await outcome(client.call_tool("add", {"a": "one", "b": 2}, **quiet)),
            await outcome(client.read_resource("reports://7")),
            await outcome(client.read_resource("nosuch://7")),
            await outcome(client.get_prompt("greet", {"name": "Ada"})),
            await outcome(client.get_prompt("nosuch", {})),
        ]
        if os.environ.get("WAITING"):
            outcomes.append(await cancelled(client))
        await client.list_tools()
    print(json.dumps(outcomes))


asyncio.run(main())
