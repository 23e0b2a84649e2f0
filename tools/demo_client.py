"""Drive the demo server with a real client, and show the log from other processes while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from fastmcp import Client
from fastmcp.client.transports import StdioTransport

SITE_FILE = """\
mxcp: 1
project: demo
profile: default
profiles:
  default:
    audit:
      enabled: true
"""
SERVER = Path(__file__).resolve().parent / "demo_server.py"


def show(folder: Path, *arguments: str) -> None:
    """Run a query in a process of its own, as an operator would."""
    print(f"\n$ python -m mxcp_audit {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "mxcp_audit", *arguments], cwd=folder, check=True)


async def use_the_server(folder: Path) -> None:
    log = (folder / "server.log").open("w")
    transport = StdioTransport(sys.executable, [str(SERVER)], cwd=str(folder), log_file=log, keep_alive=False)
    async with Client(transport) as client:
        await client.call_tool("find_orders", {"customer": "Zoë Müller 顧客 ☃", "limit": 2})
        await client.call_tool("find_orders", {"customer": "x' OR '1'='1"})
        await client.call_tool(
            "connect_shop",
            {
                "shop": "north",
                "api_key": "not-for-your-eyes",
                "options": {"user": "bob", "password": "hunter2"},
            },
        )
        await client.read_resource("reports://2026-11")
        await client.get_prompt("summarize", {"text": "a long story"})
        for name, arguments in (
            ("refund", {"order_id": 4711, "amount": 12.5}),
            ("delete_customer", {"customer": "bob"}),
            ("no_such_tool", {}),
        ):
            with contextlib.suppress(Exception):  # these fail, and are audited
                await client.call_tool(name, arguments)
        await asyncio.sleep(0.2)
        print("The server is still running. From other processes:")
        show(folder, "log")
        show(folder, "log", "--policy", "denied")
        show(folder, "log", "--type", "tool", "--status", "error", "--since", "1h")
        show(folder, "log", "--tool", "connect_shop", "--json")
        show(folder, "log", "--export", "audit-report.csv")
    # A client closes the input of a stdio server, which then ingests and ends, or ends it by a signal. What a
    # killed one had not ingested is in its journal: the next server, or this, moves it into the database.
    show(folder, "ingest")
    print("\nThe server has ended. What DuckDB itself sees in logs-default.duckdb:", flush=True)
    import duckdb

    with duckdb.connect(str(folder / "logs-default.duckdb"), read_only=True) as connection:
        connection.sql(
            "SELECT * EXCLUDE (user_id, session_id, trace_id, segment) FROM logs ORDER BY timestamp"
        ).show(max_width=200)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        Path(name, "mxcp-site.yml").write_text(SITE_FILE, encoding="utf-8")
        asyncio.run(use_the_server(Path(name)))
