"""Kill purge, archive, backup, restore and compact by SIGKILL at each write-type system call (needs strace).

    python tools/torture_evidence.py [purge|archive|backup|restore|compact …]
    python tools/torture_evidence.py sequences [COUNT]     random sequences of all of them, some killed

After each kill: the log verifies, each event is there once (or was purged, as the ledger says), a backup
or archive is absent or whole, and the same command then succeeds. Prints how many calls were tried.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from evidence import DAY_NS, START_NS, ingest, moment, store_of, write_segment  # noqa: E402

import mxcp_audit as m  # noqa: E402

CALLS = (
    "write pwrite64 writev pwritev fsync fdatasync ftruncate fallocate rename renameat renameat2 link linkat "
    "unlink unlinkat mkdir mkdirat rmdir chmod fchmod fchmodat chown fchown fchownat"
)
BEFORE = moment(START_NS + 2 * DAY_NS + 90 * 10**9)
OPERATIONS = {
    "purge": ["purge", "--older-than", BEFORE.replace(" ", "T") + "Z"],
    "archive": ["purge", "--older-than", BEFORE.replace(" ", "T") + "Z", "--archive", "archive"],
    "backup": ["backup", "backup.duckdb"],
    "restore": ["restore", "old.duckdb"],
    "compact": ["compact"],
}


def make_template(folder: Path, operation: str = "") -> set[tuple[str, int]]:
    """Make a log of five segments, one of them still in the journal, and return its events.

    For `restore`, the first two are only in old.duckdb, a backup.
    """
    database = folder / "log.duckdb"
    events = set()
    for number in range(5):
        segment = write_segment(database, START_NS + number * DAY_NS, 4)
        events |= {(segment, seq) for seq in range(1, 5)}
        if number < 4:
            ingest(database)
        if number == 1 and operation == "restore":
            store_of(database).backup(str(folder / "old.duckdb"))
            database.unlink()
    return events


def strace(folder: Path, arguments: list[str], options: list[str]) -> subprocess.CompletedProcess[str]:
    # One processor: DuckDB then works in one thread, so that the n-th call is always the same.
    command = ["strace", "-f", "-o", str(folder / "trace"), *options]
    program = [sys.executable, "-m", "mxcp_audit", arguments[0], "--db", "log.duckdb", *arguments[1:]]
    # No bytecode is written for the same reason; what a killed process leaves in TMPDIR goes with the rest.
    changes = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}
    return subprocess.run(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command, *program],
        cwd=folder,
        env={**os.environ, **changes},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def kill_points(template: Path, arguments: list[str]) -> list[tuple[str, int]]:
    """Return each write-type call of an undisturbed run, as its name and number."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(template, folder, dirs_exist_ok=True)
        done = strace(folder, arguments, ["-e", "trace=" + ",".join(CALLS.split())])
        assert done.returncode == 0, done.stderr
        counts: Counter[tuple[str, str]] = Counter()
        for line in (folder / "trace").read_text().splitlines():
            match = re.match(r"(\d+) +(\w+)\(", line)
            if match:
                counts[match[1], match[2]] += 1
    most: dict[str, int] = {}
    for (_, call), count in counts.items():  # strace counts for each thread
        most[call] = max(count, most.get(call, 0))
    return [(call, number) for call, count in sorted(most.items()) for number in range(1, count + 1)]


def events_of(database: Path) -> list[tuple[str, int]]:
    with store_of(database).reading() as reading:
        both = "(FROM sound_logs UNION ALL BY NAME FROM journal_rows)"
        rows = reading.engine.execute(f"SELECT segment::VARCHAR, seq::BIGINT FROM {both}")
        return [(segment, seq) for segment, seq in rows]


def check(folder: Path, operation: str, events: set[tuple[str, int]]) -> None:
    """Raise AssertionError if anything is lost, doubled, half done or not provable."""
    database = folder / "log.duckdb"
    verdict = store_of(database).verify()
    assert verdict.intact, verdict.findings
    found = events_of(database)
    assert len(found) == len(set(found)) and set(found) <= events
    if operation == "restore" and (folder / "old.duckdb").exists():
        found = list({*found, *events_of(folder / "old.duckdb")})
    assert len(found) + verdict.purged == len(events), (len(found), verdict.purged)
    archives = [path for path in folder.glob("archive/*") if path.name.startswith("purged-")]
    for archive in archives:
        manifest = json.loads((archive / "manifest.json").read_text())
        for file in manifest["files"]:
            assert m.file_digest(str(archive / file["name"])) == file["sha256"]
        assert sum(file["events"] for file in manifest["files"]) == manifest["events"]
    if operation == "archive" and verdict.purged:
        assert len(archives) >= 1, "purged, but not archived"
    copy = folder / "backup.duckdb"
    if copy.exists():
        assert store_of(copy).verify().intact
        assert set(events_of(copy)) == events


def torture(operation: str, *, sample: int | None = None) -> int:
    """Kill an operation at each call, or at random ones until `sample` kills happened; return how many did.

    A run makes a few calls more or fewer than another, so that not each kill finds its call.
    """
    arguments = OPERATIONS[operation]
    kills = 0
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template"
        template.mkdir()
        events = make_template(template, operation)
        points = kill_points(template, arguments)
        for call, number in points if sample is None else random.sample(points, len(points)):
            if kills == sample:
                break
            folder = Path(name) / "run"
            shutil.copytree(template, folder)
            options = ["-e", f"inject={call}:signal=KILL:when={number}"]
            done = strace(folder, arguments, options)
            kills += done.returncode != 0
            try:
                check(folder, operation, events)
                for path in (folder / "backup.duckdb", folder / "backup.duckdb.journal"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                again = strace(folder, arguments, ["-e", "trace=none"])
                assert again.returncode == 0, again.stderr
                (folder / "old.duckdb").unlink(missing_ok=True)
                check(folder, operation, events)
            except AssertionError as error:
                raise AssertionError(f"{operation} killed at {call} number {number}: {error}") from error
            shutil.rmtree(folder)
    return kills


def sequence(folder: Path, seed: int) -> int:
    """Do random things to a log, some of them killed; return how many. Raises AssertionError."""
    chance, database = random.Random(seed), folder / "log.duckdb"
    moments: dict[tuple[str, int], int] = {}
    limit, done, backups = 0, 0, 0
    for step in range(chance.randint(4, 7)):
        at = START_NS + step * DAY_NS
        segment = write_segment(database, at, 3)
        moments |= {(segment, seq): at for seq in range(1, 4)}
        ingest(database)
        before = chance.randrange(START_NS, at + 1)
        stamp = moment(before).replace(" ", "T") + "Z"
        operation = chance.choice(["purge", "archive", "backup", "restore", "compact"])
        if operation == "restore" and not backups:
            continue
        backups += operation == "backup"
        arguments = {
            "purge": ["purge", "--older-than", stamp],
            "archive": ["purge", "--older-than", stamp, "--archive", "archive"],
            "backup": ["backup", f"backup{backups}.duckdb"],
            "restore": ["restore", f"backup{chance.randint(1, max(1, backups))}.duckdb"],
            "compact": ["compact"],
        }[operation]
        limit = max(limit, before) if "purge" in arguments else limit
        command = [sys.executable, "-m", "mxcp_audit", arguments[0], "--db", "log.duckdb", *arguments[1:]]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.DEVNULL,
        )
        try:
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.4)
                process.kill()
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
        assert process.returncode in (0, -9) or "can't be opened" in said or "not found" in said, said
        backups -= operation == "backup" and not (folder / f"backup{backups}.duckdb").exists()
        done += 1
        verdict = store_of(database).verify()
        found = events_of(database)
        where = f"seed {seed}, step {step}, {arguments}"
        assert verdict.intact, (where, verdict.findings)
        assert len(found) == len(set(found)) and set(found) <= set(moments), where
        assert {event for event, at in moments.items() if at >= limit} <= set(found), where
    return done


def sequences(count: int) -> str:
    """Run random sequences and say what came of them."""
    done = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name:
            done += sequence(Path(name), random.randrange(2**32))
    return f"{count} sequences of {done} operations: each event there or purged, each log intact"


if __name__ == "__main__":
    if sys.argv[1:2] == ["sequences"]:
        print(sequences(int((sys.argv[2:] or ["200"])[0])))
        raise SystemExit
    for chosen in sys.argv[1:] or OPERATIONS:
        print(f"{chosen}: killed {torture(chosen)} times, nothing lost", flush=True)
