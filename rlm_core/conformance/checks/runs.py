"""Whole runs: children, tools, contexts that add up, limits."""

import asyncio
from collections.abc import Callable
from typing import Any

from rlm_core import repl_history
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.budget import Limits
from rlm_core.clients import LMRequest, LMResponse, ScriptedClient
from rlm_core.compaction import Compaction
from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import check, expect
from rlm_core.context import encode
from rlm_core.persistence import PersistentRepl
from rlm_core.run import LoopConfig, Run, Task
from rlm_core.tools import Tools
from rlm_core.types import TokenUsage

PARENT = "```repl\nshared = [1]\ntold = rlm_query('child task')\nFINAL([str(told), told.ok, shared])\n```"
CHILD = "```repl\nshared = globals().get('shared', []) + [2]\nFINAL([context, shared])\n```"
FORKED = "[\"['child task', [1, 2]]\", True, [1]]"
APART = "[\"['child task', [2]]\", True, [1]]"
WAIT_SECONDS = 30.0


def _run(reply: Callable[[LMRequest], Any], limits: Limits | None = None, **config: Any) -> Run:
    broker = Broker(Models([ScriptedClient(reply)]), BrokerConfig(limits=limits or Limits()))
    return Run(Task("text", encode("text"), "question"), LoopConfig(**config), broker)


async def _answer(arena: Arena, run: Run) -> str:
    async with arena.session(run.handle) as session:
        return (await run.complete_in(session, arena.environment, forked=False)).response


def _family(request: LMRequest) -> str:
    return CHILD if "child task" in request.messages[1]["content"] else PARENT


@check("runs.child")
async def child(arena: Arena) -> None:
    """A child run sees its parent's variables, and changes none of them."""
    expect(await _answer(arena, _run(_family, max_depth=2)), FORKED)


@check("runs.child_apart")
async def child_apart(arena: Arena) -> None:
    """A child run can have a sandbox of its own."""
    expect(await _answer(arena, _run(_family, max_depth=2, child_isolation="sandbox")), APART)


@check("runs.children")
async def children(arena: Arena) -> None:
    """Child runs of a batch run at once, and each answers in its own slot."""
    asks = "told = rlm_query_batched(['child task 1', 'child task 2'])"
    code = f"```repl\n{asks}\nFINAL([str(each) for each in told])\n```"
    both = asyncio.Barrier(2)

    async def reply(request: LMRequest) -> str:
        if "child task" not in request.messages[1]["content"]:
            return code
        async with asyncio.timeout(WAIT_SECONDS):
            await both.wait()
        return "```repl\nFINAL(context[-1])\n```"

    expect(await _answer(arena, _run(reply, max_depth=2)), "['1', '2']")


@check("runs.tools")
async def tools(arena: Arena) -> None:
    """Cells call functions of the host, and have its data."""

    async def triple(number: int) -> int:
        return number * 3

    given = Tools.of(
        {"double": lambda number: number * 2, "triple": triple, "facts": {"a": (1, b"x")}},
    )
    code = "```repl\nFINAL([double(21), triple(5), facts])\n```"
    expect(await _answer(arena, _run(lambda request: code, tools=given)), "[42, 15, {'a': (1, b'x')}]")


@check("runs.again")
async def again(arena: Arena) -> None:
    """A session takes another context, and the conversation about the one before."""
    async with arena.session() as session:
        await session.put_context("one")
        await session.execute("kept = context; FINAL(1)")
        await repl_history.bind(session, ["history_0", "history"], [{"role": "user", "content": "é"}])
        await session.put_context("two")
        result = await session.execute("print(kept, context_0, context, history_0 == history, answer)")
        expect(result.stdout, "one one two True {'content': '', 'ready': False}\n")


@check("runs.persistent")
async def persistent(arena: Arena) -> None:
    """A REPL that outlives a run has its variables, its context and its conversation for the next one."""
    first = "```repl\nkept = context; FINAL(1)\n```"
    second = "```repl\nFINAL([kept, context_0, context_1, history_0 == history, len(history) > 1])\n```"
    repl = PersistentRepl(arena.environment)
    try:
        await repl.complete(_run(lambda request: first))
        answer = (await repl.complete(_run(lambda request: second))).response
    finally:
        await repl.aclose()
    expect(answer, "['text', 'text', 'text', True, True]")


@check("runs.compaction")
async def compaction(arena: Arena) -> None:
    """A conversation that fills the LM's window goes on from a summary, with all of it in the REPL."""
    last = "```repl\nFINAL([x, str(history).count('x = 42')])\n```"
    replies = iter(["```repl\nx = 42\n```", "SUMMARY", last])
    seen: list[str] = []

    def reply(request: LMRequest) -> LMResponse:
        seen.append(str(request.messages))
        return LMResponse(next(replies), "m", TokenUsage(100_000, 20_000))

    expect(await _answer(arena, _run(reply, compaction=Compaction())), "[42, 1]")
    expect(("SUMMARY" in seen[2], "x = 42" in seen[2]), (True, False))


@check("runs.limit")
async def limit(arena: Arena) -> None:
    """A limit holds in the middle of a batch."""
    code = "```repl\nr = llm_query_batched(['q'] * 9)\nFINAL(sum(each.ok for each in r))\n```"
    run = _run(lambda request: code, Limits(max_calls=5))
    expect(await _answer(arena, run), "4")


@check("runs.cancel")
async def cancel(arena: Arena) -> None:
    """What ends a run ends the calls of its cells and of its children's."""
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def reply(request: LMRequest) -> str:
        if len(request.messages) > 1:
            is_child = "child task" in request.messages[1]["content"]
            asks = "llm_query('leaf')" if is_child else "rlm_query('child task')"
            return f"```repl\n{asks}\n```"
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    run = asyncio.ensure_future(_answer(arena, _run(reply, max_depth=2)))
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await waiting.wait()
            run.cancel()
            await ended.wait()
    finally:
        run.cancel()
        await asyncio.wait({run})
