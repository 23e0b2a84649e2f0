"""Hold `parse_yaml` against PyYAML: it must return the same value or raise ConfigError.

    python tools/fuzz_yaml.py                     # 200,000 mutants of all seed documents
    python tools/fuzz_yaml.py --enumerate 5       # every text of up to 5 pieces of the alphabet
    python tools/fuzz_yaml.py --generate 50000    # random documents, most of them valid
    python tools/fuzz_yaml.py --hostile           # time of hostile documents as they double

Seeds are tests/data/yaml_cases.json and, where MXCP_AUDIT_CASES (default ../shared/cases) has them,
the labelled documents. Each silent difference is printed; with one the exit status is 1. PyYAML is
needed. Its quirks: it raises ValueError and OverflowError as well as YAMLError; all count as raised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxcp_audit import ConfigError, parse_yaml  # noqa: E402

CASES = Path(os.environ.get("MXCP_AUDIT_CASES") or ROOT.parent / "shared" / "cases")
SUITES = ("yaml_suite.json", "yaml_bugcases.json", "yaml_realfiles.json")
# What has a meaning in YAML, or nearly has.
PIECES = [
    *"-?:,[]{}#&*!|>'\"%@`=<~ \t\n\r.\\/_+019aex\x85\u2028\ufeff\x00é😀",
    *(
        *(": ", "- ", " #", "? ", "\n ", "\n  ", "\n    ", "\n\n", "\r\n", ":\n", ": |\n", ": >-\n", "- - "),
        "''",
    ),
    *(
        *("---", "...", "---\n", "\n...\n", "no", "True", "null", "0x_", "0b1", "017", "1:10", "1e3", "1.5"),
        ".inf",
    ),
    *("<<", ".nan", "2001-01-01", "&a ", "*a", "!!str ", "|2\n", "|+\n", "\\\n", "\\x41", "\\ud83d", "a: b"),
]


def equal(one: object, other: object) -> bool:
    """True for equal values of equal types in equal order; NaN equals NaN, -0.0 differs from 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return equal([*one.items()], [*other.items()])
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other)


def outcome(load: Callable[[str | bytes], object], text: str | bytes) -> tuple[bool, object]:
    """(True, value) or (False, exception)."""
    try:
        return True, load(text)
    except Exception as error:  # PyYAML raises many kinds
        return False, error


def difference(text: str | bytes) -> str | None:
    """What breaks the rule for this document, or None. PyYAML is asked only where ours answers."""
    loaded, ours = outcome(parse_yaml, text)
    if not loaded:
        placed = isinstance(ours, ConfigError) and ours.line and ours.column
        return None if placed else f"{text!r}: raised {ours!r} without a place"
    their_loaded, theirs = outcome(yaml.safe_load, text)
    if their_loaded and equal(ours, theirs):
        return None
    return f"{text!r}: ours {ours!r}, PyYAML {theirs!r}"


def seeds(folder: Path = CASES) -> list[str]:
    """All seed documents that can be had here."""
    files = [ROOT / "tests" / "data" / "yaml_cases.json", *(folder / name for name in SUITES)]
    return [case["yaml"] for file in files if file.exists() for case in json.loads(file.read_text("utf-8"))]


def mutants(texts: list[str], count: int, seed: int) -> Iterator[str]:
    """`count` documents made from `texts` by one to four small changes, the same for the same seed."""
    chance = random.Random(seed)
    short = [text for text in texts if len(text) < 2000]
    for _ in range(count):
        text = chance.choice(short)
        for _ in range(chance.choice((1, 1, 2, 3, 4))):
            text = mutate(text, chance, short)
        yield text


def mutate(text: str, chance: random.Random, texts: list[str]) -> str:
    """`text` with one change: in its characters, its lines or their indentation."""
    here, there = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
    near = min(len(text), here + chance.randint(1, 4))
    lines = text.splitlines(keepends=True)
    row = chance.randrange(len(lines) or 1)
    kind = chance.randrange(9)
    if kind <= 2:
        return text[:here] + chance.choice(PIECES) + text[here:]
    if kind == 3:
        return text[:here] + text[near:]
    if kind == 4:
        return text[:here] + chance.choice(PIECES) + text[near:]
    if kind == 5:
        return text[:there] + text[here:there] + text[there:]
    if kind == 6:
        other = chance.choice(texts)
        return text[:here] + other[chance.randint(0, len(other)) :]
    if not lines:
        return chance.choice(PIECES)
    if kind == 7:
        lines[row] = " " * chance.randint(0, 4) + lines[row].lstrip(" ")
    else:
        lines.insert(chance.randint(0, len(lines)), lines.pop(row))
    return "".join(lines)


def short_documents(alphabet: Iterable[str], length: int) -> Iterator[str]:
    """Every text of up to `length` pieces of the alphabet."""
    pieces = list(alphabet)
    for size in range(length + 1):
        yield from map("".join, itertools.product(pieces, repeat=size))


SHORT_ALPHABETS = (
    *("a:- \n", "a:\n -#'", "a[]{},:\n ", "a>|\n -+2", "ab:'\"\n \\", "0x_b1:.e+-", "-. \na:#", "?a,[: {}]"),
)


def generated(count: int, seed: int) -> Iterator[str]:
    """Random documents in many spellings of the same values; most of them are valid YAML."""
    chance = random.Random(seed)
    for _ in range(count):
        yield (
            chance.choice(("", "", "---\n", "# c\n", "\n"))
            + _node(chance, 0, 4)
            + chance.choice(("", "\n", "\n...\n"))
        )


WORDS = (
    *("a", "b c", "no", "1", "0o7", "010", "~", "x:y", "a#b", "-x", "1_0", "1.5", "http://h/p", "é", "it's"),
    "+1",
)


def _scalar(chance: random.Random, indent: int, wraps: bool) -> str:
    fold = "\n" * chance.choice((1, 1, 2, 3)) + " " * chance.randint(max(indent - 1, 0), indent + 3)
    gap = fold if wraps and chance.random() < 0.25 else " " * chance.randint(1, 2)
    words = gap.join(chance.choices(WORDS, k=chance.choice((1, 1, 1, 2, 3))))
    kind = chance.randrange(4)
    if kind == 0:
        return "'" + words.replace("'", "''") + "'"
    if kind == 1:
        return '"' + words + chance.choice(("", "\\t", "\\\n  ", " ", "\\u00e9", '\\"')) + '"'
    return words


def _flow(chance: random.Random, depth: int) -> str:
    if depth <= 0 or chance.random() < 0.5:
        return _scalar(chance, 1, True)
    comma = chance.choice((",", ", ", " ,\n", ", # c\n "))
    if chance.random() < 0.5:
        return "[" + comma.join(_flow(chance, depth - 1) for _ in range(chance.randint(0, 3))) + "]"
    pairs = (
        f"{chance.choice('abcdef')}{chance.choice((': ', ' : ', ':', ''))}{_flow(chance, depth - 1)}"
        for _ in range(chance.randint(0, 2))
    )
    return "{" + comma.join(pairs) + "}"


def _block_scalar(chance: random.Random, indent: int) -> str:
    head = (
        chance.choice("|>") + chance.choice(("", "", "-", "+", "1", "2-")) + chance.choice(("", "", " # c"))
    )
    lines = (
        chance.choice((0, 0, 0, 1, 2)) * " " + chance.choice((*WORDS, "", "\tt", "# no")) for _ in range(4)
    )
    return head + "".join("\n" + " " * indent + line for line in lines)


def _node(chance: random.Random, indent: int, depth: int) -> str:
    """A node that may stand on a new line at the column `indent`."""
    kind = chance.randrange(8)
    if depth <= 0 or kind <= 1:
        return _scalar(chance, indent, True)
    if kind == 2:
        return _flow(chance, 3)
    if kind == 3:
        return _block_scalar(chance, indent + 1)
    margin, deeper = " " * indent, indent + chance.choice((1, 2, 2, 2, 4))
    end = chance.choice(("\n", "\n", "\n", " # c\n", "\n\n", "\n# c\n", "\r\n"))
    if kind <= 5:
        entries = []
        for _ in range(chance.randint(1, 3)):
            wide = chance.choice((2, 2, 2, 3))
            entries.append("-" + " " * (wide - 1) + _node(chance, indent + wide, depth - 1))
        return (end + margin).join(entries)
    entries = []
    for _ in range(chance.randint(1, 3)):
        key = chance.choice((*"abcdefgh", "k l", "'q'", '"r"', "1", "no")) + chance.choice((":", ":", " :"))
        where = chance.randrange(4)
        if where == 0:
            entries.append(f"{key} " + _scalar(chance, indent + 1, True))
        elif where == 1:
            entries.append(f"{key} " + chance.choice((_flow(chance, 2), _block_scalar(chance, deeper), "")))
        elif where == 2:
            entries.append(f"{key}{end}{margin}- " + _node(chance, indent + 2, depth - 1))
        else:
            entries.append(f"{key}{end}" + " " * deeper + _node(chance, deeper, depth - 1))
    return (end + margin).join(entries)


# Each makes a document of about `size` characters.
HOSTILE: dict[str, Callable[[int], str]] = {
    "open brackets": lambda size: "[" * size,
    "open braces": lambda size: "{a: " * (size // 4),
    "dashes": lambda size: "- " * (size // 2),
    "flow list": lambda size: "[" + "a," * (size // 2) + "]",
    "flow pairs": lambda size: "[" + "a: b," * (size // 5) + "]",
    "colons": lambda size: "a: " + ":" * size,
    "colons and blanks": lambda size: ": " * (size // 2),
    "many colons": lambda size: "a:" * (size // 2),
    "one long word": lambda size: "a" * size,
    "one long line": lambda size: "a: " + "b c " * (size // 4),
    "blanks in a line": lambda size: "a: b" + " " * size + "c",
    "blanks at the end": lambda size: "a: b" + " " * size,
    "blanks in quotes": lambda size: "a: '" + " " * size + "'",
    "blanks, no quote": lambda size: 'a: "' + " " * size,
    "escapes": lambda size: 'a: "' + "\\a" * (size // 2) + '"',
    "open quotes": lambda size: "- '" + "''" * (size // 2),
    "wrapped quote": lambda size: "a: '" + "b \n" * (size // 3) + "'",
    "empty lines": lambda size: "a:" + "\n" * size + " b",
    "wrapped text": lambda size: "a:\n" + " b\n" * (size // 3),
    "comments": lambda size: "# c\n" * (size // 4),
    "keys": lambda size: "".join(f"{number}: {number}\n" for number in range(size // 14)),
    "literal": lambda size: "a: |\n" + "  b\n" * (size // 4),
    "literals": lambda size: "- |\n b\n" * (size // 7),
    "empty literal lines": lambda size: "a: |\n" + "\n" * size,
    "blanks in a literal": lambda size: "a: |\n" + " " * size,
    "deep literal": lambda size: "a: |\n" + " " * (size // 2) + "b\n" + " c\n" * (size // 6),
    "digits": lambda size: "a: " + "9" * size,
    "sexagesimal": lambda size: "a: 1" + ":1" * (size // 2),
    "not sexagesimal": lambda size: "a: 1" + ":1" * (size // 2) + "x",
    "underscores": lambda size: "a: 1" + "_" * size + "x",
    "aliases": lambda size: "a: &a [b]\n" + "- *a\n" * (size // 5),
    "nested blocks": lambda size: "".join(" " * depth + "a:\n" for depth in range(int((2 * size) ** 0.5))),
    "deep enough blocks": lambda size: (
        ("".join(" " * d + "- \n" for d in range(90)) + " " * 90 + "b\n") * (size // 4500)
    ),
    "sequence of mappings": lambda size: "- a: 1\n  b:\n  - c\n" * (size // 18),
}


def hostile_times(sizes: tuple[int, int, int] = (1 << 18, 1 << 19, 1 << 20)) -> bool:
    """Print the seconds for each hostile document and their mean ratio as the size doubles.

    Linear is a ratio of 2; 3 allows for noise and for memory that has to be fetched first, 4 is quadratic.
    Returns whether all were linear and none raised anything but ConfigError.
    """
    fine = True
    for name, make in HOSTILE.items():
        seconds = []
        for size in sizes:
            text = make(size)
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                loaded, answer = outcome(parse_yaml, text)
                best = min(best, time.perf_counter() - start)
            seconds.append(best)
            fine &= loaded or isinstance(answer, ConfigError)
        ratio = (seconds[-1] / seconds[0]) ** 0.5
        slow = ratio > 3 and seconds[-1] > 0.1
        fine &= not slow
        answer_name = "loaded" if loaded else type(answer).__name__
        times = " ".join(f"{second:8.4f}" for second in seconds)
        print(f"{name:22} {times} s  x{ratio:4.1f}  {answer_name}{'  NOT LINEAR' if slow else ''}")
    return fine


def check(texts: Iterable[str], name: str) -> int:
    """Print how many documents differ, and each that does; return the number."""
    total = loaded = found = 0
    for text in texts:
        total += 1
        problem = difference(text)
        loaded += problem is None and outcome(parse_yaml, text)[0] if total % 50 == 0 else 0
        if problem:
            found += 1
            print(problem)
    print(f"{name}: {total:,} documents, about {loaded * 50:,} loaded, {found} silent differences")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one kind of check; 0 without, 1 with differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000, help="mutants (default 200000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--enumerate", type=int, metavar="LENGTH")
    parser.add_argument("--generate", type=int, metavar="COUNT")
    parser.add_argument("--hostile", action="store_true")
    options = parser.parse_args(argv)
    if options.hostile:
        return 0 if hostile_times() else 1
    if options.enumerate is not None:
        found = sum(
            check(short_documents(a, options.enumerate), f"enumerated {a!r}") for a in SHORT_ALPHABETS
        )
    elif options.generate is not None:
        found = check(generated(options.generate, options.seed), "generated")
    else:
        found = check(mutants(seeds(), options.count, options.seed), "mutants")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
