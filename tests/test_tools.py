"""Tools of the user's: functions of the host that cells call, and data that cells have."""

import asyncio
import functools
import json
import re
import threading
from typing import Any

import pydantic
import pytest

from rlm_core import RLM, ConfigError, LMRequest, ScriptedClient
from rlm_core.broker.call import Answer, Failure
from rlm_core.foreign import Places
from rlm_core.tools import Tools


def run(code: str, **kwargs: Any) -> str:
    child = kwargs.pop("child", "")

    def reply(request: LMRequest) -> str:
        return f"```repl\n{child if 'child task' in request.messages[1]['content'] else code}\n```"

    with RLM(backend=ScriptedClient(reply), max_iterations=1, **kwargs) as rlm:
        return rlm.completion("x").response


def add(a: int, b: int = 10, *, scale: float = 1.0) -> float:
    """Adds two numbers."""
    return (a + b) * scale


async def fetch(name: str) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"name": name, "parts": (1, 2)}


class Store:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str) -> int:
        self.seen.append(text)
        return len(self.seen)

    def all(self) -> list[str]:
        return self.seen


def test_functions_of_the_host_are_called_with_json() -> None:
    store = Store()
    tools = {
        "add": add,
        "fetch": fetch,
        "store": store,
        "stored": store.all,
        "longest": functools.partial(max, key=len),
        "upper": str.upper,
        "limits": {"low": 1, "high": (2, 3), 4: b"bytes"},
        "PI": {"tool": 3.14, "description": "roughly"},
    }
    code = (
        "r = [add(1), add(1, 2, scale=0.5), fetch('n'), store('one'), store('two \\u2603'), stored(), "
        "longest(['a', 'bbb']), upper('x'), limits, PI]\nFINAL(r)"
    )
    assert run(code, custom_tools=tools) == str(
        [
            *(11.0, 1.5, {"name": "n", "parts": [1, 2]}, 1, 2, ["one", "two ☃"], "bbb", "X"),
            *({"low": 1, "high": (2, 3), 4: b"bytes"}, 3.14),
        ]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add('x')", "ToolError.*add: 0: Input should be a valid integer"),
        ("add()", "ToolError.*add: a: Missing required argument"),
        ("add(1, colour=2)", "ToolError.*add: colour: Unexpected keyword argument"),
        ("add(object())", "TypeError.*add: arguments must be made of JSON's types"),
        ("fail()", "ToolError.*RuntimeError: of the tool's own"),
        ("odd()", "ToolError.*what odd returned is not JSON"),
    ],
)
def test_what_goes_wrong_is_an_exception_of_the_cell(call: str, message: str) -> None:
    def fail() -> None:
        raise RuntimeError("of the tool's own")

    tools = {"add": add, "fail": fail, "odd": lambda: threading.Lock()}
    code = f"try:\n    {call}\nexcept Exception as e:\n    FINAL(f'{{type(e).__name__}} {{e}}')"
    answer = run(code, custom_tools=tools)
    assert re.search(message, answer), answer


def test_tools_work_from_threads_and_processes_and_are_restored() -> None:
    code = """
import multiprocessing as mp, threading
got = []
t = threading.Thread(target=lambda: got.append(add(1))); t.start(); t.join()
with mp.get_context("fork").Pool(2) as pool: got += pool.map(add, [2, 3])
add = 5
FINAL([got, sorted(name for name in SHOW_VARS().split() if name == "add")])
"""
    assert run(code, custom_tools={"add": add}) == "[[11.0, 12.0, 13.0], []]"


def test_a_child_has_the_tools_that_are_for_it() -> None:
    code = "FINAL([add(1), rlm_query('child task')])"
    child = "FINAL(['add' in globals(), 'note' in globals(), globals().get('note')])"
    same = run(code, custom_tools={"add": add}, max_depth=2, child=child)
    assert same == "[11.0, '[True, False, None]']"
    none = run(code, custom_tools={"add": add}, custom_sub_tools={}, max_depth=2, child=child)
    assert none == "[11.0, '[False, False, None]']"
    own = run(code, custom_tools={"add": add}, custom_sub_tools={"note": "n"}, max_depth=2, child=child)
    assert own == "[11.0, \"[False, True, 'n']\"]"


async def test_a_tool_that_is_not_this_levels_is_refused_by_the_host() -> None:
    tools = Tools.of({"add": add, "PI": 3})
    for name in ("other", "PI", "__class__"):
        assert isinstance(await tools.call(name, '{"args": [], "kwargs": {}}'), Failure)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"args": 1, "kwargs": {}}', "[" * 100_000, "\x00", '{"args": [], "kwargs": []}']
)
async def test_hostile_arguments_are_a_failure(text: str) -> None:
    assert isinstance(await Tools.of({"add": add}).call("add", text), Failure)


async def test_slow_functions_hold_up_nothing_else() -> None:
    gate = threading.Event()
    tools = Tools.of({"slow": lambda: gate.wait(20), "quick": lambda: 1})
    slow = asyncio.ensure_future(tools.call("slow", '{"args": [], "kwargs": {}}'))
    quick = await asyncio.wait_for(tools.call("quick", '{"args": [], "kwargs": {}}'), 10)
    assert isinstance(quick, Answer) and json.loads(quick.text) == 1 and not slow.done()
    gate.set()
    await slow


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"llm_query": add}, "the REPL has that name for itself"),
        ({"context_3": 1}, "the REPL has that name"),
        ({"history": 1}, "the REPL has that name"),
        ({"two words": add}, "must be one of a Python variable"),
        ({"class": add}, "must be one of a Python variable"),
        ({"_private": add}, "must be one of a Python variable"),
        ({"lock": threading.Lock()}, "neither a function nor plain data"),
        ([add], "custom_tools must be Mapping or None"),
    ],
)
def test_wrong_tools_are_refused_before_anything_starts(tools: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RLM(backend=ScriptedClient(["x"]), custom_tools=tools)


def test_the_model_is_told_of_them() -> None:
    lm = ScriptedClient(["```repl\nFINAL(1)\n```"])
    tools = {"add": add, "PI": {"tool": 3.14, "description": "roughly {pi}"}}
    with RLM(backend=lm, custom_tools=tools, custom_system_prompt="Mine, with {braces}.") as rlm:
        rlm.completion("x")
    system = lm.requests[0].messages[0]["content"]
    assert system.startswith("Mine, with {braces}.")
    assert "- `add(a: int, b: int = 10, *, scale: float = 1.0) -> float`: Adds two numbers." in system
    assert "- `PI`: a float. roughly {pi}" in system


def test_a_tool_that_leaves_by_another_door_is_an_exception_too() -> None:
    class Panic(BaseException):
        pass

    def leave() -> None:
        raise SystemExit(2)

    def panic() -> None:
        raise Panic("at the disco")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    tools = {"leave": leave, "panic": panic, "cancelled": cancelled, "stop": lambda: next(iter([]))}
    code = "said = []\nfor tool in (leave, panic, cancelled, stop):\n"
    code += "    try: tool()\n    except Exception as e: said.append(f'{type(e).__name__} {e}')\nFINAL(said)"
    answer = run(code, custom_tools=tools, environment_kwargs={"cell_timeout": 20})
    assert answer.count("ToolError") == 4 and "SystemExit(2)" in answer and "at the disco" in answer


async def test_arguments_have_a_limit() -> None:
    huge = json.dumps({"args": ["x" * (2 << 20)], "kwargs": {}})
    result = await Tools.of({"add": add}).call("add", huge)
    assert isinstance(result, Failure) and result.code == "TOO_LARGE"


async def test_a_partial_keeps_what_it_was_given() -> None:
    tools = Tools.of({"read": functools.partial(lambda path, root: f"{root}/{path}", root="/srv")})
    assert (await tools.call("read", '{"args": ["a"], "kwargs": {}}')).text == '"/srv/a"'  # type: ignore[union-attr]
    stolen = await tools.call("read", '{"args": ["shadow"], "kwargs": {"root": "/etc"}}')
    assert isinstance(stolen, Failure) and stolen.message == "read: root: Unexpected keyword argument"
    assert tools.descriptions[0].partition(":")[0] == "`read(path)`"


async def test_what_a_tool_validates_itself_is_its_own_error() -> None:
    class Row(pydantic.BaseModel):
        number: int

    def look(number: int) -> int:
        return Row(number="x").number  # type: ignore[arg-type]

    tools = Tools.of({"look": look})
    own = await tools.call("look", '{"args": [1], "kwargs": {}}')
    wrong = await tools.call("look", '{"args": ["x"], "kwargs": {}}')
    assert isinstance(own, Failure) and own.code == "PROVIDER" and "ValidationError" in own.message
    assert isinstance(wrong, Failure) and wrong.code == "INVALID" and wrong.message.startswith("look: 0:")


def test_a_cell_can_catch_what_a_tool_raises() -> None:
    def fails() -> None:
        raise ValueError("no")

    code = "```repl\ntry:\n  fails()\nexcept ToolError as error:\n  FINAL(f'caught {error}')\n```"
    with RLM(ScriptedClient([code]), custom_tools={"fails": fails}) as rlm:
        assert rlm.completion("x").response == "caught ValueError: no"


async def test_a_call_has_no_more_values_than_the_host_can_check() -> None:
    tools = Tools.of({"now": lambda: "noon"})
    answer = await tools.call("now", '{"args": [' + "0," * 500_000 + '0], "kwargs": {}}')
    assert isinstance(answer, Failure) and answer.code == "TOO_LARGE"
    nested = await tools.call("now", '{"args": ' + "[[0]," * 400 + "0" + "]" * 400 + ', "kwargs": {}}')
    assert isinstance(nested, Failure) and nested.code == "INVALID"


async def test_a_function_has_its_place_until_its_thread_has_ended() -> None:
    places, gate, begun = Places(2), threading.Event(), threading.Semaphore(0)

    def waits() -> None:
        begun.release()
        gate.wait(20)

    calls = [asyncio.create_task(places.call(waits)) for _ in range(2)]
    for _ in calls:
        assert await asyncio.to_thread(begun.acquire, timeout=20)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    third = asyncio.create_task(places.call(lambda: "in turn"))
    await asyncio.wait([third], timeout=0.2)
    assert not third.done()
    gate.set()
    assert await third == "in turn"


async def test_arguments_of_partials_and_classes_are_checked_and_nan_is_no_number() -> None:
    class Query:
        def __init__(self, text: str) -> None:
            self.text = text

    def read(path: str, root: str) -> str:
        return f"{root}/{path}"

    def wait(seconds: float, function: str = "") -> float:
        return seconds

    tools = Tools.of({"read": functools.partial(read, root="/srv"), "Query": Query, "wait": wait})
    for name, args in (("read", "6"), ("Query", '{"$ne": null}'), ("wait", "NaN"), ("wait", "Infinity")):
        answer = await tools.call(name, f'{{"args": [{args}], "kwargs": {{}}}}')
        assert isinstance(answer, Failure) and answer.code == "INVALID", answer
    named = await tools.call("wait", '{"args": [1], "kwargs": {"function": "f"}}')
    assert not isinstance(named, Failure) and named.text == "1.0"
