"""Engines: both give the same values, every literal survives, every failure has its error."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import run_process
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mxcp_audit
from mxcp_audit import (
    CliEngine,
    DatabaseCorruptError,
    DatabaseLockedError,
    DatabaseNotFoundError,
    EngineNotFoundError,
    QueryError,
    StoreError,
    bind,
    open_engine,
    sql_literal,
    store_error,
)


@pytest.fixture(scope="module", params=["package", "cli"])
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "package":
        pytest.importorskip("duckdb")
    opened = open_engine(environ={**os.environ, "MXCP_AUDIT_ENGINE": request.param})
    yield opened
    opened.close()


# Half surrogates can't be told to either engine; NUL is refused, which has a test of its own.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
hard = st.sampled_from(
    [
        *("'", "''", "\\", "\\'", '"', ";", "--", "/*", "*/", "$name", "$$", "%", "{}", "?", ":x", "@"),
        *("/", "é", "😀"),
    ]
    + ["\n.exit\n", "\n.shell false", "\ngo\n", "\n/\n", "\r", "\r\n", "\\\r", "\x1a", "\u2028", "\x7f"]
    + ["'); DROP TABLE logs; --"]
)


@settings(max_examples=300)
@given(value=st.lists(texts | hard).map("".join))
def test_sql_literal_text_comes_back_as_it_went(session: Any, value: str) -> None:
    assert session.execute(f"SELECT {sql_literal(value)}::VARCHAR AS x") == [(value,)]
    assert session.execute("SELECT $x::VARCHAR AS x", {"x": value}) == [(value,)]


@given(value=st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1))
def test_sql_literal_plain_value_comes_back_as_it_went(session: Any, value: object) -> None:
    assert session.execute(f"SELECT {sql_literal(value)} AS x") == [(value,)]


@example(values=["\n\x03", "a\n\x03'b\\"])  # which the program's shell takes for Ctrl+C
@given(values=st.lists(texts | hard))
def test_sql_literal_list_keeps_every_item(session: Any, values: list[str]) -> None:
    rows = session.execute(f"SELECT unnest({sql_literal(values)})::VARCHAR AS x")
    assert [value for (value,) in rows] == values
    rows = session.execute("SELECT unnest($x::VARCHAR[])::VARCHAR AS x", {"x": values})
    assert [value for (value,) in rows] == values


def test_sql_literal_nul_or_unknown_type_is_refused() -> None:
    for value in ("a\0b", ["\0"], 1.5, {}, b"x"):
        with pytest.raises(QueryError):
            sql_literal(value)


def test_bind_value_that_looks_like_a_parameter_is_not_bound_again() -> None:
    assert bind("SELECT $a, $b", {"a": "$b", "b": "x"}) == "SELECT '$b', 'x'"


def test_execute_values_are_the_same_on_both_engines(session: Any) -> None:
    sql = "SELECT 1::BIGINT AS a, 'x' AS b, NULL::VARCHAR AS c, true AS d, 1.5::DOUBLE AS e, '' AS f"
    assert session.execute(sql) == [(1, "x", None, True, 1.5, "")]
    assert session.execute("SELECT i::BIGINT AS i FROM range(5000) t(i)") == [(i,) for i in range(5000)]
    assert session.execute("SELECT 1::BIGINT AS i WHERE false") == []


def test_execute_after_an_error_begins_a_new_session(session: Any) -> None:
    session.execute("CREATE OR REPLACE TEMP TABLE kept (x INTEGER)")
    with pytest.raises(QueryError):
        session.execute("SELECT nonsense FROM nowhere")
    with pytest.raises(QueryError):
        session.execute("SELECT * FROM kept")
    assert session.execute("SELECT 1::BIGINT AS one") == [(1,)]


def test_stream_that_is_abandoned_harms_no_later_statement(session: Any) -> None:
    rows = session.stream("SELECT i::BIGINT AS i FROM range(100000) t(i)")
    assert next(rows) == (0,)
    rows.close()
    assert session.execute("SELECT 1::BIGINT AS one") == [(1,)]


def test_close_without_a_session_does_nothing(engine: str) -> None:
    session = open_engine()
    session.close()
    session.close()
    assert session.execute("SELECT 1::BIGINT AS one") == [(1,)]
    session.close()


def test_cli_engine_program_that_dies_gives_an_error_and_a_new_session() -> None:
    engine = open_engine(environ={**os.environ, "MXCP_AUDIT_ENGINE": "cli"})
    assert isinstance(engine, CliEngine)
    engine.execute("SELECT 1 AS one")
    assert engine._process is not None
    engine._process.kill()
    engine._process.wait()
    with pytest.raises(StoreError):
        engine.execute("SELECT 1 AS one")
    assert engine.execute("SELECT 1::BIGINT AS one") == [(1,)]
    engine.close()


def test_cli_engine_users_start_file_does_not_matter(tmp_path: Any) -> None:
    (tmp_path / ".duckdbrc").write_text("SELECT 'from the start file';\n")
    code = "from mxcp_audit import open_engine; print(open_engine().execute('SELECT 1::BIGINT AS one'))"
    done = run_process([sys.executable, "-c", code], MXCP_AUDIT_ENGINE="cli", HOME=str(tmp_path))
    assert done.stdout == "[(1,)]\n", done.stderr


def test_package_engine_in_a_forked_child_leaves_the_parents_session_alone(session: Any) -> None:
    if session.name != "package":
        pytest.skip("the program is a process of its own")
    session.execute("CREATE OR REPLACE TEMP TABLE mine AS SELECT 7::BIGINT AS x")
    pid = os.fork()
    if pid == 0:
        session.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert session.execute("SELECT x FROM mine") == [(7,)]


@pytest.mark.parametrize(
    "message, kind",
    [
        (
            'IO Error: Could not set lock on file "x": Conflicting lock is held in /bin/y (PID 7)',
            DatabaseLockedError,
        ),
        ('Binder Error: Unique file handle conflict: "x" is already attached', DatabaseLockedError),
        (
            'IO Error: Cannot open database "x" in read-only mode: database does not exist',
            DatabaseNotFoundError,
        ),
        ('IO Error: The file "x" exists, but it is not a valid DuckDB database file!', DatabaseCorruptError),
        ("IO Error: Corrupt database file: computed checksum 1 does not match", DatabaseCorruptError),
        ('IO Error: Could not read enough bytes from file "x"', DatabaseCorruptError),
        ("FATAL Error: database has been invalidated", DatabaseCorruptError),
        (  # FX-212: a full disk is no damage
            'FATAL Error: Checkpoint failed for database "x". The database has been invalidated. '
            'Original error: Could not write file "x": No space left on device',
            QueryError,
        ),
        ("FATAL Error: database has been invalidated\nOriginal error: 'Corrupt'", DatabaseCorruptError),
        ("FATAL Error: invalidated. Original error: Corrupt database file", DatabaseCorruptError),
        ("Parser Error: syntax error", QueryError),
    ],
)
def test_store_error_message_of_duckdb_becomes_ours(message: str, kind: type[StoreError]) -> None:
    error = store_error(message)
    assert type(error) is kind
    assert kind is not DatabaseLockedError or "PID" not in message or "PID 7" in str(error)


def test_open_engine_unknown_choice_or_nothing_there_names_the_remedy(tmp_path: Any) -> None:
    with pytest.raises(EngineNotFoundError, match="auto, package or cli"):
        open_engine(environ={"MXCP_AUDIT_ENGINE": "sqlite"})
    engine = open_engine(environ={"MXCP_AUDIT_ENGINE": "cli", "MXCP_AUDIT_DUCKDB": str(tmp_path / "none")})
    with pytest.raises(EngineNotFoundError, match="can't be run"):
        engine.execute("SELECT 1")


def test_open_engine_without_the_package_takes_the_program_or_names_the_remedy(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*args: Any, **options: Any) -> None:
        return None

    monkeypatch.setitem(sys.modules, "duckdb", None)  # its import fails
    monkeypatch.setattr("importlib.util.find_spec", absent)
    for apart in (False, True):
        with pytest.raises(EngineNotFoundError, match="package can.t be loaded .*: pip install duckdb"):
            open_engine(apart=apart, environ={"MXCP_AUDIT_ENGINE": "package", "PATH": str(tmp_path)})
        with pytest.raises(EngineNotFoundError, match="no DuckDB here: .*MXCP_AUDIT_DUCKDB"):
            open_engine(apart=apart, environ={"PATH": str(tmp_path)})
    (tmp_path / "duckdb").write_text("#!/bin/sh\n")
    (tmp_path / "duckdb").chmod(0o755)
    found = open_engine(environ={"PATH": str(tmp_path)})
    assert isinstance(found, CliEngine) and found.program == str(tmp_path / "duckdb")


def test_find_program_without_an_executable_in_its_package_looks_on_path(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    assert mxcp_audit.find_program({"PATH": str(tmp_path)}) is None


def test_execute_text_that_is_no_unicode_is_replaced(session: Any) -> None:
    assert session.execute("SELECT $x::VARCHAR AS x", {"x": "\ud800"}) == [("?",)]
    assert session.execute("SELECT 1::BIGINT AS one") == [(1,)]


def test_scratch_directory_of_somebody_else_is_not_used(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"mxcp_audit-{os.getuid()}"
    assert os.path.dirname(mxcp_audit._scratch_directory()) == str(own)
    own.rmdir()
    own.symlink_to("/")
    place = os.path.dirname(mxcp_audit._scratch_directory())
    assert place != str(own) and os.stat(place).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("executable", ["/srv/server.bin", ""])
def test_engine_apart_never_starts_a_frozen_program_again(
    executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.delenv("MXCP_AUDIT_ENGINE", raising=False)
    if mxcp_audit.find_program() is not None:
        assert type(mxcp_audit.open_engine(apart=True)) is mxcp_audit.CliEngine
    pytest.importorskip("duckdb")
    with pytest.raises(mxcp_audit.EngineNotFoundError, match="no Python"):
        mxcp_audit.open_engine(apart=True, environ={"MXCP_AUDIT_ENGINE": "package"})
