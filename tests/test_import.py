"""`import`: MXCP's JSONL logs of both generations, each event once however often a file is given."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Cli, child_environment, held_database, table_rows, write_table_of_mxcp

import mxcp_audit
from mxcp_audit import AuditLogger, Importer, StoreError, config_from_arguments


def older(number: int, **changes: object) -> dict[str, object]:
    """A line as MXCP 0.1 to 0.3 writes it."""
    return {
        "timestamp": f"2025-06-01T10:00:{number % 60:02d}.{number:06d}+00:00",
        "caller": "http",
        "type": "tool",
        "name": f"t{number}",
        "input_json": json.dumps({"id": number, "password": "hunter2"}),
        "duration_ms": number,
        "policy_decision": "n/a",
        "reason": None,
        "status": "success",
        "error": None,
        **changes,
    }


def newer(number: int, **changes: object) -> dict[str, object]:
    """A line as MXCP 0.12 writes it."""
    return {
        "schema_name": "mxcp.tools",
        "schema_version": 1,
        "record_id": f"5f0c{number:04d}",
        "timestamp": f"2025-07-01T10:00:{number % 60:02d}.{number:06d}Z",
        "operation_type": "tool",
        "operation_name": f"t{number}",
        "operation_status": "success",
        "duration_ms": number,
        "caller_type": "stdio",
        "user_id": "alice",
        "session_id": "s1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "input_data": {"id": number, "password": "hunter2"},
        "output_data": [1],
        "error": None,
        "policies_evaluated": [],
        "policy_decision": None,
        "policy_reason": None,
        "business_context": {},
        "execution_events": [],
        "prev_hash": None,
        "record_hash": None,
        "signature": None,
        **changes,
    }


def write(path: Path, *lines: object, mode: str = "w") -> Path:
    with open(path, mode) as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    return path


def events(cli: Cli) -> list[dict[str, Any]]:
    shown = cli("log", "--db", "log.duckdb", "--json", "--limit", "100000")
    assert shown.returncode == 0, shown.stderr
    return list(reversed(json.loads(shown.stdout)))


def test_import_both_generations_every_field(engine: str, tmp_path: Path, cli: Cli) -> None:
    refused = older(2, policy_decision="deny", reason="no", status="error", error="refused", type="resource")
    warned = newer(
        4,
        policy_decision="warn",
        policy_reason="late",
        operation_status="error",
        error="bad",
        operation_type="prompt",
    )
    write(tmp_path / "logs-default.jsonl", older(1), refused, newer(3), warned)
    done = cli("import", "--db", "log.duckdb", "logs-default.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "logs-default.jsonl: 4 events imported\n"
    found = events(cli)
    for event in found:
        assert json.loads(event.pop("input_json")) == {"id": event["duration_ms"], "password": "[REDACTED]"}
        del event["event_id"]
        assert {event.pop(column.name) for column in mxcp_audit.NEW_COLUMNS} == {None}
    nobody = {"user_id": None, "session_id": None, "trace_id": None}
    alice = {"user_id": "alice", "session_id": "s1", "trace_id": "0af7651916cd43dd8448eb211c80319c"}
    fine = {"policy_decision": "n/a", "reason": None, "status": "success", "error": None}
    assert found == [
        {
            "timestamp": "2025-06-01T10:00:01.000001Z",
            "caller": "http",
            "type": "tool",
            "name": "t1",
            "duration_ms": 1,
            **fine,
            **nobody,
        },
        {
            **{"timestamp": "2025-06-01T10:00:02.000002Z", "caller": "http", "type": "resource"},
            **{"name": "t2", "duration_ms": 2, "policy_decision": "deny", "reason": "no"},
            **{"status": "error", "error": "refused"},
            **nobody,
        },
        {
            "timestamp": "2025-07-01T10:00:03.000003Z",
            "caller": "stdio",
            "type": "tool",
            "name": "t3",
            "duration_ms": 3,
            **fine,
            **alice,
        },
        {
            **{"timestamp": "2025-07-01T10:00:04.000004Z", "caller": "stdio", "type": "prompt"},
            **{"name": "t4", "duration_ms": 4, "policy_decision": "warn", "reason": "late"},
            **{"status": "error", "error": "bad"},
            **alice,
        },
    ]


def test_import_twice_renamed_compressed_and_grown_adds_only_what_is_new(tmp_path: Path, cli: Cli) -> None:
    log = write(tmp_path / "a.jsonl", older(1), older(1), older(2))  # two events may be alike
    assert "3 events imported" in cli("import", "--db", "log.duckdb", "a.jsonl").stderr
    again = cli("import", "--db", "log.duckdb", "a.jsonl")
    assert (again.returncode, "0 events imported, 3 known already" in again.stderr) == (0, True)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(log.read_bytes()))
    assert "0 events imported" in cli("import", "--db", "log.duckdb", "b.jsonl.gz").stderr
    write(log, older(3), newer(4), mode="a")
    assert "2 events imported, 3 known already" in cli("import", "--db", "log.duckdb", "a.jsonl").stderr
    assert "0 events imported, 5 known already" in cli("import", "--db", "log.duckdb", "a.jsonl").stderr
    assert [event["name"] for event in events(cli)] == ["t1", "t1", "t2", "t3", "t4"]


def test_import_other_file_that_begins_at_the_same_moment(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "a.jsonl", older(1))
    write(tmp_path / "b.jsonl", older(1, name="other"))
    assert cli("import", "--db", "log.duckdb", "a.jsonl", "b.jsonl").returncode == 0
    assert sorted(event["name"] for event in events(cli)) == ["other", "t1"]


def test_import_bad_lines_named_good_ones_taken(tmp_path: Path, cli: Cli) -> None:
    bad = [
        *("nonsense", "[]", '{"timestamp": "2025-06-01T10:00:00"}'),
        json.dumps(older(1, timestamp="yesterday")),
        *(json.dumps(older(1, timestamp="2025-02-30T10:00:00")), json.dumps(older(1, timestamp=None))),
        *(json.dumps(older(1, timestamp="1969-12-31T23:59:59")), "[" * 100_000),
    ]
    write(tmp_path / "a.jsonl", older(1), "", *bad, older(2))
    marked = b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes()  # as PowerShell does
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(marked)
        file.write(b'{"type": "\xff"}\n')
    done = cli("import", "--db", "log.duckdb", "a.jsonl")
    assert done.returncode == 1
    told = done.stderr.splitlines()
    for line, text in zip(
        told,
        ["Expecting value", "no JSON object", "neither type nor operation_type", "'yesterday' is no time"],
    ):
        assert text in line
    assert [line.split(" ")[0] for line in told[:-1]] == [
        f"a.jsonl:{n}:" for n in (3, 4, 5, 6, 7, 8, 9, 10, 12)
    ]
    assert told[-1] == "a.jsonl: 2 events imported; 9 faults"
    assert [event["name"] for event in events(cli)] == ["t1", "t2"]


def test_import_schema_definitions_are_no_events(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "logs_schemas.jsonl", {"schema_name": "s", "version": 1, "fields": []})
    done = cli("import", "--db", "log.duckdb", "logs_schemas.jsonl")
    assert (done.returncode, done.stderr) == (0, "logs_schemas.jsonl: 0 events imported\n")


@pytest.mark.parametrize(
    ("written", "recorded"),
    [
        ("2025-06-01T12:00:00.5+02:00", "2025-06-01T10:00:00.500000Z"),
        ("2025-06-01 10:00:00", "2025-06-01T10:00:00.000000Z"),
        ("2025-06-01T10:00:00.123456789Z", "2025-06-01T10:00:00.123456Z"),
        ("2025-06-01T05:30:00-0430", "2025-06-01T10:00:00.000000Z"),
    ],
)
def test_import_times_become_utc(written: str, recorded: str) -> None:
    found = mxcp_audit.event_of_mxcp(json.dumps(older(1, timestamp=written)).encode())
    assert found is not None
    encoder = mxcp_audit.Encoder(mxcp_audit.Redactor(), max_input_bytes=1000, clock=lambda: found[0])
    line = encoder.line("", "tool", "", "null", 0, "n/a", None, "success", None, None, None, None, ())
    assert json.loads(line + b"}")["timestamp"] == recorded


def test_import_files_that_are_none(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "a.jsonl", older(1))
    assert cli("import", "--db", "log.duckdb", "a.jsonl").returncode == 0
    database = cli("import", "--db", "other.duckdb", "log.duckdb")
    assert database.returncode == 1 and "read it as it is: log --db log.duckdb" in database.stderr
    packed = gzip.compress("".join(json.dumps(older(n)) + "\n" for n in range(2000)).encode())
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "damaged.gz").write_bytes(packed[:10] + b"\xff" * 99)
    mixed = cli("import", "--db", "other.duckdb", "absent.jsonl", "cut.gz", "damaged.gz", "a.jsonl")
    assert mixed.returncode == 1
    absent, no_events, cut, begun, damaged, nothing, good = mixed.stderr.splitlines()
    assert absent == "absent.jsonl: No such file or directory"
    assert no_events == "absent.jsonl: 0 events imported; 1 fault"
    taken = int(cut.split(":")[1])
    assert "end-of-stream marker" in cut and 500 < taken < 1500
    assert begun == f"cut.gz: {taken} events imported; 1 fault"
    assert damaged.startswith("damaged.gz: ") and nothing.startswith("damaged.gz: 0 events")
    assert good == "a.jsonl: 1 event imported"
    assert len(events(cli)) == 1
    shown = cli("log", "--db", "other.duckdb", "--json", "--limit", "9999").stdout
    assert shown.count('"name": "t') == taken + 1
    assert "Traceback" not in mixed.stderr


def importer(tmp_path: Path) -> Importer:
    return Importer(config_from_arguments(tmp_path / "log.duckdb"), on_bad_line=print, wait=5)


def names(tmp_path: Path) -> list[str]:
    rows = table_rows(tmp_path / "log.duckdb", "SELECT name FROM logs ORDER BY timestamp, segment, seq")
    return [name for (name,) in rows]


def test_import_in_parts_and_growing_in_the_middle_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "PART_EVENTS", 4)
    lines = [older(n) for n in range(23)]
    total = 0
    for end in (6, 6, 7, 23, 23):
        write(tmp_path / "a.jsonl", *lines[:end])
        new, known, _ = importer(tmp_path).take(str(tmp_path / "a.jsonl"))
        assert (new, known) == (end - total, total)
        total = end
    assert names(tmp_path) == [f"t{n}" for n in range(23)]


def test_import_copy_that_went_its_own_way_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", older(1), older(2), older(3))
    importer(tmp_path).take(str(one))
    other = write(tmp_path / "b.jsonl", older(1), older(5), older(6))
    with pytest.raises(StoreError, match="goes on differently"):
        importer(tmp_path).take(str(other))
    shorter = write(tmp_path / "c.jsonl", older(1), older(2))
    assert importer(tmp_path).take(str(shorter))[:2] == (0, 2)
    assert names(tmp_path) == ["t1", "t2", "t3"]


KILLED = """
import os, signal, sys
import mxcp_audit
from mxcp_audit import Importer, Segment, Store, config_from_arguments

mxcp_audit.PART_EVENTS = 100
where, times = sys.argv[2], int(sys.argv[3])
kind, name = {"append": (Segment, "append"), "seal": (Segment, "seal"), "ingest": (Store, "ingest")}[where]
original, calls = getattr(kind, name), [0]

def dying(self, *rest, **named):
    calls[0] += 1
    if calls[0] == times:
        if where == "append":
            os.write(self._fd, rest[0][: len(rest[0]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *rest, **named)

setattr(kind, name, dying)
config = config_from_arguments("log.duckdb")
Importer(config, on_bad_line=print, wait=5).take(sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("where", ["append 2", "seal 3", "ingest 2", "ingest 4"])
def test_import_killed_and_repeated_each_event_once(where: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *(older(n) for n in range(450)))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "a.jsonl", *where.split()],
        cwd=tmp_path,
        env=child_environment(),
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    new, known, _ = importer(tmp_path).take(str(tmp_path / "a.jsonl"))
    assert new + known == 450
    assert sorted(names(tmp_path)) == sorted(f"t{n}" for n in range(450))
    assert not list((tmp_path / "log.duckdb.journal").glob("*.jsonl"))


def test_import_into_the_log_of_a_running_server(tmp_path: Path, cli: Cli) -> None:
    with AuditLogger(tmp_path / "log.duckdb", flush_interval=0.05) as audit:
        audit.log_event("cli", "tool", "live", {}, 1)
        write(tmp_path / "a.jsonl", *(older(n) for n in range(100)))
        assert cli("import", "--db", "log.duckdb", "a.jsonl").returncode == 0
        audit.log_event("cli", "tool", "live", {}, 1)
    assert sorted(names(tmp_path)) == sorted([*(f"t{n}" for n in range(100)), "live", "live"])


def test_import_locked_database_nothing_done_exit_75(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "a.jsonl", older(1))
    cli("import", "--db", "log.duckdb", "a.jsonl")
    write(tmp_path / "a.jsonl", older(2), mode="a")
    with held_database(tmp_path / "log.duckdb"):
        done = cli("import", "--db", "log.duckdb", "--wait", "0.2", "a.jsonl")
        assert done.returncode == 75, done.stderr
    assert "1 event imported, 1 known already" in cli("import", "--db", "log.duckdb", "a.jsonl").stderr


def test_import_old_ten_column_database_is_read_and_continued(tmp_path: Path, cli: Cli) -> None:
    """What MXCP's first logger, and `mxcp log --export-duckdb`, left behind needs no import."""
    write_table_of_mxcp(tmp_path / "log.duckdb")
    assert [event["name"] for event in events(cli)] == ["old"]
    write(tmp_path / "a.jsonl", older(1))
    assert cli("import", "--db", "log.duckdb", "a.jsonl").returncode == 0
    assert [event["name"] for event in events(cli)] == ["old", "t1"]


def test_import_module_copied_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mxcp_audit.py", tmp_path / "our_audit.py")
    write(tmp_path / "a.jsonl", older(1))
    done = subprocess.run(
        [sys.executable, "-m", "our_audit", "import", "--db", "log.duckdb", "a.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=120,
    )
    assert (done.returncode, names(tmp_path)) == (0, ["t1"])
