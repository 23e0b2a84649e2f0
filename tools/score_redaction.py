"""Scores the redaction rules: names by precision and recall, texts by what is removed and kept.

    python tools/score_redaction.py [--misses] [--hostile] [--speed]

Data are read in place from the directory that `MXCP_AUDIT_CASES` names (default `../shared/cases`
beside this repository) and from `tests/data/`, whose sets are this project's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxcp_audit import Redactor  # noqa: E402

OWN = ROOT / "tests" / "data"
# Texts that make a careless pattern try the same characters again and again.
HOSTILE = {
    "backslashes": "\\",
    "quotes": "\"'",
    "escaped quotes": '\\"',
    "dots": ".",
    "digits": "4",
    "digit groups": "4111 ",
    "dashed digits": "123-45-",
    "at signs": "a@",
    "authorities": "://a",
    "url passwords": "://a:b",
    "brackets": "[",
    "json starts": '{"a":',
    "names": "password",
    "assignments": "password=",
    "open quotes": 'password="',
    "open brackets": "password=[",
    "elements": "<password ",
    "word runs": "a_",
    "dashes": "a-b",
    "jwt starts": "eyJ",
    "token starts": "ghp_",
    "key blocks": "-----BEGIN PRIVATE KEY-----",
    "bearers": "Bearer ",
    "inserts": "INSERT INTO t (a) VALUES (",
    "commands": "mysql -p ",
    "users": " -u a",
    "cookies": "cookie: ",
    "spaces": "password ",
    "commas": "password=,",
    "capitals": "İ=pwd",
}


def cases_dir() -> Path:
    """Return where the labelled cases are, which may not exist."""
    return Path(os.environ.get("MXCP_AUDIT_CASES") or ROOT.parent / "shared" / "cases")


def load(name: str) -> list[dict[str, Any]]:
    """Return the shared cases of a name, or none where they are absent."""
    path = cases_dir() / name
    loaded: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return loaded


def load_own(name: str) -> list[dict[str, Any]]:
    """Return this project's own cases of a name."""
    loaded: list[dict[str, Any]] = json.loads((OWN / name).read_text(encoding="utf-8"))
    return loaded


def score_names(cases: list[dict[str, Any]]) -> tuple[float, float, list[str]]:
    """Return precision, recall and the misjudged names (`+` redacted wrongly, `-` missed)."""
    redactor = Redactor()
    hit = over = missed = 0
    wrong = []
    for case in cases:
        verdict = redactor.is_sensitive(case["name"])
        if verdict and case["sensitive"]:
            hit += 1
        elif verdict:
            over += 1
            wrong.append(f"+{case['name']}")
        elif case["sensitive"]:
            missed += 1
            wrong.append(f"-{case['name']}")
    return hit / max(1, hit + over), hit / max(1, hit + missed), wrong


def joined(parts: str | list[str]) -> str:
    """Return a text that may be kept in parts, so that secret scanners stay quiet."""
    return parts if isinstance(parts, str) else "".join(parts)


def score_texts(cases: list[dict[str, Any]]) -> tuple[int, int, int, int, list[str]]:
    """Return removed, of how many, kept, of how many, and what went wrong."""
    redactor = Redactor()
    removed = to_remove = kept = to_keep = 0
    wrong = []
    for case in cases:
        text = joined(case["text_parts"])
        shown = redactor.scrub(text)
        in_tree = json.dumps(redactor.redact({"note": [text]}), ensure_ascii=False)
        for secret in map(joined, case["expect_redacted"]):
            to_remove += 1
            if secret not in shown and json.dumps(secret, ensure_ascii=False)[1:-1] not in in_tree:
                removed += 1
            else:
                wrong.append(f"-{case['id']}: {shown}")
        for part in map(joined, case["must_keep"]):
            to_keep += 1
            if part in shown:
                kept += 1
            else:
                wrong.append(f"+{case['id']}: {shown}")
    return removed, to_remove, kept, to_keep, wrong


def seconds(action: Callable[[], object]) -> float:
    """Return the best of seven runs, each long enough to be measured."""
    # Processor time: other processes' work is none of ours.
    clock = time.process_time
    count = max(1, int(0.03 / max(1e-6, timeit.timeit(action, number=1, timer=clock))))
    return min(timeit.repeat(action, number=count, repeat=7, timer=clock)) / count


def score_hostile(size: int = 25_000) -> float:
    """Print for each hostile text the time and what doubling does to it; return the worst ratio."""
    redactor = Redactor()
    worst = 0.0
    for name, unit in HOSTILE.items():
        text = unit * (size // len(unit))
        once, twice = (seconds(functools.partial(redactor.scrub, part)) for part in (text, text * 2))
        worst = max(worst, twice / once)
        print(f"{name:16} {once * 1e3:8.2f} ms  x{twice / once:.2f}")
    return worst


def score_speed() -> None:
    """Print what one event's input and a long text take."""
    redactor = Redactor()
    event = {
        "user_id": 42,
        "query": "select name from users where id = ?",
        "options": {"limit": 10, "verbose": True, "password": "hunter2"},
        "tags": ["a", "b"],
        "api_key": "not-a-real-one",
    }
    line = "The quick brown fox jumps over the lazy dog, and user_id=42 requested report for region north. "
    text = (line * 300)[:26_000]
    print(f"event input  {seconds(lambda: redactor.redact(event)) * 1e6:8.2f} us")
    print(f"26 KB text   {seconds(lambda: redactor.scrub(text)) * 1e6:8.0f} us")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--misses", action="store_true", help="show what was misjudged")
    parser.add_argument("--hostile", action="store_true", help="time hostile texts and their doubles")
    parser.add_argument("--speed", action="store_true", help="time an ordinary event and a long text")
    args = parser.parse_args(argv)
    for origin, read in (("shared", load), ("own", load_own)):
        names, texts = read("redaction_names.json"), read("redaction_text.json")
        if not names:
            print(f"{origin}: no cases at {cases_dir()}; set MXCP_AUDIT_CASES")
            continue
        precision, recall, wrong = score_names(names)
        removed, to_remove, kept, to_keep, wrong_texts = score_texts(texts)
        print(f"{origin}: {len(names)} names: precision {precision:.3f}, recall {recall:.3f}")
        print(f"{origin}: {len(texts)} texts: removed {removed}/{to_remove}, kept {kept}/{to_keep}")
        if args.misses:
            print(*wrong, *wrong_texts, sep="\n")
    if args.speed:
        score_speed()
    if args.hostile:
        worst = score_hostile()
        print(f"worst ratio {worst:.2f}, allowed 2.5")
        return int(worst >= 2.5)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
