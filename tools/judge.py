"""Count the events of a log without any of our code: plain Python over the journal, one SQL count.

`judge(path)` says how often each event is there, told apart by its name; `tools/torture.py` and the
tests log each event under a name of its own. `journal_line` writes what docs/journal-format.md describes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAST_INGEST_SECONDS = 60


@dataclass
class Verdict:
    """What the log holds."""

    names: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    torn: int = 0  # bytes behind the last line feed of a segment, and lines that are no JSON
    in_table: int = 0
    losses: int = 0

    def lost(self, expected: set[str]) -> set[str]:
        """Return the names that are nowhere."""
        return expected - set(self.names)

    @property
    def doubled(self) -> int:
        """How many events are there more than once, by id or by name; what can't be encoded has none."""
        return sum(count - 1 for name, count in self.names.items() if name) + sum(
            count - 1 for count in self.ids.values()
        )


@contextlib.contextmanager
def asking(database: str | os.PathLike[str]) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    """Yield a function that returns rows of a database, read by the `duckdb` package, else by the program."""
    if importlib.util.find_spec("duckdb"):
        import duckdb

        until = time.monotonic() + LAST_INGEST_SECONDS
        while True:
            try:
                connection = duckdb.connect(os.fspath(database), read_only=True)
                break
            except duckdb.IOException as error:  # a killed server's ingest goes on without it
                if "lock" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.1)
        with connection:
            yield lambda query: list(connection.execute(query).fetchall())
        return
    package = importlib.util.find_spec("duckdb_cli")
    folders = package.submodule_search_locations if package else None
    program = shutil.which("duckdb", path=os.pathsep.join([*(folders or ()), os.environ["PATH"]]))
    assert program, "neither the package duckdb nor the program is installed"
    command = [program, "-init", os.devnull, "-batch", "-readonly", "-json", os.fspath(database)]

    def row(pairs: list[tuple[str, Any]]) -> tuple[Any, ...]:
        return tuple(value for _, value in pairs)

    def answer(query: str) -> list[tuple[Any, ...]]:
        said = subprocess.run([*command, query], capture_output=True, check=True, encoding="utf-8").stdout
        rows = json.loads(said or "[]", object_pairs_hook=row)
        return [] if rows == [()] else rows  # `[{}]` and nothing both mean no rows, as the version has it

    yield answer


def ask(database: str | os.PathLike[str], query: str) -> list[tuple[Any, ...]]:
    """Return rows of a database, read without any of our code."""
    with asking(database) as answer:
        return answer(query)


def judge(database: str | os.PathLike[str], journal: str | os.PathLike[str] | None = None) -> Verdict:
    """Read table and journal as they lie there. Call it when nobody writes."""
    verdict = Verdict()
    known: set[str] = set()
    if os.path.exists(database) and os.stat(database).st_size:
        with asking(database) as answer:
            tables = {name for (name,) in answer("SELECT table_name FROM duckdb_tables()")}
            rows = "SELECT name, segment || ':' || seq, count(*) FROM logs GROUP BY ALL"
            for name, event_id, count in answer(rows) if "logs" in tables else ():
                verdict.names[name] += count
                verdict.ids[event_id] += count
                verdict.in_table += count
            entries = "SELECT kind, segment, events FROM ledger"
            for kind, segment, events in answer(entries) if "ledger" in tables else ():
                if kind == "segment":
                    known.add(segment)
                elif kind == "loss":
                    verdict.losses += events
    for path in sorted(Path(journal or f"{database}.journal").glob("*.jsonl")):
        if path.stem in known:
            continue
        whole, feed, tail = path.read_bytes().rpartition(b"\n")
        verdict.torn += len(tail)
        for line in whole.replace(b"\0{", b"\n{").split(b"\n") if feed else ():
            try:
                event = json.loads(line)
            except ValueError:
                verdict.torn += len(line)
                continue
            verdict.names[event["name"]] += 1
            verdict.ids[f"{path.stem}:{event['seq']}"] += 1
    return verdict


def journal_line(name: str, seq: int, **changes: object) -> bytes:
    """Return a line of a segment: an event that is plain but for its name, and for `changes`."""
    event: dict[str, object] = {
        "timestamp": "2026-01-31T12:00:00.000000Z",
        "caller": "cli",
        "type": "tool",
        "name": name,
        "input_json": "null",
        "duration_ms": 1,
        "policy_decision": "n/a",
        "reason": None,
        "status": "success",
        "error": None,
        **dict.fromkeys(("user_id", "session_id", "trace_id")),
        "seq": seq,
    }
    return json.dumps({**event, **changes}, separators=(",", ":")).encode() + b"\n"


@functools.cache
def find_pythons() -> dict[str, str]:
    """Return the interpreters from 3.10 on that are here, by version: this one, pyenv's, those on PATH."""
    found = {f"3.{sys.version_info[1]}": sys.executable}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(10, 20):
        version = f"3.{minor}"
        on_path = shutil.which(f"python{version}")
        for path in (*map(str, sorted(root.glob(f"versions/{version}.*/bin/python"))), on_path):
            if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:  # no bare shim
                found.setdefault(version, path)
    return dict(sorted(found.items(), key=lambda item: int(item[0][2:])))
