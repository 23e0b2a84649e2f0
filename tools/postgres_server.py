"""A PostgreSQL server of one's own, for tests and benchmarks: a free loopback port, its own folder."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PASSWORD = "Hunter2-geheim"  # shows whether a password gets out anywhere
USERS = ("postgres", "nobody")  # who runs it if we are root, which initdb refuses


def find_programs() -> str | None:
    """Return the folder with initdb and postgres, which Debian keeps off PATH; None if there is none."""
    folders = [os.path.dirname(shutil.which("initdb") or "/")]
    if shutil.which("pg_config"):
        done = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True)
        folders.append(done.stdout.strip())
    for folder in [*folders, *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]:
        if all(os.access(os.path.join(folder, name), os.X_OK) for name in ("initdb", "postgres", "psql")):
            return folder
    return None


class Postgres:
    """A running server with a user `audit` and his PASSWORD. End it with `close`.

    Args:
        programs: where initdb and postgres are.
        settings: of the server, such as {"fsync": "off"}.
    """

    def __init__(self, programs: str, **settings: str) -> None:
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="mxcp_audit-postgres-"))
        self.settings = settings
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            import pwd

            user = next(pwd.getpwnam(name) for name in USERS if self._knows(name))
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        subprocess.run(
            [self._program("initdb"), "-D", str(self.folder / "data"), "-U", "audit", "-E", "UTF8"]
            + ["--locale=C", "--auth=scram-sha-256", f"--pwfile={self.folder / 'password'}", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **self._as,
        )
        self.start()

    @staticmethod
    def _knows(name: str) -> bool:
        import pwd

        try:
            return bool(pwd.getpwnam(name))
        except KeyError:
            return False

    def _program(self, name: str) -> str:
        return os.path.join(self.programs, name)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            **self.settings,
        }
        with open(self.folder / "log", "a") as log:
            self._process = subprocess.Popen(
                [self._program("postgres"), "-D", str(self.folder / "data")]
                + [word for name, value in settings.items() for word in ("-c", f"{name}={value}")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._as,
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                self.sql("SELECT 1")
                return
            except subprocess.CalledProcessError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT throws clients out, SIGQUIT is as good as a crash."""
        self._process.send_signal(how)
        self._process.wait(120)

    def pause(self) -> None:
        """Have the server take no new clients: they wait for its first word."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End a pause."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the server and remove its folder."""
        if self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, text: str, database: str = "postgres") -> str:
        """Run statements with psql and return what it prints, unaligned and without headings."""
        done = subprocess.run(
            [self._program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", text],
            env={**os.environ, **self.environment(database)},
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.strip()

    def environment(self, database: str) -> dict[str, str]:
        """Return the variables with which any libpq program finds the server."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "audit",
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": database,
        }

    def target(self, database: str) -> str:
        """Return the target for a database, which is made; the password is not in it."""
        if not self.sql(f"SELECT 1 FROM pg_database WHERE datname = '{database}'"):
            self.sql(f"CREATE DATABASE {database}")
        return f"postgres:dbname={database} host=127.0.0.1 port={self.port} user=audit"
