"""An MCP server with tools, a resource and a prompt, as anybody would write one; audited by one line."""

from __future__ import annotations

from fastmcp import FastMCP

from mxcp_audit import AuditLogger

server = FastMCP("demo shop")
server.add_middleware(AuditLogger.from_config().middleware())  # this is the line


@server.tool
def find_orders(customer: str, limit: int = 10) -> list[dict[str, object]]:
    """Find the newest orders of a customer."""
    return [{"id": number, "customer": customer} for number in range(1, min(limit, 3) + 1)]


@server.tool
def connect_shop(shop: str, api_key: str, options: dict[str, object] | None = None) -> str:
    """Connect a shop; takes a secret."""
    return f"connected to {shop}"


@server.tool
def refund(order_id: int, amount: float) -> str:
    """Refund an order; fails for unknown ones."""
    raise ValueError(f"order {order_id} does not exist")


@server.tool
def delete_customer(customer: str) -> str:
    """Delete a customer; nobody may."""
    raise PermissionError("only administrators may delete customers")


@server.resource("reports://{report_id}")
def report(report_id: str) -> str:
    """A report."""
    return f"report {report_id}: all well"


@server.prompt
def summarize(text: str) -> str:
    """Ask for a summary."""
    return f"Please summarize: {text}"


if __name__ == "__main__":
    server.run(show_banner=False)
