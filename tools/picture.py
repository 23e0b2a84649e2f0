"""Draw docs/terminal.svg, what `log` and `stats` print after the demo, and docs/report.png, a report.

Usage: "$(tools/environment demo duckdb fastmcp -e.)" tools/picture.py

The demo's server and client run first; then the two commands run on a terminal of their own, and
what they print, colours included, is drawn as it is.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import pty
import random
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

import demo_client

TARGET = Path(__file__).resolve().parent.parent / "docs" / "terminal.svg"
REPORT = TARGET.with_name("report.png")
COMMANDS = (("log",), ("stats", "--sort", "p95"))
CELLS = 98
CELL_WIDTH, LINE_HEIGHT, MARGIN = 8.43, 19, 18  # of a monospaced font of 14 pixels
COLOURS = {"31": "#ff7b72", "33": "#e3b341", "0": "#c9d1d9"}


def on_a_terminal(folder: Path, arguments: tuple[str, ...]) -> str:
    """Run a command on a terminal of CELLS columns and return what it printed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mxcp_audit", *arguments]
    environment = {**os.environ, "COLUMNS": str(CELLS), "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(pieces).decode()


def drawn(lines: list[str]) -> str:
    """Return the SVG of lines with ANSI colours."""
    width = round(CELLS * CELL_WIDTH + 2 * MARGIN)
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    texts = []
    for number, line in enumerate(lines):
        colour, spans = COLOURS["0"], []
        for code, text in re.findall(r"(?:\x1b\[(\d+)m)?([^\x1b]*)", line):
            colour = COLOURS[code] if code else colour
            if text:
                spans.append(f'<tspan fill="{colour}">{escape(text)}</tspan>')
        y = MARGIN + (number + 0.75) * LINE_HEIGHT
        texts.append(f'<text x="{MARGIN}" y="{y:g}" xml:space="preserve">{"".join(spans)}</text>')
    body = "\n".join(texts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">
<title>What log and stats print after the demo</title>
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>
<g font-family="'DejaVu Sans Mono', Menlo, Consolas, monospace" font-size="14">
{body}
</g>
</svg>
"""


TOOLS = (("search_orders", 40), ("get_customer", 15), ("refund_order", 120), ("export_report", 900))


def draw_report(folder: Path) -> None:
    """Log three days of made-up calls, and photograph their report."""
    from mxcp_audit import AuditLogger

    dice = random.Random(2026)
    log = folder / "shop.duckdb"
    start = int(datetime.datetime(2026, 11, 10, tzinfo=datetime.timezone.utc).timestamp())
    calls = [1 + int(90 * dice.random() * (7 <= hour % 24 < 19)) for hour in range(72)]
    moments = [start + hour * 3600 + dice.randrange(3600) for hour in range(72) for _ in range(calls[hour])]
    with AuditLogger(log) as audit:
        for moment in sorted(moments):
            audit._encoder._clock = lambda moment=moment: moment * 10**9  # type: ignore[misc]
            name, typical_ms = dice.choices(TOOLS, (60, 25, 8, 7))[0]
            duration_ms = typical_ms * dice.lognormvariate(0, 0.7)
            outcome: tuple[str | None, ...] = ("allow", None)
            if name == "refund_order" and dice.random() < 0.4:
                outcome = ("deny", "refunds need the role support", "error", "PermissionError: not allowed")
            elif dice.random() < 0.08:
                outcome = ("allow", None, "error", "TimeoutError: the shop did not answer")
            audit.log_event(
                *("http", "tool", name, {"id": dice.randrange(999)}, duration_ms, *outcome),  # type: ignore[arg-type]
                user_id=dice.choice(("ana", "bo", "chen")),
                client=dice.choice(("claude-ai/1.2", "vscode/1.101")),
                server="shop/2.0",
            )
    page = folder / "report.html"
    command = [sys.executable, "-m", "mxcp_audit", "report", "--db", str(log), "--out", str(page)]
    subprocess.run(command, check=True)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += ["--window-size=1000,700", "--disable-background-networking", "--disable-component-update"]
    browser += ["--disable-sync", "--no-first-run", f"--user-data-dir={folder}/profile"]
    subprocess.run([*browser, f"--screenshot={REPORT}", page.as_uri()], check=True)
    print(f"written: {REPORT}")


def main() -> None:
    """Run the demo and both commands, and write the pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mxcp-site.yml").write_text(demo_client.SITE_FILE, encoding="utf-8")
        asyncio.run(demo_client.use_the_server(folder))
        lines: list[str] = []
        for arguments in COMMANDS:
            lines += [f"$ python -m mxcp_audit {' '.join(arguments)}"]
            lines += [*on_a_terminal(folder, arguments).replace("\r", "").splitlines(), ""]
    TARGET.write_text(drawn(lines[:-1]), encoding="utf-8")
    print(f"written: {TARGET}")
    with tempfile.TemporaryDirectory() as name:
        draw_report(Path(name))


if __name__ == "__main__":
    main()
