"""The Calls section: the context manager, decorators, the origin of a call, JSON-RPC bookkeeping."""

from __future__ import annotations

import asyncio
import builtins
import collections
import contextvars
import functools
import gc
import inspect
import itertools
import json
import pickle
import sys
import threading
import time
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import table_rows

import mxcp_audit
from mxcp_audit import AuditLogger, EventError, origin_of, parent_of
from mxcp_audit import _running as running


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AuditLogger]:
    monkeypatch.setattr(AuditLogger, "_ingest", None)  # what is recorded is read from the journal
    audit = AuditLogger(tmp_path / "log.duckdb")
    yield audit
    audit.shutdown()
    assert running.get() is None  # whatever happened, no call is left behind


def recorded(audit: AuditLogger) -> list[dict[str, Any]]:
    """End the logger and return its events, oldest first."""
    audit.shutdown()
    paths = map(Path, mxcp_audit.Store(audit.config).journal.segments())
    absent = dict.fromkeys(column.name for column in mxcp_audit.COLUMNS)
    return [absent | json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def outcome(audit: AuditLogger) -> list[tuple[Any, ...]]:
    return [tuple(map(event.get, ("name", "input_json", "status", "error"))) for event in recorded(audit)]


# --- record


def test_record_body_raises_same_object_leaves(audit: AuditLogger) -> None:
    raised = KeyError("x")
    with pytest.raises(KeyError) as caught, audit.record("tool", "t", {"a": 1}):
        raise raised
    assert caught.value is raised
    assert outcome(audit) == [("t", '{"a":1}', "error", "KeyError: 'x'")]


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (SystemExit(3), "SystemExit: 3"),
        (asyncio.CancelledError("scope 7f"), "cancelled"),
        (GeneratorExit(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_record_base_exception_recorded_and_same_object_leaves(
    audit: AuditLogger, raised: BaseException, error: str | None
) -> None:
    caught: BaseException | None = None
    try:
        with audit.record("tool", "t"):
            raise raised
    except BaseException as left:
        caught = left
    assert caught is raised
    assert outcome(audit) == [("t", None, "error" if error else "success", error)]


def test_record_input_changed_by_body_recorded_as_it_was(audit: AuditLogger) -> None:
    given = {"ids": [1]}
    with audit.record("tool", "t", given):
        given["ids"].append(2)
    assert outcome(audit) == [("t", '{"ids":[1]}', "success", None)]


def test_record_policy_and_attributes_recorded(audit: AuditLogger) -> None:
    with audit.record("tool", "t", caller="http") as call:
        call.policy("warn", "late")
        call.user_id, call.session_id, call.trace_id = "u", "s", "t"
    (event,) = recorded(audit)
    assert (event["policy_decision"], event["reason"], event["caller"]) == ("warn", "late", "http")
    assert (event["user_id"], event["session_id"], event["trace_id"]) == ("u", "s", "t")


def wrapped_twice() -> None:
    try:
        try:
            raise PermissionError("not an admin")
        except PermissionError as error:
            raise ValueError("in between") from error
    except ValueError as error:
        raise RuntimeError("outside") from error


@pytest.mark.parametrize("python", [(3, 10), (3, 11)])
def test_record_denied_by_found_in_causes_and_groups(audit: AuditLogger, python: tuple[int, int]) -> None:
    if sys.version_info < python:
        pytest.skip("exception groups came with 3.11")
    with pytest.raises(Exception) as caught, audit.record("tool", "t", denied_by=PermissionError):
        if python == (3, 11):
            raise builtins.ExceptionGroup("several", [ValueError(), PermissionError("not an admin")])  # type: ignore[attr-defined]
        wrapped_twice()
    assert not isinstance(caught.value, PermissionError)
    (event,) = recorded(audit)
    assert (event["policy_decision"], event["reason"]) == ("deny", "not an admin")


def test_fx_077_decorated_twice_is_one_row_and_another_decorator_between_stays(audit: AuditLogger) -> None:
    def function(x: int) -> int:
        return x

    async def coroutine(x: int) -> int:
        return x

    def retry(inner: Any) -> Any:
        return functools.wraps(inner)(lambda x: inner(x) + 100)

    again = audit.tool("outer")(audit.tool("inner")(function))
    assert again(1) == 1 and asyncio.run(audit.tool()(audit.tool()(coroutine))(2)) == 2
    assert [event["name"] for event in recorded(audit)] == ["outer", "coroutine"]
    assert audit.tool()(retry(again))(3) == 103


@pytest.mark.parametrize("made", [property(len), 5])
def test_fx_077_what_cannot_be_called_is_told_so(audit: AuditLogger, made: Any) -> None:
    with pytest.raises(EventError, match="it can't be called; write @audit.tool"):
        audit.tool()(made)


def test_describe_exception_that_cannot_be_shown_names_its_type() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("hunter2")

    assert mxcp_audit.describe_exception(Hostile()) == "Hostile: (its message can't be shown)"


def test_describe_exception_tells_what_groups_hide_and_frameworks_mask() -> None:
    group = type("Group", (Exception,), {})("2 errors")  # as the one of 3.11
    group.exceptions = [ValueError("port 80"), asyncio.CancelledError(), "no exception"]
    masked = type("ToolError", (Exception,), {"__module__": "fastmcp.exceptions"})("Error calling tool 't'")
    masked.__cause__ = group
    group.__cause__ = masked  # chains may be circular
    text = "ToolError: Error calling tool 't'; Group: 2 errors; ValueError: port 80"
    assert mxcp_audit.describe_exception(masked) == text
    assert mxcp_audit.type_of_error(masked) == "Group"
    group.exceptions = [ValueError("port 80")]
    assert mxcp_audit.type_of_error(masked) == "ValueError"
    masked.args = ("Error calling tool 't': port 80",)
    masked.__cause__ = ValueError("port 80")
    assert mxcp_audit.describe_exception(masked) == "ToolError: Error calling tool 't': port 80"


def test_record_failure_that_is_known_already_stays_when_another_is_raised(audit: AuditLogger) -> None:
    with pytest.raises(ValueError), audit.record("tool", "x") as call:
        call.fail("nearer to the cause")
        raise ValueError("further away")
    assert (call.status, call.error) == ("error", "nearer to the cause")


def test_origin_trace_of_an_opentelemetry_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_current_span() -> None:
        raise RuntimeError

    module = types.SimpleNamespace(get_current_span=get_current_span)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", module)
    assert mxcp_audit.origin_of(None)["trace_id"] is None


def test_record_circular_causes_recorded(audit: AuditLogger) -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    with pytest.raises(ValueError), audit.record("tool", "t", denied_by=PermissionError):
        raise one
    assert recorded(audit)[0]["policy_decision"] == "n/a"


class Odd(Exception):
    """An exception whose `exceptions` are no members of a group."""

    def __init__(self, exceptions: Any) -> None:
        self.exceptions = exceptions


class Unanswering(Exception):
    @property
    def exceptions(self) -> Any:
        raise RuntimeError("asked")


@pytest.mark.parametrize("raised", [Odd(None), Odd(7), Odd(["text"]), Odd({"a": 1}), Unanswering()], ids=repr)
def test_record_exception_with_odd_members_same_object_leaves(audit: AuditLogger, raised: Exception) -> None:
    with pytest.raises(Exception) as caught, audit.record("tool", "t", denied_by=PermissionError):
        raise raised
    assert caught.value is raised
    assert [event["status"] for event in recorded(audit)] == ["error"]


@pytest.mark.parametrize("kinds", [[PermissionError], "PermissionError", (PermissionError, None)], ids=repr)
def test_denied_by_of_no_exceptions_refused_when_set_up_and_harmless_in_a_call(
    audit: AuditLogger, kinds: Any
) -> None:
    for set_up in (audit.middleware, audit.tool, audit.prompt):
        with pytest.raises(EventError, match="denied_by: .*exception"):
            set_up(denied_by=kinds)
    with pytest.raises(KeyError), audit.record("tool", "t", denied_by=kinds):
        raise KeyError("x")
    assert outcome(audit) == [("t", None, "error", "KeyError: 'x'")]


def test_policy_of_the_running_call_recorded_innermost(audit: AuditLogger) -> None:
    with audit.record("tool", "outer"):
        with audit.record("tool", "inner"):
            audit.policy("deny", "no")
        audit.policy("allow")
    found = [(event["name"], event["policy_decision"], event["reason"]) for event in recorded(audit)]
    assert found == [("inner", "deny", "no"), ("outer", "allow", None)]


def test_policy_outside_of_calls_harmless_and_told(
    audit: AuditLogger, caplog: pytest.LogCaptureFixture
) -> None:
    audit.policy("deny", "no")
    assert "outside of any call" in caplog.text
    assert recorded(audit) == []


def test_record_durable_async_event_loop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held back until the loop has proven that it runs meanwhile."""
    audit = AuditLogger(tmp_path / "log.duckdb", durable=True)
    looped = threading.Event()
    drain = audit._writer._drain
    monkeypatch.setattr(audit._writer, "_drain", lambda: looped.wait(60) and drain())

    async def main() -> bool:
        @audit.tool()
        async def tool() -> None:
            pass

        waiting = asyncio.ensure_future(tool())
        for _ in range(20):
            await asyncio.sleep(0.01)
        early = waiting.done()
        looped.set()
        await waiting
        return early

    assert asyncio.run(main()) is False
    assert audit.counters.written == 1
    audit.shutdown()


def test_record_durable_cancelled_again_while_waiting_first_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditLogger(tmp_path / "log.duckdb", durable=True)
    raised = asyncio.CancelledError("first")

    async def cancelled_again(ticket: int) -> None:
        raise asyncio.CancelledError("second")

    monkeypatch.setattr(audit, "wait_async", cancelled_again)

    async def main() -> BaseException | None:
        try:
            async with audit.record("tool", "t"):
                raise raised
        except asyncio.CancelledError as left:
            return left

    assert asyncio.run(main()) is raised
    audit.shutdown()


# --- decorators


def test_tool_function_stays_what_it_was(audit: AuditLogger) -> None:
    def get_user(user_id: int, *tags: str, deep: bool = False, **more: object) -> str:
        """Return a user."""
        return f"{user_id}{tags}{deep}{more}"

    wrapped = audit.tool()(get_user)
    assert inspect.signature(wrapped) == inspect.signature(get_user)
    assert (wrapped.__name__, wrapped.__doc__) == ("get_user", "Return a user.")
    assert inspect.get_annotations(wrapped) == inspect.get_annotations(get_user)
    more = {"api_key": "k", "more": "m"}
    assert wrapped(7, "a", "b", deep=True, **more) == get_user(7, "a", "b", deep=True, **more)
    ((name, input_json, status, error),) = outcome(audit)
    given = {"user_id": 7, "tags": ["a", "b"], "deep": True, "api_key": "[REDACTED]", "more": "m"}
    assert json.loads(input_json) == given
    assert (name, status, error) == ("get_user", "success", None)


def test_tool_wrong_arguments_function_says_so(audit: AuditLogger) -> None:
    @audit.tool("named")
    def one(a: int) -> None: ...

    with pytest.raises(TypeError, match=r"one\(\) got an unexpected keyword"):
        one(1, b=2)  # type: ignore[call-arg]
    ((name, input_json, status, _),) = outcome(audit)
    assert (name, json.loads(input_json), status) == ("named", {"args": [1], "kwargs": {"b": 2}}, "error")


def test_tool_that_is_new_is_looked_for_nowhere(audit: AuditLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector, asked whether a server has the function already, takes long in a large process."""
    monkeypatch.setitem(sys.modules, "mcp", types.ModuleType("mcp"))
    monkeypatch.setattr(gc, "get_referrers", pytest.fail)

    @audit.tool()
    def fresh() -> None: ...

    fresh()
    assert len(recorded(audit)) == 1


def test_tool_function_without_a_signature_is_recorded_as_it_is_called(audit: AuditLogger) -> None:
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(min)
    smallest = audit.tool("smallest")(min)
    assert smallest(3, 1, key=abs) == 1
    ((name, input_json, status, _),) = outcome(audit)
    shown = json.loads(input_json)
    assert (name, shown["args"], list(shown["kwargs"]), status) == ("smallest", [3, 1], ["key"], "success")


def test_tool_what_has_no_name_of_its_own_is_told_apart_and_typed(audit: AuditLogger) -> None:
    def greet(who: Any, token: str) -> str:
        return token

    class Greeter:
        async def __call__(self, who: Any) -> str:
            return "x"

    class Odd:
        __module__ = None  # type: ignore[assignment]

    tool: Any = audit.tool()(functools.partial(greet, token="x"))
    other: Any = audit.tool()(Greeter())
    assert tool(Odd()) == asyncio.run(other(7)) == "x"
    assert typing.get_type_hints(tool) == {"who": Any, "token": str, "return": str}
    assert typing.get_type_hints(other) == {"who": Any, "return": str}
    assert [(tool.__name__, "greet"), (other.__name__, "Greeter")] == [
        (row[0],) * 2 for row in outcome(audit)
    ]


_pickled_audit = AuditLogger("unused.duckdb", enabled=False)


@_pickled_audit.tool()
def picklable(a: int) -> int:
    return a + 1


def test_tool_function_pickles() -> None:
    assert pickle.loads(pickle.dumps(picklable))(1) == 2


def test_tool_methods_recorded_without_instance(audit: AuditLogger) -> None:
    class Service:
        @audit.tool()
        def method(self, a: int) -> int:
            return a

        @audit.tool()
        @classmethod
        def of_class(cls, a: int) -> str:
            return f"{cls.__name__}{a}"

        @audit.tool()
        @staticmethod
        def of_none(a: int) -> int:
            return a

    assert (Service().method(1), Service.of_class(2), Service.of_none(3)) == (1, "Service2", 3)
    assert [row[:2] for row in outcome(audit)] == [
        ("method", '{"a":1}'),
        ("of_class", '{"a":2}'),
        ("of_none", '{"a":3}'),
    ]


def test_tool_without_parentheses_refused_with_remedy(audit: AuditLogger) -> None:
    with pytest.raises(EventError, match=r"write @audit\.tool\(\), with the parentheses"):
        audit.tool(lambda: None)  # type: ignore[arg-type]


def test_resource_and_prompt_recorded_as_such(audit: AuditLogger) -> None:
    @audit.resource("reports/{report_id}", caller="stdio")
    def report(report_id: str) -> str:
        return report_id

    @audit.prompt()
    def summary(text: str) -> str:
        return text

    assert report("x") + summary("y") == "xy"
    found = [(e["caller"], e["type"], e["name"], e["input_json"]) for e in recorded(audit)]
    assert found == [
        ("stdio", "resource", "reports/{report_id}", '{"report_id":"x"}'),
        ("cli", "prompt", "summary", '{"text":"y"}'),
    ]


def test_tool_coroutine_stays_one_and_policy_reaches_its_call(audit: AuditLogger) -> None:
    @audit.tool()
    async def tool(a: int) -> int:
        await asyncio.sleep(0)
        audit.policy("allow", f"number {a}")
        return a

    async def main() -> list[int]:
        return await asyncio.gather(*map(tool, range(5)))

    assert inspect.iscoroutinefunction(tool)
    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    assert sorted((e["input_json"], e["reason"]) for e in recorded(audit)) == [
        (f'{{"a":{number}}}', f"number {number}") for number in range(5)
    ]


def test_tool_task_cancelled_recorded(audit: AuditLogger) -> None:
    @audit.tool()
    async def tool() -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.ensure_future(tool())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert outcome(audit) == [("tool", "{}", "error", "cancelled")]


def echo(log: list[object]) -> Callable[..., Iterator[Any]]:
    def generator(a: int) -> Iterator[Any]:
        received: object = None
        try:
            while received != "stop":
                try:
                    received = yield (a, received)
                except KeyError as error:
                    received = f"caught {error}"
            return "returned"  # noqa: B901
        finally:
            log.append("closed")

    return generator


def drive(generator: Any) -> list[object]:
    seen: list[object] = [next(generator), generator.send("one"), generator.throw(KeyError("k"))]
    try:
        generator.send("stop")
    except StopIteration as stop:
        seen.append(stop.value)
    return seen


def test_tool_generator_send_throw_return_as_without(audit: AuditLogger) -> None:
    plain_log: list[object] = []
    log: list[object] = []
    wrapped = audit.tool()(echo(log))
    assert inspect.isgeneratorfunction(wrapped)
    assert drive(wrapped(7)) == drive(echo(plain_log)(7))
    assert log == plain_log == ["closed"]
    assert outcome(audit) == [("generator", '{"a":7}', "success", None)]


def test_tool_generator_is_the_running_call_within_its_steps_alone(audit: AuditLogger) -> None:
    def steps() -> Iterator[str]:
        try:
            audit.policy("allow", "in a step")
            yield "one"
        except GeneratorExit:
            audit.policy("warn", "at the end")
            yield "two"

    generator: Any = audit.tool()(steps)()
    assert (next(generator), running.get()) == ("one", None)
    assert (generator.throw(GeneratorExit()), running.get()) == ("two", None)
    assert list(generator) == []
    (event,) = recorded(audit)
    assert (event["policy_decision"], event["reason"], event["status"]) == ("warn", "at the end", "success")


def test_tool_generator_closed_early_no_error_and_source_closed(audit: AuditLogger) -> None:
    log: list[object] = []
    generator = audit.tool()(echo(log))(7)
    next(generator)
    assert running.get() is None  # between its steps, other code runs
    generator.close()  # type: ignore[attr-defined]
    assert log == ["closed"]
    assert outcome(audit) == [("generator", '{"a":7}', "success", None)]


def test_tool_generator_raises_recorded(audit: AuditLogger) -> None:
    generator = audit.tool()(echo([]))(7)
    next(generator)
    raised = ValueError("v")
    with pytest.raises(ValueError) as caught:
        generator.throw(raised)  # type: ignore[attr-defined]
    assert caught.value is raised
    assert outcome(audit) == [("generator", '{"a":7}', "error", "ValueError: v")]


def async_echo(audit: AuditLogger, log: list[object]) -> Callable[..., AsyncIterator[Any]]:
    async def generator(a: int) -> AsyncIterator[Any]:
        received: object = None
        try:
            while received != "stop":
                try:
                    await asyncio.sleep(0)
                    received = yield (a, received)
                    if received == "deny":
                        audit.policy("deny", "in a step")
                except KeyError as error:
                    received = f"caught {error}"
        finally:
            log.append("closed")

    return generator


async def drive_async(generator: Any) -> list[object]:
    seen: list[object] = [await generator.__anext__(), await generator.asend("deny")]
    seen.append(await generator.athrow(KeyError("k")))
    try:
        await generator.asend("stop")
    except StopAsyncIteration:
        seen.append("stopped")
    return seen


def test_tool_async_generator_asend_athrow_as_without(audit: AuditLogger) -> None:
    plain_log: list[object] = []
    log: list[object] = []
    wrapped = audit.tool()(async_echo(audit, log))
    assert inspect.isasyncgenfunction(wrapped)
    assert asyncio.run(drive_async(wrapped(7))) == asyncio.run(drive_async(async_echo(audit, plain_log)(7)))
    assert log == plain_log == ["closed"]
    (event,) = recorded(audit)
    assert (event["policy_decision"], event["reason"], event["status"]) == ("deny", "in a step", "success")


def test_tool_async_generator_closed_by_the_event_loop_is_closed_within_its_call(audit: AuditLogger) -> None:
    within: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(3):
                yield number
        finally:
            within.append(running.get() is not None)

    async def main() -> None:
        async for _ in audit.tool()(numbers)():
            break
        await asyncio.sleep(0.01)  # meanwhile the event loop closes it
        left = audit.tool()(numbers)()
        await left.__anext__()
        await left.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    assert True in within and len(within) == 2
    assert [row[2:] for row in outcome(audit)] == [("success", None)] * 2


def test_tool_async_generator_aclose_and_error_recorded(audit: AuditLogger) -> None:
    log: list[object] = []

    async def main() -> None:
        closed = audit.tool("closed")(async_echo(audit, log))(1)
        await closed.__anext__()
        await closed.aclose()  # type: ignore[attr-defined]
        failed = audit.tool("failed")(async_echo(audit, log))(2)
        await failed.__anext__()
        with pytest.raises(ValueError):
            await failed.athrow(ValueError("v"))  # type: ignore[attr-defined]

    asyncio.run(main())
    assert log == ["closed", "closed"]
    assert [row[::2] + row[3:] for row in outcome(audit)] == [
        ("closed", "success", None),
        ("failed", "error", "ValueError: v"),
    ]


# --- middleware, fed by hand: what real frameworks do is in test_integrations.py


def context_of(method: str, **params: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(method=method, params=params, request=None, session=None, meta=None)


def test_middleware_other_methods_pass_unrecorded(audit: AuditLogger) -> None:
    async def call_next(context: object) -> str:
        return "listed"

    assert asyncio.run(audit.middleware()(context_of("tools/list"), call_next)) == "listed"
    assert recorded(audit) == []


@pytest.mark.parametrize("nested", [False, True])
def test_middleware_decorated_tool_one_row_with_the_cause(audit: AuditLogger, nested: bool) -> None:
    """The SDK makes a result of what a tool raises; the decorator saw it."""

    @audit.tool()
    def refuse(a: int) -> None:
        helper()
        if a == 1:
            refuse(2)  # an execution of its own, though of the same tool
        else:
            raise PermissionError("not an admin")

    @audit.tool()
    def helper() -> None: ...

    async def call_next(context: object) -> dict[str, Any]:
        with pytest.raises(PermissionError):
            refuse(1)
        return {"isError": True, "content": [{"type": "text", "text": "Error executing tool"}]}

    async def call_inner(context: object, call_next: Any = call_next) -> object:
        return await audit.middleware()(context, call_next)

    given = context_of("tools/call", name="refuse", arguments={"a": 1})
    asyncio.run(audit.middleware()(given, call_inner if nested else call_next))
    found = [(e["name"], e["policy_decision"], e["reason"], e["error"]) for e in recorded(audit)]
    denied = ("refuse", "deny", "not an admin", "PermissionError: not an admin")
    helped = ("helper", "n/a", None, None)
    assert found == [helped, helped, denied, denied]


def test_middleware_without_asyncio_takes_a_tool_in_a_thread(audit: AuditLogger) -> None:
    tool = audit.tool()(lambda a: a)

    async def call_next(context: object) -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(tool, 1))
        thread.start()
        thread.join()

    with pytest.raises(StopIteration):
        audit.middleware()(context_of("tools/call", name="t", arguments={"a": 1}), call_next).send(None)
    assert outcome(audit) == [("t", '{"a":1}', "success", None)]


def test_middleware_refusal_of_fastmcp_is_a_denial(
    audit: AuditLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AuthorizationError(Exception): ...

    module = types.SimpleNamespace(AuthorizationError=AuthorizationError)
    monkeypatch.setitem(sys.modules, "fastmcp.exceptions", module)  # type: ignore[arg-type]

    async def call_next(context: object) -> object:
        raise AuthorizationError("scope missing")

    with pytest.raises(AuthorizationError):
        asyncio.run(audit.middleware()(context_of("tools/call", name="t"), call_next))
    (event,) = recorded(audit)
    assert (event["policy_decision"], event["reason"]) == ("deny", "scope missing")


class Hostile:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def test_middleware_hostile_context_recorded_anyway(audit: AuditLogger) -> None:
    async def call_next(context: object) -> object:
        return Hostile()

    context = types.SimpleNamespace(method="tools/call", message=Hostile(), fastmcp_context=Hostile())
    asyncio.run(audit.middleware()(context, call_next))
    assert outcome(audit) == [("", None, "success", None)]


@pytest.mark.parametrize(
    ("token", "user"),
    [
        ({"subject": "alice", "client_id": "app"}, "alice"),
        ({"claims": {"sub": "alice"}, "client_id": "app"}, "alice"),
        ({"subject": None, "claims": None, "client_id": "app"}, "app"),
        (None, None),
    ],
)
def test_origin_http_user_is_subject_else_client(token: dict[str, object] | None, user: str | None) -> None:
    request = types.SimpleNamespace(
        scope={
            "user": types.SimpleNamespace(access_token=token and types.SimpleNamespace(**token)),
            "headers": [(b"mcp-session-id", b"s1")],
        }
    )
    origin = origin_of(types.SimpleNamespace(request=request, session=None, meta=None))
    assert (origin["caller"], origin.get("user_id"), origin["session_id"]) == ("http", user, "s1")
    assert origin.get("agent") == (token and "app")


@pytest.mark.parametrize(
    ("traceparent", "trace"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", "0af7651916cd43dd8448eb211c80319c"),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
        ("x" * 55, None),
        (7, None),
    ],
)
def test_trace_of_traceparent_as_w3c_says(traceparent: object, trace: str | None) -> None:
    parent = parent_of({"traceparent": traceparent})
    assert parent == (trace and (trace, "b7ad6b7169203331"))


def test_origin_trace_of_opentelemetry_if_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    span = types.SimpleNamespace(get_span_context=lambda: types.SimpleNamespace(trace_id=0xABC, span_id=1))
    module = types.SimpleNamespace(get_current_span=lambda: span)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", module)  # type: ignore[arg-type]
    assert origin_of(None)["trace_id"] == f"{0xABC:032x}"


@pytest.mark.parametrize(
    ("peer", "headers", "proxies", "address"),
    [
        (("10.0.0.1", 5), {"x-forwarded-for": "203.0.113.9"}, (), "10.0.0.1"),
        (("10.0.0.1", 5), {"x-forwarded-for": "203.0.113.9"}, ("10.0.0.0/8",), "203.0.113.9"),
        (
            ("10.0.0.1", 5),
            {"x-forwarded-for": "1.1.1.1, 203.0.113.9, 10.0.0.2"},
            ("10.0.0.0/8",),
            "203.0.113.9",
        ),
        (("10.0.0.1", 5), {"forwarded": 'for="[2001:db8::1]:80";proto=https'}, ("10.0.0.1",), "2001:db8::1"),
        (("10.0.0.1", 5), {"x-forwarded-for": "203.0.113.9:4711"}, ("10.0.0.1",), "203.0.113.9"),
        (("192.0.2.1", 5), {"x-forwarded-for": "203.0.113.9"}, ("10.0.0.0/8",), "192.0.2.1"),
        (("10.0.0.1", 5), {"x-forwarded-for": "1.1.1.1\n203.0.113.9"}, ("10.0.0.1",), "203.0.113.9"),
        (("10.0.0.1", 5), {"forwarded": "for=1.1.1.1\nfor=203.0.113.9"}, ("10.0.0.1",), "203.0.113.9"),
        (("203.0.113.9", 0), {"x-forwarded-for": "203.0.113.9"}, (), "127.0.0.1"),  # uvicorn believed it
        (None, {}, ("10.0.0.1",), None),
    ],
)
def test_address_a_proxy_s_word_counts_only_if_it_is_trusted(
    peer: tuple[str, int] | None, headers: dict[str, str], proxies: tuple[str, ...], address: str | None
) -> None:
    client = peer and types.SimpleNamespace(host=peer[0], port=peer[1])
    lines = [(name, line) for name, text in headers.items() for line in text.split("\n")]
    scope = {"headers": [(name.encode(), line.encode()) for name, line in lines], "query_string": b""}
    request = types.SimpleNamespace(client=client, scope=scope)
    context = types.SimpleNamespace(request=request)
    assert origin_of(context, proxies)["address"] == address


def test_decorated_function_without_a_middleware_heeds_trusted_proxies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = {"headers": [(b"x-forwarded-for", b"203.0.113.9")], "query_string": b""}
    request = types.SimpleNamespace(client=types.SimpleNamespace(host="10.0.0.1", port=5), scope=scope)
    current: contextvars.ContextVar[object] = contextvars.ContextVar("request_ctx")
    module = types.SimpleNamespace(request_ctx=current)
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel.server", module)
    monkeypatch.setattr(AuditLogger, "_ingest", None)
    audit = AuditLogger(tmp_path / "log.duckdb", trusted_proxies=["10.0.0.0/8"])
    current.set(types.SimpleNamespace(request=request))
    audit.tool("t")(lambda: None)()
    assert [(event["caller"], event["address"]) for event in recorded(audit)] == [("http", "203.0.113.9")]


def test_trusted_proxies_that_are_no_addresses_refused(tmp_path: Path) -> None:
    with pytest.raises(mxcp_audit.ConfigError, match="trusted_proxies: 'proxy.example' does not appear"):
        AuditLogger(tmp_path / "log.duckdb", trusted_proxies=["proxy.example"])


@pytest.mark.parametrize(
    ("how", "names"), [("none", set()), ("summary", {"items", "kinds"}), ("body", {"items", "kinds", "body"})]
)
def test_record_result_says_how_much_of_a_result_is_recorded(
    tmp_path: Path, how: str, names: set[str]
) -> None:
    audit = AuditLogger(tmp_path / "log.duckdb", record_result=how, max_result_bytes=1000)
    answer = {"content": [{"type": "text", "text": "é" * 4000}], "structuredContent": {"password": "hunter2"}}

    async def call_next(context: object) -> dict[str, Any]:
        return answer

    asyncio.run(audit.middleware()(context_of("tools/call", name="t"), call_next))
    audit.shutdown()
    ((size, context),) = table_rows(tmp_path / "log.duckdb", "SELECT result_bytes, context FROM logs")
    assert size == (
        None if how == "none" else len(json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode())
    )
    assert {name.rpartition(".")[2] for name in json.loads(context or "{}")} == names
    assert "hunter2" not in (context or "") and len(context or "") < 2000


def test_context_of_a_person_s_own_is_redacted_beside_ours(audit: AuditLogger) -> None:
    with audit.record("tool", "t", context={"password": "hunter2"}) as call:
        call.details["mcp.protocol.version"] = "1"
    (event,) = recorded(audit)
    assert json.loads(event["context"]) == {"mcp.protocol.version": "1", "password": "[REDACTED]"}


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, BaseException])
def test_input_whose_repr_raises_what_is_no_exception_is_recorded(
    audit: AuditLogger, kind: type[BaseException]
) -> None:
    class Hostile_:
        def __repr__(self) -> str:
            raise kind("hunter2")

        __str__ = __repr__

    audit.log_event("cli", "tool", "logged", {"x": Hostile_()})
    with audit.record("tool", "called", {"x": Hostile_()}):
        pass
    assert len(recorded(audit)) == 2


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_values_whose_own_methods_raise_what_is_no_exception_cost_no_event(
    audit: AuditLogger, kind: type[BaseException]
) -> None:
    """What comes again when it is tried again is the object's own, and no signal handler's."""

    def fail(*_: object) -> Any:
        raise kind("hunter2")

    methods = dict.fromkeys(("__hash__", "__eq__", "__len__", "__iter__", "__float__", "__index__"), fail)
    bases: list[type] = [str, bytes, list, tuple, set, dict, collections.deque, collections.UserDict, float]
    hostile = [base.__new__(type("Hostile_", (base,), methods)) for base in bases]
    fields = ("caller", "name", "duration_ms", "error", "user_id", "client", "result_bytes")
    for value in hostile:
        for field in fields:
            event: Any = {"caller": "cli", "event_type": "tool", "name": "t"}
            audit.log_event(**{**event, field: value})
        audit.log_event("cli", "tool", "t", value, context={"it": value})
        with audit.record("tool", "t", {"beside": "kept", "it": [value]}):
            pass
    events = recorded(audit)
    assert len(events) == len(hostile) * (len(fields) + 2)
    called = [json.loads(event["input_json"]) for event in events if "beside" in (event["input_json"] or "")]
    assert [each["beside"] for each in called] == ["kept"] * len(hostile)


@pytest.mark.parametrize("way", ["log_event", "record"])
def test_interrupt_reaches_its_owner_and_costs_no_event(audit: AuditLogger, way: str) -> None:
    """What a signal handler raises may come at each call of ours: each is tried in turn."""
    audit.log_event("cli", "tool", "first")
    value = {"x": [1, {"password": "hunter2"}], "y": collections.OrderedDict(z="hunter2 z")}
    ran: list[str] = []
    for moment in itertools.count(1):
        passed, came, arrived = 0, False, False

        def interrupt(frame: Any, event: str, argument: Any, moment: int = moment) -> None:
            nonlocal passed, came
            if event in ("call", "c_return") and frame.f_globals is vars(mxcp_audit):
                passed += 1
                if passed == moment:
                    sys.setprofile(None)
                    came = True
                    raise SystemExit

        sys.setprofile(interrupt)
        try:
            if way == "log_event":
                ran.append(f"n{moment}")
                audit.log_event("cli", "tool", f"n{moment}", value, error="no hunter2 here")
            else:
                contextvars.copy_context().run(fail, audit, f"n{moment}", value, ran)
        except SystemExit:
            arrived = True
        except ValueError:
            pass
        finally:
            sys.setprofile(None)
        assert arrived == came, moment
        if not came:
            break
    assert moment > 100  # there were such moments
    unfinished = {call.name for call in audit._writer._appender.begun._running.values()}
    rows = [event["name"] for event in recorded(audit)]
    assert len(rows) == len(set(rows)) and "hunter2" not in str(rows)
    # What comes at the first step of a method came before the call, or leaves it as one that is unfinished.
    assert len(set(ran) - unfinished - set(rows)) <= 12, set(ran) - unfinished - set(rows)


def test_unfinished_calls_are_taken_oldest_first_and_given_up_when_they_are_too_many(
    audit: AuditLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxcp_audit, "_MAX_UNFINISHED", 3)
    unfinished = audit.unfinished
    calls = [audit.record("tool", str(number)) for number in range(5)]
    for number, call in enumerate(calls):
        unfinished.put(("key", number % 2), call, f"not resumed {number}", 0.0 if number == 4 else 60.0)
    assert unfinished.take(("key", 0)) is calls[2] and unfinished.take(("key", 3)) is None
    unfinished.close(time.monotonic())
    assert unfinished and unfinished.take(("key", 0)) is None
    assert unfinished.take(("key", 1)) is calls[3] and not unfinished
    for number in (2, 3):
        calls[number].end()
    told = {event["name"]: event["error"] for event in recorded(audit)}
    assert told == {"0": "not resumed 0", "1": "not resumed 1", "2": None, "3": None, "4": "not resumed 4"}


def fail(audit: AuditLogger, name: str, value: object, ran: list[str]) -> None:
    with audit.record("tool", name, value):
        ran.append(name)
        raise ValueError("no hunter2 here")


@pytest.mark.parametrize("made", ["generator", "async generator", "never awaited", "never iterated"])
def test_plain_function_that_returns_what_goes_on_later_is_recorded_when_that_is_over(
    audit: AuditLogger, made: str
) -> None:
    def generator(fails: bool) -> Iterator[int]:
        yield 1
        raise ValueError("late")

    async def later(fails: bool) -> AsyncIterator[int]:
        yield 1
        raise ValueError("late")

    async def coroutine(fails: bool) -> None: ...

    body = {"async generator": later, "never awaited": coroutine}.get(made, generator)
    result: Any = audit.tool("t")(lambda fails: body(fails))(True)

    async def drain() -> None:
        async for _ in result:
            pass

    if made == "generator":
        with pytest.raises(ValueError):
            list(result)
    elif made == "async generator":
        with pytest.raises(ValueError):
            asyncio.run(drain())
    elif made == "never awaited":
        result.close()
    result = None
    ((name, _, status, error),) = outcome(audit)
    wanted = ("error", "ValueError: late") if "generator" in made else ("error", made)
    assert (name, status, error) == ("t", *wanted)


# --- the stdio wrapper's bookkeeping


class Feeder:
    """A StdioAudit, and what both sides say to it."""

    def __init__(self, audit: AuditLogger) -> None:
        self.audit = audit
        self.stdio = mxcp_audit.StdioAudit(audit)

    def client(self, *messages: object) -> None:
        for message in messages:
            self.stdio.from_client(json.dumps(message).encode() + b"\n")

    def server(self, *messages: object) -> None:
        for message in messages:
            self.stdio.from_server(json.dumps(message).encode() + b"\n")


@pytest.fixture
def feeder(audit: AuditLogger) -> Feeder:
    return Feeder(audit)


def request(key: object, name: str = "t", method: str = "tools/call", **more: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": key, "method": method, "params": {"name": name, "arguments": {}, **more}}


def answer(key: object, **result: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": key, "result": result}


def test_stdio_ids_of_either_type_told_apart(feeder: Feeder) -> None:
    """Though "7" answers 7, if nothing else is asked so: the clients of the SDKs take it, too."""
    feeder.client(request(1, "number"), request("1", "text"), request(7, "loose"))
    feeder.server(answer("1", isError=True, content=[{"type": "text", "text": "bad"}]), answer(1.0))
    feeder.server(answer("7"), answer("7"))
    assert [row[0] for row in outcome(feeder.audit)] == ["text", "number", "loose"]
    feeder.audit.shutdown()


def test_stdio_batches_in_any_order(feeder: Feeder) -> None:
    feeder.client([request(1, "a"), {"jsonrpc": "2.0", "method": "notifications/x"}, request(2, "b")])
    feeder.server([answer(2)], answer(1))
    assert [row[0] for row in outcome(feeder.audit)] == ["b", "a"]


def test_stdio_every_method_and_protocol_error(feeder: Feeder) -> None:
    feeder.client(
        {"id": 1, "method": "resources/read", "params": {"uri": "file:///x"}},
        {"id": 2, "method": "prompts/get", "params": {"name": "p", "arguments": {"password": "x"}}},
        {"id": 3, "method": "tools/list"},
        {"id": 4, "method": "tools/call"},
        {"id": 5, "method": "tools/call", "params": {"name": "structured"}},
        {"id": 6, "method": "tools/call", "params": {"name": "embedded"}},
        {"id": 7, "method": "tools/call", "params": {"name": "odd"}},
    )
    feeder.server(
        {"id": 1, "error": {"code": -32002, "message": "not found"}},
        {"id": 2, "result": {}},
        {"id": 3, "result": {}},
        {"id": 4, "error": None, "result": {"isError": True}},
        {"id": 5, "result": {"isError": True, "content": [], "structuredContent": {"error": "full"}}},
        {"id": 6, "result": {"isError": True, "content": [{"resource": {"uri": "a:b", "text": "full"}}]}},
        {"id": 7, "error": "full"},
    )
    found = [(e["type"], e["name"], e["input_json"], e["error"]) for e in recorded(feeder.audit)]
    assert found == [
        ("resource", "file:///x", None, "not found (-32002)"),
        ("prompt", "p", '{"password":"[REDACTED]"}', None),
        ("tool", "", None, "the result is marked as an error"),
        ("tool", "structured", None, '{"error":"full"}'),
        ("tool", "embedded", None, "full"),
        ("tool", "odd", None, "full"),
    ]


def test_stdio_server_request_with_same_id_is_no_answer(feeder: Feeder) -> None:
    feeder.client(request(1))
    feeder.server({"jsonrpc": "2.0", "id": 1, "method": "sampling/createMessage", "params": {}})
    feeder.client({"jsonrpc": "2.0", "id": 1, "result": {"isError": True}})
    assert feeder.audit.counters.accepted == 0
    feeder.server(answer(1))
    assert outcome(feeder.audit) == [("t", "{}", "success", None)]


def test_stdio_cancellation_recorded_once(feeder: Feeder) -> None:
    feeder.client(
        request(1),
        {"method": "notifications/cancelled", "params": {"requestId": 1, "reason": "slow"}},
        {"method": "notifications/cancelled", "params": {"requestId": 99}},
        {"method": "notifications/cancelled"},
    )
    feeder.server(answer(1))
    assert outcome(feeder.audit) == [("t", "{}", "error", "cancelled by the client: slow")]


def test_stdio_unanswered_reused_and_missing_ids_recorded(feeder: Feeder) -> None:
    without = request(0, "without")
    del without["id"]
    feeder.client(request(1, "first"), request(1, "second"), without, request([1], "list"))
    feeder.stdio.close("the server went away before it was answered")
    assert [row[::3] for row in outcome(feeder.audit)] == [
        ("first", "its id was used again before it was answered"),
        ("without", "sent without an id that could be answered"),
        ("list", "sent without an id that could be answered"),
        ("second", "the server went away before it was answered"),
    ]


def test_stdio_any_splitting_of_bytes(feeder: Feeder) -> None:
    sent = b"".join(json.dumps(request(n, f"t{n}", note="ä")).encode() + b"\r\n" for n in range(3))
    for index in range(len(sent)):
        feeder.stdio.from_client(sent[index : index + 1])
    feeder.stdio.from_server(b"\n".join(json.dumps(answer(n)).encode() for n in range(3)))
    feeder.stdio.from_server(None)
    assert [row[0] for row in outcome(feeder.audit)] == ["t0", "t1", "t2"]


def test_stdio_who_and_trace_known(feeder: Feeder) -> None:
    hello: dict[str, object] = {"protocolVersion": "2025-06-18"}
    hello["clientInfo"] = {"name": "claude-ai", "version": "1.2"}
    feeder.client(
        {"id": 0, "method": "initialize", "params": hello},
        request(1, _meta={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}),
    )
    feeder.server(answer(1))
    hello["clientInfo"] = {"name": "another"}
    feeder.client({"id": 2, "method": "initialize", "params": hello}, request(3))
    feeder.server(answer(3, _meta={"io.modelcontextprotocol/serverInfo": {"name": "newer"}}))
    event, later = recorded(feeder.audit)
    assert (later["client"], later["server"]) == ("another", "newer")
    assert event["client"] == "claude-ai/1.2" and len(event["session_id"]) == 16
    assert (event["caller"], event["trace_id"]) == ("stdio", "0af7651916cd43dd8448eb211c80319c")
    known = {"mcp.protocol.version": "2025-06-18", "parent_span_id": "b7ad6b7169203331"}
    assert json.loads(event["context"]) == known


@pytest.mark.parametrize(
    "line",
    [b"log line of a chatty server", b"", b"\xff\xfe", b"1", b"[1, null]", b'{"method": ["tools/call"]}'],
)
def test_stdio_lines_that_are_no_calls_pass(feeder: Feeder, line: bytes) -> None:
    feeder.client(request(1))
    problem = feeder.stdio.from_client(line + b"\n")
    assert feeder.stdio.from_server(line + b"\n") is None
    feeder.server(answer(1))
    assert outcome(feeder.audit) == [("t", "{}", "success", None)]
    is_json = line[:1] in (b"", b"1", b"[", b"{")
    assert problem is None if is_json else "no JSON" in str(problem)


def test_stdio_number_of_ten_thousand_digits_does_not_hide_a_call(feeder: Feeder) -> None:
    feeder.stdio.from_client(
        b'{"id":1,"method":"tools/call","params":{"name":"t","arguments":{"n":%s}}}\n' % (b"9" * 10_000)
    )
    feeder.server(answer(1))
    assert outcome(feeder.audit)[0][0] == "t"


def test_stdio_too_deep_or_too_long_is_a_fault(feeder: Feeder, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = feeder.stdio.from_client(b'{"a":' + b"[" * 200_000 + b"\n")
    assert "nested too deeply" in str(problem)
    monkeypatch.setattr(mxcp_audit, "MAX_MESSAGE_BYTES", 1000)
    assert feeder.stdio.from_client(b"x" * 600) is None
    problem = feeder.stdio.from_client(b"x" * 600 + b"\n" + json.dumps(request(1)).encode() + b"\n")
    feeder.server(answer(1))
    assert "longer than" in str(problem)
    assert outcome(feeder.audit) == [("t", "{}", "success", None)]
