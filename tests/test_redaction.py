"""The Redaction section: names, structure, texts, conversion to plain values, cutting."""

from __future__ import annotations

import base64
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import html
import json
import pathlib
import re
import sys
import threading
import types
import urllib.parse
import uuid
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mxcp_audit
from mxcp_audit import REDACTED, ConfigError, Redactor, clip_plain

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import score_redaction  # noqa: E402

SPEC_NAMES = [
    *("password", "passwd", "pwd", "secret", "token", "key", "api_key", "apikey"),
    *("auth", "authorization", "credential", "ssn", "credit_card", "card_number"),
]
MARKER = "mArKeR" + "-7f3a91"


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor()


@dataclasses.dataclass
class Around:
    held: Any


def is_plain(value: Any) -> bool:
    """Say whether a value consists of exactly the types that `redact` promises."""
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, bool) or (type(value) is float and value - value == 0)


# Labelled cases: the floors of issue 4.


@pytest.mark.parametrize("origin", ["shared", "own"])
def test_names_labelled_cases_reach_the_floors(origin: str) -> None:
    cases = (score_redaction.load if origin == "shared" else score_redaction.load_own)("redaction_names.json")
    if not cases:
        pytest.skip("the shared cases are absent; set MXCP_AUDIT_CASES")
    precision, recall, wrong = score_redaction.score_names(cases)
    assert precision >= 0.97, wrong
    assert recall >= 0.99, wrong


@pytest.mark.parametrize("origin", ["shared", "own"])
def test_texts_labelled_cases_reach_the_floors(origin: str) -> None:
    cases = (score_redaction.load if origin == "shared" else score_redaction.load_own)("redaction_text.json")
    if not cases:
        pytest.skip("the shared cases are absent; set MXCP_AUDIT_CASES")
    removed, to_remove, kept, to_keep, wrong = score_redaction.score_texts(cases)
    assert removed == to_remove, wrong
    assert kept >= 0.97 * to_keep, wrong


@pytest.mark.parametrize("origin", ["shared", "own"])
def test_texts_hard_cases_reach_the_floors(origin: str) -> None:
    cases = (score_redaction.load if origin == "shared" else score_redaction.load_own)("redaction_hard.json")
    cases = cases or score_redaction.load("redaction_text_hard.json")
    if not cases:
        pytest.skip("the shared cases are absent; set MXCP_AUDIT_CASES")
    removed, to_remove, kept, to_keep, wrong = score_redaction.score_texts(cases)
    assert removed >= 0.97 * to_remove, wrong
    assert kept >= 0.97 * to_keep, wrong


def test_names_of_sources_without_their_own_words_reach_the_floors() -> None:
    tail, earlier = map(score_redaction.load, ("redaction_names_tail.json", "redaction_names.json"))
    if not tail:
        pytest.skip("the shared cases are absent; set MXCP_AUDIT_CASES")
    for cases, others, precision, recall in ((tail, earlier, 0.96, 0.94), (earlier, tail, 0.95, 0.96)):
        held = score_redaction.score_held_out(cases, others)
        assert held[0] >= precision and held[1] >= recall, held


def test_scrub_made_texts_leave_no_piece_of_a_secret_beside_its_marker() -> None:
    """`tools/score_redaction.py --generate 200000` makes more of them."""
    assert score_redaction.generated(4000, 7) == []


def test_scrub_secret_with_what_looks_like_a_name_goes_whole(redactor: Redactor) -> None:
    made = "Qz7yy7L8rP" + "Pw0:jd3B@y9vqNz"
    assert (
        redactor.scrub(f'a {{"args": ["root", "-p{made}"]}} b') == f'a {{"args": ["root", "{REDACTED}"]}} b'
    )
    assert redactor.scrub("a1b2c3pw=${PW} b") == "a1b2c3pw=${PW} b"


def test_scrub_own_cases_twice_changes_nothing_more(redactor: Redactor) -> None:
    for case in score_redaction.load_own("redaction_text.json") + score_redaction.load_own(
        "redaction_hard.json"
    ):
        once = redactor.scrub("".join(case["text_parts"]))
        assert redactor.scrub(once) == once


# Names.


@pytest.mark.parametrize("name", SPEC_NAMES)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title, lambda name: name.replace("_", "-")])
def test_is_sensitive_spec_name_in_any_spelling_is_true(redactor: Redactor, name: str, spell: Any) -> None:
    assert redactor.is_sensitive(spell(name))


@pytest.mark.parametrize(
    "name",
    [
        *("value_of_password", "hash_of_secret", "passWord", "pass word", "API-KEY", "x-api-key"),
        *("ｐａｓｓｗｏｒｄ", "db.password"),
    ],
)
def test_is_sensitive_torn_or_wide_spelling_is_true(redactor: Redactor, name: str) -> None:
    assert redactor.is_sensitive(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("access_key_id", False),  # names the pair; its other half is the secret
        ("client_token", True),  # a nonce here, a credential there: closed
        ("token_hash", True),  # guessable where the token is short
        ("PWD", True),  # in the specification, whatever shells mean by it
        ("GOOGLE_APPLICATION_CREDENTIALS", True),  # a path or the document
        ("kubeconfig", True),  # holds client keys
        ("connection_string", False),  # its password goes by the value
        ("session", False),
        ("session_id", False),
        ("signature", False),  # a request's MAC can't be used again
        ("tokens", False),  # mostly a count of text units
        ("pan", False),
        ("iban", False),
    ],
)
def test_is_sensitive_disputed_name_stays_as_decided(redactor: Redactor, name: str, expected: bool) -> None:
    assert redactor.is_sensitive(name) is expected


def test_is_sensitive_many_names_keeps_the_cache_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxcp_audit, "_MAX_VERDICTS", 64)
    redactor = Redactor()
    for number in range(200):
        redactor.redact({f"name{number}": 1, "note": f"token{number}=x"})
    assert 0 < len(redactor._verdicts) <= 64
    assert 0 < redactor._rules.strength.cache_info().currsize <= 64


def test_redact_many_texts_only_harmless_short_ones_are_remembered_and_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mxcp_audit, "_MAX_HARMLESS", 64)
    redactor = Redactor()
    for number in range(200):
        redactor.redact({"note": f"call {number}", "dsn": f"db://u:hunter{number}@h", "long": "x y" * 50})
        redactor.redact({"tags": [f"call {number}", "x"]})
    remembered = redactor._rules.harmless
    assert 0 < len(remembered) <= 64 and 0 < len(redactor._verdicts.inert) <= 64
    assert not [text for text in remembered if "hunter" in text or len(text) > 64]


def test_redact_text_seen_before_is_judged_by_its_place_each_time() -> None:
    redactor, definition = Redactor(), {"parameters": [{"name": "note", "type": "string", "sensitive": True}]}
    held, shown = '{"password": "x"}', {"note": "Bern", "list": ["Authorization", "Bern"]}
    redactor.redact({held: 1, "Bern": "Bern", "a": "Authorization"})
    assert redactor.redact({"a": held}) == {"a": f'{{"password": "{REDACTED}"}}'}
    assert redactor.redact(shown) == {"note": "Bern", "list": ["Authorization", REDACTED]}
    assert redactor.redact(shown, endpoint_def=definition)["note"] == REDACTED


def test_verdicts_name_that_holds_a_secret_is_not_kept() -> None:
    redactor = Redactor()
    shown = redactor.redact({"password=hunter2": 1, "dsn=a://u:hunter2@h": 2})
    assert "hunter2" not in repr(shown)
    assert not [name for name in redactor._verdicts if "hunter2" in name]


# Settings.


def test_keep_name_is_no_longer_redacted() -> None:
    assert Redactor(keep=["key"]).redact({"key": "user:1", "token": "x"}) == {
        "key": "user:1",
        "token": REDACTED,
    }


def test_keep_key_shows_labels_and_still_judges_their_values() -> None:
    tags = [{"Key": "Env", "Value": "prod"}, {"Key": "db_password", "Value": "x"}]
    shown = Redactor(keep=["key"]).redact({"tags": tags})
    assert shown == {"tags": [tags[0], {"Key": "db_password", "Value": REDACTED}]}


def test_keep_name_of_one_tool_counts_for_that_tool_alone() -> None:
    redactor = Redactor(keep=["kv_get.key"])
    assert redactor.redact({"key": "user:1"}, tool="kv_get") == {"key": "user:1"}
    assert redactor.redact({"key": "user:1"}, tool="other") == {"key": REDACTED}
    assert redactor.is_sensitive("key") and not redactor.is_sensitive("key", "kv_get")


def test_redact_name_goes_in_any_spelling_and_in_texts() -> None:
    redactor = Redactor(redact=["customerNumber", "crm.note"])
    assert redactor.redact({"customer_number": 7, "CustomerNumber": 8}) == {
        "customer_number": REDACTED,
        "CustomerNumber": REDACTED,
    }
    assert (
        redactor.scrub("lookup of customer_number=ab12 failed")
        == "lookup of customer_number=[REDACTED] failed"
    )
    assert redactor.redact({"note": "x"}, tool="crm") == {"note": REDACTED}
    assert redactor.redact({"note": "x"}) == {"note": "x"}


def test_redact_and_keep_of_the_same_name_redacts() -> None:
    assert Redactor(redact=["x"], keep=["x"]).is_sensitive("x")
    assert not Redactor(redact=["x"], keep=["t.x"]).is_sensitive("x", "t")


@pytest.mark.parametrize("entries", [[False], [1.1], [None], "password", [""]])
def test_redactor_entry_that_is_no_name_raises(entries: Any) -> None:
    with pytest.raises(ConfigError):
        Redactor(redact=entries)


def test_redactor_unknown_mode_or_missing_key_raises() -> None:
    with pytest.raises(ConfigError):
        Redactor(mode="sha1")
    with pytest.raises(ConfigError):
        Redactor(mode="hmac")


def test_hmac_same_secret_has_the_same_marker_everywhere() -> None:
    redactor = Redactor(mode="hmac", key=b"k")
    echoes: list[str] = []
    shown = redactor.redact({"password": "hunter2", "old": {"pwd": "other"}}, echoes=echoes)
    assert re.fullmatch(r"\[REDACTED:[0-9a-f]{8}\]", shown["password"])
    assert shown["password"] != shown["old"]["pwd"]
    assert redactor.scrub("password=hunter2") == f"password={shown['password']}"
    assert redactor.scrub("bad hunter2", echoes) == f"bad {shown['password']}"
    assert Redactor(mode="hmac", key=b"l").redact({"password": "hunter2"}) != {"password": shown["password"]}


# Declarations.

DEFINITION = {
    "parameters": [
        {"name": "pin_hint", "type": "string", "sensitive": True},
        {
            "name": "o",
            "type": "object",
            "properties": {"city": {"sensitive": True}, "zip": {"type": "string"}},
        },
        {
            "name": "l",
            "type": "array",
            "items": {"type": "object", "properties": {"x": {"sensitive": "yes"}}},
        },
    ]
}


@pytest.mark.parametrize("wrapper", [None, "tool", "resource", "prompt"])
def test_declared_sensitive_parameter_goes_at_every_level(redactor: Redactor, wrapper: str | None) -> None:
    definition = DEFINITION if wrapper is None else {wrapper: DEFINITION}
    value = {"pin_hint": "cat", "o": {"city": "Bern", "zip": "3000"}, "l": [{"x": 1, "y": 2}], "z": "kept"}
    assert redactor.redact(value, endpoint_def=definition) == {
        "pin_hint": REDACTED,
        "o": {"city": REDACTED, "zip": "3000"},
        "l": [{"x": REDACTED, "y": 2}],
        "z": "kept",
    }


def test_declared_part_in_an_opaque_value_redacts_all_of_it(redactor: Redactor) -> None:
    shown = redactor.redact({"o": "city: Bern", "l": '[{"x": "Bern", "y": 2}]'}, endpoint_def=DEFINITION)
    assert shown == {"o": REDACTED, "l": '[{"x": "[REDACTED]", "y": 2}]'}


@pytest.mark.parametrize(
    "garbage",
    [
        *(0, "x", [], {}, {"parameters": 3}, {"parameters": [None, 7, {"name": 5, "sensitive": True}]}),
        *({"tool": [1]}, object()),
    ],
)
def test_declared_garbage_declares_nothing(redactor: Redactor, garbage: Any) -> None:
    assert redactor.redact({"a": 1}, endpoint_def=garbage) == {"a": 1}


def test_redact_list_under_a_definition_that_hides_nothing_is_judged_as_without_one():
    """A definition without `sensitive` once kept siblings in a list from being looked at."""
    given = ["x", "--password", "hunter2"]
    assert Redactor().redact(given, endpoint_def={"parameters": []}) == ["x", "--password", REDACTED]


class Unreadable:
    __struct_fields__ = ("parameters", "items")

    @property
    def parameters(self) -> Any:
        raise RuntimeError

    items = parameters


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("definition", [Unreadable(), Unprintable(), {"parameters": Unprintable()}])
def test_declared_by_what_cannot_be_read_hides_everything(redactor: Redactor, definition: Any) -> None:
    assert redactor.redact({"a": 1}, endpoint_def=definition) == REDACTED


@pytest.mark.parametrize("part", [Unreadable(), Unprintable(), {"items": Unprintable()}])
def test_definition_with_a_part_that_cant_be_read_hides_that_part(redactor: Redactor, part: Any) -> None:
    definition = {"parameters": [{"name": "a"}, {"name": "b", "items": part}]}
    assert redactor.redact({"a": "x", "b": ["y"]}, endpoint_def=definition) == {"a": "x", "b": [REDACTED]}
    definition = {"properties": {"a": {}, "b": part}}
    shown = redactor.redact({"a": "x", "b": "y"}, endpoint_def=definition)
    assert shown == {"a": "x", "b": REDACTED}


def test_declared_cycle_ends(redactor: Redactor) -> None:
    definition: dict[str, Any] = {"properties": {}}
    definition["properties"].update(a=definition, b=definition)
    assert redactor.redact({"a": {"b": 1}, "c": 1}, endpoint_def=definition) == {"a": REDACTED, "c": 1}


# Structure.


@pytest.mark.parametrize("secret", ["hunter2", "", None, 0, 1.5, True, ["x"], {"a": {"b": 1}}, b"x", ("a",)])
def test_redact_sensitive_key_hides_any_value_whole_but_switches(redactor: Redactor, secret: Any) -> None:
    switch = secret is None or secret is True
    assert redactor.redact({"db_password": secret, "n": 1}) == {
        "db_password": secret if switch else REDACTED,
        "n": 1,
    }
    assert Redactor(redact=["x"]).redact({"x": secret}) == {"x": REDACTED}


def test_gate_lets_plain_sentences_pass(redactor: Redactor) -> None:
    text = "the customer called about the invoice and will write when it is paid; happy people hope for help"
    assert redactor._rules._gate.search(text) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"name": "API_KEY", "value": "x"}, {"name": "API_KEY", "value": REDACTED}),
        ({"name": "MODE", "value": "x"}, {"name": "MODE", "value": "x"}),
        ({b"name": b"API_KEY", b"value": b"x"}, {"name": "API_KEY", "value": REDACTED}),
        ([{"key": "Env", "value": "prod"}], [{"key": "Env", "value": "prod"}]),
        ([{"Key": "db_password", "Value": "x"}], [{"Key": "db_password", "Value": REDACTED}]),
        ({"key": "user:1", "value": "x"}, {"key": REDACTED, "value": "x"}),
        (["Authorization", "Bearer x"], ["Authorization", REDACTED]),
        ([("authorization", "x"), ("host", "h")], [["authorization", REDACTED], ["host", "h"]]),
        (["run", "--password", "x", "-v"], ["run", "--password", REDACTED, "-v"]),
        ({"body": '{"a": {"api_key": "x"}, "n": 1}'}, {"body": '{"a": {"api_key": "[REDACTED]"}, "n": 1}'}),
        ({"body": '{"n": 1,"m":"x"}'}, {"body": '{"n": 1,"m":"x"}'}),
        ({123: {"password": 9876}}, {"123": {"password": REDACTED}}),
        ({("a", "b"): {"secret": "y"}}, {'["a", "b"]': {"secret": REDACTED}}),
        ({b"token": "x"}, {"token": REDACTED}),
        ({"columns": ["user", "password"], "rows": [["a", "X"], ["b", None]]},
         {"columns": ["user", "password"], "rows": [["a", REDACTED], ["b", None]]}),
        ({"fields": [{"name": "id"}, {"name": "api_key"}], "values": [[1, "X"]]},
         {"fields": [{"name": "id"}, {"name": "api_key"}], "values": [[1, REDACTED]]}),
        ([["user", "password", "n"], ["a", "X", 1]], [["user", "password", "n"], ["a", REDACTED, 1]]),
        ({"label": "Password", "value": "X"}, {"label": "Password", "value": REDACTED}),
        ([{"op": "add", "path": "/spec/password", "value": "X"}],
         [{"op": "add", "path": "/spec/password", "value": REDACTED}]),
        ({"element": "Password field", "text": "X"}, {"element": "Password field", "text": REDACTED}),
        ({"type": "text", "text": "X"}, {"type": "text", "text": "X"}),
        (["Host", "h", "Authorization", "X"], ["Host", "h", "Authorization", REDACTED]),
        (["password", "token", "name", "id"], ["password", "token", "name", "id"]),
        (["mysql", "-u", "root", "-pX7y", "shop"], ["mysql", "-u", "root", f"-p{REDACTED}", "shop"]),
        ({"command": "redis-cli", "args": ["-a", "X"]}, {"command": "redis-cli", "args": ["-a", REDACTED]}),
        ({"command": "cp", "args": ["-a", "X"]}, {"command": "cp", "args": ["-a", "X"]}),
        ({"ParameterKey": "DbPassword", "ParameterValue": "X"},
         {"ParameterKey": "DbPassword", "ParameterValue": REDACTED}),
        ({"field": "password", "old": "X", "new": "Y"},
         {"field": "password", "old": REDACTED, "new": REDACTED}),
        ({"sensitive": True, "type": "a", "value": "X"}, {"sensitive": True, "type": "a", "value": REDACTED}),
        ({"sensitive": False, "value": "X"}, {"sensitive": False, "value": "X"}),
        ({"kind": "Secret", "data": {"a.yml": "WA=="}}, {"kind": "Secret", "data": {"a.yml": REDACTED}}),
        ({"kind": "ConfigMap", "data": {"a.yml": "X"}}, {"kind": "ConfigMap", "data": {"a.yml": "X"}}),
        ({"ref": {"name": "db", "key": "password"}}, {"ref": {"name": "db", "key": "password"}}),
        ({"target": "#password", "text": "X"}, {"target": "#password", "text": REDACTED}),
        ({"sql": "UPDATE u SET password = ?, city = ? WHERE id = ?", "params": ["X", "Oslo", 7]},
         {"sql": "UPDATE u SET password = ?, city = ? WHERE id = ?", "params": [REDACTED, "Oslo", 7]}),
        ({"query": "INSERT INTO u (name, api_key) VALUES ($1, $2)", "values": [["ann", "X"], ["bob", "Y"]]},
         {"query": "INSERT INTO u (name, api_key) VALUES ($1, $2)",
          "values": [["ann", REDACTED], ["bob", REDACTED]]}),
        ({"query": "rows", "params": []}, {"query": "rows", "params": []}),
        ({"kind": "Secret", "stringData": {"conn": "Zq7Vent4Lm"}},
         {"kind": "Secret", "stringData": {"conn": REDACTED}}),
        ({"setting_name": "theme", "setting_value": "X"}, {"setting_name": "theme", "setting_value": "X"}),
        ({"key": "X", "value": "x", "sensitive": True}, {"key": "X", "value": REDACTED, "sensitive": True}),
        ({"value": "x", "secret": False}, {"value": "x", "secret": False}),
        ({"Name": "/prod/x", "Value": "X", "Type": "SecureString"},
         {"Name": "/prod/x", "Value": REDACTED, "Type": "SecureString"}),
        ({"prompt": "Enter password:", "response": "X"}, {"prompt": "Enter password:", "response": REDACTED}),
        ({"key": "hunter", "response": "X"}, {"key": REDACTED, "response": "X"}),
        ([["Service", "API key"], ["maps", "X"]], [["Service", "API key"], ["maps", REDACTED]]),
        ({"seed_phrase": "X", "search_phrase": "x"}, {"seed_phrase": REDACTED, "search_phrase": "x"}),
    ],
)  # fmt: skip
def test_redact_structure_judges_by_the_sibling(redactor: Redactor, value: Any, expected: Any) -> None:
    assert redactor.redact(value) == expected


def test_redact_json_with_a_field_twice_hides_both(redactor: Redactor) -> None:
    shown = redactor.redact(
        {"body": '{"x": {"password": "one11"}, "x": 1, "password": "two22", "password": 3}'}
    )
    assert "one11" not in shown["body"] and "two22" not in shown["body"]


def test_redact_card_number_as_int_goes(redactor: Redactor) -> None:
    assert redactor.redact({"n": int("4111" + "1" * 12), "ts": 1647725122227000}) == {
        "n": REDACTED,
        "ts": 1647725122227000,
    }


def test_redact_never_changes_the_input(redactor: Redactor) -> None:
    value = {"password": "x", "a": [{"token": "y"}, ("k", {1, 2})], "s": {"deep": {"pin": 1}}}
    before = copy.deepcopy(value)
    shown = redactor.redact(value)
    shown["a"][0]["token"] = "changed"
    assert value == before


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=8)
)
names = st.one_of(st.text(max_size=8), st.sampled_from(["name", "value", "key", "a.b", "options", "data"]))
spellings = [str, str.upper, str.title, lambda name: name.replace("_", "-"), lambda name: f" {name}"]
spec_names = st.builds(
    lambda name, spell: spell(name), st.sampled_from(SPEC_NAMES), st.sampled_from(spellings)
)


@dataclasses.dataclass
class Box:
    content: Any


def in_json(value: Any) -> Any:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return [value]


containers = st.sampled_from(
    [
        *(lambda value: [value], lambda value: (1, value), lambda value: {"options": value}),
        *(lambda value: Box(value), lambda value: types.SimpleNamespace(content=value)),
        *(lambda value: collections.deque([value]), lambda value: collections.OrderedDict(data=value)),
        *(lambda value: types.MappingProxyType({"x": value}), lambda value: {1: value, "1": value}),
        *(lambda value: [value, value], in_json),
    ]
)


@given(
    spec_names,
    st.sampled_from(
        [MARKER, [MARKER], {"a": MARKER}, (MARKER, 1), {MARKER}, MARKER.encode(), {"x": [{"y": MARKER}]}]
    ),
    st.dictionaries(names, leaves, max_size=3),
    st.lists(containers, max_size=5),
)
def test_redact_marker_under_a_spec_name_never_appears(
    name: str, secret: Any, beside: dict[str, Any], around: list[Any]
) -> None:
    value: Any = {**beside, name: secret}
    if around and around[-1] is in_json and isinstance(secret, (set, bytes)):
        value = {**beside, name: MARKER}
    for wrap in around:
        value = wrap(value)
    echoes: list[str] = []
    redactor = Redactor()
    shown = redactor.redact(value, echoes=echoes)
    assert is_plain(shown)
    assert MARKER not in json.dumps(shown)
    assert MARKER not in redactor.scrub(f"rejected: {value!r}, that is {MARKER}", echoes)


@given(
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner))
)
def test_redact_any_value_is_plain_and_stable(value: Any) -> None:
    redactor = Redactor()
    shown = redactor.redact(value)
    assert is_plain(shown)
    json.dumps(shown, allow_nan=False)
    assert redactor.redact(value) == shown
    assert redactor.redact(shown) == shown


@given(st.text(alphabet="\"'\\=:@/.<>[]{}()& ,;-_\n\tpaswordkeytoknbr0123456789İ", max_size=80))
def test_scrub_any_text_twice_is_like_once(text: str) -> None:
    redactor = Redactor()
    once = redactor.scrub(text)
    assert redactor.scrub(once) == once


# Texts that the labelled cases don't cover.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1 b=2", "a=1 b=2"),
        ("pwd=x", "pwd=[REDACTED]"),
        ("İ pwd=x", "İ pwd=[REDACTED]"),
        ("password=[REDACTED]", "password=[REDACTED]"),
        ("postgres://u:a@b@h/d", "postgres://u:[REDACTED]@h/d"),
        ("http://[::1]:80/@x", "http://[::1]:80/@x"),
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),
        ("card 4111-1111 1111-1111", "card 4111-1111 1111-1111"),
        ("id-4111111111111111", "id-4111111111111111"),
        ("wc -w <<< 'some text here'", "wc -w <<< 'some text here'"),
        ("gh auth login --with-token <<< Zq7Vent4", f"gh auth login --with-token <<< {REDACTED}"),
        ("password = <<EOT\nZq7Vent\nEOT\na = b", f"password = {REDACTED}\na = b"),
        (
            "Private-Lines: 2\nZq7+/a\nVent4Lm=\nPrivate-MAC: ab",
            f"Private-Lines: 2\n{REDACTED}\nPrivate-MAC: ab",
        ),
        ("use token `Zq7Vent4Lm` and `key`", f"use token `{REDACTED}` and `key`"),
        ("pass `dtype='int64'` or session `UserSession`", "pass `dtype='int64'` or session `UserSession`"),
        ("if key == 'ArrowUp'", "if key == 'ArrowUp'"),
        ("auth: user=ann method=oauth2", "auth: user=ann method=oauth2"),
        ("docker build --secret id=npm,src=.npmrc", "docker build --secret id=npm,src=.npmrc"),
        ("$('#password').value = 'Zq7Vent'", f"$('#password').value = '{REDACTED}'"),
        ("credentials: omit", "credentials: omit"),
        ("DB_PASSWORD=\nDB_ENABLED=1", "DB_PASSWORD=\nDB_ENABLED=1"),
        ("DB_PASSWORD=\nAPI_TOKEN=Zq7Vent", f"DB_PASSWORD=\nAPI_TOKEN={REDACTED}"),
        ("app.secret_key = (\n    'Zq7Vent'\n)", f"app.secret_key = (\n    '{REDACTED}'\n)"),
        ("password = \\\n    'Zq7Vent'", f"password = \\\n    '{REDACTED}'"),
        ("Key | Value\nAPI_TOKEN | Zq7Vent4Lm\nTZ | UTC", f"Key | Value\nAPI_TOKEN | {REDACTED}\nTZ | UTC"),
        ("name,value\nDB_PASSWORD,Zq7Vent4Lm\nTZ,U", f"name,value\nDB_PASSWORD,{REDACTED}\nTZ,U"),
        ("seed phrase: " + "abandon " * 11 + "about", f"seed phrase: {REDACTED}"),
    ],
)
def test_scrub_edge_text_becomes(redactor: Redactor, text: str, expected: str) -> None:
    assert redactor.scrub(text) == expected


def test_scrub_secret_after_an_escape_goes(redactor: Redactor) -> None:
    token = "gh" + "p_" + "a1B2" * 9
    for before in ("\\n", "%3D", "x=", '"', "\n", "(", ""):
        assert token not in redactor.scrub(f"{before}{token}")


@pytest.mark.parametrize("name", [*score_redaction.HOSTILE, *score_redaction.HOSTILE_VALUES])
def test_redact_hostile_input_takes_linear_time(name: str) -> None:
    """Four times as much takes four times as long, not sixteen times; a disturbed measurement is repeated."""
    ratios = []
    for _ in range(4):
        ratios.append(score_redaction.growth(name))
        if ratios[-1] < 8:
            return
    raise AssertionError(f"{name}: {ratios}")


# Echoes.


def test_scrub_echo_goes_longest_first_in_all_its_forms(redactor: Redactor) -> None:
    echoes: list[str] = []
    redactor.redact(
        {"password": ["abc123", "abc123-LONG-TAIL", 'quo"te\\d\n', "a b/c"], "pin": "123", "otp": ""},
        echoes=echoes,
    )
    shown = redactor.scrub('no abc123-LONG-TAIL or abc123; quo\\"te\\\\d\\n; a%20b%2Fc; 123', echoes)
    assert shown == "no [REDACTED] or [REDACTED]; [REDACTED]; [REDACTED]; 123"


def test_scrub_echo_of_a_subtree_and_of_a_text_goes(redactor: Redactor) -> None:
    echoes: list[str] = []
    redactor.redact(
        {
            "credentials": {"user": "deep-user", "pin": [98765]},
            "dsn": "pg://u:pw-in-url@h",
            "auth": "Bearer tok-12",
        },
        echoes=echoes,
    )
    shown = redactor.scrub("deep-user 98765 pw-in-url tok-12", echoes)
    assert shown == " ".join([REDACTED] * 4)


@pytest.mark.parametrize(
    "spell",
    [
        urllib.parse.quote, urllib.parse.quote_plus, html.escape, repr, json.dumps,
        lambda secret: base64.b64encode(secret.encode()).decode(),
        lambda secret: f"{secret[:24]}...{secret[-24:]}",
        lambda secret: f"{secret[:12]} and {secret[-12:]}",
        lambda secret: urllib.parse.quote(secret)[:40],
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [40, 300, 200_000])
def test_scrub_echo_cut_short_or_encoded_goes(redactor: Redactor, spell: Any, size: int) -> None:
    secret = ("correct horse <battery> & staple's '" * (size // 30 + 1))[:size]
    echoes: list[str] = []
    redactor.redact({"password": secret}, echoes=echoes)
    shown = redactor.scrub(f"before {spell(secret)} after", echoes)
    assert "horse" not in shown and "Y29ycmVj" not in shown and REDACTED in shown
    assert shown.startswith("before ") and shown.endswith(" after")


def test_redact_json_with_a_limit_reads_no_more_than_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    clean = mxcp_audit._Rules.clean
    monkeypatch.setattr(mxcp_audit._Rules, "clean", lambda *a: read.append(len(a[1])) or clean(*a))
    limit = 10_000
    for value in (
        "x y" * 10**6,
        b"x y" * 10**6,
        {"a": "[1, " * 10**6, "id": 7},
        ["some words " * 50] * 10**4,
    ):
        read.clear()
        shown = json.loads(Redactor().redact_json(value, limit=limit))
        assert sum(read) < 5 * limit and "CUT: " in repr(shown)
        assert not isinstance(value, dict) or (shown["id"] == 7 and "CUT: 4000000 bytes" in shown["a"])


def test_redact_json_with_a_limit_shows_no_half_of_a_secret() -> None:
    text = "x" * 9_990 + " password=" + "hunter2" * 20 + "y" * 50_000
    shown = Redactor().redact_json({"a": text}, limit=10_000)
    assert "hunter" not in shown


def test_redact_echoes_stay_bounded(redactor: Redactor) -> None:
    echoes: list[str] = []
    redactor.redact({"secrets": [f"secret-{n}" for n in range(1000)], "token": "x" * 100_000}, echoes=echoes)
    assert len(echoes) <= mxcp_audit._MAX_ECHOES


# Conversion to plain values.


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


Point = collections.namedtuple("Point", "x password")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (float("-inf"), "-Infinity"),
        (2**63, 2**63),
        (b"caf\xc3\xa9\xff", "café\\xff"),
        (bytearray(b"a"), "a"),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("NaN"), "NaN"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.timedelta(seconds=90), "0:01:30"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (Point(1, "x"), {"x": 1, "password": REDACTED}),
        (Box({"pwd": 1}), {"content": {"pwd": REDACTED}}),
        (collections.deque([1]), [1]),
        ({"a": 1}.keys(), ["a"]),
        (ValueError("bad password=x"), "ValueError: bad password=[REDACTED]"),
        (KeyError(), "KeyError"),
        (1 + 2j, "(1+2j)"),
        (range(3), "range(0, 3)"),
        (int, "<class 'int'>"),
        ({None: 1, True: 2, "true": 3, 1.5: 4}, {"null": 1, "true": 2, "true#2": 3, "1.5": 4}),
        ({1: "x", "1": "y"}, {"1": "x", "1#2": "y"}),
        ({"1": "y", 1: "x"}, {"1": "y", "1#2": "x"}),
    ],
)
def test_redact_everyday_object_becomes(redactor: Redactor, value: Any, expected: Any) -> None:
    shown = redactor.redact(value)
    assert shown == expected and type(shown) is type(expected) and is_plain(shown)


def test_redact_int_beyond_the_digit_limit_keeps_its_digits(redactor: Redactor) -> None:
    shown = redactor.redact({"n": [10**5000], 10**5000: 1})
    assert int(shown["n"][0], 16) == 10**5000 and is_plain(shown)


def test_redact_object_shows_no_address_and_no_state_that_it_hides(redactor: Redactor) -> None:
    class Connection:
        pass

    shown = redactor.redact([Connection(), lambda: 0, object()])
    assert shown == [item for item in shown if "0x" not in item] and "Connection object" in shown[0]


def test_redact_pydantic_model_is_walked_without_its_serializers(redactor: Redactor) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Login(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        model_config = pydantic.ConfigDict(extra="allow")
        user: str
        password: str

        @pydantic.model_serializer
        def broken(self) -> dict[str, Any]:
            raise RuntimeError("must not run")

    shown = redactor.redact({"login": Login(user="ana", password="hunter2", api_key="k")})
    assert shown == {"login": {"user": "ana", "password": REDACTED, "api_key": REDACTED}}


def test_redact_attrs_become_plain(redactor: Redactor) -> None:
    attr = pytest.importorskip("attr")
    login = attr.make_class("Login", ["user", "password"])("ana", "x")
    assert redactor.redact(login) == {"user": "ana", "password": REDACTED}


def test_redact_numpy_becomes_plain(redactor: Redactor) -> None:
    numpy = pytest.importorskip("numpy")
    value = [numpy.int64(3), numpy.float64("nan"), numpy.array([1, 2]), numpy.bool_(True)]
    shown = redactor.redact(value)
    assert shown == [3, "NaN", [1, 2], True] and is_plain(shown)


def test_redact_object_of_named_fields_has_each_that_can_be_read(redactor: Redactor) -> None:
    class Struct:
        """What msgspec makes, as far as we look at it; one field is unset."""

        __struct_fields__ = ("user", "password", "unset")
        user, password = "ana", "x"

        @property
        def unset(self) -> str:
            raise AttributeError("hunter2")

    class Ratio(float):
        def __repr__(self) -> str:
            raise RuntimeError("hunter2")

    assert redactor.redact([Struct(), Ratio(0.5)]) == [
        {"user": "ana", "password": REDACTED, "unset": "<unreadable: AttributeError>"},
        0.5,
    ]


cells = st.one_of(
    st.sampled_from(
        [0, -1, 4111111111111111, 1.5, float("nan"), True, None, b"x", "ok", "say: pwd=hunter22"]
    ),
    st.lists(st.sampled_from(["--password", "north", 7]), max_size=2),
    st.dictionaries(st.sampled_from(["id", "key"]), st.sampled_from(["4111 1111 1111 1111", 7]), max_size=2),
)


@given(
    st.lists(
        st.fixed_dictionaries({"id": cells, "100%s": cells, "a{}": cells}, optional={"pin": cells}),
        min_size=1,
        max_size=5,
    )
)
@example(
    [{"id": 4111111111111111, "100%s": 0.5, "a{}": True}, {"id": 7, "100%s": float("inf"), "a{}": False}]
)
def test_redact_table_is_written_like_its_rows(redactor: Redactor, rows: list[dict[str, Any]]) -> None:
    rows = [dict(row) for row in rows for _ in range(10)]
    each = ",".join(map(redactor.redact_json, rows))
    assert redactor.redact_json(rows) == f"[{each}]"
    for inner in (rows, rows[-1], [rows[-1]] * 10):  # no row is written twice, or within itself
        rows[-1]["id"] = inner
        assert redactor.redact(rows)[-1]["id"] in ("[CYCLE]", ["[CYCLE]"] * 10)


def test_redact_cycle_is_marked_and_a_repeat_is_not(redactor: Redactor) -> None:
    value: dict[str, Any] = {"n": 1}
    value["me"] = value
    box = Box(None)
    box.content = [box]
    twice = [1]
    assert redactor.redact(value) == {"n": 1, "me": "[CYCLE]"}
    assert redactor.redact(box) == {"content": ["[CYCLE]"]}
    assert redactor.redact([twice, twice]) == [[1], [1]]


def test_redact_deep_or_explosive_value_ends(redactor: Redactor) -> None:
    deep: Any = "end"
    for _ in range(100_000):
        deep = [deep]
    assert "[DEPTH]" in json.dumps(redactor.redact({"a": deep}))
    wide: Any = ["x"]
    for _ in range(60):
        wide = [wide, wide]
    assert "[CUT: " in json.dumps(redactor.redact(wide))


def test_redact_near_the_recursion_limit_returns(redactor: Redactor) -> None:
    def sink(levels: int) -> Any:
        return redactor.redact({"a": [{"b": {"password": "x"}}]}) if levels == 0 else sink(levels - 1)

    for levels in range(sys.getrecursionlimit() - 80, sys.getrecursionlimit() - 20):
        try:
            shown = sink(levels)
        except RecursionError:
            continue  # the test's own frames
        assert '"x"' not in json.dumps(shown)


class Liar:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise OSError("no class")

    def __repr__(self) -> str:
        raise OSError("no repr")

    def __getattr__(self, name: str) -> Any:
        raise OSError(name)


class Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise OSError("no check")

    def __getattribute__(cls, name: str) -> Any:
        raise OSError(name)


class Broken(metaclass=Meta):
    pass


class Loop:
    def __repr__(self) -> str:
        return repr(self)


@dataclasses.dataclass
class Trap:
    good: int = 1

    @property
    def bad(self) -> int:
        raise OSError("no")


def test_redact_hostile_object_leaves_a_placeholder_and_its_neighbours(redactor: Redactor) -> None:
    hostile = [Liar(), Broken(), Loop(), Trap()]
    shown = redactor.redact({"a": 1, "hostile": hostile, "z": 2})
    assert is_plain(shown) and shown["a"] == 1 and shown["z"] == 2
    assert shown["hostile"][0] == "<unprintable Liar>"
    assert shown["hostile"][2] == "<unprintable Loop>"
    assert redactor.redact({"password": Liar()}, echoes=[]) == {"password": REDACTED}
    assert isinstance(redactor.scrub(Liar()), str)  # type: ignore[arg-type]


class Unheard(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, RecursionError, Unheard]
)
def test_redact_what_an_object_raises_never_escapes(redactor: Redactor, error: Any) -> None:
    class Raising(ValueError):
        def __repr__(self) -> str:
            raise error

        __str__ = __repr__

    class Silent:
        __repr__ = Raising.__repr__

    shown = redactor.redact([Silent(), Raising(), {Silent(): 1}], echoes=[])
    assert shown[:2] == ["<unprintable Silent>", "Raising: <unprintable Raising>"]
    assert redactor.redact({"password": Silent()}, echoes=[]) == {"password": REDACTED}


def test_fx_049_a_signal_within_a_container_passes(redactor: Redactor) -> None:
    class Once(list[int]):
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        redactor.redact({"a": Once([1])})


@pytest.mark.parametrize("error", [Unheard, SystemExit])
def test_redact_any_hostile_container_costs_no_more_than_itself(redactor: Redactor, error: Any) -> None:
    def fail(*args: Any) -> Any:
        raise error("hunter2")

    methods = ("__iter__", "__len__", "__getitem__", "__getattr__", "__repr__", "items", "keys")
    namespace = {**dict.fromkeys(methods, fail), "__class__": property(fail)}
    bases = (object, dict, list, tuple, set, bytes, str, int, ValueError, collections.UserDict)
    bases += (collections.deque, types.SimpleNamespace)
    shapes = [base.__new__(type("Hostile", (base,), dict(namespace))) for base in bases]
    for hostile in shapes:
        for beside in ("a", "rows", "columns", "args", "value"):
            value = {
                "id": 7,
                "password": "hunter2",
                "columns": ["password"],
                beside: [hostile, [hostile]],
                "z": 1,
            }
            for echoes in (None, []):
                shown = redactor.redact(value, echoes=echoes)
                assert is_plain(shown) and "hunter2" not in json.dumps(shown)
                assert (shown["id"], shown["z"]) == (7, 1)
        assert redactor.redact({"a": "hunter2"}, endpoint_def=hostile) in (REDACTED, {"a": "hunter2"})


def test_redact_generators_and_files_are_not_read(redactor: Redactor, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    path.write_text("content")
    generator = (n for n in [1, 2])
    with path.open() as file:
        redactor.redact([generator, file, iter([1])])
        assert file.read() == "content"
    assert list(generator) == [1, 2]


def test_redact_object_is_shown_once(redactor: Redactor) -> None:
    class Counting:
        calls: collections.Counter[str] = collections.Counter()

        def __repr__(self) -> str:
            self.calls["repr"] += 1
            return "shown"

        def __getattr__(self, name: str) -> Any:
            self.calls[name] += 1
            return self

        def __iter__(self) -> Any:
            self.calls["iter"] += 1
            return iter([])

    assert redactor.redact([Counting()]) == ["shown"]
    assert Counting.calls == {"repr": 1}


def test_redact_mapping_changed_by_another_thread_never_raises(redactor: Redactor) -> None:
    value: dict[str, Any] = {str(n): "text" for n in range(200)}
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            value[f"new{number % 50}"] = number
            value.pop(f"new{(number - 25) % 50}", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            shown = redactor.redact(value)
            assert isinstance(shown, dict) and len(shown) >= 200
    finally:
        stop.set()
        thread.join()


def test_redact_mapping_changed_by_its_own_value_is_shown_as_it_was_before(redactor: Redactor) -> None:
    class Growing:
        def __repr__(self) -> str:
            value.setdefault("new", 1)
            return "grown"

    value: dict[str, Any] = {"a": Growing(), "password": "x"}
    assert redactor.redact({"in": value}) == {"in": {"a": "grown", "password": REDACTED}}


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"in": value}, Around])
def test_redact_nesting_of_any_kind_ends_at_the_same_depth(redactor: Redactor, wrap: Any) -> None:
    value: Any = "core"
    for _ in range(mxcp_audit._MAX_DEPTH + 1):
        value = wrap(value)
    shown = json.dumps(redactor.redact(value))
    assert "[DEPTH]" in shown and "core" not in shown


@pytest.mark.parametrize("kind", ["mapping", "sequence"])
def test_redact_more_items_than_anybody_reads_are_counted(
    redactor: Redactor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(mxcp_audit, "_MAX_NODES", 10)
    many: Any = dict.fromkeys(map(str, range(11)), 1) if kind == "mapping" else list(range(11))
    assert redactor.redact({"few": 1, "many": many}) == {"few": 1, "many": "[CUT: 11 items]"}


def test_redact_and_scrub_fault_of_our_own_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known to do that. If something does, no half-redacted text may come out."""
    redactor = Redactor()

    def fail(*args: Any) -> str:
        raise ValueError("hunter2")

    for name in ("value", "mapping", "text"):
        monkeypatch.setattr(mxcp_audit._Walk, name, fail)
    assert redactor.redact({"a": "hunter2"}) == "<unreadable dict: ValueError>"
    assert redactor.redact_json(["hunter2"]) == '"<unreadable list: ValueError>"'
    assert redactor.scrub("hunter2") == "<unreadable text: ValueError>"


def test_redact_headers_with_a_name_twice_keep_both(redactor: Redactor) -> None:
    class Headers(collections.abc.Mapping[str, str]):
        def __getitem__(self, name: str) -> str:
            return "a"

        def __iter__(self) -> Any:
            return iter(["accept", "accept"])

        def __len__(self) -> int:
            return 2

    assert redactor.redact(Headers()) == {"accept": "a", "accept#2": "a"}


# Explaining.


def test_explain_says_where_and_why(redactor: Redactor) -> None:
    rows = redactor.explain(
        {
            "a": {"password": "x"},
            "city": "Bern",
            "note": ["token=abc", "fine"],
            "env": [{"name": "API_KEY", "value": "v"}],
        },
        endpoint_def={"parameters": [{"name": "city", "sensitive": True}]},
    )
    assert [path for path, _ in rows] == ["$.a.password", "$.city", "$.note[0]", "$.env[0].value"]
    reasons = dict(rows)
    assert "text" in reasons["$.note[0]"] and "beside" in reasons["$.env[0].value"]
    assert "its name" in reasons["$.a.password"] and "declared" in reasons["$.city"]
    assert "abc" not in repr(rows) and "Bern" not in repr(rows)


# Cutting.


def test_clip_plain_value_that_fits_is_returned_as_it_is() -> None:
    value = {"a": ["x", 1, None]}
    assert clip_plain(value, 1000) is value


def test_clip_plain_long_text_is_cut_with_its_size_and_the_rest_stays() -> None:
    shown = clip_plain({"id": 7, "body": "x" * 5_000_000, "note": "kept"}, 2000)
    assert shown["id"] == 7 and shown["note"] == "kept"
    assert shown["body"].startswith("xxxx") and shown["body"].endswith("…[CUT: 5000000 bytes]")
    assert 1500 < len(json.dumps(shown)) <= 2000


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=60), inner, max_size=20),
    max_leaves=60,
)


@given(plain_values, st.integers(64, 600))
def test_clip_plain_any_value_fits_and_is_valid(value: Any, max_bytes: int) -> None:
    shown = clip_plain(value, max_bytes)
    text = json.dumps(shown)
    assert len(text) <= max_bytes
    assert json.loads(text) == shown


def test_clip_plain_many_items_leave_a_count() -> None:
    shown = clip_plain(list(range(100_000)), 500)
    assert shown[:3] == [0, 1, 2] and "100000 items" in shown[-1]


def test_redact_list_that_another_thread_empties_meanwhile_is_read(redactor: Redactor) -> None:
    """At whichever call inside of the walk the other thread comes."""
    for moment in range(1, 12):
        value, passed = ["-x", 2], [0]

        def empty(frame: Any, event: str, argument: Any, moment: int = moment) -> None:
            if event == "c_return" and frame.f_code.co_name == "sequence":
                passed[0] += 1  # noqa: B023 - called within the same turn
                if passed[0] == moment:  # noqa: B023
                    value.clear()  # noqa: B023

        sys.setprofile(empty)
        try:
            shown = redactor.redact({"a": value})
        finally:
            sys.setprofile(None)
        assert shown in ({"a": ["-x", 2]}, {"a": []}), moment


def test_clip_plain_long_number_and_no_room_leave_what_fits() -> None:
    for max_bytes in (64, 80):
        shown = clip_plain(10**200, max_bytes)
        assert isinstance(shown, str) and shown.startswith("1000") and len(json.dumps(shown)) <= max_bytes
    assert mxcp_audit._clip_text("x" * 50, 8) == "…"


@pytest.mark.parametrize(
    ("before", "body"),
    [
        *(
            (prefix, "aB3" * 16)
            for prefix in ("sgp_", "squ_", "pnu_", "dbtu_", "bb_live_", "y0_A", "CLOJARS_")
        ),
        *(
            (prefix, "aB3" * 16)
            for prefix in ("duffel_test_", "FLWSECK_TEST-", "dnkey-", "fio-u-", "sha256~")
        ),
        *(
            ("napi_", "a1" * 32),
            ("csk-", "a1" * 20),
            ("e2b_", "a1" * 20),
            ("cio", "aB" * 16),
            ("AKID", "aB" * 16),
        ),
        ("vk1.a.", "aB3" * 30),
    ],
)
def test_prefix_of_an_issuer_gives_a_token_away(before: str, body: str) -> None:
    assert body not in Redactor().scrub(f"it ran with {before}{body} in the end")


@pytest.mark.parametrize(
    "text", ["napi_get_value_int32_of_array", "tk-us-east-1-production-cluster", "cio2040-workshop"]
)
def test_word_that_begins_like_a_token_stays(text: str) -> None:
    assert Redactor().scrub(text) == text
