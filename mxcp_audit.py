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

import binascii
import collections
import dataclasses
import enum
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
#
# Guarantee: what `Redactor.redact` returns holds no value that stands under a sensitive
# name, at any depth and in any container, and no text in a known secret format; it is
# plain (dict with text keys, list, text, number, bool, None), shares nothing with the
# caller's objects, and neither it nor `scrub` raises. Both are pure: the same input and
# settings give the same output, and no input is changed, consumed or kept.
#
# An input passes four sieves, cheapest knowledge first:
#
#     declared    endpoint_def says `sensitive: true`            {"pin": {"sensitive": true}}
#     names       the words of a field's name                    {"dbPassword": "hunter2"}
#     structure   a sibling names the field                      {"name": "API_KEY", "value": …}
#     texts       formats, and the same names inside any text    "password=hunter2", "Bearer …"
#
# A name is a noun phrase: its last secret word counts, what precedes it qualifies it
# (`sort_key`, `signing_key`) and what follows may say that the name is only *about* the
# secret (`password_policy`). Where a strong word meets an unknown one, the value goes;
# where a weak one does, it stays.
#
# It fails towards too much: a user's remedy is `keep:` (a name, or `tool.param`). It fails
# towards too little for a secret that neither its name nor its form gives away: a password
# in prose without a number or a capital, a column of a printed table, Base64 or other
# encodings of a secret, a secret split over two fields, names in most languages other than
# English. The remedy is `sensitive: true`, or `redact:` with the field's name.
#
# Rejected: substring matching (precision 0.42, recall 0.86 on 921 real names; this rule has
# 1.00 and 1.00, on our own 835 too) and exact matching (1.00 and 0.04); guessing by entropy
# (blinds users to hashes, UUIDs and image data, and cannot see `hunter2`); e-mail addresses
# and phone numbers (they identify callers, which is what an audit log is for); one pattern
# for every `name=value` over the whole text (2.7 ms for 26 KB; stems first, then a look
# around each, takes 0.7 ms); `re.IGNORECASE` (3.7 ms; small letters first, 0.2 ms).

REDACTED = "[REDACTED]"


def _words_in(text: str) -> frozenset[str]:
    """Return the words of a list that is written as a text, which is easier to read and to extend."""
    return frozenset(text.split())


# The names that the specification lists are redacted as they stand there, whatever the
# words say, in any spelling: case and separators don't count.
SPEC_NAMES = _words_in("""
    password passwd pwd secret token key apikey auth authorization credential ssn creditcard
    cardnumber
""")
# A secret wherever it stands: nothing else is called by these words. The last line is
# "password" in the languages whose word for it is unmistakable.
STRONG_WORDS = _words_in("""
    password passwd pwd passphrase passcode secret credential cred apikey ssn cvv cvc csc otp totp
    pat creditcard codeverifier securityanswer clientassertion psk dockerconfigjson dockercfg
    kubeconfig jsessionid phpsessid sessid passwort kennwort contrasena contraseña senha
""")
# Two words that are one secret: the specification's card number, what card and identity
# forms ask for, and words that a spelling tore apart (`passWord`, `OAuth`).
PHRASES = {
    "credit card": "creditcard",
    "debit card": "creditcard",
    "payment card": "creditcard",
    "card number": "creditcard",
    "card num": "creditcard",
    "card no": "creditcard",
    "cc number": "creditcard",
    "cc num": "creditcard",
    "cc no": "creditcard",
    "card verification": "cvv",
    "social security": "ssn",
    "code verifier": "codeverifier",
    "security answer": "securityanswer",
    "secret answer": "securityanswer",
    "client assertion": "clientassertion",
    "pass word": "password",
    "pass phrase": "passphrase",
    "pass code": "passcode",
    "api key": "apikey",
    "o auth": "oauth",
}
# A secret in some company only, each with the words before it that make it harmless.
WEAK_WORDS = {
    # Units of text and places in a listing, optimistic locks, crypto-currencies.
    "token": _words_in("""
    next starting page paging pagination continuation continue cursor sync delta resume forward
    backward scroll position offset checkpoint watermark iterator snapshot lock change version
    sequence consistency read idempotency idempotent skip first last previous prev start stop end
    bos eos pad unk sep cls mask special input output prompt completion generated code explained
    sample predicted text word string lexer parser syntax css color colour design theme environment
    n max min num per total count budget base quote native governance reward nft erc fungible
"""),
    # What finds a record, names a button, or is public by design.
    "key": _words_in("""
    public pub publishable anon primary foreign unique sort partition cache object idempotency dedup
    deduplication index group grouping hash range composite compound natural surrogate lookup map
    mapping issue project proj space epic ticket file config event metric variation translation i18n
    shortcut hot press up down arrow ctrl shift alt option function tab escape enter row column
    table tag label name json dict attribute property field site parent child import export input
    output search filter query bucket order routing message ordering shard record entity resource
    collapse feature flag node
"""),
    "auth": frozenset(),
    "authorization": frozenset(),
    "jwt": _words_in("verify validate decode parse"),
    "cookie": _words_in("consent third party"),
    # Outcomes, tickets and rounds.
    "pass": _words_in("""
    first second single multi two one last did tests test checks high low band boarding ski
"""),
    # Places on a board or a map.
    "pin": _words_in("""
    gpio led gpu map data clock input output board analog digital header reset power
"""),
    "code": frozenset(),
    "signature": frozenset(),
    "answer": frozenset(),
}
# With one of these somewhere before it, `key` opens something.
KEY_OPENERS = _words_in("""
    access private auth authentication authorization encryption encrypt decryption decrypt signing
    sign hmac mac aes des rsa cipher crypto master root session shared account storage subscription
    license licence activation service role app application client server wrapping wrap unseal
    recovery ssh pgp gpg pem tls ssl sas bot webhook admin developer dev merchant payment jwt
    signature kek dek
""")
# `tokens` are text, unless one of these says which.
TOKEN_OPENERS = _words_in("""
    access refresh api auth bearer oauth security session jwt csrf xsrf personal login reset bot
    service deploy user device registration verification recovery invite
""")
# `…auth` holds credentials after a scheme or a thing one logs in to; else it is a setting.
AUTH_SCHEMES = _words_in("""
    http https basic digest bearer docker registry proxy api x npm redis git repo token
""")
# `Authorization` is a header, alone or beside these; else it is a decision or a record.
AUTHORIZATION_CONTEXT = _words_in("""
    proxy http x ms amz basic bearer forwarded original header request
""")
# A code that proves who one is; others are countries, prices, programs and statuses.
CODE_OPENERS = _words_in("""
    authorization auth oauth mfa otp totp pin recovery backup security secret verification factor fa
    sms access device reset login time cvv cvc card
""")
# After a secret word these still mean the secret itself: forms, copies and parts of it.
STILL_SECRET = _words_in("""
    value string str text plain plaintext cleartext base b bin binary raw hex encoded encrypted
    hashed hash digest data byte content body material override new old current previous confirm
    confirmation repeat again verification verify primary secondary main backup default dev prod
    production test testing staging live sandbox local json pem block part number num no hint
    auxiliary env x last
""")
# After a secret word these say that the name is about the secret: which one, of what
# kind, where, when, how many, whether at all, and who deals with it.
DESCRIPTORS = _words_in("""
    id identifier uuid guid arn ref reference name label title alias slug index idx handle
    fingerprint thumbprint type kind class category format encoding algorithm algo alg method mode
    scheme strategy standard version level brand logo url uri path file filename filepath dir
    directory folder location endpoint host hostname server domain port realm region bucket store
    storage vault provider source issuer backend engine manager header prefix suffix field column
    table selector xpath placeholder parameter param in at on time date expires expiry expiration
    expire exp ttl lifetime age duration timeout timestamp created updated modified rotated changed
    issued period interval day hour minute second sec ms length len size count min max limit quota
    total bit strength score complexity attempt retry usage rate ratio budget remaining enabled
    disabled enable disable required require optional allowed valid invalid protected present
    provided exists exist status state check failure failed error verified supported needed missing
    used expired revoked policy rule requirement pattern regex validation validator rotation reset
    recovery change detection scanning encryption management generation generator exchange handling
    support character char history auth authentication reauthentication login flow grant question
    template message subject notification event alert email mail description help scope role
    permission owner user username client audience plugin helper command process processor handler
    service resolver cache table list only setting option
""")
# Before a secret word these turn the name into a switch or a figure.
FLAG_WORDS = _words_in("""
    is are has have had use uses using used no not non without with allow allows allowed require
    requires required enable enables enabled disable disables disabled show hide prevent ignore
    ignores skip need needs should must can force forgot detect scan support supports include
    includes accept accepts want generate manage mask redact max min maximum minimum num count total
""")
# Glued before a secret word in real names (`dbpass`, `ccnum`); the words above join in.
GLUE_WORDS = _words_in("""
    db user my mysql sql pg smtp imap ftp ldap admin root redis mail wifi api card credit debit cc
    num csrf xsrf id refresh aws client web www github gitlab slack number no code
""")
# A word that ends in one of these ends in a secret, whatever is glued before it
# (`pgpassword`, `csrfmiddlewaretoken`); too long to be the end of an English word.
GLUED_SUFFIXES = tuple(
    sorted(
        _words_in("""
    password passwd passphrase passcode secretkey accesskey privatekey secret credential apikey
    token pwd
""")
    )
)

_KNOWN_WORDS = (
    STRONG_WORDS
    | frozenset(WEAK_WORDS)
    | KEY_OPENERS
    | TOKEN_OPENERS
    | AUTH_SCHEMES
    | CODE_OPENERS
    | STILL_SECRET
    | DESCRIPTORS
    | FLAG_WORDS
    | GLUE_WORDS
    | WEAK_WORDS["token"]
    | WEAK_WORDS["key"]
)
_CAMEL = r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_A-Za-z]+"
# The end of a long name decides; the limits are arbitrary, and keep judging cheap.
_MAX_NAME_CHARS = 128
_MAX_GLUED_CHARS = 24
_LONGEST_WORD = 16


def _singular(word: str) -> str:
    """Say the word that the lists know: `keys` is `key`, `access` and `pass` stay."""
    return word[:-1] if word[-1:] == "s" and word not in _KNOWN_WORDS and word[:-1] in _KNOWN_WORDS else word


def _unglue(word: str) -> list[str]:
    """Split a word such as `accesstoken` into known words; one that can't be split stays whole.

    Longer words are tried first, and a split must hold a secret word, so that `keynote`
    and `codec` stay what they are.
    """
    if _singular(word) in _KNOWN_WORDS or len(word) < 5:
        return [word]
    splits: dict[int, list[str]] = {len(word): []}
    for start in range(len(word) - 2 if len(word) <= _MAX_GLUED_CHARS else -1, -1, -1):
        for end in range(min(len(word), start + _LONGEST_WORD), start + 1, -1):
            if end in splits and _singular(word[start:end]) in _KNOWN_WORDS:
                splits[start] = [word[start:end], *splits[end]]
                break
    parts = splits.get(0)
    if parts and any(_singular(part) in STRONG_WORDS or _singular(part) in WEAK_WORDS for part in parts):
        return parts
    if parts and " ".join(parts[:2]) in PHRASES:
        return parts
    for suffix in GLUED_SUFFIXES:
        if word.removesuffix("s").endswith(suffix):
            return [word[: word.rindex(suffix)], *_unglue(word[word.rindex(suffix) :])]
    return [word]


def _name_words(name: str) -> list[str]:
    """Split a name into lower-case words: `X-API-Key`, `JWTSecret`, `authtoken`, `password2`."""
    if not name.isascii():
        import unicodedata  # takes 1 ms that hardly anybody needs

        name = unicodedata.normalize("NFKC", name)
    words: list[str] = []
    for piece in re.findall(_CAMEL if name.isascii() else r"[^\W\d_]+", name[-_MAX_NAME_CHARS:]):
        for word in _unglue(piece.lower()):
            joined = PHRASES.get(f"{words[-1]} {_singular(word)}") if words else None
            if joined:
                words[-1] = joined
            else:
                words.append(word)
    return words


def _judge_weak(head: str, plural: bool, before: list[str], tail: list[str], loud: bool) -> bool:
    """Say whether a weak word, in this company, is a secret.

    Args:
        head: the weak word, singular.
        plural: whether it stood there in the plural.
        before: the words before it.
        tail: the words after it.
        loud: the name is in UPPER_CASE or an `X-` header, where `key` is rarely a record's.
    """
    nearest = before[-1] if before else ""
    if nearest in WEAK_WORDS[head]:
        return False
    if head == "token":
        return not plural or any(word in TOKEN_OPENERS or word in STRONG_WORDS for word in before)
    if head == "key":
        opens = any(word in KEY_OPENERS or word in STRONG_WORDS for word in before)
        return opens or (loud and bool(before) and not plural)
    if head == "auth":
        return nearest in AUTH_SCHEMES or (not before and bool(tail))
    if head == "authorization":
        return not plural and AUTHORIZATION_CONTEXT.issuperset(before)
    if head == "cookie":
        return not plural or not before or nearest in ("session", "auth", "http", "request", "set", "login")
    if head == "pin":
        return not plural
    if head == "code":
        return any(word in CODE_OPENERS or _singular(word) in STRONG_WORDS for word in before)
    if head == "signature":  # the last part of a pre-signed URL, good until it expires
        return nearest in ("amz", "goog", "access")
    if head == "answer":
        return "security" in before or "secret" in before
    return True  # jwt, pass


def _judge_name(name: str) -> tuple[int, str]:
    """Judge a field's name: (0, "") harmless, else a strength and the reason in words.

    Strength 1 is a weak word standing alone (`token`): under that name everything goes, but
    in running text `token: ` may be a remark. Strength 2 is a secret anywhere.

    Source of the rule: issue 4 of this project, measured on the names in its test data.
    """
    words = _name_words(name)
    plain = "".join(words)
    if plain in SPEC_NAMES:
        return (1 if plain in WEAK_WORDS else 2), f"the specification names {plain!r}"
    for at in range(len(words) - 1, -1, -1):
        head = _singular(words[at])
        if head in STRONG_WORDS or head in WEAK_WORDS:
            break
    else:
        return 0, ""
    before, tail = [_singular(word) for word in words[:at]], [_singular(word) for word in words[at + 1 :]]
    if not FLAG_WORDS.isdisjoint(before):
        return 0, ""
    strong = head in STRONG_WORDS or (head != "auth" and not STRONG_WORDS.isdisjoint(before))
    if strong and before and before[-1] in WEAK_WORDS.get(head, ()):
        return 0, ""
    if strong:
        # Kubernetes' imagePullSecrets are names of secrets.
        if not DESCRIPTORS.isdisjoint(tail) or (before and before[-1] == "pull"):
            return 0, ""
        return 2, f"the word {words[at]!r}"
    # "auth header" is what the header holds, "api key header" is what it is called.
    still = STILL_SECRET | {"header"} if head in ("auth", "authorization", "cookie") else STILL_SECRET
    loud = name.isupper() or name[:2] in ("X-", "x-")
    if still.issuperset(tail) and _judge_weak(head, words[at] != head, before, tail, loud):
        return (2 if before else 1), f"the word {words[at]!r} in {' '.join(words)!r}"
    return 0, ""


# Prefixes that issuers gave their secrets so that scanners may know them; each at the
# start of a run of word characters and dashes, with at least 16 of those after it.
TOKEN_PREFIXES = tuple(
    sorted(
        _words_in(
            "gh[opsur]_ github_pat_ "  # GitHub
            "gl(?:pat|dt|rt|rtr|cbt|ptt|ft|imt|agent|oas|soat|ffct|wt)- "  # GitLab
            "xox[abceoprs]- xapp- xwfp- "  # Slack
            "[sr]k_(?:live|test)_ whsec_ "  # Stripe; its pk_ is public
            "sk-ant- sk-proj- sk-svcacct- sk-admin- sk-or- sk-(?=[a-zA-Z_-]{0,40}[0-9]) "  # Anthropic, OpenAI
            "gsk_ xai- pplx- nvapi- r8_ tvly- lsv2_(?:pt|sk)_ jina_ fc-(?=[0-9a-f]{32}) "  # model services
            "AIza GOCSPX- "  # Google
            "A(?:KIA|SIA|BIA|CCA)(?=[A-Z0-9]{16}(?![A-Za-z0-9])) "  # AWS
            "npm_ pypi- rubygems_ oy2(?=[a-z0-9]{43}) dckr_[po]at_ "  # package and image registries
            "hf_ api_org_ "  # Hugging Face
            # Cloud, mail, source, monitoring, payment and design services, in no order.
            "do[opr]_v1_ shp(?:at|ca|pa|ss|tka)_ SK(?=[0-9a-f]{32}) key-(?=[0-9a-f]{32}) "
            "sq0(?:atp|csp|idp)- ntn_ secret_(?=[A-Za-z0-9]{43}) lin_(?:api|oauth)_ figd_ figo_ glsa_ glc_ "
            "sntry[su]_ PMAK- pul- dapi(?=[0-9a-f]{32}) sbp_ sb_secret_ pscale_(?:tkn|pw|oauth)_ nfp_ fo1_ "
            "NRAK- NRII- HRKU- CCIPAT_ bkua_ ATATT3 ATCTT3 ATBB AKCp LTAI xkeysib- tfp_ CFPAT- EZAK "
            "shippo_(?:live|test)_ rdme_ ops_eyJ AGE-SECRET-KEY-1 "
            "phx_ re_(?=[A-Za-z0-9]{8}_) rnd_ waka_ "
        )
    )
)
# Formats with dots, colons and slashes, each behind a substring that must be there.
DOTTED_TOKENS = (
    ("eyJ", r"(?:(?<![\w-])|(?<=\\[nrt]))eyJ[\w-]{8,}(?:\.[\w-]*){1,4}"),  # JWT, JWS, JWE
    ("SG.", r"\bSG\.[\w-]{16,}(?:\.[\w-]+)?"),  # SendGrid
    ("ya29.", r"\bya29\.[\w-]{16,}"),  # Google
    ("1//", r"\b1//0[\w-]{20,}"),  # Google
    ("hv", r"\bhv[sbr]\.[\w-]{16,}"),  # Vault
    ("dp.", r"\bdp\.(?:pt|st|ct|sa|scim|audit)\.[\w.-]{16,}"),  # Doppler
    ("sl.", r"\bsl\.(?:u\.)?[\w-]{60,}"),  # Dropbox
    (".atlasv1.", r"\w{14}\.atlasv1\.[\w-]{20,}"),  # Terraform
    (":", r"[0-9]{8,10}:[\w-]{34,40}(?![\w-])"),  # Telegram
    (".", r"[MNO](?<![\w.-][MNO])[\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w-])"),  # Discord
    ("hooks.slack.com/", r"(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[\w/-]+"),
    ("webhook", r"(?<=/webhooks/)[0-9]{16,20}/[\w-]{40,}"),  # Discord
    ("/webhookb2/", r"(?<=/webhookb2/)[\w@/-]+"),  # Teams
    ("-us", r"[0-9a-f]{32}-us[0-9]{1,2}\b"),  # Mailchimp
)
# A secret name holds one of these stems: where none is found, no name needs judging.
STEMS = tuple(
    sorted(
        _words_in("""
    pass key token auth secret pwd cred cookie card jwt otp pin code pat cc[_.-]?n cv[vc] csc psk ssn
    social sess signature sig(?==) answer assertion dockerc kubeconfig kennwort contrase senha
""")
    )
)
# What leads to a secret without naming it.
SPECIAL_STEMS = ("bearer", "basic", "identified", "thin:", "://")
# How a name in a text leads to its value. The names of the groups say which.
_SEPARATOR = r"""(?P<rest>[\w.\-]{0,64})(?![\w.\-])(?:
    (?P<assign>\\{0,8}["'`]?\]?[ \t]{0,8}(?:=>|:=|[!<>=]?=|<>|:(?![:/]))\s{0,8})
  | (?P<sibling>\\{0,8}["']\s{0,8},?\s{0,8}\\{0,8}["']?[vV]alue\\{0,8}["']?\s{0,8}[=:]\s{0,8})
  | (?P<lines>[ \t]{0,8}\r?\n[ \t]{0,64}[vV]alue:[ \t]{1,8})
  | (?P<pair>\\{0,8}["']\s{0,2},\s{0,8}(?=b?\\{0,8}["']))
  | (?P<prose>[ \t](?:is|was|are|set\ to|changed\ to)[ :][ \t]{0,4})
  | (?P<sql>[ \t]{1,4}(?:(?:NOT[ ])?I?LIKE|IN|AS|BY)[ \t]{0,4}\(?(?=["']))
  | (?P<quoted>[ \t]{1,4}(?=["']))
  | (?P<element>(?:\s[^<>]{0,200})?>(?=[^<\s]))
  | (?P<option>[ \t]{1,4}(?=[^\s-]))
)"""
_QUOTE = r"""(?:[A-Za-z_]{1,24}\()?[bBrRuUfF]{0,2}(\\{0,8})(["'`])"""
_QUOTED = {
    '"': r'[^"\\]*(?:\\.[^"\\]*)*',
    "'": r"[^'\\]*(?:(?:\\.|'')[^'\\]*)*",
    "`": r"[^`\\]*(?:\\.[^`\\]*)*",
}
# A bare value ends at a space or at what separates it from the next; a separator that
# nothing follows may be part of it.
_BARE = r"""(?:[^\s,;&'"`<>)\]}\\]
  |,(?![\s,]|[\w.\-]{1,40}[=:]|\Z) | ;(?!\s|[\w .\-]{1,40}=|\Z) | &(?![\w.%\[\]\-]{1,64}=|amp;)
  |[)\]}>](?=[\w!@#$%^*+]) | ["'](?=[\w!@#$%^*+]) | \\(?!["'nrt\\]) | <(?![/A-Za-z]))+"""
_YAML_BLOCK = r"[|>][+-]?[ \t]*\n([ \t]+)[^\n]*(?:\n\1[^\n]*)*"
_PASSWORDS = _words_in("password passwd pwd passphrase passcode")
_REFERENCES = _words_in("secret secrets credential credentials")
_ALGORITHMS = _words_in("sha1 sha256 sha384 sha512 md5 argon2 argon2id pbkdf2 base64 oauth2 scrypt2 utf8")
# What stands for a secret, or says something about it, is none.
_PLACEHOLDER = (
    r"\?|\$[0-9]{1,2}|\$[A-Z_]+|\$?\{\{?[\w .:-]*\}{0,2}|%s|%\(\w*\)s|<[\w .-]*>?|\*{2,}|\.{3}|x{3,}"
    r"|(?i:null|none|nil|undefined|true|false)"
)
_REMARKS = _words_in("""
    a an the this that is are was must should may can cannot will not no yes on off too at in of for
    from to and or with field required optional missing invalid incorrect wrong expired empty unset
    unknown expected unexpected got value string str text int integer bool boolean bytes object
    array list dict number type any strict bearer basic only same different
""")


# Arbitrary limits. Deeper than any input that people write, and far from the interpreter's
# own limit; more nodes than fit into the default of `max_input_bytes`.
_MAX_DEPTH = 64
_MAX_NODES = 500_000
_MAX_VERDICTS = 4096
_MAX_ECHOES, _MAX_ECHO_CHARS = 64, 8192
# The fewest digits at which an interpreter may refuse to write an int (CPython's lowest limit).
_WIDE_INT = 10**640
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_JSON_STARTS = frozenset('{[" \t\r\n')
_NAME_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
# In "API key: …" and "verification code is …" the word before belongs to the name.
_OPENERS = KEY_OPENERS | TOKEN_OPENERS | CODE_OPENERS | STRONG_WORDS
_HEADERS = _words_in("""
    authorization proxy-authorization x-ms-authorization-auxiliary cookie set-cookie
""")
_SCHEMES = _words_in("""
    bearer basic token apikey api-key key bot negotiate ntlm jwt oauth
""")
# A sibling with one of these names says what stands under the other.
_LABELS = _words_in("name key header field param parameter property variable attribute setting")
_VALUES = _words_in("value values val default content")
# Types whose `str` says all, by name: importing their modules would cost 15 ms.
_TEXT_TYPES = _words_in("""
    Decimal Fraction datetime date time timedelta UUID PurePath ZoneInfo Path
""")
_TEXT_MODULES = ("decimal", "fractions", "datetime", "uuid", "pathlib", "zoneinfo")
# What a verdict on a key says: its value goes; its own text holds a secret, or it is no
# text; a sibling may say what it is.
_SENSITIVE, _ODD, _LABELLED = 1, 2, 4


def _any_of(words: Iterable[str], own: Iterable[str]) -> re.Pattern[str]:
    """Compile a search for one of many words, grouped by their first letter: twice as fast as ungrouped."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(word[0], []).append(word[1:])
    grouped = [f"{first}(?:{'|'.join(rests)})" for first, rests in sorted(groups.items())]
    return re.compile("|".join([*grouped, *own]))


class _Patterns:
    """The compiled patterns, made by each Redactor so that `import` costs nothing.

    Every one runs in linear time: no repeat within a repeat over the same characters, and
    every look ahead or back, and every run that may have to be tried again, is bounded.
    """

    def __init__(self) -> None:
        self.separator = re.compile(_SEPARATOR, re.X)
        self.quote = re.compile(_QUOTE)
        self.quoted = {quote: re.compile(body, re.S) for quote, body in _QUOTED.items()}
        self.bare = re.compile(_BARE, re.X)
        self.block = re.compile(_YAML_BLOCK)
        self.placeholder = re.compile(_PLACEHOLDER)
        self.run = re.compile(r"[A-Za-z0-9_\-]{16,}")
        self.token = re.compile(
            rf"(?:{'|'.join(TOKEN_PREFIXES)})(?=[a-z_\-]{{0,40}}[A-Z0-9])[A-Za-z0-9_\-]{{16,}}"
        )
        self.dotted = tuple((gate, re.compile(pattern)) for gate, pattern in DOTTED_TOKENS)
        # 4-4-4-4, 4-6-5 and 4-6-4 with one kind of separator, or none; the issuer and the
        # check digit are judged in code.
        self.card = re.compile(
            r"[2-6](?:(?<![\w\-][2-6])(?<![0-9]\.[2-6])|(?<=\\[nrt][2-6]))"
            r"(?:[0-9]{13,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})"
            r"(?![\w-]|\.[0-9])"
        )
        self.ssn = re.compile(
            r"[0-8](?:(?<![\w\-][0-8])(?<![0-9]\.[0-8])|(?<=\\[nrt][0-8]))[0-9]{2}(?<!000)(?<!666)"
            r"-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-]|\.[0-9])"
        )
        self.pem = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
        self.authority = re.compile(r"""://([^\s/?#"'<>\\`]+)""")
        self.scheme = re.compile(
            r"\b[Bb](?:earer|EARER)[ \t]+"
            r"((?=[A-Za-z_.~+/-]{0,40}[0-9])[\w.~+/-]{8,}=*|[\w.~+/-]{24,}=*)(?![\w=])"
            r"|\b[Bb](?:asic|ASIC)[ \t]+([A-Za-z0-9+/]{8,}={0,2})"
        )
        self.command = re.compile(
            r"""(?:\s(?:-u|-U|--user|--proxy-user)[ =]?["']?[^\s:'"=/]{1,64}:"""
            r"""(?![0-9]+(?:\s|\Z)|//)([^\s'"]+)"""
            r"|\b(?:mysql|mariadb)\w{0,12}\s[^\n|;]{0,200}?(?<=\s)-p([^\s=]+)"
            r"|\b(?:sshpass\s+-p|(?:docker|podman|helm)[^\n|;]{0,200}?\slogin\s[^\n|;]{0,200}?-p"
            r"|redis-cli\s[^\n|;]{0,200}?-a|ldap\w{2,12}\s[^\n|;]{0,200}?-w)[ ]?([^\s]+)"
            r"|:thin:[^\s/@]{1,64}/([^\s@]{1,128})(?=@))"
        )
        self.insert = re.compile(
            r"\b(?:INSERT|REPLACE|insert|replace)\s+(?:INTO|into)\s[^()]{1,200}\(([^()]{1,1000})\)\s*(?:VALUES|values)\s*"
        )
        self.identified = re.compile(
            r"(?:identified\s+(?:with\s+\S{1,60}\s+)?(?:by|as)\s+(?:password\s+)?"
            r"|password\s+for\s[^=\n]{1,100}=\s*(?:password\()?)(?=[\"'])",
            re.I,
        )
        self.named_ssn = re.compile(
            r"\b(?:ssn|social security(?: (?:number|num|no\.?))?)(?:\s{1,4}(?:is|was))?[\s:#=]{0,4}"
            r"([0-9]{3}[ -]?[0-9]{2}[ -]?[0-9]{4})(?![\w-])",
            re.I,
        )
        self.header = re.compile(r"[^\r\n]*?(?=\\[rn]|[\r\n]|\Z)")
        self.brackets = re.compile(r"""\\.|["'()\[\]{}]""", re.S)
        self.marker = re.compile(r"\[REDACTED(?::[0-9a-f]{8})?\]")
        self.tuple_item = re.compile(
            r"""\s*('[^'\\]*(?:(?:\\.|'')[^'\\]*)*'|"[^"]*"|[^\s,()'"][^,()'"]*)?\s*([,()])""", re.S
        )


def _is_card(digits: str) -> bool:
    """Say whether digits are a payment card's: an issuer's range, its length, and Luhn's check.

    Visa's 13 and 19 digits are left out: nobody issues the former, which are how half of
    Europe's and Japan's article numbers look, and the latter look like any 64-bit id.
    """
    two, four, length = int(digits[:2]), int(digits[:4]), len(digits)
    issued = (
        (length == 16 and (digits[0] == "4" or 51 <= two <= 55 or 2221 <= four <= 2720))  # Visa, Mastercard
        or (length == 15 and two in (34, 37))  # American Express
        or (length == 16 and (four == 6011 or two == 65 or 644 <= int(digits[:3]) <= 649))  # Discover
        or (length == 16 and 3528 <= four <= 3589)  # JCB
        or (length == 14 and (two in (36, 38, 39) or 300 <= int(digits[:3]) <= 305))  # Diners Club
        or (16 <= length <= 19 and two == 62)  # UnionPay
    )
    if not issued:
        return False
    doubled = "0246813579"  # the digit sum of twice the digit
    total = sum(int(digit) for digit in digits[-1::-2]) + sum(
        int(doubled[int(digit)]) for digit in digits[-2::-2]
    )
    return total % 10 == 0 and len(set(digits)) > 1


def _is_basic(credentials: str) -> bool:
    """Say whether a text is what `Basic` carries: `user:password` in Base64."""
    try:
        return b":" in binascii.a2b_base64(credentials)
    except ValueError:
        return False


def _is_arn(text: str, at: int) -> bool:
    """Say whether a place is within a resource name such as `arn:aws:…:secret:prod-db`."""
    words = text[max(0, at - 200) : at].rsplit(None, 1)
    return bool(words) and "arn:" in words[-1]


def _looks_secret(value: str) -> bool:
    """Say whether a bare word after a weak name, or in prose, can't be ordinary language."""
    if any(char.isdigit() for char in value):
        return len(value) >= 4
    mixed = value != value.lower() and value[1:] != value[1:].lower() and value != value.upper()
    return (
        (mixed and len(value) >= 6) or any(char in "!@#$%^&*+=?~" for char in value[:-1]) or len(value) >= 24
    )


def _balanced_end(brackets: re.Pattern[str], text: str, start: int) -> int:
    """Find the end of the bracket that opens at `start`; an unclosed one ends with the text."""
    depth, quote = 0, ""
    for found in brackets.finditer(text, start):
        char = found[0]
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return found.end()
    return len(text)


def _lower(text: str) -> str:
    """Return `text` in small letters and of the same length: U+0130 alone would grow."""
    return text.lower() if text.isascii() else text.replace("\u0130", "i").lower()


class _Values:
    """Finds where the value that a name in a text leads to starts and ends, if it is one.

    Args:
        patterns: the compiled patterns.
    """

    def __init__(self, patterns: _Patterns) -> None:
        self._patterns = patterns

    def span(self, text: str, start: int, lead: re.Match[str], strength: int) -> tuple[int, int] | None:
        """Find the value that a name leads to, or None where this is no value of it.

        Args:
            text: the text.
            start: where the name starts.
            lead: the match of the separator pattern, from the name's last stem on.
            strength: the verdict on the name.
        """
        kind, at = lead.lastgroup or "", lead.end()
        name, before = text[start : lead.end("rest")], text[start - 1 : start]
        bare_key = name.lower() in ("key", "keys")
        if kind == "option" and not name.startswith("-"):  # `login u password x`
            if name.lower() not in _PASSWORDS:
                return None
            end = self._bare_end(text, at)
            shown = text[at:end].lower().rstrip(".,:;)")
            shaped = len(shown) >= 6 and _looks_secret(shown) and shown not in _ALGORITHMS
            return (at, end) if shaped else None
        if kind == "element":
            if before not in ("<", ":") or bare_key:
                return None
            end = text.find("<", at)
            return at, len(text) if end < 0 else end
        quote = self._patterns.quote.match(text, at)
        if kind == "pair":
            opened = text[max(0, start - 12) : start].rstrip("\\\"'bu")
            value = self.extent(text, at)
            closed = text[value[1] : value[1] + 12].lstrip("\\\"' ,")
            return value if opened[-1:] in ("(", "[") and closed[:1] in (")", "]") else None
        if kind in ("quoted", "sql", "prose"):
            # `secret "prod" not found` names it, `SECRET 'x'` in SQL is it.
            reference = kind == "quoted" and not name.isupper() and name.lower() in _REFERENCES
            if reference or (kind == "quoted" and strength < 2) or (kind == "sql" and bare_key):
                return None
            if kind == "prose" and (quote is None or strength < 2):
                end = self._bare_end(text, at)
                shown = text[at:end].rstrip(".,:;)")
                long_enough = strength == 2 or len(shown) >= 8 or name.lower() == "pin"
                return (at, end) if long_enough and _looks_secret(shown) else None
            return self.extent(text, at)
        if kind == "assign":
            if lead["assign"] == ":" and quote is None and _is_arn(text, at):
                return None
            if bare_key and quote and self._names_a_sibling(text, quote):
                return None
            bare = quote is None and text[at : at + 1] not in ("[", "{")
            if bare and name.lower().replace("_", "-") in _HEADERS:
                return self._header_span(text, at, name.lower(), before)
        return self._assigned_span(text, at, name, strength, lead[0])

    def _names_a_sibling(self, text: str, quote: re.Match[str]) -> bool:
        """Say whether the quoted value of `key` is itself a name: `key="DbPassword" value="…"`."""
        end = self.extent(text, quote.start())[1]
        rest = self._patterns.separator.match(text, end)
        return rest is not None and rest.lastgroup == "sibling"

    def _assigned_span(
        self, text: str, at: int, name: str, strength: int, lead: str
    ) -> tuple[int, int] | None:
        """Find the end of an assigned value and leave out what only looks like one."""
        value = self.extent(text, at)
        shown = text[value[0] : value[1]]
        if self._patterns.placeholder.fullmatch(shown):
            return None
        if value[0] > at or text[at : at + 1] in ("[", "{"):  # quoted, or a container
            return value
        word = re.split(r"[\[|(]", shown.rstrip(".,:;!").lower(), maxsplit=1)[0]
        if ":" in lead and word in _REMARKS:
            return None
        if lead[-1:] == " " and re.match(r"[A-Za-z_][\w.]*[(\[]", shown):  # source text, such as `= f(x)`
            return None
        if name.lower() == "key" and len(shown) < 12 and strength < 2 and "?" not in text[at - 5 : at]:
            return None
        asked = lead[-1:] not in "=" or name.lower() in ("key", "pass", "pin")
        in_query = text[max(0, at - len(name) - 2) : at][:1] in ("?", "&") and lead.endswith("=")
        if strength < 2 and asked and not in_query and not _looks_secret(shown):
            return None
        # A pass phrase has spaces: it ends with its line.
        line = (
            self._patterns.header.match(text, at) if lead[-1:] == " " and "phrase" in name.lower() else None
        )
        return at, max(value[1], line.end() if line else 0)

    def _header_span(self, text: str, at: int, name: str, before: str) -> tuple[int, int] | None:
        """Find the credentials of an `Authorization:` or `Cookie:` line, to its end or its quotes'."""
        # A look at the start decides, so that a line without credentials costs little.
        words = text[at : at + 256].split(None, 2)
        if not words or words[0].lower().rstrip(".,;:") in _REMARKS - _SCHEMES:
            return None
        if "cookie" in name:
            if "=" not in words[0] and not _looks_secret(words[0]):
                return None
        elif len(words) > 1 and words[0].lower() in _SCHEMES:
            at = text.index(words[1], at + len(words[0]))
            return at, self._bare_end(text, at)
        elif len(words) == 1 or before in ("?", "&") or self._patterns.marker.match(words[0]):
            return at, self._bare_end(text, at)
        closing = text.find(before, at) if before in ('"', "'") else -1
        end = len(text) if closing < 0 else closing
        line = self._patterns.header.match(text, at, end)
        return at, line.end() if line else end

    def _bare_end(self, text: str, at: int) -> int:
        """Find the end of an unquoted value; a marker is one, whatever brackets mean elsewhere."""
        bare = self._patterns.marker.match(text, at) or self._patterns.bare.match(text, at)
        return bare.end() if bare else at

    def extent(self, text: str, at: int) -> tuple[int, int]:
        """Find where a value starts and ends: quoted, bracketed, a YAML block, or bare."""
        patterns = self._patterns
        quote = patterns.quote.match(text, at)
        if quote is not None:
            start = quote.end()
            if quote[1]:  # within a quoted text the quotes are escaped
                end = text.find(quote[1] + quote[2], start)
                return start, len(text) if end < 0 else end
            body = patterns.quoted[quote[2]].match(text, start)
            return start, body.end() if body else len(text)
        if text[at : at + 1] in ("[", "{") and not patterns.marker.match(text, at):
            return at, _balanced_end(patterns.brackets, text, at)
        block = patterns.block.match(text, at)
        if block is not None:
            return at, block.end()
        return at, self._bare_end(text, at)


class _Texts:
    """Removes secrets from texts; half of a Redactor, which knows nothing of containers.

    Args:
        patterns: the compiled patterns.
        names: judges the names in texts.
        key: for markers by which secrets can be told apart, or None.
    """

    def __init__(self, patterns: _Patterns, names: _Names, key: bytes | None) -> None:
        self._patterns, self.names, self._key = patterns, names, key
        self._stems, self._values = names.stems, _Values(patterns)

    def clean(self, text: str, found: list[str] | None = None) -> str:
        """Return `text` without the secrets that its form or the names in it give away.

        Args:
            text: any text.
            found: receives what was removed, if given.
        """
        size = len(text)
        # The shortest secret with a name is `pwd=x`; one without has 11 characters.
        if size < 5 or (size < 11 and text.isalnum()):
            return text
        patterns = self._patterns
        low = _lower(text)
        hint = self.names.gate.search(low)
        # Whatever has a known form holds a digit or a capital; commands have a dash.
        if hint is None and low == text and " -" not in text:
            return text
        if "://" in text:
            text = self._hide_url_passwords(text, found)
        if "-----BEGIN" in text:
            text = self._hide_private_keys(text, found)
        low = _lower(text)
        text = self._hide_special(text, low, found)
        low = _lower(text)
        if hint is not None and self._stems.search(low):
            text = self._hide_named(text, low, found)
        if size >= 11:
            if patterns.run.search(text):
                text = self._hide_tokens(text, found)
            if patterns.card.search(text):
                text = patterns.card.sub(lambda card: self._hide_card(card, found), text)
            if "-" in text:
                text = patterns.ssn.sub(lambda number: self._hide(number[0], found), text)
        return text

    def mark(self, secret: str) -> str:
        """Return what stands in the place of a secret."""
        if self._key is None:
            return REDACTED
        import hmac  # takes 7 ms, which only this mode should cost

        digest = hmac.new(self._key, secret.encode("utf-8", "surrogatepass"), "sha256").hexdigest()
        return f"[REDACTED:{digest[:8]}]"

    def is_marker(self, text: str) -> bool:
        """Say whether a text is what stands in the place of a secret."""
        return self._patterns.marker.fullmatch(text) is not None

    def _hide(self, secret: str, found: list[str] | None) -> str:
        """Return the marker for a secret; what is a marker stays, so that a second pass changes nothing."""
        if self._patterns.marker.fullmatch(secret):
            return secret
        if found is not None and len(found) < _MAX_ECHOES and len(secret) <= _MAX_ECHO_CHARS:
            found.append(secret)
            if secret[:1] in ("[", "{"):  # what may be echoed is within
                found += re.findall(r"""["']([^"'\\]{4,})\\{0,8}["']""", secret)[: _MAX_ECHOES - len(found)]
        return self.mark(secret)

    def _hide_group(self, match: re.Match[str], found: list[str] | None) -> str:
        """Replace the group that took part in a match; the rest of the match stays."""
        group = match.lastindex or 0
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        return f"{match[0][:start]}{self._hide(match[group], found)}{match[0][end:]}"

    def _hide_card(self, card: re.Match[str], found: list[str] | None) -> str:
        digits = card[0].replace(" ", "").replace("-", "")
        return self._hide(card[0], found) if _is_card(digits) else card[0]

    def _hide_private_keys(self, text: str, found: list[str] | None) -> str:
        """Hide private key blocks, whole."""
        out, done = [], 0
        for begin in self._patterns.pem.finditer(text):
            if begin.start() < done:
                continue
            end = text.find("-----END", begin.end())
            end = end if end < 0 else text.find("-----", end + 8)
            # A block that was cut off ends with the text: nobody can say where else.
            stop = len(text) if end < 0 else end + 5
            out += [text[done : begin.start()], self._hide(text[begin.start() : stop], found)]
            done = stop
        return "".join([*out, text[done:]])

    def _hide_url_passwords(self, text: str, found: list[str] | None) -> str:
        """Hide the password in a URL, up to the last `@` of its authority."""
        out, done = [], 0
        for authority in self._patterns.authority.finditer(text):
            start, userinfo = authority.start(1), authority[1]
            if start < done:
                continue
            if "@" not in userinfo and ":" in userinfo and not _is_port(userinfo):
                # `user:p#ss@host`: no URL, but what people write. The limit is arbitrary.
                userinfo = re.split(r"[\s\"'<>\\`]", text[start : start + 300], maxsplit=1)[0]
            userinfo = userinfo[: max(userinfo.rfind("@"), 0)]
            user, colon, password = userinfo.partition(":")
            if not colon and len(user) >= 20:  # a token in the place of the user
                user, password = "", user
            if password:
                out += [text[done:start], user, colon, self._hide(password, found)]
                done = start + len(userinfo)
        return "".join([*out, text[done:]])

    def _hide_tokens(self, text: str, found: list[str] | None) -> str:
        """Hide what the issuers' prefixes and formats give away."""
        patterns = self._patterns
        for gate, pattern in patterns.dotted:
            if gate in text:
                text = pattern.sub(lambda token: self._hide(token[0], found), text)
        out, done = [], 0
        for run in patterns.run.finditer(text):
            start = run.start()
            before = text[start - 1] if start else ""
            # In `\nghp_…` and `%3Dghp_…` the run starts with the end of an escape.
            skip = 1 if before == "\\" and text[start] in "nrtfb" else 2 if before == "%" else 0
            token = patterns.token.match(text, start + skip)
            if token:
                out += [text[done : start + skip], self._hide(token[0], found)]
                done = token.end()
        return "".join([*out, text[done:]])

    def _hide_special(self, text: str, low: str, found: list[str] | None) -> str:
        """Hide what has a place instead of a name: in schemes, commands and SQL."""
        patterns = self._patterns
        if "earer" in low or "asic" in low:
            text = patterns.scheme.sub(
                lambda scheme: (
                    scheme[0] if scheme[2] and not _is_basic(scheme[2]) else self._hide_group(scheme, found)
                ),
                text,
            )
        if " -" in text or ":thin:" in text:
            text = patterns.command.sub(lambda command: self._hide_group(command, found), text)
        if "identified" in low or "password for" in low:
            out, done = [], 0
            for place in patterns.identified.finditer(text):
                if place.end() > done:
                    start, end = self._values.extent(text, place.end())
                    out += [text[done:start], self._hide(text[start:end], found)]
                    done = end
            text = "".join([*out, text[done:]])
        if "ssn" in low or "social sec" in low:
            text = patterns.named_ssn.sub(lambda number: self._hide_group(number, found), text)
        if "insert" in low or "replace" in low:
            text = self._hide_inserted(text, found)
        return text

    def _hide_inserted(self, text: str, found: list[str] | None) -> str:
        """Hide the values of sensitive columns in `INSERT INTO t (columns) VALUES (…), (…)`."""
        out, done, read = [], 0, 0
        for insert in self._patterns.insert.finditer(text):
            columns = [self.names.strength(column.strip("\"'`[] \t\r\n")) for column in insert[1].split(",")]
            if not any(columns) or insert.start() < read:
                continue
            read, depth, column = insert.end(), 0, 0
            while item := self._patterns.tuple_item.match(text, read):
                value, stop = item[1] or "", item[2]
                if depth == 0 and (value or (stop == ")" or (stop == "," and column == 0))):
                    break  # behind the last tuple
                quote = value[:1] if value[:1] in ("'", '"') else ""
                given = value.strip() and stop != "(" and (quote or depth == 1)
                if given and depth and column < len(columns) and columns[column]:
                    secret = value.strip(quote or None)
                    out += [text[done : item.start(1)], quote, self._hide(secret, found), quote]
                    done = item.end(1)
                read = item.end()
                depth += {"(": 1, ")": -1}.get(stop, 0)
                column = (
                    0 if depth == 0 or (depth == 1 and stop == "(") else column + (stop == "," and depth == 1)
                )
                if depth == 0:
                    comma = re.compile(r"\s*,").match(text, read)
                    if comma is None:
                        break
                    read = comma.end()
        return "".join([*out, text[done:]])

    def _hide_named(self, text: str, low: str, found: list[str] | None) -> str:
        """Hide values that follow a sensitive name: `name=value`, `"name": "value"` and their kin.

        1. find a stem; 2. widen it to a name that a separator follows; 3. judge the name;
        4. find the value's end; 5. go on behind it, so that nothing is looked at twice.
        """
        patterns = self._patterns
        out, done, at = [], 0, 0
        while stem := self._stems.search(low, at):
            at = stem.end()
            lead = patterns.separator.match(text, at)
            if lead is None:
                continue
            at = lead.end("rest")
            start = max(done, stem.start() - 64)
            left = text[start : stem.start()]
            left = left[len(left.rstrip(_NAME_CHARS)) :]
            start = stem.start() - len(left)
            if left[:1] in ("n", "r", "t") and start and text[start - 1] == "\\":
                start += 1  # the end of an escaped line break is no part of the name
            strength = self._text_strength(text, start, text[start:at])
            if not strength:
                continue
            span = self._values.span(text, start, lead, strength)
            if span is not None and span[0] < span[1]:
                out += [text[done : span[0]], self._hide(text[span[0] : span[1]], found)]
                done = at = span[1]
        return "".join([*out, text[done:]])

    def _text_strength(self, text: str, start: int, name: str) -> int:
        """Judge a name in a text, where the word before it may belong to it (`API key: …`)."""
        if name == "sig" and text[start - 1 : start] in ("?", "&", ";"):
            return 2  # of a pre-signed URL; elsewhere it may be anything
        strength = self.names.strength(name.strip("-."))
        if strength < 2 and start and text[start - 1] in " _":
            words = text[max(0, start - 20) : start - 1].rsplit(None, 1)
            if words and words[-1].lower() in _OPENERS:
                return max(strength, self.names.strength(f"{words[-1]} {name}"))
        return strength


@dataclasses.dataclass(frozen=True)
class _Declared:
    """What an endpoint's definition says of one parameter and of its parts.

    Args:
        sensitive: the whole of it is declared sensitive.
        fields: its parts, by `_normal` name.
        items: its elements.
        hides: it or something below it is sensitive.
    """

    sensitive: bool
    fields: dict[str, _Declared]
    items: _Declared | None
    hides: bool

    def of(self, name: str) -> _Declared | None:
        """Return what is declared of a field, in any spelling."""
        return self.fields.get(_normal(name))


def _normal(name: str) -> str:
    """Return a name without case and separators: `X-API-Key` and `xApiKey` are one."""
    return re.sub(r"[\s_.\-]+", "", name).casefold()


def _read_names(entries: Iterable[str]) -> frozenset[tuple[str, str]]:
    """Read `redact:` and `keep:` entries into (tool or "", name); `a.b` is both a name and one tool's."""
    pairs = {("", _normal(entry)) for entry in entries}
    for entry in entries:
        tool, dot, name = entry.rpartition(".")
        if dot and _normal(tool) and _normal(name):
            pairs.add((_normal(tool), _normal(name)))
    return frozenset(pairs)


def _declare(definition: object) -> _Declared | None:
    """Read an endpoint's definition; one that can't even be read makes everything sensitive."""
    try:
        return _read_declared(definition, 0, [10_000])
    except Exception:
        return _Declared(True, {}, None, True)


def _read_declared(definition: object, depth: int, budget: list[int]) -> _Declared | None:
    """Read what MXCP's parameter definitions declare; anything else declares nothing.

    Both of MXCP's forms are understood: a list of parameters with names, and JSON Schema's
    `properties`. A `sensitive` that is neither a boolean nor a clear "no" counts as yes, and
    so does what lies beyond the limits.

    Args:
        definition: a definition, or a part of one.
        depth: how deep it lies.
        budget: how many parts may still be read.
    """
    budget[0] -= 1
    if budget[0] < 0 or depth > _MAX_DEPTH:
        return _Declared(True, {}, None, True)
    parts = definition if issubclass(type(definition), dict) else _members(definition)
    if not isinstance(parts, dict):
        return None
    for wrapper in ("tool", "resource", "prompt") if depth == 0 else ():
        inner = parts.get(wrapper)
        if inner is not None and not isinstance(inner, str):
            return _read_declared(inner, depth + 1, budget)
    fields: dict[str, _Declared] = {}
    for group in (parts.get("parameters"), parts.get("properties")):
        for name, part in _named_parts(group):
            declared = _read_declared(part, depth + 1, budget)
            if declared is not None and declared.hides:
                fields[_normal(name)] = declared
    element = parts.get("items") or parts.get("additionalProperties")
    items = _read_declared(element, depth + 1, budget) if element is not None else None
    says = parts.get("sensitive", False)
    sensitive = (
        says.strip().lower() not in ("", "false", "no", "off", "0") if isinstance(says, str) else bool(says)
    )
    return _Declared(
        sensitive, fields, items, sensitive or bool(fields) or (items is not None and items.hides)
    )


def _named_parts(group: object) -> Iterable[tuple[str, object]]:
    """Yield the named parts of a `parameters` list or a `properties` mapping."""
    if isinstance(group, dict):
        yield from ((name, part) for name, part in group.items() if isinstance(name, str))
    for part in group if isinstance(group, (list, tuple)) else ():
        members = part if isinstance(part, dict) else _members(part)
        if members is not None and isinstance(members.get("name"), str):
            yield members["name"], part


def _label(value: object) -> str:
    """Return a text or bytes as text; anything else labels nothing."""
    if type(value) is bytes:
        return value[: 2 * _MAX_NAME_CHARS].decode("utf-8", "replace")
    return value if type(value) is str else ""


class _Verdicts(dict[str, int]):
    """The verdicts on names seen before, for all tools or for one; bounded.

    A verdict is 0 or flags; what holds a secret itself is not kept. The walk asks with
    `verdicts[name]`, the fastest question that Python knows.
    """

    __slots__ = ("judge", "keep")

    def __init__(self, judge: Callable[[str], int], keep: bool = True) -> None:
        super().__init__()
        self.judge, self.keep = judge, keep

    def __missing__(self, name: str) -> int:
        verdict = self.judge(name)
        if self.keep and not verdict & _ODD and len(name) <= _MAX_NAME_CHARS:
            if len(self) >= _MAX_VERDICTS:
                self.clear()
            self[name] = verdict
        return verdict


# Finds every key harmless: a blind walk converts and redacts nothing.
_BLIND = _Verdicts(lambda name: 0, keep=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a JSON object that names a field twice: one of the two would escape the walk."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a field occurs twice")
    return made


class _Pairs(list[tuple[Any, Any]]):
    """The items of a mapping that may hold a key twice, such as HTTP headers."""


def _order(item: object) -> tuple[str, str]:
    """Give the elements of a set an order that is the same in every process."""
    return type(item).__name__, json.dumps(item)


def _float_text(value: float) -> str:
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _collect_echoes(plain: object, echoes: list[str]) -> None:
    """Collect the texts and numbers of a redacted value, as frameworks may repeat them; bounded."""
    waiting = [plain]
    while waiting and len(echoes) < _MAX_ECHOES:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += list(item.values())[:_MAX_ECHOES]
        elif isinstance(item, list):
            waiting += item[:_MAX_ECHOES]
        elif isinstance(item, bool) or item is None:
            continue
        elif 4 <= len(shown := str(item)) <= _MAX_ECHO_CHARS:
            echoes.append(shown)
            scheme, space, credentials = shown.partition(" ")
            if space and scheme.lower() in _SCHEMES:
                echoes.append(credentials)


def _is_port(authority: str) -> bool:
    """Say whether what follows the colon is a port, so that `host:8080` holds no password."""
    port = authority.rpartition(":")[2]
    return authority.startswith("[") or not port.strip("0123456789")


def _percent(text: str) -> str:
    """Return a text as it stands in a URL."""
    safe = _NAME_CHARS + "~"
    return "".join(
        char if char in safe else "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
        for char in text
    )


def _type_name(value: object) -> str:
    """Name an object's type, whatever its metaclass does."""
    try:
        return str(type.__getattribute__(type(value), "__name__"))
    except Exception:
        return "object"


def _repr(value: object) -> str:
    """Show any object: its own text without memory addresses, or a placeholder that names its type."""
    try:
        # `str.__str__` makes a plain str of a subclass's without running its methods.
        shown = str.__str__(repr(value))
    except Exception:
        return f"<unprintable {_type_name(value)}>"
    return re.sub(r" at 0x[0-9a-fA-F]{1,16}\b", "", shown) if " at 0x" in shown else shown


def _says_itself(kind: type) -> bool:
    """Say whether `str` of this type's values is their documented, stable text."""
    return any(
        base.__name__ in _TEXT_TYPES and base.__module__.startswith(_TEXT_MODULES) for base in kind.__mro__
    )


def _numpy(value: Any, kind: type) -> object:
    """Return numpy's scalars and small arrays as Python's own; large arrays show themselves."""
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(kind, "tolist") and value.size <= 10_000:
        return value.tolist()
    return _repr(value)


def _members(value: object) -> dict[str, Any] | None:
    """Return the fields of an object that keeps its data under names, or None.

    Known are named tuples, dataclasses, pydantic, attrs, msgspec and namespaces. Only the
    type is asked what it is, so that an object that answers to any name can't lie; no
    serializer, property or `__dict__` of unknown types is run.
    """
    kind = type(value)
    names: Iterable[str] | None = None
    if issubclass(kind, tuple):
        names = getattr(kind, "_fields", None)
    elif isinstance(fields := getattr(kind, "__dataclass_fields__", None), dict):
        names = list(fields)
    elif isinstance(getattr(kind, "__pydantic_fields__", None) or getattr(kind, "__fields__", None), dict):
        data = dict(object.__getattribute__(value, "__dict__"))
        extra = getattr(value, "__pydantic_extra__", None)
        return {**data, **extra} if isinstance(extra, dict) else data
    elif isinstance(attributes := getattr(kind, "__attrs_attrs__", None), tuple):
        names = [field.name for field in attributes]
    elif isinstance(fields := getattr(kind, "__struct_fields__", None), tuple):
        names = fields
    elif issubclass(kind, types.SimpleNamespace) or (kind.__module__, kind.__name__) == (
        "argparse",
        "Namespace",
    ):
        return dict(object.__getattribute__(value, "__dict__"))
    if names is None:
        return None
    members = {}
    for name in names:
        try:
            members[name] = getattr(value, name)
        except Exception as error:
            members[name] = f"<unreadable: {type(error).__name__}>"
    return members


class _Names:
    """The verdicts on names under one Redactor's settings.

    Args:
        redact: entries of the setting of that name.
        keep: likewise.
    """

    def __init__(self, redact: Iterable[str], keep: Iterable[str]) -> None:
        self.redact, self.keep = _read_names(redact), _read_names(keep)
        self.tools = {tool for tool, _ in self.redact | self.keep if tool}
        # The stem of an own name is the start of its longest word, which is in every spelling.
        words = [max(re.findall(_CAMEL, name) or [name], key=len) for _, name in self.redact]
        own = sorted({re.escape(word[:4].lower()) for word in words})
        self.stems = _any_of(STEMS, own)
        # What the first look at a text asks for: a stem, a special word or a digit.
        self.gate = _any_of((*STEMS, *SPECIAL_STEMS), [*own, *"0123456789"])
        self._strengths: dict[str, int] = {}

    def judge(self, name: str, tool: str = "") -> tuple[int, str]:
        """Return strength and reason as `_judge_name` does, after the settings for a (normal) tool or all."""
        normal = _normal(name)
        for entry in ((tool, normal), ("", normal)) if self.redact or self.keep else ():
            if entry in self.redact:
                return 2, "listed under `redact`"
            if entry in self.keep:
                return 0, ""
        # A name without a stem of a secret word needs no splitting into words.
        return (0, "") if name.isascii() and not self.stems.search(name.lower()) else _judge_name(name)

    def strength(self, name: str) -> int:
        """Judge a name found in a text; remembered, like the names of fields."""
        strength = self._strengths.get(name)
        if strength is None:
            strength = self.judge(name)[0]
            if len(self._strengths) >= _MAX_VERDICTS:
                self._strengths.clear()
            self._strengths[name] = strength
        return strength

    def may_name(self, text: str) -> bool:
        """Say whether a text is worth judging as a name."""
        return len(text) <= _MAX_NAME_CHARS and self.stems.search(_lower(text)) is not None

    def verdicts(self, texts: _Texts, tool: str = "") -> _Verdicts:
        """Make the judge of a walk's keys, for one tool or for all."""

        def judge(name: str) -> int:
            verdict = _SENSITIVE if self.judge(name, tool)[0] else 0
            if name.lower() in _VALUES:
                verdict |= _LABELLED
            return verdict | _ODD if texts.clean(name) != name else verdict

        return _Verdicts(judge)


class _Walk:
    """One walk through one value: converts it, and redacts it unless it is blind.

    Args:
        texts: cleans texts.
        verdicts: judges keys.
        echoes: receives redacted values as texts, or None.
        quiet: the marker says nothing about the secret and nobody asks for echoes, so that a
            secret needs no look at it.
        blind: convert only.
    """

    __slots__ = ("blind", "echoes", "nodes", "open", "quiet", "texts", "verdicts")

    def __init__(
        self, texts: _Texts, verdicts: _Verdicts, echoes: list[str] | None, quiet: bool, blind: bool = False
    ) -> None:
        self.texts, self.verdicts, self.echoes, self.quiet, self.blind = texts, verdicts, echoes, quiet, blind
        self.open: list[int] = []  # ids of the containers around the present value
        self.nodes = 0

    def plain(self, value: object) -> Any:
        """Convert a value without redacting it; what comes of it is compared or hashed, never recorded."""
        return _Walk(self.texts, _BLIND, None, True, blind=True).value(value, None)

    def hide(self, value: object) -> str:
        """Return the marker for a whole value, whatever it is, and collect what it may echo as."""
        if self.quiet:
            return REDACTED
        plain = self.plain(value)
        if isinstance(plain, str) and self.texts.is_marker(plain):
            return plain
        if self.echoes is not None:
            _collect_echoes(plain, self.echoes)
        return self.texts.mark(plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True))

    def value(self, value: Any, declared: _Declared | None) -> Any:
        """Convert and redact one value by its exact type; unusual types take the slow way."""
        kind = type(value)
        # A number in the place of an object with a secret part: nobody knows what it means.
        if declared is not None and (declared.sensitive or (declared.hides and kind in (int, float))):
            return self.hide(value)
        if kind is str:
            return self.text(value, declared)
        if kind is dict:
            return self.mapping(value, declared)
        if kind is list or kind is tuple:
            return self.sequence(value, declared)
        if value is None or kind is bool:
            return value
        if kind is int:
            return self.integer(value)
        if kind is float:
            # NaN and the infinities are no JSON; as texts they differ from null and from 0.
            return value if value - value == 0.0 else _float_text(value)
        try:
            return self.other(value, kind, declared)
        except RecursionError:
            raise
        except Exception:
            return f"<unprintable {_type_name(value)}>"

    def integer(self, value: int) -> Any:
        if not -_WIDE_INT < value < _WIDE_INT:
            try:
                str(value)
            except ValueError:
                return hex(value)  # all digits, in the only base without a limit
            return value
        if value >= 1_000_000_000_000:  # a card number, perhaps
            text = str(value)
            shown = self.text(text, None)
            return value if shown == text else shown
        return value

    def mapping(
        self,
        value: dict[Any, Any],
        declared: _Declared | None,
        pairs: list[tuple[Any, Any]] | None = None,
    ) -> Any:
        """Convert a mapping: 1. guard, 2. judge labels, 3. go through the fields, 4. again on a copy.

        Args:
            value: the mapping.
            declared: what is declared of its fields.
            pairs: its items, where it may hold a key twice.
        """
        opened = self.open
        depth = len(opened)
        if depth >= _MAX_DEPTH:
            return "[DEPTH]"
        ident = id(value)
        if ident in opened:
            return "[CYCLE]"
        self.nodes = nodes = self.nodes + len(value)
        if nodes > _MAX_NODES:
            return f"[CUT: {len(value)} items]"
        opened.append(ident)
        out: dict[str, Any] = {}
        verdicts, text, odd = self.verdicts, self.text, pairs is not None
        slow = odd or declared is not None
        try:
            for name, item in pairs or value.items():
                kind = type(item)
                verdict = verdicts[name] if type(name) is str else _ODD
                if verdict or slow:
                    if odd or verdict > _SENSITIVE:
                        odd = odd or verdict & _ODD > 0  # from here on a key may be there already
                        slow = slow or odd
                        name, verdict = self.field(name, value, out if odd else None)
                    if verdict:
                        out[name] = self.hide(item)
                    else:
                        out[name] = self.value(item, declared.of(name) if declared else None)
                elif kind is str:
                    out[name] = text(item, None) if len(item) > 4 else item
                elif kind is int and -1_000_000_000_000 < item < 1_000_000_000_000:
                    out[name] = item
                elif kind is dict:
                    out[name] = self.mapping(item, None)
                elif kind is list:
                    out[name] = self.sequence(item, None)
                elif kind is bool or item is None:
                    out[name] = item
                else:
                    out[name] = self.value(item, None)
        except RuntimeError as error:
            if isinstance(error, RecursionError):
                raise
            # Another thread changed the mapping; a copy is made in one step.
            del opened[depth:]
            return self.mapping(value.copy(), declared, pairs)
        opened.pop()
        return out

    def field(self, name: object, value: dict[Any, Any], out: dict[str, Any] | None) -> tuple[str, int]:
        """Return an unusual field's name as text and whether it is sensitive.

        A key that JSON knows is written as JSON does (`null`, `1`); a second one of the same
        text gets a number, so that no value is lost.

        Args:
            name: a key that is no text, that holds a secret, or that a sibling may name.
            value: the mapping that it is a key of.
            out: what is written so far, or None where the key stays as it is.
        """
        plain = name if type(name) is str else self.plain(name)
        shown = plain if isinstance(plain, str) else json.dumps(plain)
        verdict = self.verdicts[shown]
        if verdict & _LABELLED:
            verdict |= self.sibling_verdict(value)
        if out is None:
            return shown, verdict & _SENSITIVE
        shown = self.text(shown, None)
        free, number = shown, 1
        while free in out:
            number += 1
            free = f"{shown}#{number}"
        return free, verdict & _SENSITIVE

    def sibling_verdict(self, value: dict[Any, Any]) -> int:
        """Judge `{"name": "API_KEY", "value": …}`: the verdict on the label is that on the value."""
        siblings = [(_label(key).lower(), _label(said)) for key, said in value.items()]
        for key, said in siblings:
            if (
                key in _LABELS
                and said
                and self.texts.names.may_name(said)
                and self.verdicts[said] & _SENSITIVE
            ):
                return _SENSITIVE
        return 0

    def sequence(self, value: Any, declared: _Declared | None) -> Any:
        """Convert a sequence; `["Authorization", …]` and `["--password", …]` are judged by the sibling."""
        opened = self.open
        depth = len(opened)
        if depth >= _MAX_DEPTH:
            return "[DEPTH]"
        ident = id(value)
        if ident in opened:
            return "[CYCLE]"
        self.nodes = nodes = self.nodes + len(value)
        if nodes > _MAX_NODES:
            return f"[CUT: {len(value)} items]"
        opened.append(ident)
        items = None if declared is None else declared.items or declared
        out: list[Any] = []
        text = self.text
        hide_next = len(value) == 2 and self.is_label(value[0])
        for item in value[:]:  # another thread may append
            kind = type(item)
            if hide_next and out:
                out.append(self.hide(item))
                hide_next = False
            elif kind is str and items is None:
                if len(item) < 4:
                    out.append(item)
                    continue
                out.append(text(item, None))
                if item[0] == "-" and "=" not in item:
                    hide_next = self.is_label(item)
            else:
                out.append(self.value(item, items))
        opened.pop()
        return out

    def is_label(self, item: object) -> bool:
        """Say whether an element of a list is a sensitive name, so that the next is its value."""
        if type(item) is bytes:
            item = _label(item)
        return (
            type(item) is str
            and len(item) > 2
            and self.texts.names.may_name(item)
            and self.verdicts[item.strip("-")] & _SENSITIVE > 0
        )

    def other(self, value: Any, kind: type, declared: _Declared | None) -> Any:
        """Convert what is not of JSON's own types, subclasses of those included."""
        if issubclass(kind, str):
            return self.text(str.__str__(value), declared)
        if issubclass(kind, int):
            return self.integer(int.__int__(value))
        if issubclass(kind, float):
            return self.value(float.__float__(value), declared)
        if issubclass(kind, (bytes, bytearray, memoryview)):
            return self.text(bytes(value).decode("utf-8", "backslashreplace"), declared)
        if issubclass(kind, enum.Enum):
            return self.value(value.value, declared)
        if kind is _Pairs:
            return self.mapping(dict(value), declared, value)
        if issubclass(kind, dict):
            return self.nested(value, dict(dict.items(value)), declared)
        if issubclass(kind, BaseException):
            return self.text(self.exception_text(value), declared)
        members = _members(value)
        if members is not None:
            return self.nested(value, members, declared)
        if issubclass(kind, (set, frozenset)):
            listed = self.nested(value, list(value), declared)
            return sorted(listed, key=_order) if isinstance(listed, list) else listed
        if issubclass(kind, (list, tuple, collections.deque, *_VIEWS)):
            return self.nested(value, list(value), declared)
        if issubclass(kind, Mapping):
            return self.nested(value, _Pairs(value.items()), declared)
        if _says_itself(kind):
            return self.text(str.__str__(str(value)), declared)
        if any(base.__module__.partition(".")[0] == "numpy" for base in kind.__mro__):
            return self.value(_numpy(value, kind), declared)
        return self.text(_repr(value), declared)

    def nested(self, value: object, content: Any, declared: _Declared | None) -> Any:
        """Walk what an object holds, with the object itself guarded against cycles."""
        if id(value) in self.open:
            return "[CYCLE]"
        if len(self.open) >= _MAX_DEPTH:
            return "[DEPTH]"
        self.open.append(id(value))
        out = self.value(content, declared)
        self.open.pop()
        return out

    def exception_text(self, error: BaseException) -> str:
        try:
            said = str.__str__(str(error))
        except Exception:
            said = "<unprintable>"
        return f"{_type_name(error)}: {said}" if said else _type_name(error)

    def text(self, text: str, declared: _Declared | None) -> str:
        """Clean a text; one that holds JSON is walked like the value that it holds."""
        if self.blind:
            return text
        if text[:1] in _JSON_STARTS and text.lstrip()[:1] in ("{", "[", '"'):
            try:
                tree = json.loads(text, object_pairs_hook=_unique)
            except (ValueError, RecursionError):
                pass  # no JSON after all
            else:
                walked = self.value(tree, declared)
                return text if walked == tree else json.dumps(walked, ensure_ascii=False)
        if declared is not None and declared.hides:
            return self.hide(text)  # the part that is secret can't be found: all of it
        return self.texts.clean(text, self.echoes)


class Redactor:
    """Returns plain copies of values and texts in which no secret is left, and never raises.

    One Redactor serves any number of threads: it keeps nothing but its settings and bounded
    caches of verdicts on names.

    Args:
        redact: more sensitive names, in any spelling; `tool_name.param` for one tool.
        keep: names that are not sensitive here, in the same forms. `redact` wins over `keep`,
            the entry for one tool over that for all, a declaration and a secret's own form
            over both.
        mode: "constant" writes `[REDACTED]`, "hmac" `[REDACTED:<8 hex>]`, by which an auditor
            sees that two calls used the same secret without learning it.
        key: the key for "hmac".

    Raises:
        ConfigError: an entry is no text, the mode is unknown, or "hmac" has no key.

    Source of the rules: `spec.md`, "Sensitive Data Redaction", and the comment atop this room.
    """

    def __init__(
        self,
        redact: Sequence[str] = (),
        keep: Sequence[str] = (),
        *,
        mode: str = "constant",
        key: bytes | None = None,
    ) -> None:
        for setting, entries in (("redact", redact), ("keep", keep)):
            if isinstance(entries, str) or any(
                not isinstance(name, str) or not _normal(name) for name in entries
            ):
                raise ConfigError(
                    "must be a list of names; quote those that YAML reads otherwise", trail=(setting,)
                )
        if mode not in ("constant", "hmac"):
            raise ConfigError(f"{mode!r} is neither 'constant' nor 'hmac'", trail=("redact_mode",))
        if mode == "hmac" and not key:
            raise ConfigError("'hmac' needs a key: set MXCP_AUDIT_KEY", trail=("redact_mode",))
        self._names = _Names(redact, keep)
        self._texts = _Texts(_Patterns(), self._names, key if mode == "hmac" else None)
        self._constant = mode == "constant"
        self._verdicts = self._names.verdicts(self._texts)
        self._verdicts_by_tool = {tool: self._names.verdicts(self._texts, tool) for tool in self._names.tools}

    def is_sensitive(self, name: str, tool: str | None = None) -> bool:
        """Say whether what stands under a name is redacted.

        Args:
            name: the name of a field, parameter, column or header.
            tool: the tool whose input it is, for settings that concern one tool.
        """
        return self._names.judge(name, _normal(tool or ""))[0] > 0

    def redact(
        self,
        value: object,
        *,
        tool: str | None = None,
        endpoint_def: object = None,
        echoes: list[str] | None = None,
    ) -> Any:
        """Return a plain copy of any value in which nothing sensitive is left.

        The copy consists of dict (text keys), list, str, int, finite float, bool and None.
        Cycles become `[CYCLE]`, what lies too deep `[DEPTH]`, what can't be shown
        `<unprintable Type>`; generators and files are shown, not read. The value is not changed.

        Args:
            value: any Python value.
            tool: the tool whose input it is.
            endpoint_def: MXCP's definition of the endpoint, with `sensitive: true` in it.
            echoes: receives redacted values as texts, for `scrub`; pass it only where there is
                a text to scrub, for collecting takes time.
        """
        verdicts = self._verdicts
        if tool is not None and self._verdicts_by_tool:
            verdicts = self._verdicts_by_tool.get(_normal(tool), verdicts)
        try:
            declared = None if endpoint_def is None else _declare(endpoint_def)
            walk = _Walk(self._texts, verdicts, echoes, self._constant and echoes is None)
            if type(value) is dict and declared is None:  # nearly always
                return walk.mapping(value, None)
            return walk.value(value, declared)
        except RecursionError:
            return "[DEPTH]"
        except Exception as error:
            # Nothing is known to come here. Rather lose an input than show half of it.
            return f"<unreadable {_type_name(value)}: {_type_name(error)}>"

    def scrub(self, text: str, echoes: Sequence[str] = ()) -> str:
        """Return a text without secrets, and without this event's own redacted values.

        Args:
            text: any text; another object's text form is taken.
            echoes: what `redact` collected. Values under 4 characters stay: removing them would
                leave nothing readable and hide nothing.
        """
        try:
            walk = _Walk(self._texts, self._verdicts, None, self._constant)
            shown = text if type(text) is str else walk.plain(text)
            shown = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
            for echo in sorted({echo for echo in echoes if len(echo) >= 4}, key=len, reverse=True):
                for form in (echo, repr(echo)[1:-1], json.dumps(echo)[1:-1], _percent(echo)):
                    if form in shown and form not in REDACTED:
                        shown = shown.replace(form, self._texts.mark(echo))
            return walk.text(shown, None)
        except Exception as error:
            return f"<unreadable text: {_type_name(error)}>"

    def explain(
        self, value: object, *, tool: str | None = None, endpoint_def: object = None
    ) -> list[tuple[str, str]]:
        """Say what `redact` takes out of a value and why, as (path, reason), in the value's order.

        Args:
            value, tool, endpoint_def: as for `redact`.
        """
        declared = None if endpoint_def is None else _declare(endpoint_def)
        found: list[tuple[str, str]] = []

        def compare(before: object, after: object, path: str, name: str, declared: _Declared | None) -> None:
            if isinstance(before, dict) and isinstance(after, dict):
                for (key, old), (_, new) in zip(before.items(), after.items(), strict=False):
                    compare(old, new, f"{path}.{key}", key, declared.of(key) if declared else None)
            elif isinstance(before, list) and isinstance(after, list):
                for index, (old, new) in enumerate(zip(before, after, strict=False)):
                    compare(old, new, f"{path}[{index}]", "", declared and (declared.items or declared))
            elif before != after:
                found.append((path, self._reason(name, after, tool, declared)))

        plain = _Walk(self._texts, self._verdicts, None, True).plain(value)
        compare(plain, self.redact(value, tool=tool, endpoint_def=endpoint_def), "$", "", declared)
        return found

    def _reason(self, name: str, after: object, tool: str | None, declared: _Declared | None) -> str:
        if declared is not None and declared.hides:
            return "declared sensitive"
        strength, reason = self._names.judge(name, _normal(tool or ""))
        if strength:
            return reason
        if isinstance(after, str) and self._texts.is_marker(after):
            return "a sibling names it, or its form gives it away"
        return "the text holds a name with its value, or a known form of secret"


def clip_plain(plain: Any, max_bytes: int) -> Any:
    """Return a plain value cut so that its JSON takes at most `max_bytes`, in any writer's style.

    What fits stays whole: the room is shared out from the smallest part to the largest, and a
    part that is too large for its share is cut in turn. A cut text ends in
    `…[CUT: 5242880 bytes]` with its whole size, a dropped subtree leaves such a text behind.
    Sizes are those of ASCII JSON with spaces, the longest that a writer makes, so that the
    result may be smaller than asked. Call it only with what `Redactor.redact` returned: a
    secret cut in half would be known no more.

    Args:
        plain: dict (text keys), list, str, int, float, bool or None.
        max_bytes: the limit; at least 64.
    """
    size = len(json.dumps(plain))
    if size <= max_bytes:
        return plain
    if isinstance(plain, str):
        return _clip_text(plain, max_bytes)
    if not isinstance(plain, (dict, list)):
        return _clip_text(str(plain), max_bytes)
    entries = list(plain.items()) if isinstance(plain, dict) else [("", item) for item in plain]
    note = f"…[CUT: {size} bytes, {len(entries)} items]"
    # 1. What each entry costs, its key and commas included.
    keys = [_clip_text(key, 256) if len(key) > 40 else key for key, _ in entries]
    overheads = [len(json.dumps(key)) + 4 if isinstance(plain, dict) else 2 for key in keys]
    sizes = [len(json.dumps(item)) for _, item in entries]
    room = max_bytes - 2 - len(json.dumps(note)) - 12
    if room < 64:
        return _clip_text(note, max_bytes)
    # 2. Entries go from the last on until each of the rest can have a marker at least.
    smallest = [overhead + min(size, 64) for overhead, size in zip(overheads, sizes, strict=True)]
    count, needed = 0, 0
    while count < len(entries) and needed + smallest[count] <= room:
        needed += smallest[count]
        count += 1
    # 3. The small ones take what they need, the large ones share the rest.
    left = room - sum(overheads[:count])
    shares = [0] * count
    for rank, index in enumerate(sorted(range(count), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], left // (count - rank))
        left -= shares[index]
    kept = [clip_plain(entries[index][1], shares[index]) for index in range(count)]
    if isinstance(plain, list):
        return kept + ([note] if count < len(entries) else [])
    out: dict[str, Any] = {}
    for key, item in zip(keys, kept, strict=False):
        out[key if key not in out else f"{key}#{len(out)}"] = item
    if count < len(entries):
        out["…"] = note
    return out


def _clip_text(text: str, max_bytes: int) -> str:
    """Cut a text so that its ASCII JSON takes at most `max_bytes`; its size stands at the cut."""
    marker = f"…[CUT: {len(text.encode('utf-8', 'surrogatepass'))} bytes]"
    room = max_bytes - len(json.dumps(marker))
    if len(json.dumps(text)) <= max_bytes:
        return text
    if room <= 0:
        return "…"
    end = min(len(text), room)
    while end and (size := len(json.dumps(text[:end])) - 2) > room:
        end = min(end - 1, end * room // size)
    return text[:end] + marker


# === Encoding ===
# may name: Errors, Events, Redaction


# === Journal ===
# may name: Errors, Events, Encoding
