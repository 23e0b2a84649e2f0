"""Scores the redaction rules: names by precision and recall, texts by what is removed and kept.

    python tools/score_redaction.py [--misses] [--held-out] [--generate N] [--hostile] [--speed]

Data are read in place from the directory that `MXCP_AUDIT_CASES` names (default `../shared/cases`
beside this repository) and from `tests/data/`, whose sets are this project's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mxcp_audit  # noqa: E402
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
    "programs": "gh secret 4111 ",
    "words behind a name": "=login(ssn (",
    "one long value": "auth(password=a_",
    "attributes of cookies": "set-cookie: a=\\\";'",
    "headers in a name": "passwordcookie: code=",
    "queries": "?state=<password ",
    "ends of blocks": "</key><string>password\n  ",
    "lists under a name": "secrets:\n- a\n",
    "users beside": " -u a -x -p ",
    "piped": "echo a | ",
    "urls without a user": "://a:b?c",
    "calls": 'hmac("a',
    "access lists": "setuser a on +a ",
    "protocols": "PASS abcd\n",
    "here-documents": "password=<<A\n",
    "here-strings": "kinit <<< a",
    "keys of PuTTY": "Private-Lines: 1\nabcd\n",
    "words of wallets": "seed abcd phrase ",
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


# The word lists of the name rule, from which a source's own words can be taken.
WORD_LISTS = ("STRONG_WORDS", "STILL_SECRET", "KEY_DOCUMENTS", "FLAG_WORDS", "VERBS")
WORDS_BY_HEAD = ("WEAK_WORDS", "OPENERS")


def source_of(case: dict[str, Any]) -> str:
    """Return where a name comes from: its group, or the start of its source."""
    return str(
        case.get("group")
        or re.split(r"[(;,:]| (?:env|model|tool|alias|api|arg|in )", case.get("source", ""))[0]
    )


def score_held_out(cases: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, float]:
    """Return precision and recall where each source is judged without the words that it alone has.

    The rule is grammar plus word lists made by hand. What one source contributed are the words of
    the lists that no name of another source holds; without them the source is as if never seen.

    Args:
        cases: the names to judge.
        others: further names, which may hold a word as well.
    """
    words_of = {
        case["name"]: set(map(mxcp_audit._singular, mxcp_audit._name_words(case["name"])))
        for case in [*cases, *others]
    }
    sources: dict[str, set[str]] = {}
    for case in [*cases, *others]:
        sources.setdefault(source_of(case), set()).update(words_of[case["name"]])
    saved = {name: getattr(mxcp_audit, name) for name in (*WORD_LISTS, *WORDS_BY_HEAD)}
    hit = over = missed = 0
    for source in {source_of(case) for case in cases}:
        elsewhere = set().union(*(words for other, words in sources.items() if other != source))
        own = sources[source] - elsewhere - mxcp_audit.SPEC_NAMES
        for name in WORD_LISTS:
            setattr(mxcp_audit, name, saved[name] - own)
        for name in WORDS_BY_HEAD:
            setattr(mxcp_audit, name, {head: before - own for head, before in saved[name].items()})
        redactor = Redactor()
        for case in cases:
            if source_of(case) == source:
                verdict = redactor.is_sensitive(case["name"])
                hit += verdict and case["sensitive"]
                over += verdict and not case["sensitive"]
                missed += case["sensitive"] and not verdict
    for name, value in saved.items():
        setattr(mxcp_audit, name, value)
    return hit / max(1, hit + over), hit / max(1, hit + missed)


# Texts with a place for a secret: {s} bare, {q} quoted, {j} as JSON; {n} is a sensitive name.
COMMANDS = (
    *("mysql -u root -p{s} shop", "mysql -u root --password={s}", "docker login -u ann -p {q} r.example"),
    *("docker login --username ann --password {s} r.example", "podman login -p {q} -u ann"),
    *("redis-cli -a {q} PING", "ldapsearch -x -D cn=a -w {q} -b dc=x", "sqlcmd -S s -U sa -P {q} -Q x"),
    *("7z x -p{s} a.7z", "zip -P {q} a b", "smbclient //f/s -U 'ann%{s}'", "htpasswd -b f ann {q}"),
    *("curl -u ann:{s} https://h/", "sshpass -p {q} ssh h", "curl -H 'X-Api-Key: {s}' https://h/"),
    *("tool --{n} {q} -v", "tool --{n}={q} -v", "env {n}={q} prog --x", "helm install a b --set {n}={s}"),
    *("kubectl create secret generic a --from-literal={n}={s}", "az login -u a -p {q}"),
    *("snmpwalk -v3 -A {q} -X {q} h", "openssl rsa -passin pass:{s} -in k", "psql 'host=h {n}={s} user=u'"),
    *("mc alias set a https://h k {q}", "rabbitmqctl change_password a {q}", "htpasswd -bB f a {q}"),
    *("gh secret set X --body {q}", "vault kv put a/b {n}={q}", "{n}={q} cmd -p 80"),
    "export {n}={q} && run",
)
ASSIGNMENTS = (
    *("{n}={s}", "{n}: {s}", "{n} = {q}", '"{n}": {j}', "{n} := {q}", "<{n}>{s}</{n}>", "{n}={s}&a=1"),
    *("a=1;{n}={s};b=2", "{n} => {q}", "set_{n}({q})", "{n}: str = {q}", "[x]\n{n} = {s}\ny = 1\n"),
    *("- name: {n}\n  value: {s}\n", '({{"{n}", {j}}})', "user,{n},x\nann,{s},1\n"),
    *("| {n} | x |\n|---|---|\n| {s} | y |\n", "{n} is {s}", "**{n}**: {s}", "{n} <- {q}", "{n} := @{q}"),
    *("{n}: !!str {s}", 'variable "{n}" {{\n  default = {q}\n}}'),
    *("data-x='{{&quot;{n}&quot;:&quot;{s}&quot;}}'", "hmac.new(b{q}, x)", "{n} for ann: {s}"),
    *("f({n}={q}, x=2)", "INSERT INTO t (a, {n}) VALUES (1, {q})", 'log: {{"a": {{"{n}": {j}}}}} end'),
    *("{n}\u00a0: {s}", "{n}%3D{s}%26x%3D1"),
)
STRUCTURES = (
    *('{{"{n}": {j}}}', '{{"a": [{{"{n}": [{j}]}}]}}', '{{"name": "{n}", "value": {j}}}'),
    *('["Host", "h", "{n}", {j}]', '{{"columns": ["id", "{n}"], "rows": [[1, {j}], [2, {j}]]}}'),
    *('[["id", "{n}", "x"], [1, {j}, 2]]', '["--{n}", {j}]'),
    *('[{{"op": "add", "path": "/spec/{n}", "value": {j}}}]', '{{"element": "{n} field", "text": {j}}}'),
    *('{{"command": "mysql", "args": ["-u", "root", {jp}]}}', '{{"label": "{n}", "value": {j}}}'),
)
BEFORE = (
    *("", "", "", "ran: ", "$ ", "2026-01-01 INFO ", "\n", "user=ann ", "a=1, ", "see https://h/a?b=1 "),
    "- ",
)
AROUND = (
    *("{}", "{}", "{}", "{} ", "{}\n", "{}\nport=1\n", "({})", "[{}]", "`{}`", "<p>{}</p>", "{}; echo done"),
)
AROUND += ("{} | tee log", "{} && ls -p 80", "{}, then stop.", 'msg="x" {}', "error: {} (code 7)")
NAMES = (
    *("password", "passwd", "db_password", "apiKey", "api_key", "client_secret", "access_token", "secret"),
    *("pwd", "DB_PASSWORD", "passphrase"),
)


def generated(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return texts that got a marker and kept a piece of their secret: (text, secret, result)."""
    draw, redactor, left = random.Random(seed), Redactor(), []
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    for _ in range(count):
        secret = "Qz7" + "".join(draw.choice(letters) for _ in range(draw.randint(8, 20)))
        form = draw.choice((*COMMANDS, *ASSIGNMENTS, *STRUCTURES))
        if "%" not in form:
            for _ in range(draw.randint(0, 3)):
                at = draw.randint(1, len(secret) - 1)
                secret = secret[:at] + draw.choice("!@#^*+-_.:/?$~") + secret[at:]
        text = form.format(
            n=draw.choice(NAMES),
            s=secret,
            j=json.dumps(secret),
            jp=json.dumps("-p" + secret),
            q=draw.choice(("'{}'", '"{}"')).format(secret),
        )
        text = draw.choice(AROUND).format(draw.choice(BEFORE) + text)
        result = redactor.scrub(text)
        if "[REDACTED" in result and any(secret[at : at + 6] in result for at in range(len(secret) - 5)):
            left.append((text, secret, result))
    return left


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


# Values of which a careless walk looks at each part for each other part.
HOSTILE_VALUES: dict[str, Callable[[int], Any]] = {
    "names that become one": lambda size: {f"password=secret{number}": 1 for number in range(size)},
    "lists of names": lambda size: [["password", "x"]] * size,
    "rows": lambda size: {"columns": ["password"] * size, "rows": [[1] * 4] * size},
    "programs in a list": lambda size: ["mysql"] * size,
    "flags": lambda size: ["--password"] * size,
    "labels": lambda size: {f"name{number}": "password" for number in range(size)} | {"value": 1, "Value": 2},
}


def growth(name: str) -> float:
    """Return how many times longer four times as much of something hostile takes."""
    redactor = Redactor()
    works: list[Callable[[], Any]] = []
    for size in (6_000, 24_000):
        if name in HOSTILE:
            unit = HOSTILE[name]
            works.append(functools.partial(redactor.scrub, unit * (size // len(unit))))
        else:
            works.append(functools.partial(redactor.redact, HOSTILE_VALUES[name](size // 10)))
    once, more = (min(timeit.repeat(work, number=1, repeat=3, timer=time.process_time)) for work in works)
    return more / max(once, 1e-4)


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
    parser.add_argument("--held-out", action="store_true", help="judge each source without its own words")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="look for leaks in N made texts")
    parser.add_argument("--hostile", action="store_true", help="time hostile texts and their doubles")
    parser.add_argument("--speed", action="store_true", help="time an ordinary event and a long text")
    args = parser.parse_args(argv)
    tail, names = load("redaction_names_tail.json"), load("redaction_names.json")
    for label, cases, others in (("tail", tail, names), ("earlier", names, tail)):
        if cases:
            precision, recall, wrong = score_names(cases)
            print(f"{label}: {len(cases)} names: precision {precision:.3f}, recall {recall:.3f}")
            print(*wrong if args.misses else (), sep="\n", end="")
        if cases and args.held_out:
            precision, recall = score_held_out(cases, others)
            print(
                f"{label}: each source without its own words: precision {precision:.3f}, recall {recall:.3f}"
            )
    for origin, hard in (
        ("shared", load("redaction_text_hard.json")),
        ("own", load_own("redaction_hard.json")),
    ):
        if hard:
            removed, to_remove, kept, to_keep, wrong = score_texts(hard)
            print(f"{origin}: {len(hard)} hard texts: removed {removed}/{to_remove}, kept {kept}/{to_keep}")
            print(*wrong if args.misses else (), sep="\n", end="")
    if args.generate:
        left = generated(args.generate, 1)
        print(f"{args.generate} generated texts: {len(left)} with a marker beside a piece of the secret")
        print(*left[:20], sep="\n")
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
