"""An audit log for any MCP server: who called what, with which input, how it ended.

Every tool, resource and prompt execution becomes a row in a DuckDB file that can
be queried while the server runs.

    from mxcp_audit import AuditLogger

    audit = AuditLogger("logs-default.duckdb")      # or AuditLogger.from_config()
    server.add_middleware(audit.middleware())       # FastMCP: that is all

    with audit.record("tool", "get_user", {"id": 7}, caller="http"):
        ...                                         # or call by call

Then, from any shell:

    python -m mxcp_audit log --status error --since 1h

Copy this file into your project: it needs the standard library and the `duckdb`
package, or the `duckdb` program where that package is missing.

Not promised: names that begin with an underscore, the order of rows with equal
timestamps, and the wording of error messages may change between versions. The ten
documented columns of `logs`, the names in `__all__` and the exit codes will not.
"""

from __future__ import annotations

__version__ = "0.1.0"


# === Errors ===
# may name: nothing
#
# One root, so that a caller can catch all of ours and nothing else. A message says
# what is wrong, where, and what to do; a cause is kept (`raise … from`).


class AuditError(Exception):
    """The root of every error that this module raises on purpose."""


class ConfigError(AuditError, ValueError):
    """A configuration that can't be used as it stands; nothing was guessed.

    Args:
        problem: what is wrong and what to do, without the place.
        path: the file, or None for a text or a keyword argument.
        line: counted from 1, or None.
        column: counted from 1 in characters, or None.
        trail: the keys that lead to the value, such as ("profiles", "default", "audit").
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        line: int | None = None,
        column: int | None = None,
        trail: tuple[str, ...] = (),
    ) -> None:
        self.problem, self.path, self.line, self.column, self.trail = problem, path, line, column, trail
        place = ":".join(str(part) for part in (path or (line and "line"), line, column) if part is not None)
        super().__init__(": ".join(part for part in (place, ".".join(trail), problem) if part))


class EventError(AuditError, ValueError):
    """An event with a field that can't be used; `field` names it."""

    def __init__(self, problem: str, *, field: str) -> None:
        self.field = field
        super().__init__(f"{field}: {problem}")


class JournalError(AuditError):
    """A journal directory or segment that can't be used; `path` names it."""

    def __init__(self, problem: str, *, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class LoggerClosedError(AuditError):
    """The logger was shut down and what was asked needs a living one."""


class StoreError(AuditError):
    """The database side failed; events stay in the journal until it works again."""


class EngineNotFoundError(StoreError):
    """Neither the `duckdb` package nor the `duckdb` program can be had."""


class DatabaseNotFoundError(StoreError):
    """There is no audit database and no journal at the place asked."""


class DatabaseLockedError(StoreError):
    """Another process holds the database; the only error that is worth a retry."""


class DatabaseCorruptError(StoreError):
    """The file is damaged or no DuckDB database. Nothing is deleted or overwritten."""


class QueryError(StoreError):
    """The engine refused a statement."""


# === Config ===
# may name: Errors


# === Events ===
# may name: Errors


# === Redaction ===
# may name: Errors


# === Encoding ===
# may name: Errors, Events, Redaction


# === Journal ===
# may name: Errors, Events, Encoding
