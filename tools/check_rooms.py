"""Check that each room of mxcp_audit.py names only the rooms that it says it may name, all above it.

Silent when all is well; otherwise a line for each fault, with the fix, and exit status 1. It also
holds each import to its room, so that the clock, threads and DuckDB stay where they belong.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

RECORDING = (
    "Errors",
    "Config",
    "Events",
    "Redaction",
    "Encoding",
    "Journal",
    "Writer",
    "Calls",
    "Logger",
)
READING = (
    "SQL",
    "Engines",
    "Target",
    "Ledger",
    "Ingest",
    "Evidence",
    "Removal",
    "Copies",
    "Reading",
    "Store",
    "Output",
)
ROOMS = (*RECORDING, *READING, "Assembly", "Wrap", "Command line")
# What may be used where; a module that is not here may be used anywhere.
IMPORTS = {
    "threading": {"Writer", "Logger", "Reading", "Wrap"},
    "atexit": {"Logger"},
    "duckdb": {"Engines"},
    "subprocess": {"Engines", "Wrap"},
    "argparse": {"Command line"},
    "fcntl": {"Journal"},
    "msvcrt": {"Journal"},
}
CALLS = {  # dotted names that are called
    "os.fsync": {"Journal"},
    "os.register_at_fork": {"Logger"},
    "time.time": set(),
    "time.time_ns": set(),
    "datetime.datetime.now": {"Events"},
    "print": {"Command line"},
    "sys.exit": {"Command line"},
}
BANNER = re.compile(r"# === (.+) ===")
MAY_NAME = re.compile(r"# may name: (.+)")


def rooms_of(lines: list[str]) -> list[tuple[str, int, set[str]]]:
    """Return name, line of the banner, and the rooms that may be named, of each room in order."""
    found = []
    for start, line in enumerate(lines, 1):
        number = start
        banner = BANNER.fullmatch(line)
        if banner:
            allowed = MAY_NAME.fullmatch(lines[number]) if number < len(lines) else None
            if allowed is None:
                raise SystemExit(f"mxcp_audit.py:{number}: no `# may name:` line under the banner; add one")
            text = allowed[1]
            while text.endswith(","):  # it goes on in the next line
                number += 1
                text += lines[number].removeprefix("#")
            names = {name.strip() for name in text.split(",")}
            if names == {"nothing"}:
                names = set()
            elif names == {"every room above"}:
                names = {name for name, _, _ in found}
            found.append((banner[1], start, names))
    return found


def dotted(node: ast.expr) -> str:
    """Return a name as it is written, with a question mark for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def order_faults(rooms: list[tuple[str, int, set[str]]]) -> list[str]:
    """Return what is wrong with what the rooms say of each other."""
    faults = []
    order = {name: index for index, name in enumerate(ROOMS)}
    for name, number, allowed in rooms:
        for other in sorted(allowed):
            if other not in order or order[other] >= order[name]:
                faults.append(
                    f"mxcp_audit.py:{number}: {name} says that it may name {other}, which is not above it"
                )
            elif name in RECORDING and other not in RECORDING:
                faults.append(f"mxcp_audit.py:{number}: {name} records and may not name {other}, which reads")
    return faults


def _misplaced(node: ast.AST, name: str, homes: dict[str, set[str]], room: str) -> str:
    where = " or ".join(sorted(homes[name])) or "no room"
    return (
        f"mxcp_audit.py:{getattr(node, 'lineno', 0)}: {room} uses {name}, which belongs to {where}; move it"
    )


def misplaced(node: ast.AST, room: str) -> list[str]:
    """Return a fault for each thing that a node uses in a room where it doesn't belong."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        used, homes = [node.id], IMPORTS
    elif isinstance(node, ast.Import):
        used, homes = [alias.name for alias in node.names], IMPORTS
    elif isinstance(node, ast.ImportFrom):
        used, homes = [node.module or ""], IMPORTS
    elif isinstance(node, ast.Call):
        used, homes = [dotted(node.func)], CALLS
    else:
        return []
    return [_misplaced(node, name, homes, room) for name in used if name in homes and room not in homes[name]]


def check(source: str) -> list[str]:
    """Return the faults of a source text, a line each."""
    lines = source.splitlines()
    rooms = rooms_of(lines)
    found = tuple(name for name, _, _ in rooms)
    if found != ROOMS:
        return [f"mxcp_audit.py: the rooms are {list(found)}, not {list(ROOMS)}; restore them"]
    faults = order_faults(rooms)

    def room_at(line: int) -> int:
        return max((index for index, (_, start, _) in enumerate(rooms) if start <= line), default=-1)

    tree = ast.parse(source)
    home: dict[str, int] = {}
    for node in tree.body:
        for name in defined_names(node):
            there = home.setdefault(name, room_at(node.lineno))
            if there != room_at(node.lineno):
                faults.append(
                    f"mxcp_audit.py:{node.lineno}: {name} is defined in {rooms[there][0]} too; rename one"
                )
    named: dict[str, set[str]] = {name: set() for name in ROOMS}
    for node in ast.walk(tree):
        here = room_at(getattr(node, "lineno", 0))
        if here < 0:
            continue
        room, _, allowed = rooms[here]
        faults += misplaced(node, room)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            there = home.get(node.id, here)
            named[room].add(rooms[there][0])
            if there >= 0 and there != here and rooms[there][0] not in allowed:
                faults.append(
                    f"mxcp_audit.py:{node.lineno}: {room} names {node.id} of {rooms[there][0]}; "
                    + ("add it to `may name`" if there < here else "move one of them: names point up only")
                )
    for room, number, allowed in rooms:
        if "every room above" not in lines[number]:
            for other in sorted(allowed - named[room]):
                faults.append(
                    f"mxcp_audit.py:{number}: {room} says that it may name {other}, but doesn't; take it out"
                )
    return sorted(set(faults))


if __name__ == "__main__":
    path = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "mxcp_audit.py"
    )
    found = check(path.read_text(encoding="utf-8"))
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(bool(found))
