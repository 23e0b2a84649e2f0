"""Check that each room of mxcp_audit.py names only the rooms that it says it may name, all above it.

A large room has parts, with the same rule among them. Silent when all is well; otherwise a line for each
fault, with the fix, and exit status 1. It also holds each import to its room, so that the clock, threads and
DuckDB stay where they belong.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

RECORDING = ("Errors", "Config", "Events", "Redaction", "Encoding", "Journal", "Writer", "Calls", "Logger")
ROOMS = (*RECORDING, "SQL", "Engines", "Store", "Output", "Assembly", "Command line")
PARTS = {  # a large room has parts, which name only parts above them
    "Store": ("Target", "Ledger", "Ingest", "Evidence", "Removal", "Copies", "Reading", "Operations"),
    "Command line": ("Wrap", "Commands"),
}
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
BANNER = re.compile(r"# ===? (.+?) ===?")
MAY_NAME = re.compile(r"# may name: (.+)")
ALL = "every room above"


class Place(NamedTuple):
    """A room, or a part of one: its name, where it begins, and what it may name."""

    name: str
    room: str
    line: int
    may_name: frozenset[str]

    @property
    def is_part(self) -> bool:
        return self.name != self.room


def places_of(lines: list[str]) -> list[Place]:
    """Return the rooms and their parts, in order."""
    found: list[Place] = []
    for number, line in enumerate(lines, 1):
        banner = BANNER.fullmatch(line)
        if not banner:
            continue
        allowed = MAY_NAME.fullmatch(lines[number]) if number < len(lines) else None
        if allowed is None:
            raise SystemExit(f"mxcp_audit.py:{number}: no `# may name:` line under the banner; add one")
        text, more = allowed[1], number
        while text.endswith(","):  # it goes on in the next line
            more += 1
            text += lines[more].removeprefix("#")
        names = {name.strip() for name in text.split(",")} - {"nothing"}
        is_room = line.startswith("# ===")
        room = banner[1] if is_room else found[-1].room
        if ALL in names:
            names |= {place.room for place in found if place.room != room}
        found.append(Place(banner[1], room, number, frozenset(names)))
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


def plan_fault(places: list[Place]) -> str | None:
    """Return what is wrong with the plan: which rooms there are, of which parts, in which order."""
    wanted = [name for room in ROOMS for name in (room, *PARTS.get(room, ()))]
    found = [place.name for place in places]
    return None if found == wanted else f"mxcp_audit.py: the rooms are {found}, not {wanted}; restore them"


def order_faults(places: list[Place]) -> list[str]:
    """Return what is wrong with what rooms and parts say of each other."""
    faults = []
    whole = {place.room: place for place in places if not place.is_part}
    for index, place in enumerate(places):
        above = {other.name for other in places[:index] if other.room == place.room or not other.is_part}
        for other in sorted(place.may_name - {ALL}):
            if other not in above - {place.room}:
                problem = f"says that it may name {other}, which is not above it"
            elif place.name in RECORDING and other not in RECORDING:
                problem = f"records and may not name {other}, which reads"
            elif other in ROOMS and other not in whole[place.room].may_name:
                problem = f"says that it may name {other}, which {place.room} doesn't say"
            else:
                continue
            faults.append(f"mxcp_audit.py:{place.line}: {place.name} {problem}")
    return faults


def _misplaced(node: ast.AST, name: str, homes: dict[str, set[str]], place: Place) -> str:
    where = " or ".join(sorted(homes[name])) or "no room"
    return (
        f"mxcp_audit.py:{getattr(node, 'lineno', 0)}: {place.name} uses {name}, "
        f"which belongs to {where}; move it"
    )


def misplaced(node: ast.AST, place: Place) -> list[str]:
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
    return [
        _misplaced(node, name, homes, place)
        for name in used
        if name in homes and not {place.room, place.name} & homes[name]
    ]


def check(source: str) -> list[str]:
    """Return the faults of a source text, a line each."""
    places = places_of(source.splitlines())
    fault = plan_fault(places)
    if fault:
        return [fault]
    faults = order_faults(places)

    def place_at(line: int) -> int:
        return max((index for index, place in enumerate(places) if place.line <= line), default=-1)

    tree = ast.parse(source)
    home: dict[str, int] = {}
    for node in tree.body:
        for name in defined_names(node):
            there = home.setdefault(name, place_at(node.lineno))
            if there != place_at(node.lineno):
                faults.append(
                    f"mxcp_audit.py:{node.lineno}: {name} is defined in {places[there].name} too; rename one"
                )
    named: dict[str, set[str]] = {place.name: set() for place in places}
    for node in ast.walk(tree):
        index = place_at(getattr(node, "lineno", 0))
        if index < 0:
            continue
        here = places[index]
        faults += misplaced(node, here)
        if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)) or home.get(node.id, -1) < 0:
            continue
        origin = places[home[node.id]]
        target = origin.name if origin.room == here.room else origin.room
        named[here.name].add(target)
        named[here.room].add(target)
        if target not in here.may_name | {here.name, here.room}:
            faults.append(
                f"mxcp_audit.py:{node.lineno}: {here.name} names {node.id} of {target}; "
                + (
                    "add it to `may name`"
                    if origin.line < here.line
                    else "move one of them: names point up only"
                )
            )
    for place in places:
        for other in sorted(place.may_name - named[place.name]) if ALL not in place.may_name else ():
            faults.append(
                f"mxcp_audit.py:{place.line}: {place.name} says that it may name {other}, "
                "but doesn't; take it out"
            )
    return sorted(set(faults))


if __name__ == "__main__":
    path = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "mxcp_audit.py"
    )
    found = check(path.read_text(encoding="utf-8"))
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(bool(found))
