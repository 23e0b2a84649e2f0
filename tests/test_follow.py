"""`log --follow`: every event once, from whatever process, while segments move into the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SAFETY_SECONDS, child_environment, held_database, wait_until

from mxcp_audit import AuditLogger, Filter, Follower, QueryError, Store, config_from_arguments
from tools.judge import journal_line

WRITER = """
import sys
from mxcp_audit import AuditLogger
path, who, rounds, each = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
audit = AuditLogger(path, flush_interval=0.05)
for turn in range(rounds):
    for number in range(each):
        audit.log_event("cli", "tool", f"w{who}", {"n": turn * each + number}, number)
    audit.flush()
audit.shutdown()
"""


class Follow:
    """A running `log --follow` whose output is collected in a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.out = folder / "follow.out"
        self.err = folder / "follow.err"
        command = [
            *(sys.executable, "-m", "mxcp_audit", "log", "-f", "--db", str(folder / "log.duckdb")),
            *options,
        ]
        environment = child_environment(MXCP_AUDIT_ENGINE=os.environ.get("MXCP_AUDIT_ENGINE", ""))
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def events(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(SAFETY_SECONDS)


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[..., Follow]]:
    """Return a function that starts a follower and waits until it follows."""
    running: list[Follow] = []

    def start(*options: str) -> Follow:
        one = Follow(tmp_path, *options)
        running.append(one)
        # It is known to follow once it shows an event that was logged after its start.
        if "--json" in options and "--limit" not in options:  # options must let the probe through
            with AuditLogger(tmp_path / "log.duckdb") as audit:
                wait_until(lambda: probe(audit, one))
        return one

    yield start
    for one in running:
        one.stop()
        print(one.err.read_text(), file=sys.stderr)  # for whoever looks into a failure


def probe(audit: AuditLogger, one: Follow) -> bool:
    audit.log_event("cli", "tool", "probe", None, 10**9)
    audit.flush()
    time.sleep(0.2)
    assert one.process.poll() is None, one.err.read_text()
    return bool(one.out.read_text())


def write(folder: Path, who: int, rounds: int, each: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder / "log.duckdb"), str(who), str(rounds), str(each)],
        env=child_environment(MXCP_AUDIT_ENGINE=os.environ.get("MXCP_AUDIT_ENGINE", "")),
    )


def test_follow_four_writers_that_ingest_shows_each_event_once(
    engine: str, tmp_path: Path, follow: Callable[..., Follow]
) -> None:
    one = follow("--json")
    rounds, each = 3, 20
    writers = [write(tmp_path, who, rounds, each) for who in range(4)]
    assert [writer.wait(SAFETY_SECONDS) for writer in writers] == [0] * 4
    expected = sorted((f"w{who}", n) for who in range(4) for n in range(rounds * each))

    def shown() -> list[tuple[str, int]]:
        return sorted(
            (event["name"], json.loads(event["input_json"])["n"])
            for event in one.events()
            if event["name"] != "probe"
        )

    wait_until(lambda: len(shown()) >= len(expected))
    time.sleep(1)  # for repetitions, if there were any
    assert shown() == expected
    assert one.stop() == 130
    assert one.err.read_text() == ""


def test_follow_short_lived_writers_shows_what_came_and_went(
    engine: str, tmp_path: Path, follow: Callable[..., Follow]
) -> None:
    """A segment that was made and ingested between two looks is found by the ledger alone."""
    one = follow("--json", "--tool", "brief*", "--tool", "probe")
    audit = AuditLogger(tmp_path / "log.duckdb")
    for number in range(6):
        audit.log_event("cli", "tool", f"brief{number}")
        audit.log_event("cli", "tool", "other")
        audit.flush()
    audit.shutdown()
    wait_until(lambda: len([e for e in one.events() if e["name"] != "probe"]) >= 6)
    names = [event["name"] for event in one.events() if event["name"] != "probe"]
    assert sorted(names) == sorted(f"brief{number}" for number in range(6))


def test_follow_without_a_log_waits_for_the_first_event(
    engine: str, tmp_path: Path, follow: Callable[..., Follow]
) -> None:
    one = follow()
    wait_until(lambda: "waiting for the first event" in one.err.read_text())
    with AuditLogger(tmp_path / "log.duckdb") as audit:
        audit.log_event("http", "tool", "very_first", {"a": 1}, 3)
    wait_until(lambda: "very_first" in one.out.read_text())
    assert one.out.read_text().splitlines()[0].startswith("TIME (UTC)")


@pytest.mark.parametrize("form", [("--json",), ("--format", "jsonl")])
def test_follow_with_limit_shows_the_past_first_and_nothing_twice(
    tmp_path: Path, logger: AuditLogger, follow: Callable[..., Follow], form: tuple[str, ...]
) -> None:
    for number in range(5):
        logger.log_event("cli", "tool", f"past{number}")
    logger.flush()
    logger.log_event("cli", "tool", "past5")
    one = follow("--limit", "3", *form, "--tool", "*", "--grep", "p", "--type", "tool")
    wait_until(lambda: len(one.events()) == 3)
    logger.log_event("cli", "tool", "past_is_over")
    logger.flush()
    wait_until(lambda: any(event["name"] == "past_is_over" for event in one.events()))
    names = [event["name"] for event in one.events()]
    assert names == ["past3", "past4", "past5", "past_is_over"]


def test_follow_reader_goes_away_ends_without_an_event(tmp_path: Path, logger: AuditLogger) -> None:
    logger.log_event("cli", "tool", "one")
    logger.flush()
    command = [sys.executable, "-m", "mxcp_audit", "log", "-f", "--limit", "5", "--db", "log.duckdb"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=child_environment(), **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"TIME")
    process.stdout.close()
    assert process.wait(SAFETY_SECONDS) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_follow_idle_costs_less_than_a_hundredth_of_a_core(
    tmp_path: Path, logger: AuditLogger, follow: Callable[..., Follow]
) -> None:
    """Counted in looks, each of which opens no file: time itself would be measured on a noisy machine."""
    logger.log_event("cli", "tool", "one")
    logger.flush()
    store = Store(config_from_arguments(tmp_path / "log.duckdb"))
    opened: list[str] = []
    follower = Follower(store, Filter())
    with store.reading() as reading:
        follower.start(reading)
    time.sleep(0.2)  # a file that changed just now is looked at twice
    follower.look()
    store.target.open_engine = lambda **_: opened.append("opened")  # type: ignore[method-assign, return-value]
    begun = time.process_time()
    for _ in range(100):
        assert follower.look() == []
    assert opened == []
    assert (time.process_time() - begun) / 100 < 0.4 * 0.01  # a look of 4 ms every 0.4 s is one hundredth


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(config_from_arguments(tmp_path / "log.duckdb"))


def started(store: Store, what: Filter = Filter()) -> Follower:  # noqa: B008 - it is frozen
    follower = Follower(store, what)
    with store.reading() as reading:
        follower.start(reading)
    return follower


def names(rows: list[Any]) -> list[str]:
    return [row[3] for row in rows]


def test_follower_segment_read_in_part_takes_the_rest_from_the_table(
    engine: str, logger: AuditLogger, store: Store
) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = started(store)
    assert logger.wait_written(10)  # nothing is ingested between
    for number in range(3):
        logger.log_event("cli", "tool", f"a{number}")
    logger.wait_written(10)
    first = names(follower.look())
    logger.log_event("cli", "tool", "b")
    logger.shutdown()
    assert not store.journal.segments()
    assert first + names(follower.look()) == ["a0", "a1", "a2", "b"]
    assert follower.look() == []
    follower.close()


def test_follower_look_that_fails_loses_no_line_that_it_read(
    logger: AuditLogger, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = started(store)

    def fail() -> None:
        raise QueryError("the disk is gone")

    logger.log_event("cli", "tool", "new")
    assert logger.wait_written()
    with monkeypatch.context() as patched:
        patched.setattr(follower, "_new_table_rows", fail)
        patched.setattr(store.target, "signature", lambda: None)
        with pytest.raises(QueryError):
            follower.look()
    assert names(follower.look()) == ["new"]
    follower.close()


def test_follower_behind_a_database_that_others_hold_does_not_spin(logger: AuditLogger, store: Store) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = started(store)
    logger.log_event("cli", "tool", "new")
    logger.shutdown()
    assert names(follower.look()) == ["new"] and follower.is_behind  # more may be in the ledger
    with held_database(Path(store.target.path)):
        assert follower.look() == [] and not follower.is_behind
    assert follower.look() == [] and not follower.is_behind
    follower.close()


def test_follower_half_written_line_waits_for_its_end(
    tmp_path: Path, logger: AuditLogger, store: Store
) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = started(store)
    segment = store.journal.open_segment()
    line = journal_line("x", 1)
    with open(segment.path, "ab") as file:
        file.write(line[:50])
        file.flush()
        assert follower.look() == []
        file.write(line[50:] + b"no JSON\n")
        file.flush()
        assert names(follower.look()) == ["x"]
    assert follower.look() == []
    segment.seal()


def test_follower_database_locked_goes_on_with_the_journal(
    tmp_path: Path, logger: AuditLogger, store: Store
) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = started(store)
    with held_database(tmp_path / "log.duckdb"):
        logger.log_event("cli", "tool", "new")
        logger.wait_written(10)
        assert names(follower.look()) == ["new"]
    logger.shutdown()
    assert follower.look() == []
    follower.close()


def test_follower_started_while_locked_shows_what_is_ingested_later(
    tmp_path: Path, logger: AuditLogger, store: Store
) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    follower = Follower(store, Filter())
    with held_database(tmp_path / "log.duckdb"), store.reading(wait=0) as reading:
        assert reading.problem is not None
        follower.start(reading)
    with AuditLogger(tmp_path / "log.duckdb") as audit:
        audit.log_event("cli", "tool", "came_and_went")
    assert not store.journal.segments()
    assert names(follower.look()) == ["came_and_went"]
    follower.close()


def test_follow_says_once_what_is_in_the_way_and_goes_on(tmp_path: Path, logger: AuditLogger) -> None:
    logger.log_event("cli", "tool", "old")
    logger.flush()
    with held_database(tmp_path / "log.duckdb"):
        one = Follow(tmp_path, "--json", "--wait", "0")
        wait_until(lambda: "only events of the journal are shown" in one.err.read_text())
    whole = (tmp_path / "log.duckdb").read_bytes()
    (tmp_path / "log.duckdb").write_bytes(b"garbage" * 3000)
    wait_until(lambda: "new events may be missing" in one.err.read_text())
    logger.log_event("cli", "tool", "new")
    logger.wait_written(10)
    time.sleep(1)  # for some more looks, which fail alike
    (tmp_path / "log.duckdb").write_bytes(whole)
    wait_until(lambda: [event["name"] for event in one.events()] == ["new"])
    assert one.stop() == 130
    assert one.err.read_text().count("new events may be missing") == 1
