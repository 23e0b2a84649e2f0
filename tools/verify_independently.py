"""Verify an audit database with the `duckdb` package and nothing of ours: from docs/security.md alone.

    python tools/verify_independently.py logs-default.duckdb [checkpoint.json]
    python tools/verify_independently.py --proof proof.json checkpoint.json

The key, if there is one, is taken from MXCP_AUDIT_KEY or the lines of MXCP_AUDIT_KEY_FILE. Prints what is
wrong, a line each; exit status 0 if nothing is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
from collections import defaultdict
from typing import Any

LOGS = [
    *("timestamp:t", "caller", "type", "name", "input_json", "duration_ms:i", "policy_decision", "reason"),
    *("status", "error", "user_id", "session_id", "trace_id", "segment", "seq:i"),
]
MORE = ["client", "agent", "address", "server", "request_id", "error_type", "result_bytes:b", "context"]
LEDGER = [
    *("journal", "position:i", "kind", "segment", "events:i", "first_event:t", "last_event:t", "digest"),
    *("marks", "detail", "host", "ingested_at:t"),
]
TYPES = {"t": ("TIMESTAMP",), "i": ("INTEGER", "BIGINT"), "b": ("BIGINT",), "": ("VARCHAR",)}

Wrong = set[tuple[str, str]]  # what, and where: a segment, a journal, a column


def select(table: str, columns: list[str], types: dict[str, str]) -> str:
    """Return a SELECT in which timestamps are microseconds, and what has a wrong type is NULL."""
    parts = []
    for column in columns:
        name, _, kind = column.partition(":")
        if types.get(name) not in TYPES[kind]:
            parts.append("NULL")
        elif kind == "t":
            parts.append(
                f"CASE WHEN isfinite({name}) THEN epoch_us({name})::VARCHAR ELSE {name}::VARCHAR END"
            )
        else:
            parts.append(name)
    return f"SELECT {', '.join(parts)} FROM {table}"


def row_hash(columns: list[str], row: tuple[Any, ...]) -> str:
    numbers, texts, suffix = "", b"", b""
    for column, value in zip(MORE, row[len(columns) :]):
        name, _, kind = column.partition(":")
        if kind and value is not None:
            suffix += f"|{name}:{value}".encode()
        elif value is not None:
            suffix += f"|{name}:{len(value.encode())}:{value}".encode()
    for column, value in zip(columns, row):
        if value is not None and ":" not in column:
            data = value.encode()
            texts += b"" if columns is LOGS and column == "segment" else data
            value = len(data)
        numbers += f"{'' if value is None else value}|"
    return hashlib.sha256(numbers.encode() + texts + suffix).hexdigest()


def digest(rows: list[tuple[int | None, str]]) -> str | None:
    ordered = [text for _, text in sorted(rows, key=lambda row: (row[0] is None, row[0] or 0, row[1]))]
    return hashlib.sha256("".join(ordered).encode()).hexdigest() if rows else None


def number(text: str | None) -> float | None:
    """Return microseconds that came as text."""
    return None if text is None else float(text) if text.endswith("infinity") else int(text)


def keys_of(environ: Any = os.environ) -> list[bytes]:
    path = environ.get("MXCP_AUDIT_KEY_FILE")
    if path:
        with open(path, "rb") as file:
            found = [line.strip() for line in file if line.strip()]
    else:
        found = [environ["MXCP_AUDIT_KEY"].encode()] if environ.get("MXCP_AUDIT_KEY") else []
    return [hashlib.sha256(b"mxcp_audit seal\0" + key).digest() for key in found]


def seal_is_right(seal: str, text: bytes, keys: list[bytes]) -> bool:
    if seal.startswith("k:"):
        return any(seal[2:] == hmac.new(key, text, "sha256").hexdigest() for key in keys)
    return seal == hashlib.sha256(text).hexdigest()


def check_chains(
    entries: list[dict[str, Any]], keys: list[bytes], checkpoints: list[dict[str, Any]], wrong: Wrong
) -> None:
    """Steps 1 and 5; sets `believed` and `covered` of each entry."""
    chains: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        chains[entry["journal"] or ""].append(entry)
    names = ("journal", "position", "events", "seal")
    open_checkpoints = [{name: checkpoint[name] for name in names} for checkpoint in checkpoints]
    for journal, chain in chains.items():
        chain.sort(key=lambda entry: (entry["position"] or 0, entry["seal"] or ""))
        previous, last, total, unkeyed = "", 0, 0, []
        for number, entry in enumerate(chain):
            seal = entry["seal"] or ""
            right = seal_is_right(seal, f"{previous}|{entry['hash']}".encode(), keys)
            entry["believed"] = right and entry["position"] == last + 1
            entry["covered"] = False
            if not entry["believed"]:
                wrong.add(("chain", journal))
            elif keys and not seal.startswith("k:"):
                unkeyed.append(entry)
            total += (entry["events"] or 0) if entry["kind"] == "segment" else 0
            here = {"journal": journal, "position": entry["position"], "events": total, "seal": seal}
            if here in open_checkpoints:
                open_checkpoints.remove(here)
                unkeyed = []
                for each in chain[: number + 1]:
                    each["covered"] = True
            previous, last = seal, -1 if entry["position"] is None else entry["position"]
        for entry in unkeyed:
            entry["believed"] = False
            wrong.add(("chain", journal))
    for checkpoint in open_checkpoints:
        wrong.add(("checkpoint", checkpoint["journal"]))


def expected_of(entry: dict[str, Any], purges: list[dict[str, Any]]) -> tuple[int, str | None]:
    """Return count and digest of what should be there of a segment."""
    everything = (entry["events"] or 0, entry["digest"])
    journal, position = entry["journal"] or "", -1 if entry["position"] is None else entry["position"]
    for purge in purges:
        if any(low <= position <= high for low, high in purge.get("removed", {}).get(journal, ())):
            return 0, None
    # Purges of earlier versions took parts of segments, too.
    reaching = [purge for purge in purges if purge.get("heads", {}).get(journal, 0) >= position]
    first, last = number(entry["first_event"]), number(entry["last_event"])
    if not reaching or first is None or last is None:
        return everything
    before = max(purge["before"] for purge in reaching)
    if first >= before:
        return everything
    if last < before:
        return 0, None
    naming = [purge for purge in purges if entry["segment"] in purge.get("left", {})]
    if not naming:
        return everything
    count, text = max(naming, key=lambda purge: purge["before"])["left"][entry["segment"]]
    return count, text


def purges_of(
    entries: list[dict[str, Any]], wrong: Wrong, *, keys: list[bytes], checkpoints: Any
) -> list[dict[str, Any]]:
    """Return what the purge entries say that are believed; what was wrong before a purge stays wrong."""
    purges = []
    for entry in entries:
        if entry["kind"] != "purge" or not entry["believed"]:
            continue
        journal = entry["journal"] or ""
        try:
            said = json.loads(entry["detail"])
            before, segments = (
                int(said["before"]),
                {name: list(said["wrong"][name]) for name in said["wrong"]},
            )
            purge = {"before": before}
            if "removed" in said:
                purge["removed"] = {
                    name: [(int(low), int(high)) for low, high in pairs]
                    for name, pairs in said["removed"].items()
                }
            else:
                purge["heads"] = {name: int(place) for name, place in said["heads"].items()}
                purge["left"] = {name: (int(n), text) for name, (n, text) in said["left"].items()}
                if purge["left"] and checkpoints and not entry["covered"] and not keys:
                    wrong.add(("chain", journal))
                    continue
            changed = sum(int(found) - int((*rest, 0)[0]) for found, _, *rest in segments.values())
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
            wrong.add(("chain", journal))
            continue
        purges.append(purge)
        wrong.update(("segment", segment) for segment in segments)
        if "removed" in purge:
            named = [
                each
                for each in entries
                if each["kind"] in ("segment", "legacy")
                and any(
                    0 < low <= (each["position"] or 0) <= high < 2**63
                    for low, high in purge["removed"].get(each["journal"] or "", ())
                )
            ]
            held = sum(each["events"] or 0 for each in named) + changed
            is_young = any(
                each["last_event"] is not None and number(each["last_event"]) >= before for each in named
            )
            if held != (entry["events"] or 0) or is_young:
                wrong.add(("chain", journal))
    return purges


OURS = tuple(column.partition(":")[0] for column in LOGS + MORE + LEDGER)  # others may be there
FORMS = f"""\
SELECT view_name, 'view' FROM duckdb_views() WHERE database_name = $name AND view_name IN ('logs', 'ledger')
UNION ALL SELECT table_name, 'form' FROM duckdb_tables()
WHERE database_name = $name AND table_name IN ('logs', 'ledger')
AND regexp_matches(sql, 'COLLATE|GENERATED ALWAYS')
UNION ALL SELECT table_name, 'default' FROM duckdb_columns()
WHERE database_name = $name AND table_name IN ('logs', 'ledger') AND lower(column_name) IN {OURS}
AND column_default IS NOT NULL AND column_default <> 'NULL'"""


def verify(connection: Any, *, keys: list[bytes], checkpoints: Any = (), database: str = "audit") -> Wrong:
    """Return what is wrong with the attached database.

    Args:
        connection: of the duckdb package.
        keys: as `keys_of` returns them.
        checkpoints: the `journals` of checkpoints.
        database: the name under which it is attached.
    """
    wrong: Wrong = set()
    here = "database_name = ? AND table_name IN ('logs', 'ledger')"
    types: dict[str, dict[str, str]] = {"logs": {}, "ledger": {}}
    for table, column, kind in connection.execute(
        f"SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE {here}", [database]
    ).fetchall():
        types[table][column] = kind
    for table, what in connection.execute(FORMS, {"name": database}).fetchall():
        wrong.add(("table", f"{table}: {what}"))
    if not (types["ledger"] or "segment" in types["logs"] or keys or checkpoints):
        return wrong  # an older table, and nothing of ours yet
    for table, columns in (("logs", LOGS), ("ledger", [*LEDGER, "seal"])):
        for column in columns:
            name, _, kind = column.partition(":")
            if types[table].get(name) not in TYPES[kind]:
                wrong.add(("table", f"{table}.{name}"))
    for column in MORE if types["logs"] else ():  # may be missing: then they are NULL
        name, _, kind = column.partition(":")
        if types["logs"].get(name, TYPES[kind][0]) not in TYPES[kind]:
            wrong.add(("table", f"logs.{name}"))
    entries = []
    if types["ledger"]:
        for *row, seal in connection.execute(
            select(f"{database}.ledger", [*LEDGER, "seal"], types["ledger"])
        ).fetchall():
            entry = dict(zip((column.partition(":")[0] for column in LEDGER), row))
            entries.append({**entry, "hash": row_hash(LEDGER, tuple(row)), "seal": seal})
    check_chains(entries, keys, list(checkpoints), wrong)
    purges = purges_of(entries, wrong, keys=keys, checkpoints=checkpoints)
    found: dict[str, list[tuple[int | None, str]]] = defaultdict(list)
    if types["logs"]:
        days = connection.execute(
            "SELECT coalesce(segment, strftime(timestamp, 'legacy-%Y-%m-%d'), 'legacy-') "
            f"FROM {database}.logs"
            if {"segment", "timestamp"} <= set(types["logs"])
            else f"SELECT '' FROM {database}.logs"
        ).fetchall()
        rows = connection.execute(select(f"{database}.logs", LOGS + MORE, types["logs"])).fetchall()
        for (segment,), row in zip(days, rows):
            found[segment].append((row[len(LOGS) - 1], row_hash(LOGS, row)))
    for entry in entries:
        if entry["kind"] in ("segment", "legacy"):
            rows = found.pop(entry["segment"] or "", [])
            if (len(rows), digest(rows)) != expected_of(entry, purges):
                wrong.add(("segment", entry["segment"] or ""))
    wrong.update(("segment", segment) for segment in found)
    return wrong


def proof_fault(proof: dict[str, Any], checkpoint: dict[str, Any]) -> str | None:
    """Return why a proof doesn't show that its event is in the log that the checkpoint is of, or None."""
    event, entry = proof["event"], proof["entry"]

    def values(of: dict[str, Any], columns: list[str]) -> tuple[Any, ...]:
        return tuple(of[column.partition(":")[0]] for column in columns)

    if proof["hashes"][event["seq"] - 1] != row_hash(LOGS, values(event, LOGS + MORE)):
        return "the event is not the one of its segment"
    digest = hashlib.sha256("".join(proof["hashes"]).encode()).hexdigest()
    if (event["segment"], digest, len(proof["hashes"])) != values(entry, ["segment", "digest", "events"]):
        return "the segment is not as it was entered"
    ends, seal = [], proof["before"]
    for row in (row_hash(LEDGER, values(entry, LEDGER)), *proof["after"]):
        seal = hashlib.sha256(f"{seal}|{row}".encode()).hexdigest()
        ends.append({"journal": entry["journal"], "position": entry["position"] + len(ends), "plain": seal})
    for head in checkpoint["journals"]:
        if {name: head.get(name) for name in ("journal", "position", "plain")} in ends:
            return None
    return "the checkpoint is of another log, or older than the event"


def main(arguments: list[str]) -> int:
    if len(arguments) == 3 and arguments[0] == "--proof":
        with open(arguments[1], encoding="utf-8") as proof, open(arguments[2], encoding="utf-8") as noted:
            fault = proof_fault(json.load(proof), json.load(noted))
        print(fault or "proved")
        return 1 if fault else 0
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    import duckdb

    checkpoints = []
    if len(arguments) > 1:
        with open(arguments[1], encoding="utf-8") as file:
            checkpoints = json.load(file)["journals"]
    with duckdb.connect(":memory:") as connection:
        path = arguments[0].replace("'", "''")
        connection.execute(f"ATTACH '{path}' AS audit (READ_ONLY)")
        wrong = verify(connection, keys=keys_of(), checkpoints=checkpoints)
    for what, where in sorted(wrong):
        print(f"{what}: {where}")
    print("wrong" if wrong else "intact")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
