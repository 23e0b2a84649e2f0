"""Check that each section of mxcp_audit.py names only the sections that it says it depends on, all above it.

A large section has parts, with the same rule among them. Silent when all is well; otherwise a line for each
fault, with the fix, and exit status 1. It also holds each import to its section, so that clock, threads and
DuckDB stay where they belong.
"""

from __future__ import annotations

import ast
import bisect
import re
import sys
from pathlib import Path
from typing import NamedTuple

RECORDING = ("Errors", "Config", "Events", "Redaction", "Encoding", "Journal", "Writer", "Calls", "Logger")
SECTIONS = (*RECORDING, "SQL", "Engines", "Store", "Output", "Assembly", "Command line")
PARTS = {  # a large section has parts, which name only parts above them
    "Store": (
        *("Target", "Ledger", "Ingest", "Reading", "Evidence", "Removal", "Copies", "Operations", "Follow"),
        "Health",
    ),
    "Output": ("Text", "Forms", "Report"),
    "Command line": ("Wrap", "Commands"),
}
# What may be used where; a module that is not here may be used anywhere.
IMPORTS = {
    "threading": {"Writer", "Logger", "Reading", "Wrap"},
    "atexit": {"Logger"},
    "duckdb": {"Engines"},
    "subprocess": {"Writer", "Engines", "Evidence", "Wrap"},
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
DEPENDS_ON = re.compile(r"# depends on: (.+)")
ALL = "every section above"


class Place(NamedTuple):
    """A section, or a part of one: its name, where it begins, and what it depends on."""

    name: str
    section: str
    line: int
    depends_on: frozenset[str]

    @property
    def is_part(self) -> bool:
        return self.name != self.section


def places_of(lines: list[str]) -> list[Place]:
    """Return the sections and their parts, in order."""
    found: list[Place] = []
    for number, line in enumerate(lines, 1):
        banner = BANNER.fullmatch(line)
        if not banner:
            continue
        allowed = DEPENDS_ON.fullmatch(lines[number]) if number < len(lines) else None
        if allowed is None:
            raise SystemExit(f"mxcp_audit.py:{number}: no `# depends on:` line under the banner; add one")
        text, more = allowed[1], number
        while text.endswith(","):  # it goes on in the next line
            more += 1
            text += lines[more].removeprefix("#")
        names = {name.strip() for name in text.split(",")} - {"nothing"}
        is_section = line.startswith("# ===")
        section = banner[1] if is_section else found[-1].section
        if ALL in names:
            names |= {place.section for place in found if place.section != section}
        found.append(Place(banner[1], section, number, frozenset(names)))
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
    """Return what is wrong with the plan: which sections there are, of which parts, in which order."""
    wanted = [name for section in SECTIONS for name in (section, *PARTS.get(section, ()))]
    found = [place.name for place in places]
    return None if found == wanted else f"mxcp_audit.py: the sections are {found}, not {wanted}; restore them"


def order_faults(places: list[Place]) -> list[str]:
    """Return what is wrong with what sections and parts say of each other."""
    faults = []
    whole = {place.section: place for place in places if not place.is_part}
    for index, place in enumerate(places):
        above = {
            other.name for other in places[:index] if other.section == place.section or not other.is_part
        }
        for other in sorted(place.depends_on - {ALL}):
            if other not in above - {place.section}:
                problem = f"says that it depends on {other}, which is not above it"
            elif place.name in RECORDING and other not in RECORDING:
                problem = f"records and may not name {other}, which reads"
            elif other in SECTIONS and other not in whole[place.section].depends_on:
                problem = f"says that it depends on {other}, which {place.section} doesn't say"
            else:
                continue
            faults.append(f"mxcp_audit.py:{place.line}: {place.name} {problem}")
    return faults


def _misplaced(node: ast.AST, name: str, homes: dict[str, set[str]], place: Place) -> str:
    where = " or ".join(sorted(homes[name])) or "no section"
    return (
        f"mxcp_audit.py:{getattr(node, 'lineno', 0)}: {place.name} uses {name}, "
        f"which belongs to {where}; move it"
    )


def misplaced(node: ast.AST, place: Place) -> list[str]:
    """Return a fault for each thing that a node uses in a section where it doesn't belong."""
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
        if name in homes and not {place.section, place.name} & homes[name]
    ]


def check(source: str) -> list[str]:
    """Return the faults of a source text, a line each."""
    places = places_of(source.splitlines())
    fault = plan_fault(places)
    if fault:
        return [fault]
    faults = order_faults(places)

    starts = [place.line for place in places]

    def place_at(line: int) -> int:
        return bisect.bisect_right(starts, line) - 1

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
        target = origin.name if origin.section == here.section else origin.section
        named[here.name].add(target)
        named[here.section].add(target)
        if target not in here.depends_on | {here.name, here.section}:
            faults.append(
                f"mxcp_audit.py:{node.lineno}: {here.name} names {node.id} of {target}; "
                + (
                    "add it to `depends on`"
                    if origin.line < here.line
                    else "move one of them: names point up only"
                )
            )
    for place in places:
        for other in sorted(place.depends_on - named[place.name]) if ALL not in place.depends_on else ():
            faults.append(
                f"mxcp_audit.py:{place.line}: {place.name} says that it depends on {other}, "
                "but doesn't; take it out"
            )
    return sorted(set(faults))


BUDGET_BYTES = 509_100  # vendored whole; less is better, more needs a reason


def sizes(source: str) -> str:
    """Return lines and bytes of each section and part, as a table."""
    lines = source.splitlines(keepends=True)
    places = places_of(source.splitlines())
    starts = [0, *(place.line - 1 for place in places), len(lines)]
    names = ["head", *(f"  {place.name}" if place.is_part else place.name for place in places)]
    rows = []
    for name, start, end in zip(names, starts, starts[1:]):
        rows.append(f"{name:<18}{end - start:>7,}{len(''.join(lines[start:end]).encode()):>9,}")
    return "\n".join([*rows, f"{'sum':<18}{len(lines):>7,}{len(source.encode()):>9,}"])


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--sizes"]
    path = Path(given[0]) if given else Path(__file__).resolve().parent.parent / "mxcp_audit.py"
    text = path.read_text(encoding="utf-8")
    if "--sizes" in sys.argv:
        print(sizes(text))
    found = check(text)
    if len(text.encode()) > BUDGET_BYTES:
        found.append(
            f"mxcp_audit.py: {len(text.encode()):,} bytes, {BUDGET_BYTES:,} are allowed; make it smaller"
        )
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(bool(found))
