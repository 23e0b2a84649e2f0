# SPDX-License-Identifier: MIT
"""An audit log for any MCP server: who called what, with which input, how it ended.

Each call becomes a row in a DuckDB file that can be queried while the server runs.

    from mxcp_audit import AuditLogger

    audit = AuditLogger("logs-default.duckdb")      # or AuditLogger.from_config()
    server.add_middleware(audit.middleware())       # FastMCP: that is all

    with audit.record("tool", "get_user", {"id": 7}, caller="http"):
        ...                                         # or call by call

and from any shell:

    python -m mxcp_audit log --status error --since 1h

Copy this file into your project: it needs the standard library and the `duckdb` package
or program (docs/vendoring.md). Promised are the ten documented columns of `logs`, the names
in `__all__` and the exit codes; not the wording of messages or the order of equal timestamps.
"""

from __future__ import annotations

import atexit
import binascii
import codecs
import collections
import contextlib
import contextvars
import datetime
import enum
import errno
import functools
import itertools
import json
import operator
import os
import re
import stat
import sys
import threading
import time
import types
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf, isfinite, nan
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    TypeAlias,
    TypeVar,
    cast,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    import argparse
    import subprocess

__version__ = "0.2.0"
__all__ = ["AuditError", "AuditLogger", "Call", "Config", "ConfigError", "Counters", "DatabaseCorruptError"]
__all__ += ["DatabaseLockedError", "DatabaseNotFoundError", "DatabaseUnreachableError", "EngineNotFoundError"]
__all__ += ["EventError", "Filter", "JournalError", "QueryError", "Redactor", "Store", "StoreError"]
__all__ += ["load_config", "main"]


# === Errors ===
# depends on: nothing
#
# A message says what is wrong, where, and what to do; a cause is kept.

# Passed on, once the event is queued.
INTERRUPTS = (KeyboardInterrupt, SystemExit)


class AuditError(Exception):
    """The root of the errors that this module raises on purpose."""


class ConfigError(AuditError, ValueError):
    """A configuration that can't be used; nothing was guessed.

    Args:
        problem: what is wrong and what to do, without the place.
        path: the file, or None for a text or a keyword argument.
        line, column: counted from 1, in characters; or None.
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
    """A field of an event that can't be used; `field` names it."""

    def __init__(self, problem: str, *, field: str) -> None:
        self.field = field
        super().__init__(f"{field}: {problem}")


class JournalError(AuditError):
    """A journal that can't be used; `path` names the directory or file."""

    def __init__(self, problem: str, *, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class AuditUnavailableError(AuditError):
    """With `strict`: a call that can't be put on record is not executed, or its answer withheld."""


class StoreError(AuditError):
    """The database side failed; events stay in the journal."""


class EngineNotFoundError(StoreError):
    """Neither the `duckdb` package nor the `duckdb` program can be had."""


class DatabaseNotFoundError(StoreError):
    """There is neither an audit database nor a journal."""


class DatabaseLockedError(StoreError):
    """Another process holds the database; the only error that is worth a retry."""


class DatabaseUnreachableError(StoreError):
    """A target that is no file can't be reached, or refused us."""


class DatabaseCorruptError(StoreError):
    """The file is damaged or no DuckDB database; it is left as it is."""


class QueryError(StoreError):
    """The engine refused a statement."""


def counted(count: int, noun: str) -> str:
    """Return text such as "2 events"."""
    return f"{count} {noun}" + "s" * (count != 1)


def no_python() -> str | None:
    """Return why no child can run this file, or None if one can."""
    program = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or not re.match("(?i)python|pypy", program):
        return "sys.executable is no Python"
    return None if os.path.isfile(__file__) else f"{__file__} is no file"


# === Config ===
# depends on: Errors
#
# `parse_yaml` returns what PyYAML's `safe_load` returns, as in MXCP, or raises ConfigError:
# tools/fuzz_yaml.py compares the two. A cursor walks over the text once. After a block node it is at the
# first token of a later line, whose column says whether the collection goes on (same), has ended (smaller) or
# is broken (larger). The end of the text, `---` and `...` are at column -1.

MAX_SITE_FILE_BYTES = 16 * 2**20
MAX_DEPTH = 100  # PyYAML takes about 500
MAX_KEY_CHARS = 1024  # PyYAML's, up to the colon
MAX_NUMBER_CHARS = 4300  # Python's, for digits

_YAML_WORDS: Mapping[str, object] = {
    **dict.fromkeys(("~", "null")),
    **dict.fromkeys(("yes", "true", "on"), True),
    **dict.fromkeys(("no", "false", "off"), False),
    **{".inf": inf, "+.inf": inf, "-.inf": -inf, ".nan": nan},
}
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*(?::[0-5]?[0-9])*)")
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*(?:(?::[0-5]?[0-9])+\.[0-9_]*|\.[0-9_]*(?:[eE][-+][0-9]+)?)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
)
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}"
    r":[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?"
)

# The text ends in a NUL.
_BLANKS = re.compile(r"[ \n]*(?:#[^\n\0]*[ \n]*)*")
_END = re.compile(r"\0|^(?:---|\.\.\.)(?=[ \t\n\0])", re.MULTILINE)
_DASH = re.compile(r"-(?=[ \t\n\0])")
_COLON = re.compile(r" *:(?=[ \t\n\0])")
_LINE_GAP = re.compile(r" *\n[ \n]*")
# By "between brackets": what begins plain text, and what ends it on its line.
_PLAIN = {
    False: (r"|[-?:](?=[^ \t\n\0])", re.compile(r"[\t\n\0]|:(?=[ \t\n\0])| #")),
    True: (r"|-(?=[^ \t\n\0])", re.compile(r"[\t\n\0,?\[\]{}]|:(?=[ \t\n\0,\[\]{}])| #")),
}
# Quoted text, and what in it is replaced.
_QUOTED = {
    "'": (re.compile(r"'([^']*(?:''[^']*)*)'"), re.compile(r"''|[ \t\n]+")),
    '"': (
        re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL),
        re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|\n[ \t\n]*|.)|[ \t\n]+", re.DOTALL),
    ),
}
_PLAIN_OF = dict(zip('0abt\tnvfre "\\/N_LP', '\0\a\b\t\t\n\v\f\r\x1b "\\/\x85\xa0\u2028\u2029'))
_BLOCK_HEADER = re.compile(r"([|>])([+-]?[1-9]?|[1-9][+-])(?: +#[^\n\0]*| *)(?=[\n\0])")
_LEADING_LINES = re.compile(r"(?:\n *)*")
_REFUSALS = {
    "\t": "a tab between tokens; use spaces",
    "&": "an anchor (&name); write the value out",
    "*": "an alias (*name); write the value out",
    "!": "a tag (!name); remove it",
    "%": "a directive (%NAME); remove it",
    "?": "a complex key (?), or a question mark in [] or {}; remove it",
    "\0": "the text ends too early; complete it",
}


def parse_yaml(text: str | bytes, *, path: str | None = None) -> object:
    """Return what PyYAML's `safe_load` returns, or raise ConfigError."""
    return _YamlReader(text, path).document()


class _YamlReader:
    """Reads one YAML document. `places`: of pairs, by id of the mapping and key."""

    def __init__(self, text: str | bytes, path: str | None) -> None:
        self.path, self.pos, self.depth = path, 0, 0
        self.places: dict[tuple[int, object], int] = {}
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        self.text = re.sub("\r\n?", "\n", text).removeprefix("\ufeff")
        if bad := re.search(r"[\udc80-\udcff]", self.text):
            self.fail(f"byte 0x{ord(bad[0]) - 0xDC00:X} is not UTF-8; save the file as UTF-8", bad.start())
        refused = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
        if bad := re.search(refused, self.text):
            self.fail(f"the character U+{ord(bad[0]):04X}; escape it in double quotes", bad.start())
        self.text += "\0"

    # --- the cursor

    def place(self, at: int) -> dict[str, Any]:
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return {"path": self.path, "line": line, "column": column}

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise ConfigError(problem, **self.place(self.pos if at is None else at))

    def refuse(self, expected: str) -> NoReturn:
        problem = f"expected {expected}, found {self.char!r}; check the indentation"
        self.fail(f"{_REFUSALS.get(self.char, problem)}, or put text in quotes")

    @property
    def char(self) -> str:
        return self.text[self.pos]

    def see(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return pattern.match(self.text, self.pos)

    def take(self, pattern: re.Pattern[str]) -> str:
        """Pass and return what matches, or ""."""
        text = match[0] if (match := self.see(pattern)) else ""
        self.pos += len(text)
        return text

    def end_line(self) -> None:
        """Pass the rest of a line, which must be empty, to the next token."""
        if "\n" not in self.take(_BLANKS) and self.char != "\0":
            self.refuse("the end of the line")

    def column(self) -> int:
        return -1 if self.see(_END) else self.pos - self.text.rfind("\n", 0, self.pos) - 1

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} collections inside each other; flatten them")

    # --- blocks

    def document(self) -> object:
        self.take(_BLANKS)
        explicit = self.column() < 0 and self.char == "-"
        started = explicit or self.column() >= 0
        self.pos += 3 * explicit
        value = self.node(-1, after_key=explicit)
        while started and self.column() < 0 and self.char == ".":
            self.pos += 3
            self.end_line()
        if self.column() >= 0:
            self.fail("text after the end; check the indentation")
        if self.char != "\0":
            self.fail("a second document; keep one to a file")
        return value

    def node(self, indent: int, *, after_key: bool) -> object:
        """The next node, if deeper than `indent`; a key's list may be at it."""
        same_line = "\n" not in self.take(_BLANKS) and after_key
        start, column = self.pos, self.column()
        dash = self.see(_DASH)
        if column <= indent and not (dash and after_key and column == indent):
            return None
        if not dash:
            value = self.block_scalar(indent) if self.char in "|>" else self.inline_node(indent)
            if self.text[start] in "|>[{" or not self.see(_COLON) or "\n" in self.text[start : self.pos]:
                self.end_line()
                return value
            self.pos = start
        if same_line:
            self.fail("a collection on the line of its key; begin a line, or quote the text")
        self.descend()
        mapping: dict[object, object] = {}
        sequence: list[object] = []
        while self.column() == column and (self.see(_DASH) or not dash):
            start = self.pos
            if dash:
                self.pos += 1
                sequence.append(self.node(column, after_key=False))
                continue
            key = self.scalar(column)
            if not self.take(_COLON):
                self.refuse("a key, a colon and a blank")
            self.check_key(start)
            self.put(mapping, key, self.node(column, after_key=True), start)
        self.depth -= 1
        return sequence if dash else mapping

    def check_key(self, start: int) -> None:
        """Refuse what PyYAML refuses as a key between `start` and the colon."""
        if self.pos - 1 - start > MAX_KEY_CHARS or "\n" in self.text[start : self.pos]:
            self.fail(f"a key of several lines or more than {MAX_KEY_CHARS} characters; shorten it", start)

    def put(self, mapping: dict[object, object], key: object, value: object, at: int) -> object:
        """Enter a pair that starts at `at` and return the mapping."""
        if isinstance(key, (dict, list)):
            self.fail("a collection as a key; use text", at)
        if key in mapping:  # 1, 1.0 and true are equal
            self.fail(f"the key {key!r:.60} is here a second time; keep one", at)
        mapping[key] = value
        self.places[id(mapping), key] = at
        return mapping

    # --- between brackets

    def flow(self) -> object:
        mapping: dict[object, object] = {}
        sequence: list[object] = []
        closing = "}" if self.char == "{" else "]"
        self.descend()
        self.pos += 1
        while self.next_in_flow() != closing:
            start, key, value = self.pos, self.inline_node(flow=True), None
            pair = self.next_in_flow() == ":"
            if pair:
                self.pos += 1
                self.check_key(start)
                if self.next_in_flow() not in ",]}":
                    value = self.inline_node(flow=True)
            if closing == "}":
                self.put(mapping, key, value, start)
            else:
                sequence.append(self.put({}, key, value, start) if pair else key)
            if self.next_in_flow() == ",":
                self.pos += 1
            elif self.char != closing:
                self.refuse(f"a comma or {closing}")
        self.pos += 1
        self.depth -= 1
        return mapping if closing == "}" else sequence

    def inline_node(self, indent: int = -1, *, flow: bool = False) -> object:
        return self.flow() if self.char in "[{" else self.scalar(indent, flow=flow)

    def next_in_flow(self) -> str:
        self.take(_BLANKS)
        if self.see(_END):
            self.fail("a bracket is not closed before this place; close it")
        return self.char

    # --- scalars

    def scalar(self, indent: int, *, flow: bool = False) -> object:
        """The scalar at the cursor; only lines deeper than `indent` continue it."""
        if self.char in _QUOTED:
            return self.quoted()
        beginning, ending = _PLAIN[flow]
        if not self.see(re.compile(r"[^ \t\n\0\-?:,\[\]{}#&*!|>'\"%@`]" + beginning)):
            self.refuse("a key or a value")
        start = here = self.pos
        text = gap = ""
        while end := ending.search(self.text, here):  # always, as of the NUL
            line = self.text[here : end.start()].rstrip(" ")
            if not line:
                break
            text += _folded(gap) + line
            self.pos = here + len(line)
            if not (match := self.see(_LINE_GAP)):
                break
            gap, here = match[0], match.end()
            column = len(gap) - gap.rfind("\n") - 1
            if column <= indent or self.text[here] == "#" or _END.match(self.text, here):
                break
        return self.plain(text, start)

    def plain(self, text: str, at: int) -> object:
        """Return the value of plain text, typed as in YAML 1.1."""
        word = text.lower()
        if word in _YAML_WORDS and text in {word, word.title(), word.upper(), ".NaN"} - {".Nan"}:
            return _YAML_WORDS[word]
        if text in ("<<", "="):
            self.fail(f"a merge key or value sign ({text}); put it in quotes", at)
        if _DATE.fullmatch(text):
            self.fail("a date; put it in quotes", at)
        integer = _INTEGER.fullmatch(text)
        if not integer and not _FLOAT.fullmatch(text):
            return text
        if len(text) > MAX_NUMBER_CHARS:
            self.fail(f"a number of more than {MAX_NUMBER_CHARS} characters; put it in quotes", at)
        digits = text.replace("_", "").lstrip("+-")
        base = 0 if not integer else {"0b": 2, "0x": 16}.get(digits[:2], 8 if digits[0] == "0" else 10)
        value: float = 0 if integer else 0.0
        weight = 1
        try:
            for part in reversed(digits.split(":")):  # in this order PyYAML rounds
                value, weight = value + (int(part, base) if integer else float(part)) * weight, weight * 60
            str(value)  # for messages
        except (ValueError, OverflowError):  # 0x_, 1:0:0:….5, too many digits
            self.fail("a number that has no value; put it in quotes", at)
        return -value if text[0] == "-" else value

    def quoted(self) -> str:
        whole, part = _QUOTED[self.char]
        if not (match := self.see(whole)):
            self.fail(f"the closing {self.char} is missing; add it")
        if re.search(r"\n(?:---|\.\.\.)[ \t\n]", match[1]):
            self.fail("a document marker (--- or ...) inside quotes; indent it")
        offset, self.pos = self.pos + 1, match.end()
        return part.sub(lambda part: self.meant(part[0], offset + part.start()), match[1])

    def meant(self, part: str, at: int) -> str:
        if part[0] != "\\":
            return "'" if part == "''" else _folded(part)
        if part[1] == "\n":
            return "\n" * (part.count("\n") - 1)
        if part[1] in _PLAIN_OF:
            return _PLAIN_OF[part[1]]
        if len(part) == 2 or int(part[2:], 16) > sys.maxunicode:
            self.fail(f"{part} is no escape; write \\\\, or use single quotes", at)
        return chr(int(part[2:], 16))

    def block_scalar(self, indent: int) -> str:
        """The `|` or `>` scalar at the cursor, in a collection at `indent`."""
        if not (header := self.see(_BLOCK_HEADER)):
            self.fail("only +, -, a digit and a comment may follow | or >; quote text")
        self.pos = header.end()
        digit, chomping = header[2].strip("+-"), header[2].strip("123456789")
        # 1. The column of the text: given, or the deepest so far.
        column = max(indent + 1, 1)
        if digit:
            column += int(digit) - 1
        elif leading := self.see(_LEADING_LINES):
            column = max(column, *map(len, leading[0].split("\n")))
        # 2. Its lines. The cursor stays before the next line break.
        lines = self.take(re.compile(rf"(?:\n(?: {{{column}}}[^\n\0]*| *(?=[\n\0])))*")).split("\n")[1:]
        whole = "\n".join([line[column:] for line in lines]) + "\n" * (bool(lines) and self.char == "\n")
        # 3. Its line breaks.
        text = whole.rstrip("\n")
        breaks = whole[len(text) :]
        if header[1] == ">":
            fold = re.compile(r"^([^ \t\n].*)\n(\n*)(?=[^ \t\n])", re.MULTILINE)
            text = fold.sub(lambda line: line[1] + (line[2] or " "), text)
        return text + {"": breaks[: bool(text)], "-": "", "+": breaks}[chomping]


def _folded(blanks: str) -> str:
    """In a wrapped scalar a line break is a space, n are n - 1."""
    breaks = blanks.count("\n")
    return "\n" * (breaks - 1) or " " if breaks else blanks


# --- settings

SITE_FILE = "mxcp-site.yml"
MAX_DURATION_S = 100 * 365 * 86400.0
MIN_INPUT_BYTES = 256
MAX_INPUT_BYTES = 64 * 2**20  # of the writer's queue

_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Config(NamedTuple):
    """The settings that hold, validated; made by `load_config`. `AuditLogger` says what each means.

    Durations are seconds, lists are tuples. `repr` leaves out `path` and `attach`, which may hold secrets.

    Args:
        path: absolute path of the database file, or an ATTACH target such as "postgres:…".
        site_file, journal: absolute paths, or None; the journal's is by default "<path>.journal".
        sources: where each of the others came from: "default", "argument", "MXCP_PROFILE", or file and
            line such as "mxcp-site.yml:12".
    """

    path: str
    profile: str = "default"
    site_file: str | None = None
    enabled: bool = False
    journal: str | None = None
    attach: Mapping[str, str | int | float | bool] = types.MappingProxyType({})
    flush_interval: float = 1.0
    durable: bool = False
    on_full: str = "block"
    max_input_bytes: int = 2**20
    redact: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    redact_mode: str = "constant"
    retention: float | None = None
    record_result: str = "summary"
    max_result_bytes: int = 2**14
    trusted_proxies: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    strict_timeout: float = 5.0
    group: bool = False
    sources: Mapping[str, str] = types.MappingProxyType({})

    def __repr__(self) -> str:
        shown = self._asdict()
        del shown["path"], shown["attach"]
        return f"Config({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def journal_directory(self) -> str:
        """`journal`, or the directory beside the database file."""
        return self.journal or self.path + ".journal"


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as "10m" or "1h30m"."""
    parts = re.findall("([0-9]{1,12})(ms|[smhdw])", str(text))
    seconds = sum((int(number) * _UNITS_S[unit] for number, unit in parts), 0.0)
    if "".join(map("".join, parts)) != text or not 0 < seconds <= MAX_DURATION_S:
        problem = f'{text!r:.60} is no duration such as "10m" or "1h30m"; write whole numbers with a unit'
        raise ValueError(f"{problem} (ms, s, m, h, d, w), up to 100 years")
    return seconds


def is_attach_target(path: str) -> bool:
    """True for "ducklake:…", "postgres:…" and the like, False for a file."""
    return re.match("[A-Za-z0-9_]{2,}:", path) is not None  # DuckDB's own rule; C: is a drive


# No secrets in a connection string and in `attach`.
_PUBLIC_KEYS = re.compile("(?i)dbname|host(addr)?|port|user|service|sslmode|application_name|connect_timeout")
_PUBLIC_OPTIONS = re.compile("(?i)type|data_path|(metadata_)?schema|metadata_catalog|secret")
_PREFIXES = re.compile(r"(?:[A-Za-z0-9_]{2,}:(?!//))*")  # such as "ducklake:postgres:"
_PAIR = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s\\]|\\.)*)")
_PIECE = re.compile(r"[^\s=:/@?&;,'\"]{3,}")


def public_target(target: str) -> str:
    """Return a path as it is, an ATTACH target without its secrets."""
    if not is_attach_target(target):
        return target
    prefix: str = _PREFIXES.findall(target)[0]
    rest = target.removeprefix(prefix)
    has_pairs = prefix.lower().endswith(("postgres:", "mysql:")) or re.match(r"\w+\s*=", rest)
    if has_pairs and "://" not in rest:
        pairs = _PAIR.findall(rest)
        shown = [f"{key}={value if _PUBLIC_KEYS.fullmatch(key) else '…'}" for key, value in pairs]
        return prefix + " ".join(shown + ["…"] * bool(_PAIR.sub("", rest).strip()))
    rest = re.sub(r"\A(.*?://)?.*@", r"\1…@", rest, flags=re.DOTALL)
    return prefix + re.sub(r"\?.*", "?…", rest, flags=re.DOTALL)


def hide_secrets(text: str, target: str, options: Mapping[str, object]) -> str:
    """Return a message, unless it repeats secrets of the target."""
    public, start = public_target(target), len(_PREFIXES.findall(target)[0])
    if target[start:]:
        text = text.replace(target[start:], public[start:])
    shown = [public, *(str(value) for name, value in options.items() if _PUBLIC_OPTIONS.fullmatch(name))]
    given = [target, *map(str, options.values())]
    secret = {*_PIECE.findall(" ".join(given))} - {*_PIECE.findall(" ".join(shown))}
    if any(piece in text for piece in secret):
        return "what the engine says is withheld, because it repeats what may be secret"
    return text


class Setting(NamedTuple):
    must_be: str
    check: Callable[[Any], object]  # returns what `Config` holds, or None, or raises ValueError


def _described(value: object) -> str:
    """Return a value with its kind: in YAML no is False and 1.10 is 1.1."""
    kinds = {str: "text", bool: "boolean", int: "number", float: "number", dict: "mapping"}
    return f"the {kinds.get(type(value), type(value).__name__)} {value!r:.60}"


def _path(value: object) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"must be a path, not {_described(value)}; put text in quotes")
    if re.search(r"[\0\ud800-\udfff]", path):
        raise ValueError("a path can't hold NUL or half a character; name another")
    if re.search(r"[?\\]" if os.sep == "/" else r"\?", path) and not is_attach_target(path):
        raise ValueError("DuckDB can't write where a path holds ? or \\; name another")
    return path


def _database(value: object) -> str:
    path = _path(value)
    if path.lower().endswith(".jsonl"):
        text = "a .jsonl file is a newer MXCP's log; name a .duckdb file"
        raise ValueError(f"{text}, and take the log in with `mxcp-audit import FILE`")
    if path == ":memory:":
        raise ValueError("a database in memory would be lost; name a file")
    return path


def _one_of(must_be: str) -> Setting:
    return Setting(must_be, lambda value: value if value in re.split(", | or ", must_be) else None)


def _duration(value: Any) -> float | None:
    if isinstance(value, str):
        return parse_duration(value)
    return float(value) if type(value) in (int, float) and 0 < value <= MAX_DURATION_S else None


def _names(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    for number, name in enumerate(value, 1):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"entry {number} must be a name, not {_described(name)}; put it in quotes")
    return tuple(value)


def _networks(value: object) -> tuple[str, ...] | None:
    import ipaddress

    names = _names(value)
    for name in names or ():
        ipaddress.ip_network(name, strict=False)
    return names


def _options(value: object) -> dict[str, str | int | float | bool]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of options, such as {DATA_PATH: lake/}")  # may be secret
    for name, option in value.items():
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name if isinstance(name, str) else ""):
            raise ValueError(f"{name!r:.60}: the name of an option has letters, digits and _ only")
        if not isinstance(option, (str, int, float)) or (isinstance(option, float) and not isfinite(option)):
            raise ValueError(f"{name} must be text, a number or a boolean")
    return dict(value)


_SWITCH = Setting("true or false without quotes", lambda value: value if isinstance(value, bool) else None)
_SECONDS = Setting('a duration such as "10m", or seconds above 0', _duration)
_SIZE = Setting(
    f"a whole number of bytes from {MIN_INPUT_BYTES} to {MAX_INPUT_BYTES}",
    lambda value: value if type(value) is int and MIN_INPUT_BYTES <= value <= MAX_INPUT_BYTES else None,
)
_LIST = Setting("a list of names such as [email, phone]", _names)
# Also update docs/configuration.md.
SETTINGS = {
    "enabled": _SWITCH,
    "path": Setting("a path, or an ATTACH target", _database),
    "journal": Setting("a path", _path),
    "attach": Setting("a mapping of options", _options),
    "flush_interval": _SECONDS,
    "durable": _SWITCH,
    "on_full": _one_of("block or drop"),
    "max_input_bytes": _SIZE,
    "redact": _LIST,
    "keep": _LIST,
    "redact_mode": _one_of("constant or hmac"),
    "retention": Setting('a duration such as "90d"', _duration),
    "record_result": _one_of("none, summary or body"),
    "max_result_bytes": _SIZE,
    "trusted_proxies": Setting("a list of addresses and networks such as [10.0.0.0/8]", _networks),
    "strict": Setting(
        "true, false, or a list of names such as [delete_*]",
        lambda value: ("*",) * value if isinstance(value, bool) else _names(value),
    ),
    "strict_timeout": _SECONDS,
    "group": _SWITCH,
}


def check_settings(
    settings: Mapping[str, object], place: Callable[[str], dict[str, Any]] = lambda name: {"trail": (name,)}
) -> dict[str, Any]:
    """Return the settings as `Config` holds them; `place` tells their places."""
    checked = {}
    for name, value in settings.items():
        try:
            if name not in SETTINGS:
                import difflib

                near = difflib.get_close_matches(str(name), SETTINGS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SETTINGS)}"
                raise ValueError(f"there is no such setting; {hint}")
            if value is None:
                raise ValueError("it has no value; write one, or remove the setting")
            checked[name] = SETTINGS[name].check(value)
            if checked[name] is None:
                raise ValueError(f"must be {SETTINGS[name].must_be}, not {_described(value)}")
        except ValueError as error:
            raise ConfigError(str(error), **place(name)) from error
    return checked


# --- the site file


class _SiteFile(_YamlReader):
    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_SITE_FILE_BYTES + 1)
            if len(data) > MAX_SITE_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_SITE_FILE_BYTES} bytes")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"the site file can't be read: {reason}", path=path) from error
        super().__init__(data, path)
        root = self.document()
        if root is not None and not isinstance(root, dict):
            self.fail(f"must hold keys such as `profiles:`, not {_described(root)}", 0)
        self.root: dict[object, Any] = root or {}

    def at(self, *keys: object) -> dict[str, Any]:
        """Return the place of a key, or of the last that exists."""
        position, value = 0, self.root
        for key in keys:
            if (id(value), key) not in self.places:
                break
            position, value = self.places[id(value), key], value[key]
        return {**self.place(position), "trail": tuple(map(str, keys))}

    def source(self, *keys: object) -> str:
        return f"{os.path.basename(self.path or '')}:{self.at(*keys)['line']}"

    def section(self, *keys: str) -> dict[object, Any]:
        """Return the mapping at these keys; {} where one is missing."""
        value = self.root
        for depth, key in enumerate(keys, 1):
            value = {} if value.get(key) is None else value[key]
            if not isinstance(value, dict):
                raise ConfigError(f"must be a mapping, not {_described(value)}", **self.at(*keys[:depth]))
        return value

    def profile(self, argument: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
        """The name of the profile that holds, and who chose it."""
        chosen: dict[str, object] = {
            "argument": argument,
            "MXCP_PROFILE": environ.get("MXCP_PROFILE") or None,
            self.source("profile"): self.root.get("profile"),
            "default": "default",
        }
        source, name = next(choice for choice in chosen.items() if choice[1] is not None)
        profiles = self.section("profiles")
        if not isinstance(name, str) or not name:
            problem = f"must be the name of a profile, not {_described(name)}; put text in quotes"
            raise ConfigError(problem, **self.at("profile"))
        if profiles and name not in profiles:
            known = [key if isinstance(key, str) else f"{_described(key)} (quote it)" for key in profiles]
            problem = f"there is no profile {name!r:.60} (chosen by {source}); known are {', '.join(known)}"
            raise ConfigError(problem, **self.at("profiles"))
        return name, source


def _absolute(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.abspath(path)
    except OSError as error:
        raise ConfigError(f"the working directory is gone ({error.strerror})") from error


def config_from_arguments(path: str | os.PathLike[str], **settings: object) -> Config:
    """Return the settings of keyword arguments."""
    given = {"path": path, **{name: value for name, value in settings.items() if value is not None}}
    checked = check_settings(given)
    is_remote = is_attach_target(checked["path"])
    if is_remote and "journal" not in checked:
        problem = f"{public_target(checked['path'])} is no file, so there is no place beside it"
        raise ConfigError(f"{problem}; name a directory", trail=("journal",))
    for name in checked.keys() & ({"journal"} if is_remote else {"path", "journal"}):
        checked[name] = _absolute(checked[name])
    return Config(**{"enabled": True, **checked}, sources=dict.fromkeys(given, "argument"))


def load_config(
    *,
    config: str | os.PathLike[str] | None = None,
    profile: str | None = None,
    cwd: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Return the settings of one profile of `mxcp-site.yml`; without `audit` there it is not enabled.

    Args:
        config: the site file; by default `mxcp-site.yml` in `cwd`, or in the nearest parent that has one.
        profile: by default a non-empty MXCP_PROFILE, else the file's `profile`, else "default".
        cwd: where relative paths and the search start; by default the working directory.
        environ: by default `os.environ`.

    Raises:
        ConfigError: no site file, an unreadable one, an unknown profile, or a wrong setting; with its place.
    """
    start = os.curdir if config and os.path.isabs(config) else _absolute(cwd or "")
    site_file = find_site_file(start) if config is None else os.path.join(start, config)
    if site_file is None:
        text = f"there is no {SITE_FILE} here or above; name one with --config or config=, use --db or"
        text += " AuditLogger(path), or create one: profiles: {default: {audit: {enabled: true}}}"
        raise ConfigError(text, path=start)
    site = _SiteFile(site_file)
    name, chosen_by = site.profile(profile, os.environ if environ is None else environ)
    keys = ("profiles", name, "audit")
    given: dict[Any, Any] = {**site.section(*keys)}
    for trail in () if given else (("audit",), (*keys[:2], "enabled")):
        if trail[-1] in site.section(*trail[:-1]):  # no error: files of MXCP's own have it
            import logging

            problem = f"is without effect, it must stand under {'.'.join(keys[: 2 + len(trail) // 3])}"
            logging.getLogger("mxcp_audit").warning("mxcp_audit: %s", ConfigError(problem, **site.at(*trail)))
    given.pop("max_file_size", None)  # MXCP's own
    if type(given.get("retention")) in (int, float):
        problem = 'needs a unit in this file; write "90d" for 90 days'
        raise ConfigError(problem, **site.at(*keys, "retention"))
    settings = check_settings(given, lambda name: site.at(*keys, name))
    settings.setdefault("path", f"logs-{name}.duckdb")
    is_remote = is_attach_target(settings["path"])
    if is_remote:
        settings.setdefault("journal", f"logs-{name}.journal")
    for setting in settings.keys() & {"path", "journal"}:
        if setting not in given and re.search(r"[/\\\0\ud800-\udfff]", name):
            problem = f"the profile's name {name!r:.60} can't be part of a file name; set {setting}"
            raise ConfigError(problem, path=site_file, trail=(*keys, setting))
        if setting == "journal" or not is_remote:
            settings[setting] = os.path.join(os.path.dirname(site_file), settings[setting].removeprefix("./"))
    sources = dict.fromkeys(SETTINGS, "default") | {key: site.source(*keys, key) for key in given}
    sources |= {"profile": chosen_by, "site_file": "found" if config is None else "argument"}
    return Config(profile=name, site_file=site_file, sources=sources, **settings)


def find_site_file(folder: str) -> str | None:
    """Return the site file in a folder, or the nearest above, or None."""
    while not os.path.lexists(path := os.path.join(folder, SITE_FILE)):
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return None
    return path


# === Events ===
# depends on: Errors
#
# Only COLUMNS knows the columns. The first ten are the specification's.


class Column(NamedTuple):
    name: str
    sql_type: str


COLUMNS = tuple(
    Column(name, {"i": "INTEGER", "b": "BIGINT", "t": "TIMESTAMP"}.get(kind, "VARCHAR"))
    for name, kind in re.findall(
        r"(\w+)(?::(\w))?",
        "timestamp:t caller type name input_json duration_ms:i policy_decision reason status error "
        "user_id session_id trace_id client agent address server request_id error_type result_bytes:b "
        "context segment seq:i",
    )
)
# Since 0.2; lines and hashes of rows leave out those that are NULL.
NEW_COLUMNS = COLUMNS[13:-2]
EVENT_TYPES = ("tool", "resource", "prompt")
POLICY_DECISIONS = ("allow", "deny", "warn", "n/a")
STATUSES = ("success", "error")
MAX_DURATION_MS = 2**31 - 1  # DuckDB refuses a whole segment for one more
LARGEST = {"INTEGER": MAX_DURATION_MS, "BIGINT": 2**63 - 1}

wall_clock_ns = time.time_ns


def new_segment_id(now_ns: int) -> str:
    """Return `<UTC time>-<8 hex>`: sorted by age, unguessable."""
    second, ns = divmod(now_ns, 10**9)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(second))}{ns // 1000:06d}Z-{os.urandom(4).hex()}"


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def sql_time(moment: datetime.datetime) -> str:
    """Return an aware moment as naive UTC text for DuckDB."""
    return moment.astimezone(datetime.timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")


_EPOCH_START = datetime.datetime(1970, 1, 1)


def microseconds(moment: str) -> int:
    """Return text of `sql_time` as microseconds since the epoch."""
    return (datetime.datetime.fromisoformat(moment) - _EPOCH_START) // datetime.timedelta(microseconds=1)


def iso_time(us: int | None) -> str | None:
    """Return microseconds since the epoch as ISO 8601, if possible."""
    if us is None:
        return None
    with suppress(OverflowError):
        return (_EPOCH_START + datetime.timedelta(microseconds=us)).isoformat(timespec="microseconds") + "Z"
    return f"{us} microseconds"


_ISO_8601 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,6})\d*)?)?([Zz]|[+-]\d\d:?\d\d)?)?"
)


def parse_iso(text: object, *, local: bool = False) -> datetime.datetime:
    """Return the moment of ISO 8601 text, by default in UTC."""
    match = _ISO_8601.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("is no time")
    day, minute, second, fraction, offset = match.groups()
    zone = "" if local else "+00:00"
    if offset:
        zone = "+00:00" if offset in "Zz" else f"{offset[:3]}:{offset[-2:]}"
    text = f"{day}T{minute or '00:00'}:{second or '00'}.{fraction or '0':0<6}{zone}"
    return datetime.datetime.fromisoformat(text).astimezone(datetime.timezone.utc)


LINE_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"  # of lines, for `strptime`


def is_segment_id(text: str) -> bool:
    return re.fullmatch(r"\d{8}T\d{12}Z-[0-9a-f]{8}", text) is not None


def parse_event_id(text: str) -> tuple[str, int]:
    """Return the parts of an event id, `<segment>:<seq>`."""
    segment, _, seq = text.strip().rpartition(":")
    if is_segment_id(segment) and re.fullmatch("[1-9][0-9]{0,9}", seq):
        return segment, int(seq)
    raise EventError(f"{text!r} is no event id; one looks like {new_segment_id(0)}:1", field="event_id")


# === Redaction ===
# depends on: Errors
#
# Guarantee: what `Redactor.redact` returns holds no value under a sensitive name and no text in a known
# secret format, and shares nothing with its input. Nothing raises. It errs towards too much; use `keep:`.

REDACTED = "[REDACTED]"
_Span: TypeAlias = tuple[int, int]  # start and end in a text
_Names: TypeAlias = "Sequence[str]"
_Tool: TypeAlias = "str | None"
_Echo: TypeAlias = "list[str] | None"
_Strings: TypeAlias = tuple[str, str]


# --- what a name says


def _words_in(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _words_by_head(text: str) -> dict[str, frozenset[str]]:
    return {head: _words_in(words) for head, words in re.findall(r"(\w+):([^:]*)(?=\s\w+:|\Z)", text)}


# `still`: behind a secret, no policy; `flags`, `verbs` (if strong): before it, a switch; `glue`: `dbpass`.
_NAME_WORDS = _words_by_head("""
spec: password passwd pwd secret token key apikey auth authorization credential ssn creditcard cardnumber
strong: password passwd pwd pw passphrase passcode secret credential cred apikey ssn cvv cvc csc otp totp pat
mnemonic creditcard codeverifier securityanswer assertion psk pfx dockerconfigjson dockercfg kubeconfig
jsessionid phpsessid sessid privkey requirepass masterauth authtok motdepasse passwort kennwort contrasena
contraseña senha wachtwoord passord lösenord adgangskode hasło heslo jelszó salasana şifre пароль 密码 密碼
口令 パスワード 暗証番号 비밀번호 암호 סיסמה  still: value string str text plain plaintext cleartext base b
binary raw hex encoded encrypted hash digest data content body material blob override new old current previous
confirm confirmation repeat again verification verify primary secondary main backup default dev prod
production test testing staging live sandbox local json pem number num no hint auxiliary env x v wo last block
part enc pepper openssh pkcs  documents: pem material blob wo string plaintext content  flags: is has use
using no without with allow allowed require required enable enabled disable disabled show hide prevent ignore
skip force forgot detect scan support include want generate regenerate manage mask redact max min always
automount ask return reuse persist inject block existing  verbs: add change check clear copy create delete
deny edit enforce exclude export fetch get import issue list mount prompt reject remove rename renew reset
resolve revoke rotate save set update validate imagepull  glue: db my mysql sql pg smtp imap ftp ldap mail
wifi credit debit cc id aws web www github gitlab slack public next page sort  none: compass bypass trespass
surpass overpass underpass encompass jsonwebtoken  stems: sensitive social verifier answer saml json card ccn
cc_n cc-n community account.num account_num connect.sid _wo sig= phrase securestring
""")
SPEC_NAMES, STRONG_WORDS, STILL_SECRET, KEY_DOCUMENTS = list(_NAME_WORDS.values())[:4]
FLAG_WORDS, VERBS, GLUE_WORDS, NO_SECRETS, _STEMS = list(_NAME_WORDS.values())[4:]
# Two words that are one: of forms, or torn apart (`passWord`); imagePullSecrets are names.
_PHRASES = _words_by_head("""
creditcard: credit+card debit+card payment+card card+number card+num card+no cc+number cc+num cc+no
primary+account  cvv: card+verification  ssn: social+security  securityanswer: security+answer secret+answer
recovery+answer challenge+answer  secret: secure+string  codeverifier: code+verifier oauth+verifier
credential: service+json account+json  password: pass+word  passphrase: pass+phrase seed+phrase
recovery+phrase mnemonic+phrase secret+phrase backup+phrase snmp+community community+string  passcode:
pass+code  motdepasse: de+passe  apikey: api+key  oauth: o+auth  assertion: saml+response  sessid: connect+sid
imagepull: image+pull  cleartext: clear+text  idempotency: client+request
""")
PHRASES = {pair: word for word, pairs in _PHRASES.items() for pair in pairs}
# A secret in some company only; harmless behind these words.
WEAK_WORDS = _words_by_head("""
token: next starting page paging pagination continuation continue cursor sync delta resume forward position
offset checkpoint iterator snapshot lock change version sequence read idempotency first last previous prev
start stop end bos eos pad unk cls sep mask special input output prompt completion generated code text word
string lexer parser syntax environment n budget base reward nft explained fee staked pool lp key  key: public
pub publishable anon foreign sort partition cache object idempotency ttl kv event group hash map project file
config ctrl input output parent label field error primary issue tag bucket table column index kms managed
jwt: verify validate decode parse  cookie: consent third party  pass: first second single multi two one last
did test checks high low band boarding ski bus season day poe render  pin: gpio led gpu map data clock input
output board analog digital header reset power clk cs tx rx dout din sda scl mosi miso sck irq rst push  auth:
authorization:  code: result response error status reason  signature:
""")
# A secret behind these words; `Authorization` is a header alone or beside its own words, else a decision.
OPENERS = _words_by_head("""
key: access private priv auth authentication authorization encryption encrypt decryption decrypt signing sign
hmac mac aes rsa cipher crypto master root session shared preshared account storage subscription license
licence activation product service app application client server wrapping unseal recovery pem sas bot webhook
admin developer dev merchant payment signature kek dek pass secondary tertiary stream customer function
workspace registration enrollment ingestion integration extension phase ike wep wpa radius tacacs tsig device
agent connection tunnel provisioning gossip isakmp ipsec symmetric fernet sealing network transaction terminal
openai anthropic gemini mailgun sendgrid  token: access refresh api auth bearer oauth security session jwt
csrf xsrf personal login reset bot service deploy user device registration verification recovery invite  auth:
http basic digest bearer docker registry proxy api x npm redis rediscli git repo  authorization: proxy http x
ms amz basic bearer forwarded original header request custom  code: authorization auth oauth mfa otp totp pin
recovery backup security secret verification factor fa sms access device reset login time cvv cvc card token
cookie: session auth http request set login  signature: amz goog access
""")
# A secret whatever is glued before it (`csrfmiddlewaretoken`).
GLUED_SUFFIXES = r"""(?x)(?:密[码碼]|パスワード|비밀번호|pass(?:phrase|word|code|wd)?|credential|secret
  |token|pwd?|psk|(?:access|secret|private|api)key)s?$"""

_KNOWN_WORDS = STRONG_WORDS.union(WEAK_WORDS, *OPENERS.values(), STILL_SECRET, FLAG_WORDS, VERBS, GLUE_WORDS)
_CAMEL = r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_A-Za-z]+"
_MAX_VERDICTS, _MAX_NAME_CHARS, _MAX_GLUED_CHARS, _LONGEST_WORD = 4096, 128, 24, 16
_STEMS = _STEMS.union(STRONG_WORDS, WEAK_WORDS)
STEMS = [stem for stem in _STEMS if not any(part in stem and part != stem for part in _STEMS)]


def _singular(word: str) -> str:
    return word[:-1] if word[-1:] == "s" and word[:-1] in _KNOWN_WORDS else word


def _unglue(word: str) -> list[str]:
    """Split a word such as `accesstoken` into known words."""
    if _singular(word) in _KNOWN_WORDS or len(word) < 5 or word in NO_SECRETS:
        return [word]
    splits: dict[int, list[str]] = {len(word): []}
    for start in range(len(word) - 2 if len(word) <= _MAX_GLUED_CHARS else -1, -1, -1):
        for end in range(min(len(word), start + _LONGEST_WORD), start + 1, -1):
            if end in splits and _singular(word[start:end]) in _KNOWN_WORDS:
                splits[start] = [word[start:end], *splits[end]]
                break
    parts = splits.get(0, [])
    secret = not STRONG_WORDS.union(WEAK_WORDS).isdisjoint(map(_singular, parts))
    if secret or "+".join(parts[:2]) in PHRASES:
        return parts
    suffix = re.search(GLUED_SUFFIXES, word)
    return [word[: suffix.start()], *_unglue(suffix[0])] if suffix else [word]


def _name_words(name: str) -> list[str]:
    """Split names such as `X-API-Key`, `JWTSecret`, `password2`."""
    if not name.isascii():
        import unicodedata

        name = unicodedata.normalize("NFKC", name)
    words: list[str] = []
    for piece in re.findall(_CAMEL if name.isascii() else r"[^\W\d_]+", name[-_MAX_NAME_CHARS:]):
        for word in _unglue(piece.lower()):
            if words and (joined := PHRASES.get(f"{words[-1]}+{_singular(word)}")):
                words[-1] = joined
            else:
                words.append(word)
    return words


def _judge_name(name: str) -> int:
    """Return how surely a name is a secret's: 0 (harmless), 1 or 2."""
    words = _name_words(name)
    # `token_for_x` and `value_of_token` are tokens, `number_of_tokens` is none.
    ends = (at for at, word in enumerate(words) if at and word in ("for", "of"))
    words = words[: next((at for at in ends if words[at - 1] not in STILL_SECRET - {"number"}), None)]
    if (plain := "".join(words)) in SPEC_NAMES:
        return 1 if plain in WEAK_WORDS else 2
    if words[:1] == ["sensitive"] or words[1:][-1:] == ["wo"]:  # Terraform's write-only attributes
        return 2
    singular = list(map(_singular, words))
    heads = [at for at, word in enumerate(singular) if word in STRONG_WORDS or word in WEAK_WORDS]
    if not heads:
        return 0
    head, before, tail = singular[at := heads[-1]], singular[:at], singular[at + 1 :]
    strong = head in STRONG_WORDS
    # "auth header" is what it holds, "api key header" what it is called.
    held = ("header",) if head in ("auth", "authorization", "cookie") else ()
    flags = FLAG_WORDS | VERBS if strong else FLAG_WORDS
    if not flags.isdisjoint(before) or not STILL_SECRET.union(held).issuperset(tail):
        return 0
    if strong or (head != "auth" and not STRONG_WORDS.isdisjoint(before)):
        return 2
    twin = head == "key" and len(before) > 1 and "primary" in before  # an account has two
    harmless = not WEAK_WORDS[head].isdisjoint(before[-1:]) and not twin
    if harmless or not {"no", "num", "number"}.isdisjoint(tail):
        return 0
    opened, plural = not OPENERS.get(head, NO_SECRETS).isdisjoint(before), words[at] != head
    # A key is a secret behind a protocol's abbreviation (`ntp_key`), as a document, or in capitals.
    short = any(1 < len(word) < 5 and not re.search("[aeiouy]", word) for word in before)
    shouted = (name.isupper() or name[:2] in ("X-", "x-")) and before and not plural
    secret = {
        "key": opened or twin or short or not KEY_DOCUMENTS.isdisjoint(tail) or shouted,
        "cookie": opened or not plural or not before,
        "auth": opened or (not before and bool(tail)),
        "authorization": not plural and OPENERS["authorization"].issuperset(before),
    }.get(head, opened or head in ("jwt", "pass") or (head in ("token", "pin") and not plural))
    return (2 if before else 1) if secret else 0


def _normal(name: str) -> str:
    return re.sub(r"[\s_.\-]+|#[0-9]+$", "", name).casefold()


def _read_names(entries: Iterable[str]) -> frozenset[tuple[str, str]]:
    parts = (part for entry in entries for part in (entry.rpartition("."), ("", "", entry)))
    return frozenset((_normal(tool), _normal(name)) for tool, _, name in parts)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    groups = itertools.groupby(sorted(set(words)), key=lambda word: word[0])
    ends = ((first, "|".join(re.escape(word[1:]) for word in group)) for first, group in groups)
    return re.compile("|".join(f"{re.escape(first)}(?:{rest})" for first, rest in ends))


# --- where a text holds a secret


@functools.cache
def _re(pattern: str) -> re.Pattern[str]:
    """Compile a pattern when it is first needed: all of them take 30 ms."""
    return re.compile(pattern)


# How a name in a text leads to its value, by the group's name. Every repeat is bounded.
_SEPARATOR = r"""(?x)(?P<rest>[\w.\-]{0,64})(?![\w.\-])(?:
    (?P<typed>(?::[ ]?&?|[ ]As[ ])[A-Za-z_][\w.,\[\]]{0,40}(?:[ ]\|[ ]\w{1,20}){0,2}
      [ ]?=[ ]?(?=(?:\w{1,16}\(default=)?[bBrRuUfF]{0,2}["'`]))
  | (?P<assign>\\{0,32}(?:["'`]|\*\*)?(?:\[\]|\])?(?:[ ]\(\w+(?:[ ]\w+){1,5}\)(?=:)|[ ]\.{2,40})?[ \t]{0,40}
      (?:=>|->[ ]|:=|[!<>=|?]{0,2}=|<>|<-[ ]|::[ ]|:(?![:/]))(?:\*\*)?
      (?:[ \t]{9,40}(?=\S)|\s{0,8})(?:!(?:vault|!\w{1,16})\s{1,4}|\\\r?\n\s{1,16})?)
  | (?P<sibling>(?:\\{0,32}["']|\r?\n|,?[ ](?=[vV]alue[:=]))\s{0,64},?\s{0,8}\\{0,32}["']?\w{0,16}[vV]alue
      \\{0,32}["']?\s{0,8}[=:]\s{0,8}|["']?[ \t]-[vV]alue[ \t]{1,4}|</(?:key|name|t[hd]|dt)>\s{0,64}
      (?:<(?:string|value|td|dd)>){1,2}
      | ["']\s{0,4}\{(?:\s{0,16}[a-z]{4,12}\s{0,16}=[^\n]{0,200}\n){0,4}?\s{0,16}default\s{0,16}=\s{0,8})
  | (?P<percent>%(?:25)?(?:3[dD]|22%(?:25)?3[aA](?:%20|\+)?%(?:25)?22))
  | (?P<model>\r?\n[ \t]{1,8}[^\n]{1,300}?\binput_value=)
  | (?P<part>\\{0,8}"(?:\r\n[^\r\n]{1,80}){0,3}(?:\r\n\r\n|\\r\\n\\r\\n|\n\n))
  | (?P<pair>(?:\]?\\{0,8}["']|(?<=[A-Z]))(?:\s?,\s{0,8}(?:default=)?|\)\.(?:\w{3,16}\(|value[ ]?=)\s{0,4})
      (?=b?\\{0,8}["'`])) | (?P<quoted>[ \t]{1,4}(?:(?:I?LIKE|IN|BY|TO)[ \t]{1,4}\(?)?(?=["'`]))
  | (?P<prose>[ \t](?:(?:for|of)[ ](?:\S{1,40}(?<!:)[ ]){1,5}?|(?:you|we|I)[ ](?:\w{1,12}[ ]){1,4}?)?(?:
    (?:for[ ]\S{1,40}|(?<=[ ])(?:for|you|below|with)):[ ]|\(|(?:is|was|are|ist|lautet|es|est|è|é|provided
    |given|(?i:from)(?=[ ]["'`])|(?:(?:ha[sd][ ]been[ ])?(?:re)?(?:set|changed)[ ])?to|[-–—])[ :][ \t]{0,4}))
  | (?P<element>(?:["']?|["']?\s[^<>]{0,200})>\s{0,8}(?:<!\[CDATA\[|<[vV]alue>)?(?=[^<\s]))
  | (?P<call>\(\s{0,4}(?=[bBrRuUfF]{0,2}\\{0,8}["'`])) | (?P<option>[ \t]{1,4}(?:ENC[ ])?(?=[^\s-]))
)"""
_NO_ELEMENT = _SEPARATOR.replace("<element>", "<element>(?!)")  # outside of `<`
_QUOTE = r"""(?x)(?:(?:new\s|[A-Za-z_]{1,24}(?:::|\.))?[A-Za-z_]\w{0,23}\((?:default=)?|\([ ]?\n\s{1,40})?
    [@$bBrRuUfFN]{0,2}(\\{0,32})(["'`])(?:(\2\2)(?!\2)|\2(?=[\w!@#$%^*+]))?"""
_MORE = r"""["'`](?: (?:->|=>|to|TO) |\s{1,20})(?=(["'`]))(?!\1\1|\1[^"'`\n]*\1\s*[:=])"""  # `"old" -> "new"`
_BLOCK = r"""(?x)[|>][+-]?[ \t]*\n([ \t]+).*(?:\n\1.*)* | <<\S?["']?(\w+)["']?\s*\n[\s\S]{0,2000}?\n\s*\2\b"""
_MARKED = r"\[REDACTED(?::[0-9a-f]{8})?\]"
_BARE = rf"""(?x)(?:{_MARKED}|(?:[^\s,;&'"`<>)\]}}\\]
  |,(?!\s|[A-Za-z_][A-Za-z_.\-]{{1,40}}[0-9]?[=:]|\Z) | ;(?!\s|[A-Za-z_][A-Za-z_ .\-]{{1,40}}[0-9]?=|\Z)
  |&(?![A-Za-z_](?:[A-Za-z_.%\[\]\-]{{1,64}}[0-9]{{0,2}})?=|amp;)
  |[)\]}}>"'](?=[\w!@#$%^*+]) | \\(?!["'nrt\\]) | <(?![/A-Za-z]))*)"""
_BRACKETS = r"""(?s)\\.|[()\[\]{}]|"(?:[^"\\]|\\.)*(?:"|\Z)|'(?:[^'\\]|\\.)*(?:'|\Z)"""
# What stands for a secret, or says something about it, is none.
_PLACEHOLDER = r"""(?x)(?:(?i:bearer|basic|token)[ ]+(?=[$%{<*.x]))?(?:
    \?|\[\s*\]|\{[\s.]*\}|\{[a-z_]+(?:\.[a-z_]+)*(?::\w*|[\[(][^{}\n]{0,80})?\}|\$(?:env:)?\w+
  | [$#%]\{[^\n]{0,200}|\{\{(?!\s*['"])[^\n]*|\$\([^\n]{0,200}|%s|%\(\w*\)s|%\w+%|<[\w .-]*>?
  | [0-9]{1,2}|<[%?]=?|~|[*!•●]+(?:[A-Z]+\*+)?|\.\*\S*|DEFAULT|PASSWORD
  | (?:\w{1,12}[-_])?(?:[xX]{3,}|\.{3}|…)|\[(?:[A-Z]{3,16}|\w{2,12}(?:ed|den)|secure)\]|!\w+|@[\w.]+@)
  | \{\s*\\{0,8}["']?\$ref\\{0,8}["']?:[^\n]*
  | \{\s*\\{0,8}["']?type\\{0,8}["']?:\s*\\{0,8}["']?(?i:string|integer|number|boolean|array|object)\b
    (?![\s\S]*(?:value|default|example))[\s\S]*  # a schema; a file; an entry of a secret manager
  | [\w.~/-]*\.(?:txt|pem|key|json|ya?ml|conf|cfg|ini|crt|env)|projects/[\w-]+/secrets/\S+
  | (?:[.~]{0,2}/(?:[a-z._-]+/)+|[.~]{1,2}/)[a-z._-]+|(?:env|file|op|vault|ssm|arn|secretref):\S+
  | (?i:null|none|nil|undefined|true|false|string|utf-?8|include|omit|inherit|same-origin|enter|escape|tab
    |backspace|[a-z]+(?:error|exception)|(?:your|insert|enter|replace|change)[_ -][\w -]*)
  | (?:process|var|self|this|env|os|vars|local)\.[\w.#]+!?(?:[\[(][^\n]{0,80})?|lambda\b.*
  | (?=[^\n]*[%{][a-z_])(?:[^\w{}%]|%[sdr]|\{[a-z_][\w.]*(?:[!:\[(][^{}\n]{0,40})?\})+|__\w+__|[$@&:][a-z_]+
  | [\^~v]?[0-9]{1,3}(?:\.[0-9]{1,3}){1,3}|\#[0-9a-fA-F]{0,8}|//  # a version, a colour; a pattern
  | [^\n]*(?:\[\^|\[a-zA-Z|\(\?[:=!<P]|\\[wdsWDS](?:[+*\])]|\Z))[^\n]*"""
# Prefixes of issuers, each before 16 word characters or dashes.
TOKEN_PREFIXES = r"""
gh[opsur]_ github_pat_ gl(?:pat|dt|rt|rtr|cbt|ptt|ft|imt|agent|oas|soat|ffct|wt)- xox[abceoprs]- xapp- xwfp-
[sr]k_(?:live|test)_ whsec_ sk-ant- sk-proj- sk-svcacct- sk-admin- sk-or- sk-(?=[a-zA-Z_-]{0,40}[0-9]) gsk_
xai- pplx- nvapi- r8_ tvly- lsv2_(?:pt|sk)_ jina_ fc-(?=[0-9a-f]{32}) hf_ api_org_ pcsk_ tgp_v1_
sk_(?=[0-9a-f]{48}) AIza GOCSPX- A(?:KIA|SIA|BIA|CCA)(?=[A-Z0-9]{16}(?![A-Za-z0-9])) npm_ pypi- rubygems_
oy2(?=[a-z0-9]{43}) dckr_[po]at_ do[opr]_v1_ shp(?:at|ca|pa|ss|tka)_ SK(?=[0-9a-f]{32}) key-(?=[0-9a-z]{32}\b)
sq0(?:atp|csp|idp)- EAAA(?=[\w-]{60}) EAA(?=[A-Za-z0-9]{40}) tskey-(?:auth|api|client)- fm[12]_
pat-(?:na|eu)[0-9]- ntn_ secret_(?=[A-Za-z0-9]{43}) lin_(?:api|oauth)_ figd_ figo_ glsa_ glc_ sntry[su]_ PMAK-
pul- dapi(?=[0-9a-f]{32}) sbp_ sb_secret_ pscale_(?:tkn|pw|oauth)_ nfp_ fo1_ NRAK- NRII- HRKU- CCIPAT_ bkua_
ATATT3 ATCTT3 ATBB AKCp LTAI xkeysib- tfp_ CFPAT- EZAK shippo_(?:live|test)_ rdme_ ops_eyJ AGE-SECRET-KEY-1
phx_ re_(?=[A-Za-z0-9]{8}_) rnd_ waka_ napi_(?=[a-z0-9]{64}) csk-(?=[a-z0-9]{40}) e2b_(?=[0-9a-f]{40})
bb_live_ sgp_ sq[apu]_ pnu_ dbt[cu]_ duffel_(?:live|test)_ dnkey- fio-u- y0_A FLWSECK(?:_TEST)?- CLOJARS_
cio(?=[A-Za-z0-9]{32}(?![\w-])) AKID(?=[A-Za-z0-9]{32}(?![\w-]))
"""
# In `\nghp_…` and `%3Dghp_…` an escape's end comes first.
_TOKEN = rf"""(?x)(?<![A-Za-z0-9_\-])(?=[A-Za-z0-9_\-]{{16}})(?:(?<=\\)[nrtfb]|(?<=%)..)?
  ((?:{"|".join(TOKEN_PREFIXES.split())})(?=[a-z_\-]{{0,40}}[A-Z0-9])[A-Za-z0-9_\-]{{16,}})"""
DOTTED_TOKENS = r"""
eyJ (?:(?<![\w-])|(?<=\\[nrt]))eyJ[\w-]{8,}(?:\.[\w-]*){1,4}  8Q~ (?<![\w~.-])[\w~.-]{3}8Q~[\w~.-]{31,34}
hooks.slack.com/ (?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[\w/-]+  sl. \bsl\.(?:u\.)?[\w-]{60,}
webhook (?<=/webhooks/)[0-9]{9,20}/[\w-]{30,}|(?:(?<=/webhookb2/)|(?<=\.com/webhook/))[\w@/-]+
.atlasv1. \w{14}\.atlasv1\.[\w-]{20,}  . [MNO](?<![\w.-][MNO])[\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w-])
. \b(?:ya29|AQ|hv[sbr])\.[\w-]{16,}  $ \$(?:apr1|[1567y]|2[abxy]|argon2(?:id?|d))\$[\w./+,=$-]{20,}
: [0-9]{8,10}:[\w-]{34,40}(?![\w-])  / \b[12]/[0-9]{13,19}(?:/[0-9]{13,19})?:[0-9a-f]{32}\b
dt0 \bdt0[a-z][0-9]{2}\.[A-Z0-9]{24}\.[A-Z0-9]{64}\b  dp. \bdp\.(?:pt|st|ct|sa|scim|audit)\.[\w.-]{16,}
SG. \bSG\.[\w-]{16,}(?:\.[\w-]+)?  1// \b1//0[\w-]{20,}  xoxe. \bxoxe\.xox[bp]-[\w-]{16,}
pat \bpat\w{14}\.[0-9a-f]{64}\b  -us [0-9a-f]{32}-us[0-9]{1,2}\b  vk1.a. \bvk1\.a\.[\w-]{60,}
sha256~ \bsha256~[\w-]{43}
"""
_CARD = r"""(?x)([2-6](?:(?<![\w\-][2-6])(?<![0-9]\.[2-6])|(?<=\\[nrt][2-6]))(?:[0-9]{13,18}
  |[0-9]{3}([ -])[0-9]{4}\2[0-9]{4}\2[0-9]{4}|[0-9]{3}([ -])[0-9]{6}\3[0-9]{4,5})(?![\w-]|\.[0-9]))"""
_SSN = r"""(?x)([0-8](?:(?<![\w\-][0-8])(?<![0-9]\.[0-8])|(?<=\\[nrt][0-8]))
  [0-9]{2}(?<!000)(?<!666)-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-]|\.[0-9]))"""


def _looks_secret(value: str) -> bool:
    """Return True if a bare word can't be ordinary language."""
    if any(map(str.isdigit, value)):
        return len(value) >= 4
    mixed = len(value) >= 6 and value[1:] != value[1:].lower() and value != value.upper()
    return mixed or len(value) >= 24 or re.search(r"[!@#$%^&*+=?~].|^[|>].*\n", value) is not None


def _is_mixed(value: str) -> bool:
    return _re(r"(?=.*[a-z])(?=.*[A-Z!#$%^&*+?~])(?=.*[0-9]).{8,}").match(value) is not None


def _is_card(number: str) -> bool:
    digits = re.sub("[ -]", "", number)
    total = sum(sum(divmod(int(digit) * (1 + at % 2), 10)) for at, digit in enumerate(digits[::-1]))
    issued = r"""(?x)4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}
        |6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|62\d{14,17}"""
    return total % 10 == 0 and _re(issued).fullmatch(digits) is not None


_USER = r"[^\s/?#\"'<>\\`:@]{0,200}"
_STRING = r"""(?:"[^"\n]{0,200}"|'[^'\n]{0,200}'|[\w.]{1,60})"""
_CALL_WORDS = _words_in("""auth credential passw crypt cipher hmac jwt keyspec pbkdf2 hs256 bind login connect
signer signwith pdo aes fernet hashpw cookieparser""")
_CALLS = rf"(?i)(?:{'|'.join(sorted(_CALL_WORDS))})\w{{0,16}}(?:(?:\.|::|->)\w{{1,16}})?\("
_LITERAL = r"""["'`]([^\s"'`\\/,;]{8,128})["'`]|\)[;\s]|\n"""
_ASKS = r"(?:sudo\s-\w*S|stdin|with-token|passwd|kinit|cryptset|se-fd|(?:env|secrets?) (?:\w+ )?[psa][ued]t?)"
# Rule ~ texts, one of which is there ~ what the last group must pass ~ pattern (no group: a quoted value)
_PLACES = r"""
a password in a URL ~ :// ~ ~ ://(?!\[)<U>:(?![0-9]+(?:[/?#\s]|\Z))([^\s/?#"'<>\\`]+(?=@)
 |[^\s"'<>\\`]{1,300}(?=@))
a token in a URL ~ :// ~ secret ~ ://([^\s/?#"'<>\\`:@]{16,200})(?=@)
a private key ~ -----begin|private-lines ~ ~ (-----BEGIN (?:[\w ]{0,40}PRIVATE KEY|OpenVPN Static)[\w ]{0,9}
 -----[\s\S]*?(?:-----END[^\n-]{0,60}--|\Z)-*)|Private-Lines:[ ]\d+\s+((?:[\w+/=]{4,}\s{0,2}(?![A-Z]\w+-))+)
credentials of a scheme ~ bearer|basic ~ ~ \b(?i:bearer)[ \t]+(?=[\w.~+/-]{24}|[A-Za-z_.~+/-]{0,40}[0-9])
 ([\w.~+/-]{8,}=*)|\b(?i:basic)[ \t]+
 ((?=(?:\w{4})*(?:O[g-v]|.[DTjz][o-r]|..[AEIMQUYcgkosw048]6))[\w+/]{8,}={0,2})
a password in a connection string ~ :thin:|@tcp(|@unix(|@localhost|@127.|@10.|@192.168.|@172. ~ ~
 :thin:[^\s/@]{1,64}/([^\s@]{1,128})(?=@)|(?<![\w./-])[\w.-]{1,64}:([^\s"'`/]{1,128})
 (?=@(?:(?:tcp|unix)\(|localhost\b|1(?:0|27|72|92\.168)\.))
a password beside its user ~  -u| --user|creds| --proxy-u ~ secret ~ \s(?:-u|-U|--(?:proxy-)?user
 |--(?:src-|dest-)?creds)[ =]["']?[^\s:'"=/]{1,64}:(?!\S*//|[0-9]+(?!\S))([^\s'"]+)
a password beside its user ~  -p ~ secret ~ \s(?:-u|-U|-l|-n|--user|--username|--login)[ =]?["']?[\w.@\\-]
 {1,64}["']?(?:\s-\S+(?:\s[^\s-]\S*)?){0,4}?\s-(?:p|P|pw|pass)[ ](?![0-9]+(?!\S))([^\s'"|:/]{6,64})(?!\S)
a password beside its user ~ sqlplus|expdp|impdp|sqlldr ~ ~ \b(?:sqlplus|expdp|impdp|sqlldr)\s
 (?:-\S+\s){0,4}[\w."]{1,64}/([^\s@/]{1,128})
a secret of a device ~ community|setuser|on >|secret |password |key |: eap|"auth" |wifi: ~ ~ \bcommunity[ ]+
 (\S{4,64})[ ]+(?:R[OW]|authorization)\b|\br[ow]community6?[ ]+(\S{4,64})|\b(?:secret|password|key)[ ][05789]
 [ ](\S{4,128})|(?i:\b(?:set)?user\s+\S{1,64}(?:\s+['"]?(?:on|off|reset\w*|[~&%+-]\S{1,64})){1,8}\s+['"]?>)
 ([^\s'"]{1,128})|[ ]:[ ]EAP[ ]"([^"\n]+)|"AUTH"(?:[ ]"[^"\n]*")?[ ]"([^"\n]+)"|WIFI:(?:[^;\n]*;){0,6}?P:
 ([^;\n]+)|Key[ ]Content[ ]+:[ ](\S+)
a password of a login module ~ loginmodule ~ ~ \buser_\w{1,64}=(?=")
a key of a device ~ createuser|snmp-server |-digest-key|ascii-text ~ secret ~ (?i)(?:host[ ]\S{1,64}[ ](?:
 version[ ]\w{1,2}[ ])?|ascii-text[ ]|[ ](?:md5|sha|3?des|aes)(?:[ -]?\d+)?[ ]+(?:\d[ ])?)["']?([^\s"']{4,99})
a protocol's line ~ pass |ogin |auth |dentify |334 ug|:587|:465 ~ secret ~ (?m)^(?:
 (?:[<>*CS]:?\s)?(?:PASS(?![ ]\S+/\S+\.[a-z]{1,4}\b)
 |AUTH(?: PLAIN)?|\w{1,8} LOGIN \S{1,64}|:?IDENTIFY|user \S{1,64})[ ]|334 UGFzc3dvcmQ6\s+(?:C: )?
 |\[[\w.-]{1,100}\]:[0-9]{2,3}[ \t]+[\w.@-]{1,64}:)(?![0-9]+\s*$)("(?:[^"\\\n]|\\.){1,99}"|\S{4,200})\s*$
a line of a client's file ~ :5432:|:*:|login ~ ~ (?m)^[\w.*-]{1,99}:(?:\d{2,5}|\*):[\w*-]{1,64}:[\w*.-]{1,64}:
 (.+)|\blogin[ ]\S{1,64}\s{1,40}password[ ](\S+)
what is sent to a prompt ~ send "|send -- " ~ ~ (?i)ass(?:word|phrase|code)[^"\n]{0,10}"[;\s{}]{1,8}send\s+
 (?:--\s+)?"([^"\n\\]{1,128})
a code for one use ~ code=|otp|code is|se code|passcode ~ secret ~ [?&](?:code=([\w.~/%+-]{8,})&
 (?=(?:state|scope|iss|session_state)=)|state=[\w.%~+-]{1,200}&code=([\w.~/%+-]{8,}))|(?i:\b(?:otp|passcode|
 (?:verification|one-time|security|login|access|2fa|mfa|your|use)[ ]code)(?:[ ]is)?[ :]{1,3})
 ((?:[A-Z]-)?[0-9]{3}[ -]?[0-9]{1,5})\b
a password beside its user ~ login: |credentials|creds|ign in|og in ~ secret ~ (?i)\b(?:login|credentials?
 |creds|(?:log|sign)[ ]in[ ](?:to[ ]\S{1,40}[ ])?(?:with|as))
 (?:[ ](?:are|is))?[ :]{1,3}[\w.@-]{1,64}[ ]/[ ](\S{6,64})
what shall be a password ~ as the |as your |as my ~ secret ~ (?i)\buse[ ]([^\s"']{6,64})[ ]as
 [ ](?:the|your|my)[ ](?:\w{1,12}[ ])?(?:password|passphrase|token|key|secret|pin)\b
what is piped to a prompt ~ cho|printf ~ ~ \b(?:echo|printf)[ ]+(?:-n[ ]+|['"]?%s(?:\\n)?['"]?[ ]+)?['"]?
 (?:[\w.@-]{1,64}:(?=[^\n]{1,200}chpasswd))?([^\s'"|$][^'"|\n]{0,200}?)['"]?[ ]*\|(?=[^|;\n]{0,200}<A>)
a step's secret ~ ::add-mask:: ~ ~ ::add-mask::([^\r\n]{4,500})
what is handed to a prompt ~ <<< ~ ~ <A>[^<|;\n]{0,200}<<<[ ]?(?=["'\w])
IDENTIFIED BY ~ dentified|password for ~ ~ (?i:identified\s+(?:with\s+\S{1,60}\s+)?(?:by|as)\s+
 (?:password\s+)?|["']\s+replace\s+|password\s+for\s[^=\n]{1,100}=\s*(?:password\()?)(?=["'])
 |\bIDENTIFIED\s+BY\s+([^\s"';(]+)
an array of characters ~ chararray() ~ secret ~ "([^"\n]{4,200})(?="\.toCharArray\(\))
a function's argument ~ crypt(|connect|sqli|pdo(|ftplib|smtp.start|jwt.|sp_addl|securestring|.fill( ~ ~ (?i:
 \.fill\([^,\n]{1,60}passw[^,\n]{0,40},\s*|pgp_sym_(?:en|de)crypt\([^,()]{1,200},\s*|\bcrypt\(\s*|sp_addlinkedsrvlogin(?:[^,\n]{1,80},){4}\s*
 |(?:getconnection|mysqli?_connect|mysqli|pdo|\bftp(?:_tls)?|dbi->connect)\(\s*<S>\s*,\s*<S>\s*,
 \s*|sp_addlogin\s+<S>\s*,\s*|\bsmtp\.start\(\s*(?:<S>\s*,\s*){4}
 |\bjwt\.\w{4,6}\(\s*(?:\{[^{}]{0,200}\}|[^,()]{1,100}),\s*|securestring\s+(?:-\w+\s+){0,2})(?=["'])
credentials of a user ~ auth|ogin|cred ~ ~ (?i:\b(?:\w{0,24}basic_?auth|\w{0,24}login|auth|authenticate
 |\w{0,24}credentials?)\s?[=(][\s(]{0,3}<S>\s*,\s*)(?=b?["'])
a password behind its scheme ~ ssha}|plain}|crypt}|sha}|d5} ~ ~ (?i)\{(?:S?SHA(?:256|512)?|PLAIN|S?MD5
 |[a-z0-9-]{0,12}CRYPT)\}([^\s:"',<>]{4,})
the words of a wallet ~ mnemonic|phrase|seed ~ ~ (?:nemonic|hrase|eed)\W{1,6}(?:(?:is|words)\W{1,3})?
 ((?:[a-z]{3,8}\s){11,23}[a-z]{3,8})\b
a named social security number ~ ssn|social sec ~ ~ (?i:\b(?:ssn|social security(?: (?:number|num|no\.?))?)
 (?:\s{1,4}(?:is|was))?[\s:#=]{0,4})([0-9]{3}[ -]?[0-9]{2}[ -]?[0-9]{4})(?![\w-])
"""
# Programs | a word that must be an argument | places of secrets: `-p` in its word or the next, `-p+` in its
# own, `-p.` in the next, `-u:` behind that sign, `#2` the second word after the required that is no option.
_COMMANDS = r"""
mysql mysqldump mysqladmin mysqlimport mysqlshow mysqlsh mariadb mariadb-dump mariadb-admin || -p+
curl http https xh wget skopeo || -u: -U: --user: --proxy-user: --creds: --auth: -a: -b= --cookie=
ldapsearch ldapadd ldapmodify ldapdelete ldapwhoami ldapcompare ldapmodrdn vsql || -w ; ldappasswd || -w -s -a
cqlsh rabbitmqadmin winrs twine useradd usermod psexec ncftpput ncftpget altool || -p ; wpa_passphrase || #2
snmpget snmpset snmpwalk snmpgetnext snmpbulkget snmpbulkwalk snmptrap || -c -A -X ; openssl | passwd | #1 #2
sqlcmd bcp osql tsql isql ipmitool zip unzip mosquitto_pub mosquitto_sub || -P ; aws | SecureString | --value
sshpass mongo mongosh mongodump mongorestore mongoexport mongoimport || -p ; redis-cli valkey-cli || -a
docker podman buildah nerdctl helm oras crane oc az cf | login | -p ; htpasswd mosquitto_passwd | -b | #2 #3
gh az flyctl databricks | secret | -b --body --value --string-value ; 7z 7za 7zr 7zz rar unrar || -p+ -hp+
curl http https xh || -E: --cert: --bearer. --oauth2-bearer. ; smbclient rpcclient smbget smbcacls net || -U%
openssl || -k. -K. -hmac. -pass: -passin: -passout: ; poetry composer | http-basic\.[^\x1f]+ | #2
xfreerdp signtool schtasks || /p /rp ; rabbitmqctl | [ac][a-z]+_[a-z]+ | #2 ; security certutil || -p -w
redis-cli valkey-cli | AUTH | #1 #2 ; reg | [^\x1f]*[pP]assw[^\x1f]* | /d ; poetry | pypi-token\.[^\x1f]+ | #1
ansible-vault | encrypt_string | #1 ; cargo vault | login | #1 ; isql iusql | -v | #3 ; ssh-keygen || -N -P
vault | unseal | #1 ; influx doctl || -t. ; mc mcli | set | #4 ; net | use | #2 #3 ; db2 | using | #1
net | user | #2 ; nsupdate || -y: ; lftp || -u, ; qpdf | --encrypt | #1 #2 ; radtest || #2 #5
"""
_LISTED_WORD = r"""["'](?:\s{0,4},\s{0,4}|\sa[0-9]{1,3}=)["']((?:[^"'\\]|\\.)*)(?=["'])"""
_SHELL_WORD = r"""(?x)[ \t]+(?:\\\r?\n[ \t]*)*
    ((?:[^\s"'`|;&<>()\\]|\\[^\n]|[&;|](?=[^\s&;|])|"(?:[^"\\]|\\.){0,500}"|'[^']{0,500}')+)"""
_PASSWORDS = _words_in("password passwd pwd passphrase passcode pass pw")
_REFERENCES = _words_in("secret secrets credential credentials")
_ALGORITHMS = _words_in("sha1 sha256 sha384 sha512 md5 argon2 argon2id pbkdf2 base64 oauth2 ed25519")
_DEFAULTED = r"""string\(\d+\) |[\w.]+(?:\([^()\n]{0,80}\))? (?:or|\|\||\?\?|\+) (?=["'`])"""  # `key or "X"`
_REMARKS = _words_in("""a an the this that is are was must should may can cannot will not no yes on off too at
in of for from to and or with field required optional missing invalid incorrect wrong expired empty unset
unknown expected unexpected got see value string str text int integer bool boolean bytes object read write
option options flag flags argument arguments parameter array list dict number type any strict bearer basic
only same all different varchar char secretstr uuid float password raise return stored accepted rejected
generated created valid using enabled disabled needs min max""")
_HEADER_NAMES = _words_in("authorization proxy-authorization cookie set-cookie")
_SCHEMES = _words_in("bearer basic token apikey api-key key bot negotiate ntlm jwt")
# In "API key: …" and "verification code is …" the word before belongs to the name.
_OPENERS = STRONG_WORDS.union(OPENERS["key"], OPENERS["token"], OPENERS["code"], {"api", "de"})
_NAME_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
_PLAIN_SIGNS = str.maketrans("\u00a0\u3000\u202f，：＝→⇒“”„«»‘’‚", '   ,:==="""""\'\'\'', "\0")
_DISGUISES = r"(?:\x1b|\\(?:x1b|u001b|033|e))\[[0-9;]{0,16}m|&(?:quot|#34|lt|gt);|\\u00(?:22|(26|3[a-eA-E]))"
_SIGNS = {"&quot;": '\\"', "&#34;": '\\"', "\\u0022": '\\"', "&lt;": "<", "&gt;": ">"}
_INSERT = r"\b(?i:insert|replace)\s+(?i:into)\s[^()]{1,200}\(([^()]{1,1000})\)\s*(?i:values)"
_SQL_TEXT = r"""(?s:'(?:[^'\\]|\\.|'')*(?:'(?!')|\Z)|"[^"]*")"""
_SQL_ROW = rf"""\s*,?\s*\(((?:{_SQL_TEXT}|\([^()]*\)|[^()'"])*)(?:\)|\Z)"""
_SQL_ITEM = rf"""\s*({_SQL_TEXT}|(?:\([^()]*\)|[^,()'"])*)\s*(?:,|\Z)"""
_MAX_ECHOES, _MIN_ECHO, _MAX_DOUBTED = 64, 12, 1000
_ASKING = r"(?i:get|env|input|prompt|read|load|ask|open|file|param|lookup|fetch|find|credential|require)\w*\("
# In a bare value's place: a call or an index; an expression; a type; a sentence.
_SOURCE = r"""(?x)[\\&*$@%]{0,2}[A-Za-z_](?:[\w.]|\?\.|::|->)*(?:(?:<[\w, ]{1,40}>)?[(\[]|->) | \( | \\&\w
  | (?:new|await|yield|not|async|function|[A-Z][a-z]+-[A-Z]\w+)[ ] | [A-Za-z_.]+[ ][+%?][ ]
  | (?<==[ ])[A-Za-z_.]+[ ](?:or|and|if|else|\|\||&&)[ ]
  | (?<=:[ ])[A-Za-z_.]+(?:[ ]=[ ]
      |(?:\[[^\n]{0,80}\])?(?:[ ]\|[ ][\w.]+(?:\[[^\n]{0,80}\])?){0,4}[ ]\|[ ](?:None|str|bytes)\b)
  | (?<=\w[ ])[a-z]+[ ](?:the|an?|to|is|with|of|for|instead)\b"""
_SCHEMA = r"(?:description|type|title|name|\$ref):(?![\s\S]*\b(?:value|default|example)s?:)"  # of a field
_SENTENCE = _words_in("a an the to of for used if is are with from by in as or key token secret password")
_REFERENCE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|(?!my|super|top|your|test|very)_?[a-z]+(?:[_-][a-z]+)+"
_RUNS = bytes(ord("w") if chr(byte) in _NAME_CHARS and byte != 46 else 32 for byte in range(256))
_DIGITS = bytes.maketrans(b"123456789", b"000000000")  # all digits as `0`, as those of tokens are `w`


def _argument_pattern(place: str, need: str) -> str:
    """Return the pattern of a place in words joined by U+001F."""
    if place[0] == "#":  # `-x` and `/x` are no plain words, `/etc/x` is one
        flag = r"(?:-|/\w+(?::[^\x1f]*)?(?:\x1f|\Z))"
        skip, plain = rf"(?:\x1f(?={flag})[^\x1f]*)*", rf"\x1f(?!{flag})[^\x1f]+"
        before = (need or r"\A[^\x1f]+") + (skip + plain) * (int(place[1:]) - 1)
        return rf"{before}{skip}\x1f(?!{flag}|[a-z_]+=|\\)([^\x1f]+)"
    option, how = (place[:-1], place[-1]) if place[-1] in ":%,=+." else (place, "")
    joined = "[=:]?" if len(option) < 4 else "[=:]"
    apart = {"+": joined, ".": r"\x1f"}.get(how, rf"(?:\x1f(?!-)|{joined})")
    apart += r"(?![0-9]{2,5}(?:\x1f|\Z))" if place == "-p" else ""  # a port
    user = "" if how in "+." else rf"(?!(?:env|file|fd|https?):)[^\x1f{how}]*{how}"
    return rf"\x1f(?{'i' if option[0] == '/' else ''}:{option}){apart}{user}([^\x1f]+)"


class _Rules:
    def __init__(self, redact: Iterable[str], keep: Iterable[str], key: bytes | None) -> None:
        self.redact, self.keep, self.key = _read_names(redact), _read_names(keep), key
        self.strength = functools.lru_cache(_MAX_VERDICTS)(self.judge)
        self.harmless: dict[str, str] = {}  # short texts without a secret, as JSON
        own = {max(re.findall(_CAMEL, name) or [name], key=len)[:4].lower() for _, name in self.redact}
        self.stems = _any_of((*STEMS, *own))
        self._places: list[tuple[str, Iterable[str], Any]] = []
        for rule, gates, check, place in re.findall(r"(.+) ~ (.+) ~ (.*?)~\s+(.+(?:\n .+)*)", _PLACES):
            place = (
                place.replace("\n ", "").replace("<U>", _USER).replace("<S>", _STRING).replace("<A>", _ASKS)
            )
            find = functools.partial(self._placed, pattern=place, accept=_looks_secret if check else None)
            self._places.append((rule, gates.split("|"), find))
        self._places += [
            ("a function's argument", _CALL_WORDS, self._literals),
            ("a column of an INSERT", ("insert", "replace"), self._inserted),
            ("the head of a table", "\n", self._cells),
            ("a name in the text", ("",), self._named),
        ]
        self._formats: list[_Strings] = re.findall(r"(\S+)\s(\S+)", DOTTED_TOKENS)
        gates = {gate for row in self._places for gate in row[1] if gate[:1] > " "}
        gates |= {*STEMS, *own, "db2 ", "c alias", "rabbitmqctl", "radtest"}
        self._gate = _any_of(gate.lstrip("fghlnrtux") or gate for gate in gates if gate.isascii())
        self.programs: dict[str, list[tuple[str, str, bool]]] = {}
        for row in re.findall(r"[^;\s][^;\n]+", _COMMANDS):
            programs, need, places = map(str.strip, row.split("|"))
            need = f"-[a-zA-Z]*{need[1:]}[a-zA-Z]*" if len(need) == 2 else need and need + "s?"
            need = need and rf"\x1f{need}(?=\x1f|\Z)"
            rules = [(need, _argument_pattern(place, need), place[1:].isdigit()) for place in places.split()]
            for program in programs.split():
                self.programs.setdefault(program, []).extend(rules)
        any_program = "|".join(sorted(map(re.escape, self.programs), reverse=True))
        self._program = re.compile(rf"\b(?<![.-])(?:{any_program})(?:\.exe)?(?=[\s\"',])")

    def judge(self, name: str, tool: str = "") -> int:
        """Return what `_judge_name` does, or 3, after the settings."""
        normal = _normal(name)
        for entry in ((tool, normal), ("", normal)) if self.redact or self.keep else ():
            if entry in self.redact or entry in self.keep:
                return 3 if entry in self.redact else 0
        return 0 if name.isascii() and not self.stems.search(name.lower()) else _judge_name(name)

    def clean(self, text: str) -> tuple[str, list[_Strings]]:
        """Return a text without its secrets, and these with their rules."""
        taken: list[_Strings] = []
        if len(text) < 5 or (len(text) < 11 and text.isalnum()):  # the shortest is `pwd=x`
            return text, taken
        low = text.replace("\u0130", "i").lower()  # of equal length
        led = bool(self._gate.search(" ".join(set(low.split())) if len(text) > 2000 else low))
        led = led or (not low.isascii() and bool(self.stems.search(low)))
        if "[" in text or not text.isascii() or (led and ("&" in text or "\\u00" in text)):
            plain = _re(_DISGUISES).sub(lambda at: _SIGNS.get(at[0]) or chr(int(at[1] or "0", 16)), text)
            plain = plain.translate(_PLAIN_SIGNS)
            if plain != text:
                cleaned, taken = self.clean(plain)
                return (text if cleaned == plain else cleaned), taken
        for rule, find in self._sieves(text, low, led):
            out, done = list[str](), 0
            for start, end in find(text):
                if not done <= start < end:
                    continue
                secret = text[start:end]
                out += [text[done:start], self.mark(secret)]
                done = end
                if out[-1] != secret and len(taken) < _MAX_ECHOES:
                    pattern = r"""["']([^"'\\]{4,})\\{0,8}["']""" if secret[0] in "[{" else "(?!)"
                    inner = re.findall(pattern, secret)
                    taken += [(rule, part) for part in [secret, *inner[:_MAX_ECHOES]]]
            text = "".join([*out, text[done:]]) if out else text
        for _, secret in taken:  # elsewhere as well
            if len(secret) >= 8 and secret in text and _looks_secret(secret):
                text = text.replace(secret, self.mark(secret))
        return text, taken

    def _sieves(self, text: str, low: str, led: bool) -> Iterator[tuple[str, Any]]:
        if led or " -" in text or " /" in text or '"-' in text or "'-" in text or "net us" in low:
            if not self.programs.keys().isdisjoint(_re(r"[a-z0-9][\w-]+").findall(low)):
                yield "an argument of a command", self._arguments
            for rule, gates, find in self._places:
                if any(gate in low for gate in gates):
                    yield rule, find
        shape, placed = text.encode("utf-8", "surrogatepass"), functools.partial
        if b"w" * 16 in shape.translate(_RUNS):
            for gate, pattern in self._formats:
                if gate in text:
                    yield "a known form", placed(self._placed, pattern=f"({pattern})")
            yield "a token's prefix", placed(self._placed, pattern=_TOKEN)
        shape = shape.translate(_DIGITS)
        if b"0000" in shape:
            yield "a card number", placed(self._placed, pattern=_CARD, accept=_is_card)
            if b"000-00-0000" in shape:
                yield "a social security number", placed(self._placed, pattern=_SSN)

    def mark(self, secret: str) -> str:
        if secret[:1] == "[" and _re(_MARKED).fullmatch(secret):
            return secret
        if self.key is None:
            return REDACTED
        import hmac

        digest = hmac.new(self.key, secret.encode("utf-8", "surrogatepass"), "sha256").hexdigest()
        return f"[REDACTED:{digest[:8]}]"

    def _placed(self, text: str, pattern: str, accept: Callable[..., bool] | None = None) -> Iterator[_Span]:
        for match in _re(pattern).finditer(text):
            span = match.span(match.lastindex) if match.lastindex else self._extent(text, match.end())
            value = text[slice(*span)]
            if not self._is_none(value) and (not accept or accept(value)):
                yield span

    def _is_none(self, value: str) -> bool:
        """Return True if a word stands for a secret, or had one."""
        return "[REDACTED" in value or _re(_PLACEHOLDER).fullmatch(value) is not None

    def _literals(self, text: str) -> Iterator[_Span]:
        for call in _re(_CALLS).finditer(text):
            for literal in _re(_LITERAL).finditer(text, call.end(), call.end() + 300):
                if literal[1] is None:
                    break
                if _is_mixed(literal[1]):
                    yield literal.span(1)

    def _arguments(self, text: str) -> list[_Span]:
        found, at = set[_Span](), 0
        while program := self._program.search(text, at):
            words, at = [program.span()], program.end()
            step = {",": r",[ ]([^,\]\n]+)", "'": _LISTED_WORD, '"': _LISTED_WORD}.get(text[at], _SHELL_WORD)
            while word := _re(step).match(text, at):
                words.append(word.span(1))
                at = word.end()
            for index, start, end in self.command_secrets([text[slice(*word)] for word in words]):
                found.add((words[index][0] + start, words[index][0] + end))
        return sorted(found)

    def command_secrets(self, words: list[str]) -> Iterator[tuple[int, int, int]]:
        """Yield (word, start, end)."""
        for at, word in enumerate(words):
            rules = self.programs.get(re.split(r"[/\\]", word)[-1].removesuffix(".exe"), ())
            line = "\x1f".join(words[at : at + 64]) if rules else ""  # arbitrary
            for need, place, doubtful in rules:
                for match in _re(place).finditer(line) if _re(need).search(line) else ():
                    value = match[1].strip("\"'")
                    if value and not self._is_none(value) and (not doubtful or _looks_secret(value)):
                        start = match.start(1) + match[1].index(value)
                        first = start - line.rfind("\x1f", 0, start) - 1
                        yield at + line.count("\x1f", 0, start), first, first + len(value)

    def _inserted(self, text: str) -> Iterator[_Span]:
        at = 0
        for insert in _re(_INSERT).finditer(text):
            names = [column.strip("\"'`[] \t\r\n").lower() for column in insert[1].split(",")]
            columns = [0 if name == "key" and "value" in names else self.strength(name) for name in names]
            at = max(at, insert.end()) if any(columns) else len(text)
            while row := _re(_SQL_ROW).match(text, at):
                items = _re(_SQL_ITEM).finditer(text, row.start(1), row.end(1))
                for item, hidden in zip(items, columns, strict=False):
                    if hidden and item[1].strip() and not self._is_none(item[1].rstrip()):
                        quoted = item[1][0] in "'\""
                        yield item.start(1) + quoted, item.start(1) + len(item[1].rstrip()) - quoted
                at = row.end()

    def _cells(self, text: str) -> Iterator[_Span]:
        """Yield a table's cells under or behind a sensitive name."""
        columns, before, hidden, sign = 0, 0, list[int](), ""
        for row in re.finditer(r"(?m)^(?=.*[^-=+:| \t\r\n]).+", text):
            sign = sign if columns else next((sign for sign in "|\t;," if sign in row[0]), "")
            if not sign or len(row[0]) > 4000:
                columns = before = 0
                continue
            cut = re.escape(sign)
            cell = rf'"(?:[^"]|"")*"(?={cut}|\s*\Z)|[^{cut}\r\n]+|(?<={cut})(?={cut})'
            cells = list(_re(cell).finditer(text, *row.span()))
            shown = [cell[0].strip(" \t\"'`*\r\n") for cell in cells]
            columns, before, inner = columns if columns == len(cells) else 0, len(cells), before == len(cells)
            if not columns:
                paired = "value" in map(str.lower, shown)  # beside it, `key` is a label
                hidden = [i for i, c in enumerate(shown) if len(c) <= 40 and self.strength(c) > paired]
                signs = " .()" if sign in "|\t" else " "
                heads = sum(map(bool, shown)) > 1 and re.fullmatch(rf"[\w{signs}#/\n-]*", "\n".join(shown))
                columns = len(cells) if heads and hidden and not inner else 0
                value = max(hidden, default=-2) + 1  # `| API key | X |`
                pair = value == 1 == len(cells) - 1 and re.fullmatch(r"[\w-]+", shown[0])
                own = row[0].lstrip()[:1] == "|" or (pair and (sign == "|" or _is_mixed(shown[1])))
                if not own or not any(map(_looks_secret, shown[value:][:1])) or value < 0:
                    continue
                hidden, columns = [value], 0
            for index in hidden:
                cell = shown[index]
                if cell and cell.lower().partition("(")[0] not in _REMARKS and not self._is_none(cell):
                    first = cells[index].start() + cells[index][0].index(cell)
                    yield first, first + len(cell)

    def _named(self, text: str) -> Iterator[_Span]:
        """Find a stem, widen it to a name, judge it, yield its value."""
        low, done, at = text.replace("\u0130", "i").lower(), 0, 0
        while stem := self.stems.search(low, at):
            at = stem.end() - (text[stem.end() - 1] == "=")  # of `sig=`
            opened = text.rfind("<", max(0, at - 200), at) > text.rfind(">", max(0, at - 200), at)
            if (lead := _re(_SEPARATOR if opened else _NO_ELEMENT).match(text, at)) is None:
                continue
            at = lead.end("rest")
            left = text[max(done, stem.start() - 64) : stem.start()]
            start = len(left.rstrip(_NAME_CHARS)) - len(left) + stem.start()
            if escape := _re(r"\\[nrt]|%..").match(text, max(0, start - 1)):  # no part of the name
                start = min(escape.end(), stem.start())
            name = text[start:at]
            strength = self._strength(text, start, name, lead)
            if strength and (span := self._value(text, start, lead, name, strength)):
                if span[0] < span[1] and _re("(?:[A-Za-z]+[0-9]+){3}").search(name):
                    span = start, span[1]  # a secret with a colon
                if lead.lastgroup in ("assign", "prose") and lead[0][-1] == " ":
                    while (more := _re(_MORE).match(text, span[1])) and text[span[0] - 1] in "\"'`":
                        span = span[0], self._extent(text, more.end())[1]
                yield span  # an empty one passes it
                done = at = max(at, span[1])

    def _strength(self, text: str, start: int, name: str, lead: re.Match[str]) -> int:
        """Judge a name, to which the word before may belong (`API key: …`)."""
        if name[-1] == "." and lead.lastgroup == "option":  # the end of a sentence
            return 0
        if name.lower() in ("sig", "signature") and text[start - 1 : start] in ("?", "&", ";"):
            return 2  # of a pre-signed URL; elsewhere it may be anything
        name = name.strip("-.是为は")
        if lead.lastgroup == "call":  # `setPassword("X")`
            name = re.sub(r"(?:.*\.)?(?:[sS]et|[wW]ith|[aA]dd|[uU]se)_?(?=\w)", "", name)
            is_no_name = re.search(r"(?i)(?:auth|credentials?)$|^(?:invalid|missing|expired)", name)
            return 0 if is_no_name else self.strength(name)
        word = re.search(r"([a-zA-Z]+)[^a-zA-Z\n]*[ _]\Z", text[max(0, start - 20) : start])
        before, alone = word[1].lower() if word else "", self.strength(name)
        if before == "public" and alone < 2:
            return 0
        return max(alone, self.strength(f"{before} {name}") if before in _OPENERS else 0)

    def _value(self, text: str, start: int, lead: re.Match[str], name: str, strength: int) -> _Span | None:
        kind, at, low, flag = lead.lastgroup, lead.end(), name.lower(), name[:1] == "-"
        left, before = text[max(0, start - 200) : start], text[start - 1 : start]
        line, bare_key = left[-80:].rpartition("\n")[2], low.rstrip("0123456789") in ("key", "keys")
        if kind == "element":
            if bare_key or re.search(r"[^<:\"'/ ]\Z|(?:type|class)=\W{1,3}\Z|[:/]<\w*\Z", left):
                return None
            end = self._until(text, at, "]]>" if lead[0][-1] == "[" else "<")
            shown = text[at : min(end, at + 300)].strip()
            label = re.fullmatch("[A-Z]?[a-z]+(?: [A-Za-z]+){0,5}", shown) and self.strength(shown)
            return None if label or self._is_none(shown) or shown in left else (at, end)
        if kind == "part":
            return (at, self._until(text, at)) if re.search(r' name=[\\"]*\Z', left) else None
        if kind == "percent":
            return at, self._until(text, at, r"""[\s&;'"<>]|%(?:25)?(?:26|3[bB]|0[aAdD]|2[27]|7[dD])""")
        quote = _re(_QUOTE).match(text, at)
        if kind in ("pair", "quoted", "call", "typed") or (kind == "prose" and quote and strength > 1):
            value = self._extent(text, at)
            shown = text[slice(*value)]
            if len(shown) > _MAX_DOUBTED:
                return value
            named = kind in ("pair", "call") and (self.strength(shown) or shown[-1:] in (":", " "))
            named = named or (kind == "typed" and self._is_key_name(low, shown))
            if named or self._is_none(shown):  # a list of names, a prompt
                return None
            if kind == "pair":
                opened = left.rstrip("\\\"'bu")[-1:]
                closed = text[value[1] : value[1] + 12].lstrip("\\\"' ,")[:1]
                pair = flag or (opened in ("(", "[") and closed in (")", "]"))
                odd = _looks_secret(shown) and not re.fullmatch("[A-Za-z_]+", shown)
                return value if (_is_mixed(shown) if bare_key else pair or odd) else None
            if kind != "quoted" or flag or text.startswith(";", value[1] + 1):
                return value
            # `secret "prod" not found` names it, `SECRET 'x'` in SQL and `secret "x";` are it.
            doubtful = strength < 2 or low == "pass"
            names = bare_key or (doubtful and not _looks_secret(shown)) or (low == "pass" and " " in shown)
            said = shown.count(" ") > 2 and low not in _PASSWORDS
            plain = text[value[0] - 1] == "`" or (low in _REFERENCES and not name.isupper())
            return None if names or said or (plain and not _is_mixed(shown)) else value
        if kind == "prose" or (kind == "option" and not flag):
            return None if flag or before == "/" else self._spoken(text, line, at, kind, low, strength)
        if kind == "assign" and quote and quote[2] == before and lead["assign"][0] not in "\\\"'`":
            return None  # `input("Password: ")`
        if kind == "assign" and not quote:
            if re.search(r"\barn:\S*:\Z", text[max(0, at - 200) : at]):
                return None  # `arn:aws:…:secret:prod-db`
            if (header := low.replace("_", "-")) in _HEADER_NAMES and not text.startswith(("[", "{"), at):
                return self._header(text, at, header, before)
        return self._assigned(text, line, at, name, strength, text[lead.end("rest") : at])

    def _spoken(self, text: str, line: str, at: int, kind: str, name: str, strength: int) -> _Span | None:
        """Return the word behind a name and `is` or a space, or None."""
        shown = text[at : self._bare_end(text, at)].rstrip(".,:;)!")
        size = len(shown)
        if self._is_none(shown) or not _looks_secret(shown) or re.match(r"\w+[(=]|[\[(<]", shown):
            return None
        known: object = strength > 1 or size >= 8 or name == "pin"  # `the password is x`
        if name == "pin" and re.fullmatch("[0-9]{4,8}", shown):
            return at, at + size
        if kind == "option":  # `login u password x`, `set NAME x`
            passes = name == "pass" and (shown.isupper() or re.search(r"/.*\.\w", shown))
            if size < 6 or passes or shown.lower() in _ALGORITHMS:  # `pass FLAG_2 to make`, `PASS tests/x.py`
                return None
            given = re.search(r"\b(?:setx?|setenv|--secret)\s+(?:-\w+\s+)?[\w.:/]*\Z", line)
            mixed = size >= 8 and shown.lower() != shown and any(map(str.isdigit, shown))
            mixed = mixed or (strength > 1 and not line.strip() and text[at + size : at + size + 1] in "\r\n")
            known = given or name in _PASSWORDS or (mixed and (size > 12 or name not in _REFERENCES))
        return (at, at + size) if known else None

    def _assigned(self, text: str, line: str, at: int, name: str, strength: int, lead: str) -> _Span | None:
        if other := _re(_DEFAULTED).match(text, at):
            at = other.end()
        value = self._extent(text, at)
        shown, passed = text[slice(*value)], (value[1], value[1])
        wrapper, quoted, name = text[at : value[0]], value[0] > at, name.lower()
        bare_key, called = name in ("key", "keys") and strength < 2, "(" in wrapper
        if _re(_ASKING).search(wrapper) or (bare_key and text.startswith(" value=", value[1] + 1)):
            return None
        if len(shown) > _MAX_DOUBTED:
            return value
        weak = strength < 2 and (not _looks_secret(shown) or (bare_key and shown.isalpha()))
        typed = quoted and lead == ": " and re.fullmatch(r"_?[A-Z][A-Za-z]+(?: \| None)?", shown)
        own = shown and f"_{name}".endswith(tuple(sign + shown.lower() for sign in "._-"))  # `token=token`
        if (
            self._is_none(shown)
            or (("==" in lead or "!=" in lead) and (weak or not quoted))  # a comparison
            or (shown.isupper() and not bare_key and self.strength(shown))  # a constant's name
            or (called and (weak or bare_key))
            or (quoted and lead == "=" and text[at] == "`" and " " in shown)  # a command's output
            or (quoted and (len(shown) == 1 or shown[-1:] in (" ", ":")))  # the beginning of a text
            or (quoted and strength < 2 and re.search(r"%s|\{[a-z_]", shown))  # a template
            or (typed and self.strength(shown.split()[0]))
            or ((bare_key or name == "--key") and re.search(r"/[^/]*\.\w{2,8}\Z", shown))
            or (own and (not quoted or strength < 2 or called))
        ):
            return passed
        empty = "=" in lead and "\n" in lead and not quoted
        if empty or (re.match(r"[\\\"'*`]*:\s*\n", lead) and line.strip(" \t-\"'")):
            return None  # `if password:`
        if quoted or text.startswith(("[", "{"), at):
            function = lead == " => " and text[at] == "{"
            named = re.fullmatch(r"[A-Za-z_.-]*", shown) and self.strength(shown)
            named = named or not (quoted or any(map(_is_mixed, re.findall(r"[^\s\"',]+", shown))))
            return None if function or (bare_key and named) or self._is_key_name(name, shown) else value
        if ":" in lead and "\n" in lead:  # lines of YAML
            indent = lead.rpartition("\n")[2]
            inner = len(indent) > len(line)
            if inner or text[at : at + 2] == "- ":
                more = re.escape(indent) + ("" if inner else "[ \t-]")
                end = next(re.compile(rf"[^\n]*(?:\n{more}[^\n]*)*").finditer(text, at)).end()
                if self._holds_secret(text[at:end]):
                    return at, end
                if re.match(r"- |[\w.-]+:\s", text[at:end]):
                    return None
            elif re.match(r"[\w.-]+(?: [\w.-]+)?:\s", text[at : at + 80]):
                return None  # the next entry
        # No value: `--secret dbPassword X`, source text such as `= f(x)`, `= config.password`, a remark.
        after = lead.isspace() and re.match(r"\s+(?!-)\S*(?:[0-9]|\[R)", text[value[1] : value[1] + 80])
        told = ":" in lead and re.match(r"[A-Z][A-Za-z]*((?:[.,;]? [A-Za-z_/()-]+){3,})", text[at : at + 200])
        said = told and not _SENTENCE.isdisjoint(re.findall(r"\w+", told[1].lower()))
        option = after and self.strength(shown)
        annotated = re.fullmatch("[A-Za-z_.]+", shown) and re.search(r"\b(?:def|fn|func\w*) \w+\(", line)
        remark = said or re.search(r"[:@]param [\w ]*\Z|(?i:\bno )\Z", line)
        if option or annotated or remark or self._is_name(shown, strength) or _re(_SOURCE).match(text, at):
            return None
        if re.split(r"[\[|(]", shown.rstrip(".,:;!").lower(), maxsplit=1)[0] in _REMARKS:
            return passed
        queried = line[-1:] in ("?", "&") and lead == "="
        entry = name.strip("-") in (*_REFERENCES, "auth") and re.match(r"[a-z_]{2,20}=[^=\s]", shown)
        directory = name in ("pwd", "oldpwd") and re.match(r"[/~]|[A-Za-z]:\\", shown)
        short = bare_key and not queried and (len(shown) < 12 or re.search("[:/]", shown))
        asked = (lead[-1:] != "=" or name in ("key", "pass", "pin", "auth")) and not queried
        word = strength < 2 and (shown.lower() in _ALGORITHMS or (asked and not _looks_secret(shown)))
        if entry or directory or short or word:
            return None
        # A value of several words ends with its line, where the line holds nothing else.
        alone = not line.strip(" \t-") and ("=" in lead or "\n" in text)
        if alone and lead.strip() and lead[-1:] == " " == text[value[1] : value[1] + 1]:
            end = self._until(text, at)
            return value if re.search(r"[\w.] ?=|[#(]", text[value[1] : end]) else (at, end)
        return value

    def _is_key_name(self, name: str, shown: str) -> bool:
        """Return True for what a key is called, as in `key="theme"` and `STATS_KEY = "stats"`."""
        key = re.fullmatch(r"(?:.*?([a-z]*)[_-]?)?keys?[0-9]*", name)
        known = key and key[1] and key[1].endswith((*OPENERS["key"], *STRONG_WORDS, "api"))
        own = _re(r"[-_{]?[a-z]{1,14}(?:[._:{}-]+[a-z]{1,14})*\}?").fullmatch(shown)
        return bool(key and own and not known)

    def _is_name(self, shown: str, strength: int = 2) -> bool:
        """Return True for what names a secret, such as `config.password` and `db_password`."""
        *parts, last = shown.split(".")
        named = strength < 2 and parts or self.strength(last)
        named = named or any("_" in part and self.strength(part) for part in parts)
        return bool(named and _re(_REFERENCE).fullmatch(shown))

    def _holds_secret(self, block: str) -> bool:
        words = [] if re.match(_SCHEMA, block) else re.findall(r"(?<!: (?=[0-9]))(\S*[^\s:])(?:\n|\Z)", block)
        return any(_looks_secret(word) and not (self._is_none(word) or self._is_name(word)) for word in words)

    def _header(self, text: str, at: int, name: str, before: str) -> _Span | None:
        words = text[at : at + 256].split(None, 3)
        first = words[0] if words else "a"
        remark = first.lower().rstrip(".,;:") in _REMARKS - _SCHEMES
        if remark or self._is_none(first) or re.match(r"[\w.]+\(", first):
            return None
        if "cookie" in name:
            attribute = re.match("(?i)(?:samesite|path|domain|max-age|expires)=", first)
            if attribute or ("=" not in first and not _looks_secret(first)):
                return None
        elif len(words) > 1 and first.lower() in _SCHEMES:
            at = text.index(words[1], at + len(first))
            end = self._extent(text, at)[1]
            return (end if self._is_none(text[at:end]) or re.match(r"\w+\(", text[at:end]) else at), end
        elif len(words) == 1 or before in ("?", "&"):
            end = self._bare_end(text, at)
            return (end if text[at:end].lower() in _SCHEMES else at), end
        elif not any(map(_looks_secret, words[:2])):
            return None
        stop = r"\\[rn]|[\r\n]" + (f"|{before}" if before in ("'", '"') else "")
        if name == "set-cookie":  # behind a semicolon are the cookie's attributes
            at = text.find("=", at, self._until(text, at, stop := stop + "|;")) + 1 or at
        return at, self._until(text, at, stop)

    def _until(self, text: str, at: int, pattern: str = r"\\[rn]|[\r\n]") -> int:
        return next(_re(rf"{pattern}|\Z").finditer(text, at)).start()

    def _bare_end(self, text: str, at: int) -> int:
        return next(_re(_BARE).finditer(text, at)).end()

    def _extent(self, text: str, at: int) -> _Span:
        """Return a value's place: quoted, bracketed, a YAML block, or bare."""
        if quote := _re(_QUOTE).match(text, at):
            own, twice = quote[2], "|''" if quote[2] == "'" else ""
            inner = rf"(?s)[^{own}\\]*(?:(?:\\.{twice})[^{own}\\]*)*"
            body = None if quote[1] or quote[3] else _re(inner).match(text, quote.end())
            end = body.end() if body else text.find(quote[1] + (quote[3] or "") + own, quote.end())
            return quote.end(), len(text) if end < 0 else end
        if text[at : at + 1] in ("[", "{") and not _re(_MARKED).match(text, at):
            # In `Pwd={a}}b;c}` two braces are one; `{SSHA}X` goes on.
            odbc = _re(r"\{(?:[^{}\s;]|\}\}|;(?=[^{}\s]*\}))*\}(?=;|\Z)").match(text, at)
            end, depth = odbc.end() if odbc else len(text), 0
            for sign in () if odbc else _re(_BRACKETS).finditer(text, at):
                depth += (sign[0] in "([{") - (sign[0] in ")]}")
                if depth == 0:
                    end = sign.end()
                    break
            return at, self._bare_end(text, end) if re.match(r"\w", text[end : end + 1]) else end
        block = _re(_BLOCK).match(text, at)
        return at, block.end() if block else self._bare_end(text, at)


class _Declared(NamedTuple):  # what a definition hides of a parameter
    sensitive: bool
    fields: dict[str, _Declared]
    items: _Declared | None


def _declare(plain: Any, outer: bool = True) -> _Declared | None:
    """Return what a plain definition hides; what can't be read hides all."""
    if not isinstance(plain, dict):
        unread = isinstance(plain, str) and re.match(r"<un(?:readable|printable)\b|\[[CD][A-Z]+[]:]", plain)
        return _Declared(True, {}, None) if unread else None
    wrapped = [plain[key] for key in ("tool", "resource", "prompt") if outer and plain.get(key)]
    if wrapped and not isinstance(wrapped[0], str):
        return _declare(wrapped[0], False)
    fields: dict[str, _Declared] = {}
    for group in (plain.get("parameters"), plain.get("properties")):
        parts = group if isinstance(group, list) else [group]
        named = [(part.get("name") if isinstance(part, dict) else None, part) for part in parts]
        for name, part in group.items() if isinstance(group, dict) else named:
            declared = _declare(part, False)
            if declared and isinstance(name, str):
                fields[_normal(name)] = declared
            elif declared and isinstance(part, str):
                return declared
    items = _declare(plain.get("items") or plain.get("additionalProperties"), False)
    yes = str(plain.get("sensitive") or "").strip().lower() not in ("", "false", "no", "off", "0")
    return _Declared(yes, fields, items) if yes or fields or items else None


def _type_name(value: object) -> str:
    return str(type.__dict__["__name__"].__get__(type(value)))


def _text_of(value: object, show: Callable[[Any], str] = repr) -> str:
    try:
        return re.sub(r" at 0x[0-9a-fA-F]{1,16}\b", "", str.__str__(show(value)))
    except BaseException:
        return f"<unprintable {_type_name(value)}>"


def _members(value: object) -> dict[str, Any] | None:
    kind = type(value)
    keepers = ("__dataclass_fields__", "__attrs_attrs__", "__struct_fields__")
    kept = (getattr(kind, keeper, None) for keeper in (("_fields",) if issubclass(kind, tuple) else keepers))
    fields = next((fields for fields in kept if isinstance(fields, (dict, tuple))), None)
    if fields is None:
        pydantic = getattr(kind, "__pydantic_fields__", None) or getattr(kind, "__fields__", None)
        known = isinstance(pydantic, dict) or issubclass(kind, types.SimpleNamespace)
        if issubclass(kind, tuple) or not known:
            return None
        extra = getattr(value, "__pydantic_extra__", None)
        return {**object.__getattribute__(value, "__dict__"), **(extra if type(extra) is dict else {})}
    members = {}
    for field in fields:
        name = field if isinstance(field, str) else field.name
        try:
            members[name] = getattr(value, name)
        except BaseException as error:
            members[name] = f"<unreadable: {_type_name(error)}>"
    return members


def _unlike(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict; of two equal keys, the second gets `#2`."""
    if len(made := dict(items)) == len(items):
        return made
    made, numbers = {}, collections.Counter[Any]()
    for key, item in items:
        free = key
        while free in made:
            numbers[key] += 1
            free = f"{key}#{numbers[key] + 1}"
        made[free] = item
    return made


_CONTENTS: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    ((bytes, bytearray, memoryview), lambda value: bytes(value).decode("utf-8", "backslashreplace")),
    (enum.Enum, lambda value: value.value),
    (dict, lambda value: dict(dict.items(value))),
    (BaseException, lambda value: f"{_type_name(value)}: {_text_of(value, str)}".removesuffix(": ")),
    ((set, frozenset), lambda value: sorted(value, key=lambda item: (_type_name(item), _text_of(item)))),
    ((list, collections.deque, collections.abc.MappingView), list),
    (tuple, lambda value: list(value) if (members := _members(value)) is None else members),
)


def _content(value: Any, kind: type) -> object:
    for known, content in _CONTENTS:
        if issubclass(kind, known):
            return content(value)
    if (members := _members(value)) is not None:
        return members
    if issubclass(kind, Mapping):  # such as HTTP headers, which may hold a key twice
        return _unlike(list(value.items()))
    modules = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if not modules.isdisjoint(("decimal", "fractions", "datetime", "uuid", "pathlib", "zoneinfo")):
        return str.__str__(str(value))
    array = "numpy" in modules and hasattr(kind, "tolist") and value.size <= 10_000
    return value.tolist() if array else _text_of(value)


# --- what an object holds

_MAX_DEPTH, _MAX_NODES = 64, 500_000  # deeper than people write; more than `max_input_bytes` takes
_MAX_HARMLESS, _MAX_HARMLESS_CHARS, _CARD_NUMBERS = 4096, 64, 10**12  # from here on a number may be a card's
_SLACK = 4096  # characters read beyond what is kept, so that no secret is cut in half
_LABELS = _words_in("""name key header field param parameter property variable attribute setting label element
selector path id type column target locator title prompt question xpath k""")
_VALUES = _words_in("value values val default content text v old new before after")
_COLUMN_LISTS = _words_in("columns column_names columnnames headers header fields cols schema")
_ROW_LISTS = _words_in("rows values data records stringdata")
_VALUE_ENDS = ("value", "answer", "response", "keys")
_PROGRAMS, _QUERIES = _words_in("command cmd program executable"), _words_in("sql query statement")
_ARGUMENTS = _words_in("args argv arguments params parameters bindings")
_CONFIRMS, _PARAMETER = _words_in("secret sensitive issecret is_secret"), r"(?<!\?)\?(?!\?)|%s|[$:]([0-9]+)"
# A key's value goes; booleans too, by a setting; its text holds a secret, or it is no text; siblings decide.
_SENSITIVE, _CERTAIN, _ODD, _BESIDE = 1, 3, 4, 8

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
encode_text: Callable[[str], str] = json.encoder.encode_basestring


def _label(value: object) -> str:
    text = value[:256].decode(errors="replace") if type(value) is bytes else value
    return text if type(text) is str else ""


class _Verdicts(dict[str, int]):
    """Verdicts on names of fields, for all tools (""), one, or none."""

    def __init__(self, rules: _Rules, tool: str | None = "") -> None:
        self.rules, self.tool = rules, tool
        self.harmless, self.hidden, self.inert = dict[str, str](), dict[str, str](), dict[str, str]()

    def __missing__(self, name: str) -> int:
        if self.tool is None:
            return 0
        verdict = (0, _SENSITIVE, _SENSITIVE, _CERTAIN)[self.rules.judge(name, self.tool)]
        low = name.lower()
        if low == "key" or low.endswith(_VALUE_ENDS) or low in _VALUES | _ROW_LISTS | _ARGUMENTS:
            verdict |= _BESIDE
        if self.rules.clean(name)[0] != name:
            return verdict | _ODD
        if len(name) <= _MAX_NAME_CHARS:
            if len(self) >= _MAX_VERDICTS:
                for known in (self, self.harmless, self.hidden, self.inert):
                    known.clear()
            self[name] = verdict
            if verdict == 0:
                self.harmless[name] = encode_text(name) + ":"
            elif verdict == _SENSITIVE:
                self.hidden[name] = f'{encode_text(name)}:"{REDACTED}"'
        return verdict

    def is_label(self, item: object) -> bool:
        """Return True for a sensitive name, or a `Password field` of a page."""
        said = _label(item)
        if not 2 < len(said) <= _MAX_NAME_CHARS or not self.rules.stems.search(said.lower()):
            return False
        said = re.sub(r"(?i)\s+(?:input|text)?\s*(?:field|input|box|entry|value)$", "", said.strip("-"))
        return self[said] & _SENSITIVE > 0


class _Walk:
    """Writes one value as JSON, redacted unless the verdicts are none."""

    nodes = spent = 0  # elements, and characters of long texts, read so far

    def __init__(self, verdicts: _Verdicts, echoes: list[str] | None = None, limit: int = 0) -> None:
        self.verdicts, self.rules, self.echoes, self.limit = verdicts, verdicts.rules, echoes, limit
        self.quiet = echoes is None and self.rules.key is None
        self.open: list[int] = []  # ids of the containers around the present value
        # An element takes two bytes at least.
        self.max_nodes = min(_MAX_NODES, (limit + 1) // 2 or _MAX_NODES)

    def plain(self, value: object) -> Any:
        """Convert a value without redacting it; never record what comes of it."""
        return json.loads(_Walk(_Verdicts(self.rules, None)).value(value, None))

    def declared(self, definition: object) -> _Declared | None:
        """Return what a definition hides; most are JSON, and hide nothing."""
        if type(definition) is dict:
            with suppress(Exception):
                text = encode_json(definition)
                return _declare(json.loads(text)) if '"sensitive"' in text else None
        return _declare(self.plain(definition))

    def marker(self, value: object) -> str:
        """Return a secret's marker, and collect what it may echo as."""
        if self.quiet:
            return REDACTED
        plain = value if type(value) is str else self.plain(value)
        waiting: list[Any] = [plain]
        while self.echoes is not None and waiting and len(self.echoes) < _MAX_ECHOES:
            if type(item := waiting.pop()) in (dict, list):
                waiting += list(item.values() if type(item) is dict else item)[:_MAX_ECHOES]
            elif item is not None and type(item) is not bool:
                self.echoes.append(str(item))
        return self.rules.mark(plain if type(plain) is str else json.dumps(plain, sort_keys=True))

    def refusal(self, ident: int, count: int) -> str:
        if ident in self.open:
            return '"[CYCLE]"'
        return '"[DEPTH]"' if len(self.open) >= _MAX_DEPTH else encode_text(f"[CUT: {count} items]")

    def value(self, value: Any, declared: _Declared | None) -> str:
        kind = type(value)
        # A number in the place of an object with a secret part: nobody knows what it means.
        if declared is not None and (declared.sensitive or kind in (int, float)):
            return encode_text(self.marker(value))
        if kind is str:
            return encode_text(self.text(value, declared))
        if kind is dict:
            return self.mapping(value, declared)
        if kind is list or kind is tuple:
            return self.sequence(value, declared)
        if value is None or kind is bool:
            return "null" if value is None else "true" if value else "false"
        if kind is float:  # what is no number as a text, which differs from null and from 0
            return float.__repr__(value) if value - value == 0.0 else f'"{json.dumps(value)}"'
        if kind is int and -_CARD_NUMBERS < value < _CARD_NUMBERS:
            return str(value)
        depth = len(self.open)
        try:
            if kind is not int:
                return self.other(value, kind, declared)
            shown = self.text(str(value), None)  # it may be a card's number
            return shown if shown.lstrip("-").isdigit() else encode_text(shown)
        except INTERRUPTS:
            raise
        except BaseException:  # whatever an object's own methods raise; an integer of too many digits
            del self.open[depth:]
            return encode_text(hex(value) if kind is int else f"<unprintable {_type_name(value)}>")

    def mapping(self, value: dict[Any, Any], declared: _Declared | None, ident: int = 0) -> str:
        opened, ident = self.open, ident or id(value)
        value = value.copy()  # another thread may change it
        self.nodes = nodes = self.nodes + len(value)
        if ident in opened or len(opened) >= _MAX_DEPTH or nodes > self.max_nodes:
            return self.refusal(ident, len(value))
        opened.append(ident)
        verdicts, texts = self.verdicts, self.rules.harmless
        known = verdicts.harmless if declared is None else {}
        out: list[str] = []
        for name, item in value.items():
            kind, key = type(item), known.get(name)
            if key is not None:
                if kind is str:
                    out.append(key + (texts.get(item) or encode_text(self.text(item, None))))
                elif kind is int and -1 < item < _CARD_NUMBERS:
                    out.append(f"{key}{item}")
                else:
                    out.append(key + self.value(item, None))
            elif kind is str and self.quiet and known and (key := verdicts.hidden.get(name)):
                out.append(key)
            else:
                verdict = verdicts[name] if type(name) is str else _ODD
                if verdict & _ODD:
                    opened.pop()
                    names = [self.text(self.as_text(key), None) for key in value]
                    return self.mapping(_unlike(list(zip(names, value.values()))), declared, ident)
                if verdict & _BESIDE:
                    verdict, item = self.beside(name.lower(), verdict, item, value)
                hides = verdict > _SENSITIVE or (verdict and kind is not bool and item is not None)
                inner = declared.fields.get(_normal(name)) if declared else None
                shown = encode_text(self.marker(item)) if hides else self.value(item, inner)
                out.append(f"{encode_text(name)}:{shown}")
        opened.pop()
        return "{" + ",".join(out) + "}"

    def as_text(self, value: object) -> str:
        plain = value if type(value) is str else self.plain(value)
        return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)

    def beside(self, name: str, verdict: int, item: Any, value: dict[Any, Any]) -> tuple[int, Any]:
        """Return a field's verdict and value after a look at its siblings."""
        for key, said in value.items():
            label = _label(key).lower()
            if name in _ROW_LISTS and label in _COLUMN_LISTS:
                item = self.rows(item, said)
            elif name[-4:] == "data" and said == "Secret" and isinstance(item, dict):
                item = dict.fromkeys(item, REDACTED)
            elif name in _ARGUMENTS and label in _PROGRAMS and type(item) in (list, tuple):
                item = self.arguments([said, *item])[1:]
            elif label in _QUERIES and type(item) in (list, tuple):
                item = self.bound(_label(said), item)
            # A key beside its value is a label, and stays where it reads like one.
            elif name == "key" and (label in _VALUES or self.verdicts.is_label(item)):
                verdict &= ~_SENSITIVE if re.fullmatch("[A-Za-z][A-Za-z_. ]{0,63}", _label(item)) else -1
            # `{"name": "API_KEY", "value": …}`: the verdict on the label is that on the value.
            elif name in _VALUES or name.endswith(_VALUE_ENDS):
                labels = label in _LABELS or label.endswith(("name", "key"))
                verdict |= self.verdicts.is_label(said) if labels else said is True and label in _CONFIRMS
        return verdict & _CERTAIN, item

    def bound(self, query: str, values: Sequence[Any]) -> list[Any]:
        """Hide what would be hidden in place of a query's placeholder."""
        if not self.rules.stems.search(query.lower()):
            return list(values)
        if values and type(values[0]) in (list, tuple):
            return [self.bound(query, row) if type(row) in (list, tuple) else row for row in values]
        count = itertools.count(1)
        probe = _re(_PARAMETER).sub(lambda at: f"'Zq7-{at[1] or next(count)}'", query[:20_000])
        hidden = {secret for _, secret in self.rules.clean(probe)[1]}
        return [self.marker(one) if f"Zq7-{at}" in hidden else one for at, one in enumerate(values, 1)]

    def rows(self, rows: Any, heads: Any) -> Any:
        if not {type(rows), type(heads)} <= {list, tuple}:
            return rows
        names = (head.get("name") if type(head) is dict else head for head in heads[:1000])
        hidden = {at for at, name in enumerate(names) if self.verdicts.is_label(name)}

        def hide(at: int, cell: Any) -> Any:
            return self.marker(cell) if at in hidden and cell is not None and type(cell) is not bool else cell

        kinds = (list, tuple) if hidden else ()
        return [list(map(hide, range(len(row)), row)) if type(row) in kinds else row for row in rows]

    def arguments(self, words: list[Any]) -> list[Any]:
        if len(words) <= 1000 and all(type(word) is str for word in words):
            for index, start, end in list(self.rules.command_secrets(words)):
                word = words[index]
                words[index] = word[:start] + self.marker(word[start:end]) + word[end:]
        return words

    def sequence(self, value: Any, declared: _Declared | None, ident: int = 0) -> str:
        opened, ident = self.open, ident or id(value)
        value = value[:]  # another thread may change it
        self.nodes = nodes = self.nodes + len(value)
        if ident in opened or len(opened) >= _MAX_DEPTH or nodes > self.max_nodes:
            return self.refusal(ident, len(value))
        first: Any = value[0] if value else None
        inert = self.verdicts.inert
        if declared is None and type(first) is str:
            try:  # all of them may be known
                return f"[{','.join(map(inert.__getitem__, value))}]"
            except (LookupError, TypeError):
                pass
        opened.append(ident)
        table = self.table(value) if len(value) > 9 and declared is None and type(first) is dict else ""
        items = None if declared is None else declared.items or declared
        texts, is_label = self.rules.harmless, self.verdicts.is_label
        hide_next = len(value) == 2 and is_label(first)
        pairs = len(value) > 2 and len(value) % 2 == 0 and type(first) is str
        if type(first) is str and (first in self.rules.programs or first[:1] == "/"):
            value = self.arguments(list(value))
        elif type(first) in (list, tuple) and 1 < len(first) < 1000 and len(value) > 1:
            # The first row may be the head; pairs are no rows.
            named = all(is_label(cell) or (type(cell) is str and not _looks_secret(cell)) for cell in first)
            if named and not (len(first) == 2 and is_label(first[0])):
                value = [first, *self.rows(value[1:], first)]
        out: list[str] = []
        for item in () if table else value:
            if hide_next and out:
                out.append(encode_text(self.marker(item)))
                hide_next = False
            elif type(item) is str and items is None:
                known = texts.get(item)
                out.append(known or encode_text(self.text(item, None)))
                if item in inert:
                    continue
                if item[:1] == "-":
                    hide_next = "=" not in item and is_label(item)
                elif not is_label(item):
                    if known and item[:1] != "/" and item not in self.rules.programs:
                        if len(inert) >= _MAX_HARMLESS:
                            inert.clear()
                        inert[item] = known
                elif pairs and len(out) % 2:
                    following = _label(value[len(out)])
                    secret = _looks_secret(following) and not is_label(following)
                    hide_next = secret or item.lower() in _HEADER_NAMES
            else:
                out.append(self.value(item, items))
        opened.pop()
        return table or "[" + ",".join(out) + "]"

    def table(self, value: list[Any]) -> str:
        """Write mappings of equal, harmless names by columns, for speed."""
        names, opened = list(value[0]), self.open
        keys = [self.verdicts.harmless.get(name) for name in names]
        if None in keys or set(map(type, value)) != {dict} or len(opened) >= _MAX_DEPTH:
            return ""
        rows = list(map(dict.copy, value))  # another thread may change them
        nodes, idents = self.nodes + len(rows) * len(names), list(map(id, value))
        if list(map(list, rows)).count(names) < len(rows) or nodes > self.max_nodes or {*idents} & {*opened}:
            return ""
        self.nodes, texts, columns = nodes, self.rules.harmless, list[Iterable[str]]()
        for column in zip(*map(dict.values, rows)):
            kinds = set(map(type, column))
            if kinds == {int} and min(column) >= 0 and max(column) < _CARD_NUMBERS:
                columns.append(map(str, column))
            elif kinds == {float} and all(map(isfinite, column)):
                columns.append(map(repr, column))
            elif kinds == {str}:
                columns.append([texts.get(item) or encode_text(self.text(item, None)) for item in column])
            else:
                write = self.sequence if kinds == {list} else self.value
                columns.append(written := list[str]())
                opened.append(0)
                for ident, item in zip(idents, column):
                    opened[-1] = ident
                    written.append(write(item, None))
                opened.pop()
        row = "{" + ",".join(str(key).replace("%", "%%") + "%s" for key in keys) + "}"
        return "[" + ",".join(map(row.__mod__, zip(*columns))) + "]"

    def other(self, value: Any, kind: type, declared: _Declared | None) -> str:
        most = self.limit + _SLACK
        if issubclass(kind, (bytes, bytearray)) and self.limit and (size := memoryview(value).nbytes) > most:
            value, note = memoryview(value)[:most], f"…[CUT: {size} bytes]"
            return encode_text(self.text(str(_content(value, bytes)), declared) + note)
        try:
            content = _content(value, kind)
        except INTERRUPTS as signal:
            error: BaseException = ValueError("it raises that each time, as no signal does")
            with suppress(BaseException):
                _content(value, kind)
                error = signal
            raise error from None
        if isinstance(content, (dict, list)):
            write: Any = self.mapping if isinstance(content, dict) else self.sequence
            return str(write(content, declared, id(value)))
        return self.value(content, declared)

    def text(self, text: str, declared: _Declared | None) -> str:
        """Clean a text; one that holds JSON is walked as what it holds."""
        if self.verdicts.tool is None:
            return text
        note = ""
        if self.limit and len(text) > _MAX_HARMLESS_CHARS:
            left = 2 * self.limit - self.spent
            allowed = max(min(self.limit, left), 256 if left > -self.limit else 0)
            self.spent += min(allowed, len(text))
            if len(text) > allowed + _SLACK:
                size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
                text, note = text[: allowed + min(allowed, _SLACK)], f"…[CUT: {size} bytes]"
        if not note and text[:1] in '{[" \t\r\n' and text.lstrip()[:1] in ("{", "[", '"'):
            with suppress(ValueError, RecursionError):  # no JSON after all
                tree = json.loads(text, object_pairs_hook=_unlike)
                walked = json.loads(self.value(tree, declared))
                return text if walked == tree else json.dumps(walked, ensure_ascii=False)
        if declared is not None:
            return self.marker(text)  # the part that is secret can't be found: all of it
        shown, taken = self.rules.clean(text)
        if self.echoes is not None:
            self.echoes += [secret for _, secret in taken[: max(0, _MAX_ECHOES - len(self.echoes))]]
        if note:
            # What lies beyond the limit only says how a secret across it goes on.
            return shown[: max(0, len(shown) - min(allowed, _SLACK))] + note
        if shown is text and len(text) <= _MAX_HARMLESS_CHARS:
            harmless = self.rules.harmless
            if len(harmless) >= _MAX_HARMLESS:
                harmless.clear()
            harmless[text] = encode_text(text)
        return shown


def _spellings(text: str) -> dict[str, None]:
    """Return a text as it is, and as errors, URLs and Base64 write it."""
    from html import escape  # only for errors
    from urllib.parse import quote, quote_plus

    raw = text.encode("utf-8", "surrogatepass")
    encoded = binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode(), quote(raw), quote(raw, safe="")
    forms = (text, *encoded, quote_plus(raw), repr(text)[1:-1], json.dumps(text)[1:-1], escape(text))
    return dict.fromkeys(forms)


def _without_echo(text: str, form: str, marker: str) -> str:
    text = text if form in REDACTED else text.replace(form, marker)
    if len(form) <= _MIN_ECHO or marker == form:
        return text
    for _ in ("beginnings", "ends, which are beginnings of the reverse"):
        out, at = [], 0
        while (start := text.find(form[:_MIN_ECHO], at)) >= 0:
            out += [text[at:start], marker]
            at = start + len(os.path.commonprefix([form, text[start : start + len(form)]]))
        text, form, marker = "".join([*out, text[at:]])[::-1], form[::-1], marker[::-1]
    return text


def without_echoes(text: str, echoes: Iterable[str], mark: Callable[[str], str]) -> str:
    """Return a text without the values, whole, cut short or encoded."""
    forms = set(echoes)
    forms |= {echo.partition(" ")[2] for echo in forms if echo.partition(" ")[0].lower() in _SCHEMES}
    for echo in sorted(forms, key=len, reverse=True):
        for part in {echo[: 1 << 16], echo[-1 << 16 :]} if len(echo) >= 4 else ():
            ends = [head[:_MIN_ECHO] for head in _spellings(part[:18])]
            ends += [tail[-_MIN_ECHO:] for tail in _spellings(part[-18:])]
            if len(part) < 64 or any(end in text for end in ends):  # else no need to spell the rest
                for form in _spellings(part):
                    text = _without_echo(text, form, mark(echo))
    return text


class Redactor:
    """Returns plain copies of values and texts in which no secret is left, and never raises.

    One serves any number of threads; its caches are bounded and hold no secret.

    Args:
        redact: more sensitive names, in any spelling; `tool_name.param` for one tool.
        keep: names that are not sensitive here. `redact` wins over `keep`, one tool's entry over that for
            all, a declaration and a secret's own form over both.
        mode: "constant" writes `[REDACTED]`; "hmac", with a `key`, `[REDACTED:<8 hex>]`, one for each secret.

    Raises:
        ConfigError: an entry is no text, the mode is unknown, or "hmac" has no key.
    """

    def __init__(
        self, redact: _Names = (), keep: _Names = (), *, mode: str = "constant", key: bytes | None = None
    ) -> None:
        for setting, entries in (("redact", redact), ("keep", keep)):
            if isinstance(entries, str) or not all(isinstance(one, str) and _normal(one) for one in entries):
                reason = "must be a list of names; quote those that YAML reads otherwise"
                raise ConfigError(reason, trail=(setting,))
        if mode not in ("constant", "hmac"):
            raise ConfigError(f"{mode!r} is neither 'constant' nor 'hmac'", trail=("redact_mode",))
        if mode == "hmac" and not key:
            raise ConfigError("'hmac' needs a key: set MXCP_AUDIT_KEY", trail=("redact_mode",))
        self._rules = _Rules(redact, keep, key if mode == "hmac" else None)
        self._verdicts = _Verdicts(self._rules)
        tools = {tool for tool, _ in self._rules.redact | self._rules.keep if tool}
        self._of_tool = {tool: _Verdicts(self._rules, tool) for tool in tools}

    def is_sensitive(self, name: str, tool: _Tool = None) -> bool:
        """Return True if a name is sensitive in the input of a tool, or of any."""
        return self._rules.judge(name, _normal(tool or "")) > 0

    def redact(
        self, value: object, *, tool: _Tool = None, endpoint_def: object = None, echoes: _Echo = None
    ) -> Any:
        """Return a plain copy of any value in which nothing sensitive is left.

        It consists of dict (text keys), list, str, int, finite float, bool and None, with `[CYCLE]`,
        `[DEPTH]` and `<unprintable Type>` where need be; generators and files are not read.

        Args:
            tool: the tool whose input the value is.
            endpoint_def: MXCP's definition of the endpoint, with `sensitive: true` in it.
            echoes: receives redacted values as texts, for `scrub`; collecting them takes time.
        """
        try:
            return json.loads(self.redact_json(value, tool=tool, endpoint_def=endpoint_def, echoes=echoes))
        except RecursionError:
            return "[DEPTH]"

    def redact_json(
        self, value: Any, tool: _Tool = None, endpoint_def: Any = None, echoes: _Echo = None, limit: int = 0
    ) -> str:
        """Return what `redact` returns as compact JSON, without what a `limit` (bytes) would cut."""
        try:
            own = self._of_tool.get(_normal(tool or "")) if self._of_tool else None
            walk = _Walk(self._verdicts if own is None else own, echoes, limit)
            return walk.value(value, None if endpoint_def is None else walk.declared(endpoint_def))
        except Exception as error:
            return encode_text(f"<unreadable {_type_name(value)}: {_type_name(error)}>")

    def scrub(self, text: str, echoes: Sequence[str] = ()) -> str:
        """Return a text, or an object's, without secrets and `echoes` of 4 and more characters."""
        try:
            if not echoes and type(text) is str and text in self._rules.harmless:
                return text
            walk = _Walk(self._verdicts)
            return walk.text(without_echoes(walk.as_text(text), echoes, self._rules.mark), None)
        except Exception as error:
            return f"<unreadable text: {_type_name(error)}>"

    def explain(self, value: object, *, tool: _Tool = None, endpoint_def: object = None) -> list[_Strings]:
        """Return what `redact` takes out of a value and why, as (path, reason)."""

        def compare(before: Any, after: Any, path: str, name: str, part: _Declared | None) -> Iterator[Any]:
            if type(before) is type(after) is dict:
                for (key, old), new in zip(before.items(), after.values()):
                    yield from compare(old, new, f"{path}.{key}", key, part and part.fields.get(_normal(key)))
            elif type(before) is type(after) is list:
                inner = part and (part.items or part)
                for index, (old, new) in enumerate(zip(before, after)):
                    yield from compare(old, new, f"{path}[{index}]", "", inner)
            elif before != after:
                strength = self._rules.judge(name, _normal(tool or ""))
                taken = self._rules.clean(before)[1] if isinstance(before, str) else ()
                rules = " and ".join(dict.fromkeys(rule for rule, _ in taken)) or "what stands beside it"
                words, judge = _name_words(name), self._rules.strength
                parts = (" ".join(words[i:j]) for j in range(len(words) + 1) for i in reversed(range(j)))
                named = f"{next((each for each in parts if judge(each) >= strength), name)!r} in its name"
                why = (rules, named, named, "listed under `redact`")[strength]
                yield path, "declared sensitive" if part else why

        after, walk = self.redact(value, tool=tool, endpoint_def=endpoint_def), _Walk(self._verdicts)
        return list(compare(walk.plain(value), after, "$", "", walk.declared(endpoint_def)))


# === Encoding ===
# depends on: Events, Redaction
#
# Event → line (docs/journal-format.md), line → event. Only the writer knows `seq`, which comes last. Lone
# surrogates, invalid UTF-8, NUL and integers past INTEGER don't pass: DuckDB would reject a file for one.

# --- what is too large


def clip_plain(plain: Any, max_bytes: int) -> Any:
    """Return a plain value cut so that its JSON takes at most `max_bytes`."""
    size = len(json.dumps(plain))
    if size <= max_bytes:
        return plain
    if not isinstance(plain, (dict, list)):
        return _clip_text(str(plain), max_bytes)
    note = f"…[CUT: {size} bytes, {len(plain)} items]"
    room = left = max_bytes - 14 - len(json.dumps(note))
    if room < 64:
        return _clip_text(note, max_bytes)
    # 1. Last entries go, until each of the rest has room for a marker.
    is_list = isinstance(plain, list)
    pairs: Any = plain.items() if isinstance(plain, dict) else enumerate(plain)
    out: dict[Any, Any] = {}
    sizes: dict[Any, int] = {}
    for key, item in pairs:
        if not is_list and (key := _clip_text(key, 256)) in out:
            key += f"#{len(out)}"
        item_size, overhead = len(json.dumps(item)), 2 if is_list else len(json.dumps(key)) + 4
        room -= overhead + min(item_size, 64)
        if room < 0:
            break
        left -= overhead
        out[key], sizes[key] = item, item_size
    # 2. Small ones take what they need, large ones share the rest.
    for rank, key in enumerate(sorted(out, key=sizes.__getitem__)):
        share = min(sizes[key], left // (len(out) - rank))
        left -= share
        out[key] = clip_plain(out[key], share)
    if len(out) < len(plain):
        out["…"] = note
    return list(out.values()) if is_list else out


def _clip_text(text: str, max_bytes: int) -> str:
    """Cut a text so that its ASCII JSON takes at most `max_bytes`."""
    if len(json.dumps(text)) <= max_bytes:
        return text
    marker = f"…[CUT: {len(text.encode('utf-8', 'surrogatepass'))} bytes]"
    room = max_bytes - len(json.dumps(marker))
    if room <= 0:
        return "…"
    end = min(len(text), room)
    while end and (size := len(json.dumps(text[:end])) - 2) > room:
        end = min(end - 1, end * room // size)
    return text[:end] + marker


# --- lines

_CACHE_SIZE, _CACHED_CHARS = 1024, 512
_NAME_BYTES = 1024  # of a name or an id
_TEXT_BYTES = 2**16  # of an error or a reason
REPLACEMENT = "\ufffd"
_ODD_BYTE = re.compile("(?<![\ud800-\udbff])[\udc80-\udcff]")  # of `os.fsdecode`
_NO_IDS = ',"user_id":null,"session_id":null,"trace_id":null'
_NO_MORE = (None,) * len(NEW_COLUMNS)
_PLAIN_ID = re.compile(r"[0-9a-f-]{1,64}|[A-Za-z0-9_.@-]{1,15}")  # no secret; needs no escape
_FRAME = ("caller", "event_type", "name", "policy_decision", "status")
_ALLOWED = {"event_type": EVENT_TYPES, "policy_decision": POLICY_DECISIONS, "status": STATUSES}
_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


class Json(str):
    """JSON that needs no redaction."""


class Encoder:
    """Turns events into lines; it raises nothing but MemoryError."""

    def __init__(
        self, redactor: Redactor, *, max_input_bytes: int, clock: Callable[[], int] = wall_clock_ns
    ) -> None:
        self._redactor, self._max_input_bytes, self._clock = redactor, max_input_bytes, clock
        self._second = (-1, "")  # threads never see half of a tuple
        self._cache: dict[tuple[object, ...], Any] = {}  # frames and parties

    def input_json(self, given: object, name: object, endpoint_def: object, echoes: list[str] | None) -> str:
        """Return the redacted input as JSON in JSON, or `null`."""
        if given is None:
            return "null"
        tool, limit = name if type(name) is str else None, self._max_input_bytes
        redact = self._redactor.redact_json
        text = redact(given, tool=tool, endpoint_def=endpoint_def, echoes=echoes, limit=limit)
        return encode_text(self._clipped(text) if len(text) * 4 > limit or "\\u0000" in text else text)

    def line(
        self,
        caller: object,
        event_type: object,
        name: object,
        input_json: str,
        duration_ms: object,
        policy_decision: object,
        reason: object,
        status: object,
        error: object,
        user_id: object,
        session_id: object,
        trace_id: object,
        echoes: Sequence[str],
        more: Sequence[object] = _NO_MORE,
        *,
        ago: int = 0,
    ) -> bytes:
        """Return a line for `finish_line`, of `ago` ns before now; `more`: of NEW_COLUMNS.

        Values that are not allowed are recorded as given, and `reason` says so.
        """
        second, ns = divmod(self._clock() - ago, 1_000_000_000)
        stamp = self._second
        if stamp[0] != second:
            stamp = self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        try:
            head, middle, tail, flag = self._cache[caller, event_type, name, policy_decision, status]
        except Exception:  # new, or its __hash__ raises
            head, middle, tail, flag = self._frame(caller, event_type, name, policy_decision, status)
        if type(duration_ms) is not int or not 0 <= duration_ms <= MAX_DURATION_MS:
            duration_ms = _clamped(duration_ms)
            if duration_ms is None:
                duration_ms, flag = "null", flag + "; mxcp_audit: duration_ms is no number"
        ids, rest = _NO_IDS, ""
        if user_id is not None or session_id is not None or trace_id is not None:
            text = self._json
            ids = f',"user_id":{text(user_id)},"session_id":{text(session_id)},"trace_id":{text(trace_id)}'
        if more != _NO_MORE:
            rest, more_flag = self._more(more)
            flag += more_flag
        reason_json = "null" if reason is None else encode_text(self._clean(reason, echoes, _TEXT_BYTES))
        if flag:
            reason_json = f'"{flag[2:]}"' if reason is None else f'{reason_json[:-1]}{flag}"'
        error_json = "null" if error is None else encode_text(self._clean(error, echoes, _TEXT_BYTES))
        line = (
            f'{{"timestamp":"{stamp[1]}.{ns // 1000:06d}{head}{input_json},"duration_ms":{duration_ms}'
            f"{middle}{reason_json}{tail}{error_json}{ids}{rest}"
        )
        try:
            return line.encode()
        except UnicodeEncodeError:  # surrogates; a pair is one character
            line = _ODD_BYTE.sub(lambda found: f"{REPLACEMENT}x{ord(found[0]) - 0xDC00:x}", line)
            return line.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

    def _frame(self, *parts: object) -> tuple[str, str, str, str]:
        """Return what surrounds the changing parts, and a flag for `reason`."""
        texts, flag = [], ""
        for argument, part in zip(_FRAME, parts):
            text = self._clean("n/a" if part is None and argument == "policy_decision" else part)
            texts.append(encode_text(text))
            allowed = _ALLOWED.get(argument, (text,))
            if text not in allowed:
                flag += f"; mxcp_audit: {argument} is none of {', '.join(allowed)}"
        head = f'Z","caller":{texts[0]},"type":{texts[1]},"name":{texts[2]},"input_json":'
        frame = head, f',"policy_decision":{texts[3]},"reason":', f',"status":{texts[4]},"error":', flag
        self._keep(parts, frame)
        return frame

    def _more(self, more: Sequence[object]) -> tuple[str, str]:
        """Return the members for NEW_COLUMNS, and a flag for `reason`."""
        parties = tuple(more[:4])  # the same for a session
        try:
            text = self._cache[parties]
        except Exception:  # as in `line`
            text = self._members(NEW_COLUMNS[:4], parties)
            self._keep(parties, text)
        flag, text, (result_bytes, context) = "", text + self._members(NEW_COLUMNS[4:6], more[4:6]), more[6:]
        if type(result_bytes) is int and 0 <= result_bytes <= LARGEST["BIGINT"]:
            text += f',"result_bytes":{result_bytes}'
        elif result_bytes is not None:
            flag = "; mxcp_audit: result_bytes is no integer from 0 to 2⁶³−1"
        if context is not None:
            inner = context if type(context) is Json else self._clipped(self._redactor.redact_json(context))
            if inner[0] != "{":
                flag += "; mxcp_audit: context is no mapping"
                inner = f'{{"value":{inner}}}'
            text += f',"context":{encode_text(inner)}'
        return text, flag

    def _keep(self, parts: tuple[object, ...], made: object) -> None:
        texts: list[Any] = [part for part in parts if part is not None]
        if all(type(text) is str for text in texts) and sum(map(len, texts)) <= _CACHED_CHARS:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            self._cache[parts] = made

    def _members(self, columns: Sequence[Column], values: Sequence[object]) -> str:
        pairs = [(column.name, value) for column, value in zip(columns, values) if value is not None]
        return "".join([f',"{name}":{self._json(value)}' for name, value in pairs])

    def _json(self, value: object) -> str:
        if type(value) is str and _PLAIN_ID.fullmatch(value):
            return f'"{value}"'
        return "null" if value is None else encode_text(self._clean(value))

    def _clean(self, value: object, echoes: Sequence[str] = (), limit: int = _NAME_BYTES) -> str:
        """Return a text without secrets, cut to `limit` bytes."""
        whole = value if type(value) is str else self._redactor.redact_json(value)
        if whole is not value and whole[0] == '"':
            whole = json.loads(whole)
        # Twice the limit is redacted, half of that kept: a secret that is cut isn't recognized.
        text = self._redactor.scrub(whole[: 2 * limit], echoes).replace("\0", REPLACEMENT)
        fits = len(whole) <= 2 * limit
        data = (text if fits else text[:-limit]).encode("utf-8", "surrogatepass")
        if fits and len(data) <= limit:
            return text
        mark = f"…[CUT: {len(whole.encode('utf-8', 'surrogatepass'))} bytes]"
        return data[: limit - len(mark.encode())].decode("utf-8", "ignore") + mark

    def _clipped(self, text: str) -> str:
        """Return JSON of at most `max_input_bytes`, without NUL."""
        if len(text.encode("utf-8", "surrogatepass")) > self._max_input_bytes:
            text = encode_json(clip_plain(json.loads(text), self._max_input_bytes))
        return _ESCAPED_NUL.sub(r"\1" + REPLACEMENT, text)


def finish_line(line: bytes, seq: int) -> bytes:
    return b'%b,"seq":%d}\n' % (line, seq)


def _clamped(duration_ms: Any) -> int | None:
    """Return an integer of 0 … 2³¹−1, or None for what is no number."""
    try:
        return round(min(max(0.0, float(duration_ms)), MAX_DURATION_MS))  # in this order NaN becomes 0
    except OverflowError:
        return 0 if duration_ms < 0 else MAX_DURATION_MS
    except Exception:  # of a __float__
        return None


def _json_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; ValueError says why there is none."""
    try:
        if isinstance(event := json.loads(line.decode()), dict):
            return event
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON in UTF-8: {error}") from error
    raise ValueError("no JSON object")


def event_of_line(line: bytes) -> dict[str, Any]:
    """Return the event of a line; ValueError says why DuckDB can't use it."""
    event = _json_object(line)
    for name, sql_type in COLUMNS[:-2] + COLUMNS[-1:]:  # without `segment`
        value, largest = event.get(name), LARGEST.get(sql_type)
        if largest is None and not isinstance(value, str | None):
            raise ValueError(f"{name} is no text")
        if largest and value is not None and (type(value) is not int or not 0 <= value <= largest):
            raise ValueError(f"{name} is no integer from 0 to {largest}")
    if not event.get("seq"):
        raise ValueError("seq is missing")
    try:
        datetime.datetime.strptime(event.get("timestamp") or "", LINE_TIME)
    except ValueError as error:
        raise ValueError(f"timestamp {event.get('timestamp')!r} is no time") from error
    return event


# === Journal ===
# depends on: Errors, Events, Encoding
#
# The append-only files between server and database (docs/journal-format.md). A process writes only its own
# segments, and holds their locks (flock: pids are reused) meanwhile. A name never changes, as a rename makes
# a reader's query fail. Without locks nobody knows who lives, and nothing is ingested.

JOURNAL_FORMAT = 2  # of names and lines
SEGMENT_SUFFIX = ".jsonl"
_LOSS_SUFFIX = ".loss"
_BEGUN_SUFFIX = ".begun"
UNFINISHED = "unfinished: the process ended during the call"
_ENDED = b'{"ended":'
CALL_OF_LINE = re.compile(rb'"call":"([^"]{1,60})"(?:,"seq":([0-9]+))?\}$', re.MULTILINE)
_DIRECTORY_MODE = 0o700
FILE_MODES = {False: 0o600, True: 0o660}  # True: for a group
_GROUP_MODE = 0o2770
# Follow no link, and wait for no other end of a FIFO.
_NO_FOLLOW = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_MOST_CLAIMS = 4096  # in one transaction
_SMALL_BYTES = 2**18  # of segments that are combined
COMBINED = "combined"
_GONE = {errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT)}
_TURN_SECONDS = 5.0  # of an ingest that asks
_ORPHAN_SECONDS = 60.0
_LOCK_OFFSET = 2**62  # Windows locks bytes against reading


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take a file's lock; False if somebody else has it."""
    with suppress(BlockingIOError, PermissionError):
        if sys.platform != "win32":
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            os.lseek(fd, _LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        return True
    return False


def unlock(fd: int) -> None:
    """Release a lock, though a forked child may share it."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def trying_lock(fd: int, *, shared: bool = False) -> Iterator[bool]:
    """Try a file's lock, and close the file in the end."""
    try:
        yield try_lock(fd, shared=shared)
    finally:
        unlock(fd)
        os.close(fd)


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _key_at(path: str) -> tuple[int, int] | None:
    """Return the key of a file or link, or None."""
    try:
        return _key(os.lstat(path))
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def file_size_limit() -> float:
    """Return the size beyond which SIGXFSZ may kill the process."""
    with suppress(ImportError):  # on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return inf if limit == resource.RLIM_INFINITY else limit
    return inf


def sync_file(path: str, flags: int = os.O_RDWR | _NO_FOLLOW) -> None:
    """Force a file to the disk; never a database: closing drops its lock."""
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(directory: str) -> None:
    """Force names in a directory to the disk; Windows needs no such thing."""
    if sys.platform != "win32":
        try:
            sync_file(directory, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # can't here
                raise


def _size_of(path: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(path).st_size
    return 0


def segment_id_of(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def give_to_owner(path: str, fd: int | None = None) -> None:
    """Give what root made to the directory's owner."""
    if getattr(os, "geteuid", lambda: -1)() == 0:
        owner = os.stat(os.path.dirname(path) or os.curdir)
        made = os.lstat(path) if fd is None else os.fstat(fd)
        if made.st_uid != owner.st_uid and (made.st_nlink == 1 or stat.S_ISDIR(made.st_mode)):
            os.chown(path if fd is None else fd, owner.st_uid, owner.st_gid)


def is_for_group(directory: str) -> bool:
    """Return True for the directory of a journal with `group`."""
    return os.stat(directory or os.curdir).st_mode & _GROUP_MODE == _GROUP_MODE


def open_file(path: str) -> IO[bytes]:
    """Open a file to read it, but no link."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_FOLLOW))


def read_file(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


def read_lines(path: str) -> bytes:
    """Return the whole lines of a file that may be growing."""
    data = read_file(path)
    return data[: data.rfind(b"\n") + 1]


def make_file(path: str, flags: int, *, group: bool | None = None) -> int:
    """Open a file, new or not, with our mode, but no link."""
    group = is_for_group(os.path.dirname(path)) if group is None else group
    fd = os.open(path, flags | os.O_CREAT | _NO_FOLLOW, FILE_MODES[group])
    try:
        give_to_owner(path, fd)
        if group:
            with suppress(PermissionError):  # its maker did this
                os.fchmod(fd, FILE_MODES[True])  # whatever the umask says
    except OSError:
        os.close(fd)
        raise
    return fd


def set_mode(path: str, mode: int) -> None:
    """Set a file's mode, where there are modes."""
    with suppress(PermissionError):
        os.chmod(path, mode)


def take_after(path: str, old: os.stat_result) -> None:
    """Give a file the mode and owner of the one that it replaces."""
    set_mode(path, stat.S_IMODE(old.st_mode))
    with suppress(AttributeError, PermissionError):
        os.chown(path, old.st_uid, old.st_gid)


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file, never of a database: see `sync_file`."""
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: str, data: bytes) -> None:
    """Make a file and force it to the disk."""
    with open(make_file(path, os.O_WRONLY | os.O_EXCL), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: str, data: bytes) -> None:
    """Put a file in place, whole or not at all."""
    scratch = f"{path}.{os.urandom(4).hex()}.part"
    try:
        write_file(scratch, data)
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            os.unlink(scratch)
        raise


class Segment:
    """A journal file of this process. Nobody ingests it before `seal`."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._key = fd, _key(os.fstat(fd))
        self.path, self.id, self.opened, self.closed = path, segment_id_of(path), time.monotonic(), False
        self._dirty = False  # there may be bytes behind the end
        self._end = (0, 0)  # bytes and events; an interrupt never sees half of a tuple
        self._limit = file_size_limit()

    @property
    def size(self) -> int:
        """Bytes of whole lines."""
        return self._end[0]

    @property
    def events(self) -> int:
        return self._end[1]

    def append(self, data: bytes, events: int, *, durable: bool = False) -> None:
        """Write lines, all or none. Ask `is_open` right before."""
        self._mend()
        fd, (size, count) = self._fd, self._end
        if size + len(data) > self._limit:
            raise OSError(errno.EFBIG, "File too large", self.path)
        self._dirty = True
        rest = memoryview(data)
        try:
            while rest:
                written = os.write(fd, rest)
                if not written:
                    raise OSError(errno.EIO, "no byte was written", self.path)
                rest = rest[written:]
            if durable:
                os.fsync(fd)
        except OSError:
            self._mend()
            raise
        self._end = (size + len(data), count + events)
        self._dirty = False

    def _mend(self) -> None:
        if self._dirty:
            os.ftruncate(self.number(), self.size)
            self._dirty = False

    def cut_off(self) -> int:
        """Return how many events somebody cut off, as logrotate's `copytruncate` does."""
        size, events = self._end
        is_whole = os.fstat(self._fd).st_size >= size
        return 0 if is_whole else events - os.pread(self._fd, size, 0).count(b"\n")

    def number(self) -> int:
        """Return the descriptor; OSError if it is closed or another file's."""
        if _key(os.fstat(self._fd)) != self._key:
            raise OSError(errno.EBADF, "closed", self.path)
        return self._fd

    def is_open(self) -> bool:
        try:
            return self.number() >= 0
        except OSError as error:
            if error.errno not in {errno.EBADF, *_GONE}:
                raise
            return error.errno != errno.EBADF  # a stale handle is ours

    def is_in_place(self) -> bool:
        return _key_at(self.path) == self._key

    def is_usable(self) -> bool:
        return self.is_open() and self.is_in_place()

    def seal(self) -> None:
        """Close the file, or delete an empty one: anybody may ingest it."""
        self._mend()
        (self.close if self.size else self.discard)()

    def close(self) -> None:
        """Close the file as it is, for good."""
        self.closed = True  # an interrupt may come before it is
        with suppress(OSError):
            unlock(self.number())
        self.forget()

    def discard(self) -> None:
        with suppress(OSError):
            if self.is_in_place():
                os.unlink(self.path)
        self.close()

    def forget(self) -> None:
        """Close the descriptor; a parent keeps the lock."""
        with suppress(OSError):
            os.close(self.number())
        self._fd = -1


def calls_in(data: bytes) -> dict[str, dict[str, Any]]:
    """Return the events in a `.begun` file that have no end, by call."""
    calls: dict[str, dict[str, Any]] = {}
    for line in data.split(b"\n")[:-1]:
        with suppress(ValueError, LookupError, TypeError):  # damaged by a power loss
            said = json.loads(line)
            if line.startswith(_ENDED):
                for call in said["ended"]:
                    calls.pop(call, None)
            else:
                calls[str(said["call"])] = said
    return calls


def lines_of(calls: Mapping[str, dict[str, Any]], now: datetime.datetime, *, over: bool) -> bytes:
    """Return lines of calls: over at a moment, or running, with `seq` 0."""
    lines: list[bytes] = []
    for call, event in sorted(calls.items()):
        with suppress(ValueError, LookupError, TypeError):  # damaged, or not ours
            begun = parse_iso(event["timestamp"])
            context = {**json.loads(event.get("context") or "{}"), "mxcp.call": call}
            line = {**event, "duration_ms": _clamped((now - begun).total_seconds() * 1000)}
            line |= {"context": json.dumps(context), "seq": (len(lines) + 1) * over}
            del line["call"]
            if over:
                line["timestamp"] = max(begun, now).strftime(LINE_TIME)
            else:
                line |= {"status": "running", "error": None}
            lines.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return b"".join(lines)


class Claim:
    """A segment without a writer; the ingest lock keeps others away."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self.id, self._stem = path, segment_id_of(path), path.removesuffix(SEGMENT_SUFFIX)
        data = read_file(path)
        self.lines, self.size = data.count(b"\n"), data.rfind(b"\n") + 1
        self.torn = len(data) - self.size
        if self.torn:
            replace_file(self._stem + ".torn", data[self.size :])
            os.ftruncate(fd, self.size)
        # Line numbers of calls whose begin was on record.
        calls = CALL_OF_LINE.findall(data) if b'"call":"' in data else ()
        self.calls = {call.decode(): int(seq or 0) for call, seq in calls}

    def reject(self, faults: Iterable[tuple[int, str, bytes]]) -> None:
        """Keep lines that can't be ingested in `.rejected`, to be repaired."""
        data = ""
        for number, reason, line in faults:
            text = line.decode("utf-8", "surrogateescape")
            data += json.dumps({"line": number, "reason": reason, "text": text}) + "\n"
        replace_file(self._stem + ".rejected", data.encode())


def combine(paths: Iterable[str], directory: str) -> list[str]:
    """Put small segments into one file: DuckDB takes 2 ms for each."""
    sizes = {path: size for path in paths if (size := _size_of(path))}
    small = [path for path, size in sizes.items() if size <= _SMALL_BYTES]
    if len(small) < 8:
        return list(sizes)
    target = os.path.join(directory, COMBINED + SEGMENT_SUFFIX)
    with open(make_file(target, os.O_WRONLY | os.O_TRUNC), "wb") as combined:
        for path in small:
            with suppress(FileNotFoundError):
                combined.write(named_lines(segment_id_of(path), read_lines(path)))
    return [*sorted({*sizes} - {*small}), target]


def named_lines(segment: str, lines: bytes) -> bytes:
    """Return lines with their segment as first member."""
    return (b"\n" + lines).replace(b"\n{", b'\n{"segment":"%b",' % segment.encode())[1:]


class Loss(NamedTuple):
    events: int
    first: str  # naive UTC text, as `sql_time` returns it
    last: str
    reason: str

    def __str__(self) -> str:
        return f"{counted(self.events, 'event')} lost between {self.first} and {self.last} UTC: {self.reason}"


class Journal:
    """The directory of segments; the first segment makes it."""

    def __init__(
        self, folder: str | os.PathLike[str], *, group: bool = False, clock: Callable[[], int] = wall_clock_ns
    ) -> None:
        self.directory, self._group, self._clock = os.path.abspath(folder), group, clock
        self._lock_path = self._path("ingest.lock")
        self.wal_mark = self._path("journal.wal")  # while the WAL holds only what we wrote

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def make_directory(self, *, durable: bool = False) -> None:
        """Make the directory, or check the existing one."""
        parent = os.path.dirname(self.directory)
        try:
            os.makedirs(parent, exist_ok=True)
            os.mkdir(self.directory, _DIRECTORY_MODE)
            give_to_owner(self.directory)
            if self._group:
                os.chmod(self.directory, _GROUP_MODE)
            os.close(make_file(self._lock_path, os.O_RDWR))
            if durable:
                sync_directory(parent)
        except FileExistsError:
            self.check_directory()

    def check_directory(self) -> None:
        """Raise JournalError if it is a link or somebody else's."""
        found = os.lstat(self.directory)
        if not stat.S_ISDIR(found.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no directory"
            raise JournalError(f"is {kind}; remove it, or set `journal`", path=self.directory)
        if not hasattr(os, "geteuid") or found.st_uid in (os.geteuid(), 0):
            return
        if self._group and found.st_gid in (os.getegid(), *os.getgroups()) and is_for_group(self.directory):
            return
        # Root works for the owner of the place only.
        if os.geteuid() or found.st_uid != os.stat(os.path.dirname(self.directory)).st_uid:
            text = f"belongs to user {found.st_uid}; work as that user, make it yours, or set `journal`"
            raise JournalError(text, path=self.directory)

    def _files(self, suffix: str) -> list[str]:
        """Return the files of a kind, oldest first."""
        try:
            with os.scandir(self.directory) as entries:
                files = [entry for entry in entries if entry.name.endswith(suffix)]
                files = [entry for entry in files if is_segment_id(entry.name.removesuffix(suffix))]
                return sorted(entry.path for entry in files if entry.is_file(follow_symlinks=False))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise JournalError(f"can't be read: {error.strerror or error}", path=self.directory) from error

    def segments(self) -> list[str]:
        return self._files(SEGMENT_SUFFIX)

    def identity(self) -> str:
        """Return this journal's name in the ledger; hold the ingest lock."""
        path = self._path("journal.id")
        with suppress(FileNotFoundError):
            if known := re.fullmatch(rb"\s*([0-9a-f]{1,64})\s*", read_file(path)):
                return known[1].decode()
        fresh = os.urandom(8).hex()
        replace_file(path, fresh.encode() + b"\n")
        return fresh

    def bind(self, target: str) -> None:
        """Note the database; give a copy its own identity."""
        path, ours, mine = self._path("journal.place"), self._path("journal.id"), [self.directory, target]
        place = other = ""
        with suppress(OSError, ValueError, TypeError):
            place, other = map(str, json.loads(read_file(path)))
        if [place, other] == mine:
            return
        if place == self.directory and os.path.isfile(other) and _key_at(other) != _key_at(target):
            text = f"holds the events of {other}; {target} needs one of its own: set `journal`"
            raise JournalError(text, path=self.directory)
        with suppress(OSError):  # a link or a second mount is no copy
            is_elsewhere = place and not os.path.samefile(place, self.directory)
            if is_elsewhere and read_file(os.path.join(place, "journal.id")) == read_file(ours):
                os.unlink(ours)
        replace_file(path, json.dumps(mine).encode())

    def ask_readers(self) -> None:
        """Have new readers wait for this ingest."""
        with suppress(OSError):
            os.utime(self._lock_path)

    def is_ingest_waiting(self) -> bool:
        """Return True if an ingest that asked for its turn lately goes on."""
        with suppress(OSError, JournalError):
            if 0 <= self._clock() - os.lstat(self._lock_path).st_mtime_ns < _TURN_SECONDS * 1e9:
                with self.ingest_lock(shared=True) as is_free:
                    return not is_free
        return False

    @contextlib.contextmanager
    def ingest_lock(self, *, shared: bool = False) -> Iterator[bool]:
        """Hold the ingest lock, or with `shared` keep ingests out."""
        with contextlib.ExitStack() as stack:
            try:
                if shared:
                    fd = os.open(self._lock_path, os.O_RDONLY | _NO_FOLLOW)
                else:
                    self.check_directory()
                    fd = make_file(self._lock_path, os.O_RDWR)
                locked = stack.enter_context(trying_lock(fd, shared=shared))
            except FileNotFoundError:
                locked = shared  # nobody ingests yet
            except OSError as error:
                text = f"can't be locked: {error.strerror}; nothing is ingested"
                raise JournalError(text, path=self._lock_path) from error
            yield locked

    def record_loss(self, loss: Loss) -> str:
        """Put a loss on record as a file; return its path."""
        self.make_directory()
        path = self._path(new_segment_id(self._clock()) + _LOSS_SUFFIX)
        replace_file(path, json.dumps(loss._asdict()).encode() + b"\n")
        return path

    def losses(self) -> dict[str, Loss]:
        """Return the losses that wait for an ingest, by path."""
        losses, when = {}, "an unknown time"
        for path in self._files(_LOSS_SUFFIX):
            with suppress(OSError, ValueError, TypeError):  # gone, not ours to read, or damaged
                data = read_file(path)
                losses[path] = Loss(0, when, when, "a record of lost events was damaged")
                loss = Loss(**json.loads(data))
                if not loss.events >> 62 and "\0" not in "".join(loss[1:]):
                    losses[path] = loss
        return losses

    def open_segment(
        self, durable: bool = False, *, named: str = "", suffix: str = SEGMENT_SUFFIX
    ) -> Segment:
        """Create and lock a segment, or a file beside the segments."""
        self.make_directory(durable=durable)
        while True:
            path = self._path((named or new_segment_id(self._clock())) + suffix)
            fd = make_file(path, os.O_RDWR | os.O_EXCL | os.O_APPEND)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                segment, is_locked = Segment(fd, path), True
                with suppress(OSError):  # no locks here, so nobody claims it
                    is_locked = try_lock(fd)
                if is_locked and segment.is_in_place():  # else somebody claimed it
                    if durable:
                        sync_directory(self.directory)
                    stack.pop_all()
                    return segment

    def begun(self, *, live: bool) -> Iterator[tuple[str, datetime.datetime, dict[str, dict[str, Any]]]]:
        """Yield path, last sign of life and calls of each process."""
        for path in self._files(_BEGUN_SUFFIX):
            with suppress(OSError), open_file(path) as file:  # gone, not ours, or no locks
                found = os.fstat(file.fileno())
                if try_lock(file.fileno()) is not live and _key_at(path) == _key(found):
                    sign = datetime.datetime.fromtimestamp(found.st_mtime, datetime.timezone.utc)
                    yield path, sign, calls_in(file.read())

    def running(self) -> bytes:
        """Return lines of the calls that run on this host."""
        return b"".join([lines_of(calls, utc_now(), over=False) for *_, calls in self.begun(live=True)])

    def unfinished(self) -> Iterator[tuple[str, bytes]]:
        """Yield path and lines of a segment for each ended process."""
        for path, last_sign, calls in self.begun(live=False):
            for segment in self.segments() if calls else ():
                with suppress(OSError):
                    for call, _ in CALL_OF_LINE.findall(read_file(segment)):
                        calls.pop(call.decode(), None)
            yield path.removesuffix(_BEGUN_SUFFIX) + SEGMENT_SUFFIX, lines_of(calls, last_sign, over=True)

    def take_unfinished(self) -> bool:
        """Make segments of what ended processes left, after `claim`."""
        made = False
        for path, lines in self.unfinished():
            if lines and not os.path.exists(path):  # else an attempt ended here
                made = True
                replace_file(path, lines)
            os.unlink(path.removesuffix(SEGMENT_SUFFIX) + _BEGUN_SUFFIX)
        return made

    def claim(self, limit_bytes: int, skip: Collection[str] = ()) -> tuple[list[Claim], list[JournalError]]:
        """Return about `limit_bytes` of segments without a writer."""
        claims: list[Claim] = []
        problems: list[JournalError] = []
        for path in self.segments():
            if limit_bytes <= 0 or len(claims) >= _MOST_CLAIMS:
                break
            if segment_id_of(path) in skip:
                continue
            try:
                with trying_lock(fd := os.open(path, os.O_RDWR | _NO_FOLLOW)) as is_free:
                    if is_free and _key_at(path) == _key(os.fstat(fd)):
                        claim = Claim(path, fd)
                        if claim.lines:
                            claims.append(claim)
                            limit_bytes -= claim.size
                        else:
                            os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                text = f"can't be claimed: {error.strerror}; where there are no locks, set `journal`"
                problems.append(JournalError(text, path=path))
        return claims, problems

    def survey(self) -> dict[str, Any]:
        """Count the files by state, for `doctor`."""
        state: dict[str, Any] = dict.fromkeys(("live", "sealed", "orphaned", "bytes"), 0)
        state |= {kind: len(self._files("." + kind)) for kind in ("torn", "rejected")}
        for path in self.segments():
            try:
                with open_file(path) as file:
                    found = os.fstat(file.fileno())
                    state["bytes"] += found.st_size
                    if not try_lock(file.fileno()):
                        state["live"] += 1
                    elif found.st_size:
                        state["sealed"] += 1
                        state["orphaned"] += self._clock() - found.st_mtime_ns > _ORPHAN_SECONDS * 1e9
                        begin = re.match(rb'\{"timestamp":\s*"([^"]{1,40})"', file.read(100))
                        if begin:
                            state.setdefault("oldest_pending", begin[1].decode("ascii", "replace"))
            except FileNotFoundError:
                pass
            except OSError as error:
                raise JournalError(f"can't be examined: {error.strerror}", path=path) from error
        return {"oldest_pending": None, **state}

    def waiting_bytes(self) -> int:
        """Return the size of all segments."""
        return sum(map(_size_of, self.segments()))


# === Writer ===
# depends on: Errors, Config, Events, Encoding, Journal
#
# The first event starts a thread; without one, or after `close`, callers write. A line stays in the queue
# until `Appender.done` counts it: an interrupt, a fork or a failed write neither loses nor repeats one.
# `_writing` is held while the disk works, `_lock` for moments within; both are re-entrant, because `put` runs
# in signal handlers and destructors.

QUEUE_BYTES = 64 * 2**20
SEGMENT_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20  # of one write
_GATHER_SECONDS = 0.02  # in which `kill -9` loses events
_RETRY_SECONDS = 0.1  # after a failed write
_REPORT_SECONDS = 60.0  # between two logs of the same fault

INFO, WARNING = 20, 30  # the levels of `logging`


@functools.cache
def _fresh_copy(name: str) -> Any:
    import importlib.util

    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native_threads() -> Any:
    """Return `threading` with real threads: under gevent they end with theirs."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return threading
    patched = sys.modules["_thread"]
    sys.modules["_thread"] = original = types.ModuleType("_thread")
    vars(original).update({**vars(patched), **monkey.saved.get("_thread", {})})
    try:
        return _fresh_copy("threading")
    finally:
        sys.modules["_thread"] = patched


class Diagnostics:
    """Counts faults, and logs each kind once a minute. Never raises."""

    def __init__(self, *, silent: bool = False) -> None:
        self._log: Any = None
        if not silent:  # it takes 8 ms; no fork may come between
            import logging

            self._log = logging.getLogger("mxcp_audit")
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin anew in a child after a fork, here and in each class below."""
        self.errors = self.dropped = self.rejected = self.ingested = 0
        self.last_error: str | None = None
        self.untold: list[tuple[int, str, str]] = []  # level, kind, text
        self._next: dict[str, float] = {}  # when to tell a kind again

    def note(self, kind: str, text: str, *, error: BaseException | None = None, level: int = WARNING) -> None:
        """Count a warning; once a minute a kind leave its text to `tell`."""
        text = text if error is None else f"{text}: {error}"
        if level >= WARNING:
            self.errors, self.last_error = self.errors + 1, text
        now = time.monotonic()
        if now >= self._next.get(kind, now):
            self._next[kind] = now + _REPORT_SECONDS
            self.untold.append((level, kind, text))

    def tell(self) -> None:
        """Log what was noted. Hold no lock: handlers log events."""
        while self.untold and self._log is not None:  # handlers may tell, too
            with suppress(Exception):  # of a broken handler
                level, _, text = self.untold.pop(0)
                self._log.disabled = False  # dictConfig disables what it doesn't name
                self._log.log(level, "mxcp_audit: %s", text)

    def report(self, kind: str, text: str, *, error: BaseException | None = None) -> None:
        self.note(kind, text, error=error)
        self.tell()


_BEGUN_BYTES = 2**20  # by which a file of begun calls grows
_SIGN_SECONDS = 1.0  # between two signs of life
_BRIEF_SECONDS = 0.1  # for calls that are not strict


class Begun:
    """A file of the calls that run here, for what a crash leaves unfinished."""

    def __init__(self, journal: Journal, durable: bool, encode: Callable[[Any, str], bytes]) -> None:
        self._journal, self._durable, self._encode = journal, durable, encode
        self._file: Segment | None = None
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin anew, as in a child after a fork."""
        if self._file:
            self._file.forget()
        self._file = None
        self._numbers = itertools.count(1)
        self._running: dict[int, Any] = {}  # calls by number
        self._refs: dict[int, tuple[str, Any]] = {}  # on record, or nearly: name in lines, call
        self.on_record: set[int] = set()
        self._over: dict[int, int] = {}  # by number, the ticket of its line
        self.ended = self._over.__setitem__  # for calls that `end` named
        self._size, self._signed = 0, 0.0  # of the file at first; the last sign of life

    def begin(self, call: Any) -> int:
        """Return the number of a call that begins."""
        number = next(self._numbers)
        self._running[number] = call
        return number

    def end(self, number: int) -> str | None:
        """Return how its line must name a call; None if its begin is not on record."""
        self._running.pop(number, None)  # first: the writer sets `_refs`, and then looks who still runs
        return self._refs.get(number, (None,))[0]

    def write(self, done: int, *, ends: bool = False) -> None:
        """Put on record what runs and, each second or with `ends`, what `done` lines ended."""
        refs = {}
        for due, number, call in self._waiting():
            if due <= 0.0:
                refs[number] = self._refs.setdefault(number, (new_segment_id(wall_clock_ns()), call))
                if number not in self._running:  # it has ended
                    del refs[number], self._refs[number]
        is_due = self.on_record and time.monotonic() >= self._signed + _SIGN_SECONDS
        if not (refs or is_due or (ends and self._over)):
            return
        over = {number for number, ticket in self._over.copy().items() if ticket <= done}
        file = self._file
        if file is None or not file.is_usable() or file.size > self._size + _BEGUN_BYTES:
            file = None
            refs |= {number: self._refs[number] for number in self.on_record - over}
        lines = [self._encode(call, ref) for ref, call in refs.values()]
        if file is None:
            self._replace_file(lines)
        else:
            if ended := [self._refs[number][0] for number in over & self.on_record]:
                lines.append(b'%b["%b"]}\n' % (_ENDED, '","'.join(ended).encode()))
            if not lines:
                os.utime(file.path)  # a sign of life
            file.append(b"".join(lines), len(lines), durable=self._durable)
        self.on_record.update(refs)
        for number in over:
            del self._over[number]
            self._refs.pop(number, None)
        self.on_record -= over
        self._signed = time.monotonic()

    def _replace_file(self, lines: list[bytes]) -> None:
        old, file = self._file, self._journal.open_segment(suffix=_BEGUN_SUFFIX + ".part")
        try:
            file.append(b"".join(lines), len(lines), durable=self._durable)
            path = old.path if old and old.is_usable() else file.path.removesuffix(".part")
            os.replace(file.path, path)
            file.path = path
            if self._durable:
                sync_directory(self._journal.directory)
        except BaseException:
            file.discard()
            raise
        self._file, self._size = file, file.size
        if old:
            old.close()

    def _waiting(self) -> Iterator[tuple[float, int, Any]]:
        """Yield due seconds, number and call of calls to put on record."""
        brief = time.perf_counter() - _BRIEF_SECONDS
        for number, call in self._running.copy().items():
            if number not in self.on_record:
                yield 0.0 if call.strict else call.started - brief, number, call

    def due_in(self) -> float:
        """Return the seconds until `write` has something to do."""
        sign = self._signed + _SIGN_SECONDS - time.monotonic() if self.on_record else inf
        return max(0.0, min([sign, *(due for due, _, _ in self._waiting())]))

    def close(self) -> None:
        """Remove the file, unless a call is on record, which an ingest takes."""
        if self._file and not self._refs:
            self._file.discard()
            self._file = None


class Appender:
    """Puts lines into segments; for one thread at a time."""

    def __init__(
        self,
        journal: Journal,
        *,
        durable: bool,
        diagnostics: Diagnostics,
        encode_begin: Callable[[Any, str], bytes] = lambda call, ref: b"",
    ) -> None:
        self.journal, self.durable, self.diagnostics = journal, durable, diagnostics
        self.begun = Begun(journal, durable, encode_begin)
        self._segment: Segment | None = None
        self.start_afresh()

    def start_afresh(self) -> None:
        self.begun.start_afresh()
        if self._segment:
            self._segment.forget()
        self._segment = None
        self._before = 0  # lines done before `_segment`
        self.sealed: dict[str, int] = {}  # files that wait for an ingest, and their events
        self._place: tuple[int, int] | None = None  # of their directory
        self._lost: list[Loss] = []
        self._losing = native_threads().RLock()  # for callers and signal handlers

    @property
    def done(self) -> int:
        """Lines that are in the journal, or can be in none."""
        segment = self._segment
        return self._before + (segment.events if segment else 0)

    def waiting_since(self) -> float:
        """Return the time of the first event or loss not sealed, or `inf`."""
        return self._segment.opened if self._segment else 0.0 if self._lost else inf

    def append(self, piece: list[bytes]) -> None:
        """Write lines; after an error, `done` says which were written."""
        segment = self._segment = self.present() or self._open()
        before = segment.events
        lines = b"".join([finish_line(line, seq) for seq, line in enumerate(piece, before + 1)])
        try:
            segment.append(lines, len(piece), durable=self.durable)
        except OSError as error:
            self.seal()
            if error.errno != errno.EFBIG:
                raise
            if not before and len(piece) == 1:
                self._before += 1
                self.lose(1, "limit", "the event is larger than a file may be (RLIMIT_FSIZE)")
                return
            for line in piece:
                self.append([line])
        if segment.size >= SEGMENT_BYTES:
            self.seal()

    def present(self) -> Segment | None:
        """Return the segment, open and in place, if there is one."""
        if segment := self._segment:
            if segment.closed or not segment.is_open():  # by an interrupt or others
                self._let_go(segment)
            elif not segment.is_in_place():
                self._write_again(segment)
            elif cut := segment.cut_off():
                self._let_go(segment)
                self.lose(cut, "cut", f"somebody cut them off {segment.path}")
        return self._segment

    def _open(self) -> Segment:
        segment = self.journal.open_segment(durable=self.durable)
        self.left()
        self._place = _key_at(self.journal.directory)
        return segment

    def _let_go(self, segment: Segment) -> None:
        if segment.is_open():
            segment.seal()
        if segment.events:
            self.sealed[segment.path] = segment.events
        self._segment, self._before = None, self.done  # in this order it is never too large

    def _write_again(self, segment: Segment) -> None:
        """Write a segment again that was moved; empty the old one."""
        events = segment.events
        try:
            held = os.pread(segment.number(), segment.size, 0)
        except OSError as error:  # a stale network handle
            self._segment, self._before = None, self.done  # in this order it is never too large
            self.lose(events, "moved", "their segment was taken away and can't be read", error=error)
            segment.close()
            return
        self.diagnostics.note("moved", f"{segment.path} was deleted or replaced; it is written again")
        fresh = self._open()
        try:
            fresh.append(held, events, durable=self.durable)
        except BaseException:
            fresh.discard()
            raise
        self._segment = fresh
        with suppress(OSError):
            os.ftruncate(segment.number(), 0)
        segment.close()

    def seal(self) -> bool:
        """Seal and record all; False if that failed."""
        try:
            segment = self.present()
            self.begun.write(self.done, ends=True)
            if segment is not None:
                self._let_go(segment)
            self.record_losses()
            return True
        except (OSError, JournalError) as error:
            self.diagnostics.note("seal", "a segment could not be sealed yet", error=error)
            return False

    def record_losses(self) -> None:
        while self._lost:
            with self._losing:
                loss = self._lost.pop(0)
            try:
                self.sealed[self.journal.record_loss(loss)] = 0
            except BaseException:
                with self._losing:
                    self._lost.insert(0, loss)
                raise

    def lose(self, events: int, kind: str, reason: str, *, error: BaseException | None = None) -> None:
        """Count lost events, in any thread, for `record_losses`."""
        first = now = sql_time(utc_now())
        with self._losing:
            self.diagnostics.dropped += events
            if self._lost and self._lost[-1].reason == reason:
                before, first, *_ = self._lost.pop()
                events += before
            self._lost.append(Loss(events, first, now, reason))
        self.diagnostics.note(kind, f"events are lost: {reason}", error=error)

    def left(self) -> bool:
        """Return True if something sealed waits for an ingest."""
        gone = [path for path in self.sealed if not os.path.exists(path)]  # most were ingested
        events, place = sum([self.sealed.pop(path) for path in gone]), self.journal.directory
        with suppress(OSError):
            if events and _key_at(place) != self._place:
                self.lose(events, "away", f"{counted(events, 'event')} went away with {place}; put them back")
        return bool(self.sealed)


_CPU_SHARE = 0.01  # of one core
_LONGEST_PAUSE_SECONDS = 60.0
_LOCKED_PAUSE_SECONDS = 5.0  # after waiting in vain for the database
_CHILD_WAIT_SECONDS = 30.0  # for the database
_POLL_SECONDS = 0.1
_ANSWER_BYTES = 2**16
# Loads this very file with the parent's module path.
_CHILD = """
import json, sys
work = json.loads(sys.stdin.buffer.read())
sys.path[:], sys.pycache_prefix, sys.dont_write_bytecode = work.pop("python")
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("mxcp_audit", work.pop("file"))
sys.modules["mxcp_audit"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
module.ingest_child(**work)
"""


class Ingester:
    """Has children ingest; seals a segment once the one before is gone."""

    def __init__(self, appender: Appender, settings: Mapping[str, object] | None, *, interval: float) -> None:
        self._appender, self._diagnostics = appender, appender.diagnostics
        self._settings, self._interval = settings or {}, interval
        self._child: Any = None  # subprocess.Popen
        self.start_afresh()

    def start_afresh(self) -> None:
        if self._child is not None:
            self._child.returncode = 0  # nothing waits for it here, or warns
            self._child.stdout.close()
        self._child = None
        self.stopped = not self._settings  # no further child
        self.wanted = self.tried = self._covers = 0  # attempts that `flush` asked for
        # By the budget; after a failure; while another process ingests.
        self._not_before = self._away_until = self._busy_until = self._next_daily = 0.0
        self._taken: list[str] = []
        self._head: object = None  # JSON

    def due_in(self) -> float:
        """Return the seconds until `step` has something to do."""
        if self._child is not None:
            return _POLL_SECONDS
        if self.stopped:
            return inf
        due = max(self._appender.waiting_since() + self._interval, self._not_before)
        if self._next_daily and self._settings["retention"]:
            due = min(due, self._next_daily)
        if self._appender.left():  # of a failed attempt, or full
            due = 0.0
        due = 0.0 if self.wanted > self.tried else max(due, self._away_until)
        return max(0.0, max(due, self._busy_until) - time.monotonic())

    def step(self) -> float:
        """Look after the child, or start one if due; return `due_in`."""
        if self._child is not None:
            self._appender.left()
            if (answer := self._look()) is not None:
                self._answered(answer)
        elif self.due_in() <= 0.0:
            self._begin()
        return self.due_in()

    def _begin(self) -> None:
        """Seal and start a child, unless another process ingests."""
        appender, self._covers = self._appender, self.wanted
        if not (appender.sealed or appender.waiting_since() < inf or self._due_settings()["retention"]):
            self.tried = self.wanted
            return
        try:
            if reason := no_python():
                self.stopped = True
                raise JournalError(f"{reason}: only shutdown ingests", path=appender.journal.directory)
            with appender.journal.ingest_lock() as is_free:
                pass
            if not is_free:  # perhaps for long
                appender.record_losses()
            if is_free and (appender.sealed or appender.seal()):
                self._start()
            else:
                self._answered({"busy": not is_free})
        except Exception as error:
            self._answered({"fault": str(error)})

    def _start(self) -> None:
        import subprocess

        self._taken = list(self._appender.sealed)
        module: Any = subprocess
        if "gevent.monkey" in sys.modules:
            module = _fresh_copy("subprocess")
            module.threading = native_threads()
        folders = [os.path.abspath(folder) for folder in sys.path if folder and isinstance(folder, str)]
        python = folders, sys.pycache_prefix, sys.dont_write_bytecode
        work = {"settings": self._due_settings(), "python": python, "wait": _CHILD_WAIT_SECONDS}
        work["file"] = os.path.abspath(__file__)
        self._said, self._started = b"", time.monotonic()
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _CHILD, "ingest"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # In a session of its own, as Ctrl+C is for the server.
        self._child = child = module.Popen(command, bufsize=0, start_new_session=True, **pipes)
        with suppress(OSError), child.stdin as pipe:  # it may have ended already
            if os.name == "posix":
                os.set_blocking(child.stdout.fileno(), False)
            pipe.write(json.dumps(work, default=str).encode())

    def _look(self) -> Mapping[str, Any] | None:
        """Return the child's answer, or None while it runs."""
        child = self._child
        code = child.poll()
        with suppress(OSError):  # somebody closed the pipe
            while (code is not None or os.name == "posix") and (data := child.stdout.read(_ANSWER_BYTES)):
                self._said = (self._said + data)[-_ANSWER_BYTES:]
        if code is None:
            return None
        self._close(child)
        text = self._said.decode("utf-8", "replace").strip().rpartition("\n")[2]
        with suppress(ValueError, TypeError, KeyError):  # it is not ours
            answer = json.loads(text)
            return {**answer, "cpu": answer["cpu"]}
        self._diagnostics.note("child", f"an ingest ended with code {code}: {text[:500]}")
        return {"cpu": time.monotonic() - self._started}

    def _answered(self, answer: Mapping[str, Any]) -> None:
        told, now = self._diagnostics, time.monotonic()
        told.ingested += answer.get("ingested", 0)
        told.rejected += answer.get("rejected", 0)
        for level, kind, text in answer.get("log", ()):
            told.note(kind, text, level=level)
        if "fault" in answer:
            told.note("ingest", f"events stay in the journal: {answer['fault']}")
        self._head = answer.get("head") or self._head
        if answer.get("done"):
            for path in self._taken:
                self._appender.sealed.pop(path, None)  # though it can't be deleted
            if now >= self._next_daily:
                self._next_daily = now + 3600 * (24 if answer.get("retained") else 1)
                self._tell_head()
        if answer.get("busy"):
            self._busy_until = now + (_POLL_SECONDS if self.wanted > self.tried else 1.0)
            return
        self.tried = self._covers
        pause = min(max(answer.get("cpu", 0.0) / _CPU_SHARE, self._interval), _LONGEST_PAUSE_SECONDS)
        away = 0.0 if answer.get("done") else _LOCKED_PAUSE_SECONDS if answer.get("locked") else pause
        self._not_before, self._away_until = now + pause, now + away

    def _due_settings(self) -> dict[str, object]:
        """Return the settings, `retention` among them once a day."""
        is_due = time.monotonic() >= self._next_daily
        return {**self._settings, "retention": self._settings["retention"] if is_due else None}

    def _tell_head(self) -> None:
        if self._head:
            self._diagnostics.note(f"checkpoint {self._head}", f"checkpoint {self._head}", level=INFO)

    def finish(self, ingest: Callable[..., Mapping[str, Any]], deadline: float) -> None:
        """Wait for the child, then ingest while there is time."""
        self.stopped = True
        appender, why = self._appender, "there was no time left"
        if self._child is not None:
            self._answered(self._await_child((time.monotonic() + deadline) / 2))
        while appender.left() and time.monotonic() < deadline:
            if is_attach_target(str(self._settings["path"])) and not no_python():
                self._start()  # it may wait for a server
                answer = self._await_child(deadline)
            else:
                self._taken = list(appender.sealed)
                answer = ingest(self._due_settings(), wait=max(0.0, deadline - time.monotonic()))
            self._answered(answer)
            why = answer.get("fault") or "another process is ingesting"
            if not (answer.get("busy") or answer.get("done")):
                break
            time.sleep(0.05 if answer.get("busy") else 0)
        appender.left()
        if events := sum(appender.sealed.values()):
            reason = "" if (self._diagnostics.last_error or "").endswith(why) else f": {why}"
            self._diagnostics.note("waiting", f"the journal keeps {counted(events, 'event')}{reason}")
        self._tell_head()

    def _await_child(self, deadline: float) -> Mapping[str, Any]:
        while (answer := self._look()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if answer is None:
            self.end_child()
        return answer or {"fault": "an ingest took too long"}

    def end_child(self) -> None:
        """Kill the child; the next ingest repeats what it was doing."""
        if (child := self._child) is not None:
            with suppress(OSError):  # a transaction that is killed never happened
                os.killpg(child.pid, 9) if os.name == "posix" else child.kill()
            child.wait()
            self._close(child)

    def _close(self, child: Any) -> None:
        self._child = None
        with suppress(OSError):
            child.stdout.close()


class Writer:
    """The queue and the thread that empties it.

    A caller first changes the queue or what is wanted and then reads `_asleep`; the thread first sets that
    and then reads the queue. So neither misses the other.
    """

    def __init__(
        self,
        appender: Appender,
        ingester: Ingester,
        *,
        drop_when_full: bool,
        on_start: Callable[[], bool],
        at_once: bool = False,
    ) -> None:
        self._appender, self._ingester = appender, ingester
        self.begun, self._diagnostics = appender.begun, appender.diagnostics
        self._at_once = at_once or appender.durable  # callers wait: nothing is gathered
        self._drop_when_full, self._on_start = drop_when_full, on_start
        self.start_afresh()

    def start_afresh(self) -> None:
        """Begin anew, as in a child after a fork: what is queued is the parent's."""
        self._appender.start_afresh()
        self._ingester.start_afresh()
        self._threads = threads = native_threads()
        self._lock = threads.RLock()  # of the queue
        # Who waits lets the lock go, though a signal came within `put`.
        self._progress = threads.Condition(self._lock)
        self._writing = threads.RLock()  # of the appender
        self._wake = threads.Lock()
        self._wake.acquire()
        self._queue: list[bytes] = []
        self._queued_bytes = self._finished = 0  # of the queue; lines that left it
        self._due = self._step_at = 0.0  # seconds until a step; when to look after the rest
        self._waiting: dict[Callable[[], object], Callable[[], bool]] = {}  # callbacks, and what for
        self._asleep, self._hurried = True, False  # somebody waits for the next round
        self._closing = self._sealed = self._closed = False
        self._inline = 0  # the number of a caller's thread that writes
        self._thread: threading.Thread | None = None

    def before_fork(self) -> None:
        """Wait for a write to end: a child may inherit no unknown segment."""
        self._writing.acquire(timeout=1.0)

    def after_fork_in_parent(self) -> None:
        with suppress(RuntimeError):  # it took too long
            self._writing.release()

    # --- the caller's side

    def put(self, line: bytes) -> int:
        """Queue an unfinished line and return its ticket; 0 if it was dropped."""
        if self._queued_bytes > QUEUE_BYTES and not self._has_room():
            return 0
        with self._lock:
            self._queue.append(line)
            self._queued_bytes += len(line)
            ticket = self._finished + len(self._queue)
        self._rouse_if_asleep()
        return ticket

    def begin(self, call: object) -> int:
        """Have a call put on record while it runs, and return its number."""
        number = self.begun.begin(call)
        self._rouse_if_asleep()
        return number

    def _rouse_if_asleep(self) -> None:
        if self._asleep:
            try:  # noqa: SIM105 - `suppress` needs some stack, too
                self._rouse()
            except RecursionError:  # the next line wakes the writer
                pass

    def wait_written(self, ticket: int, timeout: float | None = None) -> bool:
        """Wait until the line with this ticket is in the journal; see `wait_for`."""
        return self.wait_for(lambda: self.written >= ticket, timeout)

    def wait_for(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for the writer, unless this is its thread, or do its work; False after the timeout."""
        if done() or self._is_writing_thread():
            return True
        deadline = time.monotonic() + (inf if timeout is None else timeout)
        moved = False
        self._hurry()
        while not (done() or self._closed):
            if self._asleep and not moved:  # a caller was interrupted, or there is no thread
                self._rouse()
            if (left := deadline - time.monotonic()) <= 0:
                break
            with self._lock:
                if not (done() or self._closed):
                    pause = min(left, _RETRY_SECONDS if self._thread is None else 1.0)
                    moved = self._progress.wait(pause)  # else two would wake each other without end
        return done()

    def call_when(self, done: Callable[[], bool], callback: Callable[[], object]) -> Callable[[], object]:
        """Call back once, in any thread, when something is done or the writer closed; return a way back."""
        self._waiting[callback] = done
        self._hurry()
        self._call_back()
        return lambda: self._waiting.pop(callback, done)

    def flush(self, timeout: float) -> bool:
        """Write all, and try once to ingest it; False if it could not be written."""
        deadline = time.monotonic() + timeout
        if not self.wait_written(self.accepted, timeout) or self._is_writing_thread():
            return not self.pending
        ingester = self._ingester
        with self._lock:
            ingester.wanted = wanted = ingester.wanted + 1
        if self._at_once:  # else `wait_for` does this
            self._release_wake()
        left = deadline - time.monotonic()
        self.wait_for(lambda: ingester.tried >= wanted or ingester.stopped or self._closing, left)
        return True

    def close(self, timeout: float) -> int:
        """Write and seal all, end the thread; return how many lines are left."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closing = True
            thread = self._thread
        if thread is not None:
            self._release_wake()
            if thread is not self._threads.current_thread():
                with self._lock:
                    self._progress.wait_for(lambda: self._thread is not thread, timeout)
                thread.join(max(0.0, deadline - time.monotonic()))
        while self._thread is None and not self._work_here() and time.monotonic() < deadline:
            time.sleep(_RETRY_SECONDS)
        self._closed = True
        self._call_back()
        return self.pending

    @property
    def accepted(self) -> int:
        return self._finished + len(self._queue)

    @property
    def written(self) -> int:
        return self._appender.done

    @property
    def pending(self) -> int:
        return self.accepted - self.written

    def _is_writing_thread(self) -> bool:
        return self._thread is self._threads.current_thread() or self._inline == self._threads.get_ident()

    def _has_room(self) -> bool:
        """Wait for room in the queue; False if the event is dropped instead."""
        if self._drop_when_full:
            self._appender.lose(1, "full", "the queue was full (on_full: drop)")
            self._diagnostics.tell()
            return False
        if not self._is_writing_thread():  # such as a logging handler in it
            self._diagnostics.report("full", "the queue is full: callers wait (on_full: block)")
        return self.wait_for(lambda: self._queued_bytes <= QUEUE_BYTES or self._closing)

    def _rouse(self) -> None:
        """Wake the writer, start it, or do its work here."""
        if self._thread is not None or self._start_thread():
            self._release_wake()
        else:
            self._work_here()

    def _hurry(self) -> None:
        """Have the thread gather no longer, now or the next time."""
        if not self._at_once:
            self._hurried = True  # first: it clears this, and then waits
            self._release_wake()

    def _release_wake(self) -> None:
        if self._wake.locked():
            with suppress(RuntimeError):  # another thread was faster
                self._wake.release()

    def _start_thread(self) -> bool:
        with self._lock:
            if self._thread is not None:
                return True
            if self._closing or not self._on_start():
                return False
            try:
                thread = self._threads.Thread(target=self._run, name="mxcp_audit writer", daemon=True)
                self._thread = thread  # first: a signal handler within `start` may log
                thread.start()
            except BaseException as error:
                if self._thread is not None and self._thread.ident is None:
                    self._thread = None
                if not isinstance(error, RuntimeError):
                    raise
                # A process limit, a subinterpreter, or the program ends.
                if threading.main_thread().is_alive():
                    text = "no writer thread, callers write themselves"
                    self._diagnostics.note("thread", text, error=error)
            return self._thread is not None

    def _work_here(self) -> bool:
        """Do the writer's work in this thread, once; False if something is left to do."""
        me = self._threads.get_ident()
        if self._inline == me:
            return True  # a signal handler within our write
        with self._writing:
            self._inline = me
            try:
                done = self._work()
            except Exception as error:
                done = False
                self._diagnostics.note("writer", "writing failed; events wait in memory", error=error)
            finally:
                self._inline = 0
        self._diagnostics.tell()
        return done

    # --- the writer's side

    def _run(self) -> None:
        me = self._threads.current_thread()
        try:
            while self._thread is me:
                self._asleep = False
                is_awaited = self._hurried or self._ingester.wanted > self._ingester.tried
                self._hurried = False
                if not (self._at_once or self._closing or is_awaited):
                    self._wake.acquire(timeout=_GATHER_SECONDS)
                done = self._work_here()
                with self._lock:
                    if self._closing and not (done and self._queue):  # `close` does the rest
                        self._thread = None
                        self._progress.notify_all()
                    self._asleep = self._thread is None or (done and not self._queue)
                if self._thread is me and (self._asleep or not done):
                    due = min(self._due, self.begun.due_in(), threading.TIMEOUT_MAX)
                    self._wake.acquire(timeout=due if done else _RETRY_SECONDS)
        except BaseException as error:
            self._thread, self._asleep = None, True
            self._call_back()
            text = "the writer thread ended; the next event starts another"
            self._diagnostics.report("writer", text, error=error)

    def _work(self) -> bool:
        """Write what is queued, let the ingester work; False if something is left."""
        done = self._drain()
        if self._closing:
            done &= self._closed or self._sealed or self._appender.seal()  # in any case, to make room
            if done:
                self._sealed = True
                self.begun.close()
            return done
        now, ingester = time.monotonic(), self._ingester
        self._due = _GATHER_SECONDS
        if now >= self._step_at or ingester.wanted > ingester.tried:
            self._step_at = now + _GATHER_SECONDS
            self._due = ingester.step()
            self._call_back()
        return done

    def _drain(self) -> bool:
        """Move the queue into the journal; False on a fault."""
        self._trim()  # what an interrupt left
        while True:
            sizes = itertools.accumulate(map(len, self._queue))
            piece = self._queue[: 1 + sum(1 for _ in itertools.takewhile(_PIECE_BYTES.__gt__, sizes))]
            try:
                if piece:
                    self._appender.append(piece)
                elif time.monotonic() >= self._step_at:
                    self._appender.present()
                self.begun.write(self.written)
            except (OSError, JournalError, MemoryError, RuntimeError) as error:
                text = "the journal can't be written; events wait in memory and it is tried again"
                self._diagnostics.note("journal", text, error=error)
                return False
            finally:
                self._trim()
                self._call_back()
            if not self._queue:
                return True

    def _trim(self) -> None:
        """Take what is written out of the queue."""
        with self._lock:
            written = self.written
            gone = self._queue[: written - self._finished]
            count, left = len(gone), self._queued_bytes - sum(map(len, gone))
            # No call, so no interrupt, comes within.
            del self._queue[:count]
            self._finished = written
            self._queued_bytes = left if self._queue else 0

    def _call_back(self) -> None:
        """Wake who waits, and call back those whose turn it is."""
        with self._lock:
            self._progress.notify_all()
        for callback, done in self._waiting.copy().items():
            if (self._closed or done()) and self._waiting.pop(callback, None) is done:
                with suppress(RuntimeError):  # its event loop is closed
                    callback()


# === Calls ===
# depends on: Errors, Events, Redaction, Encoding
#
# An execution is one row, written at its end by the outermost middleware or decorator; those within tell
# what they know. What the body raises leaves as the same object. Frameworks are never imported: what they
# hand over is read by attribute or key.

MCP_METHODS = {"tools/call": "tool", "resources/read": "resource", "prompts/get": "prompt"}
DeniedBy: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
Function = TypeVar("Function", bound=Callable[..., Any])
Done: TypeAlias = Callable[[], bool]

_MAX_CAUSES = 64  # chains may be circular
_MAX_UNFINISHED = 10_000  # arbitrary
_RESUME_SECONDS = 600.0  # for which the SDK takes back the state of a call
_CONNECTION = os.urandom(8).hex()  # the one connection of a stdio server
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_NAMES_OF_HEADERS = "mcp-session-id mcp-protocol-version traceparent user-agent x-forwarded-for forwarded"
_REQUEST_HEADERS = {name.encode(): name for name in _words_in(_NAMES_OF_HEADERS)}
_META = "io.modelcontextprotocol/"  # before the protocol's own names in `_meta`
_ORIGIN = _words_in("caller user_id session_id trace_id client agent address server request_id")
# Modules: between a middleware and the tool; whose objects a tool gets unsent (contexts, servers,
# dependencies); whose errors stand for others.
_FRAMEWORKS = re.compile(
    r"(?!fastmcp\.(server\.transforms|experimental|contrib))"
    r"(anyio|asyncio|contextlib|docket|fastmcp|functools|mcp|pydantic|threading|uncalled_for)\b"
)
_INJECTING = re.compile(r"(?!mcp\.types)(docket|fast_depends|fastapi|fastmcp|mcp|starlette|uncalled_for)\b")
_MASKING = re.compile(r"(fastmcp|mcp)\b")
_UNKNOWN = cast("str | None", None)


class Call:
    """One execution, for `with` or `async with`: times it, records how it ended, re-raises what it raised.

    What goes wrong while recording never reaches the body. Attributes may be changed until the end: `caller`,
    `user_id`, `session_id`, `trace_id`, `client`, `agent`, `address`, `server`, `request_id`, `error_type`,
    `result_bytes`, and `context`, a dict of anything else.
    """

    caller, policy_decision, status = "cli", "n/a", "success"
    user_id = session_id = trace_id = client = agent = address = server = request_id = error_type = _UNKNOWN
    result_bytes: int | None = None
    reason: object = None
    error: object = None
    duration_ms = 0
    denied_by: DeniedBy = ()
    arguments: object = None  # of a middleware's call; more within may be the same execution
    task: object = None  # in which that one runs
    outer: Call | None = None  # of the same execution; it writes the row
    failure: tuple[object, str | None] | None = None  # what failed within
    ended = False
    waits = False  # it was answered, and goes on
    number = 0  # while it runs
    strict = False  # executed only on record
    _before: contextvars.Token[Call | None]

    def __init__(
        self, logger: Any, event_type: str, name: str, input_params: object = None, **known: Any
    ) -> None:
        self._logger, self.event_type, self.name = logger, event_type, name
        self.started = time.perf_counter()
        self.details: dict[str, object] = {}  # what we know ourselves; part of `context`, too
        self.context: dict[str, object] = dict(known.pop("context", None) or ())
        self.take_input(input_params, known.pop("endpoint_def", None))
        self.__dict__.update(known)

    def take_input(self, input_params: object, endpoint_def: object = None) -> None:
        """Encode the input, redacted by the rules for the call's name."""
        self.input_json, self.echoes = self._logger.take_input(input_params, self.name, endpoint_def)

    def event(self) -> tuple[Any, ...]:
        """Return the arguments of `Encoder.line`."""
        context = {**self.details, **self.context} if self.context else _json_of((*self.details.items(),))
        return (*_event_of(self), (*_more_of(self), context))

    def policy(self, decision: str, reason: object = None) -> None:
        """Record what a policy decided: allow, deny or warn, and why."""
        self.policy_decision, self.reason = decision, reason

    def fail(self, error: object, error_type: str | None = None) -> None:
        """Record an error although nothing is raised, such as a result that is marked as one."""
        self.status, self.error, self.error_type = "error", error, error_type or self.error_type

    def begin(self) -> None:
        """Put the call on record as running; AuditUnavailableError if `strict` and too late."""
        self._logger.wait(self, self._begin())

    def _begin(self) -> Done | None:
        """Begin, once; return what the body must wait for, if anything."""
        logger = self._logger
        if self.number or self.outer is not None or not logger.enabled:
            return None
        self.strict = bool(logger.config.strict and logger._strict(str(self.name)))
        self.number = logger._writer.begin(self)
        return (lambda: self.number in logger._writer.begun.on_record) if self.strict else None

    def end(self, error: BaseException | None = None) -> None:
        """Record the call, once: for code that can't use `with`."""
        self._logger.wait(self, self._end(error), error)

    def _end(self, error: BaseException | None) -> Done | None:
        """End, once; return what the answer must wait for, if anything."""
        if self.ended:
            return None
        self.ended, logger = True, self._logger
        self.duration_ms = round((time.perf_counter() - self.started) * 1000)
        try:
            # To close a generator is no error.
            if error is not None and not isinstance(error, GeneratorExit):
                if self.status != "error":  # else it is known from nearer to the cause
                    self.fail(describe_exception(error), type_of_error(error))
                with suppress(TypeError):  # of a `denied_by` that holds no exceptions
                    for each in _errors_in(error, with_causes=True):
                        if isinstance(each, self.denied_by) and self.policy_decision == "n/a":
                            self.policy("deny", describe_exception(each, with_type=False))
        finally:  # an interrupt loses no call
            outer, has_failed = self.outer, self.status == "error"
            if has_failed and self.failure is not None:
                self.fail(*self.failure)
            if outer is not None:
                if has_failed or self.task is None:  # a function may be tried again
                    outer.failure = (self.error, self.error_type) if has_failed else None
                if self.policy_decision != "n/a":
                    outer.policy(self.policy_decision, self.reason)
            begun, ticket = logger._writer.begun, 0
            ref = begun.end(self.number)
            try:
                if outer is None and logger.enabled:  # else it is part of another, which is written
                    ticket = logger._record(*self.event(), end=b',"call":"%b"' % ref.encode() if ref else b"")
            finally:
                if ref:  # without a ticket there was an interrupt
                    begun.ended(self.number, ticket or logger._writer.accepted)
        if outer is not None and outer.waits:  # for this, which it began
            return outer._end(error)
        return (lambda: logger._writer.written >= ticket) if self.strict or logger.config.durable else None

    def leg(self, message: object) -> object:
        """Return what a call that waits for input shares with its resumption."""
        what, who = (self.event_type, self.name, self.input_json), (self.user_id, self.agent, self.client)
        return what, who, self.session_id, _text(_get(message, "request_state", "requestState"))

    def give_up(self, error: str) -> None:
        """Record the call with an error, unless it has ended."""
        if not self.ended:
            self.fail(error)
            self._end(None)

    def _leave(self) -> None:
        """Be no longer the call that runs; twice is harmless."""
        try:  # noqa: SIM105 - faster
            _running.reset(self._before)
        except (ValueError, RuntimeError):  # in another context, or again
            pass

    def __enter__(self) -> Call:
        self.begin()
        self.waits, self._before = False, _running.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave()
        if not self.waits:
            self.end(error)

    async def __aenter__(self) -> Call:
        if (is_done := self._begin()) is not None:
            await self._logger.wait_async(self, is_done)
        self.waits, self._before = False, _running.set(self)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave()
        if not self.waits and (is_done := self._end(error)) is not None:
            # A cancelled scope cancels each `await` again; the first error leaves.
            with suppress(*() if error is None or isinstance(error, Exception) else (BaseException,)):
                await self._logger.wait_async(self, is_done, error)


_EVENT = "caller event_type name input_json duration_ms policy_decision reason status error user_id"
_event_of = operator.attrgetter(*_EVENT.split(), "session_id", "trace_id", "echoes")
_OTHERS = "client agent address server request_id error_type result_bytes"
_more_of = operator.attrgetter(*_OTHERS.split())
# Cached: most calls of a session are alike in this.
_json_of = functools.lru_cache(1024)(lambda details: Json(encode_json(dict(details))) if details else None)
_running: contextvars.ContextVar[Call | None] = contextvars.ContextVar("mxcp_audit", default=None)


def _execution() -> Call | None:
    """Return the call that will write the row of what runs here."""
    call = _running.get()
    return call and (call.outer or call)


def _current_task() -> object:
    try:
        return sys.modules["asyncio"].current_task()
    except (KeyError, RuntimeError):  # no event loop, or another kind
        return None


def _only_frameworks_between(task: Any) -> bool:
    """Return True if the middleware's call reached us without a tool's code."""
    frames, waiting, frame = list[Any](), list[Any](), cast(Any, sys._getframe(1))
    while frame is not None:  # of this thread, from the inside
        frames.append(frame)
        frame = frame.f_back
    step = _get(task, "get_coro") and task.get_coro()
    while step:  # of the task that waits for it, from the outside
        waiting.append(_get(step, "cr_frame", "gi_frame"))
        step = _get(step, "cr_await", "gi_yieldfrom")
    # `*args, **kwargs` mean a decorator, `call_next` a middleware.
    for frame in filter(None, [*frames, *reversed(waiting)]):
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if module == __name__:
            if code is Middleware.__call__.__code__ and frame.f_locals.get("call") is not None:
                return True
        elif (
            not _FRAMEWORKS.match(module)
            and code.co_flags & 0x0C != 0x0C  # CO_VARARGS, CO_VARKEYWORDS
            and "call_next" not in (code.co_name, *code.co_varnames[: code.co_argcount])
        ):
            return False
    return True


def describe_exception(error: BaseException, *, with_type: bool = True) -> str:
    """Return `Type: message`, also of what a group holds or a framework masks."""
    told = ""
    for each in _errors_in(error):
        name, text = type(each).__name__, "(its message can't be shown)"
        with suppress(BaseException):
            text = str(each)
        shown = f"{name}: {text}" if text else name
        if name in ("CancelledError", "Cancelled"):  # asyncio's and trio's
            told = told or "cancelled"
        elif not told:
            told = shown if with_type else text or name
        elif not text or text not in told:
            told += f"; {shown}"
    return told


def type_of_error(error: BaseException) -> str:
    """Return an error's JSON-RPC code, else the class of what it stands for."""
    code = _get(_get(error, "error"), "code")
    for _ in range(_MAX_CAUSES):
        if len(wrapped := _wrapped_by(error)) == 1:
            error = wrapped[0]
    return str(code) if type(code) is int else type(error).__name__


def _wrapped_by(error: BaseException) -> list[BaseException]:
    """Return what a group holds, or what an error of a framework stands for."""
    members = _get(error, "exceptions")
    if not isinstance(members, (tuple, list)):
        members = [error.__cause__] if _MASKING.match(str(type(error).__module__)) else []
    return [each for each in members if isinstance(each, BaseException)]


def _errors_in(error: BaseException, *, with_causes: bool = False) -> Iterator[BaseException]:
    """Yield an error and what it wraps; frameworks wrap what tools raise."""
    errors = [error]
    for each in itertools.islice(errors, _MAX_CAUSES):  # more are appended meanwhile
        yield each
        cause = each.__cause__ or each.__context__
        errors += [cause] if with_causes and cause is not None else []
        errors += _wrapped_by(each)


class Unfinished(dict[Call, tuple[object, float, str]]):
    """Calls that were answered and go on, oldest first, with key, deadline and error."""

    def put(self, key: object, call: Call, error: str, seconds: float = inf) -> None:
        """Keep a call; it fails with `error` if nobody takes it in time."""
        self[call] = key, time.monotonic() + seconds, error
        if len(self) > _MAX_UNFINISHED:
            self.close(most=1)

    def put_answered(self, call: Call, result: object) -> bool:
        """Keep a call if its answer says that it goes on; else return False."""
        kind, meta = _get(result, "result_type", "resultType"), _get(result, "_meta", "meta")
        asked = result if kind == "input_required" else _get(result, "input_required")
        task = result if kind == "task" else _get(result, "task")
        task = _get(task or _get(meta, "modelcontextprotocol.io/task"), "task_id", "taskId")  # FastMCP 2.14
        if asked:
            self.put(call.leg(asked), call, "not resumed: input required", _RESUME_SECONDS)
        elif isinstance(task, str):
            self.put(("task", task), call, "not finished: the task was still running")
        return bool(asked) or isinstance(task, str)

    def take(self, key: object) -> Call | None:
        """Return the oldest call that was kept under this key."""
        kept = self.copy().items()  # other threads put and take, too
        return next((call for call, (its, *_) in kept if its == key and self.pop(call, False)), None)

    def resumed(self, call: Call, message: object) -> Call:
        """Return the call that a message resumes, else `call`."""
        if not self:
            return call
        self.close(time.monotonic())
        goes_on = _get(message, "request_state", "requestState", "input_responses", "inputResponses")
        return call if goes_on is None else self.take(call.leg(message)) or call

    def end_task(self, task: str | None, state: object) -> None:
        """End the call that began a background task, if the task is over."""
        status, answer, failure = _get(state, "status"), _get(state, "result"), _get(state, "error")
        if status in ("completed", "failed", "cancelled") and (call := self.take(("task", task))) is not None:
            if status != "completed":
                told = _get(failure, "message") or _get(state, "status_message", "statusMessage")
                call.fail(_text(told) or str(status), _text(_get(failure, "code")))
            elif answer is not None:
                conclude(call, answer)
            call.end()

    def close(self, now: float = inf, most: int | None = None) -> None:
        """Record the calls that are overdue by now, or all, or the oldest."""
        for call, (_, deadline, error) in list(self.copy().items())[:most]:
            if deadline <= now and self.pop(call, False):  # else another thread was faster
                call.give_up(error)


# --- where a call came from


def _get(owner: Any, name: str, *others: str) -> Any:
    """Return the first key or attribute that isn't None. Never raises."""
    kind: Any = type(owner)
    value = None
    if kind is dict:
        value = owner.get(name)
    elif owner is not None:
        try:
            if not _lacks(kind, name):
                value = getattr(owner, name, None)  # first: Starlette's Request is a mapping too
                if value is None and isinstance(owner, Mapping):
                    value = owner.get(name)
        except Exception:  # noqa: SIM105 - faster
            pass
    return _get(owner, *others) if value is None and others else value


@functools.lru_cache(4096)
def _lacks(kind: Any, name: str) -> bool:
    """Return True for a model of pydantic, slow to say so, that can't have this field."""
    fields, config = getattr(kind, "model_fields", None) or (), getattr(kind, "model_config", None)
    is_closed = fields and isinstance(config, dict) and config.get("extra") != "allow"
    return bool(is_closed) and name not in fields and not hasattr(kind, name)


def _text(value: object) -> str | None:
    """Return a text or number as a text; None if empty or another type."""
    return str(value) if isinstance(value, (str, int, float)) and value != "" else None


def origin_of(context: object, proxies: Sequence[str] = ()) -> dict[str, Any]:
    """Return where a request came from, as attributes of a Call."""
    origin: dict[str, Any] = {"caller": "cli", "trace_id": None, "details": {}}
    try:
        trace = _read_request(context, origin, proxies) if context is not None else None
        current_span = _loaded("opentelemetry.trace", "get_current_span")
        if trace is None and current_span is not None:
            span = current_span().get_span_context()
            trace = span.trace_id and (f"{span.trace_id:032x}", f"{span.span_id:016x}")
        if trace:
            origin["trace_id"], origin["details"]["parent_span_id"] = trace
    except Exception:  # of a framework; the rest is known
        pass
    return origin


def _peer_of(session: Any) -> Any:
    """Return client and protocol version as a session knows them."""
    connection = getattr(session, "_connection", session)  # the SDK 2 makes a session for each request
    if (peer := getattr(connection, "__mxcp_audit__", None)) is None:
        init = _get(session, "client_params")
        version = _text(_get(init, "protocol_version", "protocolVersion"))
        peer = client_of(_get(init, "client_info", "clientInfo")), version
        if peer[0] is not None:
            with suppress(Exception):  # it has no room
                connection.__mxcp_audit__ = peer
    return peer


def _read_request(context: object, origin: dict[str, Any], proxies: Sequence[str]) -> tuple[str, str] | None:
    """Put what a request says into `origin`; return its trace and span."""
    request, details = getattr(context, "request", None), origin["details"]
    meta, client, trace = getattr(context, "meta", None), None, None
    version = getattr(context, "protocol_version", None)
    if meta:  # of newer clients; others say it at `initialize`
        client, trace = client_of(_get(meta, _META + "clientInfo")), parent_of(meta)
        version = _get(meta, _META + "protocolVersion") or version
    if client is None:
        client, known = _peer_of(getattr(context, "session", None))
        version = version or known
    origin.update(client=client, request_id=_text(getattr(context, "request_id", None)))
    if request is None:
        origin.update(caller="stdio", session_id=_CONNECTION)
    else:
        scope = _get(request, "scope")
        headers: dict[str, str] = {}
        for name, value in _get(scope, "headers") or ():  # Starlette's look-up would decode them all
            if (known := _REQUEST_HEADERS.get(name)) is not None:
                text = value.decode("latin-1")
                headers[known] = f"{headers[known]},{text}" if known in headers else text
        version = version or headers.get("mcp-protocol-version")
        trace = trace or parent_of(headers)
        session = headers.get("mcp-session-id")
        if session is None and _get(scope, "query_string") != b"":  # by SSE
            session = _text(_get(_get(request, "query_params"), "session_id"))
        origin.update(caller="http", session_id=session, address=address_of(request, headers, proxies))
        if agent := headers.get("user-agent"):
            details["user_agent.original"] = agent
        if (token := _get(_get(scope, "user"), "access_token")) is not None:
            origin["agent"] = _text(_get(token, "client_id"))
            subject = _text(_get(token, "subject")) or _text(_get(_get(token, "claims"), "sub"))
            origin["user_id"] = subject or origin["agent"]
    if version:
        details["mcp.protocol.version"] = str(version)
    return trace


def client_of(client: object) -> str | None:
    """Return a client's name and version: "claude-ai/1.2"."""
    name, version = _text(_get(client, "name")), _text(_get(client, "version"))
    return f"{name}/{version}" if name and version else name or version


def server_of(result: object) -> str | None:
    """Return the server's name in an answer: of `initialize`, or newer ones."""
    info = _get(result, "server_info", "serverInfo")
    return _text(_get(info or _get(_get(result, "_meta", "meta"), _META + "serverInfo"), "name"))


def address_of(request: object, headers: Mapping[str, str], proxies: Sequence[str]) -> str | None:
    """Return the peer's address, or the one that trusted proxies forward for."""
    peer = _get(request, "client")
    host, said = _get(peer, "host"), headers.get("x-forwarded-for")
    if said and _get(peer, "port") == 0:
        host = "127.0.0.1"  # uvicorn believed this peer
    if proxies and host:
        import ipaddress  # lazily: few have proxies

        trusted = [ipaddress.ip_network(each, strict=False) for each in proxies]
        place = r"(?:^|,)\s*\[?([^\],\s]+)" if said else r'(?i)\bfor="?\[?([^\];,"\s]+)'
        with suppress(ValueError):  # what is no address is nobody's proxy
            for hop in reversed(re.findall(place, said or headers.get("forwarded", ""))):
                if not any(ipaddress.ip_address(host) in network for network in trusted):
                    break
                host = re.sub(r"^([^:]+):\d+$", r"\1", hop)
    return _text(host)


def parent_of(carrier: object) -> tuple[str, str] | None:
    """Return trace and parent span of a W3C `traceparent`."""
    parent = _get(carrier, "traceparent")
    match = _PARENT.fullmatch(parent) if isinstance(parent, str) else None
    return (match[1], match[2]) if match else None


def _watch_spans() -> None:
    """Have OpenTelemetry give the running call the trace that begins in it."""

    def on_start(self: object, span: Any, parent_context: object = None) -> None:
        call = _execution()
        if call is not None and call.trace_id is None:
            call.trace_id = f"{span.get_span_context().trace_id:032x}"

    with suppress(Exception):  # of another provider than the SDK's
        provider = sys.modules["opentelemetry.trace"].get_tracer_provider()
        if not hasattr(provider, "__mxcp_audit__"):
            kind = sys.modules["opentelemetry.sdk.trace"].SpanProcessor
            provider.add_span_processor(type("Spans", (kind,), {"on_start": on_start})())
            provider.__mxcp_audit__ = True


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _context_in(module: str, variable: str) -> Any:
    held = _loaded(module, variable)
    return held.get(None) if isinstance(held, contextvars.ContextVar) else None


def conclude(call: Call, result: object, exchange: Exchange | None = None) -> None:
    """Tell a call its result; an answer in an exchange may make it wait."""
    try:
        if not _is_plain(type(result)):
            result = _get(result, "root") or result  # the SDK 1 wraps it
            if exchange is not None:
                call.waits = call._logger.unfinished.put_answered(call, result)
                call.server = exchange.server = call.server or exchange.server or server_of(result)
        if exchange is None or not call.waits:
            _summarize(call, result)
    except Exception as fault:  # the answer passes
        call._logger.report_fault("a result could not be summarized", fault)


def _summarize(call: Call, result: object) -> None:
    items = _get(result, "content", "contents", "messages")
    if _get(result, "is_error", "isError") is True and call.status != "error":
        parts = items if isinstance(items, (list, tuple)) else ()
        texts = [_get(part, "text") or _get(_get(part, "resource"), "text") for part in parts]
        text = "\n".join(text for text in texts if isinstance(text, str))
        if not text and (structured := _get(result, "structured_content", "structuredContent")):
            text = _sent(structured).decode("utf-8", "replace")
        call.fail(text or "the result is marked as an error", "tool_error")
    config = call._logger.config
    if items is None:  # the contents of a resource
        items, result = result, {"contents": result}
    if config.record_result == "none" or not isinstance(items, (list, tuple)):
        return
    # FastMCP's classes become the protocol's later.
    if type(result).__module__.startswith("fastmcp") and _get(result, "content") is not None:
        structured = _get(result, "structured_content")
        more = {"structuredContent": structured} if structured is not None else {}
        result = {"content": items, **more, "isError": _get(result, "is_error") is True}
    elif (convert := _get(result, "to_mcp_prompt_result")) is not None:
        result = convert()
    elif (convert := _get(result, "to_mcp_result")) is not None:
        result = convert(call.name)
    sent = _sent(result)
    call.result_bytes = len(sent)
    call.details["mcp.result.items"] = len(items)
    call.details["mcp.result.kinds"] = tuple(sorted({_kind_of(item) for item in items}))
    if config.record_result == "body":
        body, most = json.loads(sent), config.max_result_bytes
        call.context["mcp.result.body"] = body if len(sent) <= most else clip_plain(body, most)


_TELLING = ("result_type", "input_required", "task", "root", "_meta")
_is_plain: Callable[[type], bool] = functools.lru_cache(1024)(  # for a type whose objects only end a call
    lambda kind: all(_lacks(kind, name) for name in _TELLING)
)


def _sent(result: object) -> bytes:
    """Return a result as JSON, as a server sends it."""
    core: Any = sys.modules.get("pydantic_core")  # with every framework, but not in `wrap`
    if core is None:
        return encode_json(result).encode("utf-8", "surrogatepass")
    return bytes(core.to_json(result, by_alias=True, exclude_none=True, bytes_mode="base64", fallback=vars))


def _kind_of(item: object) -> str:
    if (kind := _get(item, "type")) is None:
        inner = _get(item, "content", "resource")
        is_blob = _get(item, "blob") is not None or isinstance(inner, bytes)
        kind = _get(inner, "type") or ("blob" if is_blob else "text")
    return str(kind)


# --- middleware


class Exchange:
    """What the middleware, the decorators and the stdio wrapper do alike."""

    def __init__(self, logger: Any, caller: str | None = None, denied_by: DeniedBy = ()) -> None:
        try:
            isinstance(None, denied_by)
        except TypeError as error:
            raise EventError("must be an exception class, or a tuple of them", field="denied_by") from error
        refusal = _loaded("fastmcp.exceptions", "AuthorizationError") or ()
        self.logger, self.caller, self.denied_by = logger, caller, cast(DeniedBy, (denied_by, refusal))
        self.server: str | None = None

    def call_of(self, event_type: str, context: object, message: object, server: object = None) -> Call:
        """Return the call that a message makes, or resumes."""
        arguments, named = _get(message, "arguments"), "uri" if event_type == "resource" else "name"
        origin = origin_of(context, self.logger.config.trusted_proxies)
        origin.update(arguments=arguments, denied_by=self.denied_by, caller=self.caller or origin["caller"])
        origin["server"] = _text(_get(server, "name")) or self.server
        call = Call(self.logger, event_type, str(_get(message, named) or ""), arguments, **origin)
        return cast(Call, self.logger.unfinished.resumed(call, message))

    def call_within(self, event_type: str, message: object = None) -> Call | None:
        """Return a call that is part of the middleware's, if the caller, or a message, belongs to that."""
        # It does in the same task without a tool's code between, or as the tool that a meta tool names.
        outer = _execution()
        if outer is None or outer.task is None or outer.ended or _current_task() not in (None, outer.task):
            return None
        if (outer.event_type, outer._logger.config.path) != (event_type, self.logger.config.path):
            return None
        given = outer.arguments if isinstance(outer.arguments, dict) else {}
        name = _text(_get(message, "name"))
        if name and "mcp.via" not in outer.details and name in (g for g in given.values() if type(g) is str):
            outer.details["mcp.via"], outer.name = outer.name, name
            outer.take_input(_get(message, "arguments"))
        elif not _only_frameworks_between(outer.task):
            return None
        return Call(self.logger, event_type, outer.name, denied_by=self.denied_by, outer=outer)

    def see(self, method: str, message: object, result: object, failure: object = None) -> None:
        """Take the server's name, or the state of a task, from another answer."""
        self.server = server_of(result) or self.server
        if method.startswith("tasks/"):
            state = _get(result, "root") or result
            if method == "tasks/result":
                state = {"status": "failed" if failure else "completed", "result": state, "error": failure}
            self.logger.unfinished.end_task(_text(_get(message, "task_id", "taskId")), state)


class Middleware(Exchange):
    """A middleware `(context, call_next)` that records tool calls, resource reads and prompts."""

    _inside = 0  # how many calls it is in

    async def __call__(self, context: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        method = str(getattr(context, "method", ""))
        event_type = MCP_METHODS.get(method)
        message, inside = _get(context, "message", "params"), getattr(context, "fastmcp_context", None)
        server = _get(inside, "fastmcp")
        if (docket := getattr(server, "_docket", None)) is not None:
            self._watch_tasks(docket)
        is_note = getattr(context, "request_id", "") is None
        if event_type is None or is_note or not self.logger.enabled:
            result = await call_next(context)
            self.see(method, message, result)
            return result
        call = _running.get() and self.call_within(event_type, message)
        if call is None:  # else it is recorded further out
            origin = context if inside is None else _get(inside, "request_context")
            call = self.call_of(event_type, origin, message, server)
            if call.trace_id is None and "opentelemetry.sdk.trace" in sys.modules:
                _watch_spans()
        call.task = _current_task() or call
        self._inside += 1
        failure: BaseException | None = None
        try:
            async with call:
                try:
                    result = await call_next(context)
                except BaseException as error:
                    failure = error
                    await self._ask_for_refusal(call, server, error)
                    raise
                if call.outer is None:
                    conclude(call, result, self)
                return result
        except AuditUnavailableError as error:
            kind = _loaded("mcp.shared.exceptions", "MCPError")
            if kind is None or error is failure:  # of another call, which the body made
                raise
            # The SDK 2 tells a client this; of any other error it hides the text.
            raise kind(code=-32000, message=str(error)) from error
        finally:
            self._inside -= 1

    async def check_resource_access(self, context: object) -> None:
        """Allow: FastMCP 4 asks each middleware."""

    async def _ask_for_refusal(self, call: Call, server: object, error: BaseException) -> None:
        """Record a denial, also where FastMCP says "unknown" instead."""
        transport = _loaded("fastmcp.server.context", "_current_transport")
        if server is None or type(error).__name__ != "NotFoundError" or transport is None:
            return
        kind = call.event_type
        before = transport.set("stdio")  # over which FastMCP asks no `auth=`
        try:
            with suppress(Exception):  # it is as unknown as it was
                for find in (f"get_{kind}", "get_resource_template")[: 1 + (kind == "resource")]:
                    if _get(await getattr(server, find)(call.name), "auth") is not None:
                        call.policy("deny", f"the {kind}'s auth refuses the caller")
        finally:
            transport.reset(before)

    def _watch_tasks(self, docket: Any) -> None:
        """Wrap what a FastMCP server runs in the background."""
        functions = _get(docket, "tasks")
        path, watching = self.logger.config.path, getattr(docket, "__mxcp_audit__", ())
        if type(functions) is dict and path not in watching:
            with suppress(AttributeError):
                docket.__mxcp_audit__ = (*watching, path)
                for key, function in functions.items():
                    run = functools.partial(self._run_task, str(key), function)
                    functions[key] = functools.wraps(function)(run)

    async def _run_task(self, key: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record a background task, in the row of the call that began it if known."""
        task = str(_get(_context_in("docket.dependencies", "current_execution"), "key") or key)
        event_type = next((t for t in EVENT_TYPES if f":{t}:" in task), "tool")
        name = key.removeprefix(f"{event_type}:")
        call = Call(self.logger, event_type, name.rpartition("@")[0] or name, _binder(function)(args, kwargs))
        call.denied_by, call.task = self.denied_by, _current_task()
        take = self.logger.unfinished.take
        async with call:
            try:
                result = function(*args, **kwargs)
                result = await result if isinstance(result, Awaitable) else result
            finally:
                for _ in range(100):  # the task may be over before the answer is that it began
                    call.outer = next(filter(None, (take(("task", part)) for part in task.split(":"))), None)
                    if call.outer is not None or not self._inside:
                        break
                    await sys.modules["asyncio"].sleep(0.005)
            conclude(call.outer or call, result)
            return result


class _AuditedHandlers(dict[Any, Any]):
    """The handlers of an SDK 1 server by type of request, audited."""

    def __init__(self, middleware: Middleware, handlers: Mapping[Any, Any]) -> None:
        self._middleware = middleware
        for kind, handler in handlers.items():
            self[kind] = handler

    def __setitem__(self, kind: Any, handler: Any) -> None:
        method = str(kind.model_fields["method"].default)

        async def _audited(request: Any) -> Any:
            context = _context_in("mcp.server.lowlevel.server", "request_ctx")
            known = {**getattr(context, "__dict__", {}), "method": method, "params": _get(request, "params")}
            return await self._middleware(types.SimpleNamespace(**known), lambda _: handler(request))

        super().__setitem__(kind, _audited if method in MCP_METHODS or method[:6] == "tasks/" else handler)


# --- decorators


def auditing(exchange: Exchange, event_type: str, name: str | None) -> Callable[[Function], Function]:
    """Return a decorator that records and keeps signature, name and kind."""
    if name is not None and not isinstance(name, str):  # Python hands over what stands below the `@`
        example = '("reports/{id}")' if event_type == "resource" else "()"
        raise EventError(f"write @audit.{event_type}{example}, with the parentheses", field="name")

    def _audited(function: Function) -> Function:
        if isinstance(function, (classmethod, staticmethod)):
            return cast(Function, type(function)(_audited(function.__func__)))
        if not callable(function) or _is_registered(function):
            named = _get(function, "__name__", "name") or type(function).__name__
            problem = f"the server has {named!r} already, without auditing, or it can't be called"
            raise EventError(
                f"{problem}; write @audit.{event_type}(…) below that decorator", field="function"
            )
        if getattr(function, "__mxcp_audit__", ()) == (exchange.logger, getattr(function, "__wrapped__", 0)):
            function = cast(Any, function).__wrapped__  # decorated twice: one row
        bare = function.func if isinstance(function, functools.partial) else function
        own = getattr(bare, "__name__", None) or type(bare).__name__
        title, input_of = name or own, _binder(function)

        def _start(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            if (call := exchange.call_within(event_type)) is not None:
                if event_type == "resource" and call.outer and call.outer.arguments is None:
                    call.outer.name = title  # it knows the URI, and we what that stands for
                    call.outer.take_input(input_of(args, kwargs))
                return call
            if (around := _execution()) is not None:
                origin = {each: getattr(around, each) for each in _ORIGIN}
            else:
                request = _context_in("fastmcp.server.dependencies", "fastmcp_request_ctx")
                request = request or _context_in("mcp.server.lowlevel.server", "request_ctx")
                origin = origin_of(request, exchange.logger.config.trusted_proxies)
            origin.update(caller=exchange.caller or origin["caller"], denied_by=exchange.denied_by)
            return Call(exchange.logger, event_type, title, input_of(args, kwargs), **origin)

        import inspect  # lazily: it costs 5 ms

        # Frameworks ask `inspect` for the kind.
        bodies = function, bare if inspect.isroutine(bare) else type(bare).__call__
        kinds = (kind for kind, test in zip(_KINDS, _TESTS) if any(map(getattr(inspect, test), bodies)))
        wrapper: Any = functools.wraps(function)(_recorded(next(kinds, None), function, _start))
        if not hasattr(function, "__name__"):  # a partial or an object
            wrapper.__name__ = wrapper.__qualname__ = own
            wrapper.__annotations__ = {}
            with suppress(Exception):
                wrapper.__annotations__ = inspect.get_annotations(bodies[1], eval_str=True)
        wrapper.__mxcp_audit__ = exchange.logger, function
        return cast(Function, wrapper)

    return _audited


def _is_registered(function: object) -> bool:
    """Return True for a function that a server holds already."""
    if not {"mcp", "fastmcp"}.intersection(sys.modules) or sys.getrefcount(function) <= _UNHELD:
        return False  # nobody holds what is new; the collector takes 10 ms
    import gc

    owners = (getattr(each, "__dict__", each) for each in gc.get_referrers(function))
    held = (each for each in owners if type(each) is dict and each.get("fn") is function)
    return any(each.keys() & {"name", "uri", "uri_template"} for each in held)


_UNHELD = (lambda function: (lambda each: sys.getrefcount(each))(function))(lambda: None)
_KINDS: tuple[object, ...] = types.AsyncGeneratorType, types.GeneratorType, types.CoroutineType
_TESTS = "isasyncgenfunction", "isgeneratorfunction", "iscoroutinefunction"  # of `inspect`, for these


def _recorded(kind: object, function: Callable[..., Any], start: Callable[..., Call]) -> Callable[..., Any]:
    """Return a recorded function that makes what `kind` says, if anything."""

    def _plain(*args: Any, **kwargs: Any) -> Any:
        with start(args, kwargs) as call:
            return _followed(call, function(*args, **kwargs))

    async def _coroutine(*args: Any, **kwargs: Any) -> Any:
        async with start(args, kwargs):
            return await function(*args, **kwargs)

    # The steps of a generator are part of the call; other code runs between.
    def _generator(*args: Any, **kwargs: Any) -> Any:
        with start(args, kwargs) as call:
            generator = function(*args, **kwargs)
            step, value = generator.send, None
            while True:
                try:
                    item = step(value)
                except StopIteration as end:
                    return end.value
                call._leave()
                try:
                    step, value = generator.send, (yield item)
                except BaseException as error:
                    step, value = generator.throw, error
                finally:
                    call._before = _running.set(call)

    async def _async_generator(*args: Any, **kwargs: Any) -> Any:
        async with start(args, kwargs) as call, contextlib.aclosing(function(*args, **kwargs)) as generator:
            step, value = generator.asend, None
            while True:
                try:
                    item = await step(value)
                except StopAsyncIteration:
                    return
                call._leave()
                try:
                    step, value = generator.asend, (yield item)
                except GeneratorExit:  # of aclose
                    raise
                except BaseException as error:
                    step, value = generator.athrow, error
                finally:
                    call._before = _running.set(call)

    return dict(zip(_KINDS, (_async_generator, _generator, _coroutine))).get(kind, _plain)


def _followed(call: Call, result: Any) -> Any:
    """Return a function's result; what goes on later ends the call then."""
    kind: Any = type(result)
    if callable(getattr(kind, "add_done_callback", None)):

        def _done(future: Any) -> None:
            try:
                error = future.exception()
            except BaseException as cancelled:
                error = cancelled
            call.end(error)

        call.waits = True
        result.add_done_callback(_done)
        return result
    is_awaitable = isinstance(result, Awaitable)
    if kind not in _KINDS:
        if not is_awaitable or hasattr(kind, "__aenter__"):
            return result
        kind = types.CoroutineType
    followed = _recorded(kind, lambda: result, lambda *_: call)()
    call.waits = True
    weakref.finalize(followed, call.give_up, "never awaited" if is_awaitable else "never iterated")
    return followed


def _binder(function: Callable[..., Any]) -> Callable[..., object]:
    """Return what names a call's arguments, without instance and context."""
    import inspect

    signature = None
    for eval_str in (False, True):  # True fails on some annotations
        with suppress(Exception):
            signature = inspect.signature(function, eval_str=eval_str)
    if signature is None:  # some functions in C have none
        return lambda args, kwargs: {"args": args, "kwargs": kwargs}
    parameters, first = signature.parameters.values(), next(iter(signature.parameters), None)
    in_class = re.search(r"\w\.[^.]+$", getattr(function, "__qualname__", ""))
    bound = first if in_class and first in ("self", "cls") else None
    rest = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), "")
    marks = {each.name: (each.default, *getattr(each.annotation, "__metadata__", ())) for each in parameters}
    left_out = {bound, *(name for name in marks if any(map(_is_injected, marks[name])))}

    def _given(given: dict[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in given.items() if name not in left_out and not _is_injected(each)}

    def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function will say so itself
            return {"args": args[bound is not None :], "kwargs": _given(kwargs)}
        more = given.pop(rest, {})
        return _given({**given, **more})

    return _input_of


def _is_injected(value: object) -> bool:
    """Return True for an object of a framework that isn't the protocol's data."""
    return any(_INJECTING.match(str(kind.__module__)) for kind in type(value).__mro__)


# === Logger ===
# depends on: Errors, Config, Redaction, Encoding, Journal, Writer, Calls
#
# The thread starts at the first event, so that a new logger disturbs no fork. Signal handlers are the
# application's.


class Counters(NamedTuple):
    """How a logger is doing, for health checks, since the start of this process."""

    accepted: int  # taken by log_event
    written: int  # of these, in the journal
    ingested: int  # moved into the database by this process, others' included
    dropped: int  # lost: the queue was full (on_full: drop)
    rejected: int  # journal lines kept aside: they could not be ingested
    errors: int  # faults of any kind
    last_error: str | None
    refused: int = 0  # strict calls that could not be put on record


_UNENCODABLE = "[UNENCODABLE]"
_UNENCODABLE_JSON = encode_text(encode_text(_UNENCODABLE))
_NOTHING = ("", "", "", _UNENCODABLE_JSON, 0, "n/a", None, "error", _UNENCODABLE, None, None, None, ())
_AnyPath: TypeAlias = str | os.PathLike[str]


class AuditLogger(contextlib.AbstractContextManager["AuditLogger"]):
    """Records events: each is a line in the journal within milliseconds, and a row in DuckDB soon after.

    `log_event` never raises and, unless `durable` is set or the queue is full, never waits. Threads, signal
    and exit handlers may call it. Raises ConfigError for a wrong argument.

    Args:
        path, attach: the database file, or a DuckDB ATTACH target and its options.
        enabled, durable: False makes every call return at once; True makes `log_event` wait for the disk.
        log_path: MXCP's name for `path`; `x.jsonl` stands for `x.duckdb` beside it.
        journal, group: its directory, by default `<path>.journal`; True shares the log with a group (0660).
        flush_interval: seconds after which events leave the journal for the database.
        on_full: when 64 MiB wait in memory: "block" the caller or "drop" the event.
        max_input_bytes, max_result_bytes: a longer input, or body of a result, is cut, visibly.
        redact, keep: names, or `tool.parameter`, that are always or never redacted.
        redact_mode: "constant", or "hmac" to tell equal secrets apart from different ones.
        retention: delete events older than this, such as "90d".
        record_result: "none", "summary" (bytes, items, kinds of a result), "body" (redacted, too).
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-For or Forwarded counts.
        strict: True, or names with `*`: such a call runs once its begin is in the journal, and is answered
            once its end is; after `strict_timeout` seconds (or "5s") it is an AuditUnavailableError.
    """

    _ingest: ClassVar[Callable[..., Mapping[str, Any]] | None] = None  # set by Assembly
    # Of this process; a reload leaves the older loggers theirs.
    _known: ClassVar[weakref.WeakValueDictionary[int, AuditLogger]] = weakref.WeakValueDictionary()
    _started: ClassVar[set[AuditLogger]] = set()  # held until shut down, for the exit hook
    _exiting: ClassVar[bool] = False

    def __init__(
        self,
        path: _AnyPath | None = None,
        enabled: bool = True,
        *,
        log_path: _AnyPath | None = None,
        journal: _AnyPath | None = None,
        flush_interval: float | str = 1.0,
        durable: bool = False,
        on_full: str = "block",
        max_input_bytes: int = 2**20,
        redact: Sequence[str] = (),
        keep: Sequence[str] = (),
        redact_mode: str = "constant",
        retention: float | str | None = None,
        record_result: str = "summary",
        max_result_bytes: int = 2**14,
        trusted_proxies: Sequence[str] = (),
        strict: bool | Sequence[str] = False,
        strict_timeout: float | str = 5.0,
        group: bool = False,
        attach: Mapping[str, object] | None = None,
    ) -> None:
        settings = {**locals()}  # the arguments by name, as in the configuration
        del settings["self"], settings["log_path"]
        if path is None:
            if log_path is None:
                raise ConfigError("name the database file, such as logs-default.duckdb", trail=("path",))
            settings["path"] = re.sub(r"\.jsonl$", ".duckdb", os.fspath(log_path))
        self.__setstate__(config_from_arguments(**settings))

    @classmethod
    def from_config(cls, config: _AnyPath | None = None, *, profile: str | None = None) -> AuditLogger:
        """Return the logger that `mxcp-site.yml` describes, disabled if the profile doesn't enable it.

        By default `config` is searched upwards, `profile` is MXCP_PROFILE or the file's. Raises ConfigError.
        """
        self = cls.__new__(cls)
        self.__setstate__(load_config(config=config, profile=profile))
        return self

    def __getstate__(self) -> Config:
        return self.config  # what travels to another process, or into a copy

    def __setstate__(self, config: Config) -> None:
        self.config, self.enabled = config, config.enabled
        self._diagnostics = told = Diagnostics()
        self._encoder = Encoder(redactor_of(config), max_input_bytes=config.max_input_bytes)
        journal = Journal(config.journal_directory, group=config.group)
        appender = Appender(journal, durable=config.durable, diagnostics=told, encode_begin=self._begin_line)
        given = {**config._asdict(), "attach": dict(config.attach), "sources": {}} if self._ingest else None
        self._ingester = ingester = Ingester(appender, given, interval=config.flush_interval)
        drops, at_once, start = config.on_full == "drop", bool(config.strict), self._activate
        self._writer = Writer(appender, ingester, drop_when_full=drops, on_start=start, at_once=at_once)
        strict = "|".join(re.escape(name).replace(r"\*", ".*") for name in config.strict)
        self._strict = re.compile(strict, re.DOTALL).fullmatch  # asked only if there are some
        self.refused, self.unfinished = 0, Unfinished()
        self._known[id(self)] = self

    def log_event(
        self,
        caller: str,
        event_type: str,
        name: str,
        input_params: object = None,
        duration_ms: float = 0,
        policy_decision: str = "n/a",
        reason: str | None = None,
        status: str = "success",
        error: str | None = None,
        endpoint_def: object = None,
        user_id: str | None = None,
        session_id: str | None = None,
        trace_id: str | None = None,
        *,
        client: str | None = None,
        agent: str | None = None,
        address: str | None = None,
        server: str | None = None,
        request_id: str | None = None,
        error_type: str | None = None,
        result_bytes: int | None = None,
        context: Mapping[str, object] | None = None,
    ) -> None:
        """Record one event; the first ten arguments are those of MXCP's own logger.

        Never raises, but lets Ctrl+C and a signal handler's `sys.exit` pass, once the event is recorded.

        Args:
            caller, event_type, name: cli, http or stdio; tool, resource or prompt, and its name or URI.
            input_params, duration_ms: redacted and encoded before this returns; 0 … 2³¹−1.
            policy_decision, reason: allow, deny, warn or n/a, and why.
            status, error: success or error, and its message.
            endpoint_def: MXCP's definition of the endpoint: parameters marked `sensitive: true` are redacted.
            user_id, session_id, trace_id: who, in which session and trace; None where unknown.
            client, agent, address: the program ("claude-ai/1.2"), its OAuth client, where from.
            server, request_id, context: its name; the protocol's id; anything else by name, redacted.
            error_type, result_bytes: exception class or JSON-RPC code; size of the result, 0 … 2⁶³−1.
        """
        if not self.enabled:
            return
        echoes: list[str] | None = None if error is None and reason is None else []
        interrupt: object = None
        try:
            input_json = self._encoder.input_json(input_params, name, endpoint_def, echoes)
        except BaseException as fault:
            interrupt, (input_json, echoes) = fault, self.take_input(input_params, name, endpoint_def)
        ticket = self._record(
            *(caller, event_type, name, input_json, duration_ms, policy_decision, reason, status, error),
            *(user_id, session_id, trace_id, echoes or ()),
            (client, agent, address, server, request_id, error_type, result_bytes, context),
        )
        if isinstance(interrupt, INTERRUPTS):
            raise interrupt
        if self.config.durable:
            self._writer.wait_written(ticket)

    def _record(self, *event: Any, end: bytes = b"", signal: BaseException | None = None) -> int:
        """Queue an event, if need be without its content; return its ticket."""
        line, ticket = b"", 0
        try:
            line = self._encoder.line(*event)
        except BaseException as fault:
            if isinstance(fault, INTERRUPTS) and signal is None:  # it passes, after the event is recorded
                return self._record(*event, end=end, signal=fault)
            signal = None  # a field raises that each time
            self.report_fault("an event could not be encoded; it is recorded without content", fault)
        try:
            ticket = self._writer.put((line or self._encoder.line(*_NOTHING)) + end)
        except Exception as fault:
            self.report_fault("an event could not be recorded", fault)
        if signal is not None:
            raise signal
        return ticket

    def report_fault(self, message: str, fault: BaseException) -> str:
        """Report a fault by its type; return what is recorded instead."""
        self._diagnostics.report("encode", f"{message} ({type(fault).__name__})")
        return _UNENCODABLE_JSON

    def take_input(self, input_params: object, name: object, endpoint_def: object) -> tuple[str, list[str]]:
        """Return a call's encoded input, and what was redacted in it."""
        echoes: list[str] = []
        if not self.enabled:
            return "null", echoes
        try:
            return self._encoder.input_json(input_params, name, endpoint_def, echoes), echoes
        except Exception as fault:
            return self.report_fault("an input could not be encoded", fault), echoes

    def _begin_line(self, call: Call, ref: str) -> bytes:
        """Return a call as the event that it is, should nothing follow."""
        event = call.event()
        begun = (*event[:4], 0, "n/a", None, "error", UNFINISHED, *event[9:12], (), event[13])
        ago = int((time.perf_counter() - call.started) * 1e9)
        return b'%b,"call":"%b"}\n' % (self._encoder.line(*begun, ago=ago), ref.encode())

    def wait(self, call: Call, done: Done | None, error: object = None, *, late: bool = False) -> None:
        """Wait for a call's begin or line; AuditUnavailableError if late, unless the call failed."""
        if done is None or done():
            return
        seconds = self.config.strict_timeout
        is_done = not late and self._writer.wait_for(done, seconds if call.strict else None)
        if is_done or error is not None:
            return
        self.refused += 1
        fate = "executed, and its answer is withheld" if call.ended else "not executed"
        what = f"{call.event_type} {call.name} can't be put on record within {seconds:g} s; it was {fate}"
        refusal = AuditUnavailableError(what)
        self._diagnostics.report("strict", what)
        call._end(refusal)
        raise refusal

    async def wait_async(self, call: Call, done: Done, error: object = None) -> None:
        """Do the same while the event loop goes on."""
        running_loop = _loaded("asyncio", "_get_running_loop")
        loop = running_loop and running_loop()
        if loop is not None and not done():  # None: another kind of event loop
            over = sys.modules["asyncio"].Event()
            with contextlib.ExitStack() as stack:
                stack.callback(self._writer.call_when(done, lambda: loop.call_soon_threadsafe(over.set)))
                if call.strict:
                    stack.callback(loop.call_later(self.config.strict_timeout, over.set).cancel)
                await over.wait()
        self.wait(call, done, error, late=loop is not None)

    def record(
        self,
        event_type: str,
        name: str,
        input_params: object = None,
        *,
        caller: str = "cli",
        endpoint_def: object = None,
        user_id: str | None = None,
        session_id: str | None = None,
        trace_id: str | None = None,
        client: str | None = None,
        agent: str | None = None,
        address: str | None = None,
        server: str | None = None,
        request_id: str | None = None,
        context: Mapping[str, object] | None = None,
        denied_by: DeniedBy = (),
    ) -> Call:
        """Return a context manager, also for `async with`, that times its body and records how it ended.

        Arguments are those of `log_event`; exceptions of `denied_by` mean the decision `deny`.
        """
        given = {**locals()}  # the arguments by name, as of a Call
        return Call(given.pop("self"), **given)

    def policy(self, decision: str, reason: str | None = None) -> None:
        """Record what a policy decided about the call that runs here: allow, deny or warn, and why."""
        if (call := _running.get()) is not None:
            call.policy(decision, reason)
        else:
            self._diagnostics.report("policy", "a policy decision outside of any call is not recorded")

    def middleware(self, *, caller: str | None = None, denied_by: DeniedBy = PermissionError) -> Middleware:
        """Return a middleware that records every tool call, resource read and prompt, refusals included.

        `server.add_middleware(audit.middleware())` of FastMCP 2 to 4, `server.middleware.append(…)` of SDK 2.
        Exceptions of `denied_by`, also as a cause, mean `deny`; EventError for others. `caller`: as it came.
        """
        return Middleware(self, caller, denied_by)

    def instrument(
        self, server: object, *, caller: str | None = None, denied_by: DeniedBy = PermissionError
    ) -> None:
        """Record what a server of FastMCP or of the `mcp` SDK executes. Raises AuditError for another."""
        middleware = self.middleware(caller=caller, denied_by=denied_by)
        middleware.server = _text(_get(server, "name"))
        chain = getattr(server, "middleware", None)
        inner: Any = getattr(server, "_mcp_server", server)  # the SDK 1 is below FastMCP 2 and 3, too
        add = getattr(server, "add_middleware", chain.append if isinstance(chain, list) else None)
        if add is not None:
            add(middleware)
        if isinstance(getattr(inner, "request_handlers", None), dict):
            inner.request_handlers = _AuditedHandlers(middleware, inner.request_handlers)
        elif add is None:
            remedy = "decorate the tools with @audit.tool(), or run the server under `mxcp-audit wrap`"
            raise AuditError(f"{type(server).__name__} has neither middleware nor request_handlers; {remedy}")

    def tool(
        self, name: str | None = None, *, caller: str | None = None, denied_by: DeniedBy = PermissionError
    ) -> Callable[[Function], Function]:
        """Record each execution of a function as a tool: `@audit.tool()`; EventError without parentheses.

        `name` is by default the function's, `caller` that of the request it runs in, or `cli`.
        """
        return auditing(Exchange(self, caller, denied_by), "tool", name)

    def resource(
        self, uri: str, *, caller: str | None = None, denied_by: DeniedBy = PermissionError
    ) -> Callable[[Function], Function]:
        """Record each execution of a function as a resource: `@audit.resource("reports/{report_id}")`."""
        return auditing(Exchange(self, caller, denied_by), "resource", uri)

    def prompt(
        self, name: str | None = None, *, caller: str | None = None, denied_by: DeniedBy = PermissionError
    ) -> Callable[[Function], Function]:
        """Record each execution of a function as a prompt: `@audit.prompt()`."""
        return auditing(Exchange(self, caller, denied_by), "prompt", name)

    @property
    def counters(self) -> Counters:
        """How the logger is doing: a snapshot for health checks."""
        writer, told = self._writer, self._diagnostics
        return Counters(
            *(writer.accepted, writer.written, told.ingested, told.dropped),
            *(told.rejected, told.errors, told.last_error, self.refused),
        )

    def flush(self, timeout: float = 10.0) -> bool:
        """Return True once every event logged before is in the journal, where `kill -9` can't reach it.

        Then it waits for one attempt to ingest them; see `counters`. False after `timeout` seconds.
        """
        return not self.enabled or self._writer.flush(timeout)

    def wait_written(self, timeout: float = 10.0) -> bool:
        """Return True once every event logged before is in the journal, without an ingest."""
        return not self.enabled or self._writer.wait_written(self._writer.accepted, timeout)

    def shutdown(self, timeout: float = 10.0) -> bool:
        """Write what is queued, ingest, end the thread, all within `timeout` seconds. Harmless to repeat.

        Called at exit. If the database is held, the journal keeps the events for the next start; it takes
        later ones directly. False if some can't be written there; `logging` says how many.
        """
        deadline = time.monotonic() + timeout
        self.unfinished.close()
        left = self._writer.close(timeout)
        try:
            if (ingest := self._ingest) is not None:
                self._ingester.finish(ingest, deadline)
        finally:
            self._ingester.end_child()
        self._started.discard(self)
        if left:
            self._diagnostics.note("left", f"{counted(left, 'event')} could not be written to the journal")
        self._diagnostics.tell()
        return not left

    close = shutdown

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _activate(self) -> bool:
        """Be found by the exit hooks; return False while the program ends."""
        if self._exiting or self in self._started:  # an earlier thread ended, or could not be started
            return not self._exiting
        self._started.add(self)
        place = f"{public_target(self.config.path)}, by way of {self.config.journal_directory}"
        self._diagnostics.note("start", f"events go to {place}", level=INFO)
        finalize = _loaded("multiprocessing.util", "Finalize")
        if finalize and sys.modules["multiprocessing.process"].parent_process() is not None:
            finalize(None, self.shutdown, exitpriority=-100)  # they leave by os._exit, without atexit
        return True

    @classmethod
    def _at_exit(cls) -> None:
        try:
            for logger in list(cls._started):
                try:
                    logger.shutdown()
                except Exception as error:  # the others have events, too
                    logger._diagnostics.report("exit", "a logger could not be shut down", error=error)
        except KeyboardInterrupt:  # a second Ctrl+C
            for logger in list(cls._started):
                if left := logger._writer.pending:
                    text = f"interrupted at exit; {counted(left, 'event')} were not written"
                    logger._diagnostics.report("exit", text)
                logger._ingester.end_child()
        finally:
            cls._exiting = True

    @classmethod
    def _at_fork(cls, step: str) -> None:
        """Have each writer take a step; a child has nothing queued or running."""
        loggers = [reference() for reference in cls._known.valuerefs()]  # other threads may make more
        for logger in filter(None, loggers):
            if step == "start_afresh":
                cls._started.discard(logger)
                logger.refused, logger.unfinished = 0, Unfinished()
                logger._diagnostics.start_afresh()
            getattr(logger._writer, step)()


def redactor_of(config: Config) -> Redactor:
    """Return the redactor that a configuration describes."""
    key = os.fsencode(os.environ.get("MXCP_AUDIT_KEY", "")) or None
    return Redactor(config.redact, config.keep, mode=config.redact_mode, key=key)


atexit.register(AuditLogger._at_exit)
if hasattr(os, "register_at_fork"):
    _steps = "before_fork", "after_fork_in_parent", "start_afresh"
    _before, _parent, _child = (functools.partial(AuditLogger._at_fork, step) for step in _steps)
    os.register_at_fork(before=_before, after_in_parent=_parent, after_in_child=_child)


# === SQL ===
# depends on: Errors, Events, Journal
#
# A statement has `$name` parameters or literals, never both: a literal may hold a `$name`. The target is
# attached as `audit`.


def sql_literal(value: object) -> str:
    """Return a value as SQL. Raises QueryError for a text with NUL."""
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(sql_literal, value))}]{'' if value else '::VARCHAR[]'}"
    if not isinstance(value, str):
        raise QueryError(f"a value of type {type(value).__name__} has no SQL literal")
    if "\0" in value:
        raise QueryError("a text with a NUL character can't be searched for; the log holds none")
    quoted = "'" + value.encode("utf-8", "replace").decode().replace("'", "''") + "'"
    if "\r" in value or "\3" in value:  # the program drops the former, and a line with the latter
        return "E" + quoted.replace("\\", "\\\\").replace("\r", "\\r").replace("\3", "\\x03")
    return quoted


def listed(columns: str, rows: Collection[Sequence[object]]) -> str:
    """Return the SELECT of rows in columns that are defined as `name TYPE, …`."""
    definitions = [definition.split() for definition in columns.split(", ")]
    values = zip(*rows) if rows else [()] * len(definitions)
    return "SELECT " + ", ".join(
        f"unnest({sql_literal(value)}::{sql_type}[]) AS {name}"
        for (name, sql_type), value in zip(definitions, values)
    )


def among(column: str, values: Iterable[object]) -> str:
    return f"{column} IN (SELECT unnest({sql_literal(list(values))}))"


_NAMES = ", ".join(column.name for column in COLUMNS)
_ISO_FORMAT = "'%Y-%m-%dT%H:%M:%S.%fZ'"
# Nothing is detected: versions differ, and `name=x` in a path is no value.
_LINES = f"""\
SELECT * EXCLUDE (filename) REPLACE
  (CASE parse_filename(filename, true) WHEN '{COMBINED}' THEN segment ELSE parse_filename(filename, true) END
   AS segment)
FROM read_json($files, format = 'newline_delimited', filename = true, hive_partitioning = false,
  columns = {{{", ".join(f"{name}: '{sql_type}'" for name, sql_type in COLUMNS)}}},
  maximum_object_size = $longest, ignore_errors = $lenient)"""
LONGEST_LINE = 2**20

# Other schemas of a shared target may have tables of the same names.
_OUR_TABLES = """\
database_name = 'audit' AND lower(table_name) IN ('logs', 'ledger')
AND schema_name = coalesce(getvariable('audit_schema'), 'main')"""
CREATE_LOGS = f"CREATE TABLE IF NOT EXISTS audit.logs ({', '.join(map(' '.join, COLUMNS))})"
LEDGER_DEFINITIONS = (
    "journal VARCHAR, position BIGINT, kind VARCHAR, segment VARCHAR, events BIGINT, first_event TIMESTAMP, "
    "last_event TIMESTAMP, digest VARCHAR, marks VARCHAR, detail VARCHAR, host VARCHAR, "
    "ingested_at TIMESTAMP, seal VARCHAR"
)
LEDGER_COLUMNS = tuple(Column(*words.split()) for words in LEDGER_DEFINITIONS.split(", "))
CREATE_LEDGER = f"CREATE TABLE IF NOT EXISTS audit.ledger ({LEDGER_DEFINITIONS})"
# Somebody may still read what was replaced.
LAKE_CLEANING = (
    "CALL ducklake_expire_snapshots('audit', older_than => now() - INTERVAL 7 DAYS)",
    "CALL ducklake_cleanup_old_files('audit', older_than => now() - INTERVAL 2 DAYS)",
)


def lake_chores(commit: int) -> list[str]:
    """Return the chores after a commit: each 256th merges small files, each 4,096th larger."""
    if commit % 256:
        return []
    size, cleaning = (2**20, ()) if commit % 4096 else (2**26, LAKE_CLEANING)
    flush = "CALL ducklake_flush_inlined_data('audit', table_name => '{}')"
    merge = f"CALL ducklake_merge_adjacent_files('audit', '{{}}', max_file_size => {size})"
    return [*(chore.format(table) for table in ("logs", "ledger") for chore in (flush, merge)), *cleaning]


# --- digests

# An infinity must not look like NULL.
TIME_NUMBER = "CASE WHEN isfinite({0}) THEN epoch_us({0})::VARCHAR ELSE {0}::VARCHAR END"


def row_hash(columns: Sequence[Column]) -> str:
    """Return the SQL of a row's hash (docs/security.md)."""
    new = NEW_COLUMNS if columns is COLUMNS else ()
    numbers = {"TIMESTAMP": TIME_NUMBER, "VARCHAR": "strlen({0})"}
    old = [column for column in columns if column not in new]
    head = ", '|', ".join(numbers.get(sql_type, "{0}").format(name) for name, sql_type in old)
    texts = [name for name, sql_type in old if sql_type == "VARCHAR" and not (new and name == "segment")]
    for name, sql_type in new:  # `||` with NULL is NULL, which concat leaves out
        length = "" if sql_type == "BIGINT" else f"strlen({name}) || ':' || "
        texts.append(f"'|{name}:' || {length}{name}")
    return f"sha256(concat({head}, '|', {', '.join(texts)}))"


EVENT_HASH = row_hash(COLUMNS)
ENTRY_HASH = row_hash(LEDGER_COLUMNS[:-1])


def digests(
    source: str, condition: str = "true", *, segment: str = "segment", order: str = "seq, hash"
) -> str:
    """Return the SELECT of what the ledger records of segments."""
    return f"""\
SELECT segment, events, first_event, last_event, sha256(array_to_string(hashes, '')) AS digest,
  CASE WHEN low = 1 AND high = events THEN array_to_string([h[1:4] for h in hashes], '') END AS marks
FROM (SELECT part AS segment, count(*) AS events, min(timestamp) AS first_event, max(timestamp) AS last_event,
        min(seq) AS low, max(seq) AS high, list(hash ORDER BY {order}) AS hashes
      FROM (SELECT {segment} AS part, timestamp, seq, {EVENT_HASH} AS hash FROM {source} WHERE {condition})
      GROUP BY part)"""


# A day of rows of an older table is taken for a segment, `legacy-2026-01-31`.
SEGMENT_OR_DAY = "coalesce(segment, strftime(timestamp, 'legacy-%Y-%m-%d'), 'legacy-')"


def ranges(condition: str = "true") -> str:
    """Return the SELECT of first and last segment of ranges of about $size rows."""
    return f"""\
SELECT min(key), max(key) FROM (
    SELECT key, floor(sum(events) OVER (ORDER BY key ROWS UNBOUNDED PRECEDING) / $size) AS part
    FROM (SELECT {SEGMENT_OR_DAY} AS key, count(*) AS events FROM sound_logs WHERE {condition} GROUP BY ALL))
GROUP BY part ORDER BY part"""


# --- ingest: through the temporary table `batch`

STAGE = f"CREATE OR REPLACE TEMP TABLE batch AS {_LINES}"
# How many events the ledger has of a segment, if these are its first lines.
KNOWN_LINES = f"""\
SELECT segment, events FROM ({
    digests(
        "batch JOIN (SELECT segment AS known, max(events) AS most FROM audit.ledger WHERE kind = 'segment' "
        "AND segment IN (SELECT unnest($segments)) GROUP BY segment) ON segment = known",
        "seq <= most",
        order="seq",
    )
}) SEMI JOIN (SELECT segment, digest FROM audit.ledger WHERE kind = 'segment') USING (segment, digest)"""
INSERT_ROWS = f"INSERT INTO audit.logs BY NAME SELECT {_NAMES} FROM batch"


# --- verifying: through views of known columns and types

TABLE_TYPES = f"""\
SELECT lower(table_name), lower(column_name), data_type FROM duckdb_columns()
WHERE {_OUR_TABLES}"""
SAME_VALUES = {
    "TIMESTAMP": {"TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "TIMESTAMP_S", "TIMESTAMP_MS"},
    "INTEGER": {"INTEGER", "BIGINT", "SMALLINT"},
    "BIGINT": {"INTEGER", "BIGINT"},
    "VARCHAR": {"VARCHAR"},
}
VIEW = "is a view"
_OUR_COLUMNS = tuple(column.name for column in (*COLUMNS, *LEDGER_COLUMNS))
# What keeps a table from being a plain one.
ODDITIES = f"""\
SELECT view_name AS name, '{VIEW}' AS what FROM duckdb_views()
WHERE {_OUR_TABLES.replace("table_name", "view_name")}
UNION ALL SELECT table_name, 'has a column with a collation, or one that is computed'
FROM duckdb_tables() WHERE {_OUR_TABLES} AND regexp_matches(sql, 'COLLATE|GENERATED ALWAYS')
UNION ALL SELECT table_name, concat('has a default for ', column_name)
FROM duckdb_columns() WHERE {_OUR_TABLES} AND lower(column_name) IN {_OUR_COLUMNS}
AND column_default IS NOT NULL AND column_default <> 'NULL'"""
POSTGRES_ODDITIES = f"""\
SELECT relname AS name, CASE WHEN relkind NOT IN ('r', 'p') THEN 'is no table'
  WHEN relrowsecurity THEN 'has row security' WHEN relhasrules THEN 'has rules'
  WHEN EXISTS (SELECT 1 FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal) THEN 'has triggers'
  WHEN EXISTS (SELECT 1 FROM pg_attribute a WHERE attrelid = c.oid AND attname IN {_OUR_COLUMNS}
    AND (atthasdef OR attcollation NOT IN (0, (SELECT oid FROM pg_collation WHERE collname = 'default'))))
  THEN 'has a column that is computed, or has a default or a collation' END AS what
FROM pg_class c WHERE relname IN ('logs', 'ledger') AND relnamespace = to_regnamespace({{0}})"""


def sound_rows(
    types: Mapping[str, str], table: str = "audit.logs", columns: Sequence[Column] = COLUMNS
) -> str:
    """Return the SELECT of a table in our columns and types, NULL where that fails."""

    def sound(name: str, sql_type: str) -> str:
        if (given := types.get(name)) == sql_type:
            return name
        zoned = f"timezone('UTC', {name})" if given == "TIMESTAMP WITH TIME ZONE" else given and name
        return f"TRY_CAST({zoned or 'NULL'} AS {sql_type}) AS {name}"

    selected = ", ".join(sound(*column) for column in columns)
    return f"SELECT {selected} {f'FROM {table}' if types else 'WHERE false'}"


CHAIN = f"""\
SELECT coalesce(journal, '') AS journal, coalesce(position, 0) AS position, coalesce(kind, ''),
  coalesce(events, 0), coalesce(seal, '') AS seal, {ENTRY_HASH}
FROM sound_ledger ORDER BY journal, position, seal"""
PURGES = f"""\
SELECT coalesce(strftime(ingested_at, {_ISO_FORMAT}), ''), coalesce(host, ''), coalesce(events, 0),
  coalesce(journal, ''), coalesce(position, 0), detail
FROM sound_ledger WHERE kind = 'purge' ORDER BY ingested_at, journal, position"""
# The entries that purges name, and what they left of each.
GONE = """\
CREATE OR REPLACE TEMP TABLE gone AS
SELECT number, journal, position, entered.events AS held, coalesce(last_event < moment, true) AS is_past,
  CASE WHEN NOT is_old OR last_event < moment THEN 0 ELSE kept.events END AS events, kept.digest
FROM (SELECT DISTINCT number, make_timestamp(before) AS moment, is_old, journal,
        unnest(range(low, least(high, entries) + 1)) AS position
      FROM ({spans}) JOIN (SELECT journal, count(*) AS entries FROM sound_ledger GROUP BY journal)
      USING (journal))
JOIN sound_ledger AS entered USING (journal, position) LEFT JOIN ({kept}) AS kept USING (number, segment)
WHERE kind IN ('segment', 'legacy')
  AND (NOT is_old OR (first_event < moment AND (last_event < moment OR kept.events IS NOT NULL)))"""


def comparison(*, scoped: bool) -> str:
    """Return the SELECT that compares segments of ledger and `logs`, all if `scoped`."""
    inside = "($low IS NULL OR {0} > $low) AND ($high IS NULL OR {0} <= $high)"
    inside += " AND {0} IN (SELECT segment FROM scope)" if scoped else ""
    found = digests("sound_logs", inside.format(SEGMENT_OR_DAY), segment=SEGMENT_OR_DAY)
    return f"""\
SELECT coalesce(entered.journal, ''), coalesce(entered.position, -1),
  coalesce(entered.segment, found.segment, '') AS segment, coalesce(entered.events, 0), coalesce(due, 0),
  (entered.position IS NOT NULL AND coalesce(found.events, 0) = coalesce(due, 0)
    AND found.digest IS NOT DISTINCT FROM due_digest) AS as_due,
  coalesce(found.events, 0), epoch_us(found.first_event), epoch_us(found.last_event), found.digest
FROM (SELECT sound_ledger.*, coalesce(remains.events, sound_ledger.events) AS due,
        CASE WHEN remains.events IS NULL THEN sound_ledger.digest
             WHEN remains.events > 0 THEN remains.digest END AS due_digest
      FROM sound_ledger LEFT JOIN (SELECT journal, position, min(events) AS events,
        arg_min(digest, events) AS digest FROM gone GROUP BY ALL) AS remains USING (journal, position)
      WHERE kind IN ('segment', 'legacy') AND {inside.format("segment")}) AS entered
FULL JOIN ({found}) AS found ON found.segment = entered.segment
{"" if scoped else "WHERE NOT as_due"} ORDER BY segment"""


OLD = "FROM audit.logs WHERE timestamp < $moment::TIMESTAMP"
IN_SCOPE = f"{SEGMENT_OR_DAY} IN (SELECT segment FROM scope)"
# An archive has a file for each day, and one for what is not as it was entered.
_FILE_OF = f"""\
FROM (SELECT *, CASE WHEN {SEGMENT_OR_DAY} IN (SELECT unnest($wrong)) THEN $apart
                ELSE strftime(timestamp, '%Y-%m-%d.parquet') END AS file FROM audit.logs WHERE {IN_SCOPE})"""
OLD_FILES = f"SELECT file, count(*) {_FILE_OF} GROUP BY file ORDER BY file"
OLD_OF_FILE = f"SELECT {_NAMES} {_FILE_OF} WHERE file = $name ORDER BY timestamp, segment, seq"
_CONTENT = "SELECT count(*) AS rows, sum(hash(t)::HUGEINT) AS hash FROM"
SAME_CONTENT = {
    table: f"SELECT count(*) = 1 FROM (({_CONTENT} audit.{table} t) UNION ({_CONTENT} fresh.{table} t))"
    for table in ("logs", "ledger")
}


# --- reading

JOURNAL_ROWS = f"SELECT * FROM ({_LINES}) WHERE seq IS NOT NULL AND timestamp IS NOT NULL"
NEWEST_FIRST = "timestamp DESC, segment DESC, seq DESC"
OLDEST_FIRST = "timestamp, segment, seq"
PUBLIC_COLUMNS = (*(column.name for column in COLUMNS[:-2]), "event_id")
EVENT_ID = "segment || ':' || seq::VARCHAR"


def public_select(form: str = "{1} AS {0}", *, typed: bool = False, harmless: bool = False) -> str:
    """Return the public columns as a SELECT list, whose values both engines return alike."""
    values = {name: name for name in PUBLIC_COLUMNS} | {"event_id": f"({EVENT_ID})"}
    for name, value in values.items() if harmless else ():
        if name not in ("timestamp", "duration_ms", "result_bytes"):
            match = f"regexp_matches({value}, {sql_literal(FORMULA)})"
            values[name] = f"CASE WHEN {match} THEN '''' || {value} ELSE {value} END"
    if not typed:
        values["timestamp"] = f"strftime(timestamp, {_ISO_FORMAT})"
    return ", ".join(itertools.starmap(form.format, values.items()))


# --- exports, figures, and SQL of a person's own

# What spreadsheets take for a formula, also behind invisible characters; and the apostrophe, so that a cell
# without its first one is the original.
_INVISIBLE = (
    r"\x01-\x20\x7f-\xa0\xad"
    "\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff"
)
FORMULA = rf"^[{_INVISIBLE}]*[=+\-@|＝＋－＠]|^[\t\r\n']"
_CSV = "csv, HEADER true, FORCE_QUOTE (input_json, name, reason, error)"
COPY_OPTIONS = {
    name + suffix: f"FORMAT {options}, COMPRESSION {codec}, USE_TMP_FILE false"
    for name, options in (("csv", _CSV), ("json", "json, ARRAY true"), ("jsonl", "json, ARRAY false"))
    for suffix, codec in (("", "none"), (".gz", "gzip"), (".zst", "zstd"))
} | {"parquet": "FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false"}
EXPORT_FORMATS = (*COPY_OPTIONS, "duckdb", "sqlite")


def export_format(path: str) -> str | None:
    """Return the export format of a file's name, None if its extension is unknown."""
    return next((form for form in EXPORT_FORMATS if path.lower().endswith("." + form)), None)


# What `stats` groups by, and how it shows the group `k`.
_TEXT_GROUPS = "name type caller status user_id client agent address server error_type policy_decision"
STATS_BY = {
    re.sub("_id$|_decision$", "", name).replace("_", "-"): (name, "k") for name in _TEXT_GROUPS.split()
} | {
    "hour": ("date_trunc('hour', timestamp)", "strftime(k, '%Y-%m-%dT%H:00Z')"),
    "day": ("date_trunc('day', timestamp)", "strftime(k, '%Y-%m-%d')"),
}
_FIGURES = ("calls", "errors", "denied", "p50_ms", "p95_ms", "p99_ms", "max_ms")
STATS_COLUMNS = (*_FIGURES, "first_seen", "last_seen", "running")


def stats_query(source: str, by: str, sort: str, count: int) -> str:
    """Return the query of one row a group: the group as text, then STATS_COLUMNS."""
    group, shown = STATS_BY[by]
    order = "k DESC" if by in ("hour", "day") else f"{sort} DESC NULLS LAST, k"
    return f"""\
SELECT {shown} AS k, calls, errors, denied, q[1] AS p50_ms, q[2] AS p95_ms, q[3] AS p99_ms, max_ms,
  strftime(first_at, {_ISO_FORMAT}) AS first_seen, strftime(last_at, {_ISO_FORMAT}) AS last_seen, running
FROM (SELECT {group} AS k, count(over_ms) AS calls, count(*) - count(over_ms) AS running,
        count(*) FILTER (WHERE status = 'error') AS errors,
        count(*) FILTER (WHERE policy_decision = 'deny') AS denied,
        quantile_disc(nullif(over_ms, -1), [0.5, 0.95, 0.99]) AS q, max(nullif(over_ms, -1)) AS max_ms,
        min(timestamp) AS first_at, max(timestamp) AS last_at
      FROM (SELECT *, CASE WHEN seq IS DISTINCT FROM 0 THEN coalesce(duration_ms, -1) END AS over_ms
            FROM ({source})) GROUP BY ALL)
ORDER BY {order} LIMIT {count}"""


# --- filters


class Filter(NamedTuple):
    """Which events are meant. Everything that is set must hold; within a tuple, any of it.

    Names may hold `*` for any text. Times are naive UTC texts.
    """

    tools: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    event_type: str | None = None
    policy: str | None = None
    status: str | None = None
    since: str | None = None
    until: str | None = None
    caller: str | None = None
    user: str | None = None
    session: str | None = None
    trace: str | None = None
    client: str | None = None
    agent: str | None = None
    address: str | None = None
    server: str | None = None
    error_type: str | None = None
    event_id: str | None = None
    text: str | None = None
    min_ms: int | None = None

    def where(self) -> str:
        """Return the WHERE condition, `true` if everything is meant."""
        named = [
            f"(type = '{kind[:-1]}' AND {_has_name('name', name)})"
            for kind in ("tools", "resources", "prompts")
            for name in getattr(self, kind)
        ]
        conditions = [f"({' OR '.join(named)})"] if named else []
        for field, value in self._asdict().items():
            if field in _FILTERS and value is not None:
                conditions.append(f"{_FILTERS[field]} {sql_literal(value)}")
            elif field in ("client", "agent", "address", "server", "error_type") and value is not None:
                conditions.append(_has_name(field, value))
        if self.event_id is not None:
            conditions.append("segment = '{}' AND seq = {}".format(*parse_event_id(self.event_id)))
        if self.text is not None:
            like = f"ILIKE {sql_literal(f'%{_like(self.text)}%')} ESCAPE '\\'"
            conditions.append(f"(name {like} OR input_json {like} OR error {like} OR reason {like})")
        return " AND ".join(conditions) or "true"


_FILTERS = {
    "event_type": "type =",
    "policy": "policy_decision =",
    "status": "status =",
    "since": "timestamp >= TIMESTAMP",
    "until": "timestamp < TIMESTAMP",
    "caller": "caller =",
    "user": "user_id =",
    "session": "session_id =",
    "trace": "trace_id =",
    "min_ms": "duration_ms >=",
}


def _like(text: str) -> str:
    r"""Return the LIKE pattern of the text itself, with the escape `\`."""
    return re.sub(r"[\\%_]", r"\\\g<0>", text)


def _has_name(column: str, name: str) -> str:
    if "*" not in name:
        return f"{column} = {sql_literal(name)}"
    return f"{column} LIKE {sql_literal(_like(name).replace('*', '%'))} ESCAPE '\\'"


# === Engines ===
# depends on: Errors, SQL
#
# The ways to DuckDB: same statements, same values. A session begins at the first `execute`; `close` or the
# first error ends it, with all that was attached or begun.

Params: TypeAlias = Mapping[str, object]
Row: TypeAlias = tuple[Any, ...]

# The first whose pattern is in the message decides.
_ENGINE_ERRORS: Mapping[type[StoreError], str] = {
    DatabaseLockedError: "could not serialize access|duplicate key value violates unique constraint|tuple "
    "concurrently updated|deadlock detected|due to lock timeout|transaction conflict|write-write conflict|"
    "maximum retry count|could not set lock on file|conflicting lock is held|being used by another process|"
    "is already attached|already open in another",
    DatabaseUnreachableError: "unable to connect to postgres|connection to server|server closed the "
    "connection|terminating connection|no connection to the server|could not connect to server|install it "
    "first using|terminate called after throwing",
    DatabaseNotFoundError: "creating a new ducklake is explicitly disabled|database does not exist",
    DatabaseCorruptError: "not a valid duckdb database file|corrupt|computed checksum|could not read enough "
    "bytes|database file with version number|trying to read a database|failure while replaying wal|"
    "serialization error|internal error|database has been invalidated",
}


def store_error(message: str) -> StoreError:
    """Return our error for a message of DuckDB's, whatever that quotes."""
    message = re.split(r"\n(?:DETAIL|CONTEXT):", message)[0]  # PostgreSQL's, with what was recorded
    said = re.sub(r""""[^"]*"|'[^']*'|\nLINE \d+:(?s:.*)""", "", message).lower()
    said = said.rpartition("original error:")[2].strip() or said
    if said.startswith(("parser error", "conversion error", "out of range error")):
        return QueryError(message.strip())
    kind = next((kind for kind, signs in _ENGINE_ERRORS.items() if re.search(signs, said)), QueryError)
    if kind is DatabaseLockedError and (holder := re.search(r"held in (.+?) \(PID (\d+)\)", message)):
        return kind(f"in use by {holder[1]} (PID {holder[2]})")
    return kind(message.strip() if kind is QueryError else postgres_message(message).strip().splitlines()[0])


def postgres_message(text: str) -> str:
    """Return PostgreSQL's part of a message, without our statement; else all."""
    return text[max(0, text.rfind("ERROR:  ")) :]


def is_data_fault(error: QueryError) -> bool:
    """Return True if a statement failed because of its input."""
    kinds = ("invalid input error", "conversion error", "out of range error", "out of memory")
    return str(error).lower().startswith(kinds)


def bind(sql: str, params: Params) -> str:
    """Replace the `$name` parameters of a statement by literals."""
    return re.sub(r"\$([a-z_]+)", lambda name: sql_literal(params[name[1]]), sql) if params else sql


_PROCESS = os.getpid()


def _session_settings(*, guest: bool) -> str:
    # A guest's memory takes a batch of 64 MiB. A progress bar would go to standard output.
    return (
        "SET autoinstall_known_extensions = false; SET autoload_known_extensions = false; "
        f"SET enable_progress_bar = false; SET temp_directory = {sql_literal(_scratch_directory())}; "
        + ("SET threads = 1; SET memory_limit = '256MB';" if guest else "")
    )


class Engine(Protocol):
    """A way to DuckDB. Methods raise StoreError, which ends the session."""

    name: str

    def version(self) -> str:
        """Return DuckDB's version, such as "2.0.1"."""
        return str(self.execute("SELECT version()")[0][0]).lstrip("v")

    def execute(self, sql: str, params: Params = {}) -> list[Row]:
        """Run one statement and return its rows."""
        return list(self.stream(sql, params))

    def stream(self, sql: str, params: Params = {}) -> Iterator[Row]:
        """Run one statement and yield its rows; read them all before the next."""

    def close(self) -> None:
        """End the session. Twice is harmless."""


def _duckdb() -> Any:
    """Return DuckDB's package, or its compiled part: 40 ms instead of 140."""
    if "duckdb" not in sys.modules:
        with suppress(ImportError):
            import _duckdb

            return _duckdb
    import duckdb

    return duckdb


class PackageEngine(Engine):
    """The package in this process; a guest gets one thread and little memory."""

    name = "package"

    def __init__(self, *, guest: bool) -> None:
        self._guest = guest
        self._connection: Any = None

    def stream(self, sql: str, params: Params = {}) -> Iterator[Row]:
        duckdb, text = _duckdb(), bind(sql, params)
        try:
            if self._connection is None:
                self._process_id, self._connection = os.getpid(), duckdb.connect(":memory:")
                self._connection.execute(_session_settings(guest=self._guest))
                with suppress(duckdb.Error):  # some builds know no time zones
                    self._connection.execute("SET TimeZone = 'UTC'")
            result = self._connection.execute(text)
            while rows := result.fetchmany(1000):
                yield from rows
        except (duckdb.Error, RuntimeError) as error:
            self.close()
            if isinstance(error, duckdb.Error):
                raise store_error(str(error)) from error
            if "interrupted" in str(error):  # what DuckDB makes of Ctrl+C
                raise KeyboardInterrupt from error
            raise

    def close(self) -> None:
        """Close the database; a forked child, which lacks its threads, keeps it."""
        connection, self._connection = self._connection, None
        if connection is not None and self._process_id == os.getpid():
            connection.close()
        elif connection is not None:
            import ctypes

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))

    __del__ = close


def decode_json(text: str) -> Any:
    """Decode DuckDB's JSON: a row becomes a list, NaN and infinity None; too deep a text stays one."""

    def members(pairs: list[tuple[str, object]]) -> object:
        is_row = len(pairs) > 1 and not any(name for name, _ in pairs)
        return [value for _, value in pairs] if is_row else dict(pairs)

    def number(text: str) -> float | None:
        return value if isfinite(value := float(text)) else None

    with suppress(ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=members, parse_float=number, parse_constant=number)
    return text


_PATIENCE = {"PGOPTIONS": "-c lock_timeout=3000", "PGCONNECT_TIMEOUT": "10"}  # with PostgreSQL
_COLOUR = re.compile(rb"^(?:\x1b\[[0-9;]*m)+")  # ends a warning, on the line that follows it


class CliEngine(Engine):
    """DuckDB in a child: its program, or Python with the package from a folder `package`."""

    def __init__(self, program: str, *, guest: bool, package: str = "") -> None:
        self.program, self._guest = program, guest
        self.name = "package" if package else "cli"
        self._mark = os.urandom(8).hex()  # printed after the rows of a statement
        self._command = (program, "-X", "utf8", "-c", _APART, self._mark, package)
        if not package:  # `-init` keeps ~/.duckdbrc out: 1.4 knows no `-no-init`
            self._command = (program, "-init", os.devnull, "-batch", "-bail", "-jsonlines", ":memory:")
        self._process: subprocess.Popen[bytes] | None = None

    def _open(self) -> subprocess.Popen[bytes]:
        import subprocess
        import tempfile

        self._complaints = tempfile.TemporaryFile(dir=temporary_place() or "/dev/shm")
        try:
            return subprocess.Popen(
                self._command,
                env={**_PATIENCE, **os.environ, "TZ": "UTC"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                umask=0o077 if hasattr(os, "fork") else -1,
                start_new_session=not self._guest,  # Ctrl+C is for us
            )
        except OSError as error:
            raise EngineNotFoundError(f"{self.program} can't be run: {error.strerror}") from error

    def stream(self, sql: str, params: Params = {}) -> Iterator[Row]:
        text = f"{bind(sql, params)}\n;\n.print {self._mark}\n"
        if self._process is None:
            self._process, text = self._open(), f"{_session_settings(guest=self._guest)}\n{text}"
        process, mark, finished = self._process, self._mark.encode() + b"\n", False
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(OSError):  # the child has ended, and says why
                process.stdin.write(text.encode())
                process.stdin.flush()
            for line in process.stdout:
                line = _COLOUR.sub(b"", line)
                if line == mark:
                    finished = True
                    return
                if line.startswith(b"{"):  # else it is a warning
                    yield tuple(json.loads(line).values())
            self.close()
            raise store_error(self._complaint or "the duckdb program ended without a word (was it killed?)")
        finally:
            if not finished:
                process.kill()  # this undoes its transaction
                self.close()

    def close(self) -> None:
        """End the child, by force if need be, and keep its complaint."""
        import subprocess

        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with self._complaints as complaints:
            complaints.seek(0)
            self._complaint = complaints.read().decode("utf-8", "replace").strip()


# What CliEngine's Python runs. The current directory must not shadow modules.
_APART = """
import sys
sys.path[:] = [folder for folder in sys.path if folder] + sys.argv[2:]
import json, os
try:
    import _duckdb as duckdb
except ImportError:
    import duckdb
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever else is printed
connection, text, mark = duckdb.connect(), [], f".print {sys.argv[1]}\\n"
for line in sys.stdin:
    if line != mark:
        text.append(line)
        continue
    try:
        result = connection.execute("".join(text))
        text.clear()
        while rows := result.fetchmany(1000):
            answers.writelines(json.dumps(dict(enumerate(row)), default=str) + "\\n" for row in rows)
    except duckdb.Error as error:
        sys.exit(str(error))
    print(sys.argv[1], file=answers, flush=True)
"""


def temporary_place() -> str:
    """Return the directory of temporary files, "" if there is none."""
    import tempfile

    with suppress(FileNotFoundError):
        return tempfile.gettempdir()
    return ""


def _scratch_directory() -> str:
    """Return a directory that DuckDB may make, in a private one, to spill."""
    import tempfile

    if not (place := temporary_place()):
        return ""
    owner = getattr(os, "getuid", int)()
    private = os.path.join(place, f"mxcp_audit-{owner}")
    with suppress(OSError):  # it may not be needed
        with suppress(FileExistsError):
            os.mkdir(private, 0o700)
        found = os.lstat(private)
        if os.name == "posix" and (found.st_uid != owner or not stat.S_ISDIR(found.st_mode)):
            private = tempfile.mkdtemp(prefix="mxcp_audit-")
    return os.path.join(private, f"{os.getpid()}-{os.urandom(4).hex()}")


def find_program(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the path of the `duckdb` program, None if there is none."""
    import shutil

    # The package's own `duckdb` on PATH is a wrapper in Python, and slow.
    package = os.path.dirname(file_of_package("duckdb_cli", "__init__.py") or "")
    ours = package and shutil.which("duckdb", path=package)
    return environ.get("MXCP_AUDIT_DUCKDB") or ours or shutil.which("duckdb", path=environ.get("PATH"))


def file_of_package(name: str, *parts: str) -> str | None:
    """Return the path of a file in a package, without importing that, or None."""
    import importlib.util

    folders = getattr(importlib.util.find_spec(name), "submodule_search_locations", None) or ()
    return next(filter(os.path.exists, (os.path.join(folder, *parts) for folder in folders)), None)


def _in_subinterpreter() -> bool:
    import importlib

    for name in ("_interpreters", "_xxsubinterpreters"):  # 3.13 and later; before
        with suppress(ImportError, AttributeError):
            interpreters = importlib.import_module(name)
            return bool(interpreters.get_current() != interpreters.get_main())
    return False


def open_engine(
    *, guest: bool = False, apart: bool = False, environ: Mapping[str, str] = os.environ
) -> Engine:
    """Return the engine that MXCP_AUDIT_ENGINE names, or what is there; `apart`: in a child."""
    choice = environ.get("MXCP_AUDIT_ENGINE") or "auto"
    if choice not in ("auto", "package", "cli"):
        raise EngineNotFoundError(f"MXCP_AUDIT_ENGINE={choice}: write auto, package or cli")
    if choice != "cli":
        try:
            if not (apart or os.getpid() != _PROCESS or _in_subinterpreter()):
                _duckdb()  # raises ImportError
                return PackageEngine(guest=guest)
            if (package := file_of_package("duckdb", "__init__.py")) is None:
                raise ImportError("No module named 'duckdb'")
            if (reason := no_python()) is None:  # a frozen program would be started once more
                folder = os.path.dirname(os.path.dirname(package))
                return CliEngine(sys.executable, guest=guest, package=folder)
            reason += ", which DuckDB needs here: put its program on PATH"
        except ImportError as error:
            reason = f"the duckdb package can't be loaded ({error}): pip install duckdb"
        if choice == "package":
            raise EngineNotFoundError(reason)
    if program := find_program(environ):
        return CliEngine(program, guest=guest)
    text = "`pip install duckdb`, or put the duckdb program on PATH or name it in MXCP_AUDIT_DUCKDB"
    raise EngineNotFoundError(f"no DuckDB here: {text}")


Opener: TypeAlias = Callable[..., Engine]


# === Store ===
# depends on: Errors, Config, Events, Encoding, Journal, Writer, SQL, Engines
#
# Table and journal as one log. An event gets into the table once, is seen once meanwhile, and leaves by a
# purge that is entered.

# == Target ==
# depends on: Errors, Config, Events, Journal, SQL, Engines
#
# The database itself, a file or what else DuckDB can attach: makes it, attaches and detaches it.
#
# Closing any descriptor of the file drops DuckDB's POSIX lock: it is never opened here, and attached once at
# a time in a process. It is made under another name, because a half-made file stays damaged.


def tries(wait: float) -> Iterator[bool]:
    """Yield for each attempt within `wait` seconds whether it is the last."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        yield False
        time.sleep(0.01 + os.urandom(1)[0] / 2560)
    yield True


_Answer = TypeVar("_Answer")


def patiently(action: Callable[[], _Answer], wait: float) -> _Answer:
    """Call `action` again for `wait` seconds while it raises DatabaseLockedError."""
    for is_last in tries(wait):
        try:
            return action()
        except DatabaseLockedError:
            if is_last:
                raise
    raise AssertionError


def _stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextlib.contextmanager
def _scratch(path: str, problem: str, *, name: str = "") -> Iterator[str]:
    """Make a private directory beside `path`; a `name` replaces a killed process's."""
    import shutil

    folder, file = os.path.split(os.path.abspath(path))
    scratch = os.path.join(folder, f".{file}.{name or os.urandom(4).hex() + '.part'}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        os.mkdir(scratch, _DIRECTORY_MODE)
        give_to_owner(scratch)
        yield scratch
    except OSError as error:
        raise StoreError(f"{problem}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratch_folder(beside: str | None = None) -> contextlib.AbstractContextManager[str]:
    """Make a private temporary directory, in `beside` if there is no other place."""
    import tempfile

    return tempfile.TemporaryDirectory(prefix="mxcp_audit-", dir=temporary_place() or beside)


_NOT_FOUND = "Audit database not found at "
_REMEDIES: Mapping[type[StoreError], str] = {
    DatabaseLockedError: "try again when that process has closed it; events wait in the journal meanwhile",
    DatabaseCorruptError: "nothing was changed, events wait; if a newer DuckDB made it, use that one, "
    "else move it aside or restore a backup",
    QueryError: "",
}
DAMAGED_WAL = "replaying WAL"
NEW_FILE = {"STORAGE_VERSION": "v1.0.0"}  # made by DuckDB 2.0 without this, 1.5 can't read it


def attach(engine: Engine, target: str, name: str, options: Mapping[str, object]) -> None:
    """Attach a database under a name: a file, which is made if absent, or another target."""
    if is_attach_target(target):
        load_extensions(engine, target, options)
        if re.match("postgres(ql)?://", target.lower()):
            options = {"TYPE": "postgres", **options}
    else:  # without the type DuckDB would look for SQLite's extension
        options = {**options, "TYPE": "duckdb"}
        if "ENCRYPTION_KEY" in options and "READ_ONLY" not in options:
            load_extensions(engine, "https:", {})  # DuckDB itself only decrypts
    words = ", ".join(f"{option} {sql_literal(value)}" for option, value in options.items())
    engine.execute(f"ATTACH {sql_literal(target)} AS {name}{f' ({words})' if words else ''}")


_ATTACHED: dict[tuple[int, str], object] = {}  # by process


@contextlib.contextmanager
def _alone_in_process(path: str) -> Iterator[None]:
    """Let one thread attach a file: DuckDB's lock is the whole process's."""
    key, mine = (os.getpid(), os.path.realpath(path)), object()
    if _ATTACHED.setdefault(key, mine) is not mine:  # in one step
        raise DatabaseLockedError(f"{path}: in use by this process (PID {key[0]}) already; try again")
    try:
        yield
    finally:
        del _ATTACHED[key]


# Who holds up what ended by PostgreSQL's lock timeout: `pg_blocking_pids` tells only while we wait.
LOCK_HOLDER = """\
FROM postgres_query('{0}', $$
SELECT concat_ws(', ', 'PID ' || pid, usename, nullif(application_name, ''),
  state || ' since ' || state_change::timestamptz(0))
FROM pg_stat_activity JOIN pg_locks USING (pid)
WHERE granted AND relation::regclass::text ~ 'logs|ledger|ducklake' AND pid <> pg_backend_pid()
  AND mode IN ('AccessExclusiveLock', 'ExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock')
  AND datname = current_database() ORDER BY xact_start LIMIT 1$$)"""


class Target:
    """The database of a configuration."""

    def __init__(self, config: Config, journal: Journal, opener: Opener = open_engine) -> None:
        self.path: str = config.path
        self.is_file: bool = not is_attach_target(config.path)
        scheme = config.path.partition(":")[0].lower()
        self.is_postgres: bool = scheme in ("postgres", "postgresql")
        self.is_lake: bool = scheme == "ducklake"
        self._is_quack = scheme == "quack"
        self.name: str = public_target(config.path)  # without passwords
        self.journal: Journal = journal
        self.options = {name.upper(): value for name, value in config.attach.items()}
        self.new_file = {**({} if "ENCRYPTION_KEY" in self.options else NEW_FILE), **self.options}
        self._group = config.group
        self.commits: list[int] = []  # of a lake, since it was tended
        self.open_engine = opener if self.is_file else functools.partial(opener, apart=True)

    @contextlib.contextmanager
    def session(self, wait: float = 0.0, *, write: bool = False, guest: bool = False) -> Iterator[Engine]:
        """Open a session with the existing target, trying for `wait` seconds."""
        if not write:
            self.let_ingest_pass(wait)
        with contextlib.closing(self.open_engine(guest=guest)) as engine, contextlib.ExitStack() as stack:
            patiently(lambda: stack.enter_context(self.attached(engine, write=write)), wait)
            if not write:
                self.view_tables(engine)
            yield engine

    def let_ingest_pass(self, wait: float) -> None:
        """Wait while an ingest asks for a file: readers could starve it."""
        for _ in tries(wait if self.is_file else 0.0):
            if not self.journal.is_ingest_waiting():
                return

    @contextlib.contextmanager
    def attached(self, engine: Engine, *, write: bool = False, make: bool = False) -> Iterator[None]:
        """Attach the target as `audit`, or make it."""
        with _alone_in_process(self.path) if self.is_file else contextlib.nullcontext():
            try:
                self._attach(engine, write=write, make=make)
                is_ours = write and self.is_file and not os.path.islink(self.path)
                with self._private_wal() if is_ours else contextlib.nullcontext():
                    yield
                if self.is_file or write:
                    engine.execute("DETACH audit")
                else:
                    with suppress(StoreError):  # a statement that failed has ended the session
                        engine.execute("COMMIT")
                        engine.execute("DETACH audit")
            except BaseException as error:
                engine.close()
                if isinstance(error, StoreError):
                    error.args = (self._explained(error),)
                    if not self.is_file:
                        error.__cause__ = None  # it may repeat passwords
                raise

    def _attach(self, engine: Engine, *, write: bool, make: bool) -> None:
        options = self.options if write else {**self.options, "READ_ONLY": True}
        if self.is_file:
            if make and self.is_absent():
                self._make_file(engine)
            self.refuse_absent()
            attach(engine, self.path, "audit", options)
            return
        if self.is_lake and write:  # fewer rows stay in its catalogue at first
            options = {"DATA_INLINING_ROW_LIMIT": 1000, **options}
        if self._is_quack and write:
            text = "it has no transactions; write to a file, DuckLake or PostgreSQL"
            raise StoreError(f"quack: is for reading only: {text}")
        try:
            attach(engine, self.path, "audit", options)
        except QueryError as error:
            raise DatabaseUnreachableError(str(error).splitlines()[0]) from error
        self.schema = str(options.get("SCHEMA", "public" if self.is_postgres else "main"))
        engine.execute("SET VARIABLE audit_schema = $schema", {"schema": self.schema})
        if not write:
            engine.execute("BEGIN")

    def _explained(self, error: StoreError) -> str:
        """Return an engine's message with name and remedy, and without secrets."""
        text, remedy = str(error), _REMEDIES.get(type(error), "events wait in the journal")
        if self.is_file:
            if type(error) in (StoreError, QueryError, DatabaseNotFoundError):
                return text  # ours, or the statement's
            if DAMAGED_WAL in text:
                wal = f"{self.path}.wal"
                remedy = f"what we wrote there waits in the journal too: mv '{wal}' '{wal}.damaged'"
            return f"{self.path}: {text}; {remedy}"
        text = hide_secrets(text, self.path, self.options)
        if self.name in text:
            return text
        text = postgres_message(text)
        if "due to lock timeout" in text:
            catalogue = "__ducklake_metadata_audit" if self.is_lake else "audit"
            with suppress(StoreError), contextlib.closing(self.open_engine()) as engine:
                attach(engine, self.path, "audit", {**self.options, "READ_ONLY": True})
                for (holder,) in engine.execute(LOCK_HOLDER.format(catalogue)):
                    text += f" (held by {holder})"
        return f"{self.name}: {text}{remedy and '; '}{remedy}"

    @contextlib.contextmanager
    def _private_wal(self) -> Iterator[None]:
        """Make the WAL privately, with a mark: it held nothing before."""
        wal, mark = self.path + ".wal", self.journal.wal_mark
        with suppress(OSError):
            os.close(make_file(wal, os.O_WRONLY | os.O_EXCL, group=self._group))
            os.close(make_file(mark, os.O_WRONLY))
        yield
        with suppress(OSError):
            if not _size_of(wal):  # nothing was written
                os.unlink(mark)
                os.unlink(wal)

    def set_wal_aside(self) -> str | None:
        """Rename a damaged WAL whose content the journal has; None if it holds more."""
        aside = f"{self.path}.wal.damaged-{new_segment_id(wall_clock_ns())[:22]}"
        with suppress(OSError):
            os.unlink(self.journal.wal_mark)
            os.rename(self.path + ".wal", aside)
            return aside
        return None

    def _make_file(self, engine: Engine) -> None:
        """Make an empty database; the caller holds the ingest lock."""
        if _size_of(self.path + ".wal"):
            raise DatabaseCorruptError("the database is gone, but its .wal is there: put both back")
        place = os.path.realpath(self.path)  # a link stays one
        folder = os.path.dirname(place)
        os.makedirs(folder, exist_ok=True)
        problem, name = f"events wait, because {self.path} can't be made", f"{self.journal.identity()}.new"
        with _scratch(place, problem, name=name) as scratch:
            path = os.path.join(scratch, "new")
            attach(engine, path, "scratch", self.new_file)
            set_mode(path, FILE_MODES[self._group])
            give_to_owner(path)
            engine.execute("DETACH scratch")
            if self.is_absent():  # also an empty file: somebody ran `touch`
                os.replace(path, place)
                sync_directory(folder)

    def is_absent(self) -> bool:
        """Return True if there is no database file, or an empty one."""
        try:
            return self.is_file and os.stat(self.path).st_size == 0
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}; check the path and its permissions") from error

    def refuse_absent(self) -> None:
        """Raise DatabaseNotFoundError if there is no database file."""
        if self.is_absent():
            text = "correct the path, or run `ingest` if events wait"
            raise DatabaseNotFoundError(f"{_NOT_FOUND}{self.path}: {text}")

    def view_tables(self, engine: Engine) -> dict[str, dict[str, str]]:
        """Define the views `sound_logs` and `sound_ledger`; return the types of the tables' columns."""
        sql = TABLE_TYPES
        if self._is_quack:  # duckdb_columns() lists none there
            columns = "column_name, column_type FROM (DESCRIBE audit."
            sql = f"SELECT 'logs', {columns}logs) UNION ALL SELECT 'ledger', {columns}ledger)"
        return define_views(engine, column_types(engine, sql))

    def oddities(self, engine: Engine) -> list[str]:
        """Return why our tables may show what nobody recorded."""
        sql = ODDITIES
        if self.is_postgres:
            asked = sql_literal(POSTGRES_ODDITIES.format(sql_literal(self.schema)))
            sql = f"SELECT name, what FROM postgres_query('audit', {asked})"
        rows = [] if self._is_quack else engine.execute(sql)
        return [f"{table} {what}" for table, what in rows if what]

    def tend_lake(self) -> None:
        """Keep a lake's files few and large, if it is this process's turn."""
        chores = dict.fromkeys(chore for commit in self.commits for chore in lake_chores(commit))
        self.commits = []
        if chores:
            others = """\
SELECT 1 FROM duckdb_tables()
WHERE database_name = 'audit' AND NOT regexp_full_match(table_name, 'logs|ledger|turn_.*')"""
            with self.session(write=True, guest=True) as engine:
                for chore in chores:
                    if not (chore in LAKE_CLEANING and engine.execute(others)):
                        engine.execute(chore)

    def change_logs(self, engine: Engine, statement: str) -> None:
        """Run a statement that a foreign table may refuse."""
        try:
            engine.execute(statement)
        except QueryError as error:
            reason = str(error).splitlines()[0]
            if re.search(
                "(?i)permission denied|out of memory|without a word", reason
            ):  # not the table's fault
                raise
            text = f"its table `logs` takes no events of ours ({reason}); set `path` to a database of our own"
            raise StoreError(f"{self.name}: {text}") from error

    def create_tables(self, engine: Engine) -> None:
        """Make missing tables and columns, and what two ingests of a journal collide at."""
        ask, types = engine.execute, self.view_tables(engine)
        missing = [column for column in COLUMNS[10:] if column.name not in types["logs"]]
        if not types["logs"]:
            ask(CREATE_LOGS)
        for name, sql_type in missing if types["logs"] else ():
            self.change_logs(engine, f"ALTER TABLE audit.logs ADD COLUMN IF NOT EXISTS {name} {sql_type}")
        if not types["ledger"]:
            ask(CREATE_LEDGER)
            if self.is_postgres:
                index = "INDEX IF NOT EXISTS"
                ask(f"CREATE UNIQUE {index} ledger_position ON audit.ledger (journal, position)")
                ask(f"CREATE {index} logs_timestamp ON audit.logs (timestamp)")
        if self.is_lake:
            turn = f"audit.turn_{self.journal.identity()}"
            ask(f"CREATE TABLE IF NOT EXISTS {turn} AS SELECT 0::BIGINT AS taken")
        if missing or not types["ledger"]:
            self.view_tables(engine)

    def signature(self) -> object:
        """Return what differs after every ingest; None while that can't be told."""
        if not self.is_file:  # a change doesn't show from outside: look every 2 s
            return time.monotonic() // 2
        stamps = []
        for path in (self.path, self.path + ".wal"):
            with suppress(OSError):
                found = os.stat(path)
                # Kernels keep times to 1 … 10 ms, some file systems to one or two seconds.
                tick_ns = 5e7 if found.st_mtime_ns % 10**9 else 2.1e9
                if abs(wall_clock_ns() - found.st_mtime_ns) < tick_ns:
                    return None
                stamps.append(_stamp_of(found))
        return stamps


_Types: TypeAlias = dict[str, dict[str, str]]  # of columns, by table and name


def column_types(engine: Engine, sql: str) -> _Types:
    types: _Types = {"logs": {}, "ledger": {}}
    for table, column, sql_type in engine.execute(sql):
        types[table][column] = sql_type
    return types


def define_views(engine: Engine, types: _Types) -> _Types:
    """Define the views `sound_logs` and `sound_ledger` of tables with these columns."""
    for table, columns in (("logs", COLUMNS), ("ledger", LEDGER_COLUMNS)):
        rows = sound_rows(types.get(table, {}), f"audit.{table}", columns)
        engine.execute(f"CREATE OR REPLACE TEMP VIEW sound_{table} AS {rows}")
    return types


# What `duckdb_extensions()` doesn't know of words before a colon.
_EXTENSIONS = {"postgresql": "postgres", "quack": "httpfs", "gs": "httpfs", "gcs": "httpfs", "r2": "httpfs"}


def load_extensions(engine: Engine, target: str, options: Mapping[str, object]) -> None:
    """Load what a target needs: what DuckDB installed, or a `duckdb-extension-*` package."""
    texts = " ".join([target, *map(str, options.values())]).lower()
    words = re.findall(r"(?<![a-z0-9])([a-z0-9]{2,}):", texts)
    words += [_EXTENSIONS[word] for word in words if word in _EXTENSIONS]
    engine.execute("SET autoload_known_extensions = true")  # for what these load in turn
    sql = f"""\
SELECT extension_name, installed, library_version FROM duckdb_extensions(), pragma_version()
WHERE NOT loaded AND list_has_any([extension_name] || aliases, {sql_literal(words)}) ORDER BY ALL"""
    for name, is_installed, version in engine.execute(sql):
        file = file_of_package(f"duckdb_extension_{name}", "extensions", version, f"{name}.duckdb_extension")
        if not (is_installed or file):
            package = f"duckdb-extension-{name.replace('_', '-')}=={version[1:]}"
            text = f"lacks its extension {name}: run `INSTALL {name}` in it once, or pip install {package}"
            raise DatabaseUnreachableError(f"DuckDB {version} {text}")
        engine.execute(f"LOAD {name if is_installed else sql_literal(file)}")
    if "postgres" in words:  # it would refuse a batch for one NUL
        engine.execute("SET pg_null_byte_replacement = chr(65533)")


# == Ledger ==
# depends on: Errors, Events, Journal, SQL, Engines, Target
#
# What is in the database, sealed (docs/security.md). What changes `logs` does it in `Ledger.writing`, and
# enters what it did.


class Head(NamedTuple):
    """The end of a journal's chain; noted elsewhere, it proves everything before it."""

    journal: str
    position: int  # of the last entry, from 1
    events: int  # of all segments so far, purged ones included
    seal: str


_KEYED = "k:"  # begins a seal made with a key


def seal_keys(environ: Mapping[str, str] = os.environ) -> tuple[bytes, ...]:
    """Return the keys of the chain, of which the first one seals."""
    import hashlib  # it loads OpenSSL, which takes 4 ms

    lines = [environ.get("MXCP_AUDIT_KEY", "").encode("utf-8", "surrogateescape")]
    if path := environ.get("MXCP_AUDIT_KEY_FILE"):
        try:
            with open(path, "rb") as file:
                lines = [line.strip() for line in file]
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    raise ConfigError("others may read the key file; run chmod 600 on it", path=path)
        except OSError as error:
            text = f"the key file can't be read: {error.strerror}; correct MXCP_AUDIT_KEY_FILE"
            raise ConfigError(text, path=path) from error
        if not any(lines):
            raise ConfigError("the key file is empty; write a key on its first line", path=path)
    # Not the keys themselves: redaction shows HMACs with the first.
    return tuple(hashlib.sha256(b"mxcp_audit seal\0" + line).digest() for line in lines if line)


def make_seal(previous: str, row: str, key: bytes | None) -> str:
    """Return the seal of an entry."""
    import hashlib
    import hmac

    text = f"{previous}|{row}".encode()
    if key is None:
        return hashlib.sha256(text).hexdigest()
    return _KEYED + hmac.digest(key, text, "sha256").hex()


def entries_of(segments: Iterable[str]) -> str:
    """Return the query of the entries of staged segments."""
    return f"""\
SELECT 'segment' AS kind, claimed AS segment, coalesce(events, 0) AS events, first_event, last_event, digest,
  marks FROM (SELECT unnest({sql_literal(list(segments))}) AS claimed)
LEFT JOIN ({digests("batch", order="seq")}) ON segment = claimed ORDER BY claimed"""


def entry_of(kind: str, events: int, detail: str, **more: str | int | None) -> str:
    """Return the query of another entry; times are in microseconds."""
    return "SELECT " + ", ".join(
        f"{'make_timestamp' if name.endswith('_event') else ''}({sql_literal(value)}) AS {name}"
        for name, value in {"kind": kind, "events": events, "detail": detail, **more}.items()
    )


_LEGACY_ROWS = 250_000  # whose hashes fit a guest's memory


class Ledger(Target):
    """A target with its ledger, which continues the chain of one journal."""

    head: Head | None = None  # as this process last committed it
    _next_head: Head | None = None

    @contextlib.contextmanager
    def writing(self, engine: Engine) -> Iterator[None]:
        """Run the block as one durable transaction; a journal has one at a time."""
        self.create_tables(engine)
        ask, self._next_head = engine.execute, self.head
        ask("BEGIN")
        if self.is_lake:
            ask(f"UPDATE audit.turn_{self.journal.identity()} SET taken = taken + 1")
        yield
        ask("COMMIT")
        self.head = self._next_head
        if self.is_lake:
            ((commit,),) = ask("SELECT id::BIGINT FROM ducklake_last_committed_snapshot('audit')")
            self.commits.append(commit or 0)
        if self.is_file:  # elsewhere CHECKPOINT means maintenance, or nothing
            ask("CHECKPOINT audit")

    def take(self, engine: Engine, segments: Collection[str], entries: list[str]) -> None:
        """Move `batch`, the rows of segments, into `logs`, and enter that, and other entries."""
        if segments:
            self.change_logs(engine, INSERT_ROWS)
            entries = [entries_of(segments), *entries]
        if entries:
            self.enter(engine, entries)

    def enter(self, engine: Engine, entries: Iterable[str]) -> None:
        """Append the entries of queries to the chain; the rows of an older table come first."""
        import platform

        ask, keys, journal = engine.execute, seal_keys(), self.journal.identity()
        (head,) = chain_heads(engine, journal) or [Head(journal, 0, 0, "")]
        if head.seal.startswith(_KEYED) and not keys:
            text = "the ledger is sealed with a key, and an entry without it would look forged: "
            raise StoreError(text + "set MXCP_AUDIT_KEY or MXCP_AUDIT_KEY_FILE")
        ask(f"CREATE OR REPLACE TEMP TABLE entries ({LEDGER_DEFINITIONS})")
        if is_ledger_empty(engine):
            days = ask(ranges("segment IS NULL"), {"size": _LEGACY_ROWS})
            entries = [*(_legacy_entries(*span) for span in days), *entries]
        for query in entries:
            ask(f"INSERT INTO entries BY NAME {query}")
        now = {"journal": journal, "last": head.position, "host": platform.node(), "now": sql_time(utc_now())}
        numbered = """\
CREATE OR REPLACE TEMP TABLE numbered AS SELECT * REPLACE ($journal AS journal, $host AS host,
  $last + row_number() OVER (ORDER BY rowid) AS position, $now::TIMESTAMP AS ingested_at) FROM entries"""
        ask(numbered, now)
        seals = []
        rows = f"SELECT position, kind, events, {ENTRY_HASH} FROM numbered ORDER BY position"
        for place, kind, count, row in ask(rows):
            seal = make_seal(head.seal, row, keys[0] if keys else None)
            head = Head(journal, place, head.events + count * (kind == "segment"), seal)
            seals.append((place, seal))
        sealed = listed("place BIGINT, sealed VARCHAR", seals)
        ask(f"""\
INSERT INTO audit.ledger BY NAME
SELECT numbered.* REPLACE (sealed AS seal) FROM numbered JOIN ({sealed}) ON position = place""")
        self._next_head = head


def _legacy_entries(first: str, last: str) -> str:
    days = f"segment IS NULL AND {SEGMENT_OR_DAY} BETWEEN '{first}' AND '{last}'"
    return f"""\
SELECT 'legacy' AS kind, segment, events, first_event, last_event, digest
FROM ({digests("sound_logs", days, segment=SEGMENT_OR_DAY)}) ORDER BY segment"""


def is_ledger_empty(engine: Engine) -> bool:
    return not engine.execute("SELECT true FROM audit.ledger LIMIT 1")


def chain_heads(engine: Engine, journal: str | None = None) -> list[Head]:
    """Return the end of each journal's chain, or of one."""
    sql = """\
SELECT coalesce(journal, ''), max(position), coalesce(sum(events) FILTER (WHERE kind = 'segment'), 0)::BIGINT,
  coalesce(arg_max(seal, position), '')
FROM sound_ledger WHERE $journal IS NULL OR journal = $journal GROUP BY ALL ORDER BY ALL"""
    return [Head(*row) for row in engine.execute(sql, {"journal": journal})]


def known_segments(engine: Engine, segments: Collection[str], *, kind: str = "segment") -> set[str]:
    """Return which of the segments have an entry of a kind."""
    sql = f"SELECT segment FROM sound_ledger WHERE kind = '{kind}' AND {among('segment', segments)}"
    return {segment for (segment,) in engine.execute(sql)} if segments else set()


def unknown_segments(engine: Engine, paths: Collection[str], *, kind: str = "segment") -> list[str]:
    """Return the files of segments, or of losses, that the ledger lacks."""
    known = known_segments(engine, [segment_id_of(path) for path in paths], kind=kind)
    return [path for path in paths if segment_id_of(path) not in known]


# == Ingest ==
# depends on: Errors, Encoding, Journal, Writer, SQL, Engines, Target, Ledger
#
# Moves segments into `logs` exactly once (docs/design.md). The caller holds the ingest lock.

INGEST_BYTES = 64 * 2**20  # in one transaction: fits a guest's memory
_LONGEST_READ = 2**25  # a longer line is put aside: DuckDB needs several times its size
_LINE_SEQ = re.compile(rb',"seq":[0-9]+\}$')
_CONFLICT_SECONDS = 1.5  # tries while other hosts write, too
_Faults: TypeAlias = dict[str, list[tuple[int, str, bytes]]]  # by segment: number, reason, line


def ingest_journal(target: Ledger, told: Diagnostics) -> list[JournalError]:
    """Ingest all that can be claimed; return what prevented the rest."""
    seen: set[str] = set()  # an undeletable segment would be claimed for ever
    while True:
        claims, problems = target.journal.claim(limit_bytes=INGEST_BYTES, skip=seen)
        is_more, lost = target.journal.take_unfinished(), target.journal.losses()
        if claims or lost:
            _take(target, told, claims, lost)
        seen.update(claim.id for claim in claims)
        if not claims and not is_more:
            return problems


def _take(target: Ledger, told: Diagnostics, claims: list[Claim], lost: Mapping[str, Loss]) -> None:
    """Ingest segments, in halves if need be; then delete and count them."""
    refuse_fatal_limit()
    wait = 0.0 if target.is_file else _CONFLICT_SECONDS
    try:
        with (
            contextlib.closing(target.open_engine(guest=True)) as engine,
            scratch_folder(target.journal.directory) as folder,
        ):
            faults, fresh = patiently(lambda: _move(engine, target, claims, lost, folder), wait)
    except QueryError as error:
        if not is_data_fault(error) or len(claims) < 2:
            raise
        half = len(claims) // 2  # one of them is damaged, or needs too much memory
        _take(target, told, claims[:half], lost)
        _take(target, told, claims[half:], {})
        return
    for claim in claims:
        count = len(faults.get(claim.id, ()))
        if claim.id in fresh:
            told.ingested += claim.lines - count
        if count:
            told.rejected += count
            text = f"{counted(count, 'line')} of {claim.path} can't be ingested; they are in .rejected"
            told.report("rejected", text)
        if claim.torn:
            text = f"{claim.path} ended within a line; {counted(claim.torn, 'byte')} kept in .torn"
            told.report("torn", text)
    for path in [*(claim.path for claim in claims), *lost]:
        try:
            os.unlink(path)
        except OSError as error:
            told.report("delete", f"{path} can't be deleted; it is not ingested again", error=error)


def _stage(engine: Engine, claims: list[Claim], folder: str) -> _Faults:
    """Read the segments into `batch`; return the lines that can't be."""
    wanted = {claim.id: [claim.lines] * 3 for claim in claims}
    try:
        if not claims or _stage_files(engine, combine([claim.path for claim in claims], folder)) == wanted:
            return {}
    except QueryError as error:
        if not is_data_fault(error):
            raise
    if len(claims) > 1:
        raise QueryError("Invalid Input Error: a segment holds lines that can't be read")
    return {claims[0].id: _salvage(engine, claims[0], folder)}


def _stage_files(engine: Engine, files: Sequence[str], *, lenient: bool = False) -> dict[str, list[int]]:
    """Stage files; return each segment's numbers of seqs, different seqs and times."""
    longest = min(max(LONGEST_LINE, *(os.stat(path).st_size + 1 for path in files)), _LONGEST_READ)
    engine.execute(STAGE, {"files": files, "longest": longest, "lenient": lenient})
    sql = "SELECT segment, count(seq), count(DISTINCT seq), count(timestamp) FROM batch GROUP BY ALL"
    return {segment: counts for segment, *counts in engine.execute(sql)}


def _salvage(engine: Engine, claim: Claim, folder: str) -> list[tuple[int, str, bytes]]:
    """Stage the good lines of a segment, and return the others."""
    good: dict[int, tuple[int, bytes]] = {}  # by seq
    faults: list[tuple[int, str, bytes]] = []
    # After a power loss NULs stand for lost blocks; the line after them is whole.
    lines = re.split(rb"\n|\0(?=\{)", read_file(claim.path))[:-1]
    claim.lines = len(lines)
    for number, line in enumerate(lines, 1):
        try:
            seq = event_of_line(line)["seq"]
            if seq in good:
                raise ValueError(f"seq {seq} stands twice")
            if len(line) > _LONGEST_READ:
                raise ValueError("it is too long for DuckDB's memory")
            good[seq] = number, line
        except ValueError as error:
            faults.append((number, str(error), line))
    scratch = os.path.join(folder, COMBINED + SEGMENT_SUFFIX)
    replace_file(scratch, named_lines(claim.id, b"".join(line + b"\n" for _, line in good.values())))
    _stage_files(engine, [scratch], lenient=True)  # what DuckDB can't read has no seq
    seqs = among("seq", [0, *good])
    engine.execute(f"DELETE FROM batch WHERE timestamp IS NULL OR ({seqs}) IS NOT TRUE")
    for (seq,) in engine.execute("SELECT seq FROM batch"):
        good.pop(seq, None)
    return faults + [(number, "DuckDB can't read it", line) for number, line in good.values()]


def _move(
    engine: Engine, target: Ledger, claims: list[Claim], lost: Mapping[str, Loss], folder: str
) -> tuple[_Faults, set[str]]:
    """Move segments into the database; return bad lines, and the segments that were new to it."""
    faults, more, entries = _stage(engine, claims, folder), list[list[bytes]](), list[str]()
    with target.attached(engine, write=True, make=True), target.writing(engine):
        known = known_segments(engine, [claim.id for claim in claims])
        fresh = [claim for claim in claims if claim.id not in known]
        if known:
            more = _strange_lines(engine, [claim for claim in claims if claim.id in known], faults)
            where = among("segment", known)
            engine.execute(f"DELETE FROM batch WHERE {where}")
            if target.is_file:  # let the checkpoint write: after a failed fsync the disk may lack it
                touch = "UPDATE audit.ledger SET ingested_at = ingested_at WHERE kind = 'segment'"
                engine.execute(f"{touch} AND {where}")
        _put_aside_late(engine, fresh, faults)
        text = "lines that could not be ingested, kept in the journal as .rejected"
        for claim in claims:
            if lines := faults.get(claim.id):
                claim.reject(sorted(lines))
                entries.append(entry_of("loss", len(lines), text, segment=claim.id))
        for path in unknown_segments(engine, lost, kind="loss"):
            loss = lost[path]
            text = f"{loss.reason}, between {loss.first} and {loss.last}"
            entries.append(entry_of("loss", loss.events, text, segment=segment_id_of(path)))
        target.take(engine, ids := [claim.id for claim in fresh], entries)
    for rest in more:  # not before the commit: after a failed one they come again
        numbered = [finish_line(_LINE_SEQ.sub(b"", line), seq) for seq, line in enumerate(rest, 1)]
        opened = target.journal.open_segment()
        opened.append(b"".join(numbered), len(numbered), durable=True)
        opened.seal()
    return faults, {*ids}


def _put_aside_late(engine: Engine, claims: list[Claim], faults: _Faults) -> None:
    """Take the ends of calls on record as unfinished out of `batch`."""
    calls = {call for claim in claims for call in claim.calls}
    if not calls:
        return
    since = f"try_strptime({sql_literal(min(calls)[:22])}, '%Y%m%dT%H%M%S%fZ') - INTERVAL 1 MINUTE"
    call_of = """regexp_extract(context, '"mxcp.call": ?"([^"]+)"', 1)"""
    sql = f"""\
SELECT DISTINCT {call_of} AS call FROM audit.logs WHERE timestamp >= coalesce({since}, '-infinity')
  AND error = {sql_literal(UNFINISHED)} AND {among(call_of, calls)}"""
    late = {call for (call,) in engine.execute(sql)}
    reason = "its call is on record already, as unfinished"
    for claim in claims:
        calls = claim.calls.keys() & late
        lines = read_file(claim.path).splitlines() if calls else []
        for seq, call in sorted((claim.calls[call], call.encode()) for call in calls):
            engine.execute(f"DELETE FROM batch WHERE segment = '{claim.id}' AND seq = {seq}")
            line = next((line for line in lines if call in line), b"")
            faults.setdefault(claim.id, []).append((seq, reason, line))


def _strange_lines(engine: Engine, claims: list[Claim], faults: _Faults) -> list[list[bytes]]:
    """Return lines that the ledger lacks at the end of known segments: a cloned host goes on with a copy."""
    same: dict[str, int] = dict(engine.execute(KNOWN_LINES, {"segments": [claim.id for claim in claims]}))
    reason, more = "the ledger knows a segment of this name with other lines", []
    for claim in claims:
        lines = read_file(claim.path).split(b"\n")[:-1]
        strange = [] if claim.id in same else lines
        faults[claim.id] = [(number, reason, line) for number, line in enumerate(strange, 1)]
        more.append(lines[same.get(claim.id, len(lines)) :])
    return [*filter(None, more)]


def refuse_fatal_limit() -> None:
    """Raise StoreError where a file beyond RLIMIT_FSIZE kills the process."""
    import signal

    fatal = getattr(signal, "SIGXFSZ", None)
    if fatal and signal.getsignal(fatal) is signal.SIG_DFL and file_size_limit() != float("inf"):
        raise StoreError("RLIMIT_FSIZE is set and SIGXFSZ kills; lift one. Events wait in the journal")


# == Reading ==
# depends on: Errors, Events, Journal, SQL, Engines, Target, Ledger
#
# Table and journal as one log, in which every event is seen once (docs/design.md).

_BOTH = ("sound_logs", "journal_rows")


class Reading:
    """Table and journal, open for reading; the journal alone if there is a `problem`."""

    def __init__(self, engine: Engine, folder: str, target: Target) -> None:
        self.engine, self._folder, self._target, self._journal = engine, folder, target, target.journal
        self.problem: StoreError | None = None
        self.schema: str | None = None  # in which PostgreSQL itself selects first rows
        self.oddities: list[str] = []
        self.has_table = self.has_journal = self._is_attached = False

    def open(self, wait: float) -> contextlib.ExitStack:
        """Open both, or the journal alone; closing the result closes them."""
        for _ in tries(wait):
            try:
                self.problem = None
                return self._open(with_table=True)
            except (DatabaseLockedError, DatabaseNotFoundError) as error:
                if isinstance(error, DatabaseNotFoundError) and not self._target.is_file:
                    break
                self.problem = error  # a file may appear, or vanish, between our look and DuckDB's
            except (DatabaseCorruptError, DatabaseUnreachableError) as error:
                self.problem = error
                break
        return self._open(with_table=False)

    def _open(self, *, with_table: bool) -> contextlib.ExitStack:
        target, types = self._target, _Types()
        with contextlib.ExitStack() as stack:
            self._is_attached = with_table and not target.is_absent()
            if not (self._is_attached and target.is_file):  # no lock of DuckDB's keeps ingests out
                is_ours = True
                with suppress(JournalError):  # this user may only read the journal
                    is_ours = stack.enter_context(self._journal.ingest_lock(shared=True))
                if with_table and not is_ours:
                    text = "this host's journal is being ingested; try again"
                    raise DatabaseLockedError(f"{target.name}: {text}")
            if self._is_attached:
                stack.enter_context(target.attached(self.engine))
            segments = self._segments()
            if self._is_attached:
                types, self.oddities = target.view_tables(self.engine), target.oddities(self.engine)
            if any(text.endswith(VIEW) for text in self.oddities):  # it could read any file
                types = {}
                text = "what should be a table is a view, and is not read"
                self.problem = StoreError(f"{target.name}: {text}")
            table = define_views(self.engine, types).get("logs")
            self.has_table = bool(table)
            if types.get("ledger") and not table:
                self.oddities.append("logs is missing beside its ledger")
            if target.is_postgres and table == dict(COLUMNS):  # it lacks what is converted
                self.schema = target.schema
            segments = unknown_segments(self.engine, segments)
            self.has_journal = any(map(_size_of, segments))
            self._define("journal_rows", journal_rows(segments, self._folder))
            return stack.pop_all()

    def _segments(self) -> list[str]:
        """Return the segments, and files of ends that unfinished calls will get."""
        left = {path: lines for path, lines in self._journal.unfinished() if lines}
        segments = self._journal.segments()  # later: a call may end in between
        for path in left.keys() - {*segments}:
            segments.append(os.path.join(self._folder, os.path.basename(path)))
            replace_file(segments[-1], left[path])
        return segments

    def open_running(self, lines: bytes) -> None:
        """Define the view `running_rows` of calls that run, with seq 0."""
        path = os.path.join(self._folder, new_segment_id(0) + SEGMENT_SUFFIX)
        if lines:
            write_file(path, lines)
        self._define("running_rows", journal_rows([path], self._folder))

    def _define(self, view: str, rows: str) -> None:
        self.engine.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS {rows}")

    def freeze_journal(self) -> None:
        """Copy the journal's events, for queries that must see the same."""
        self.engine.execute("CREATE OR REPLACE TEMP TABLE journal_copy AS SELECT * FROM journal_rows")
        self._define("journal_rows", "SELECT * FROM journal_copy")

    def _source(self, what: Filter, views: Sequence[str] = _BOTH, tail: str = "") -> str:
        """Return the query of the events in these views."""
        where = what.where()
        return " UNION ALL BY NAME ".join(f"(SELECT * FROM {view} WHERE {where}{tail})" for view in views)

    def _select(
        self, columns: str, what: Filter, count: int | None, oldest_first: bool, views: Sequence[str] = _BOTH
    ) -> str:
        order = OLDEST_FIRST if oldest_first else NEWEST_FIRST
        tail = f" ORDER BY {order}{'' if count is None else f' LIMIT {count}'}"
        if self.schema is not None and count is not None and what.text is None and views is _BOTH:
            way = "" if oldest_first else " DESC"  # not for a text, because ILIKE differs there
            views = (_postgres_rows(self.schema, what.where(), count, way), "journal_rows")
        # A limit on the union alone is 40 times slower on 10 million rows.
        source = self._source(what, views, "" if count is None else tail)
        return f"SELECT {columns} FROM (SELECT * FROM ({source}){tail})"

    def rows(
        self, what: Filter, *, count: int | None = 100, oldest_first: bool = False, columns: str = ""
    ) -> Iterator[Row]:
        """Yield matching events, newest first, as PUBLIC_COLUMNS or other columns."""
        return self.engine.stream(self._select(columns or public_select(), what, count, oldest_first))

    def running(self, what: Filter, *, count: int = 100) -> list[Row]:
        """Return matching calls that run on this host, oldest first."""
        return self.engine.execute(self._select(public_select(), what, count, True, ("running_rows",)))

    def stats(self, what: Filter, *, by: str, sort: str = "calls", count: int = 100) -> list[Row]:
        """Return a row for each group of events: its name, then STATS_COLUMNS."""
        source = self._source(what, (*_BOTH, "running_rows"))
        return self.engine.execute(stats_query(source, by, sort, count))

    def ask(self, what: Filter, sql: str) -> list[Row]:
        """Run a query over `events`, the matching ones with their ids."""
        events = f"WITH events AS (SELECT *, {EVENT_ID} AS event_id FROM ({self._source(what)}))"
        return self.engine.execute(f"{events} {sql}")

    def around(self, session: str, event_id: str, count: int) -> list[Row]:
        """Return an event and up to `count` of its session before and after it."""
        sql = f"""\
SELECT {public_select()} FROM (SELECT *, row_number() OVER (ORDER BY {OLDEST_FIRST}) AS place FROM events)
QUALIFY abs(place - max(place) FILTER (WHERE event_id = {sql_literal(event_id)}) OVER ()) <= {count}
ORDER BY place"""
        return self.ask(Filter(session=session), sql)

    def ids_like(self, part: str) -> list[Row]:
        """Return up to three event ids with `part` at the beginning or behind the time."""
        condition = f"event_id LIKE {sql_literal(f'{part}%')} OR event_id LIKE {sql_literal(f'%-{part}')}"
        return self.ask(Filter(), f"SELECT event_id FROM events WHERE {condition} LIMIT 3")

    def losses(self, since: str = "-infinity") -> list[Row]:
        """Return when lost events were entered, how many, and why; then those that wait for it."""
        sql = f"""\
SELECT strftime(ingested_at, {_ISO_FORMAT}), events, coalesce(detail, '') FROM sound_ledger
WHERE kind = 'loss' AND ingested_at > $since::TIMESTAMP ORDER BY ingested_at, position"""
        waiting = [("not yet", loss.events, str(loss)) for loss in self._journal.losses().values()]
        return self.engine.execute(sql, {"since": since}) + waiting

    def query(self, statement: str) -> tuple[list[str], Iterator[Row]]:
        """Run one SELECT over the view `logs` and return its column names and its rows.

        It can read nothing else, because the rest of the session is locked. Values are those of JSON, and
        text if it has none such (times, bytes).
        """
        ask = self.engine.execute
        self.freeze_journal()
        columns = ", ".join(PUBLIC_COLUMNS[:-1])
        self._define("logs", f"SELECT {columns}, {EVENT_ID} AS event_id FROM ({self._source(Filter())})")
        if self._is_attached and self._target.is_lake:
            metadata = "__ducklake_metadata_audit.ducklake_metadata"
            for (path,) in ask(f"SELECT value FROM {metadata} WHERE key = 'data_path'"):
                ask(f"SET allowed_directories = [{sql_literal(path)}]")
        ask("SET enable_external_access = false")
        ask("SET lock_configuration = true")  # last, because nothing can undo it
        params = {"statement": statement}
        described = "SELECT column_name, column_type FROM (DESCRIBE SELECT * FROM query($statement))"
        names, types = zip(*ask(described, params))
        places = [f"c{number}" for number in range(len(names))]
        values = ", ".join(  # as text, for DuckDB 1.2
            f"to_json({place}{'::VARCHAR' if kind in ('BLOB', 'BIT') else ''})::VARCHAR AS {place}"
            for place, kind in zip(places, types)
        )
        sql = f"SELECT {values} FROM (SELECT * FROM query($statement)) AS result({', '.join(places)})"
        found = self.engine.stream(sql, params)
        return [*names], (tuple(text and decode_json(text) for text in row) for row in found)

    def export(
        self,
        what: Filter,
        path: str,
        *,
        form: str = "csv",
        count: int | None = None,
        oldest_first: bool = False,
        raw: bool = False,
        bom: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Write matching events to a file, whole or not at all; return their number."""
        self.freeze_journal()
        ((matching,),) = self.engine.execute(f"SELECT count(*) FROM ({self._source(what)})")
        columns = _NAMES
        if form != "duckdb":
            columns = public_select(typed=form == "parquet", harmless=form.startswith("csv") and not raw)
        if bom:  # it begins the first column's name
            columns = columns.replace(" AS timestamp,", ' AS "\ufefftimestamp",', 1)
        sql = self._select(columns, what, count, oldest_first)
        problem = f"{path} can't be written"
        with _scratch(path, problem) as scratch:
            target = os.path.join(scratch, "export")
            try:
                with _watched(target, progress) if progress else contextlib.nullcontext():
                    self._write(sql, target, form)
            except QueryError as error:
                raise StoreError(f"{problem}: {error}") from error
            set_mode(target, FILE_MODES[False])
            give_to_owner(target)
            os.replace(target, path)
        return int(matching if count is None else min(count, matching))

    def _write(self, sql: str, target: str, form: str) -> None:
        """Write a query's rows to a new file."""
        execute = self.engine.execute
        if form == "sqlite":
            import sqlite3

            marks = ", ".join("?" * len(PUBLIC_COLUMNS))
            with contextlib.closing(sqlite3.connect(target)) as file, file:
                file.execute(f"CREATE TABLE logs ({', '.join(PUBLIC_COLUMNS)})")
                file.executemany(f"INSERT INTO logs VALUES ({marks})", self.engine.stream(sql))
        elif form == "duckdb":
            if self._is_attached and not self._target.is_file:  # its transaction writes nowhere else
                execute(f"CREATE TEMP TABLE exported AS {sql}")
                execute("COMMIT")
                sql = "SELECT * FROM exported"
            attach(self.engine, target, "copy", NEW_FILE)
            for statement in (f"CREATE TABLE copy.logs AS {sql}", "CHECKPOINT copy", "DETACH copy"):
                execute(statement)
        else:
            execute(f"COPY ({sql}) TO {sql_literal(target)} ({COPY_OPTIONS[form]})")


@contextlib.contextmanager
def _watched(path: str, progress: Callable[[int], None]) -> Iterator[None]:
    """Tell the size of a growing file twice a second."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            progress(_size_of(path))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _postgres_rows(schema: str, where: str, count: int, way: str) -> str:
    """Let PostgreSQL select the first rows: DuckDB hands it no ORDER BY and no LIMIT."""
    table = f'''SELECT * FROM "{schema.replace('"', '""')}".logs WHERE {where} AND timestamp IS'''
    order = f'timestamp{way}, segment COLLATE "C"{way} NULLS LAST, seq{way} NULLS LAST'  # as here
    query = f"({table} NOT NULL ORDER BY {order} LIMIT {count}) UNION ALL ({table} NULL LIMIT {count})"
    return f"(SELECT * FROM postgres_query('audit', {sql_literal(query)}))"


def journal_rows(segments: Sequence[str], folder: str) -> str:
    """Return the SELECT of the events in segments, which may be combined in `folder`."""
    if not (files := combine(segments, folder)):
        return sound_rows({})
    longest = max(LONGEST_LINE, *(_size_of(path) + 1 for path in segments))
    return bind(JOURNAL_ROWS, {"files": files, "longest": longest, "lenient": True})


# == Evidence ==
# depends on: Errors, Events, Journal, SQL, Engines, Target, Ledger
#
# Recomputes what the ledger records and names the differences. A purge asks here first, so that what was
# changed stays known as changed.

_MAX_FINDINGS = 1000  # more are counted, not kept
_SCOPE = "CREATE OR REPLACE TEMP TABLE scope AS"
_YOUNGER = """\
SELECT segment FROM sound_ledger WHERE kind IN ('segment', 'legacy') AND last_event >= $moment::TIMESTAMP"""


class Finding(NamedTuple):
    """One difference from what the ledger says."""

    kind: str  # changed, removed, inserted (events); chain, cut (the ledger); table (its form)
    text: str
    segment: str | None = None
    seqs: tuple[int, ...] = ()  # of its events, as far as known
    journal: str | None = None  # whose chain


class Compared(NamedTuple):
    """A segment in the ledger and in `logs`, as `comparison` selects it."""

    journal: str
    position: int  # -1: it is not in the ledger
    segment: str
    entered: int  # events
    due: int  # of these, after purges
    as_due: bool  # exactly these were found
    found: int
    first: int | None  # microseconds since the epoch
    last: int | None
    digest: str | None


def runs_of(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield numbers as the first and last of each run."""
    for _, run in itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        (_, first), *rest = run
        yield first, first + len(rest)


class Taken(NamedTuple):
    """What a purge says that it took: entries; in the form of 0.1, the old ones of their events."""

    is_old: bool
    before: int
    spans: list[tuple[str, int, int]]  # of a chain, from and to
    kept: Sequence[tuple[str, int, str]]  # by an old one, of a segment: how many events, their digest
    wrong: list[tuple[str, int, int]]  # segment, events found, events entered


def taken_by(detail: str | None) -> Taken | None:
    """Return what the text of a purge says; None if it can't be read."""

    def number(value: object) -> int:
        if abs(given := int(str(value))) > 2**62:
            raise ValueError
        return given

    try:
        said = json.loads(detail or "")
        is_old = said.get("removed") is None
        spans = {name: [(1, head)] for name, head in said["heads"].items()} if is_old else said["removed"]
        taken = Taken(
            is_old,
            number(said["before"]),
            [(name, number(a), number(b)) for name, pairs in spans.items() for a, b in pairs if 0 < a <= b],
            [(name, number(left[0]), str(left[1])) for name, left in said["left"].items()] if is_old else (),
            sorted((name, number(it[0]), number([*it, 0][2])) for name, it in said["wrong"].items()),
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
    return None if "\\x00" in repr(taken) else taken  # no statement may hold a NUL


class Verdict:
    """What `verify` finds when it recomputes all that the ledger records."""

    more_findings = 0  # beyond those that are listed
    entries = segments = purged = lost = 0
    events = 0  # purged ones included
    legacy = 0  # rows that are older than the ledger
    waiting_bytes = 0  # in the journal, not sealed yet
    range_events = 1_000_000  # whose hashes, 100 to 300 bytes each, are held at once
    progress: Callable[[int, int], None] | None = None  # told events done and all

    def __init__(self, engine: Engine, target: Target, keys: Sequence[bytes] = ()) -> None:
        self._engine, self._target, self._keys, self._ask = engine, target, keys, engine.execute
        self._covered: dict[str, int] = {}  # by journal: the last position that a checkpoint covers
        self.doubted: set[tuple[str, int]] = set()  # entries that are not believed
        self.findings: list[Finding] = []
        self.notes: list[str] = []  # what could not be known
        self.heads: list[Head] = []
        self.purges: list[dict[str, Any]] = []  # the entries of those that no checkpoint covers

    @property
    def intact(self) -> bool:
        return not self.findings

    def _add(self, kind: str, text: str, **more: Any) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(Finding(kind, text, **more))
        else:
            self.more_findings += 1

    def run(self, *, checkpoint: Sequence[Head] = (), since: str | None = None) -> None:
        """Verify the chains, then each segment."""
        if self.open(checkpoint):
            if since is not None:
                rows = f"SELECT {SEGMENT_OR_DAY} FROM sound_logs WHERE timestamp >= $moment::TIMESTAMP"
                self._ask(f"{_SCOPE} {_YOUNGER} UNION {rows}", {"moment": since})
            for row in self.compare(scoped=since is not None):
                if not row.as_due:
                    self._judge(row)
        elif self._keys or checkpoint:
            self._add("table", "there is no ledger, so that nothing can be proved")
        if self._keys and not checkpoint:
            self.notes.append("without a checkpoint it can't be known whether the end, or all, was cut off")

    def open(self, checkpoint: Sequence[Head] = ()) -> bool:
        """Check the tables' form, the chains and the purges; False if there is no ledger."""
        types = self._target.view_tables(self._engine)
        has_ledger = bool(types["ledger"] or "segment" in types["logs"])
        for text in self._target.oddities(self._engine):
            self._add("table", text)
        logs = COLUMNS if has_ledger else COLUMNS[:10]
        for table, columns in (("logs", logs), ("ledger", LEDGER_COLUMNS)):
            for column in columns if types[table] else ():
                name, sql_type = column
                given = types[table].get(name)
                same = SAME_VALUES[sql_type] if table == "logs" else {sql_type}
                # What a table of 0.1 lacks is NULL, which leaves the hash as it was.
                if given not in same and (given or column not in NEW_COLUMNS):
                    self._add("table", f"{table}.{name} is {given or 'missing'}, not {sql_type}")
        if not has_ledger:
            ((self.legacy,),) = self._ask("SELECT count(*) FROM sound_logs")
        self._walk_chains({(head.journal, head.position): head for head in checkpoint})
        self._read_purges(has_checkpoint=bool(checkpoint))
        return has_ledger

    def _walk_chains(self, wanted: dict[tuple[str, int], Head]) -> None:
        """Check every seal, and that the chains meet the checkpoints."""
        totals = collections.Counter[str]()
        for name, entries in itertools.groupby(self._engine.stream(CHAIN), key=lambda row: row[0]):
            head, unkeyed = Head(name, 0, 0, ""), list[tuple[str, int]]()
            for _, position, kind, events, seal, row in entries:
                place, faults = (name, position), []
                if position != head.position + 1:
                    faults = [f" comes after {head.position}: removed or added"]
                keys: Sequence[bytes | None] = self._keys if seal.startswith(_KEYED) else [None]
                if not keys:
                    faults += [" is sealed with a key that is not given"]
                elif all(make_seal(head.seal, row, key) != seal for key in keys):
                    faults += [", or the one before, was changed"]
                elif self._keys and keys == [None]:
                    unkeyed.append(place)
                for fault in faults:
                    self.doubted.add(place)
                    self._add("chain", f"entry {position} of journal {name}{fault}", journal=name)
                head = Head(name, position, head.events + events * (kind == "segment"), seal)
                if wanted.get(place) == head:
                    del wanted[place]
                    unkeyed = []  # the checkpoint saw these
                    self._covered[name] = position
                self.entries += 1
                self.segments += kind == "segment"
                totals[kind] += events
            self.heads.append(head)
            if unkeyed:
                self.doubted.update(unkeyed)
                text = f"{len(unkeyed)}; if they are older than it, a checkpoint of that time settles it"
                self._add("chain", f"entries of journal {name} sealed without the key: {text}", journal=name)
        self.events, self.lost = totals["segment"], totals["loss"]
        self.legacy += totals["legacy"]
        for name, position in wanted:
            text = f"journal {name} doesn't lead to the checkpoint at entry {position}: cut or rewritten"
            self._add("cut", text, journal=name)

    def _read_purges(self, *, has_checkpoint: bool) -> None:
        """Compare each believed purge with the entries that it names."""

        def fault(text: str) -> None:
            text = f"purge {entry['position']} of journal {entry['journal']} {text}"
            self._add("chain", text, journal=entry["journal"])

        purges: list[tuple[int, dict[str, Any], Taken]] = []
        for number, (*values, detail) in enumerate(self._ask(PURGES)):
            entry = dict(zip(("moment", "host", "events", "journal", "position"), values))
            is_newer = entry["position"] > self._covered.get(entry["journal"], 0)
            if (entry["journal"], entry["position"]) in self.doubted:
                pass
            elif (taken := taken_by(detail)) is None:
                fault("can't be read")
            elif taken.kept and is_newer and has_checkpoint and not self._keys:
                fault("kept parts of segments, as earlier versions did, but is newer than the checkpoint")
            else:
                self.purged += entry["events"]
                self.purges += [entry] * is_newer
                purges.append((number, entry, taken))
        spans = [(number, *taken[:2], *span) for number, _, taken in purges for span in taken.spans]
        kept = [(number, *left) for number, _, taken in purges for left in taken.kept]
        spans_sql = "number BIGINT, is_old BOOLEAN, before BIGINT, journal VARCHAR, low BIGINT, high BIGINT"
        kept_sql = "number BIGINT, segment VARCHAR, events BIGINT, digest VARCHAR"
        self._ask(GONE.format(spans=listed(spans_sql, spans), kept=listed(kept_sql, kept)))
        sums = "least(sum(held), 2::HUGEINT**62)::BIGINT, bool_and(is_past)"
        rows = self._ask(f"SELECT number, {sums} FROM gone GROUP BY number")
        named = {number: rest for number, *rest in rows}
        for number, entry, taken in purges:
            held, is_past = named.get(number, (0, True))
            held += sum(found - entered for _, found, entered in taken.wrong)
            if not taken.is_old and not (is_past and held == entry["events"]):
                fault(f"took {entry['events']} events by its own words, but names {held}, or younger ones")
            for segment, found, _ in taken.wrong:
                text = f"segment {segment} was not as recorded when it was purged: {counted(found, 'event')}"
                self._add("changed", text, segment=segment)
        if kept:
            text = "purges by an earlier version kept parts of segments, of which nothing else is known"
            self.notes.append(text)

    def compare(self, *, scoped: bool) -> Iterator[Compared]:
        """Yield the segments in scope; without a scope, those that differ."""
        ask, size, sql = self._ask, self.range_events, comparison(scoped=scoped)
        ends = [last for _, last in ask(ranges(), {"size": size})][:-1]  # the last range is open
        for number, (low, high) in enumerate(zip([None, *ends], [*ends, None]), 1):
            yield from itertools.starmap(Compared, ask(sql, {"low": low, "high": high}))
            if self.progress is not None:
                self.progress(min(number * size, self.events), self.events)

    def _judge(self, row: Compared) -> None:
        """Report a segment that differs, its events if marks tell them."""
        segment, found, due = row.segment, row.found, row.due
        if not self.entries and segment.startswith("legacy-"):
            self.legacy += found  # an older table, of which nothing was entered yet
            return
        marked = self._marked(row) if found and due and not self.more_findings else {}
        for kind, seqs in sorted(marked.items()):
            names = ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs_of(seqs))
            self._add(kind, f"segment {segment}: {kind} {names}", segment=segment, seqs=tuple(sorted(seqs)))
        if not marked:
            kind = "removed" if found < due else "inserted" if found > due else "changed"
            text = f"not {due} as recorded" if row.position >= 0 else "which is not in the ledger"
            self._add(kind, f"segment {segment}: {counted(found, 'event')}, {text}", segment=segment)

    def _marked(self, row: Compared) -> dict[str, list[int]]:
        """Return which events were changed, inserted or removed, by marks."""
        ask = functools.partial(self._ask, params={"segment": row.segment})
        ((text,),) = ask("SELECT max(marks) FROM sound_ledger WHERE kind = 'segment' AND segment = $segment")
        due = dict(enumerate(re.findall("(?s)....", text or ""), 1))
        left, states = dict(due), collections.defaultdict[str, list[int]](list)
        sql = f"SELECT coalesce(seq, -1), {EVENT_HASH}[1:4] FROM sound_logs WHERE segment = $segment"
        for seq, mark in sorted(ask(sql) if due else (), key=lambda pair: due.get(pair[0]) != pair[1]):
            if seq not in left:
                states["inserted"].append(seq)
            elif left.pop(seq) != mark:
                states["changed"].append(seq)
        if left and len(due) == row.due:
            states["removed"] = list(left)
        return states


def plain_seals(engine: Engine) -> dict[str, str]:
    """Return the end of each journal's chain as if sealed without a key."""
    seals: dict[str, str] = {}
    for name, *_, row in engine.stream(CHAIN):
        seals[name] = make_seal(seals.get(name, ""), row, None)
    return seals


def prove(engine: Engine, event_id: str) -> dict[str, Any]:
    """Do what `Store.prove` says; docs/security.md describes the form."""
    segment, _, seq = event_id.rpartition(":")
    asked = {"segment": segment, "seq": int(seq) if seq.isdecimal() else -1}

    def first(columns: Sequence[Column], rest: str) -> dict[str, Any]:
        numbers = {"TIMESTAMP": TIME_NUMBER + " AS {0}"}
        values = ", ".join(numbers.get(sql_type, "{0}").format(name) for name, sql_type in columns)
        for row in engine.execute(f"SELECT {values} {rest} AND segment = $segment", asked):
            return dict(zip((column.name for column in columns), row))
        raise StoreError(f"{event_id} is in no segment of the ledger; the journal proves nothing")

    event = first(COLUMNS, "FROM sound_logs WHERE seq = $seq")
    entry = first(LEDGER_COLUMNS[:-1], "FROM sound_ledger WHERE kind = 'segment'")
    sql = f"SELECT {EVENT_HASH} AS hash FROM sound_logs WHERE segment = $segment ORDER BY seq, hash"
    hashes = [row for (row,) in engine.execute(sql, asked)]
    before, after = "", []
    for name, place, *_, row in engine.stream(CHAIN):
        if name == entry["journal"] and place < entry["position"]:
            before = make_seal(before, row, None)
        elif name == entry["journal"] and place > entry["position"]:
            after.append(row)
    return {"event": event, "entry": entry, "hashes": hashes, "before": before, "after": after}


def _ssh_keygen(arguments: Sequence[str], checkpoint: Mapping[str, Any]) -> str:
    import subprocess

    signed = {name: value for name, value in checkpoint.items() if name != "signature"}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
    command = ["ssh-keygen", "-Y", *arguments, "-n", "mxcp_audit"]
    try:
        done = subprocess.run(command, input=text, capture_output=True, check=True, timeout=60)
        return done.stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        raise StoreError(f"ssh-keygen: {said.strip() or error}") from error


def sign_checkpoint(key: str, checkpoint: Mapping[str, Any]) -> str:
    return _ssh_keygen(["sign", "-f", key], checkpoint)


def check_signature(signers: str, checkpoint: Mapping[str, Any]) -> str:
    """Return which allowed signer signed a checkpoint. Raises StoreError."""
    with scratch_folder() as folder:
        path = os.path.join(folder, "signature")
        write_file(path, str(checkpoint.get("signature", "")).encode())
        given = ["-f", signers, "-s", path]
        name = _ssh_keygen(["find-principals", *given], {}).partition("\n")[0]
        _ssh_keygen(["verify", "-I", name, *given], checkpoint)
    return name


# == Removal ==
# depends on: Errors, Events, Journal, SQL, Engines, Target, Ledger, Evidence
#
# Removes old events by whole segments, compared with the ledger, and enters what went.


class Removal(NamedTuple):
    """What a purge removed, or would remove."""

    before: str
    events: int
    segments: int
    kept: int  # events that are as old, in segments whose last event is not
    first_event: int | None  # microseconds since the epoch
    last_event: int | None
    digest: str  # SHA-256 over the segments' digests, in order of their names
    removed: Mapping[str, Sequence[tuple[int, int]]]  # by journal: runs of entries
    wrong: Mapping[str, tuple[int, str | None, int]]  # segments that were not as entered
    archive: str | None = None


def plan_removal(engine: Engine, target: Target, before: str) -> Removal:
    """Compare the segments before a moment with the ledger."""
    import hashlib

    verdict = Verdict(engine, target, seal_keys())
    verdict.range_events = 200_000  # a server's guest may purge
    has_ledger = verdict.open()
    # Segments whose rows are all older, and were so when they were entered.
    older = f"SELECT {SEGMENT_OR_DAY} AS segment FROM sound_logs GROUP BY ALL "
    older += "HAVING max(timestamp) < $moment::TIMESTAMP AND count(timestamp) = count(*)"
    engine.execute(f"{_SCOPE} {older} EXCEPT {_YOUNGER}", {"moment": before})
    digest, found = hashlib.sha256(), dict[str, Compared]()
    positions = collections.defaultdict[str, list[int]](list)
    wrong: dict[str, tuple[int, str | None, int]] = {}
    for row in verdict.compare(scoped=True):
        if row.segment not in found:  # else it has a second entry
            digest.update((row.digest or "").encode())
        found[row.segment] = row
        if row.position > 0:
            positions[row.journal].append(row.position)
        if has_ledger and not (row.as_due and (row.journal, row.position) not in verdict.doubted):
            entered = row.entered + wrong.get(row.segment, (0, "", 0))[2]
            wrong[row.segment] = (row.found, row.digest, entered)
    events = sum(row.found for row in found.values())
    times = [time for row in found.values() for time in (row.first, row.last) if time is not None]
    span = min(times, default=None), max(times, default=None)
    removed = {journal: [*runs_of(places)] for journal, places in sorted(positions.items())}
    ((old,),) = engine.execute(f"SELECT count(*) {OLD}", {"moment": before})
    return Removal(before, events, len(found), old - events, *span, digest.hexdigest(), removed, wrong)


def purge_before(engine: Engine, target: Ledger, before: str, archive: str | None = None) -> Removal:
    """Do what `Store.purge` says; what was changed stays known as changed."""
    with target.writing(engine):
        if is_ledger_empty(engine):
            target.enter(engine, [])  # the rows of an older table
        removal = plan_removal(engine, target, before)
        if removal.segments:
            if archive is not None:
                removal = _archive(engine, archive, removal)
            ((events,),) = engine.execute(f"SELECT count(*) FROM audit.logs WHERE {IN_SCOPE}")
            if events != removal.events:
                raise StoreError(f"{events} events are older than {before}, not {removal.events}; try again")
            engine.execute(f"DELETE {OLD} AND {IN_SCOPE}", {"moment": before})
            *_, first, last, digest, removed, wrong, archive = removal
            detail = {"before": microseconds(before), "removed": removed, "wrong": wrong, "archive": archive}
            more = {"first_event": first, "last_event": last, "digest": digest}
            target.enter(engine, [entry_of("purge", events, json.dumps(detail), **more)])
    return removal


def _archive(engine: Engine, directory: str, removal: Removal) -> Removal:
    """Write the events as Parquet files of a day, with a manifest, and read them back."""
    problem = f"{directory}: no archive can be written"
    name = f"purged-{re.sub('[^0-9]', '', removal.before[:19])}-{os.urandom(4).hex()}"
    with suppress(OSError):  # it exists; or `_scratch` says that it doesn't
        os.makedirs(directory, mode=_DIRECTORY_MODE)
        give_to_owner(directory)
    files: dict[str, dict[str, object]] = {}
    params = {"wrong": sorted(removal.wrong), "apart": "not-as-entered.parquet"}
    with _scratch(os.path.join(directory, name), problem, name="part") as scratch:
        for file, events in engine.execute(OLD_FILES, params):
            path = os.path.join(scratch, file)
            os.close(make_file(path, os.O_WRONLY | os.O_EXCL))
            rows = bind(OLD_OF_FILE, {**params, "name": file})
            engine.execute(f"COPY ({rows}) TO {sql_literal(path)} ({COPY_OPTIONS['parquet']})")
            sync_file(path)
            files[path] = {"name": file, "events": events, "sha256": file_digest(path)}
        rows = digests(
            f"read_parquet({sql_literal([*files])}, hive_partitioning = false)", segment=SEGMENT_OR_DAY
        )
        digest = f"SELECT sha256(array_to_string(list(digest ORDER BY segment), '')) FROM ({rows})"
        if engine.execute(digest) != [(removal.digest,)]:
            raise StoreError(f"{scratch}: the archive doesn't read back as written; nothing was purged")
        manifest = {
            "filter": {"before": iso_time(microseconds(removal.before))},
            "events": removal.events,
            "first_event": iso_time(removal.first_event),
            "last_event": iso_time(removal.last_event),
            "digest": removal.digest,
            "not_as_entered": params["wrong"],
            "heads": [head._asdict() for head in chain_heads(engine)],
            "files": [*files.values()],
        }
        write_file(os.path.join(scratch, "manifest.json"), json.dumps(manifest, indent=1).encode() + b"\n")
        sync_directory(scratch)
        os.rename(scratch, os.path.join(directory, name))
        sync_directory(directory)
    return removal._replace(archive=name)


_SILENCE = 25 * 3_600_000_000  # longer ones don't count as time that passed; retention runs daily


def retain(engine: Engine, target: Ledger, retention: float) -> str:
    """Purge what is older than the retention; return a text of what went."""
    none = "retention: nothing is old enough"
    target.create_tables(engine)
    verdict = Verdict(engine, target, seal_keys())
    verdict.open()
    limit = vouched_limit(engine, sql_time(utc_now()), int(retention * 1e6), verdict.doubted)
    if limit and (events := purge_before(engine, target, limit).events):
        return f"retention: {counted(events, 'event')} before {limit} purged"
    with target.writing(engine):  # a log without events must not look as if it had been off
        target.enter(engine, [entry_of("check", 0, none)])
    return none


def vouched_limit(engine: Engine, now: str, left: int, doubted: Collection[tuple[str, int]]) -> str | None:
    """Return the moment since which the log was alive for `left` microseconds."""
    # A clock that jumped forward makes all look old: only time in which the ledger grew counts.
    hours = f"""\
SELECT DISTINCT epoch_us(date_trunc('hour', ingested_at)) AS hour FROM audit.ledger
ANTI JOIN ({listed("journal VARCHAR, position BIGINT", doubted)}) USING (journal, position)
WHERE ingested_at <= {sql_literal(now)}::TIMESTAMP AND isfinite(ingested_at) ORDER BY hour DESC"""
    later = microseconds(now)
    for (hour,) in engine.execute(hours):
        alive, later = later - hour, hour
        if alive > _SILENCE:
            continue
        left -= alive
        if left <= 0:
            moment = _EPOCH_START + datetime.timedelta(microseconds=hour - left)
            return moment.isoformat(" ", "microseconds")
    return None


# == Copies ==
# depends on: Errors, Config, Journal, Writer, SQL, Engines, Target, Ledger, Ingest
#
# Copies of the whole log: each is read back before it gets its name, and overwrites nothing else.


class Restored(NamedTuple):
    """What a restore did."""

    events: int  # that the database holds now
    back: int  # of these, how many it did not hold before
    kept: str | None  # where the replaced database is, if there was one


def _take_in(segments: Iterable[str], path: str, like: Target) -> int:
    """Ingest copies of segments into a copy of the database; count its events."""
    journal = Journal(path + ".journal")
    journal.make_directory()
    for segment in segments:
        with suppress(FileNotFoundError):
            if lines := read_lines(segment):
                write_file(os.path.join(journal.directory, os.path.basename(segment)), lines)
    target = Ledger(Config(path, attach=like.options), journal)
    with journal.ingest_lock():
        ingest_journal(target, Diagnostics(silent=True))
    with target.session() as engine:
        return int(engine.execute("SELECT count(*) FROM audit.logs")[0][0])


def _merge(path: str, place: str, mine: Target) -> tuple[int, int]:
    """Add to a copy what it lacks of the database at `place`; count the events of both."""
    target = Ledger(Config(path, attach=mine.options), mine.journal)
    with target.session(write=True) as engine:
        ask = engine.execute
        attach(engine, place, "ours", {**mine.options, "READ_ONLY": True})
        present = column_types(engine, TABLE_TYPES.replace("'audit'", "'ours'"))
        rows = sound_rows(present["logs"], "ours.logs")
        unknown = "segment NOT IN (SELECT coalesce(segment, '') FROM audit.ledger WHERE kind = '{}')"
        unknown += " AND segment IS NOT NULL"
        with target.writing(engine):
            if all(present.values()):
                ask(f"CREATE OR REPLACE TEMP TABLE batch AS {rows} WHERE {unknown.format('segment')}")
                segments = [segment for (segment,) in ask("SELECT DISTINCT segment FROM batch")]
                losses = "SELECT events, detail, segment FROM ours.ledger WHERE kind = 'loss' AND "
                lost = ask(losses + unknown.format("loss"))
                target.take(engine, segments, [entry_of("loss", *loss, segment=each) for *loss, each in lost])
            ((missing,),) = ask(f"SELECT count(*) FROM ({rows} EXCEPT ALL SELECT * FROM sound_logs)")
            if missing:
                text = f"{place} holds {counted(missing, 'row')} that would be lost; "
                raise StoreError(f"{text}move it and its .wal aside to restore without them")
        ((fresh, old),) = ask(f"SELECT (SELECT count(*) FROM audit.logs), (SELECT count(*) FROM ({rows}))")
        ask("DETACH ours")
    return fresh, old


def _copy_database(engine: Engine, target: Target, folder: str) -> str:
    """Copy the attached target into a new file, and read that back."""
    path = os.path.join(folder, "copy")
    attach(engine, path, "fresh", target.new_file)
    set_mode(path, FILE_MODES[False])
    for statement in ("COPY FROM DATABASE audit TO fresh", "CHECKPOINT fresh", "DETACH fresh"):
        engine.execute(statement)
    sync_file(path)
    attach(engine, path, "fresh", {**target.options, "READ_ONLY": True})
    for table, columns in target.view_tables(engine).items():
        if columns and engine.execute(SAME_CONTENT[table]) != [(True,)]:
            raise StoreError(f"{path}: the copy of {table} differs; nothing was changed, look at the disk")
    engine.execute("DETACH fresh")
    return path


def _put_in_place(path: str, target: str) -> None:
    """Rename a file, but never overwrite another."""
    give_to_owner(path)
    try:
        os.link(path, target)
    except OSError:
        if os.path.lexists(target):
            raise
        os.rename(path, target)  # a file system without links
    sync_directory(os.path.dirname(target))


def _replace(path: str, place: str, old: os.stat_result) -> None:
    take_after(path, old)
    os.replace(path, place)
    sync_directory(os.path.dirname(place))


# == Operations ==
# depends on: Errors, Config, Events, Journal, Writer, Engines, Target, Ledger, Ingest,
# Evidence, Removal, Copies, Reading
#
# What can be done with a log, in the order that keeps others out.

_WRITTEN_MEANWHILE = ": another process wrote to it meanwhile; try again"


def month_ago() -> str:
    return sql_time(utc_now() - datetime.timedelta(days=30))


class Store:
    """The log of a configuration: its database (`target`) and its `journal` as one.

    Methods try for `wait` seconds while another process holds the database. They raise StoreError if it
    can't be used (DatabaseNotFoundError: there is none), and ConfigError if the key file can't.
    """

    def __init__(
        self, config: Config, *, diagnostics: Diagnostics | None = None, opener: Opener = open_engine
    ) -> None:
        self.journal: Journal = Journal(config.journal_directory, group=config.group)
        self.target: Ledger = Ledger(config, self.journal, opener)
        self._diagnostics = diagnostics or Diagnostics()
        self._retention = config.retention

    def ingest(self, *, wait: float = 0.0) -> bool:
        """Move what waits into the database, then apply the retention; True if no retry could move more.

        Raises JournalError if a segment can't be claimed (the others are done), and StoreError if everything
        stays in the journal.
        """
        return bool(self.ingest_for_logger(wait=wait)["done"])

    def ingest_for_logger(self, *, wait: float) -> dict[str, Any]:
        """Do what `ingest` says; return what a logger's ingester expects."""
        with self.journal.ingest_lock() as mine:
            if not mine:
                waiting = bool(self.journal.segments())
                return {"done": not waiting, "busy": waiting}
            target = self.target
            self.journal.bind(os.path.realpath(target.path) if target.is_file else target.name)
            problems = self._run_ingest(wait)
            for chore, fault in (
                (target.tend_lake, "small files could not be merged"),
                (self._retain, "old events could not be purged"),
            ):
                try:
                    with suppress(DatabaseLockedError):  # the next ingest does it
                        chore()
                except AuditError as error:
                    self._diagnostics.report(fault, fault, error=error)
        if problems:
            raise problems[0]
        head = target.head and json.dumps({"journals": [target.head._asdict()]})
        return {"done": True, "retained": self._retention is None, "head": head}

    def _run_ingest(self, wait: float) -> list[JournalError]:
        """Ingest; wait for a database that others hold."""
        end, pause = time.monotonic() + wait, 0.0
        while True:
            try:
                return ingest_journal(self.target, self._diagnostics)
            except DatabaseCorruptError as error:
                if not (DAMAGED_WAL in str(error) and (aside := self.target.set_wal_aside())):
                    raise
                text = f"was damaged and is {aside} now; what it held is taken in once more"
                self._diagnostics.report("wal", f"the database's WAL {text}")
            except DatabaseLockedError:
                if time.monotonic() + pause >= end:
                    raise
                if not pause:
                    self.journal.ask_readers()
                pause = min(1.5 * pause or 0.03, 1.0)
                time.sleep(pause)

    def _retain(self) -> None:
        if self._retention is not None and not self.target.is_absent():
            with self.target.session(write=True, guest=True) as engine:
                news = retain(engine, self.target, self._retention)
            self._diagnostics.note("retention", news, level=INFO)
            self._retention = None

    @contextlib.contextmanager
    def reading(self, *, wait: float = 5.0) -> Iterator[Reading]:
        """Open table and journal as one log; nobody can ingest until the block ends.

        Raises DatabaseNotFoundError if there is neither, and JournalError if the journal can't be read.
        """
        target, journal = self.target, self.journal
        target.let_ingest_pass(wait)
        engine = target.open_engine()
        with scratch_folder(journal.directory) as folder, contextlib.closing(engine):
            reading = Reading(engine, folder, target)
            with reading.open(wait):
                running = journal.running()
                reading.open_running(running)
                if not (reading.has_table or reading.has_journal or running or reading.problem):
                    if reading.oddities:
                        raise StoreError(f"{target.name}: {reading.oddities[0]}; see what `verify` finds")
                    text = "audit logging is not enabled for the profile, or no events have been logged yet"
                    raise DatabaseNotFoundError(f"{_NOT_FOUND}{target.name}: {text}")
                for text in reading.oddities:
                    self._diagnostics.report("table", f"{text}; what is shown may not be what was recorded")
                yield reading

    def imported(self, segment_id: str) -> tuple[int, str] | None:
        """Return the number of a segment's ingested events and the time of the last, or None."""
        sql = """\
SELECT events, strftime(last_event, '%Y-%m-%d %H:%M:%S.%f')
FROM sound_ledger WHERE kind = 'segment' AND segment = $segment"""
        with suppress(DatabaseNotFoundError), self.target.session() as engine:
            return next(iter(engine.execute(sql, {"segment": segment_id})), None)
        return None

    def verify(
        self,
        *,
        checkpoint: Sequence[Head] = (),
        since: str | None = None,
        wait: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Verdict:
        """Recompute the ledger from `logs` and return what isn't as it was recorded.

        The chains must lead through the heads of a `checkpoint`. Of segments before `since`, naive UTC, only
        the chain is recomputed. `progress` is called with the events done and their total.
        """
        with self.target.session(wait) as engine:
            verdict = Verdict(engine, self.target, seal_keys())
            verdict.progress = progress
            verdict.run(checkpoint=checkpoint, since=since)
        verdict.waiting_bytes = self.journal.waiting_bytes()
        return verdict

    def heads(self, *, wait: float = 5.0) -> list[Head]:
        """Return the ends of the journals' chains, to be kept elsewhere."""
        journals = self.checkpoint(wait=wait)["journals"]
        return [Head(*(journal[name] for name in Head._fields)) for journal in journals]

    def checkpoint(self, *, wait: float = 5.0) -> dict[str, Any]:
        """Return the heads for JSON, with seals for those who have no key."""
        with self.target.session(wait) as engine:
            heads, plain = chain_heads(engine), plain_seals(engine)
        journals = [{**head._asdict(), "plain": plain.get(head.journal)} for head in heads]
        return {"time": iso_time(microseconds(sql_time(utc_now()))), "journals": journals}

    def prove(self, event_id: str, *, wait: float = 5.0) -> dict[str, Any]:
        """Return what proves, with a later checkpoint, that an event is in the database."""
        with self.target.session(wait) as engine:
            return prove(engine, event_id)

    @contextlib.contextmanager
    def _alone(self, wait: float, *, make: bool = False) -> Iterator[None]:
        """Hold the ingest lock; without `make`, only beside a database."""
        if not make:
            self.target.refuse_absent()
        self.journal.make_directory()
        for _ in tries(wait):
            with self.journal.ingest_lock() as mine:
                if mine:
                    yield
                    return
        raise DatabaseLockedError(f"{self.target.name}: another process is ingesting; try again")

    def purge(
        self, before: str, *, archive: str | None = None, dry_run: bool = False, wait: float = 5.0
    ) -> Removal:
        """Delete the segments whose events are all older than `before`, a naive UTC text.

        They are first written to a directory `archive`, and read back. `dry_run` only returns what would be
        deleted. Raises StoreError if nothing was deleted.
        """
        if dry_run:
            with self.target.session(wait) as engine:
                return plan_removal(engine, self.target, before)
        with self._alone(wait), self.target.session(wait, write=True) as engine:
            return purge_before(engine, self.target, before, archive)

    def backup(self, path: str, *, wait: float = 5.0) -> int:
        """Copy the whole log into a new database file; return how many events that holds.

        Raises StoreError if `path` exists, or the copy can't be written or differs.
        """
        self._refuse_remote("backup")
        self.refuse_own_files(path)
        place, target = os.path.abspath(path), self.target
        for name in (place, place + ".wal", place + ".journal"):
            if os.path.lexists(name):
                raise StoreError(f"{name} exists; nothing is overwritten: name another file or remove it")
        with _scratch(place, f"{path} can't be written") as scratch:
            with target.session(wait) as engine:
                copy = _copy_database(engine, target, scratch)
                events = _take_in(unknown_segments(engine, self.journal.segments()), copy, target)
            _put_in_place(copy, place)
        return events

    def restore(self, path: str, *, wait: float = 5.0) -> Restored:
        """Put a backup in place of the database, with all that the database holds besides.

        The old database stays beside it, and purged events return. If it holds all of the backup, nothing is
        changed. Raises StoreError if something would be lost; then nothing is changed.
        """
        place, target = self._refuse_remote("restore"), self.target
        old = Journal(path + ".journal")  # of backups by earlier versions
        source = Target(Config(os.path.abspath(path), attach=target.options), old)
        with (
            self._alone(wait, make=True),
            _scratch(place, f"{place} can't be restored", name="restore") as scratch,
        ):
            with source.session(wait) as engine:
                if not source.view_tables(engine)["logs"]:
                    raise StoreError(f"{path} holds no audit log; name a copy that `backup` made")
                copy = _copy_database(engine, source, scratch)
            events = _take_in(old.segments(), copy, target)
            if target.is_absent():
                _put_in_place(copy, place)
                return Restored(events, events, None)
            ours = self._settled(place, wait)
            events, before = _merge(copy, place, target)
            if events == before:
                return Restored(events, 0, None)
            give_to_owner(copy)
            kept = f"{place}.replaced-{utc_now():%Y%m%dT%H%M%S}-{os.urandom(2).hex()}"
            with target.session(wait):
                if _stamp_of(os.stat(place)) != _stamp_of(ours):
                    raise DatabaseLockedError(place + _WRITTEN_MEANWHILE)
                _put_in_place(place, kept)
                _replace(copy, place, ours)
        return Restored(events, events - before, kept)

    def compact(self, *, wait: float = 5.0) -> tuple[int, int]:
        """Write the database anew, without the room of purged rows; return both sizes in bytes.

        Raises StoreError if the old one is still in place.
        """
        path, target = self._refuse_remote("compact"), self.target
        with self._alone(wait):
            self._settled(path, wait)
            # Read-only, DuckDB keeps writers out and leaves the WAL alone, that of the new file too.
            with target.session(wait) as engine:
                old = os.stat(path)
                if _size_of(path + ".wal"):
                    raise DatabaseLockedError(path + _WRITTEN_MEANWHILE)
                with _scratch(path, f"{path} can't be written anew", name="compact") as scratch:
                    _replace(_copy_database(engine, target, scratch), path, old)
                return old.st_size, os.stat(path).st_size

    def _settled(self, path: str, wait: float) -> os.stat_result:
        """Write the WAL into the database file, and return the file's state."""
        with self.target.session(wait, write=True) as engine:
            engine.execute("CHECKPOINT audit")
        return os.stat(path)

    def _refuse_remote(self, command: str) -> str:
        """Return the path of the database file. Raises StoreError if there is none."""
        if not self.target.is_file:
            system = self.target.path.partition(":")[0]
            raise StoreError(f"{command} is for database files; use what {system} has for it")
        return os.path.realpath(self.target.path)

    def refuse_journal(self, path: str) -> None:
        """Raise StoreError if `path` lies in the journal, where nothing else belongs."""
        journal = os.path.realpath(self.journal.directory)
        if os.path.join(os.path.realpath(path), "").startswith(os.path.join(journal, "")):
            raise StoreError(f"{path} lies in the journal; name a place elsewhere")

    def refuse_own_files(self, path: str) -> None:
        """Raise StoreError if an export to `path` can't be, or would destroy the log."""
        own = os.path.realpath(self.target.path)
        try:
            self.refuse_journal(path)
            place = os.path.realpath(path)
            os.stat(os.path.join(os.path.dirname(place), ""))  # there must be such a directory
            is_regular = not os.path.lexists(path) or stat.S_ISREG(os.lstat(path).st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL
            raise StoreError(f"{path} can't be written: {getattr(error, 'strerror', error)}") from error
        if self.target.is_file and place in (own, own + ".wal"):
            raise StoreError(f"{path} is the audit database itself; name another file")
        if not is_regular:
            raise StoreError(f"{path} is no file; name one (`log` writes to standard output by --export -)")


# == Follow ==
# depends on: Errors, Events, Journal, SQL, Engines, Target, Ledger, Reading, Operations
#
# New events as they come, by position in the ledger and in the segments that it lacks: late ingests, other
# hosts and clocks that jump lose nothing.

_LOOK_EVENTS = 20_000  # of the table, in one look: bounds memory and time
_LOOK_ENTRIES = 1000  # of the ledger, likewise
_SETTLED = 2**62  # the last line of a segment that the table has
_TAILS = "wanted VARCHAR, tail BIGINT"
_ORDER = "ORDER BY ingested_at, journal, position"
_NEW_ENTRIES = f"""\
CREATE OR REPLACE TEMP TABLE entries AS
SELECT *
FROM (SELECT journal, position, kind, segment, coalesce(events, 0) AS events, coalesce(detail, '') AS detail,
        coalesce(t.tail, 0) AS tail, ingested_at
      FROM sound_ledger
      LEFT JOIN ({{positions}}) ON known = journal LEFT JOIN ({{tails}}) AS t ON wanted = segment
      WHERE position > coalesce(last, 0) AND ingested_at >= {{since}}::TIMESTAMP
      {_ORDER} LIMIT {_LOOK_ENTRIES})
QUALIFY sum(events) OVER ({_ORDER}) <= {_LOOK_EVENTS} OR row_number() OVER ({_ORDER}) = 1"""
_ENTERED = """\
SELECT segment AS wanted, max(tail) AS tail FROM entries WHERE kind IN ('segment', 'legacy') GROUP BY ALL"""
_FRESH = f"""\
CREATE OR REPLACE TEMP TABLE fresh AS SELECT events.* FROM ({{rows}}) AS events
JOIN ({{tails}}) ON wanted = {SEGMENT_OR_DAY} WHERE coalesce(seq, 1) > tail"""
_NOTICES = f"""\
INSERT INTO fresh BY NAME
SELECT now()::TIMESTAMP AS timestamp, '' AS caller, if(kind = 'loss', 'loss', 'gap') AS type, type AS name,
  '{{"events":' || missing || '}}' AS input_json, 0 AS duration_ms, 'n/a' AS policy_decision,
  'error' AS status, if(kind = 'loss', detail, 'events that left the table unread, by a purge perhaps: '
    || missing) AS error, journal AS segment, position AS seq
FROM (SELECT *, if(kind = 'loss', events, events - tail - coalesce(came, 0)) AS missing FROM entries
  LEFT JOIN (SELECT {SEGMENT_OR_DAY} AS wanted, count(*) AS came FROM fresh GROUP BY ALL) ON wanted = segment)
WHERE kind = 'loss' OR (kind IN ('segment', 'legacy') AND missing > 0)"""


class Follower:
    """Returns events as they are recorded, each once."""

    def __init__(
        self, store: Store, what: Filter, columns: str = "", cursor: Mapping[str, Any] | None = None
    ) -> None:
        self._target, self._journal, self._what = store.target, store.journal, what
        self._columns = columns or public_select()
        self._notices, cursor = cursor is not None, cursor or {}  # losses and gaps are returned too
        self._positions: dict[str, int] = dict(cursor.get("journals", {}))
        self._tails: dict[str, int] = dict(cursor.get("segments", {}))  # by segment: its last event
        self._sizes: dict[str, int] = {}
        self._since = "0001-01-01 00:00:00"  # when entries must have been made to count
        self._signature: object = None
        self.is_behind = False  # the next look may find more in the ledger at once
        self._engine = store.target.open_engine()
        self.close = self._engine.close

    def start(self, reading: Reading) -> None:
        """Count everything in an open log as seen."""
        if reading.problem is not None:  # of the ledger, only what is entered later is new
            self._since = sql_time(utc_now())
        else:
            self._signature = self._target.signature()
            self._positions = {head.journal: head.position for head in chain_heads(reading.engine)}
        if reading.has_journal:
            reading.freeze_journal()  # so that later queries show nothing that isn't counted here
            ends = reading.engine.execute("SELECT segment, max(seq) FROM journal_rows GROUP BY segment")
            self._tails = dict(ends)

    def cursor(self) -> dict[str, Any]:
        """Return where the next look goes on, for JSON."""
        return {"version": 1, "journals": self._positions, "segments": self._tails}

    def look(self, *, wait: float = 0.0) -> list[Row]:
        """Return new matching events, oldest first, not too many at once."""
        signature, rows = self._target.signature(), list[Row]()
        self.is_behind = False
        if signature is None or signature != self._signature:
            with suppress(DatabaseNotFoundError, *(() if wait else (DatabaseLockedError,))):
                rows = patiently(self._new_table_rows, wait)
        return rows if rows or self.is_behind else self._new_lines()

    def running(self) -> list[Row]:
        """Return matching calls that have run for a second on this host."""
        lines = self._journal.running()
        if not lines:
            return []
        with scratch_folder(self._journal.directory) as folder:
            reading = Reading(self._engine, folder, self._target)
            reading.open_running(lines)
            return reading.running(self._what._replace(min_ms=max(1000, self._what.min_ms or 0)))

    def _new_table_rows(self) -> list[Row]:
        """Return what was entered since the last look, and not seen in the journal."""
        target, ask, rows = self._target, self._engine.execute, list[Row]()
        positions = listed("known VARCHAR, last BIGINT", self._positions.items())
        tails = listed(_TAILS, self._tails.items())
        with target.attached(self._engine):
            signature = target.signature()  # nobody can ingest now
            target.view_tables(self._engine)
            ask(_NEW_ENTRIES.format(positions=positions, tails=tails, since=sql_literal(self._since)))
            entries = ask("SELECT journal, position, kind, segment FROM entries")
            if entries:
                rows = self._matching("SELECT * FROM sound_logs", _ENTERED)
        for journal, position, kind, segment in entries:
            self._positions[journal] = max(position, self._positions.get(journal, 0))
            if kind == "segment":
                self._tails[segment] = _SETTLED
        self.is_behind, self._signature = bool(entries), None if entries else signature
        return rows

    def _new_lines(self) -> list[Row]:
        """Return what segments got that the table doesn't have."""
        paths = {segment_id_of(path): path for path in self._journal.segments()}
        self._tails = {each: tail for each, tail in self._tails.items() if tail != _SETTLED or each in paths}
        sizes = {each: _size_of(path) for each, path in paths.items() if self._tails.get(each) != _SETTLED}
        grown = [each for each, size in sizes.items() if size > self._sizes.get(each, 0)]
        if not grown:
            return []
        files = [paths[each] for each in grown]
        tails = listed(_TAILS, [(each, self._tails.get(each, 0)) for each in grown])
        try:
            with scratch_folder(self._journal.directory) as folder:
                matching = self._matching(journal_rows(files, folder), tails)
        except QueryError:
            if all(map(os.path.exists, files)):
                raise
            return []  # ingested at this moment: the ledger tells the next look
        self._tails.update(self._engine.execute("SELECT segment, max(seq) FROM fresh GROUP BY segment"))
        self._sizes = sizes
        return matching

    def _matching(self, rows: str, tails: str) -> list[Row]:
        """Put the rows behind the tails into `fresh`; return those that match."""
        ask, where = self._engine.execute, f"({self._what.where()})"
        ask(_FRESH.format(rows=rows, tails=tails))
        if self._notices and tails == _ENTERED:
            ask(_NOTICES)
            where += " OR type IN ('loss', 'gap')"
        return ask(f"SELECT {self._columns} FROM fresh WHERE {where} ORDER BY {OLDEST_FIRST}")


# == Health ==
# depends on: Errors, Config, Journal, SQL, Engines, Operations
#
# What `doctor` looks at; it changes nothing.


_LITTLE_SPACE_BYTES = 256 * 2**20
_FEW_INODES = 100
_Report: TypeAlias = dict[str, Any]
_Faulty: TypeAlias = Iterator[tuple[str, str]]  # problem and remedy


def check_up(config: Config, *, wait: float) -> _Report:
    """Return the state of a log and its faults, for JSON."""
    report: _Report = {"healthy": False, "faults": [], "profile": config.profile, "engine": None}
    faults = _examine(report, config, Store(config), wait)
    report["faults"] = [{"problem": problem, "remedy": remedy} for problem, remedy in faults]
    report["healthy"] = not report["faults"]
    return report


def _examine(report: _Report, config: Config, store: Store, wait: float) -> _Faulty:
    if not config.enabled:
        text = f"audit logging is not enabled for profile {config.profile!r}"
        yield text, "set `enabled: true` in its `audit` section"
    yield from _examine_journal(report, store.journal)
    try:
        with contextlib.closing(open_engine()) as engine:
            report["engine"] = {"name": engine.name, "version": engine.version()}
        yield from _examine_database(report, store, wait)
    except StoreError as error:
        yield str(error), "pip install duckdb; events wait in the journal meanwhile"
    if store.target.is_file:
        yield from _examine_files(report, config.path, store.journal.directory, 0o7 if config.group else 0o77)


def _examine_database(report: _Report, store: Store, wait: float) -> _Faulty:
    state = report["database"] = {"path": store.target.name, "readable": False, "events": None}
    try:
        with store.reading(wait=wait) as reading:
            if reading.problem is not None:
                raise reading.problem
            state["readable"] = reading.has_table
            ((state["events"],),) = reading.engine.execute("SELECT count(*) FROM sound_logs")
            for text in reading.oddities:
                yield f"{text}: what is shown may not be what was recorded", "see what `verify` finds"
            for row in reading.running(Filter(min_ms=3_600_000)):
                text = "{type} {name} has run since {timestamp}".format(**dict(zip(PUBLIC_COLUMNS, row)))
                yield text, "see `log --running`; if it hangs, end it or its server"
            refused = Filter(since=month_ago(), error_type="AuditUnavailableError")
            sql = "SELECT count(*), arg_max(error, timestamp) FROM events"
            ((count, last),) = reading.ask(refused, sql)
            report["refused"] = count
            if count:
                text = f"{counted(count, 'call')} refused in 30 days, as no record could be made: {last}"
                yield text, "make room, or mend the journal's disk"
            for *_, text in reading.losses(month_ago()):
                yield f"events were lost: {text}", "mend the reason; it is shown for 30 days"
    except DatabaseNotFoundError:
        state["events"] = 0  # nothing was logged yet: no fault
    except StoreError as error:
        text, _, remedy = str(error).rpartition("; ")  # as `Target.attached` puts it
        yield text or remedy, remedy if text else "run with --debug"
    except JournalError:  # a fault already
        pass


def _examine_journal(report: _Report, journal: Journal) -> _Faulty:
    state = report["journal"] = {"path": journal.directory}
    try:
        state |= journal.survey()
    except JournalError as error:
        yield str(error), "check its permissions, and whether its file system has locks"
        return
    if orphaned := state["orphaned"]:
        text = f"{counted(orphaned, 'segment')} since {state['oldest_pending']}, taken in by nobody"
        yield text, "run `python -m mxcp_audit ingest`; if that fails, it says why"
    if rejected := state["rejected"]:
        text = f"lines could not be ingested: {counted(rejected, 'file')} in {journal.directory}"
        yield text, "read the .rejected files, keep what matters, and remove them"


def _examine_files(report: _Report, database: str, journal: str, others: int) -> _Faulty:
    import shutil

    for path in (database, database + ".wal", journal):
        with suppress(OSError):
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if mode & others and os.name == "posix":
                yield f"{path} is open to other users (mode {mode:o})", f"chmod go= {path}"
            if not os.access(path, os.R_OK | os.W_OK):
                yield f"{path} can't be read and written by this user", "check owner and mode"
    space = report["free_bytes"] = {}
    for path in {os.path.dirname(database), os.path.dirname(journal)}:
        with suppress(OSError, AttributeError):
            free = space[path] = shutil.disk_usage(path).free
            if free < _LITTLE_SPACE_BYTES:
                yield f"only {free >> 20} MiB are free in {path}", "make room, or set `retention`"
            inodes = os.statvfs(path)  # AttributeError on Windows
            if inodes.f_files and inodes.f_favail < _FEW_INODES:
                yield f"only {inodes.f_favail} inodes are free in {path}", "remove files there"


# === Output ===
# depends on: Errors, Events, SQL, Engines, Store
#
# Rows → what people and programs read. What is not printable becomes an escape, so that nothing recorded
# acts on a terminal; data formats keep the original.

# == Text ==
# depends on: Errors, Events, SQL, Engines


def printable(text: str) -> str:
    """Return the text as one line; what is not printable becomes an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def display_width(text: str) -> int:
    """Return the terminal cells of a text: wide characters have two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    joins = [category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff" for char in text]
    return sum(0 if joined else 1 + (east_asian_width(char) in "WF") for char, joined in zip(text, joins))


def clip(text: str, width: int | None) -> str:
    """Return the text in at most `width` cells, cut with an ellipsis."""
    if width is None or display_width(text) <= width:
        return text
    ends = itertools.accumulate(map(display_width, text))  # combining characters stay with their letter
    return text[: sum(1 for _ in itertools.takewhile(width.__gt__, ends))] + "…" if width > 0 else ""


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Return the text with blanks up to `width` cells."""
    blanks = " " * (width - display_width(text))
    return blanks + text if right else text + blanks


def escaped(error: UnicodeError) -> tuple[str, int]:
    """Return what an encoding lacks as escapes, which JSON knows too."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def write_text(file: TextIO, text: str) -> None:
    file.writelines(printable(line) + "\n" for line in text.split("\n"))


# --- data: JSON and CSV


def json_text(value: object, indent: int | None = None) -> str:
    return harmless_json(json.dumps(value, ensure_ascii=False, indent=indent))


def harmless_json(text: str) -> str:
    """Return JSON text with escapes for what is not printable."""
    harmful = () if text.isprintable() else {c for c in text if not c.isprintable()} - {"\n"}
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in harmful}) if harmful else text


def write_json(
    file: TextIO,
    rows: Iterable[Row],
    names: Sequence[str] = PUBLIC_COLUMNS,
    *,
    columns: Sequence[str] | None = None,
    by_line: bool = False,
) -> None:
    """Write rows as objects of all or some names: a JSON array, or one a line."""
    mark = "["
    for row in rows:
        event = dict(zip(names, row))
        text = json_text({name: event[name] for name in columns or names})
        file.write(text + "\n" if by_line else mark + text)
        mark = ",\n "
    if not by_line:
        file.write("]\n" if mark != "[" else "[]\n")


def indented_json(text: str) -> str:
    """Return JSON text with a line for each value; unchanged what Python would spell otherwise."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        dump = functools.partial(json.dumps, value, ensure_ascii=text.isascii())
        if text in (dump(separators=(",", ":")), dump()):
            return dump(indent=2)
    return text


def write_csv(file: TextIO, names: Sequence[str], rows: Iterable[Row], *, raw: bool) -> None:
    """Write CSV in which, unless `raw`, no cell is a formula."""
    import csv

    formula = re.compile(FORMULA)
    writer = csv.writer(file, lineterminator="\n")
    for row in itertools.chain([names], rows):
        cells = (json_text(value) if isinstance(value, (dict, list, bool)) else value for value in row)
        writer.writerow("'" + c if not raw and isinstance(c, str) and formula.search(c) else c for c in cells)


# --- tables, and names with values

SHORT_COLUMNS = ("timestamp", "type", "name", "status", "policy_decision", "duration_ms", "caller")
WIDE_COLUMNS = (*SHORT_COLUMNS, *(c.name for c in COLUMNS[10:-2] if c.name != "context"), "event_id")
_FIRST_WIDTHS = {"timestamp": 19, "name": 16, "status": 7}  # when following, before anything is known
_STYLES = {"error": "\x1b[31m", "deny": "\x1b[31m", "warn": "\x1b[33m"}


def write_events(
    file: TextIO,
    rows: Iterable[Row],
    *,
    columns: Sequence[str] = SHORT_COLUMNS,
    width: int | None,
    colour: bool,
    below: Sequence[str] = ("reason", "error"),
    local: bool = False,
    widths: list[int] | None = None,
) -> None:
    """Write events as a table, some values in lines below; with the same `widths`, first [], it goes on."""
    events = [dict(zip(PUBLIC_COLUMNS, row)) for row in rows]
    values = [
        [_short_time(event[name], local) if name == "timestamp" else event[name] for name in columns]
        for event in events
    ]
    time = f"TIME ({'local' if local else 'UTC'})"
    names = {"timestamp": time, "policy_decision": "POLICY", "duration_ms": "MS"}
    heads = [names.get(name, name.upper()) for name in columns]
    if widths is not None:
        heads = [head.ljust(_FIRST_WIDTHS.get(name, 0)) for head, name in zip(heads, columns)]
    lines = _table(heads, values, width, widths)
    if widths:
        next(lines)
    for event, line in zip(events if widths else [{}, *events], lines):
        style = _STYLES.get(event.get("status", "")) or _STYLES.get(event.get("policy_decision", ""))
        file.write(f"{style}{line}\x1b[0m\n" if style and colour else f"{line}\n")
        for name in below if event else ():
            if name == "input_json":
                file.write(f"    {printable(event[name] or '-')}\n")
            elif event[name]:
                file.write(clip(f"    {name}: {printable(event[name])}", width) + "\n")


def summary(shown: int, noun: str, limit: int | None) -> str:
    return counted(shown, noun) + (" (there may be more: --limit)" if shown == limit else "")


def write_grid(
    file: TextIO, heads: Sequence[str], rows: Iterable[Sequence[object]], *, width: int | None
) -> None:
    file.writelines(f"{line}\n" for line in _table(heads, rows, width))


def write_fields(file: TextIO, fields: Mapping[str, object]) -> None:
    """Write names and values, a line each; several lines of a value are indented."""
    for name, value in fields.items():
        text = "-" if value is None else str(value)
        indented = f"{name}\n{text}".replace("\n", "\n  ")
        write_text(file, indented if "\n" in text else f"{name:16} {text}")


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], width: int | None, widths: list[int] | None = None
) -> Iterator[str]:
    """Yield lines that fit `width`, numbers to the right; `widths` grow to the widest cells."""
    columns = [*zip(heads, *rows)]
    are_numbers = [any(isinstance(value, (int, float)) for value in column) for column in columns]
    texts = [[*map(_cell, column)] for column in columns]
    widths = [] if widths is None else widths
    widths[:] = [
        max(size, *map(display_width, column)) for size, column in zip(widths or [0] * len(texts), texts)
    ]
    if width is None:  # nothing is cut, but one long cell doesn't pad all other rows
        widths[:] = [min(size, 80) for size in widths]
    excess = sum(widths) + 2 * (len(widths) - 1) - width if width else 0
    for index in sorted(range(len(widths)), key=lambda n: -widths[n]):  # texts shrink to a time's 19 cells
        less = 0 if are_numbers[index] else max(0, min(excess, widths[index] - 19))
        widths[index] -= less
        excess -= less
    for row in zip(*texts):
        cells = (
            pad(clip(cell, width and size), size, right=right)
            for cell, size, right in zip(row, widths, are_numbers)
        )
        yield clip("  ".join(cells).rstrip(), width)


def local_time(text: str) -> str:
    """Return an ISO time in this machine's time zone, with its offset."""
    with suppress(ValueError, OverflowError):  # of a foreign table
        return parse_iso(text).astimezone().isoformat()
    return text


def _short_time(text: str | None, local: bool) -> str | None:
    return text and (local_time(text) if local else text)[:19].replace("T", " ")


def _cell(value: object) -> str:
    return "-" if value is None else printable(value if isinstance(value, str) else json_text(value))


def write_stats(
    file: TextIO, by: str, rows: Sequence[Row], *, bar: str, width: int | None, local: bool = False
) -> None:
    """Write rows of a group's name and STATS_COLUMNS as a table, with times and bars if they fit."""
    room, count = width or 999, 9 if any(row[10] for row in rows) else 8
    heads = f"{by.upper()},CALLS,ERRORS,DENIED,P50,P95,P99,MAX MS,RUNNING".split(",")[:count]
    figures = [[clip(_cell(row[0]), max(19, room - 75)), *row[1:8], row[10]][:count] for row in rows]
    lines = [*_table(heads, figures, width)]
    size = max(map(display_width, lines))
    for head, index in (("FIRST SEEN", 8), ("LAST SEEN", 9))[2 - min(2, (room - size) // 21) :]:
        times = (head, *(_cell(_short_time(row[index], local)) for row in rows))
        lines = [f"{pad(line, size)}  {time}" for line, time in zip(lines, times)]
        size += 21
    values = [0, *(row[1 + STATS_COLUMNS.index(bar)] or 0 for row in rows)]
    block = "█" if (file.encoding or "utf-8").lower().startswith("utf") else "#"
    cells = min(40, room - size - 2) if width and width - size > 5 else 0
    for line, value in zip(lines, values):
        line = pad(line, size + 2) + block * -(-value * cells // max(values[1:] + [1]))
        file.write(f"{line.rstrip()}\n")


# == Forms ==
# depends on: SQL
#
# Events as other systems want them (docs/siem.md). Each line of a form is a place in the JSON object (with a
# dot or brace, one beside the last) and the SQL that fills it, if not the column of that name; no NULLs.

# What words in capitals stand for.
_FORM_WORDS = {
    "USER_AGENT": "CONTEXT ->> '$.\"user_agent.original\"'",
    "EVENT_ID": EVENT_ID,
    "METHOD": "CASE type WHEN 'tool' THEN 'tools/call' WHEN 'resource' THEN 'resources/read' "
    "WHEN 'prompt' THEN 'prompts/get' ELSE coalesce(type, '') END",
    # DuckDB takes NaN and Infinity, which MXCP wrote, for JSON; others don't.
    "INPUT": r"CASE WHEN json_valid(input_json) AND NOT regexp_matches(input_json, "
    r"""'^([^"]|"([^"\\]|\\.)*")*(nan|inf)', 'i') THEN input_json::JSON ELSE to_json(input_json) END""",
    "CONTEXT": "CASE WHEN json_valid(context) THEN context::JSON ELSE to_json(context) END",
    "FAILED": "status = 'error'",
    "DENIED": "policy_decision = 'deny'",
    "NANOS": "TRY_CAST(epoch_us(timestamp)::HUGEINT * 1000 AS UBIGINT)::VARCHAR",  # as OTLP's fixed64
    "IS_IP": r"regexp_full_match(address, '[0-9.]{7,15}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*')",
}
FORMS = {
    # OCSF 1.8, API Activity: https://schema.ocsf.io/1.8.0/classes/api_activity
    "ocsf": """\
activity_id 99
activity_name 'Invoke'
actor.app_name client
.app_uid agent
.invoked_by coalesce(caller, '')
.session.uid session_id
.user.uid user_id
api.operation METHOD
.request.data INPUT
.request.uid coalesce(request_id, EVENT_ID)
.response.error error_type
.response.error_message error
.service.name server
category_uid 6
class_uid 6003
duration duration_ms
http_request.user_agent USER_AGENT
message concat_ws(' ', METHOD, name)
metadata.correlation_uid trace_id
.log_name 'mxcp_audit'
.product.name 'mxcp_audit'
.product.vendor_name 'mxcp_audit'
.uid EVENT_ID
.version '1.8.0'
resources[].name
.type
severity_id CASE WHEN DENIED THEN 3 WHEN FAILED THEN 2 ELSE 1 END
src_endpoint.hostname CASE WHEN NOT IS_IP THEN address END
.ip CASE WHEN IS_IP THEN address END
.name coalesce(client, caller, '')
status CASE WHEN FAILED THEN 'Failure' ELSE 'Success' END
status_detail coalesce(reason, error)
status_id CASE WHEN FAILED THEN 2 ELSE 1 END
time epoch_ms(timestamp)
type_uid 600399
unmapped.context CONTEXT
.policy_decision
.result_bytes
""",
    # Elastic Common Schema 9: https://www.elastic.co/docs/reference/ecs
    "ecs": """\
@timestamp strftime(timestamp, '%Y-%m-%dT%H:%M:%S.%fZ')
client.address
.ip CASE WHEN IS_IP THEN address END
ecs.version '9.0.0'
error.message error
.type error_type
event.action METHOD
.category[] 'api'
.dataset 'mxcp_audit.logs'
.duration duration_ms::BIGINT * 1000000
.id EVENT_ID
.kind 'event'
.module 'mxcp_audit'
.outcome CASE WHEN FAILED THEN 'failure' ELSE 'success' END
.provider 'mxcp_audit'
.reason
.type[] CASE WHEN DENIED THEN 'denied' ELSE 'access' END
http.request.id request_id
message concat_ws(' ', METHOD, name)
mxcp_audit.agent
.caller
.client
.context CONTEXT
.input input_json
.name
.policy policy_decision
.result_bytes
.session session_id
.type
service.name server
trace.id trace_id
user.id user_id
user_agent.original USER_AGENT
""",
    # OTLP logs as JSON, a request a line, with the attributes (in braces) of OpenTelemetry's conventions:
    # https://opentelemetry.io/docs/specs/otlp/#otlphttp
    "otlp": """\
resourceLogs[].resource.attributes{service.name} coalesce(server, 'mxcp_audit')
resourceLogs[].scopeLogs[].scope.name 'mxcp_audit'
resourceLogs[].scopeLogs[].logRecords[].timeUnixNano NANOS
.observedTimeUnixNano NANOS
.severityNumber CASE WHEN FAILED THEN 17 WHEN DENIED THEN 13 ELSE 9 END
.severityText CASE WHEN FAILED THEN 'ERROR' WHEN DENIED THEN 'WARN' ELSE 'INFO' END
.eventName 'mxcp_audit.call'
.body.stringValue concat_ws(' ', METHOD, name)
.traceId CASE WHEN regexp_full_match(trace_id, '[0-9A-Fa-f]{32}') THEN lower(trace_id) END
resourceLogs[].scopeLogs[].logRecords[].attributes{log.record.uid} EVENT_ID
{mcp.method.name} METHOD
{gen_ai.tool.name} CASE WHEN type = 'tool' THEN name END
{gen_ai.prompt.name} CASE WHEN type = 'prompt' THEN name END
{mcp.resource.uri} CASE WHEN type = 'resource' THEN name END
{mcp.session.id} session_id
{mcp.protocol.version} CONTEXT ->> '$."mcp.protocol.version"'
{jsonrpc.request.id} request_id
{client.address}
{user.id} user_id
{user_agent.original} USER_AGENT
{error.type} coalesce(error_type, CASE WHEN FAILED THEN '_OTHER' END)
{error.message} error
{network.transport} CASE caller WHEN 'stdio' THEN 'pipe' WHEN 'http' THEN 'tcp' END
{mxcp_audit.agent}
{mxcp_audit.caller}
{mxcp_audit.client}
{mxcp_audit.context}
{mxcp_audit.duration_ms#}
{mxcp_audit.input} input_json
{mxcp_audit.policy} policy_decision
{mxcp_audit.reason}
{mxcp_audit.result_bytes#}
{mxcp_audit.trace_id}
""",
}
STREAM_FORMS = ("jsonl", *FORMS)


def form_sql(form: str) -> str:
    """Return the SQL of an event as a line of JSON, in a form of FORMS or as `jsonl`."""
    if form == "jsonl":
        return "to_json({" + public_select("'{0}': {1}") + "})::VARCHAR"
    text = FORMS[form]
    for word, meaning in _FORM_WORDS.items():
        text = text.replace(word, f"({meaning})")
    tree: dict[str, Any] = {}
    beside: list[str] = []
    for place, _, sql in (line.partition(" ") for line in text.splitlines()):
        *parents, name = re.findall(r"\{[^}]+\}|[^.{]+", place)
        if place[0] in ".{":
            parents = beside + parents
        else:
            beside = parents
        node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)
        node[name] = sql or re.findall(r"\w+", name)[-1]
    return _json_sql(tree)


def _json_sql(node: Any) -> str:
    """Return the SQL of a JSON value as text, NULL where nothing is in it."""
    if isinstance(node, str):
        return f"to_json({node})::VARCHAR"
    parts, brackets = [], "{}"
    for name, child in node.items():
        before, after = f'"{name}":', ""
        if name.startswith("{"):  # an attribute of OpenTelemetry
            kind, sql_type = ("intValue", "BIGINT") if "#" in name else ("stringValue", "VARCHAR")
            before, after = f'{{"key":"{name.strip("{#}")}","value":{{"{kind}":', "}}"
            child, brackets = f"({child})::{sql_type}", "[]"
        elif name.endswith("[]"):
            before, after = f'"{name[:-2]}":[', "]"
        parts.append(f"'{before}' || {_json_sql(child)} || '{after}'")
    return f"'{brackets[0]}' || nullif(concat_ws(',', {', '.join(parts)}), '') || '{brackets[1]}'"


# == Report ==
# depends on: SQL, Store, Text
#
# One HTML file for people: no script, nothing loaded, readable without styles; what was recorded is text.

_REPORT_STYLE = """\
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
table{border-collapse:collapse;font-size:.9rem;display:block;overflow-x:auto}
th,td{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;
border-bottom:1px solid #8886;overflow-wrap:anywhere;max-width:30rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{width:100%;height:auto}svg text{fill:CanvasText;opacity:.7;font-size:11px}line{stroke:#8886}
.success{fill:#56b4e9}.error{fill:#d55e00}.denied{fill:url(#hatch);stroke:CanvasText}#hatch *{fill:CanvasText}
pre{white-space:pre-wrap;overflow-wrap:anywhere}summary{cursor:pointer}"""
_OUTCOMES = ("success", "error", "denied")
_BUCKETS = (  # of time: up to how many seconds, and the label
    ("minute", 2 * 3600, "%H:%M"),
    ("hour", 4 * 86400, "%m-%d %H:00"),
    ("day", 120 * 86400, "%Y-%m-%d"),
    ("month", 40 * 366 * 86400, "%Y-%m"),
    ("year", inf, "%Y"),
)
_REPORT_FACTS = """\
SELECT count(*), min(t)::VARCHAR, max(t)::VARCHAR, epoch(max(t) - min(t))::BIGINT
FROM (SELECT CASE WHEN isfinite(timestamp) THEN timestamp END AS t FROM events)"""
_REPORT_BUCKETS = f"""\
SELECT strftime(b, '{{form}}'), {", ".join(f"count(*) FILTER (outcome = '{name}')" for name in _OUTCOMES)}
FROM (SELECT unnest(generate_series(date_trunc('{{unit}}', min(timestamp)), max(timestamp),
    INTERVAL 1 {{unit}})) AS b FROM events WHERE isfinite(timestamp))
  LEFT JOIN (SELECT date_trunc('{{unit}}', timestamp) AS b, CASE WHEN policy_decision = 'deny' THEN 'denied'
    WHEN status = 'error' THEN status ELSE 'success' END AS outcome FROM events) USING (b)
GROUP BY b ORDER BY b"""
# By title and columns (# marks numbers): queries of `events`.
_REPORT_TABLES = {
    "Denials: last at,name,user,reason,#calls": """\
SELECT max(timestamp)::VARCHAR, name, user_id, reason, count(*)
FROM events WHERE policy_decision = 'deny' GROUP BY 2, 3, 4 ORDER BY 5 DESC, 2, 3, 4 LIMIT 50""",
    "Errors by class: class,#calls,last at,name,example": """\
SELECT coalesce(error_type, nullif(regexp_extract(error, '^([A-Za-z_][A-Za-z0-9_.]*): ', 1), ''), 'unknown'),
  count(*), max(timestamp)::VARCHAR, arg_max(name, timestamp), left(arg_max(error, timestamp), 500)
FROM events WHERE status = 'error' GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 50""",
    "Slowest calls: #ms,at,name,user,event id": """\
SELECT duration_ms, timestamp::VARCHAR, name, user_id, event_id
FROM events WHERE duration_ms IS NOT NULL ORDER BY duration_ms DESC, timestamp, event_id LIMIT 10""",
    "Unfinished calls: at,name,user,error,event id": """\
SELECT timestamp::VARCHAR, name, user_id, left(error, 200), event_id FROM events
WHERE status = 'error' AND starts_with(error, 'unfinished:') ORDER BY timestamp DESC, event_id LIMIT 50""",
}


def _html_table(heads: str, rows: Iterable[Sequence[object]]) -> str:
    """Return rows as a table; what comes from the log is escaped."""
    kinds = [' class="n"' if name.startswith("#") else "" for name in heads.split(",")]
    text = "<table>"
    for tag, *cells in (("th", *heads.replace("#", "").split(",")), *(("td", *row) for row in rows)):
        text += f"<tr>{''.join(f'<{tag}{kind}>{_html(cell)}' for kind, cell in zip(kinds, cells))}</tr>\n"
    return text + "</table>"


def _html(value: object) -> str:
    import html

    text = f"{value:,}" if isinstance(value, int) else "" if value is None else printable(str(value))
    return html.escape(text)


def _chart(unit: str, buckets: Sequence[tuple[str, int, int, int]]) -> Iterator[str]:
    """Yield an SVG chart of calls a bucket of time, stacked by outcome."""
    left, base, height = 55, 200, 180
    top = max(sum(counts) for _, *counts in buckets)
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    step = next(step for step in steps if top <= 6 * step)
    limit = -(-top // step) * step
    bar, every = (900 - left) / len(buckets), -(-len(buckets) // 8)
    yield f"""<svg viewBox="0 0 900 240" role="img" aria-label="Calls per {unit}, by outcome"><defs>\
<pattern id="hatch" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">\
<rect width="2" height="4"/></pattern></defs>"""
    for mark in range(0, limit + 1, step):
        y = base - height * mark / limit
        yield f'<line x1="{left}" x2="900" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:,}</text>'
    for number, (label, *counts) in enumerate(buckets):
        x, y = left + number * bar, float(base)
        title = ", ".join(f"{count:,} {name}" for count, name in zip(counts, _OUTCOMES))
        yield f"<g><title>{label}: {title}</title>"
        for count, name in zip(counts, _OUTCOMES):
            y -= height * count / limit
            if count:
                yield f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{max(bar * 0.85, 0.5):.1f}" '
                yield f'height="{height * count / limit:.1f}"/>'
        yield "</g>" if number % every else f'</g><text x="{x:.1f}" y="{base + 16}">{label}</text>'
    for x, name in zip(itertools.count(left, 90), _OUTCOMES):
        yield f'<rect class="{name}" x="{x}" y="226" width="12" height="12"/>'
        yield f'<text x="{x + 17}" y="236">{name}</text>'
    yield "</svg>"


def report_html(reading: Reading, what: Filter, facts: Mapping[str, str], *, newest: int) -> Iterator[str]:
    """Yield the report of the matching events."""
    ask = functools.partial(reading.ask, what)
    ((calls, first, last, span),) = ask(_REPORT_FACTS)
    yield f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Audit report</title><style>{_REPORT_STYLE}</style></head><body><h1>Audit report</h1>
"""
    facts = {**facts, "calls": f"{calls:,}", "first event": first, "last event": last}
    yield _html_table("what,value", list(facts.items()))
    if span is not None:
        unit, form = next((name, form) for name, seconds, form in _BUCKETS if span <= seconds)
        yield f"<h2>Calls per {unit} (UTC)</h2>"
        yield from _chart(unit, ask(_REPORT_BUCKETS.format(unit=unit, form=form)))
    heads = "{},#calls,#errors,#denied,#p50 ms,#p95 ms,#p99 ms,#max ms,first,last"
    for by in ("name", "user", "client", "server"):
        groups = reading.stats(what, by=by, count=50)
        if any(group is not None for group, *_ in groups):
            title = "Tools, resources and prompts" if by == "name" else f"{by.title()}s"
            yield f"<h2>{title}</h2>{_html_table(heads.format(by), groups)}"
    tables = {head: ask(sql) for head, sql in _REPORT_TABLES.items()}
    places = [PUBLIC_COLUMNS.index(name) for name in ("timestamp", "name", "user_id", "duration_ms")]
    running = [tuple(row[place] for place in places) for row in reading.running(what)]
    tables |= {"Running calls: since,name,user,#ms": running}
    tables |= {"Lost events: entered at,#events,reason": reading.losses()}
    for head, rows in tables.items():
        title, columns = head.split(": ")
        yield f"<h2>{title}</h2>{_html_table(columns, rows) if rows else '<p>none</p>'}"
    yield "<h2>Newest events</h2>"
    for row in reading.rows(what, count=newest):
        event = {name: _html(value) for name, value in zip(PUBLIC_COLUMNS, row) if value is not None}
        head = " · ".join(event.get(name, "") for name in ("timestamp", "name", "status", "policy_decision"))
        body = "\n".join(f"{name}: {value}" for name, value in event.items())
        yield f"<details><summary>{head}</summary><pre>{body}</pre></details>\n"
    yield "</body></html>\n"


def prometheus_text(report: Mapping[str, Any], prefix: str = "mxcp_audit") -> Iterator[str]:
    """Yield the numbers of `doctor` as gauges in the text format of Prometheus."""
    for name, value in report.items():
        metric = f"{prefix}_{name}"
        samples = {"": len(value) if isinstance(value, list) else value}
        if name == "free_bytes":
            samples = value
        elif isinstance(value, Mapping):
            yield from prometheus_text(value, metric)
        if all(isinstance(number, (int, float)) for number in samples.values()):
            yield f"# TYPE {metric} gauge"
            for path, number in samples.items():
                label = f"{{path={json.dumps(printable(path), ensure_ascii=False)}}}" if path else ""
                yield f"{metric}{label} {+number}"


# === Assembly ===
# depends on: Errors, Config, Events, Encoding, Writer, Logger, Store
#
# What needs both recording and reading.


def ingest_once(settings: Mapping[str, Any], *, wait: float) -> dict[str, Any]:
    """Ingest in this process, and return what became of it as JSON values."""
    told = Diagnostics(silent=True)
    try:
        answer = Store(Config(**settings), diagnostics=told).ingest_for_logger(wait=wait)
    except Exception as error:  # whatever it is, the server goes on
        fault = str(error) if isinstance(error, AuditError) else f"{type(error).__name__}: {error}"
        answer = {"done": False, "fault": fault, "locked": isinstance(error, DatabaseLockedError)}
    answer |= {"ingested": told.ingested, "rejected": told.rejected, "log": told.untold}
    return {**answer, "cpu": sum(os.times()[:4])}


def ingest_child(settings: Mapping[str, Any], wait: float) -> None:
    """Ingest in a child that a logger started, and print the answer as a line."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends, Linux is to end this process, and not the server
    sys.stdout.write(f"\n{json.dumps(ingest_once(settings, wait=wait))}\n")
    sys.stdout.flush()


AuditLogger._ingest = staticmethod(ingest_once)


# --- MXCP's own logs

# Arguments of `log_event`, their names in MXCP 0.1 to 0.3, in newer ones, and those that are the same in all.
_MXCP_OURS = "caller event_type name input_params reason status"
_MXCP_OLD = "caller type name input_json reason status"
_MXCP_NEW = "caller_type operation_type operation_name input_data policy_reason operation_status"
_MXCP_SAME = "duration_ms policy_decision error user_id session_id trace_id"


_Imported: TypeAlias = tuple[int, dict[str, Any]]  # an event's time in ns, and arguments of `log_event`


def event_of_mxcp(line: bytes) -> _Imported | None:
    """Return the event of a line of MXCP's log."""
    record = _json_object(line)
    is_new = "operation_type" in record
    if not is_new and "type" not in record:
        if "schema_name" in record and "fields" in record:
            return None
        raise ValueError("no event: it has neither type nor operation_type")
    names = _MXCP_NEW if is_new else _MXCP_OLD
    arguments = zip(f"{_MXCP_OURS} {_MXCP_SAME}".split(), f"{names} {_MXCP_SAME}".split())
    event = {name: record.get(theirs) for name, theirs in arguments}
    if not is_new and isinstance(event["input_params"], str):
        with suppress(ValueError, RecursionError):  # else it is a text
            event["input_params"] = json.loads(event["input_params"])
    moment = record.get("timestamp")
    try:
        us = microseconds(sql_time(parse_iso(moment)))
        if us < 0:
            raise ValueError("is before 1970")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"timestamp {moment!r:.60} {error}") from None
    return us * 1000, event


# --- import: it redacts and encodes like a logger, and asks the ledger what is known

PART_EVENTS = 20_000  # arbitrary: of an imported file, in one segment


def _file_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a file, plain or gzip."""
    import gzip  # lazily: few need it

    with open(path, "rb") as raw:
        head = raw.peek(12)
        if head[8:12] == b"DUCK":
            raise StoreError(f"{path} is a DuckDB database; read it as it is: log --db {path}")
        file = cast("IO[bytes]", gzip.open(raw)) if head[:2] == b"\x1f\x8b" else raw
        for line in iter(lambda: file.readline(2**26), b""):  # there may be no line breaks
            yield line.removeprefix(codecs.BOM_UTF8).strip()


class Importer:
    """Takes MXCP's JSONL logs in: each event once, however often a file is given and however it grew.

    A file becomes segments of a day at most, named by their first event's time and a digest of the file up to
    it: the ledger knows them again in a file that was renamed, compressed or continued.
    """

    def __init__(self, config: Config, *, on_bad_line: Callable[[str], None], wait: float) -> None:
        limit = config.max_input_bytes
        self._encoder = Encoder(redactor_of(config), max_input_bytes=limit, clock=lambda: self._now_ns)
        self._store, self._on_bad_line, self._wait, self._now_ns = Store(config), on_bad_line, wait, 0

    def take(self, path: str) -> tuple[int, int, int]:
        """Import a file; return its numbers of new events, known ones, and bad lines."""
        import hashlib  # lazily: it loads OpenSSL

        ingest = functools.partial(patiently, self._store.ingest, self._wait)
        ingest()  # the ledger does not know a part that waits in the journal
        self._bad = events = ingested = known = 0
        self._digest = hashlib.sha256()
        file = self._read(path)
        for _, day in itertools.groupby(file, lambda event: event[0] // 86_400_000_000_000):
            for first in day:
                part = f"{new_segment_id(first[0]).rpartition('-')[0]}-{self._digest.hexdigest()[:8]}"
                # Parts are ingested one after the other: after a new one, all are new.
                ask = functools.partial(self._store.imported, part)
                if not events and (found := patiently(ask, self._wait)):
                    known += self._skip(path, itertools.chain([first], file), *found)
                    continue
                events += self._write(part, itertools.chain([first], day))  # noqa: B031
                if events - ingested >= PART_EVENTS:
                    ingest()
                    ingested = events
        ingest()
        return events, known, self._bad

    def _read(self, path: str) -> Iterator[_Imported]:
        """Yield the events; report bad lines, and damage, which is the end."""
        import zlib

        lines, number = enumerate(_file_lines(path), 1), 0
        while True:
            try:
                number, line = next(lines)
                event = event_of_mxcp(line) if line else None
            except StopIteration:
                return
            except (ValueError, OSError, EOFError, zlib.error) as error:
                self._bad += 1
                place = f"{path}:{number}" if number else path
                self._on_bad_line(f"{place}: {getattr(error, 'strerror', None) or error}")
                continue
            if event is not None:
                self._digest.update(line)
                yield event

    def _write(self, part: str, events: Iterator[_Imported]) -> int:
        """Write a part into the journal; count its events."""
        encoder, lines, size = self._encoder, list[bytes](), 0
        for self._now_ns, values in events:
            echoes: list[str] = []
            text = encoder.input_json(values.pop("input_params"), values["name"], None, echoes)
            line = encoder.line(**values, input_json=text, echoes=echoes)
            lines.append(finish_line(line, len(lines) + 1))
            size += len(lines[-1])
            if len(lines) == PART_EVENTS or size >= 2**25:
                break
        with contextlib.ExitStack() as stack:
            try:
                segment = self._store.journal.open_segment(named=part)
            except FileExistsError as error:
                raise StoreError(f"{part} is being imported by another process; try again later") from error
            stack.callback(segment.seal)
            segment.append(b"".join(lines), len(lines))
        return len(lines)

    def _skip(self, path: str, file: Iterator[_Imported], events: int, last: str) -> int:
        """Pass over a part that is in the database; count its events in the file."""
        times = [now_ns for now_ns, _ in itertools.islice(file, events)]
        if len(times) == events and max(times) // 1000 != microseconds(last):
            remedy = "import the missing events as a file of their own"
            raise StoreError(f"{path} begins like an imported file, but goes on differently; {remedy}")
        return len(times)


# === Command line ===
# depends on: every section above
#
# The only section that prints or exits. The answer goes to standard output, all else to standard error.
# Exit: 0 done, 1 bad news or failure, 2 wrong usage or configuration, 75 locked.

# == Wrap ==
# depends on: Errors, Writer, Calls, Logger
#
# Bytes, signals and ends pass unchanged whatever the recording does, unless `strict` says otherwise.

MAX_MESSAGE_BYTES = 256 * 2**20  # arbitrary: a message without an end must not take all memory
_TOO_LONG = f"a message longer than {MAX_MESSAGE_BYTES >> 20} MiB passed unaudited"
_SIGTERM, _SIGKILL = 15, 9  # on each system with process groups


class StdioAudit(Exchange):
    """Matches requests with their answers, in the bytes between a client and a server.

    Two threads feed the sides, a piece *before* it is passed on: no answer overtakes its request or its row.
    """

    def __init__(self, logger: AuditLogger) -> None:
        super().__init__(logger)
        self._rests = bytearray(), bytearray()  # of a line, from server and client
        self._pending: dict[object, Call | tuple[str, object]] = {}  # by id: a call, or method and parameters
        self._session: object = None  # as `origin_of` reads one

    def _take_piece(self, data: bytes | None, *, is_client: bool) -> str | None:
        """Take in a piece from a side, or its end as None; return what is wrong with it."""
        problem = None
        for line in _lines_of(self._rests[is_client], data):
            if is_client or self._pending or self.logger.unfinished:
                messages, fault = self.messages(line, is_client=is_client)
                problem = (fault if line else _TOO_LONG) or problem
                for message in messages:
                    parts = _parts_of(message)
                    try:
                        self._take_request(*parts) if is_client else self._take_answer(*parts, message)
                    except AuditUnavailableError as error:
                        problem = str(error)
        return problem

    from_client = functools.partialmethod(_take_piece, is_client=True)
    from_server = functools.partialmethod(_take_piece, is_client=False)

    def _take_request(self, key: object, method: str, params: Any) -> None:
        if method == "initialize" or method.startswith("tasks/"):
            self._pending[key] = method, params
            if method == "initialize":
                self._session = types.SimpleNamespace(client_params=params)
        elif method == "notifications/cancelled":
            texts = "cancelled by the client", _text(_get(params, "reason"))
            self.finish(_key_of(_get(params, "requestId")), ": ".join(filter(None, texts)))
        elif method in MCP_METHODS:
            context = types.SimpleNamespace(meta=_get(params, "_meta"), session=self._session, request_id=key)
            call = self.call_of(MCP_METHODS[method], context, params)
            self.finish(key, "its id was used again before it was answered")
            self._pending[key] = call
            call.begin()  # some servers execute what has no id
            self.finish(key, "sent without an id that could be answered") if key is None else None

    def _take_answer(self, key: object, method: str, params: Any, message: dict[str, Any]) -> None:
        if isinstance(key, str) and key.isdecimal() and key not in self._pending:
            key = _json_int(key)  # clients of the SDKs take "7" for 7
        pending, result, failure = self._pending.get(key), message.get("result"), message.get("error")
        if method:  # the server counts its own ids
            self.logger.unfinished.end_task(_text(_get(params, "taskId")), params)
        elif isinstance(pending, tuple):
            self._pending.pop(key, None)  # another thread may close all
            self.see(*pending, result, failure)
        elif failure is not None or "result" not in message:
            code = _text(_get(failure, "code"))
            text = _text(_get(failure, "message")) or _text(failure) or "the server answered with an error"
            self.finish(key, f"{text} ({code})" if code else text, code)
        elif pending is not None:
            conclude(pending, result, self)
            self._pending.pop(key, None) if pending.waits else self.finish(key)

    def finish(self, key: object, error: object = None, code: str | None = None, waits: bool = True) -> None:
        call = self._pending.pop(key, None)
        if isinstance(call, Call):
            if error is not None:
                call.fail(error, code)
            call.end() if waits else call._end(None)

    def close(self, reason: str) -> None:
        """Record every unanswered call, with `reason` as its error."""
        for key in list(self._pending):
            self.finish(key, reason, waits=False)
        self.logger.unfinished.close()

    def messages(self, line: bytes, *, is_client: bool) -> tuple[list[dict[str, Any]], str | None]:
        """Return the messages of a line, as any reader may take it, and what is wrong with it."""
        messages, unreadable, doubtful = list[dict[str, Any]](), list[str](), list[object]()

        def _hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name.lower() for name, _ in pairs]
            if len({*names}) < len(names) and not {"method", "name", "uri"}.isdisjoint(names):
                doubtful.append(pairs)  # readers of the first, the last or any case see others
            return dict(pairs)

        text = line.strip().decode("utf-8", "replace").lstrip("\ufeff")
        parts = text.split("\r")  # Node's SDK ends lines at LF, Python's at CR as well
        for piece in filter(str.strip, parts if parts == [text] else [*parts, text]):
            try:
                value = json.loads(piece, parse_int=_json_int, object_pairs_hook=_hook if is_client else None)
            except RecursionError:
                return messages, "a message passed unaudited: it is nested too deeply"
            except ValueError:
                unreadable.append(piece)
                continue
            batch = value if isinstance(value, list) else [value]
            known = messages[:] if piece is text else []  # by its parts
            messages += [each for each in batch if type(each) is dict and each not in known]
        if doubtful:
            return messages, "a message names a member twice: servers may differ in what they execute"
        is_none = is_client and text in unreadable and not {*parts}.isdisjoint(unreadable)
        return messages, "a line passed unaudited: it is no JSON" if is_none else None


def _parts_of(message: Mapping[str, Any]) -> tuple[object, str, Any]:
    """Return id, method and parameters; servers in Go take any case."""
    members = {name.lower(): value for name, value in message.items() if value is not None}
    method = message.get("method") or members.get("method")
    params = message["params"] if message.get("params") is not None else members.get("params")
    params = {**{k.lower(): v for k, v in params.items()}, **params} if type(params) is dict else params
    return _key_of(message.get("id")), method if isinstance(method, str) else "", params


def _key_of(value: object) -> object:
    return value if type(value) in (str, int, float) else None


def _json_int(text: str) -> int | str:
    return int(text) if len(text) <= 640 else text  # JavaScript takes any; Python's limit is never lower


def _lines_of(rest: bytearray, data: bytes | None) -> Iterator[bytes]:
    """Yield the lines that `data`, or the end, completes, an empty one if too long; keep the rest."""
    if data is None:  # some take a last line that has no end
        data = b"\n" if rest else b""
    for number, piece in enumerate(data.split(b"\n")):
        if number:
            line = b"".join((rest, b"\n")) if len(rest) <= MAX_MESSAGE_BYTES else b""
            rest.clear()  # first: whoever takes the line may fail
            yield line
        rest += piece[: MAX_MESSAGE_BYTES + 1 - len(rest)]


class WrappedServer:
    """A stdio server as our child, with a thread for each direction, and one that waits for its end.

    Pieces pass as they come; for a strict logger whole lines, each once it is on record. The child and what
    it starts (`npx` starts the server) are a process group: it gets our signals, and nothing of it is left.
    """

    GRACE_SECONDS = 2.0  # as the SDKs give a server

    def __init__(self, command: Sequence[str], audit: AuditLogger) -> None:
        import shutil
        import subprocess

        self._enabled, self._strict = audit.enabled, bool(audit.config.strict) and audit.enabled
        self._told, self._stdio = Diagnostics(), StdioAudit(audit)
        self._client_gone, self._reading_since = False, 0.0  # inf while a piece is recorded and passed on
        self._answering = threading.Lock()  # refusals, too
        die_with_us = None
        with suppress(Exception):  # Linux can
            import ctypes

            die_with_us = functools.partial(ctypes.CDLL(None).prctl, 1, _SIGKILL)  # PR_SET_PDEATHSIG
        # Windows needs the path of npx.cmd.
        args, pipe = [shutil.which(command[0]) or command[0], *command[1:]], subprocess.PIPE
        try:
            self._process: Any = subprocess.Popen(  # safe: no thread of ours runs yet
                args, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True, preexec_fn=die_with_us
            )
        except OSError as error:
            raise AuditError(f"{command[0]} can't be started: {error.strerror}") from error

    def run(self) -> int:
        """Pass everything on; return the server's exit code, negative if a signal ended it."""
        import signal

        for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup, for one
                with suppress(ValueError, OSError):
                    signal.signal(number, self._signal)
        tasks = self._pass_requests, self._pass_answers, self._process.wait
        _, answers, waiter = threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        while waiter.is_alive():  # a signal before it sleeps is seen at the next turn
            waiter.join(0.2)
        ended = time.monotonic()  # after that a grandchild may hold the pipe open
        while answers.is_alive() and time.monotonic() < max(ended, self._reading_since) + self.GRACE_SECONDS:
            answers.join(0.1)
        self._end_group(_SIGTERM, _SIGKILL)
        side = "client" if self._client_gone else "server"
        self._stdio.close(f"the {side} went away before it was answered")
        return int(self._process.returncode)

    def _pass_requests(self) -> None:
        try:
            for data in self._pieces_of(0):
                if self._is_admitted(data, is_client=True):
                    _write_all(self._process.stdin.fileno(), data)
        except OSError:  # the server reads no more, as the client shall see
            _give_up(0)
            return
        self._process.stdin.close()
        while self._reading_since >= 0 and not self._client_gone:
            self._client_gone = _reader_is_gone(1, 1.0)
        self._end_group(0, _SIGTERM, _SIGKILL)

    def _pass_answers(self) -> None:
        for data in self._pieces_of(self._process.stdout.fileno()):
            self._reading_since = inf
            if self._is_admitted(data, is_client=False):
                self._answer(data)
            self._reading_since = time.monotonic()
        self._reading_since = -inf
        _give_up(1)

    def _pieces_of(self, fd: int) -> Iterator[bytes | None]:
        """Yield what comes, as it comes, for a strict logger in whole lines; None at the end."""
        rest = bytearray()
        with suppress(OSError):  # there may be no such file
            while data := os.read(fd, 2**16):
                yield from _lines_of(rest, data) if self._strict else [data]
        yield from _lines_of(rest, None)
        yield None

    def _is_admitted(self, data: bytes | None, *, is_client: bool) -> bool:
        """Record a piece; return False if a strict logger refuses it, and answer so."""
        problem = _TOO_LONG if data == b"" else None
        try:
            if self._enabled and not problem:
                problem = (self._stdio.from_client if is_client else self._stdio.from_server)(data)
        except Exception as fault:
            problem = f"a message passed unaudited: {describe_exception(fault)}"
        if problem and self._strict:
            problem = problem.replace(" passed unaudited", " was refused")
            error = {"code": -32000, "message": problem}
            for key, method, _ in map(_parts_of, self._stdio.messages(data or b"", is_client=is_client)[0]):
                if bool(method) is is_client:
                    self._stdio.finish(key, problem, "AuditUnavailableError", waits=False)
                if key is not None and bool(method) is is_client:  # the client waits for it
                    self._answer(json.dumps({"jsonrpc": "2.0", "id": key, "error": error}).encode() + b"\n")
        if problem:
            self._told.report(problem[:16], problem)  # the start tells the kind
        return not (problem and self._strict)

    def _answer(self, data: bytes | None) -> None:
        with self._answering:
            if not self._client_gone:
                try:
                    _write_all(1, data)
                except OSError:  # what comes now is for the record only
                    self._client_gone = True

    def _signal(self, number: int, frame: object = None) -> bool:
        """Send a signal to the server's group, or ask by 0; return False if nobody is left."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, number)
            elif number:
                self._process.send_signal(number)
            return hasattr(os, "killpg") or self._process.poll() is None
        except (OSError, ValueError):  # Windows knows few signals
            return False

    def _end_group(self, *numbers: int) -> None:
        """Send signals, each if the one before didn't end the whole group."""
        for number in numbers:
            deadline = time.monotonic() + self.GRACE_SECONDS * (number != _SIGKILL)
            self._signal(number)
            while time.monotonic() < deadline and self._signal(0):
                time.sleep(0.02)


def _write_all(fd: int, data: bytes | None) -> None:
    rest = memoryview(data or b"")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _give_up(fd: int) -> None:
    """Close a pipe but keep its number, lest a segment become stdout."""
    os.dup2(os.open(os.devnull, os.O_RDWR), fd)


def _reader_is_gone(fd: int, seconds: float) -> bool:
    """Return True once nobody reads `fd` any more; False if unknown in time."""
    import select

    if not hasattr(select, "poll"):
        time.sleep(seconds)
        return False
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(1000 * seconds))


def end_like(code: int) -> int:
    """Return a child's exit code, or die of the signal that it died of."""
    if code < 0:
        import signal

        with suppress(OSError, ValueError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code if code >= 0 else 128 - code


# == Commands ==
# depends on: every section above, Wrap
#
# One table says what each command is for and takes; its `cmd_…` does it and returns an exit status.

Args: TypeAlias = "argparse.Namespace"
EXIT_FAILED, EXIT_USAGE, EXIT_LOCKED = 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h


class _UsageError(AuditError):
    pass


# --- words: what options mean

_SORTS = tuple(name.removesuffix("_ms") for name in STATS_COLUMNS[:7])
_FORMATS = sorted({*EXPORT_FORMATS, *STREAM_FORMS})
_SHELLS = ("bash", "zsh")


def parse_time(text: str, *, now: datetime.datetime | None = None, local: bool = False) -> str:
    """Return a duration before now, or an ISO date or time (UTC unless `local`), as naive UTC text."""
    now = (now or utc_now()).astimezone(None if local else datetime.timezone.utc)
    day = f"{now - datetime.timedelta(days=text == 'yesterday'):%Y-%m-%d}"
    given = re.sub(r"^(?=\d\d:\d\d)", f"{day}T", day if text in ("today", "yesterday") else text)
    try:
        if re.match(r"\d{4}-", given):
            return sql_time(parse_iso(given, local=local))
        seconds = parse_duration(re.sub(r"(?<=\d)min\b", "m", text))
        return sql_time(now - datetime.timedelta(seconds=seconds))
    except (ValueError, OverflowError):
        examples = "10m, 2h, 1d, 1h30m, today, 15:00, 2026-01-31 or 2026-01-31T12:00:00Z"
        raise ValueError(f"{text!r} is neither a duration nor a time: write {examples}") from None


def _value(metavar: str, text: str, *, local: bool) -> Any:
    """Return what the text behind an option with this metavar means."""
    if metavar in ("FILE", "DIR", "KEY", "TARGET"):  # it may be no UTF-8
        if not text:
            raise ValueError("the file name is empty")
    elif metavar != "COMMAND" and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{text!r} is no UTF-8")
    elif metavar == "WHEN":
        return parse_time(text, local=local)
    elif metavar == "N":
        if re.fullmatch("0*[1-9][0-9]{,17}", text):
            return int(text)
        raise ValueError(f"{text!r} is no whole number above 0 (or too large)")
    elif metavar == "SECONDS":
        if re.fullmatch(r"[0-9]{1,5}(\.[0-9]*)?", text):
            return float(text)
        raise ValueError(f"{text!r} is no number of seconds below 100000")
    elif metavar == "A,B,...":
        names = dict.fromkeys(map(str.strip, text.split(",")))
        for name in names.keys() - set(PUBLIC_COLUMNS):
            raise ValueError(f"there is no column {name!r}; there are {', '.join(PUBLIC_COLUMNS)}")
        return tuple(names)
    return text


# --- the options: a table, of which the parser, its help, the completion and docs/cli.md are made

# `@` begins a command, with one line about it; then come more about it, examples (`>`), groups (`[…]`, or `&`
# for another's) and options: names, metavar or {constant} of choices, `=` a default, _MARKS, the help.
_OPTIONS = """
&common
[which log]
--config FILE | the site file (default: mxcp-site.yml here or above)
--profile NAME | the profile (default: MXCP_PROFILE, or the site file's)
--db TARGET | a database; no site file is read
[]
--debug | show tracebacks and what goes on

&times
--utc | times are UTC (the default); in JSON, exports and groups of `stats` always
--local | times are of this machine's time zone

&waiting
--wait SECONDS =5.0 | how long to try while another process holds the database (default: 5)

&filters
[which events (all must hold; * in a name is any text)]
--tool NAME * | of this tool; repeated: of any of these
--resource URI * | likewise
--prompt NAME * | likewise
--type {EVENT_TYPES} | of this type
--policy {POLICY_DECISIONS} | with this decision (denied means deny)
--status {STATUSES} | that ended so
--since WHEN | 10s 10m 2h 1d 1w 1h30m ago, today, yesterday, 15:00, or an ISO date or time
--until WHEN | before that
--caller NAME | from this caller: http, stdio, cli
--user ID | by this user
--session ID | in this session
--trace ID | in this trace
--client NAME | by this program, such as claude-ai/1.2
--agent ID | by this OAuth client
--address ADDRESS | from this address
--server NAME | on this server
--error-type NAME | that failed with this exception class or JSON-RPC code
--event ID | with this event_id
--grep TEXT | with this text in name, input, error or reason, in any case
--min-ms N | that took at least N milliseconds

@log show, follow, filter and export events, those of running servers too
> log --tool 'user_*' --grep timeout --input
> log --policy denied --since 7d --export denied.csv
&filters
[what is shown]
&times
-n --limit N | at most N events (default: 100)
--running | calls that run on this host instead, longest first; MS is how long
--oldest-first | the oldest events, oldest first
--json | JSON; with -f an object a line
--columns A,B,... | these of: {PUBLIC_COLUMNS}
--wide | more columns, nothing cut to the terminal
--input | the redacted input under each event
-f --follow | new events as they happen; with --limit or --since past ones first
[export]
--export FILE | write every match (or --limit) with all columns, as the extension says: {EXPORT_FORMATS}; \
- is standard output
--format FORMAT {_FORMATS} | of an export, instead of its extension; else of lines: {STREAM_FORMS}
--cursor-file FILE | print what is new since the last run with this file
--post URL | send the lines there, in batches
--header NAME=VARIABLE * | of --post: a header from an environment variable
--raw | no apostrophe in CSV before formulas
--bom | begin CSV with a byte order mark, for Excel

@show show one event in full
> show 1f2e3d4c:17 --around 5
event EVENT_ID | as log --wide shows it, or a part of it: 1f2e3d4c:17
--around N | a table of it with N events of its session before and after
&times
--json | JSON

@stats count calls, errors and denials; find what is slow
A line a group; P50, P95, P99 and MAX are milliseconds.
> stats --type tool --sort p95
&filters
[what is shown]
&times
--by {STATS_BY} =name | what makes a group (default: name)
--sort {_SORTS} =calls | largest first, and as bars (default: calls); hours and days by time
-n --limit N =100 | at most N groups (default: 100)
--json | JSON

@sql ask in SQL, read-only
Run one SELECT of DuckDB over the view `logs`: every event, with the columns {PUBLIC_COLUMNS}. \
It can write nothing and read nothing else.
> sql "SELECT name, avg(duration_ms) FROM logs WHERE type = 'tool' GROUP BY name"
statement SELECT | the statement; - is standard input
--json | JSON
--csv | CSV
--raw | no apostrophe in CSV before formulas

@config show the settings that hold, and their sources
> config --profile production
--json | JSON

@redact show what would be recorded of an input, and why
Read JSON on standard input. Without a site file the default rules hold.
> redact --tool login --json < input.json
--tool NAME | as the input of this tool
--json | JSON

@ingest move what ended servers left in the journal into the database
> ingest

@doctor say how the log is doing, and what to do about it
> doctor --json
--json | JSON
--prometheus | the numbers as gauges of Prometheus

@report write a report as one HTML file
> report --out report.html --since 30d
&filters
&times
--out FILE ! | the file; it appears whole or not at all
-n --limit N | the newest N events in full (default: 100)

@import take in MXCP's own JSONL logs
Any version, plain or gzip. Nothing is imported twice: a log that grew can be given again.
> import logs-2025.jsonl.gz logs-2026.jsonl
files FILE + | a JSONL log of MXCP's

@wrap run any stdio MCP server and record what it executes
COMMAND talks over standard input and output, in any language.
> wrap -- npx -y @modelcontextprotocol/server-everything
--strict | refuse calls that can't be recorded (default: as the site file says)
server COMMAND … | the server's command and arguments, behind --

@verify prove that nothing was changed, removed or inserted
Recompute the ledger from the events.
> verify --checkpoint heads.json
&times
--json | JSON
--since WHEN | recompute only segments with events since then
--checkpoint FILE | what `checkpoint` printed; nothing up to it may be missing
--signed-by FILE | allowed signers of OpenSSH; one must have signed it

@checkpoint print where the ledger ends, to be kept elsewhere
Kept out of reach of the database's writers, it lets `verify --checkpoint FILE` tell whether anything \
up to it was cut off or rewritten.
> checkpoint --sign ~/.ssh/id_ed25519 > heads.json
--sign KEY | sign it with a private key of OpenSSH

@prove print what proves to others that an event is in the log
With a later checkpoint, tools/verify_independently.py checks it without the log.
> prove EVENT_ID > proof.json
event EVENT_ID | as log --wide shows it

@purge delete old events, so that the rest still verifies
Delete segments whose last event is older; the ledger says what went.
> purge --older-than 90d --archive archive
&times
--older-than WHEN ! | 90d, or before an ISO date or time
--dry-run | say what would go
--archive DIR | first write what goes into DIR, as Parquet

@backup copy the log while the server runs
> backup copy.duckdb
file FILE | a new file; nothing is overwritten

@restore put a backup back, without losing what came after it
The backup replaces the database; what only the database holds is added.
> restore copy.duckdb
file FILE | what `backup` made

@compact give the space of purged events back to the file system
> compact

@completion print a script that completes words in a shell
> completion bash > ~/.local/share/bash-completion/completions/mxcp-audit
shell {_SHELLS} | which shell
"""
_SAME_WORDS = {"denied": "deny", "allowed": "allow", "warned": "warn"}
_MARKS = {"!": ("required", True), "*": ("action", "append"), "+": ("nargs", "+"), "…": ("nargs", "A...")}
# Options, and what they do not go with; or, behind `+`, need.
_RULES = """\
db config profile
utc local
json csv
export columns wide input json cursor-file post
format columns wide input json
running export follow format oldest-first
follow export until oldest-first
cursor-file limit oldest-first + format
header + post
post + format
bom + export
raw + export
signed-by + checkpoint"""


def option_blocks() -> dict[str, list[str]]:
    """Return the lines of each block of _OPTIONS by its first word; the first line is what follows it."""
    blocks = (block.split("\n") for block in _OPTIONS.replace("\\\n", "").strip().split("\n\n"))
    return {head.split(" ")[0]: [head.partition(" ")[2], *lines] for head, *lines in blocks}


def _worded(text: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: ", ".join(globals()[match[1]]), text)


def _add_option(place: Any, line: str, local: bool) -> None:
    """Add one line of _OPTIONS to a parser or a group of one."""
    import argparse

    def value(text: str) -> Any:
        try:
            return _value(settings["metavar"], text, local=local)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    form, _, text = line.partition(" | ")
    names, settings = list[str](), dict[str, Any]()
    for word in form.split(" "):
        if word.startswith("-") or not names:
            names.append(word)
        elif word.startswith("{"):
            settings |= {"choices": globals()[word[1:-1]], "type": lambda word: _SAME_WORDS.get(word, word)}
        elif word.startswith("="):
            settings["default"] = word[1:]
        else:
            settings |= [_MARKS[word]] if word in _MARKS else [("metavar", word), ("type", value)]
    if not settings and form.startswith("-"):
        settings["action"] = "store_true"
    place.add_argument(*names, **settings, help=_worded(text))


def build_parser(*, local: bool = False) -> argparse.ArgumentParser:
    """Return the parser that _OPTIONS describes, for `local` or UTC times."""
    import argparse
    import textwrap

    class Parser(argparse.ArgumentParser):
        version = property(lambda self: version_text())  # made only when asked for

        def error(self, message: str) -> NoReturn:
            raise _UsageError(f"{message}; see {self.prog} --help")

    form: Any = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Query the audit log of an MCP server, while the server runs."
    examples = "examples:\n  mxcp-audit log --follow\n  mxcp-audit COMMAND --help\n"
    parser = Parser(**form, prog="mxcp-audit", description=about, epilog=examples)
    parser.add_argument("--version", action="version", help="print version, journal format and file")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    blocks = option_blocks()
    for name, (brief, *lines) in blocks.items():
        if name[0] == "&":
            continue
        about = f"{brief[0].upper()}{brief[1:]}."
        if lines[0][0].isupper():
            about += f" {_worded(lines.pop(0))}"
        examples = "".join(f"\n  mxcp-audit {line[2:]}" for line in lines if line[0] == ">")
        about, examples = textwrap.fill(about, 78), f"examples:{examples}\n"
        command = commands.add_parser(name[1:], **form, help=brief, description=about, epilog=examples)
        opens_database = name not in ("@config", "@redact", "@wrap", "@completion")
        lines = ["&common"] * (name != "@completion") + ["&waiting"] * opens_database + lines
        place: Any = command
        for line in itertools.chain.from_iterable(blocks.get(line, ["", line])[1:] for line in lines):
            if line[0] == "[":
                place = command.add_argument_group(line[1:-1]) if line != "[]" else command
            elif line[0] != ">":
                _add_option(place, line, local)
    return parser


def _check_options(args: Args) -> None:
    given = {name.replace("_", "-"): value not in (None, False) for name, value in vars(args).items()}
    for name, *others in map(str.split, _RULES.splitlines()):
        for other in others if given.get(name) else ():
            needs = "+" in others[: others.index(other)]
            if given.get(other, needs) is not needs:
                raise _UsageError(f"--{name} {'needs' if needs else 'does not go with'} --{other}")


def version_text() -> str:
    """Return the version, the journal's format and this file's digest, which shows an edited copy."""
    import hashlib

    digest = "unknown"
    with suppress(OSError), open(__file__, "rb") as file:  # else inside of an archive
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    return f"mxcp_audit {__version__}, journal format {JOURNAL_FORMAT}, file {digest}"


# --- answers


def _print(text: str) -> None:
    write_text(sys.stdout, text)


def _print_json(value: object, indent: int | None = 2) -> None:
    _print(json_text(value, indent))


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # a closed standard error is no failure
        print("\n".join(map(printable, text.splitlines())), file=sys.stderr, flush=True)


def _progress(done: int, total: int | None = None) -> None:
    text = f"written {done >> 20} MiB" if total is None else f"verified {done} of {counted(total, 'event')}"
    if sys.stderr.isatty():
        with suppress(OSError, ValueError):
            print(f"\r{text}\x1b[K", end="\n" * (done == total), file=sys.stderr, flush=True)


def _terminal(*, wide: bool = False) -> dict[str, Any]:
    """Return the width to fit to, None for a pipe, and whether to use colour (no-color.org)."""
    is_terminal, width = sys.stdout.isatty(), None
    if (is_terminal or os.environ.get("COLUMNS")) and not wide:
        import shutil

        width = max(40, min(shutil.get_terminal_size().columns, 999))
    return {"width": width, "colour": is_terminal and not os.environ.get("NO_COLOR")}


# --- what several commands ask for


def _standard_input() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except (AttributeError, ValueError) as error:  # None after `<&-`; no text
        raise _UsageError(f"standard input can't be read as text: {error}") from error


def _config_of(args: Args) -> Config:
    if args.db is None:
        return load_config(config=args.config, profile=args.profile)
    journal = "logs-default.journal" if is_attach_target(args.db) else None  # the default profile's, here
    return config_from_arguments(path=args.db, journal=journal)


def _store_of(args: Args) -> Store:
    config = _config_of(args)
    if not config.enabled and not is_attach_target(config.path) and not os.path.exists(config.path):
        remedy = f"set `enabled: true` in its `audit` section of {config.site_file}"
        raise _UsageError(f"audit logging is not enabled for profile {config.profile!r}; {remedy}")
    return Store(config)


@contextlib.contextmanager
def _whole_log(store: Store, args: Args) -> Iterator[Reading]:
    """Open the whole log, or raise: half of it must not look like all."""
    with store.reading(wait=args.wait) as reading:
        if reading.problem is not None:
            raise reading.problem
        yield reading


def _filter_of(args: Args) -> Filter:
    if args.since and args.until and args.until <= args.since:
        raise _UsageError("--until is not after --since, so nothing can match")
    if args.event is not None:
        parse_event_id(args.event)
    fields = {**vars(args), "event_type": args.type, "event_id": args.event, "text": args.grep}
    fields |= {f"{name}s": tuple(fields[name] or ()) for name in EVENT_TYPES}
    return Filter(**{name: fields[name] for name in Filter._fields if fields[name] is not None})


def _write_whole(path: str, text: str) -> None:
    try:
        replace_file(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise AuditError(f"{path} can't be written: {error.strerror}") from error


_Write: TypeAlias = Callable[[Any], None]  # of rows


def cmd_log(args: Args) -> None:
    what, store, count = _filter_of(args), _store_of(args), args.limit or 100
    if args.export:
        _export(args, store, what)
        return
    columns = ""
    write: _Write = functools.partial(
        write_events,
        sys.stdout,
        columns=args.columns or (WIDE_COLUMNS if args.wide else SHORT_COLUMNS),
        below=("reason", "error") * (not args.columns) + ("input_json",) * args.input,
        local=args.local,
        widths=[] if args.follow else None,
        **_terminal(wide=args.wide),
    )
    if args.json:
        write = functools.partial(write_json, sys.stdout, columns=args.columns, by_line=args.follow)
    elif args.format:
        if args.format not in STREAM_FORMS:
            raise _UsageError(f"--format {args.format} needs --export; else: {', '.join(STREAM_FORMS)}")
        columns = f"{form_sql(args.format)} AS line"
        write = _print_lines if args.post is None else _poster_of(args)
    if args.follow or args.cursor_file:
        _follow(args, store, what, columns, write)
        return
    with store.reading(wait=args.wait) as reading:
        problem = reading.problem
        if problem and args.format:
            raise problem
        rows: Iterable[Row]
        if args.running:
            rows = reading.running(what, count=count)
        else:
            rows = reading.rows(what, count=count, oldest_first=args.oldest_first, columns=columns)
        if args.json or args.format:
            write(rows)
        else:
            rows = [*rows]
            write(rows)
            sys.stdout.flush()
            _say(summary(len(rows), "event", count))
        if problem:
            problem.args = (f"only events of the journal are shown: {problem}",)
            raise problem
        if lost := sum(count for _, count, _ in reading.losses(month_ago())):
            _say(f"{counted(lost, 'event')} lost in the last 30 days: see `doctor`")


def _follow(args: Args, store: Store, what: Filter, columns: str, write: _Write) -> None:
    """Write new events, or those since a cursor, which moves when they are written."""
    place, told, saved = args.cursor_file, "", ""
    follower = Follower(store, what, columns, _read_cursor(place) if place else None)
    past = [] if place else _past(args, store, what, follower, columns)
    if not (args.format or args.json):
        write = _with_running(write, follower)
    with contextlib.closing(follower):
        while True:
            begun = time.monotonic()
            try:
                fresh, past = past or follower.look(wait=0 if args.follow else args.wait), []
                write(fresh)
                if place and (reached := json.dumps(follower.cursor()) + "\n") != saved:
                    _write_whole(place, reached)
                    saved = reached
                if not (args.follow or fresh or follower.is_behind):
                    return
            except (JournalError, StoreError) as error:
                if not args.follow:
                    raise
                if str(error) != told:
                    told = str(error)
                    _say(f"new events may be missing until this is over: {told}")
            sys.stdout.flush()
            if args.follow and not follower.is_behind:
                pause = min(0.4, max(0.1, 100 * (time.monotonic() - begun)))  # 1 % of a core
                if _reader_is_gone(sys.stdout.fileno(), pause):
                    raise BrokenPipeError


def _past(args: Args, store: Store, what: Filter, follower: Follower, columns: str) -> list[Row]:
    """Let a follower begin now, and return what is wanted of the past, oldest first."""
    past: list[Row] = []
    try:
        with store.reading(wait=args.wait) as reading:
            follower.start(reading)
            if reading.problem is not None:
                _say(f"only events of the journal are shown until this is over: {reading.problem}")
            if args.limit or args.since:
                past = [*reading.rows(what, count=args.limit or 100, columns=columns)]
    except DatabaseNotFoundError:
        _say(f"there is no log at {store.target.name} yet; waiting for the first event")
    return past[::-1]


def _with_running(write: _Write, follower: Follower) -> _Write:
    """Return what writes rows and the running calls, which stay below them on a terminal."""
    is_terminal, width = sys.stdout.isatty(), _terminal()["width"] or 200
    due, below = 0.0, list[str]()

    def show(rows: Sequence[Row]) -> None:
        nonlocal due, below
        running = below
        if is_terminal:
            sys.stdout.write("\x1b[1F\x1b[2K" * len(below))
            below = []
        if rows:
            write(rows)
        if time.monotonic() >= due:
            due, running = time.monotonic() + 1, []
            for row in follower.running():
                call = dict(zip(PUBLIC_COLUMNS, row))
                passed = f", {int(call['duration_ms']) // 1000} s" if is_terminal else ""
                text = f"running since {call['timestamp']}{passed}: {call['type']} {call['name']}"
                running.append(clip(printable(text), width))
        for line in running:
            if line not in below:
                _print(line)
        below = running

    return show


def _read_cursor(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            cursor: dict[str, Any] = json.load(file)
        places = [*cursor["journals"].values(), *cursor["segments"].values()]
        if cursor["version"] != 1 or not all(type(each) is int for each in places):
            raise ValueError("of another version")
        return cursor
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever somebody edited
        raise _UsageError(f"{path} is no cursor of ours ({error}); to begin anew, remove it") from error


def _print_lines(rows: Iterable[Row]) -> None:
    for (line,) in rows:
        print(harmless_json(line))
    sys.stdout.flush()


def _poster_of(args: Args) -> _Write:
    """Return what posts lines, each batch until a 2xx comes, with pauses after 429, 5xx and faults."""
    import email.utils
    import http.client
    import urllib.request

    url = r"(https?://(?:[\w.-]+|\[[\w:.%]+])(?::([0-9]{1,5}))?)([/?#][!-~]*)?"
    match = re.fullmatch(url, args.post, re.ASCII)
    if not match or not 0 < int(match[2] or 80) < 65536:
        raise _UsageError("--post wants a URL of http or https without a password: --header takes secrets")
    shown, is_otlp = match[1], args.format == "otlp"  # the path may be a secret, as of a webhook
    headers = {"Content-Type": "application/json" if is_otlp else "application/x-ndjson"}
    for header in args.header or ():
        name, _, variable = header.partition("=")
        headers[name] = value = os.environ.get(variable, "").strip()
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+=[ -~\xa0-\xff]+", f"{name}={value}", re.ASCII):
            raise _UsageError(f"--header {header}: the variable is not set, or no header can be made of this")
    opener: Any = urllib.request.build_opener()
    opener.process_response = {}  # answers as they come: a redirect would ask elsewhere, without the events

    def post(lines: Sequence[str]) -> None:
        text = "\n".join(lines) + "\n"
        if is_otlp:  # one request of all resources: each line holds an array of one
            start = '{"resourceLogs":['
            text = start + ",".join(line[len(start) : -2] for line in lines) + "]}"
        request = urllib.request.Request(args.post, text.encode(), headers, method="POST")
        pause, end = 1.0, inf if args.follow else time.monotonic() + 60.0
        while True:
            told, code = "", 0
            try:
                with opener.open(request, timeout=30) as answer:
                    code = answer.status
                    if 200 <= code < 300:
                        return
                    told = f"{shown} answered {code}: "
                    with suppress(Exception):  # whatever a receiver sends; seconds or a date
                        asked = answer.headers["Retry-After"].strip()
                        if not asked.isdecimal():
                            asked = (email.utils.parsedate_to_datetime(asked) - utc_now()).total_seconds()
                        pause = max(pause, min(float(asked), 300.0))
                    told += answer.read(500).decode(errors="replace").strip()
            except ValueError:  # its text may hold a secret
                raise _UsageError(f"{shown}, or the proxy of the environment, is no address") from None
            except (OSError, http.client.HTTPException) as error:
                told = told or f"{shown} can't be reached: {getattr(error, 'reason', error)}"
            if 0 < code < 500 and code != 429 or time.monotonic() + pause > end:
                raise AuditError(f"{told}; nothing more was sent, and the cursor stays")
            _say(f"{told}; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(pause * 2, 60.0)

    def write(rows: Iterable[Row]) -> None:
        batch, size = list[str](), 0
        for (line,) in itertools.chain(rows, [("",)]):  # the empty one ends the last batch
            size += len(line.encode()) + 1
            if batch and (not line or len(batch) == 500 or size > 2**20):  # receivers have limits
                post(batch)
                batch, size = [], len(line.encode()) + 1
            batch.append(line)

    return write


def _export(args: Args, store: Store, what: Filter) -> None:
    import shutil

    path: str = args.export
    to_stdout = path == "-"
    form = args.format or ("csv" if to_stdout else export_format(path))
    if form not in EXPORT_FORMATS:
        raise _UsageError(f"{path}: the extension, or --format, must be of {', '.join(EXPORT_FORMATS)}")
    if args.bom and not form.startswith("csv"):
        raise _UsageError(f"--bom is for CSV, not for {form}")
    if to_stdout and (sys.stdout.isatty() or getattr(sys.stdout, "name", "") == os.devnull):  # closed: `>&-`
        raise _UsageError("an export goes to no terminal, and to no closed output: write to a file or a pipe")
    chosen = {name: getattr(args, name) for name in ("oldest_first", "raw", "bom")}
    with scratch_folder(store.journal.directory) if to_stdout else contextlib.nullcontext("") as folder:
        if to_stdout:
            path = os.path.join(folder, f"export.{form}")
        else:
            store.refuse_own_files(path)
        with _whole_log(store, args) as reading:
            count = reading.export(what, path, form=form, count=args.limit, progress=_progress, **chosen)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        if to_stdout:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
    _say(f"{counted(count, 'event')} written to {'standard output' if to_stdout else path}")


def cmd_show(args: Args) -> None:
    name, count = args.event.strip(), args.around
    ids = [name]
    try:
        parse_event_id(name)
    except EventError:
        if not re.fullmatch(r"[0-9TZ]*-?[0-9a-f]*(:[0-9]*)?", name):
            raise
        ids = []  # its beginning, or what follows the time
    with _store_of(args).reading(wait=args.wait) as reading:
        ids = ids or [str(each) for (each,) in reading.ids_like(name)]
        if len(ids) > 1:
            raise _UsageError(f"{name} may be any of {', '.join(ids)} …")
        rows = list(reading.rows(Filter(event_id=ids[0]), count=1)) if ids else []
        if not rows:
            raise reading.problem or AuditError(f"there is no event {name}")
        event = dict(zip(PUBLIC_COLUMNS, rows[0]))
        if count:
            if event["session_id"] is None:
                raise _UsageError(f"{name} has no session; leave --around out")
            rows = reading.around(event["session_id"], ids[0], count)
    if args.json:
        write_json(sys.stdout, rows) if count else _print_json(event)
    elif count:
        columns = ("event_id", *SHORT_COLUMNS[:-1])
        write_events(sys.stdout, rows, columns=columns, local=args.local, **_terminal())
    else:
        if args.local:
            event["timestamp"] = local_time(event["timestamp"])
        texts = {name: indented_json(event.pop(name) or "null") for name in ("input_json", "context")}
        write_fields(sys.stdout, {"event_id": ids[0], **event, **texts})


def cmd_stats(args: Args) -> None:
    sort = STATS_COLUMNS[_SORTS.index(args.sort)]
    with _whole_log(_store_of(args), args) as reading:
        rows = reading.stats(_filter_of(args), by=args.by, sort=sort, count=args.limit)
    if args.json:
        write_json(sys.stdout, rows, (args.by, *STATS_COLUMNS))
    else:
        write_stats(sys.stdout, args.by, rows, bar=sort, width=_terminal()["width"], local=args.local)
        sys.stdout.flush()
        _say(summary(len(rows), "group", args.limit))


def cmd_sql(args: Args) -> None:
    statement, file = _standard_input() if args.statement == "-" else args.statement, cast("Any", sys.stdout)
    store = _store_of(args)
    # Python hears no Ctrl+C during a call into DuckDB, and a query of somebody's own may be endless.
    store.target.open_engine = functools.partial(open_engine, apart=True)
    with _whole_log(store, args) as reading:
        names, rows = reading.query(statement)
        if args.json:
            write_json(file, rows, names)
        elif args.csv:
            if file.isatty():
                file = types.SimpleNamespace(write=lambda line: _print(line.removesuffix("\n")))
            elif hasattr(file, "reconfigure"):  # UTF-8 whatever the locale says
                file.reconfigure(encoding="utf-8", newline="")
            write_csv(file, names, rows, raw=args.raw)
        else:
            write_grid(file, names, rows, width=_terminal()["width"])


def cmd_config(args: Args) -> None:
    config = _config_of(args)
    settings = config._asdict()
    sources = settings.pop("sources")
    settings["path"], settings["journal"] = public_target(config.path), config.journal_directory
    settings["attach"] = dict.fromkeys(config.attach, REDACTED)
    rows = [(name, value, sources.get(name, "default")) for name, value in settings.items()]
    if args.json:
        _print_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        write_grid(sys.stdout, ("SETTING", "VALUE", "SOURCE"), rows, width=None)


def cmd_redact(args: Args) -> None:
    is_configured = args.db or args.config or args.profile or find_site_file(os.getcwd())
    config = _config_of(args) if is_configured else config_from_arguments("none")
    redactor = redactor_of(config)
    try:
        value = json.loads(_standard_input())
    except (ValueError, RecursionError) as error:
        raise _UsageError(f"standard input is no JSON: {error}") from error
    encoder = Encoder(redactor, max_input_bytes=config.max_input_bytes)
    recorded = json.loads(encoder.input_json(value, args.tool, None, None)) or "null"
    reasons = redactor.explain(value, tool=args.tool)
    if args.json:
        redacted = [{"path": path, "reason": reason} for path, reason in reasons]
        _print_json({"recorded": json.loads(recorded), "redacted": redacted})
        return
    _print(indented_json(recorded) + "\n" * bool(reasons))
    if reasons:
        write_grid(sys.stdout, ("REDACTED", "BECAUSE"), reasons, width=None)


def cmd_ingest(args: Args) -> int:
    told = Diagnostics()
    store = Store(_config_of(args), diagnostics=told)

    def ingest() -> None:
        if not store.ingest():
            raise DatabaseLockedError(f"{store.target.name}: another process is ingesting; try again")

    patiently(ingest, args.wait)
    rejected = f", {counted(told.rejected, 'line')} rejected" if told.rejected else ""
    _say(f"{counted(told.ingested, 'event')} ingested{rejected}")
    return EXIT_FAILED if told.rejected else 0


def cmd_import(args: Args) -> int:
    code, importer = 0, Importer(_config_of(args), on_bad_line=_say, wait=args.wait)
    for path in args.files:
        events, known, bad = importer.take(path)
        code = EXIT_FAILED if bad else code
        more = f", {known} known already" if known else ""
        more += f"; {counted(bad, 'fault')}" if bad else ""
        _say(f"{path}: {counted(events, 'event')} imported{more}")
    return code


def cmd_doctor(args: Args) -> int:
    report = check_up(_config_of(args), wait=args.wait)
    if args.json:
        _print_json(report)
    elif args.prometheus:
        _print("\n".join(prometheus_text(report)))
    else:
        for part, state in report.items():
            if isinstance(state, dict):
                text = ", ".join(f"{key} {value}" for key, value in state.items() if value is not None)
                _print(f"{part}: {text}")
        for fault in report["faults"]:
            _print("fault: {problem}; remedy: {remedy}".format(**fault))
        _print("healthy" if report["healthy"] else "not healthy")
    return 0 if report["healthy"] else EXIT_FAILED


def cmd_report(args: Args) -> None:
    what, store = _filter_of(args), _store_of(args)
    store.refuse_own_files(args.out)
    chosen = {name: value for name, value in what._asdict().items() if value not in (None, ())}
    facts = {"log": store.target.name, "made at": f"{utc_now():%F %T} UTC", "filter": json_text(chosen)}
    try:
        verdict = store.verify(wait=args.wait)
        ends = "; ".join(f"{head.journal} at {head.position}: {head.seal[:16]}" for head in verdict.heads)
        facts |= {"verify": _verdict_summary(verdict), "chain ends": ends}
    except StoreError as error:
        facts["verify"] = str(error)
    with _whole_log(store, args) as reading:
        text = "".join(report_html(reading, what, facts, newest=args.limit or 100))
    _write_whole(args.out, text)
    _say(f"report written to {args.out}")


def cmd_verify(args: Args) -> int:
    checkpoint = _read_checkpoint(args.checkpoint, args.signed_by) if args.checkpoint else []
    store = _store_of(args)
    verdict = store.verify(checkpoint=checkpoint, since=args.since, wait=args.wait, progress=_progress)
    if args.json:
        names = "intact entries segments events purged lost legacy waiting_bytes more_findings purges notes"
        answer: dict[str, Any] = {name: getattr(verdict, name) for name in names.split()}
        answer["journals"] = [head._asdict() for head in verdict.heads]
        answer["findings"] = findings = [finding._asdict() for finding in verdict.findings]
        for finding in findings:
            finding["events"] = [f"{finding['segment']}:{seq}" for seq in finding.pop("seqs")]
        _print_json(answer, indent=None)
    else:
        lines = [f"{finding.kind:<9} {finding.text}" for finding in verdict.findings]
        if verdict.more_findings:
            lines.append(f"and {verdict.more_findings} more")
        for purge in verdict.purges if checkpoint else ():
            text = "purge     {} at {moment} by {host}, newer than the checkpoint"
            lines.append(text.format(counted(purge["events"], "event"), **purge))
        lines += [f"note      {note}" for note in verdict.notes]
        _print("\n".join([*lines, _verdict_summary(verdict, args.since)]))
    return 0 if verdict.intact else EXIT_FAILED


def _verdict_summary(verdict: Verdict, since: str | None = None) -> str:
    found, waiting = len(verdict.findings) + verdict.more_findings, verdict.waiting_bytes
    events, segments = counted(verdict.events, "event"), counted(verdict.segments, "segment")
    legacy = "older than the ledger: what they were before it began is not proved"
    parts = (
        f"NOT intact, {counted(found, 'finding')}" if found else "intact",
        f"{events} in {segments} of {counted(len(verdict.heads), 'journal')}",
        verdict.purged and f"{verdict.purged} purged since",
        verdict.lost and f"{verdict.lost} lost, as the ledger says",
        verdict.legacy and f"{verdict.legacy} {legacy}",
        waiting and f"{counted(waiting, 'byte')} in the journal, not sealed yet",
        since and f"segments before {since} UTC were not recomputed",
    )
    return "; ".join(part for part in parts if part)


def _read_checkpoint(path: str, signers: str | None = None) -> list[Head]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        said = json.loads(text[text.index("{") :])
        kinds = tuple(zip(Head._fields, (str, int, int, str)))
        heads = [Head(*(kind(head[name]) for name, kind in kinds)) for head in said["journals"]]
    except Exception as error:
        problem = f"{path} is no checkpoint that can be read ({error})"
        raise _UsageError(f"{problem}; `mxcp-audit checkpoint` prints one") from error
    if signers:
        _say(f"the checkpoint is signed by {check_signature(signers, said)}")
    return heads


def cmd_checkpoint(args: Args) -> None:
    checkpoint = _store_of(args).checkpoint(wait=args.wait)
    if args.sign:
        checkpoint["signature"] = sign_checkpoint(args.sign, checkpoint)
    _print_json(checkpoint, indent=None)


def cmd_prove(args: Args) -> None:
    _print_json(_store_of(args).prove(args.event, wait=args.wait), indent=None)


def cmd_purge(args: Args) -> None:
    if args.older_than > sql_time(utc_now()):
        raise _UsageError("--older-than lies in the future; everything would go")
    store, archive, dry_run = _store_of(args), args.archive, args.dry_run
    if archive:
        if os.path.lexists(archive) and not os.path.isdir(archive):
            raise _UsageError(f"{archive} is no directory; name one for --archive")
        store.refuse_journal(archive)
    removal = store.purge(args.older_than, archive=archive, dry_run=dry_run, wait=args.wait)
    text = f"{counted(removal.events, 'event')} {'would be ' if dry_run else ''}purged"
    if removal.events:
        text += f", from {iso_time(removal.first_event)} to {iso_time(removal.last_event)}"
    _print(text)
    if removal.kept:
        _print(f"{counted(removal.kept, 'event')} as old stay until the last event of their segment is")
    if removal.archive:
        _print(f"archived in {os.path.join(archive, removal.archive)}")
    if removal.wrong:
        _say(f"{counted(len(removal.wrong), 'segment')} did not match the ledger, as `verify` goes on saying")


def cmd_backup(args: Args) -> None:
    events = _store_of(args).backup(args.file, wait=args.wait)
    _print(f"{counted(events, 'event')} copied to {args.file}")


def cmd_restore(args: Args) -> None:
    restored = Store(_config_of(args)).restore(args.file, wait=args.wait)
    _print(f"{counted(restored.back, 'event')} restored; the database holds {restored.events}")
    if restored.kept:
        _print(f"the database that was there before: {restored.kept}")


def cmd_compact(args: Args) -> None:
    before, after = _store_of(args).compact(wait=args.wait)
    _print(f"{before} bytes before, {after} bytes after")


def cmd_wrap(args: Args) -> int:
    command = args.server[1:] if args.server[0] == "--" else args.server
    config = _config_of(args)
    if not config.enabled:
        problem = f"audit logging is not enabled for profile {config.profile!r}"
        if args.strict:
            raise _UsageError(f"{problem}; enable it in {config.site_file}, or leave --strict out")
        _say(f"mxcp-audit: {problem}: the traffic passes unaudited")
    audit = AuditLogger.__new__(AuditLogger)
    audit.__setstate__(config._replace(strict=("*",)) if args.strict else config)
    code = WrappedServer(command, audit).run()
    audit.shutdown(WrappedServer.GRACE_SECONDS)  # a client kills what takes longer; the journal has it all
    return end_like(code)


_COMPLETION = """\
# Completion of mxcp-audit, made by `mxcp-audit completion`.
if [ -n "${{ZSH_VERSION-}}" ]; then
    (( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
    autoload -Uz bashcompinit && bashcompinit
fi
_mxcp_audit() {{
    local words=""  # without any, the shell completes file names
    case "$COMP_CWORD ${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
        "1 "*) words="{commands} --help --version" ;;
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _mxcp_audit mxcp-audit"""


def cmd_completion(args: Args) -> None:
    choices = re.findall(r"(--\w+)(?: [A-Z]+)? \{(\w+)\}", _OPTIONS)
    words = {f'*" {name}"': globals()[kind] for name, kind in choices}
    commands: Any = build_parser()._actions[-1].choices
    words |= {f'*" {name} "*': command._option_string_actions for name, command in commands.items()}
    cases = "\n".join(f'        {case}) words="{" ".join(each)}" ;;' for case, each in words.items())
    print(_COMPLETION.format(commands=" ".join(commands), cases=cases))


@contextlib.contextmanager
def _tidied_on_term() -> Iterator[None]:
    """Let SIGTERM, where nobody handles it, clean up as Ctrl+C does, and then end the process."""
    import signal

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        stack.callback(os.kill, os.getpid(), number)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            with suppress(ValueError):  # this is another thread
                signal.signal(signal.SIGTERM, end)
                stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; never a traceback, except with --debug."""
    if sys.stdout is None or sys.stderr is None:  # >&-
        sink = open(os.devnull, "w")
        sys.stdout, sys.stderr = sys.stdout or sink, sys.stderr or sink
    if hasattr(sys.stdout, "reconfigure"):
        codecs.register_error("mxcp_audit", escaped)
        sys.stdout.reconfigure(errors="mxcp_audit")
    arguments, debug = sys.argv[1:] if argv is None else argv, False
    try:
        args = build_parser(local="--local" in arguments).parse_args(arguments)
        debug = getattr(args, "debug", False)
        if debug:
            import logging

            logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        _check_options(args)
        with _tidied_on_term():
            code = int(globals()[f"cmd_{args.command}"](args) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nothing more may be flushed into the pipe at exit
        _give_up(sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, (AuditError, OSError)) else f"{type(error).__name__}: "
        _say(f"mxcp-audit: {kind}{error}".partition("\n\nLINE ")[0])  # of a statement around the user's
        if isinstance(error, (ConfigError, EventError, _UsageError)):
            return EXIT_USAGE
        return EXIT_LOCKED if isinstance(error, DatabaseLockedError) else EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
