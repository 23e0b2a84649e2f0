"""A real client of a server that it knows nothing of: `everything_client.py COMMAND …`.

It echoes, asks for each prompt that takes no arguments and for the first resources, does some of it wrong,
and prints type, name, how it went and a digest of each answer, as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from typing import Any

from fastmcp import Client
from fastmcp.client.transports import StdioTransport


async def outcome(kind: str, name: str, awaitable: Any) -> list[str]:
    try:
        result = await awaitable
    except Exception as error:
        return [kind, name, "raised", type(error).__name__]
    how = "error" if getattr(result, "is_error", False) else "answered"
    return [kind, name, how, hashlib.sha256(repr(getattr(result, "content", result)).encode()).hexdigest()]


async def main() -> None:
    transport = StdioTransport(sys.argv[1], sys.argv[2:], env=dict(os.environ), keep_alive=False)
    async with Client(transport) as client:
        quiet = {"raise_on_error": False}
        found = [
            await outcome("tool", "echo", client.call_tool("echo", {"message": text}, **quiet))
            for text in ("Hello", "ä\u2028\U0001f600", "x" * 1_000_000)
        ]
        found.append(await outcome("tool", "echo", client.call_tool("echo", {"wrong": 1}, **quiet)))
        found.append(await outcome("tool", "nosuch", client.call_tool("nosuch", {}, **quiet)))
        for prompt in await client.list_prompts():
            if not prompt.arguments:
                found.append(await outcome("prompt", prompt.name, client.get_prompt(prompt.name, {})))
        found.append(await outcome("prompt", "nosuch", client.get_prompt("nosuch", {})))
        for resource in (await client.list_resources())[:3]:
            uri = str(resource.uri)
            found.append(await outcome("resource", uri, client.read_resource(uri)))
        found.append(await outcome("resource", "nosuch://x", client.read_resource("nosuch://x")))
    print(json.dumps(found))


asyncio.run(main())
