"""No secret under a specified name reaches the journal, the table, `logging`, or any export."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcp_audit import AuditLogger

# The names that the specification lists, each in the spellings that people use.
SPECIFIED = (
    *("password", "passwd", "pwd", "secret", "token", "key", "api_key", "apikey", "auth"),
    *("authorization", "credential", "ssn", "credit_card", "card_number"),
)
MARK = "s3cr3t-MARK-"


def spellings(name: str) -> list[str]:
    words = name.split("_")
    camel = words[0] + "".join(word.capitalize() for word in words[1:])
    return [
        *(name, name.upper(), name.title(), camel, "-".join(words)),
        "-".join(word.title() for word in words),
    ]


@dataclasses.dataclass
class Holder:
    password: object
    inner: object = None


CONTAINERS: list[Callable[[str, object], object]] = [
    lambda name, value: {name: value},
    lambda name, value: {"outer": [{"deep": ({name: value},)}]},
    lambda name, value: OrderedDict([(name, [value, {"x": value}])]),
    lambda name, value: MappingProxyType({name: {"a": {"b": value}}}),
    lambda name, value: Holder(password=value, inner={name: value}),
    lambda name, value: [{"name": name, "value": value}],
    lambda name, value: {"body": json.dumps({name: value})},
    lambda name, value: {1: {name: (value, value)}},
]
SECRET = st.integers(0, 10**9).map(lambda number: f"{MARK}{number}")
CASE = st.tuples(
    st.sampled_from([s for n in SPECIFIED for s in spellings(n)]), st.sampled_from(CONTAINERS), SECRET
)


@given(cases=st.lists(CASE, min_size=10, max_size=40))
@settings(max_examples=5)
def test_secret_under_a_specified_name_appears_nowhere(
    tmp_path_factory: pytest.TempPathFactory, engine: str, run: Cli, cases: list[tuple[str, Any, str]]
) -> None:
    folder = tmp_path_factory.mktemp("secret")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mxcp_audit").addHandler(handler)
    audit = AuditLogger(folder / "log.duckdb", flush_interval=3600)
    try:
        for name, container, secret in cases:
            arguments = container(name, secret)
            audit.log_event(
                "cli", "tool", "t", arguments, 1, status="error", error=f"invalid value {secret!r}"
            )
            with pytest.raises(ValueError, match=MARK), audit.record("tool", "t", arguments):
                raise ValueError(f"no such thing: {secret}")
        while audit.counters.written < 2 * len(cases):
            pass
        assert_absent(folder)  # the journal
        assert audit.flush(60) and audit.counters.ingested == 2 * len(cases)
    finally:
        audit.shutdown()
        logging.getLogger("mxcp_audit").removeHandler(handler)
    assert not any(MARK in text for text in told)
    for arguments in (["--json", "--limit", "1000"], [], ["--export", str(folder / "out.csv")]):
        shown = run("log", "--db", str(folder / "log.duckdb"), *arguments)
        assert shown.returncode == 0, shown.stderr
        assert MARK not in shown.stdout + shown.stderr
    assert_absent(folder)  # the database and the export


def assert_absent(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert MARK.encode() not in path.read_bytes(), path
