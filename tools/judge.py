"""Count the events of a log without any of our code: plain Python over the journal, one SQL count.

`judge(path)` says how often each event is there, told apart by its name; `tools/torture.py` and the
tests log each event under a name of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


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


def judge(database: str | os.PathLike[str], journal: str | os.PathLike[str] | None = None) -> Verdict:
    """Read table and journal as they lie there. Call it when nobody writes."""
    verdict = Verdict()
    known: set[str] = set()
    if os.path.exists(database) and os.stat(database).st_size:
        import duckdb

        with duckdb.connect(str(database), read_only=True) as connection:
            tables = {
                name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
            }
            if "logs" in tables:
                query = "SELECT name, segment || ':' || seq, count(*) FROM logs GROUP BY ALL"
                for name, event_id, count in connection.execute(query).fetchall():
                    verdict.names[name] += count
                    verdict.ids[event_id] += count
                    verdict.in_table += count
            if "ledger" in tables:
                for kind, segment, events in connection.execute(
                    "SELECT kind, segment, events FROM ledger"
                ).fetchall():
                    if kind == "segment":
                        known.add(segment)
                    elif kind == "loss":
                        verdict.losses += events
    for path in sorted(Path(journal or f"{database}.journal").glob("*.jsonl")):
        if path.stem in known:
            continue
        whole, feed, tail = path.read_bytes().rpartition(b"\n")
        verdict.torn += len(tail)
        for line in whole.split(b"\n") if feed else ():
            try:
                event = json.loads(line)
            except ValueError:
                verdict.torn += len(line)
                continue
            verdict.names[event["name"]] += 1
            verdict.ids[f"{path.stem}:{event['seq']}"] += 1
    return verdict


def pythons() -> list[str]:
    """Return the interpreters from 3.10 on that are here: this one, pyenv's, and those on PATH."""
    found = {sys.version_info[:2]: sys.executable}
    for minor in range(10, 15):
        candidates = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
        on_path = shutil.which(f"python3.{minor}")
        for candidate in [*map(str, candidates), *([on_path] if on_path else [])]:
            found.setdefault((3, minor), candidate)
    return [found[version] for version in sorted(found)]
