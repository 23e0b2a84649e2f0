"""Try to make the log lose, double or tear an event; print what came of it, and fail if anything did.

    python tools/torture.py --quick     a sample of each sweep, under three minutes
    python tools/torture.py             all points, under twenty minutes
    python tools/torture.py --mutants   break the module on purpose; each break must turn a figure red

Real child processes, really killed, in real directories. What they were promised is written down by
the children; what is there is counted by `judge.py`, which shares no code with the module. A sweep
that injected nothing fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.judge import find_pythons, journal_line, judge  # noqa: E402

OURS = (sys.executable, "-m", "mxcp_audit")
LIMIT_SECONDS = 300  # for any one child; arbitrary, far beyond what any needs

# What children share. `log` measures itself; `promise` writes down what a flush has promised.
PREAMBLE = """\
import atexit, json, multiprocessing, os, random, signal, sys, threading, time
import mxcp_audit
from mxcp_audit import AuditLogger
db = sys.argv[1]
tag = sys.argv[2] if len(sys.argv) > 2 else "e"
said, worst = [], [0.0]
def log(name, **more):
    begun = time.perf_counter()
    audit.log_event("cli", "tool", f"{tag}-{name}", more or None)
    worst[0] = max(worst[0], time.perf_counter() - begun)
    said.append(f"{tag}-{name}")
def write_down():
    with open(f"{db}.said", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(name) + "\\n" for name in said))
    said.clear()
    with open(f"{db}.worst", "a") as file: file.write(f"{worst[0]}\\n")
def promise(timeout=120):
    if audit.flush(timeout): write_down(); return True
    return False
"""


@dataclass
class Figure:
    """What a sweep found."""

    name: str
    what: str
    faults: int = 0
    points: int = 0
    lost: int = 0
    doubled: int = 0
    torn: int = 0
    signals: int = 0
    exceptions: int = 0
    worst_ms: float = 0.0
    skipped: str = ""
    details: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether this must fail: a loss of any kind, or nothing tried."""
        if self.skipped:
            return False
        return bool(
            self.lost or self.doubled or self.torn or self.signals or self.exceptions or not self.points
        )

    def blame(self, text: str) -> None:
        """Keep the first few places where something went wrong."""
        if len(self.details) < 5:
            self.details.append(text)


class Torture:
    """Where and how to torture: one module, one seed, quick or whole.

    Args:
        module: the directory of the `mxcp_audit.py` under test.
        quick: sample the points.
        seed: of every random choice.
        limit: seconds that one child may take; a mutant that hangs is caught as well.
    """

    def __init__(self, module: Path, *, quick: bool, seed: int, limit: float = LIMIT_SECONDS) -> None:
        self.limit = limit
        self.module, self.quick = module, quick
        self.random = random.Random(seed)
        self.home = Path(tempfile.mkdtemp(prefix="torture-"))
        self.figure = Figure("", "")
        self._count = 0

    def database(self) -> Path:
        """Return a path that no run has used yet."""
        self._count += 1
        folder = self.home / f"{self._count}"
        folder.mkdir()
        return folder / "log.duckdb"

    def environment(self, python: str = sys.executable, **changes: str) -> dict[str, str]:
        """Return what a child gets; the other Pythons have no duckdb package: they use the program.

        Temporary files of killed children go when ours go.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MXCP_")}
        if python != sys.executable:
            changes.update(MXCP_AUDIT_ENGINE="cli", MXCP_AUDIT_DUCKDB=self._program())
        return {**kept, "PYTHONPATH": str(self.module), "TMPDIR": str(self.home), **changes}

    def _program(self) -> str:
        import mxcp_audit

        return mxcp_audit.find_program() or "no duckdb program"

    def command(self, body: str, db: Path, *args: str, python: str = sys.executable) -> list[str]:
        """Return the command that runs a script from a file, as multiprocessing needs it."""
        path = db.parent / f"script{os.urandom(4).hex()}.py"
        path.write_text(PREAMBLE + textwrap.dedent(body), encoding="utf-8")
        return [python, str(path), str(db), *args]

    def start(
        self, command: list[str], *, python: str = sys.executable, **changes: str
    ) -> subprocess.Popen[str]:
        """Start a child."""
        return subprocess.Popen(
            command,
            env=self.environment(python, **changes),
            cwd=self.module,  # `python -m` looks there first
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, command: list[str], *, python: str = sys.executable, killed: bool = False, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a child to its end; a signal that we did not send and a traceback count."""
        process = self.start(command, python=python, **changes)
        try:
            out, err = process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            self.figure.exceptions += 1
            self.figure.blame(f"hung: {command}")
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        self.look_at(done, killed=killed)
        return done

    def look_at(self, done: subprocess.CompletedProcess[str], *, killed: bool = False) -> None:
        """Count what a child must not do."""
        if done.returncode < 0 and not (killed and done.returncode == -signal.SIGKILL):
            self.figure.signals += 1
            self.figure.blame(f"signal {-done.returncode}: {done.args}")
        if "Traceback" in done.stderr and "Expected" not in done.stderr:
            self.figure.exceptions += 1
            self.figure.blame(done.stderr.strip().splitlines()[-1])

    def ingest_command(self, db: Path) -> list[str]:
        """Return the command that takes the journal in."""
        return [*OURS, "ingest", "--db", str(db)]

    def check(
        self, db: Path, expected: set[str] | None = None, *, ingest: bool = True, where: str = ""
    ) -> None:
        """Compare what is there with what was promised, then take in what is left and compare again."""
        promised = set() if expected is None else set(expected)
        said = Path(f"{db}.said")
        if said.exists():
            promised |= set(map(json.loads, said.read_text(encoding="utf-8").split("\n")[:-1]))
        with contextlib.suppress(FileNotFoundError):
            worst = max(map(float, Path(f"{db}.worst").read_text().split()), default=0.0) * 1000
            self.figure.worst_ms = max(self.figure.worst_ms, worst)
        for stage in ("as left", "ingested") if ingest else ("as left",):
            if stage == "ingested":
                self.run(self.ingest_command(db))
            verdict = judge(db)
            lost = verdict.lost(promised)
            self.figure.lost += len(lost)
            self.figure.doubled += verdict.doubled
            if stage == "ingested":
                self.figure.torn += verdict.torn
            if lost or verdict.doubled:
                self.figure.blame(
                    f"{where} {stage}: lost {len(lost)} {sorted(lost)[:2]}, doubled {verdict.doubled}"
                )

    def point(self, db: Path, where: str) -> None:
        """Count one fault at one point, check what it left, and remove it."""
        self.figure.faults += 1
        self.figure.points += 1
        self.check(db, where=where)
        self.clean(db)

    def finish(self, process: subprocess.Popen[str], said: str | None = None) -> None:
        """Let a child go on to its end, and look at that."""
        out, err = process.communicate(said, timeout=LIMIT_SECONDS)
        self.look_at(subprocess.CompletedProcess(process.args, process.returncode, out, err))

    def clean(self, db: Path) -> None:
        """Remove a run's files: thousands of runs must not fill the disk."""
        shutil.rmtree(db.parent, ignore_errors=True)


WRITING = """
audit = AuditLogger(db, flush_interval=0.05)
for batch in range(4):
    for n in range(10): log(f"{batch}-{n}")
    promise()
"""
WRITE_CALLS = "write,pwrite64,writev,fsync,fdatasync,ftruncate,unlink,rename,mkdir"


def strace(calls: str, action: str) -> list[str]:
    """Return the prefix that does `action` at system calls of the child."""
    return ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:{action}"]


@dataclass(frozen=True)
class Injection:
    """What strace does to a command, at which of its calls."""

    calls: str
    action: str
    most: int  # points of a quick run
    where: str


def calls_of(t: Torture, db: Path, command: list[str], calls: str) -> list[tuple[str, int]]:
    """Run a command unharmed, and return each of its calls as name and number: strace counts them so."""
    log = f"{db}.calls"
    prefix = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={calls}"]
    done = subprocess.run(
        [*prefix, *command], env=t.environment(), cwd=t.module, capture_output=True, timeout=LIMIT_SECONDS
    )
    if done.returncode:
        raise SystemExit(f"strace can't run the command: {done.stderr!r}")
    found: dict[tuple[str, str], int] = {}
    for line in Path(log).read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match:
            found[match[1], match[2]] = found.get((match[1], match[2]), 0) + 1
    most: dict[str, int] = {}
    for (_, name), count in found.items():
        most[name] = max(most.get(name, 0), count)
    return [(name, number) for name, count in sorted(most.items()) for number in range(1, count + 1)]


def each_call(
    t: Torture, prepare: Callable[[], Path], command: Callable[[Path], list[str]], injection: Injection
) -> None:
    """Inject at each call that the command makes, or at a sample of them; check after each."""
    db = prepare()
    points = calls_of(t, db, command(db), injection.calls)
    t.clean(db)
    if t.quick and len(points) > injection.most:
        points = sorted(t.random.sample(points, injection.most))
    for name, number in points:
        db = prepare()
        prefix = strace(name, f"{injection.action}:when={number}")
        done = t.run([*prefix, *command(db)], killed=True)
        t.figure.points += 1
        t.figure.faults += done.returncode == -signal.SIGKILL or "error=" in injection.action
        t.check(db, where=f"{injection.where} {name} {number}")
        t.clean(db)


def s1_kill_writer(t: Torture) -> None:
    """SIGKILL while events are logged"""
    for _ in range(5 if t.quick else 60):
        db = t.database()
        process = t.start(t.command(WRITING.replace("range(4)", "range(400)"), db))
        time.sleep(0.15 + t.random.random() * 0.4)
        process.kill()
        process.communicate()
        t.point(db, "random kill")
    if shutil.which("strace"):
        injection = Injection(WRITE_CALLS, "signal=KILL", 14, "call")
        each_call(t, t.database, lambda db: t.command(WRITING, db), injection)
    else:
        t.figure.details.append("no strace: only random kills")


def prepared(t: Torture, segments: int = 3, lines: int = 20) -> tuple[Path, set[str]]:
    """Return a database that isn't there yet, with a journal of sealed segments."""
    db = t.database()
    expected: set[str] = set()
    (directory := Path(f"{db}.journal")).mkdir(0o700)
    for segment in range(segments):
        names = [f"p-{segment}-{seq}" for seq in range(1, lines + 1)]
        expected.update(names)
        text = b"".join(journal_line(name, seq) for seq, name in enumerate(names, 1))
        (directory / f"20260131T12000{segment}000000Z-0000000{segment}.jsonl").write_bytes(text)
    Path(f"{db}.said").write_text("".join(json.dumps(name) + "\n" for name in sorted(expected)))
    return db, expected


def s2_kill_ingest(t: Torture) -> None:
    """SIGKILL at each write-type call of an ingest, then of its recovery"""
    if not shutil.which("strace"):
        t.figure.skipped = "no strace"
        return
    each_call(
        t, lambda: prepared(t)[0], t.ingest_command, Injection(WRITE_CALLS, "signal=KILL", 16, "ingest")
    )
    states = [("pwrite64", 2), ("rename", 2), ("write", 4), ("fdatasync", 4), ("pwrite64", 5), ("unlink", 6)]
    for name, number in t.random.sample(states, 2) if t.quick else states:

        def killed_once(name: str = name, number: int = number) -> Path:
            db, _ = prepared(t)
            t.run([*strace(name, f"signal=KILL:when={number}"), *t.ingest_command(db)], killed=True)
            return db

        recovery = Injection(WRITE_CALLS, "signal=KILL", 5, f"recovery of {name} {number}")
        each_call(t, killed_once, t.ingest_command, recovery)


ENDINGS = {
    "falls off the end": "log(1)",
    "sys.exit": "log(1); sys.exit(0)",
    "exception": "sys.excepthook = lambda *_: None; log(1); raise ValueError",
    "os._exit after flush": "log(1); promise(); os._exit(0)",
    "kill after flush": "log(1); promise(); os.kill(os.getpid(), signal.SIGKILL)",
    "exec after flush": "log(1); promise(); os.execv(sys.executable, [sys.executable, '-c', ''])",
    "SIGTERM handler": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
log(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)""",
    "SIGINT": """
try: log(1); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
except KeyboardInterrupt: log(2)""",
    "exit handler": "atexit.register(lambda: (log(2), write_down())); log(1)",
    "first in exit handler": "atexit.register(lambda: (log(1), write_down()))",
    "thread after main": "threading.Thread(target=lambda: (time.sleep(0.1), log(1), write_down())).start()",
    "daemon thread": """
t = threading.Thread(target=lambda: [log(n) for n in range(50)], daemon=True); t.start(); t.join()""",
    "closed twice": "log(1); audit.close(); audit.close(); log(2)",
    "fork, child exits": """
log(1)
if os.fork() == 0: tag = 'c'; said.clear(); log(2); write_down(); sys.exit(0)
os.wait()""",
    "multiprocessing fork": """
log(1)
def work(): log(2)
p = multiprocessing.get_context('fork').Process(target=work); p.start(); p.join()
said.append(f'{tag}-2')""",
    "durable then kill": """
audit = AuditLogger(db, durable=True)
log(1); write_down(); os.kill(os.getpid(), signal.SIGKILL)""",
    "stdout closed": "sys.stdout.close(); sys.stderr.close(); log(1)",
}


def s3_endings(t: Torture) -> None:
    """every way that a program can end, on every Python"""
    for python in find_pythons().values():
        few = t.quick and python != sys.executable
        for name, body in t.random.sample(list(ENDINGS.items()), 3) if few else ENDINGS.items():
            db = t.database()
            script = "audit = AuditLogger(db)\n" + body + "\nwrite_down()"
            if "atexit" not in body and "flush" not in name and "kill" not in name:
                script = "audit = AuditLogger(db)\natexit.register(lambda: said and write_down())\n" + body
            done = t.run(
                t.command(script, db, python=python),
                python=python,
                killed="kill" in name,
                MXCP_AUDIT_ENGINE="package",
            )
            if done.returncode not in (0, 1, -signal.SIGKILL, 120):
                t.figure.exceptions += 1
                t.figure.blame(f"{python} {name}: exit {done.returncode} {done.stderr[-200:]}")
            if not Path(f"{db}.said").exists():
                t.figure.exceptions += 1
                t.figure.blame(f"{python} {name}: never said a word")
            t.figure.faults += 1
            t.figure.points += 1
            t.check(db, ingest=python == sys.executable, where=f"{python} {name}")
            t.clean(db)


FAULTY = """
import logging; logging.disable()
import errno
call, number, code = sys.argv[3], int(sys.argv[4]), sys.argv[5]
lasting, durable = sys.argv[6] == "1", sys.argv[7] == "1"
true, count, on = getattr(os, call), [0], [True]
def faulty(first, *rest, **options):
    if call in ("open", "unlink", "mkdir"): mine = isinstance(first, str) and ".journal" in first
    else: mine = threading.current_thread() is not threading.main_thread()
    if not (on[0] and mine): return true(first, *rest, **options)
    count[0] += 1
    if count[0] > 3: time.sleep(0.006)  # a slow disk: lines come meanwhile
    if count[0] == number or lasting and count[0] > number:
        if code != "short": raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        part = true(first, bytes(rest[0])[: max(1, len(rest[0]) // 2)])
        if count[0] % 2: raise OSError(errno.ENOSPC, "no space after a short write")
        return part
    return true(first, *rest, **options)
interval = 0.5 if code == "short" else 0.02  # short writes into a segment that holds lines already
audit = AuditLogger(db, flush_interval=interval, durable=durable)
setattr(os, call, faulty)
if lasting and durable: threading.Timer(0.4, lambda: on.__setitem__(0, False)).start()
for n in range(40): log(n, text="x" * 100); time.sleep(0.005)  # several writes
if lasting: audit.flush(0.2); on[0] = False
assert promise(), audit.counters
"""


def s4_disk_errors(t: Torture) -> None:
    """ENOSPC, EIO, EROFS, EMFILE and short writes at the N-th call, once and for ever"""
    trials = [
        (call, code, number, lasting, durable)
        for call, codes in (
            ("write", ("ENOSPC", "EIO", "short")),
            ("open", ("EMFILE", "EROFS", "ENOSPC")),
            ("ftruncate", ("EIO",)),
            ("fsync", ("EIO",)),
            ("unlink", ("EIO", "EROFS")),
        )
        for code in codes
        for number in (1, 2, 3, 4, 5)
        for lasting in (False, True)
        for durable in (False, True)
    ]
    chosen = t.random.sample(trials, 12) if t.quick else trials
    chosen += [("write", "short", number, False, False) for number in (1, 3)] if t.quick else []
    for call, code, number, lasting, durable in chosen:
        db = t.database()
        t.run(t.command(FAULTY, db, "e", call, str(number), code, str(int(lasting)), str(int(durable))))
        t.point(db, f"{call} {code} {number} lasting={lasting} durable={durable}")
    if shutil.which("strace"):
        for code in ("ENOSPC",) if t.quick else ("ENOSPC", "EIO", "EROFS"):
            injection = Injection("pwrite64,ftruncate", f"error={code}", 4, code)
            each_call(t, lambda: prepared(t)[0], t.ingest_command, injection)


def s5_failed_fsync(t: Torture) -> None:
    """fsync fails, in the journal and in the database"""
    for number in (1, 2) if t.quick else range(1, 9):
        for lasting in "01":
            db = t.database()
            t.run(t.command(FAULTY, db, "e", "fsync", str(number), "EIO", lasting, "1"))
            t.point(db, f"journal fsync {number}")
    if shutil.which("strace"):
        injection = Injection("fsync,fdatasync", "error=EIO", 4, "database")
        each_call(t, lambda: prepared(t)[0], t.ingest_command, injection)


FULL_DISK = """
import logging; logging.disable()
audit = AuditLogger(db, flush_interval=0.05)
for n in range(10000): log(n, text=os.urandom(200).hex())
print(audit.flush(1), flush=True); sys.stdin.readline()
assert promise()
"""


def s6_full_disk(t: Torture) -> None:
    """a disk that is full, then has space again"""
    for size in ("300k",) if t.quick else ("100k", "300k", "1m", "3m"):
        db = t.database()
        disk = db.parent / "disk"
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True
        ).returncode:
            t.figure.skipped = "can't mount a tmpfs"
            return
        try:
            inside = disk / "log.duckdb"
            process = t.start(t.command(FULL_DISK, inside))
            assert process.stdout is not None
            full = process.stdout.readline() == "False\n"
            t.figure.faults += full
            t.figure.points += 1
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
            t.finish(process, "\n")
            t.check(inside, where=f"full disk {size}")
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        t.clean(db)


FORKS = """
audit = AuditLogger(db, flush_interval=0.01)
stop = False; counts = [0, 0, 0]
def work(thread):
    while not stop:
        log(f"{thread}-{counts[thread]}"); counts[thread] += 1; time.sleep(0.001)
threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
for thread in threads: thread.start()
for child in range(int(sys.argv[3])):
    pid = os.fork()
    if pid == 0:
        tag = f"c{child}"; said.clear()
        for n in range(2): log(n)
        if child % 3 == 0: promise(); os._exit(0)
        if child % 3 == 1: promise(); log("last"); write_down(); sys.exit(0)
        write_down(); sys.exit(0)
    if child % 20 == 0: time.sleep(0.02)
    assert os.waitpid(pid, 0)[1] == 0, child
stop = True
for thread in threads: thread.join()
assert promise()
"""


def s7_forks(t: Torture) -> None:
    """forks while threads log and the database is used"""
    forks = 15 if t.quick else 100
    for _ in range(1 if t.quick else 10):
        db = t.database()
        t.run(t.command(FORKS, db, "p", str(forks)))
        t.figure.faults += forks
        t.figure.points += forks
        t.check(db, where="forks")
        t.clean(db)


def s8_many_writers(t: Torture) -> None:
    """1, 8 and 32 writers with three readers"""
    for writers in (1, 8) if t.quick else (1, 8, 32):
        db = t.database()
        body = """
            audit = AuditLogger(db, flush_interval=0.03)
            for n in range(int(sys.argv[3])): log(n); time.sleep(0.001)
            assert promise()
        """
        count = "400" if t.quick else "1500"
        children = [t.start(t.command(body, db, f"w{n}", count)) for n in range(writers)]
        command = [*OURS, "log", "--db", str(db), "--json", "--limit", "100000", "--wait", "60"]
        readers = [threading.Thread(target=keep_reading, args=(t, command, children)) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        for child in children:
            t.finish(child)
            t.point(db, f"{writers} writers")


def keep_reading(t: Torture, command: list[str], children: list[subprocess.Popen[str]]) -> None:
    """Check that readers see no event twice; what they print is read at once, or they hold their lock."""
    while any(child.poll() is None for child in children):
        done = t.run(command)
        t.figure.faults += 1
        if done.returncode == 0:
            names = [event["name"] for event in json.loads(done.stdout)]
            t.figure.doubled += len(names) - len(set(names))
        elif "not found" not in done.stderr:  # before the first event
            t.figure.exceptions += 1
            t.figure.blame(f"reader: exit {done.returncode} {done.stderr[-300:]}")


HOLD = "; print('held', flush=True); sys.stdin.read()"
HOLDERS = {
    "writer": "import duckdb, sys; c = duckdb.connect(sys.argv[1])" + HOLD,
    "reader": "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True)" + HOLD,
    "ingest lock": "import fcntl, sys; f = open(sys.argv[1] + '.journal/ingest.lock', 'w'); fcntl.flock(f, 2)"
    + HOLD,
}


LOCKS = """
import logging; logging.disable()
audit = AuditLogger(db, flush_interval=0.02)
for n in range(100): log(n); time.sleep(0.002)
while audit.counters.written < 100: time.sleep(0.01)
write_down(); print("half", flush=True); sys.stdin.readline()
for n in range(100, 200): log(n)
promise()
"""


def s9_locks(t: Torture) -> None:
    """the database held by a writer, a reader, a stopped owner"""
    for name, code in HOLDERS.items():
        for stopped in (False, True):
            db, _ = prepared(t, 1)
            t.run(t.ingest_command(db))
            holder = subprocess.Popen(
                [sys.executable, "-c", code, str(db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            if stopped:
                holder.send_signal(signal.SIGSTOP)
            process = t.start(t.command(LOCKS, db))
            assert process.stdout is not None
            process.stdout.readline()
            t.figure.faults += 1
            t.figure.points += 1
            if name != "writer":
                t.check(db, ingest=False, where=f"held by {name}")
            holder.kill()
            holder.wait()
            t.finish(process, "\n")
            t.check(db, where=f"after {name}")
            t.clean(db)


def damage(t: Torture, data: bytes, how: str) -> tuple[bytes, int, int]:
    """Return damaged data, and from where to where it differs."""
    at = t.random.randrange(1, len(data))
    if how == "cut":
        return data[:at], at, len(data)
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], at, at + 1
    end = min(len(data), at + 512)
    return data[:at] + bytes(end - at) + data[end:], at, end


def s10_damage(t: Torture) -> None:
    """segments, WAL and database cut, flipped and zeroed"""
    for number in range(12 if t.quick else 240):
        how = ("cut", "flip", "zero")[number % 3]
        what = ("segment", "wal", "database")[number // 3 % 3]
        db, expected = prepared(t)
        if what == "segment":
            path = sorted(Path(f"{db}.journal").glob("*.jsonl"))[1]
            data, start, end = damage(t, path.read_bytes(), how)
            position = 0
            for line in path.read_bytes().splitlines(keepends=True):
                if position <= end and position + len(line) > start:  # at `end`: glued to a damaged line
                    expected.discard(json.loads(line)["name"])
                position += len(line)
            path.write_bytes(data)
        elif what == "database":
            t.run(t.ingest_command(db))
            db.write_bytes(damage(t, db.read_bytes(), how)[0])
            expected = set()
            t.run(t.command("import logging; logging.disable(); audit = AuditLogger(db); log(1)", db))
        elif shutil.which("strace"):
            # Kill at the checkpoint, so that a WAL is left, and damage it: the segments must still be there.
            t.run(
                [*strace("pwrite64", f"signal=KILL:when={4 + number % 4}"), *t.ingest_command(db)],
                killed=True,
            )
            wal = Path(f"{db}.wal")
            if wal.exists() and wal.stat().st_size > 1:
                wal.write_bytes(damage(t, wal.read_bytes(), how)[0])
                try:
                    judge(db)
                except Exception:  # whatever DuckDB says of it; the error's remedy is to move the WAL aside
                    wal.unlink()
        t.figure.faults += 1
        t.figure.points += 1
        Path(f"{db}.said").unlink()
        if what != "database":
            t.run(t.ingest_command(db))
            verdict = judge(db)
            lost = verdict.lost(expected)
            t.figure.lost += len(lost)
            t.figure.doubled += verdict.doubled
            if lost or verdict.doubled:
                t.figure.blame(f"{what} {how} {number}: lost {sorted(lost)[:3]}, doubled {verdict.doubled}")
        t.clean(db)


HOSTILE_INPUT = """
import logging; logging.disable()
audit = AuditLogger(db, flush_interval=0.02)
class Evil:
    def __repr__(self): raise ValueError
    def __getattr__(self, name): raise RuntimeError(name)
loop = {}; loop["me"] = loop
deep = []
for _ in range(5000): deep = [deep]
forged = 'x\\n{"timestamp":"2026-01-31T12:00:00.000000Z","name":"forged","seq":1}\\n'
hostile = [
    Evil(), loop, deep, "\\ud83d", "\\0", forged, 10**5000, float("nan"), b"\\xff\\n", {1: 1, "1": 2},
    {"a" * 10**6: 1}, "x" * 3 * 10**6, {Evil: Evil()}, {("a",): object()}, "\\x1b[2J",
    "'; DROP TABLE logs; --", "$name", "\\r\\n",
]
def poke(value):
    audit.log_event(value, value, f"{tag}-h{n}", *[value] * 6, None, *[value] * 3)
for n in range(int(sys.argv[3])):
    log(n); poke(hostile[n % len(hostile)])
assert promise()
"""


def s12_hostile_input(t: Torture) -> None:
    """hostile input between good events"""
    db = t.database()
    rounds = 40 if t.quick else 400
    t.run(t.command(HOSTILE_INPUT, db, "e", str(rounds)))
    t.figure.faults += rounds
    t.figure.points += rounds
    t.check(db, where="hostile input")
    for n, line in enumerate(
        [
            b"\x00" * 50,
            b"{",
            b"[]",
            b'"x"',
            b"\xff\xfe",
            b'{"seq":1e400}',
            b'{"seq":99999999999}',
            b"null",
            b"{}" * 999,
        ]
    ):
        bad, expected = prepared(t)
        path = sorted(Path(f"{bad}.journal").glob("*.jsonl"))[1]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:9], line + b"\n", *lines[9:]]))
        t.figure.faults += 1
        t.figure.points += 1
        t.check(bad, expected, ingest=False) if n == -1 else t.run(t.ingest_command(bad))
        verdict = judge(bad)
        t.figure.lost += len(verdict.lost(expected))
        t.figure.doubled += verdict.doubled
        t.clean(bad)
    t.clean(db)


LIMITS = """
import logging, resource; logging.disable()
import signal, tempfile, ctypes
audit = AuditLogger(db, flush_interval=0.05)
kind = getattr(resource, sys.argv[3]); old = resource.getrlimit(kind)
if sys.argv[3] != "RLIMIT_NOFILE": audit.flush(1)
resource.setrlimit(kind, (int(sys.argv[4]), old[1]))
for n in range(500): log(n, text="x" * 200)
audit.flush(1)
resource.setrlimit(kind, old)
for n in range(500, 600): log(n)
assert promise(), audit.counters
"""


NO_THREADS = """
import logging; logging.disable()
start, count = threading.Thread.start, [0]
def denied(self):
    count[0] += 1
    if count[0] <= int(sys.argv[3]) * 20: raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = denied
audit = AuditLogger(db)
for n in range(100): log(n)
assert promise()
"""


def s13_limits(t: Torture) -> None:
    """limits of descriptors, processes, memory and file sizes"""
    limits = [
        ("RLIMIT_NOFILE", 3),
        ("RLIMIT_NOFILE", 12),
        ("RLIMIT_FSIZE", 50_000),
        ("RLIMIT_FSIZE", 2_000_000),
        ("RLIMIT_AS", 400 * 2**20),
    ]
    for name, value in limits:
        db = t.database()
        t.run(t.command(LIMITS, db, "e", name, str(value)))
        t.point(db, f"{name} {value}")
    for program, when in (("no threads", "1"), ("no threads later", "3")):
        db = t.database()
        t.run(t.command(NO_THREADS, db, "e", when))
        t.point(db, program)


CLOCK = """
true_time, offset = time.time_ns, [0]
audit = AuditLogger(db, flush_interval=0.02)
def clock(): return 0 if offset[0] is None else true_time() + offset[0]
audit._encoder._clock = audit._writer._appender.journal._clock = clock
for step, offset[0] in enumerate([0, -86400 * 10**9, 86400 * 3650 * 10**9, None, -3600 * 10**9, 0]):
    for n in range(50): log(f"{step}-{n}"); time.sleep(0.002)
    assert promise()
"""


def s14_clock(t: Torture) -> None:
    """a clock that steps back, ahead and stands still"""
    db = t.database()
    t.run(t.command(CLOCK, db))
    t.figure.faults += 5
    t.figure.points += 6
    t.check(db, where="clock")
    t.clean(db)


OVERLOAD = """
import logging; logging.disable()
mxcp_audit.QUEUE_BYTES = 100_000
audit = AuditLogger(db, on_full=sys.argv[3])
def work(thread):
    for n in range(int(sys.argv[4])):
        audit.log_event("cli", "tool", f"{tag}-{thread}-{n}", {"text": "x" * 100})
threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
with audit._writer._writing:  # a disk that stands still until the queue has been full
    for thread in threads: thread.start()
    while not audit.counters.errors: time.sleep(0.001)
for thread in threads: thread.join()
assert promise()
"""


def s15_overload(t: Torture) -> None:
    """more events than the queue takes: none lost, or the exact number on record"""
    events = 4000 if t.quick else 60000
    for on_full in ("block", "drop"):
        db = t.database()
        t.run(t.command(OVERLOAD, db, "e", on_full, str(events // 8)))
        t.run(t.ingest_command(db))
        verdict = judge(db)
        missing = events - verdict.in_table - verdict.losses
        t.figure.lost += abs(missing)
        t.figure.doubled += verdict.doubled
        if missing or on_full == "block" and verdict.losses or on_full == "drop" and not verdict.losses:
            t.figure.lost += 1
            t.figure.blame(
                f"{on_full}: {events} logged, {verdict.in_table} stored, {verdict.losses} recorded as lost"
            )
        t.figure.faults += 1
        t.figure.points += 1
        t.clean(db)


RUNNING = """
import threading
def slowly(*given, real=mxcp_audit.Begun.write, **more):
    time.sleep(0.005)  # a slow disk: what doesn't wait for it shows
    return real(*given, **more)
mxcp_audit.Begun.write = slowly
audit = AuditLogger(db, flush_interval=1, strict=True, durable="durable" in tag)
bodies = os.open(db + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
synced = os.open(db + ".synced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def fsync(fd, real=os.fsync):
    real(fd)
    held = os.fstat(fd)
    os.write(synced, f"{held.st_ino} {held.st_size}\\n".encode())
os.fsync = fsync
def work(thread):
    for n in range(10**9):
        name = f"{tag}-{thread}-{n}"
        with audit.record("tool", name, {"n": n}):
            os.write(bodies, (json.dumps(name) + "\\n").encode())
            time.sleep((0, 0.001, 0.05, 0.3)[n % 4])
for thread in range(8): threading.Thread(target=work, args=(thread,), daemon=True).start()
time.sleep(100)
"""


def s16_running_calls(t: Torture) -> None:
    """SIGKILL while strict calls run, in two processes; half of them with a power loss (durable)"""
    for number in range(8 if t.quick else 300):
        db = t.database()
        how = "durable" if number % 2 else "strict"
        children = [t.start(t.command(RUNNING, db, f"{how}{tag}")) for tag in "ab"]
        while not (Path(f"{db}.said").exists() and Path(f"{db}.said").stat().st_size > 1000):
            time.sleep(0.01)
        time.sleep(t.random.random() * 0.5)
        for child in children:
            child.kill()
            child.communicate()
        if how == "durable":  # of each file stays what was forced to the disk
            lines = Path(f"{db}.synced").read_text().splitlines()
            sizes = {int(inode): int(size) for inode, size in map(str.split, lines)}
            for path in Path(f"{db}.journal").iterdir():
                if path.suffix in (".jsonl", ".begun"):
                    os.truncate(path, min(path.stat().st_size, sizes.get(path.stat().st_ino, 0)))
        t.figure.faults += 1
        t.figure.points += 1
        t.run(t.ingest_command(db))
        t.check(db, where=f"running calls {how}")
        t.clean(db)


SERVING = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
audit = AuditLogger(db, flush_interval=0.2)
offset = int(os.environ.get("CLOCK", "0"))
if offset: audit._encoder._clock = audit._writer._appender.journal._clock = lambda: time.time_ns() + offset
for n in range(10**9):
    log(n)
    time.sleep(0.001)
    if n % 50 == 49: promise()
"""
STRANGER = "/usr/bin/python3"  # which every user may run
ACTS = "command command kill foreign copy full move mount clock user"
COMMANDS = ("log", "stats", "doctor", "ingest", "verify", "checkpoint", "compact", "purge --older-than 3650d")


def s17_neighbours(t: Torture) -> None:
    """what operators do beside four servers: commands, copies, moves, mounts, kills, clocks, full disks"""
    for number in range(3 if t.quick else 200):
        home = t.database().parent
        if mount(home, "size=64m"):
            t.figure.skipped = "can't mount a tmpfs"
            return
        db, journal = home / "log.duckdb", home / "log.duckdb.journal"
        acts: list[str] = []
        Path(f"{db}.said").symlink_to(t.home / f"said{number}")  # which a full disk must not cut
        servers = [t.start(t.command(SERVING, db, f"{number}{tag}")) for tag in "abcd"]
        try:
            while not Path(f"{db}.said").exists():
                time.sleep(0.02)
            for step in range(8):
                act = t.random.choice(ACTS.split())
                acts.append(act)
                if act == "command":
                    words = t.random.choice(COMMANDS).split()
                    acts[-1] = words[0]
                    command = [*OURS, *words, "--db", str(db)]
                    t.look_at(run_quietly(t, command))
                elif act in ("kill", "clock"):
                    victim = servers.pop(0)
                    victim.kill()
                    victim.communicate()
                    offset = t.random.choice((-(10**9), -86400 * 10**9, 3650 * 86400 * 10**9))
                    changes = {"CLOCK": str(offset)} if act == "clock" else {}
                    servers.append(t.start(t.command(SERVING, db, f"{number}n{step}"), **changes))
                elif act == "user":  # who may read nothing, and must break nothing
                    command = [STRANGER, "-m", "mxcp_audit", "log", "--db", str(db)]
                    if Path(STRANGER).exists():
                        t.look_at(run_quietly(t, ["setpriv", "--reuid=65534", "--clear-groups", *command]))
                elif act == "move":
                    if journal.exists():  # nobody wrote since the last move
                        journal.rename(home / f"away{step}")
                    time.sleep(t.random.random() / 2)
                elif act == "mount":
                    if journal.is_dir() and not mount(journal, "size=16m,mode=700"):
                        time.sleep(t.random.random() / 2)
                        subprocess.run(["umount", "-l", journal], check=True)
                        time.sleep(0.3)  # who is killed before he notices has his last events there
                elif act == "foreign":
                    journal.mkdir(0o700, exist_ok=True)
                    name = journal / f"20260101T00000000000{step}Z-0000000{step}.jsonl"
                    t.random.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)))(name)
                elif act == "copy":
                    copy = home / f"copy{step}"
                    command = [*OURS, "backup", str(copy), "--db", str(db)]
                    t.look_at(run_quietly(t, command))
                    copy.unlink(missing_ok=True)
                else:
                    filler = home / "filler"
                    with contextlib.suppress(OSError), open(filler, "wb") as file:
                        while True:
                            file.write(bytes(2**20))
                    time.sleep(t.random.random() / 4)
                    filler.unlink(missing_ok=True)
                t.figure.faults += 1
            for server in servers:
                server.terminate()
            for server in servers:
                server.communicate(timeout=LIMIT_SECONDS)
            for away in home.glob("away*"):  # what dead servers left there is brought back
                for path in (*away.glob("*.jsonl"), *away.glob("*.loss")):
                    if path.is_file() and not path.is_symlink() and not (journal / path.name).exists():
                        path.rename(journal / path.name)
            for name in journal.glob("20260101T*"):  # the judge would wait for who writes into a FIFO
                os.rmdir(name) if name.is_dir() and not name.is_symlink() else name.unlink()
            t.figure.points += 1
            t.check(db, where=f"after {', '.join(acts)}")
            done = run_quietly(t, [*OURS, "verify", "--db", str(db)])
            if done.returncode:
                t.figure.torn += 1
                t.figure.blame(f"after {', '.join(acts)}: {done.stdout}")
        finally:
            for server in servers:
                server.kill()
                server.communicate()
            subprocess.run(["umount", "-l", home], check=True)
        t.clean(db)


def mount(folder: Path, options: str) -> int:
    """Mount an empty file system over a folder; 0 if that worked."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    return subprocess.run(command, capture_output=True).returncode


def run_quietly(t: Torture, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail while others hold what it needs, but must not crash."""
    return subprocess.run(
        command, env=t.environment(), cwd=t.module, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def s18_stream(t: Torture) -> None:
    """a stream with its cursor, killed at random moments while four servers log and purges run"""
    db = t.database()
    cursor, out, module = (db.parent / "cursor.json", db.parent / "out.jsonl", [*OURS])
    stream = [*module, "log", "--format", "jsonl", "--cursor-file", str(cursor), "--db", str(db)]
    script = SERVING.replace("time.sleep(0.001)", "time.sleep(0.01)")
    servers = [t.start(t.command(script, db, tag)) for tag in "abcd"]

    def read(how: list[str], seconds: float | None) -> bool:
        """Let the stream append to what arrived, killed after a while; return True if anything came."""
        with open(out, "ab") as file:
            before = file.tell()
            if before and out.read_bytes()[-1:] != b"\n":
                file.write(b"\n")  # where it was killed within a line, which then comes again
            child = subprocess.Popen(
                [*stream, *how],
                stdout=file,
                stderr=subprocess.PIPE,
                env=t.environment(),
                cwd=t.module,
                text=True,
            )
            try:
                said = child.communicate(timeout=seconds or LIMIT_SECONDS)[1]
                t.look_at(subprocess.CompletedProcess(child.args, child.returncode, "", said))
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
        if cursor.exists():
            json.loads(cursor.read_text())  # else it was half written, which ends the sweep
        return out.stat().st_size > before + 1

    try:
        while not Path(f"{db}.said").exists():
            time.sleep(0.02)
        for number in range(10 if t.quick else 200):
            read(["--follow"] if number % 2 else [], 0.1 + t.random.random() * 0.9)
            if number % 5 == 4:
                t.look_at(run_quietly(t, [*module, "purge", "--older-than", "3s", "--db", str(db)]))
            t.figure.faults += 1
        for server in servers:
            server.terminate()
        for server in servers:
            server.communicate(timeout=LIMIT_SECONDS)
        t.run(t.ingest_command(db))
        while read([], None):
            pass
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    t.figure.points = t.figure.faults
    ids: dict[str, set[str]] = {}
    gaps: dict[str, int] = {}
    for line in out.read_text().splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            event = json.loads(line)
            if event["type"] == "gap":
                gaps[event["event_id"]] = json.loads(event["input_json"])["events"]
            else:
                ids.setdefault(event["name"], set()).add(event["event_id"])
    promised = set(map(json.loads, Path(f"{db}.said").read_text().split("\n")[:-1]))
    t.figure.lost = max(0, len(promised - ids.keys()) - sum(gaps.values()))
    t.figure.doubled = sum(len(found) > 1 for found in ids.values())
    if t.figure.bad:
        t.figure.blame(
            f"{len(promised)} events, {len(promised - ids.keys())} not seen, gaps {sum(gaps.values())}"
        )
    t.clean(db)


WINDOW = """
audit = AuditLogger(db)
times = os.open(db + ".times", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for n in range(10**9):
    log(n)
    os.write(times, f"{tag}-{n} {time.monotonic()}\\n".encode())
    time.sleep(0.0002)
"""


def w_window(t: Torture) -> None:
    """how long after log_event returned kill -9 can still lose an event ("worst ms" is that window)"""
    for _ in range(10 if t.quick else 200):
        db = t.database()
        process = t.start(t.command(WINDOW, db))
        while not Path(f"{db}.times").exists():
            time.sleep(0.01)
        time.sleep(0.3 + t.random.random() * 0.3)
        killed = time.monotonic()
        process.kill()
        process.communicate()
        returned = dict(line.split() for line in Path(f"{db}.times").read_text().splitlines())
        lost = judge(db).lost(set(returned))
        ages = [(killed - float(returned[name])) * 1000 for name in lost]
        t.figure.worst_ms = max([t.figure.worst_ms, *ages])
        t.figure.points += 1
        t.figure.faults += 1
        t.clean(db)


SWEEPS: dict[str, Callable[[Torture], None]] = {
    function.__name__.split("_")[0].upper(): function
    for function in (
        s1_kill_writer,
        s2_kill_ingest,
        s3_endings,
        s4_disk_errors,
        s5_failed_fsync,
        s6_full_disk,
        s7_forks,
        s8_many_writers,
        s9_locks,
        s10_damage,
        s12_hostile_input,
        s13_limits,
        s14_clock,
        s15_overload,
        s16_running_calls,
        s17_neighbours,
        s18_stream,
        w_window,
    )
}


@dataclass(frozen=True)
class Mutant:
    """A break of the module: texts of it, each with what stands there instead."""

    name: str
    sweep: str
    patches: tuple[tuple[str, str], ...]


DELETE = "[os.unlink(claim.path) for claim in claims]\n"
KNOWN = "        known = known_segments(engine, [claim.id for claim in claims])\n"
CHECKPOINT = "        if self.is_file:  # elsewhere CHECKPOINT means maintenance, or nothing\n"
MUTANTS = (
    Mutant("no drain at exit", "S3", (("            logger.shutdown()\n", "            pass\n"),)),
    Mutant("delete before commit", "S2", ((KNOWN, f"        {DELETE}{KNOWN}"),)),
    Mutant(
        "delete before checkpoint",
        "S10",
        (
            (KNOWN, f"        target.delete = lambda: {DELETE}{KNOWN}"),
            (CHECKPOINT, f"        getattr(self, 'delete', list)()\n{CHECKPOINT}"),
        ),
    ),
    Mutant(
        "child writes into the parent's segment",
        "S7",
        (("            self._segment.forget()\n        self._segment = None\n", "            pass\n"),),
    ),
    Mutant(
        "glue to a torn tail",
        "S4",
        (("            os.ftruncate(self.number(), self.size)\n", "            pass\n"),),
    ),
    Mutant("no ledger check", "S2", ((KNOWN, "        known = set[str]()\n"),)),
    Mutant(
        "count but drop",
        "S4",
        (("            del self._queue[:count]\n", "            self._queue.clear()\n"),),
    ),
    Mutant(
        "no lock on a live segment",
        "S8",
        (("                    is_locked = try_lock(fd)\n", "                    pass\n"),),
    ),
    Mutant(
        "flush that does not wait",
        "S1",
        (("        return not self.enabled or self._writer.flush(timeout)\n", "        return True\n"),),
    ),
    Mutant(
        "child keeps the parent's queue",
        "S7",
        (("self._queue: list[bytes] = []\n", "self._queue: list[bytes] = getattr(self, '_queue', [])\n"),),
    ),
    Mutant(
        "one bad line costs the segment",
        "S12",
        (
            (
                "            good[seq] = number, line\n",
                "            faults.append((number, '', line))\n",
            ),
        ),
    ),
    Mutant(
        "a begin that nobody waits for",
        "S16",
        (
            (
                "return (lambda: self.number in logger._writer.begun.on_record) if self.strict else None\n",
                "return (lambda: True) if self.strict else None\n",
            ),
        ),
    ),
    Mutant(
        "ends that name no begin",
        "S16",
        (("        return self._refs.get(number, (None,))[0]\n", "        return None\n"),),
    ),
    Mutant(
        "losses off the record",
        "S15",
        (("                self.sealed[self.journal.record_loss(loss)] = 0\n", "                pass\n"),),
    ),
)


def mutate(mutant: Mutant) -> Path:
    """Return a directory with the broken module; every patch must match once."""
    text = (ROOT / "mxcp_audit.py").read_text(encoding="utf-8")
    for old, new in mutant.patches:
        if text.count(old) != 1:
            raise SystemExit(
                f"mutant {mutant.name!r}: {text.count(old)} places match {old!r}; adapt the patch"
            )
        text = text.replace(old, new)
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    (folder / "mxcp_audit.py").write_text(text, encoding="utf-8")
    return folder


def sweep(name: str, module: Path, *, quick: bool, seed: int, limit: float = LIMIT_SECONDS) -> Figure:
    """Run one sweep and return its figure."""
    t = Torture(module, quick=quick, seed=seed, limit=limit)
    t.figure = Figure(name, (SWEEPS[name].__doc__ or "").strip())
    try:
        SWEEPS[name](t)
    finally:
        shutil.rmtree(t.home, ignore_errors=True)
    return t.figure


def run_mutants(seed: int, names: list[str]) -> int:
    """Run each mutant's sweep; return how many went unnoticed."""
    missed = 0
    chosen = [mutant for mutant in MUTANTS if mutant.sweep in names]
    for mutant in chosen:
        folder = mutate(mutant)
        try:
            figure = sweep(mutant.sweep, folder, quick=True, seed=seed, limit=60)
        finally:
            shutil.rmtree(folder)
        missed += not figure.bad
        verdict = "caught" if figure.bad else "MISSED"
        found = ", ".join(
            f"{key} {getattr(figure, key)}" for key in ("lost", "doubled", "torn", "signals", "exceptions")
        )
        print(f"{verdict}  {mutant.sweep:4} {mutant.name}: {found}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught, seed {seed}")
    return missed


def run_sweeps(names: list[str], *, quick: bool, seed: int) -> int:
    """Run sweeps, print the table, and return how many figures are red."""
    heads = ("faults", "points", "lost", "twice", "torn", "signals", "raised", "worst ms", "s")
    print(" " * 5 + "".join(f"{head:>9}" for head in heads))
    red = 0
    for name in names:
        begun = time.monotonic()
        f = sweep(name, ROOT, quick=quick, seed=seed)
        red += f.bad
        cells = (f.faults, f.points, f.lost, f.doubled, f.torn, f.signals, f.exceptions)
        note = f"; skipped: {f.skipped}" if f.skipped else "  RED" if f.bad else ""
        print(
            f"{name:5}"
            + "".join(f"{cell:9}" for cell in cells)
            + f"{f.worst_ms:9.1f}{time.monotonic() - begun:9.0f}  {f.what}{note}",
            flush=True,
        )
        for detail in f.details:
            print(f"      {detail}")
    print(f"seed {seed}; {red} of {len(names)} figures red")
    return red


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a sample of each sweep")
    parser.add_argument("--mutants", action="store_true", help="break the module on purpose")
    parser.add_argument("--only", metavar="S1,S2", help="these sweeps, or the mutants for them")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    names = (
        options.only.split(",")
        if options.only
        else [n for n in SWEEPS if n not in ("S17", "S18") or not options.quick]
    )
    if options.mutants:
        return int(bool(run_mutants(options.seed, names)))
    return int(bool(run_sweeps(names, quick=options.quick, seed=options.seed)))


if __name__ == "__main__":
    raise SystemExit(main())
