"""The Events section: columns, ids."""

from __future__ import annotations

import pytest

import mxcp_audit
from mxcp_audit import EventError

# The specification's table, in its order and with its types.
DOCUMENTED = [
    *(("timestamp", "TIMESTAMP"), ("caller", "VARCHAR"), ("type", "VARCHAR"), ("name", "VARCHAR")),
    *(("input_json", "VARCHAR"), ("duration_ms", "INTEGER"), ("policy_decision", "VARCHAR")),
    *(("reason", "VARCHAR"), ("status", "VARCHAR"), ("error", "VARCHAR")),
]


def test_columns_begin_with_the_ten_documented_ones() -> None:
    assert [tuple(column) for column in mxcp_audit.COLUMNS[:10]] == DOCUMENTED


def test_columns_public_ones_end_with_the_event_id() -> None:
    more = ("client", "agent", "address", "server", "request_id", "error_type", "result_bytes", "context")
    assert tuple(column.name for column in mxcp_audit.NEW_COLUMNS) == more
    assert mxcp_audit.PUBLIC_COLUMNS[10:] == ("user_id", "session_id", "trace_id", *more, "event_id")


def test_segment_id_of_a_later_moment_sorts_later() -> None:
    second = 1_000_000_000
    ids = [
        mxcp_audit.new_segment_id(moment) for moment in (0, 1_000, second - 1, second, 1_700_000_000 * second)
    ]
    assert ids == sorted(ids) and all(map(mxcp_audit.is_segment_id, ids))


def test_segment_id_with_a_frozen_clock_differs() -> None:
    assert len({mxcp_audit.new_segment_id(5) for _ in range(200)}) == 200


def test_parse_event_id_of_a_made_one_returns_its_parts() -> None:
    segment = mxcp_audit.new_segment_id(123)
    assert mxcp_audit.parse_event_id(f" {segment}:17\n") == (segment, 17)


@pytest.mark.parametrize("text", ["", "x", "a:b", ":1", "20260101T000000000000Z-00000000", "x' OR '1'='1:1"])
def test_parse_event_id_of_anything_else_raises_with_an_example(text: str) -> None:
    with pytest.raises(EventError, match=r"looks like \d{8}T") as caught:
        mxcp_audit.parse_event_id(text)
    assert caught.value.field == "event_id"


@pytest.mark.parametrize("seq", ["0", "-1", "1.5", "٣", "01", "99999999999"])
def test_parse_event_id_with_a_bad_seq_raises(seq: str) -> None:
    with pytest.raises(EventError):
        mxcp_audit.parse_event_id(f"{mxcp_audit.new_segment_id(0)}:{seq}")
