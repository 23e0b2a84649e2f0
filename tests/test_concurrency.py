"""Writers in threads and processes, a reader in a loop: every answer is whole, and nothing comes twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import Cli, child_environment, table_rows

PROCESSES, THREADS, EVENTS = 2, 4, 400  # 3,200 events in all

WRITER = f"""
import sys, threading
from mxcp_audit import AuditLogger
me, progress = sys.argv[1], open(sys.argv[2], "w")
audit = AuditLogger("log.duckdb", flush_interval=0.2)
done = [0] * {THREADS}

def work(thread):
    for number in range({EVENTS}):
        audit.log_event("cli", "tool", f"{{me}}-{{thread}}-{{number}}", {{"n": number}}, 1)
        done[thread] = number + 1
        if number % 100 == 99 and thread == 0:
            before = list(done)
            assert audit.flush(60)
            progress.write(" ".join(map(str, before)) + "\\n")
            progress.flush()

threads = [threading.Thread(target=work, args=(thread,)) for thread in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert audit.shutdown(60)
"""


def flushed(path: Path) -> list[int]:
    """Return how many events of each thread a writer has flushed for certain."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [int(word) for word in lines[-1].split()] if lines else [0] * THREADS


def test_log_in_a_loop_is_complete_and_all_is_in_the_table_once(
    tmp_path: Path, engine: str, process_cli: Cli
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(me), str(tmp_path / f"progress-{me}")],
            cwd=tmp_path,
            env=child_environment(MXCP_AUDIT_ENGINE=engine),
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(PROCESSES)
    ]
    answers = 0
    try:
        running = True
        while running:
            running = any(writer.poll() is None for writer in writers)
            must_have = [flushed(tmp_path / f"progress-{me}") for me in range(PROCESSES)]
            if not any(map(any, must_have)):
                time.sleep(0.02)
                continue
            shown = process_cli("log", "--db", "log.duckdb", "--json", "--limit", "100000")
            assert shown.returncode == 0, shown.stderr
            names = Counter(event["name"] for event in json.loads(shown.stdout))
            assert max(names.values()) == 1, names.most_common(3)
            for me, counts in enumerate(must_have):
                for thread, count in enumerate(counts):
                    missing = [n for n in range(count) if f"{me}-{thread}-{n}" not in names]
                    assert not missing, (me, thread, count, missing[:5])
            answers += 1
    finally:
        for writer in writers:
            if writer.poll() is None and sys.exc_info()[0] is not None:
                writer.kill()
        errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * PROCESSES, errors
    assert answers >= 2
    # A reader may have held the database at the very end; then the journal has kept the rest.
    assert process_cli("ingest", "--db", "log.duckdb").returncode == 0
    rows = table_rows(tmp_path / "log.duckdb", "SELECT name, count(*) FROM logs GROUP BY name")
    expected = {f"{me}-{t}-{n}" for me in range(PROCESSES) for t in range(THREADS) for n in range(EVENTS)}
    assert {name for name, _ in rows} == expected and all(count == 1 for _, count in rows)
    assert not list((tmp_path / "log.duckdb.journal").glob("*.jsonl"))
