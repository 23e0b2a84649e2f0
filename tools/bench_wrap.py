"""Measure what `wrap` adds to a call: python tools/bench_wrap.py [CALLS]

One small JSON-RPC server, once alone and once under `wrap`, answers CALLS tool calls (default 10,000) one
after the other. Printed are the median and the 99th percentile of both, and what the log holds afterwards.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import json, sys
for line in sys.stdin.buffer:
    message = json.loads(line)
    result = {"content": [{"type": "text", "text": "Hello"}], "isError": False}
    answer = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})
    sys.stdout.buffer.write(answer.encode() + b"\\n")
    sys.stdout.buffer.flush()
"""


def measure(command: list[str], calls: int) -> list[float]:
    """Return the milliseconds that each call took."""
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert server.stdin is not None and server.stdout is not None
    took = []
    for number in range(calls):
        params = {"name": "greet", "arguments": {"name": "Ada", "password": "hunter2", "number": number}}
        call = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}
        line = json.dumps(call).encode() + b"\n"
        start = time.perf_counter()
        server.stdin.write(line)
        server.stdin.flush()
        answer = server.stdout.readline()
        took.append((time.perf_counter() - start) * 1000)
        assert json.loads(answer)["id"] == number
    server.stdin.close()
    server.wait()
    return took


def main() -> int:
    """Print the figures; 1 if a call is missing in the log."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    server = [sys.executable, "-c", SERVER]
    with tempfile.TemporaryDirectory() as folder:
        database = os.path.join(folder, "log.duckdb")
        ours = [sys.executable, "-m", "mxcp_audit"]
        alone = measure(server, calls)
        wrapped = measure([*ours, "wrap", "--db", database, "--", *server], calls)
        shown = subprocess.run(
            [*ours, "log", "--db", database, "--json", "--limit", str(calls * 2)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
        )
    recorded = len(json.loads(shown.stdout))
    for name, took in (("alone", alone), ("wrapped", wrapped)):
        ordered = sorted(took)
        print(
            f"{name:8} median {statistics.median(took):.3f} ms, 99 % {ordered[len(took) * 99 // 100]:.3f} ms"
        )
    added = statistics.median(wrapped) - statistics.median(alone)
    print(f"added    median {added:.3f} ms a call; {recorded} of {calls} calls are in the log")
    return 0 if recorded == calls else 1


if __name__ == "__main__":
    raise SystemExit(main())
