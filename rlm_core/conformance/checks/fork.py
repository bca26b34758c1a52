"""A second session from the memory of the first."""

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import check, expect
from rlm_core.session import Session
from rlm_core.types import TokenUsage


@check("fork.idle")
async def idle(arena: Arena) -> None:
    """A fork has the variables of its parent, and changes none of them."""
    async with arena.session() as session:
        await session.execute("rows = [1]")
        fork = await session.fork()
        try:
            expect((await fork.execute("rows.append(2)\nprint(rows)")).stdout, "[1, 2]\n")
            expect((await session.execute("print(rows)")).stdout, "[1]\n")
        finally:
            await fork.aclose()


@check("fork.outlives")
async def outlives(arena: Arena) -> None:
    """A fork goes on when its parent has ended."""
    async with arena.session() as session:
        await session.execute("x = 5")
        fork = await session.fork()
    try:
        expect((await fork.execute("print(x)")).stdout, "5\n")
    finally:
        await fork.aclose()


@check("fork.in_a_call")
async def in_a_call(arena: Arena) -> None:
    """A fork in the middle of a cell's call has its prompt as context, and the cell goes on."""
    opened: list[Session] = []

    async def fork_it(call: Call) -> Answer | Failure:
        child = await opened[0].fork(call_id=call.id)
        result = await child.execute("FINAL(f'{context} {secret}')")
        await child.aclose()
        return Answer(result.answer, "child", TokenUsage())

    async with arena.session(fork_it) as session:
        opened.append(session)
        expect((await session.execute("secret = 9\nprint(rlm_query('asked'), secret)")).stdout, "asked 9 9\n")
