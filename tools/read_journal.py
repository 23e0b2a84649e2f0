"""Print the events of a journal directory as JSON lines, written from docs/journal-format.md alone.

Usage: python tools/read_journal.py DIRECTORY [LEDGERED_SEGMENT …]

Segments named on the command line are in the database already and are left out. It needs nothing of
mxcp_audit, takes no lock and changes nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEGMENT = re.compile(r"([0-9]{8}T[0-9]{12}Z-[0-9a-f]{8})\.jsonl")


def read_journal(directory: Path, ledgered: frozenset[str] = frozenset()) -> Iterator[dict[str, object]]:
    """Yield the events of all segments, oldest segment first, each with its `event_id`."""
    for path in sorted(directory.iterdir()):
        match = SEGMENT.fullmatch(path.name)
        if match is None or match[1] in ledgered:
            continue
        whole, feed, _torn = path.read_bytes().rpartition(b"\n")
        for line in whole.replace(b"\0{", b"\n{").split(b"\n") if feed else ():
            try:
                event = json.loads(line.decode("utf-8"))
                yield {**event, "event_id": f"{match[1]}:{event['seq']}"}
            except (ValueError, TypeError, KeyError) as error:
                print(f"{path}: a line can't be read: {error}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    for found in read_journal(Path(sys.argv[1]), frozenset(sys.argv[2:])):
        print(json.dumps(found, ensure_ascii=False))
