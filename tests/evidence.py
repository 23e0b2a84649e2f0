"""What the tests of evidence and removal share: small logs, made by real journals at chosen times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mxcp_audit as m

DAY_NS = 24 * 3600 * 10**9
START_NS = 1_780_000_000 * 10**9  # 2026-05-28


def write_segment(
    database: Path, when_ns: int, events: int, *, journal: Path | None = None, **values: Any
) -> str:
    """Write a sealed segment of events a minute apart, and return its id."""
    now = [when_ns]
    encoder = m.Encoder(m.Redactor(), max_input_bytes=10_000, clock=lambda: now[0])
    segment = m.Journal(journal or f"{database}.journal").open_segment()
    for number in range(1, events + 1):
        event: dict[str, Any] = {
            "caller": "http",
            "event_type": "tool",
            "name": f"t{number % 3}",
            "duration_ms": number,
            "policy_decision": "allow",
            "reason": None if number % 3 else "",
            "status": "success",
            "error": "é|1|" if number % 4 == 0 else None,
            "user_id": "u" * (number % 3) or None,
            "session_id": "s",
            "trace_id": None,
            "echoes": (),
            "more": [None if number % 2 else "c|1:é"] * 6
            + [number % 3 or None, {"n": number} if number % 4 else None],
            **values,
        }
        line = encoder.line(input_json=encoder.input_json({"n": number}, "t", None, None), **event)
        segment.append(m.finish_line(line, number), 1)
        now[0] += 60 * 10**9
    segment.seal()
    return segment.id


def store_of(database: Path, **settings: Any) -> m.Store:
    return m.Store(m.config_from_arguments(database, **settings))


def moment(ns: int) -> str:
    """Return a moment as naive UTC text."""
    return m.iso_time(ns // 1000).rstrip("Z").replace("T", " ")  # type: ignore[union-attr]


def ingest(database: Path, **settings: Any) -> m.Store:
    store = store_of(database, **settings)
    assert store.ingest()
    return store


def make_log(database: Path, segments: int) -> None:
    """Make a log of segments of four events: the segments are a day apart, the events a minute."""
    for number in range(segments):
        write_segment(database, START_NS + number * DAY_NS, 4)
        ingest(database)
