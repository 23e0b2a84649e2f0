"""The Config section: the YAML subset against PyYAML, and the settings of a site file."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import mxcp_audit  # noqa: E402
from mxcp_audit import Config, ConfigError, check_settings, load_config, parse_duration, parse_yaml  # noqa: E402

try:
    import fuzz_yaml
except ImportError:
    fuzz_yaml = None  # type: ignore[assignment]

oracle = pytest.mark.skipif(fuzz_yaml is None, reason="PyYAML, the oracle, is not installed")
CASES = Path(os.environ.get("MXCP_AUDIT_CASES") or ROOT.parent / "shared" / "cases")
OWN_CASES = json.loads((ROOT / "tests" / "data" / "yaml_cases.json").read_text("utf-8"))


def labelled(name: str) -> list[dict]:
    """The labelled documents of one file; the test is skipped where they are absent."""
    if not (CASES / name).exists():
        pytest.skip(f"{name} is not in {CASES}; set MXCP_AUDIT_CASES")
    return json.loads((CASES / name).read_text("utf-8"), object_hook=_unlabelled)


def _unlabelled(found: dict) -> object:
    """What JSON can't say stands there as `{"$t": "float", "v": "nan"}`."""
    read = {"int": int, "float": float, "map": dict}.get(found.get("$t"))
    return read(found["v"]) if read else found


def differences(texts) -> list[str]:
    return [problem for text in texts if (problem := fuzz_yaml.difference(text))]


def refusal(call, *args, **kwargs) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value


# --- parse_yaml against PyYAML ---


@oracle
@pytest.mark.parametrize("case", OWN_CASES, ids=range(1, len(OWN_CASES) + 1))
def test_parse_yaml_own_case_loads_or_is_refused_by_name(case):
    assert fuzz_yaml.difference(case["yaml"]) is None
    if case["policy"] == "must-load":
        assert repr(parse_yaml(case["yaml"])) == repr(fuzz_yaml.yaml.safe_load(case["yaml"]))
    else:
        assert case["names"] in str(refusal(parse_yaml, case["yaml"]))


@oracle
@pytest.mark.parametrize("name", ["yaml_suite.json", "yaml_bugcases.json", "yaml_realfiles.json"])
def test_parse_yaml_labelled_document_never_differs_from_pyyaml_and_loads_if_it_must(name):
    cases = labelled(name)
    assert differences(case["yaml"] for case in cases) == []
    for case in cases:
        if case.get("policy") == "must-load":
            assert repr(parse_yaml(case["yaml"])) == repr(case["expected"])
        elif name == "yaml_realfiles.json" and "value" in case["pyyaml"]:
            assert parse_yaml(case["yaml"]) == case["pyyaml"]["value"]


@oracle
@pytest.mark.parametrize("seed", range(2))
def test_parse_yaml_mutants_never_differ_from_pyyaml(seed):
    """A sample; `tools/fuzz_yaml.py` runs 200,000."""
    assert differences(fuzz_yaml.mutants(fuzz_yaml.seeds(), 4000, seed + 1000)) == []


@oracle
@pytest.mark.parametrize("alphabet", fuzz_yaml.SHORT_ALPHABETS if fuzz_yaml else [])
def test_parse_yaml_every_short_document_never_differs_from_pyyaml(alphabet):
    assert differences(fuzz_yaml.short_documents(alphabet, 4)) == []


@oracle
@pytest.mark.parametrize(
    "template", ["a:\n  {0}{1}b\n", "[a{0}{1}b]", "- a\n{0}{1}", "a: '{0}{1}'\n", 'a: "{0}{1}"\n']
)
def test_parse_yaml_every_third_pair_of_pieces_never_differs_from_pyyaml(template):
    pairs = itertools.islice(itertools.product(fuzz_yaml.PIECES, repeat=2), len(template) % 3, None, 3)
    assert differences(template.replace("{0}", one).replace("{1}", two) for one, two in pairs) == []


@oracle
def test_parse_yaml_every_short_number_never_differs_from_pyyaml():
    """Types are where a difference would be silent: every text of up to 5 characters of a number."""
    texts = ("".join(text) for size in range(1, 6) for text in itertools.product("09:._-", repeat=size))
    assert differences(f"- {text}\n" for text in texts) == []


@oracle
def test_parse_yaml_generated_documents_never_differ_and_mostly_load():
    texts = list(fuzz_yaml.generated(3000, 7))
    assert differences(texts) == []
    assert sum(fuzz_yaml.outcome(parse_yaml, text)[0] for text in texts) > 2000


@oracle
def test_parse_yaml_dump_of_any_value_loads_to_the_same_value():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    yaml = fuzz_yaml.yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True

    special = st.sampled_from(
        ["yes", "null", "1:10", "0x1", "1e3", "<<", "=", "2001-01-01", "- a", "a: b", " x ", "\u2028"]
    )
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(),
        special,
        st.just(math.inf),
    )
    keys = st.one_of(
        st.text(alphabet=st.characters(exclude_characters="\n\x85\u2028\u2029"), min_size=1, max_size=20),
        st.integers(-99, 10**9),
    )
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )
    styles = st.fixed_dictionaries(
        {
            "default_flow_style": st.sampled_from([None, True, False]),
            "default_style": st.sampled_from([None, None, "'", "|", ">"]),
            "indent": st.sampled_from([2, 4, 7]),
            "width": st.sampled_from([20, 80, 1000]),
            "allow_unicode": st.booleans(),
            "explicit_start": st.booleans(),
            "line_break": st.sampled_from(["\n", "\r\n", "\r"]),
        }
    )

    @hypothesis.settings(max_examples=80, derandomize=True, database=None)
    @hypothesis.given(values, styles)
    def holds(value, style):
        text = yaml.dump(value, Dumper=Dumper, sort_keys=False, **style)
        assert fuzz_yaml.difference(text) is None
        # default_style makes tags of numbers, allow_unicode leaves U+2028 bare: both are refused by name
        if style["default_style"] is None and not set(text) & set("\x85\u2028\u2029\ufeff"):
            assert fuzz_yaml.equal(parse_yaml(text), yaml.safe_load(text))

    holds()


@oracle
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32"]
)
def test_parse_yaml_bytes_never_differ_from_pyyaml(encoding):
    for case in OWN_CASES:
        for text in (case["yaml"], "é: ü\n" + case["yaml"]):
            try:
                data = text.encode(encoding)
            except UnicodeEncodeError:
                continue
            assert fuzz_yaml.difference(data) is None
            mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
            assert fuzz_yaml.difference(mark + data) is None


# --- parse_yaml without PyYAML ---


def test_parse_yaml_error_says_file_line_column_and_remedy():
    error = refusal(parse_yaml, "a: 1\nb:\n  - &x 1\n", path="site.yml")
    assert (error.path, error.line, error.column) == ("site.yml", 3, 5)
    assert str(error).startswith("site.yml:3:5: an anchor") and "write the value out" in str(error)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a: 'b\r\n  c'\r\n\r\nd: [1,\r\n *x]\r\n", (5, 2), "alias"),
        (b"a: 1\nb: \xe9t\xe9\n", (2, 4), "byte 0xE9 is not UTF-8"),
        ("a: 1\n b: 2\n", (2, 3), "the end of the line"),
        ("a: 1\nb\n", (2, 2), "a key, a colon and a blank"),
    ],
)
def test_parse_yaml_error_counts_lines_and_columns_as_an_editor_does(text, place, problem):
    error = refusal(parse_yaml, text)
    assert (error.line, error.column) == place and problem in str(error)


def test_parse_yaml_integers_of_all_bases_have_their_yaml_1_1_value():
    text = "[010, 0o10, 0b10, 0x10, 1_0, 1:10, -0x1F, 1e3]"
    assert parse_yaml(text) == [8, "0o10", 2, 16, 10, 70, -31, "1e3"]


def test_parse_yaml_integer_of_more_digits_than_python_takes_is_refused():
    assert parse_yaml("9" * 4300) == int("9" * 4300)
    assert "4300" in str(refusal(parse_yaml, "9" * 4301))
    assert "has no value" in str(refusal(parse_yaml, "0x" + "f" * 4200))  # messages can't show it


def test_parse_yaml_number_past_a_smaller_limit_of_this_python_is_refused():
    if not hasattr(sys, "set_int_max_str_digits"):
        pytest.skip("this Python has no limit for digits")
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert "no value" in str(refusal(parse_yaml, "9" * 641))
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    "text", ["[" * 100 + "]" * 100, "- " * 100 + "a", "".join(f"{' ' * n}a:\n" for n in range(100))]
)
def test_parse_yaml_hundred_collections_inside_each_other_load(text):
    value, depth = parse_yaml(text), 0
    while isinstance(value, (list, dict)):
        value, depth = next(iter(value.values() if isinstance(value, dict) else value), None), depth + 1
    assert depth == 100


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "{a: " * 10**6, "- " * 10**6, "".join(f"{' ' * n}a:\n" for n in range(999))]
)
def test_parse_yaml_deeper_nesting_is_refused_by_name(text):
    assert "100 collections" in str(refusal(parse_yaml, text))


@oracle
@pytest.mark.parametrize("name", sorted(fuzz_yaml.HOSTILE) if fuzz_yaml else [])
def test_parse_yaml_twice_the_hostile_text_takes_twice_the_calls(name):
    """Counts calls of Python and C functions; `tools/fuzz_yaml.py --hostile` takes the time."""

    def calls(size: int) -> int:
        text, count = fuzz_yaml.HOSTILE[name](size), 0

        def counts(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counts)
        try:
            fuzz_yaml.outcome(parse_yaml, text)
        finally:
            sys.setprofile(None)
        return count

    calls(10)  # patterns are compiled once
    assert calls(20_000) <= 2.5 * calls(10_000) + 200


# --- parse_duration ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1w", 604800), ("500ms", 0.5), ("1h30m", 5400)],
)
def test_parse_duration_whole_numbers_with_units_are_added_up(text, seconds):
    assert parse_duration(text) == seconds and isinstance(parse_duration(text), float)


@pytest.mark.parametrize(
    "text",
    [
        *("", "10", "1.5h", "5M", "5 m", "1y", "-1h", "+1h", "0s", "1h ", "h", "1hm", "٣h", "5300w"),
        *("9" * 30 + "s", "1h\n", None, 5),
    ],
)
def test_parse_duration_anything_else_raises_with_an_example(text):
    with pytest.raises(ValueError, match="10m"):
        parse_duration(text)


# --- load_config ---


@pytest.fixture
def site(tmp_path):
    """A function that loads a site file with the given text, with an empty environment."""

    def load(text: str, **arguments) -> Config:
        (tmp_path / "mxcp-site.yml").write_bytes(text.encode())
        return load_config(**{"cwd": tmp_path, "environ": {}, **arguments})

    return load


AUDIT = "mxcp: 1\nprofile: dev\nprofiles:\n  dev:\n    audit:\n"


@pytest.mark.parametrize(
    "text",
    [
        *("", "# nothing\n", "mxcp: 1\n", "profiles:\n", "profiles: {}\n", "profiles:\n  default:\n"),
        "profiles: {default: {audit: }}",
    ],
)
def test_load_config_file_without_audit_is_not_enabled(site, tmp_path, text):
    config = site(text)
    assert config._replace(sources={}) == Config(
        path=str(tmp_path / "logs-default.duckdb"), site_file=str(tmp_path / "mxcp-site.yml")
    )
    assert config.enabled is False and config.profile == "default"
    assert {name for name, source in config.sources.items() if source != "default"} == {"site_file"}


def test_load_config_profile_that_no_profiles_section_lists_is_not_enabled(site, tmp_path):
    config = site("mxcp: 1\nprofile: oven\n")
    assert (config.enabled, config.path) == (False, str(tmp_path / "logs-oven.duckdb"))


def test_load_config_every_setting_is_read_with_its_source(site, tmp_path):
    config = site(
        AUDIT + "      enabled: on\n      path: data/a.duckdb\n      journal: /var/j\n"
        "      attach: {read_only: no, n: 1}\n      flush_interval: 500ms\n      durable: true\n"
        "      on_full: drop\n      max_input_bytes: 4_096\n      redact: [iban, 'no']\n"
        "      keep:\n      - public_key\n      redact_mode: hmac\n      retention: 90d\n"
    )
    assert config._replace(sources={}) == Config(
        path=str(tmp_path / "data" / "a.duckdb"),
        profile="dev",
        site_file=str(tmp_path / "mxcp-site.yml"),
        enabled=True,
        journal="/var/j",
        attach={"read_only": False, "n": 1},
        flush_interval=0.5,
        durable=True,
        on_full="drop",
        max_input_bytes=4096,
        redact=("iban", "no"),
        keep=("public_key",),
        redact_mode="hmac",
        retention=90 * 86400.0,
    )
    assert config.sources["profile"] == "mxcp-site.yml:2"
    assert config.sources["enabled"] == "mxcp-site.yml:6"
    assert config.sources["keep"] == "mxcp-site.yml:15"
    assert config.sources["retention"] == "mxcp-site.yml:18"


def test_load_config_sources_name_every_setting(site):
    names = {name for name in Config._fields if name != "sources"}
    assert set(site("").sources) == names == {*mxcp_audit.SETTINGS, "profile", "site_file"}


def test_load_config_repr_leaves_out_the_secrets_of_attach(site):
    assert "hunter2" not in repr(site(AUDIT + "      attach: {encryption_key: hunter2}\n"))
    assert "hunter2" not in str(refusal(site, AUDIT + "      attach: {encryption_key: [hunter2]}\n"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("enabled: 'false'", "enabled: must be true or false without quotes, not the text 'false'"),
        ("enabled: 0", "must be true or false"),
        ("enabled: ''", "must be true or false"),
        ("enabled: []", "must be true or false"),
        ("enabled: y", "must be true or false"),
        ("enabled:", "enabled: it has no value"),
        ("durable: 1", "durable: must be true or false"),
        ("path: 5", "path: must be a path, not the number 5"),
        ("path: ''", "path: must be a path"),
        ('path: "a\\0b"', "NUL"),
        ('path: "\\ud800"', "half a character"),
        ("path: audit/logs.jsonl", "`mxcp-audit import FILE`"),
        ("path: LOGS.JSONL", "newer MXCP"),
        ("path: ':memory:'", "would be lost"),
        ("journal: no", "journal: must be a path, not the boolean False"),
        ("attach: [a]", "attach: must be a mapping"),
        ("attach: {a b: 1}", "attach: 'a b': the name of an option"),
        ("attach: {no: 1}", "letters, digits"),
        ("attach: {a: [1]}", "attach: a must be text, a number or a boolean"),
        ("attach: {a: .inf}", "attach: a must be"),
        ("flush_interval: 1.5h", "is no duration"),
        ("flush_interval: 0", "above 0"),
        ("flush_interval: -1", "above 0"),
        ("flush_interval: .nan", "above 0"),
        ("flush_interval: .inf", "above 0"),
        ("flush_interval: true", "above 0"),
        ("flush_interval: 1e3", "is no duration"),
        ("on_full: droop", "must be block or drop, not the text 'droop'"),
        ("on_full: [block]", "must be block or drop"),
        ("max_input_bytes: 1MB", "whole number of bytes"),
        ("max_input_bytes: 1.5", "whole number of bytes"),
        ("max_input_bytes: true", "whole number of bytes"),
        ("max_input_bytes: 0", "whole number of bytes"),
        ("max_input_bytes: 67108865", "whole number of bytes"),
        ("redact: email", "must be a list of names"),
        ("redact: {email: }", "must be a list of names"),
        ("redact: [a, no]", "redact: entry 2 must be a name, not the boolean False"),
        ("redact: [1.10]", "redact: entry 1 must be a name, not the number 1.1"),
        ("keep: ['']", "keep: entry 1 must be a name"),
        ("keep: [~]", "keep: entry 1 must be a name"),
        ("redact_mode: sha256", "must be constant or hmac"),
        ("retention: 90", 'write "90d"'),
        ("retention: 90 days", "is no duration"),
        ("enabel: true", "did you mean enabled?"),
        ("flush-interval: 1s", "did you mean flush_interval?"),
        ("zzz: 1", "known are enabled, path"),
        ("on: true", "there is no such setting"),
    ],
)
def test_load_config_wrong_setting_is_refused_with_line_and_trail(site, line, problem):
    error = refusal(site, AUDIT + f"      # a comment\n      {line}\n")
    assert problem in str(error)
    assert (error.line, error.trail[:3]) == (7, ("profiles", "dev", "audit"))


def test_load_config_wrong_entry_of_a_list_is_refused_by_number_at_its_setting(site):
    error = refusal(site, AUDIT + "      redact:\n      - a\n      - off\n")
    assert (error.line, error.column, error.trail[-1]) == (6, 7, "redact") and "entry 2" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "trail"),
    [
        ("- a\n", 1, ()),
        ("text\n", 1, ()),
        ("a: 1\nprofiles: [dev]\n", 2, ("profiles",)),
        ("profiles:\n  default: 1\n", 2, ("profiles", "default")),
        ("profiles:\n  default:\n    audit: true\n", 3, ("profiles", "default", "audit")),
        ("a: 1\nprofile: no\n", 2, ("profile",)),
        ("profile: ''\n", 1, ("profile",)),
    ],
)
def test_load_config_section_of_the_wrong_kind_is_refused_with_line_and_trail(site, text, line, trail):
    error = refusal(site, text)
    assert (error.line, error.trail) == (line, trail)


def test_load_config_max_file_size_of_mxcp_is_ignored(site):
    assert site(AUDIT + "      max_file_size: 100MB\n      enabled: true\n").enabled is True


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("audit: {enabled: true}", ":1:1: audit: is without effect, it must stand under profiles.default"),
        (
            "profiles:\n  default:\n    enabled: true",
            ":3:5: profiles.default.enabled: is without effect, it must stand under profiles.default.audit",
        ),
        (
            "profiles:\n  default:\n    audit:\n    enabled: true",
            ":4:5: profiles.default.enabled: is without effect, it must stand under",
        ),
    ],
)
def test_fx_145_audit_in_the_wrong_place_is_never_silently_off(site, text, problem, caplog):
    assert not site(text).enabled
    assert problem in caplog.text


def test_load_config_other_sections_and_profiles_are_not_validated(site):
    text = "dbt: 5\nprofiles:\n  default:\n    duckdb: []\n    audit: {enabled: true}\n"
    text += "  other:\n    audit: {enabled: 'no'}\n"
    assert site(text).enabled is True


@pytest.mark.parametrize(
    ("argument", "environ", "chosen", "source"),
    [
        ("a", {"MXCP_PROFILE": "b"}, "a", "argument"),
        (None, {"MXCP_PROFILE": "b"}, "b", "MXCP_PROFILE"),
        (None, {"MXCP_PROFILE": ""}, "c", "mxcp-site.yml:1"),
        (None, {}, "c", "mxcp-site.yml:1"),
    ],
)
def test_load_config_profile_is_argument_then_environment_then_file(site, argument, environ, chosen, source):
    text = "profile: c\nprofiles:\n" + "".join(
        f"  {name}: {{audit: {{path: {name}.db}}}}\n" for name in "abc"
    )
    config = site(text, profile=argument, environ=environ)
    assert (config.profile, config.sources["profile"]) == (chosen, source)
    assert config.path.endswith(f"{chosen}.db")


def test_load_config_environment_of_the_process_is_the_default(site, monkeypatch):
    monkeypatch.setenv("MXCP_PROFILE", "b")
    assert site("profiles: {a: , b: }", environ=None).profile == "b"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("profiles: {production: , staging: }", {"profile": "prod"}),
        ("profiles: {production: , staging: }", {"environ": {"MXCP_PROFILE": "prod"}}),
        ("profile: prod\nprofiles: {production: , staging: }", {}),
        ("profiles: {production: , staging: }", {}),
    ],
)
def test_load_config_unknown_profile_is_refused_with_the_known_ones(site, text, arguments):
    error = refusal(site, text, **arguments)
    assert "known are production, staging" in str(error)
    assert error.path is not None


def test_load_config_profile_name_that_yaml_reads_as_a_boolean_is_explained(site):
    assert "the boolean False (quote it)" in str(refusal(site, "profiles:\n  no: {}\n", profile="no"))


@pytest.mark.parametrize("profile", ["", 5])
def test_load_config_profile_argument_that_is_no_name_is_refused(site, profile):
    assert refusal(site, "", profile=profile).trail == ("profile",)


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "a\\b", "a\0b"])
def test_load_config_profile_name_never_escapes_into_the_default_path(site, name):
    assert "set path" in str(refusal(site, "", profile=name))
    named = json.dumps(name)
    config = site(f"profiles: {{{named}: {{audit: {{path: x.duckdb}}}}}}", profile=name)
    assert config.path.endswith("x.duckdb")
    assert "set journal" in str(
        refusal(site, f"profiles: {{{named}: {{audit: {{path: 'md:x'}}}}}}", profile=name)
    )


@pytest.mark.parametrize(
    "path", ["ducklake:meta.db", "postgres:dbname=x", "md:audit", "quack:h:1", "s3://b/x.duckdb"]
)
def test_load_config_attach_target_is_left_as_it_is_and_gets_a_journal_beside_the_file(site, tmp_path, path):
    config = site(AUDIT + f"      path: {path}\n")
    assert config.path == path
    assert (config.journal, config.sources["journal"]) == (str(tmp_path / "logs-dev.journal"), "default")


@pytest.mark.parametrize("path", ["~/x.duckdb", "${HOME}/x.duckdb", "../x.duckdb", "./a b.duckdb"])
def test_load_config_relative_path_is_beside_the_site_file_and_nothing_is_expanded(site, tmp_path, path):
    config = site(AUDIT + f"      path: {path}\n      journal: {path}.j\n", environ={"HOME": "/h"})
    assert config.path == str(tmp_path / path) and config.journal == str(tmp_path / f"{path}.j")


def test_load_config_site_file_is_searched_upwards(site, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    config = site("", cwd=tmp_path / "a" / "b")
    assert (config.site_file, config.sources["site_file"]) == (str(tmp_path / "mxcp-site.yml"), "found")
    assert config.path == str(tmp_path / "logs-default.duckdb")


def test_load_config_working_directory_is_the_default(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert site("", cwd=None).site_file == str(tmp_path / "mxcp-site.yml")


def test_load_config_named_file_is_read_and_its_name_stands_in_sources(tmp_path):
    (tmp_path / "other.yml").write_text("profiles: {default: {audit: {enabled: true}}}")
    config = load_config(config="other.yml", cwd=tmp_path, environ={})
    assert config.enabled is True
    assert (config.sources["site_file"], config.sources["enabled"]) == ("argument", "other.yml:1")
    assert load_config(config=tmp_path / "other.yml", environ={}) == config


def test_load_config_no_site_file_says_what_to_create(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    assert "profiles: {default: {audit: {enabled: true}}}" in str(
        refusal(load_config, cwd=tmp_path, environ={})
    )


@pytest.mark.parametrize("config", ["missing.yml", ".", "a\0b", "/dev/zero"])
def test_load_config_file_that_can_not_be_read_is_refused(tmp_path, config):
    assert refusal(load_config, config=config, cwd=tmp_path, environ={}).path is not None


def test_load_config_directory_named_like_the_site_file_is_refused_and_not_passed_over(tmp_path):
    (tmp_path / "mxcp-site.yml").write_text("")
    (tmp_path / "a" / "mxcp-site.yml").mkdir(parents=True)
    assert "directory" in str(refusal(load_config, cwd=tmp_path / "a", environ={}))


def test_load_config_bytes_that_are_not_utf_8_are_refused_as_in_mxcp(site, tmp_path):
    (tmp_path / "mxcp-site.yml").write_bytes("profile: ü\n".encode("utf-16"))
    assert "save the file as UTF-8" in str(refusal(load_config, cwd=tmp_path, environ={}))
    (tmp_path / "mxcp-site.yml").write_bytes("a: 1\nprofile: ü\n".encode("latin-1"))
    assert refusal(load_config, cwd=tmp_path, environ={}).line == 2


def test_load_config_yaml_error_names_the_file(site, tmp_path):
    error = refusal(site, "a: 1\nb: *x\n")
    assert (error.path, error.line) == (str(tmp_path / "mxcp-site.yml"), 2)


def test_load_config_every_real_site_file_loads(tmp_path):
    """Each profile that a real file has; what PyYAML refuses is skipped."""
    for case in labelled("yaml_realfiles.json"):
        if case["kind"] != "site-file" or "value" not in case["pyyaml"]:
            continue
        (tmp_path / "mxcp-site.yml").write_text(case["yaml"])
        try:
            assert load_config(cwd=tmp_path, environ={}).enabled in (True, False)
        except ConfigError as error:
            assert ".jsonl" in str(error)


# --- check_settings ---


def test_check_settings_arguments_give_the_types_of_config():
    given = {
        "path": Path("a.duckdb"),
        "flush_interval": 2,
        "redact": ["a"],
        "keep": ("b",),
        "retention": 86400.0,
    }
    checked = check_settings(given)
    assert checked == {
        "path": "a.duckdb",
        "flush_interval": 2.0,
        "redact": ("a",),
        "keep": ("b",),
        "retention": 86400.0,
    }
    assert isinstance(checked["flush_interval"], float)


def test_check_settings_wrong_argument_is_refused_by_name_without_a_file():
    error = refusal(check_settings, {"durable": "yes"})
    assert str(error) == "durable: must be true or false without quotes, not the text 'yes'"
    assert (error.path, error.line, error.trail) == (None, None, ("durable",))


def test_check_settings_error_is_a_value_error_and_keeps_its_cause():
    error = refusal(check_settings, {"redact": ["a", 1]})
    assert isinstance(error, ValueError) and isinstance(error.__cause__, ValueError)
    assert error.trail == ("redact",)


# --- docs/configuration.md ---

DOC = (ROOT / "docs" / "configuration.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_docs_every_yaml_example_is_a_site_file_that_records(site):
    examples = blocks("yaml")
    assert len(examples) == 2
    for example in examples:
        assert site(example).enabled is True


def test_docs_python_example_runs(site, tmp_path, monkeypatch, capsys):
    site("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MXCP_PROFILE", raising=False)
    for example in blocks("python"):
        exec(example, {})
    assert "logs-default.duckdb default" in capsys.readouterr().out


def test_docs_error_example_is_the_real_one(site, tmp_path):
    error = refusal(site, AUDIT + "      enabeld: true\n")
    assert blocks("text") == [str(error).replace(f"{tmp_path}{os.sep}", "") + "\n"]


def shown(name: str) -> str:
    """The default of a setting as the page shows it."""
    default = Config._field_defaults.get(name)
    if name in ("path", "journal"):
        return {
            "path": "`logs-<profile>.duckdb`",
            "journal": "`<path>.journal`, or `logs-<profile>.journal` if `path` is no file",
        }[name]
    if default is None:
        return "none"
    if isinstance(default, bool) or name == "strict":
        return f"`{str(bool(default)).lower()}`"
    return f"`{default:g}s`" if isinstance(default, float) else f"`{default}`" if default else "empty"


def test_docs_table_is_the_table_of_settings():
    rows = re.findall(r"^(\| `[a-z_]+` \|.*\|.*\|).{4,}\|$", DOC, re.MULTILINE)
    assert rows == [
        f"| `{name}` | {setting.must_be} | {shown(name)} |" for name, setting in mxcp_audit.SETTINGS.items()
    ]


def test_docs_limits_are_those_of_the_code():
    assert (mxcp_audit.MAX_DEPTH, mxcp_audit.MAX_KEY_CHARS, mxcp_audit.MAX_NUMBER_CHARS) == (100, 1024, 4300)
    assert mxcp_audit.MAX_SITE_FILE_BYTES == 16 << 20 and mxcp_audit.MAX_DURATION_S == 100 * 365 * 86400
    assert f"{mxcp_audit.MIN_INPUT_BYTES} to {mxcp_audit.MAX_INPUT_BYTES}" in DOC


def test_docs_table_of_types_is_true():
    text = "[010, 0x10, 0b10, 1_000, 1:30, 1e3, 1.0.0, 08, y, None]"
    assert parse_yaml(text) == [8, 16, 2, 1000, 90, "1e3", "1.0.0", "08", "y", "None"]


def test_config_from_arguments_target_that_is_no_file_needs_a_journal() -> None:
    with pytest.raises(ConfigError, match="journal: .* is no file, so there is no place beside it") as caught:
        mxcp_audit.config_from_arguments("postgres:host=h password=hunter2 dbname=d")
    assert "hunter2" not in str(caught.value)


def test_load_config_in_a_directory_that_is_gone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="working directory is gone"):
        load_config()
    with pytest.raises(ConfigError, match="working directory is gone"):
        mxcp_audit.config_from_arguments("log.duckdb")
    site = tmp_path / "mxcp-site.yml"
    site.write_text("profiles: {default: {audit: {enabled: true}}}")
    assert load_config(config=site).path == str(tmp_path / "logs-default.duckdb")  # FX-228
