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

import codecs
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, cast

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
#
# Guarantees: for any text whatsoever, `parse_yaml` returns a value equal, types included, to what
# PyYAML's `safe_load` (which MXCP uses) returns, or raises ConfigError with line, column, the name
# of the construct and the remedy. Where PyYAML raises, so does it. Nothing is guessed, no other
# exception escapes, and the time is linear in the size. `load_config` never takes a wrong setting
# for a right one: each wrong type, name or value is a ConfigError with line and key trail.
#
# How the reader works: a cursor walks over the text once. A block collection is known by its column:
# after any node the cursor stands on the first token of a later line, and that token's column says
# whether the collection goes on (same), has ended (smaller) or is broken (larger). The end of the
# text, `---` and `...` count as column -1, so that they end everything. Flow collections ignore
# columns. A scalar is cut out by one search for what may end it. Recursion ends at MAX_DEPTH.
#
# Refused on purpose, because no settings file needs them: anchors, aliases, merge keys, tags,
# complex keys (?), directives, several documents, dates, duplicate keys, a byte order mark inside
# the text, and U+0085, U+2028, U+2029: line breaks to PyYAML that no editor shows.
#
# Rejected: depending on PyYAML (this file is to be copied alone); YAML 1.2 types (MXCP would see
# False where we see the text "no"); PyYAML's own method, tokens and a table of possible keys (twice
# the code for the same answers: without `?`, a key is a scalar on one line before a colon);
# patterns line by line (silently wrong on wrapped text).

MAX_SITE_FILE_BYTES = 16 << 20  # arbitrary; real ones have a few hundred bytes
MAX_DEPTH = 100  # arbitrary; from about 500 on PyYAML itself ends in RecursionError
MAX_KEY_CHARS = 1024  # PyYAML's limit; blanks before the colon count
MAX_NUMBER_CHARS = 4300  # Python's limit for the digits of an integer; it also keeps 1:1:1:… linear
MAX_KEY_INTEGER = 2**61 - 1  # multiples of it hash alike, and filling a dict with them is quadratic

_NULLS = ("~", "null", "Null", "NULL")
_BOOLEANS = {
    word: value
    for value, words in ((True, ("yes", "true", "on")), (False, ("no", "false", "off")))
    for lower in words
    for word in (lower, lower.title(), lower.upper())
}
_NAN = float("nan")  # one object, as in PyYAML: two `.nan` keys are duplicates
_INTEGER = re.compile(
    r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*(?::[0-5]?[0-9])*)"  # 1:10 is 70
)
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*(?:(?::[0-5]?[0-9])+\.[0-9_]*|\.[0-9_]*(?:[eE][-+][0-9]+)?)"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}"
    r":[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?"
)

# The reader appends one NUL, which can't occur elsewhere: no look-ahead runs off the end.
_REFUSED_CHARACTER = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_BLANKS = re.compile(r"[ \n]*(?:#[^\n\0]*[ \n]*)*")
_MARKER = re.compile(r"(?:---|\.\.\.)(?=[ \t\n\0])")
_DASH = re.compile(r"-(?=[ \t\n\0])")
_COLON = re.compile(r" *:(?=[ \t\n\0])")
_LINE_GAP = re.compile(r" *\n[ \n]*")
_LINE_END = re.compile(r"[\n\0]")
_LEADING_LINES = re.compile(r"(?:\n *)*")
_BLOCK_HEADER = re.compile(r"[|>](?:([+-]?)([1-9]?)|([1-9])([+-]))(?: +#[^\n\0]*| *)(?=[\n\0])")
_PLAIN_START = re.compile(r"[^ \t\n\0\-?:,\[\]{}#&*!|>'\"%@`]|[-?:](?=[^ \t\n\0])")
_PLAIN_END = re.compile(r"[\t\n\0]|:(?=[ \t\n\0])| #")
_FLOW_PLAIN_START = re.compile(r"[^ \t\n\0\-?:,\[\]{}#&*!|>'\"%@`]|-(?=[^ \t\n\0])")
_FLOW_PLAIN_END = re.compile(r"[\t\n\0,?\[\]{}]|:(?=[ \t\n\0,\[\]{}])| #")
_QUOTED = {
    "'": re.compile(r"'([^']*(?:''[^']*)*)'"),
    '"': re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL),
}
_QUOTED_MARKER = re.compile(r"\n(?:---|\.\.\.)[ \t\n]")
_SINGLE_PART = re.compile(r"''|[ \t\n]+")
_DOUBLE_PART = re.compile(r"\\(?:x(.{2})|u(.{4})|U(.{8})|\n[ \t\n]*|.)|[ \t\n]+", re.DOTALL)
_HEXADECIMAL = re.compile(r"[0-9A-Fa-f]+")
_ESCAPES = {
    **{"0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"},
    **{"e": "\x1b", " ": " ", '"': '"', "\\": "\\", "/": "/"},
    **{"N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029"},
}
_REFUSALS = {
    "\t": "a tab between tokens; use spaces",
    "&": "an anchor (&name); write the value out, or put text that starts with & in quotes",
    "*": "an alias (*name); write the value out, or put text that starts with * in quotes",
    "!": "a tag (!name); remove it, or put text that starts with ! in quotes",
    "%": "a directive (%NAME); remove it, or put text that starts with % in quotes",
    "?": "a complex key (?), or a question mark in [] or {}; put the text in quotes",
    "\0": "the text ends too early",
}


def parse_yaml(text: str | bytes, *, path: str | None = None) -> object:
    """Return what PyYAML's `safe_load` returns for the same document, or raise; never anything else.

    Values are dict, list, str, int, float, bool and None, typed by the rules of YAML 1.1.

    Args:
        text: the document; bytes are UTF-8, or UTF-16 with a byte order mark.
        path: the file's name, for the error only.

    Raises:
        ConfigError: PyYAML refuses the document as well, or it uses what this module leaves out
            (docs/configuration.md lists that); with line, column and the remedy.
    """
    return _YamlReader(text, path).document()


class _YamlReader:
    """Reads one YAML document; the comment atop this room says how.

    `places` says where each entry starts, by the id of its mapping or list and its key or index.
    """

    def __init__(self, text: str | bytes, path: str | None) -> None:
        self.path = path
        self.pos = self.line_start = self.depth = 0
        self.places: dict[tuple[int, object], int] = {}
        if isinstance(text, bytes):
            text = self.decoded(text)
        self.text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
        bad = _REFUSED_CHARACTER.search(self.text)
        if bad:
            self.fail(
                f"the character U+{ord(bad[0]):04X}; remove it, or escape it in double quotes", bad.start()
            )
        self.text += "\0"

    def decoded(self, data: bytes) -> str:
        utf_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
        encoding = utf_16.get(data[:2], "utf-8")
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            self.text = data[: error.start].decode(encoding, "replace")
            line, column = self.line_and_column(len(self.text))
            problem = f"byte 0x{data[error.start]:02X} is not {encoding.upper()}; save the file as UTF-8"
            raise ConfigError(problem, path=self.path, line=line, column=column) from error

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Raise ConfigError for the position `at`, or the cursor's."""
        line, column = self.line_and_column(self.pos if at is None else at)
        raise ConfigError(problem, path=self.path, line=line, column=column)

    def fail_here(self, expected: str) -> NoReturn:
        """Raise ConfigError for the token at the cursor, by the name of what it would begin."""
        found = self.text[self.pos]
        self.fail(_REFUSALS.get(found) or f"expected {expected}, found {found!r}; put text in quotes")

    def line_and_column(self, at: int) -> tuple[int, int]:
        return self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)

    # Moving on.

    def skip(self) -> bool:
        """Pass blanks, line breaks and comments; True if there was a line break."""
        match = _BLANKS.match(self.text, self.pos)
        assert match is not None  # it matches the empty text
        line_break = self.text.rfind("\n", self.pos, match.end())
        self.pos = match.end()
        if line_break >= 0:
            self.line_start = line_break + 1
        return line_break >= 0

    def skip_line(self) -> None:
        """Pass the rest of a line that must hold nothing else, and go to the next token."""
        if not self.skip() and self.text[self.pos] != "\0":
            self.fail_here("the end of the line")

    def skip_in_flow(self) -> str:
        """Pass blanks inside brackets and return the next character."""
        self.skip()
        if self.column() < 0:
            self.fail("a bracket is not closed before this place; close it")
        return self.text[self.pos]

    def column(self) -> int:
        """The cursor's column, counted from 0; -1 at the end of the text and at a document marker."""
        column = self.pos - self.line_start
        if self.text[self.pos] == "\0" or (column == 0 and _MARKER.match(self.text, self.pos)):
            return -1
        return column

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} collections inside each other; flatten them")

    # The document and its blocks: each leaves the cursor on the first token of a later line.

    def document(self) -> object:
        """The value of the only document; None where there are only comments."""
        self.skip()
        explicit = self.column() < 0 and self.text[self.pos] == "-"
        if explicit:
            self.pos += len("---")
        started = explicit or self.column() >= 0
        value = self.block_node(-1, inline=explicit)
        while started and self.column() < 0 and self.text[self.pos] == ".":
            self.pos += len("...")
            self.skip_line()
        if self.column() >= 0:
            self.fail("text after the end of the value; check the indentation of this line")
        if self.text[self.pos] != "\0":
            self.fail("a second document; keep one to a file")
        return value

    def block_node(self, indent: int, *, inline: bool, of_key: bool = False) -> object:
        """The next node if it is deeper than the column `indent`, else None.

        Args:
            indent: the column of the collection around it, -1 at the top.
            inline: a key or `---` precedes, so no block collection may start on the same line.
            of_key: it is a key's value: a sequence may stand at the column of the key.
        """
        inline = not self.skip() and inline
        column = self.column()
        dash = _DASH.match(self.text, self.pos)
        if column <= indent and not (dash and of_key and column == indent):
            return None
        if dash or self.key_end():
            if inline:
                self.fail("a collection on the line of its key; begin it on the next line, or quote the text")
            return self.block_sequence(column) if dash else self.block_mapping(column)
        value: object
        if self.text[self.pos] in "|>":
            value = self.block_scalar(indent)
        elif self.text[self.pos] in "[{":
            value = self.flow_collection()
        else:
            value = self.scalar(indent, flow=False)
        self.skip_line()
        return value

    def block_mapping(self, column: int) -> dict[object, object]:
        mapping: dict[object, object] = {}
        self.descend()
        while self.column() == column:
            start, end = self.pos, self.key_end()
            if not end:
                self.fail_here("a key, a colon and a blank")
            key = self.scalar(column, flow=False)
            self.pos = end
            self.put(mapping, key, self.block_node(column, inline=True, of_key=True), start)
        self.depth -= 1
        return mapping

    def block_sequence(self, column: int) -> list[object]:
        sequence: list[object] = []
        self.descend()
        while self.column() == column and _DASH.match(self.text, self.pos):
            self.places[id(sequence), len(sequence)] = self.pos
            self.pos += 1
            sequence.append(self.block_node(column, inline=False))
        self.depth -= 1
        return sequence

    def key_end(self) -> int:
        """Where the colon ends if a key starts at the cursor, else 0."""
        start, quoted = self.pos, _QUOTED.get(self.text[self.pos])
        if quoted:
            match = quoted.match(self.text, start)
            end = match.end() if match else start
        elif _PLAIN_START.match(self.text, start):
            end = start + len(self.plain_line(start, flow=False))
        else:
            return 0
        colon = _COLON.match(self.text, end)
        if not colon or self.text.find("\n", start, end) >= 0:
            return 0
        if colon.end() - 1 - start > MAX_KEY_CHARS:
            self.fail(f"a key of more than {MAX_KEY_CHARS} characters; shorten it")
        return colon.end()

    def put(self, mapping: dict[object, object], key: object, value: object, at: int) -> object:
        """Enter a pair that starts at `at` and return the mapping."""
        if isinstance(key, (dict, list)):
            self.fail("a collection as a key; use text", at)
        if isinstance(key, int) and abs(key) >= MAX_KEY_INTEGER:
            self.fail("an integer key of more than 60 bits; put it in quotes", at)
        if key in mapping:  # 1, 1.0 and true are equal
            self.fail(f"the key {key!r:.60} is here a second time; keep one", at)
        mapping[key] = value
        self.places[id(mapping), key] = at
        return mapping

    # Flow collections.

    def flow_collection(self) -> object:
        """The `[…]` or `{…}` at the cursor."""
        mapping: dict[object, object] = {}
        sequence: list[object] = []
        braces = self.text[self.pos] == "{"
        closing = "}" if braces else "]"
        self.descend()
        self.pos += 1
        while self.skip_in_flow() != closing:
            start = self.pos
            key, value = self.flow_node(), None
            pair = self.skip_in_flow() == ":"
            if pair:
                if self.pos - start > MAX_KEY_CHARS or self.text.find("\n", start, self.pos) >= 0:
                    self.fail(
                        f"a key of several lines or more than {MAX_KEY_CHARS} characters; shorten it", start
                    )
                self.pos += 1
                if self.skip_in_flow() not in ",]}":
                    value = self.flow_node()
            if braces:
                self.put(mapping, key, value, start)
            else:
                self.places[id(sequence), len(sequence)] = start
                sequence.append(self.put({}, key, value, start) if pair else key)
            if self.skip_in_flow() == ",":
                self.pos += 1
            elif self.text[self.pos] != closing:
                self.fail_here(f"a comma or {closing}")
        self.pos += 1
        self.depth -= 1
        return mapping if braces else sequence

    def flow_node(self) -> object:
        return self.flow_collection() if self.text[self.pos] in "[{" else self.scalar(-1, flow=True)

    # Scalars: each leaves the cursor right behind itself.

    def scalar(self, indent: int, *, flow: bool) -> object:
        """The quoted or plain scalar at the cursor; only lines deeper than `indent` continue it."""
        if self.text[self.pos] in _QUOTED:
            return self.quoted()
        if not (_FLOW_PLAIN_START if flow else _PLAIN_START).match(self.text, self.pos):
            self.fail_here("a value")
        start, position, pieces = self.pos, self.pos, [""]
        while line := self.plain_line(position, flow=flow):
            pieces.append(line)
            self.pos = position + len(line)
            gap = _LINE_GAP.match(self.text, self.pos)
            if not gap or self.text[gap.end()] == "#":
                break
            position = gap.end()
            column = position - self.text.rfind("\n", self.pos, position) - 1
            if column <= indent or (column == 0 and _MARKER.match(self.text, position)):
                break
            pieces.append(_folded(gap[0]))
        else:
            pieces.pop()  # the line break after which no more text followed
        try:
            return _plain_value("".join(pieces))
        except ValueError as error:
            line_number, column = self.line_and_column(start)
            raise ConfigError(str(error), path=self.path, line=line_number, column=column) from error

    def plain_line(self, start: int, *, flow: bool) -> str:
        """What belongs to a plain scalar from `start` to the end of its line."""
        end = (_FLOW_PLAIN_END if flow else _PLAIN_END).search(self.text, start)
        assert end is not None  # the NUL ends everything
        return self.text[start : end.start()].rstrip(" ")

    def quoted(self) -> str:
        quote = self.text[self.pos]
        match = _QUOTED[quote].match(self.text, self.pos)
        if not match:
            self.fail(f"the closing {quote} is missing; add it")
        if _QUOTED_MARKER.search(match[1]):
            self.fail("a document marker (--- or ...) inside quotes; indent it")
        self.pos = match.end()
        if quote == "'":
            return _SINGLE_PART.sub(lambda part: "'" if part[0] == "''" else _folded(part[0]), match[1])
        return _DOUBLE_PART.sub(lambda part: self.double_part(part, match.start(1)), match[1])

    def double_part(self, part: re.Match[str], offset: int) -> str:
        """What an escape, or a run of blanks, in double quotes stands for."""
        if part[0][0] != "\\":
            return _folded(part[0])
        if part[0][1] == "\n":
            return "\n" * (part[0].count("\n") - 1)
        code = part[1] or part[2] or part[3]
        if code and _HEXADECIMAL.fullmatch(code) and int(code, 16) <= sys.maxunicode:
            return chr(int(code, 16))
        if code or part[0][1] not in _ESCAPES:
            problem = f"{part[0]} is no escape; write \\\\ for a backslash, or use single quotes"
            self.fail(problem, offset + part.start())
        return _ESCAPES[part[0][1]]

    def block_scalar(self, indent: int) -> str:
        """The `|` or `>` scalar at the cursor, inside a collection at the column `indent`."""
        header = _BLOCK_HEADER.match(self.text, self.pos)
        if not header:
            self.fail("only +, -, a digit and a comment may follow | or >; put text in quotes")
        folds, chomping, digit = header[0][0] == ">", header[1] or header[4], header[2] or header[3]
        self.pos = header.end()
        # 1. The column of the text: given, or the deepest up to its first character.
        column = max(indent + 1, 1)
        if digit:
            column += int(digit) - 1
        else:
            leading = _LEADING_LINES.match(self.text, self.pos)
            assert leading is not None  # it matches the empty text
            column = max(column, *map(len, leading[0].split("\n")))
        # 2. Its lines. The cursor stays on the line break before the first line that isn't taken.
        pieces, last, breaks, final = [], "", 0, ""
        while self.text[self.pos] == "\n":
            end = _LINE_END.search(self.text, self.pos + 1).start()  # type: ignore[union-attr]
            margin_end = min(self.pos + 1 + column, end)
            margin, line = self.text[self.pos + 1 : margin_end], self.text[margin_end:end]
            if margin.strip(" ") or (not line and self.text[end] == "\0"):
                break
            self.pos = end
            if not line:
                breaks += 1
                continue
            if last:
                fold = folds and last[0] not in " \t" and line[0] not in " \t"
                pieces.append("\n" if not fold else "" if breaks else " ")
            pieces += ["\n" * breaks, line]
            last, breaks, final = line, 0, self.text[end].rstrip("\0")
        # 3. Its end.
        if chomping != "-":
            pieces.append(final)
        if chomping == "+":
            pieces.append("\n" * breaks)
        return "".join(pieces)


def _folded(blanks: str) -> str:
    """What a run of blanks in a wrapped scalar stands for: one line break is a space, n are n - 1."""
    breaks = blanks.count("\n")
    return blanks if not breaks else " " if breaks == 1 else "\n" * (breaks - 1)


def _plain_value(text: str) -> object:
    """The value of a plain scalar by YAML 1.1, as PyYAML understands it; ValueError where it has none."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text in ("<<", "="):
        raise ValueError(f"a merge key or value sign ({text}); put it in quotes")
    if text[0] not in "+-.0123456789":
        return text
    if _DATE.fullmatch(text):
        raise ValueError("a date; put it in quotes")
    integer = _INTEGER.fullmatch(text)
    if not integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError(f"a number of more than {MAX_NUMBER_CHARS} characters; put it in quotes")
    try:
        return _integer(text) if integer else _float(text)
    except (ValueError, OverflowError) as error:  # 0x_, 1:0:0:….5, more digits than this Python takes
        raise ValueError("a number that has no value; put it in quotes") from error


def _integer(text: str) -> int:
    sign, digits = -1 if text[0] == "-" else 1, text.replace("_", "").lstrip("+-")
    if digits[:2] in ("0b", "0x"):
        return sign * int(digits[2:], 2 if digits[1] == "b" else 16)
    if digits[0] == "0":
        return sign * int(digits, 8)
    value = 0
    for part in digits.split(":"):
        value = value * 60 + int(part)
    return sign * value


def _float(text: str) -> float:
    sign, digits = -1 if text[0] == "-" else 1, text.replace("_", "").lstrip("+-").lower()
    if digits == ".nan":
        return _NAN
    value, weight = 0.0, 1
    for part in reversed(digits.replace(".inf", "inf").split(":")):
        value, weight = value + float(part) * weight, weight * 60  # the order of PyYAML's roundings
    return sign * value


# Settings.

SITE_FILE = "mxcp-site.yml"
MAX_DURATION_S = 100 * 365 * 86400.0  # arbitrary; far below what datetime and Python's locks can take
MIN_INPUT_BYTES, MAX_INPUT_BYTES = 256, 64 << 20  # arbitrary; the writer's queue holds 64 MiB

_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:[0-9]{1,12}(?:ms|[smhdw]))+")
_DURATION_PART = re.compile(r"([0-9]+)(ms|[smhdw])")
# DuckDB's own rule for what ATTACH takes as `extension:rest`; one letter is a Windows drive.
_TARGET = re.compile(r"[A-Za-z0-9_]{2,}:")
_OPTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_IN_A_PATH = re.compile(r"[\0\ud800-\udfff]")


def parse_duration(text: str) -> float:
    """Return the seconds that a text such as "10m" or "1h30m" stands for: more than 0, at most 100 years.

    Units are ms, s, m (minutes), h, d and w; whole numbers only, parts are added up.

    Raises:
        ValueError: anything else: "1.5h", "5M", "5 m", "1y", "10", "-1h", "0s".
    """
    parts = _DURATION_PART.findall(text) if isinstance(text, str) and _DURATION.fullmatch(text) else ()
    seconds = float(sum(int(number) * _UNITS_S[unit] for number, unit in parts))
    if not 0 < seconds <= MAX_DURATION_S:
        raise ValueError(
            f"{text!r:.60} is no duration; write whole numbers with a unit (ms, s, m, h, d, w),"
            ' such as "10m" or "1h30m", more than 0 and at most 100 years'
        )
    return seconds


@dataclass(frozen=True)
class Config:
    """The settings that hold, each with its source; made by `load_config`, already validated.

    Args:
        path: absolute path of the database file, or an ATTACH target such as "postgres:…" as it was given.
        profile: the profile's name.
        site_file: absolute path of the site file, None without one.
        enabled: whether to record at all.
        journal: absolute path of the journal directory; None is "<path>.journal" beside a database file.
        attach: options for ATTACH by name; they may hold secrets, so `repr` leaves them out.
        flush_interval: seconds between two ingests.
        durable: whether `log_event` waits for the disk.
        on_full: "block" or "drop": what happens when the queue is full.
        max_input_bytes: bytes of `input_json` that are kept of an event.
        redact: more names whose values are secrets.
        keep: names whose values are no secrets although they look so.
        redact_mode: "constant" or "hmac": what stands for a secret.
        retention: seconds after which `purge` may delete an event; None keeps all.
        sources: where each of the others came from: "default", "argument", "MXCP_PROFILE",
            "mxcp-site.yml:12" (file and line).
    """

    path: str
    profile: str = "default"
    site_file: str | None = None
    enabled: bool = False
    journal: str | None = None
    attach: Mapping[str, str | int | float | bool] = field(default_factory=dict, repr=False)
    flush_interval: float = 1.0
    durable: bool = False
    on_full: str = "block"
    max_input_bytes: int = 1 << 20
    redact: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    redact_mode: str = "constant"
    retention: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)


def is_attach_target(path: str) -> bool:
    """True for "ducklake:…", "postgres:…", "md:…" and the like, False for the path of a file."""
    return _TARGET.match(path) is not None


def check_settings(
    settings: Mapping[str, object], place: Callable[..., Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the settings as `Config` holds them (lists as tuples, durations in seconds), or raise.

    Both the site file and the keyword arguments of `AuditLogger` go through here, so that they take
    the same values and raise the same texts. Paths stay as they are. A keyword argument that was
    not given must be left out: None is refused.

    Args:
        settings: names and values, such as {"enabled": True, "flush_interval": "500ms"}.
        place: for a setting's name and perhaps an entry in its value, returns the arguments of
            ConfigError that say where it is; without it, the error has the name only.

    Raises:
        ConfigError: an unknown name (the nearest known one is offered) or a wrong value.
    """
    checked = {}
    for name, value in settings.items():
        try:
            if name not in _SETTINGS:
                import difflib  # here, because it costs 5 ms that only an error needs

                near = difflib.get_close_matches(str(name), _SETTINGS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_SETTINGS)}"
                raise ValueError(f"there is no such setting; {hint}")
            if value is None:
                raise ValueError("it has no value; write one, or remove the setting")
            checked[name] = _SETTINGS[name](value)
        except ValueError as error:  # the problem and, for a list or mapping, the entry
            problem, *entry = error.args
            where = place(name, *entry) if place else {"trail": (_trail_end(name, *entry),)}
            raise ConfigError(problem, **where) from error
    return checked


def _trail_end(name: object, entry: object = None) -> str:
    return str(name) if entry is None else f"{name}[{entry}]" if isinstance(entry, int) else f"{name}.{entry}"


def _described(value: object) -> str:
    """A value with its kind, because YAML's is often a surprise: no is False, 1.10 is 1.1."""
    kinds = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", dict: "mapping"}
    return f"the {kinds.get(type(value), type(value).__name__)} {value!r:.60}"


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false without quotes, not {_described(value)}")
    return value


def _path(value: object) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"must be a path, not {_described(value)}; put text in quotes")
    if _NOT_IN_A_PATH.search(path):
        raise ValueError("a path can't hold NUL or half a character (a surrogate); correct the escape")
    return path


def _database(value: object) -> str:
    path = _path(value)
    if path.lower().endswith(".jsonl"):
        raise ValueError(
            "a .jsonl file is the log of newer MXCP versions, not a database; name a .duckdb file here"
            " and take the old log in with `mxcp-audit import FILE`"
        )
    if path == ":memory:":
        raise ValueError("a database in memory would be lost; name a file")
    return path


def _choice(*choices: str) -> Callable[[object], str]:
    def choice(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"must be {' or '.join(choices)}, not {_described(value)}")
        return value

    return choice


def _input_bytes(value: object) -> int:
    if type(value) is not int or not MIN_INPUT_BYTES <= value <= MAX_INPUT_BYTES:
        limits = f"{MIN_INPUT_BYTES} to {MAX_INPUT_BYTES}"
        raise ValueError(f"must be a whole number of bytes from {limits}, not {_described(value)}")
    return value


def _duration(value: object) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if type(value) not in (int, float) or not 0 < value <= MAX_DURATION_S:  # type: ignore[operator]
        raise ValueError(f'must be a duration such as "10m", or seconds above 0, not {_described(value)}')
    return float(value)  # type: ignore[arg-type]


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list of names such as [email, phone], not {_described(value)}")
    for index, name in enumerate(value):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"must be a name, not {_described(name)}; put it in quotes", index)
    return tuple(value)


def _options(value: object) -> dict[str, str | int | float | bool]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping of options, not {_described(value)}")
    for name, option in value.items():
        if not isinstance(name, str) or not _OPTION_NAME.fullmatch(name):
            raise ValueError("the name of an option has letters, digits and _ only; correct it", name)
        if not isinstance(option, (str, int, float)) or (isinstance(option, float) and not isfinite(option)):
            raise ValueError(f"must be text, a number or a boolean, not {_described(option)}", name)
    return dict(value)


_SETTINGS: dict[str, Callable[[object], object]] = {
    "enabled": _boolean,
    "path": _database,
    "journal": _path,
    "attach": _options,
    "flush_interval": _duration,
    "durable": _boolean,
    "on_full": _choice("block", "drop"),
    "max_input_bytes": _input_bytes,
    "redact": _names,
    "keep": _names,
    "redact_mode": _choice("constant", "hmac"),
    "retention": _duration,
}
_SETTINGS_OF_MXCP = ("max_file_size",)  # of its JSONL log; means nothing here


# The site file.


class _SiteFile:
    """A site file that was read, and where in it everything stands."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.reader = _YamlReader(_site_bytes(path), path)
        root = self.reader.document()
        if root is not None and not isinstance(root, dict):
            self.reader.fail(f"must hold keys such as `profiles:`, not {_described(root)}", 0)
        self.root: dict[object, object] = root or {}

    def at(
        self, parent: dict[object, object], key: object, *trail: str, entry: object = None
    ) -> dict[str, Any]:
        """The arguments of ConfigError that say where a key, or an entry in its value, stands."""
        position = self.reader.places[id(parent), key]
        if entry is not None:
            position = self.reader.places.get((id(parent[key]), entry), position)
        line, column = self.reader.line_and_column(position)
        return {"path": self.path, "line": line, "column": column, "trail": (*trail, _trail_end(key, entry))}

    def source(self, parent: dict[object, object], key: object) -> str:
        return f"{os.path.basename(self.path)}:{self.at(parent, key)['line']}"

    def section(self, parent: dict[object, object], key: str, *trail: str) -> dict[object, object]:
        """The mapping under a key; empty where the key, or what follows it, is missing."""
        value = parent.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"must be a mapping, not {_described(value)}", **self.at(parent, key, *trail))
        return value or {}

    def profile(self, argument: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
        """The name of the profile that holds, and who chose it."""
        where: dict[str, Any]
        if argument is not None:
            name, source, where = argument, "argument", {"path": self.path, "trail": ("profile",)}
        elif environ.get("MXCP_PROFILE"):
            name = environ["MXCP_PROFILE"]
            source, where = "MXCP_PROFILE", {"path": self.path, "trail": ("MXCP_PROFILE",)}
        elif self.root.get("profile") is not None:
            name, source = cast(str, self.root["profile"]), self.source(self.root, "profile")
            where = self.at(self.root, "profile")
        else:
            name, source, where = "default", "default", {}
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"must be the name of a profile, not {_described(name)}; put text in quotes", **where
            )
        profiles = self.section(self.root, "profiles")
        if profiles and name not in profiles:
            known = ", ".join(
                key if isinstance(key, str) else f"{_described(key)} (quote it)" for key in profiles
            )
            problem = f"there is no profile {name!r:.60} (chosen by {source}); known are {known}"
            raise ConfigError(problem, **(where or self.at(self.root, "profiles")))
        return name, source

    def settings(self, profile: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What the profile sets, checked, and the source of each."""
        profiles = self.section(self.root, "profiles")
        audit = self.section(self.section(profiles, profile, "profiles"), "audit", "profiles", profile)
        ours = {cast(str, name): value for name, value in audit.items() if name not in _SETTINGS_OF_MXCP}

        def place(name: object, entry: object = None) -> dict[str, Any]:
            return self.at(audit, name, "profiles", profile, "audit", entry=entry)

        if type(ours.get("retention")) in (int, float):
            raise ConfigError('needs a unit in this file; write "90d" for 90 days', **place("retention"))
        return check_settings(ours, place), {name: self.source(audit, name) for name in ours}


def load_config(
    *,
    config: str | os.PathLike[str] | None = None,
    profile: str | None = None,
    cwd: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Return the settings of one profile of `mxcp-site.yml`, or raise; no setting is silently wrong.

    A file without `profiles`, and a profile without `audit`, mean: not enabled.

    Args:
        config: the site file; without it `mxcp-site.yml` is searched in `cwd`, then in its parents.
        profile: the profile; without it a non-empty MXCP_PROFILE, else the file's `profile`, else "default".
        cwd: where relative paths and the search start; without it the working directory.
        environ: the environment; without it `os.environ`.

    Raises:
        ConfigError: no site file, one that can't be read, an unknown profile, or a wrong setting;
            with file, line, column and the keys that lead there.
    """
    site_file, site_source = _find_site_file(config, cwd)
    site = _SiteFile(site_file)
    name, name_source = site.profile(profile, os.environ if environ is None else environ)
    settings, sources = site.settings(name)
    folder = Path(site_file).parent
    settings.setdefault("path", f"logs-{name}.duckdb")
    remote = is_attach_target(settings["path"])
    if remote:
        settings.setdefault("journal", f"logs-{name}.journal")
    for setting in ("path", "journal"):
        if setting not in sources and setting in settings and re.search(r"[/\\\0\ud800-\udfff]", name):
            problem = f"the profile's name {name!r:.60} can't be part of a file name; set {setting}"
            raise ConfigError(problem, path=site_file, trail=("profiles", name, "audit", setting))
    if not remote:
        settings["path"] = str(folder / settings["path"])
    if "journal" in settings:
        settings["journal"] = str(folder / settings["journal"])
    defaults = dict.fromkeys((each.name for each in fields(Config) if each.name != "sources"), "default")
    all_sources = {**defaults, **sources, "profile": name_source, "site_file": site_source}
    return Config(profile=name, site_file=site_file, sources=all_sources, **settings)


def _find_site_file(
    config: str | os.PathLike[str] | None, cwd: str | os.PathLike[str] | None
) -> tuple[str, str]:
    """The absolute path of the site file, and who chose it."""
    try:
        start = Path(os.path.abspath(cwd if cwd is not None else os.getcwd()))
    except OSError as error:
        raise ConfigError(f"the working directory is gone ({error.strerror}); change to another") from error
    if config is not None:
        return str(start / config), "argument"
    for folder in (start, *start.parents):
        if os.path.lexists(folder / SITE_FILE):
            return str(folder / SITE_FILE), "found"
    raise ConfigError(
        f"there is no {SITE_FILE} here or in a parent directory; name one with --config or config=,"
        " do without by --db or AuditLogger(path), or create one that says:"
        " profiles: {default: {audit: {enabled: true}}}",
        path=str(start),
    )


def _site_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SITE_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the site file can't be read: {reason}; name another with --config", path=path
        ) from error
    if len(data) > MAX_SITE_FILE_BYTES:
        raise ConfigError(f"more than {MAX_SITE_FILE_BYTES} bytes is no site file; name another", path=path)
    return data


# === Events ===
# may name: Errors


# === Redaction ===
# may name: Errors


# === Encoding ===
# may name: Errors, Events, Redaction


# === Journal ===
# may name: Errors, Events, Encoding
