"""A second session from the memory of the first: idle, or in the middle of a call."""

import asyncio

import pytest

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import Sandbox
from rlm_core.errors import ConfigError
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, echo
from tests.support.processes import only


async def test_a_fork_of_an_idle_session_has_its_variables_and_not_its_fate(session: Session) -> None:
    await session.put_context("the text")
    await session.execute("rows = [1, 2]\ndef f(): return len(rows)\nanswer['content'] = 'so far'")
    fork = await session.fork()
    assert (await fork.execute("rows.append(3); print(f(), context, answer)")).stdout == (
        "3 the text {'content': 'so far', 'ready': False}\n"
    )
    assert (await session.execute("print(f(), llm_query('a'))")).stdout == "2 echo a\n"
    assert (await fork.execute("import os; os._exit(1)")).rolled_back
    assert (await fork.execute("print(f(), llm_query('b'))")).stdout == "3 echo b\n"
    await session.aclose()
    assert (await fork.execute("print(f())")).stdout == "3\n"
    await fork.aclose()


async def test_a_fork_is_open_already_and_entering_it_opens_no_second_stream(session: Session) -> None:
    await session.execute("n = 1")
    fork = await session.fork()
    stream = fork._stream
    async with fork:
        assert fork._stream is stream
        assert (await fork.execute("print(n)")).stdout == "1\n"


async def test_forks_of_forks_all_end(sandbox: Sandbox) -> None:
    first = Session(sandbox, SPEC, echo)
    await first.open()
    sessions = [first]
    for number in range(4):
        await sessions[-1].execute(f"n = {number}")
        sessions.append(await sessions[-1].fork())
    assert (await sessions[-1].execute("print(n)")).stdout == "3\n"
    for each in sessions:
        await each.aclose()
    await only(1, below=sandbox.pid)  # type: ignore[attr-defined]


async def test_a_fork_in_the_middle_of_a_call_never_returns_to_the_cell(sandbox: Sandbox) -> None:
    seen: list[str] = []

    async def fork_on_rlm(call: Call) -> Answer | Failure:
        child = await session.fork(call_id=call.id)
        result = await child.execute(
            "print(context, '|', parent_context, '|', secret, '|', answer)\nsecret = 'changed'\nFINAL(context[::-1])"
        )
        seen.append(result.stdout + result.stderr)
        await child.aclose()
        return Answer(result.answer, "child", TokenUsage())

    async with Session(sandbox, SPEC, fork_on_rlm) as session:
        await session.put_context("parent text")
        await session.execute("answer['content'] = 'open'")
        result = await session.execute(
            "secret = 'of the parent'\nr = rlm_query('abc')\nprint(r, secret, rlm_query_batched(['x1', 'y2']))"
        )
    assert result.stdout == "cba of the parent ['1x', '2y']\n", result.stderr
    assert seen[0] == "abc | parent text | of the parent | {'content': '', 'ready': False}\n"
    assert len(seen) == 3


async def test_where_threads_run_a_fork_is_refused_with_its_reason(sandbox: Sandbox) -> None:
    refused: list[str] = []

    async def fork_on_rlm(call: Call) -> Answer | Failure:
        try:
            await session.fork(call_id=call.id)
        except ConfigError as error:
            refused.append(str(error))
        return await echo(call)

    async with Session(sandbox, SPEC, fork_on_rlm) as session:
        result = await session.execute(
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(2) as pool: print(list(pool.map(rlm_query, ['a', 'b'])))"
        )
    assert result.stdout == "['echo a', 'echo b']\n"
    assert refused and "thread" in refused[0]


async def test_forking_where_no_call_waits_is_an_error(session: Session) -> None:
    with pytest.raises(ConfigError, match="no call"):
        await session.fork(call_id="c1/1")
    assert (await session.execute("print(1)")).stdout == "1\n"


async def test_many_sessions_of_one_agent_work_at_once(sandbox: Sandbox) -> None:
    sessions = [Session(sandbox, SPEC, echo) for _ in range(8)]
    await asyncio.gather(*(each.open() for each in sessions))
    results = await asyncio.gather(
        *(each.execute(f"import os; x = {n}; print(x, llm_query('{n}'))") for n, each in enumerate(sessions))
    )
    assert [each.stdout for each in results] == [f"{n} echo {n}\n" for n in range(8)]
    await asyncio.gather(*(each.aclose() for each in sessions))
    folder = sandbox.shared_folder.parent  # type: ignore[union-attr]
    assert [*(folder / "work").iterdir(), *(folder / "calls").iterdir()] == []


async def test_a_fork_waits_for_the_answers_that_are_on_their_way_to_the_same_thread(
    sandbox: Sandbox,
) -> None:
    large = "x" * 3_000_000

    async def answer(call: Call) -> Answer | Failure:
        if int(call.prompt) < 6:
            return Answer(large, "m", TokenUsage())
        child = await session.fork(call_id=call.id, handle_call=echo)
        told = (await child.execute("print(context)")).stdout
        await child.aclose()
        return Answer(f"child {told.strip()}", "m", TokenUsage())

    async with Session(sandbox, SPEC, answer) as session:
        for _ in range(3):
            result = await session.execute(
                "for each in rlm_query_batched([str(n) for n in range(12)]): print(each[:8], len(each))"
            )
            wanted = [f"xxxxxxxx {len(large)}"] * 6 + [
                f"child {n}"[:8] + f" {len(f'child {n}')}" for n in range(6, 12)
            ]
            assert result.stdout.splitlines() == wanted, result.stdout
