"""`llm_query` and its kin: out of the sandbox to the host and back, many at once."""

import asyncio

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.conformance.arena import Arena, echo
from rlm_core.conformance.check import check, expect

WAIT_SECONDS = 30.0
AT_ONCE = 8
FROM_EVERYWHERE = """
import subprocess, sys, threading
said = []
thread = threading.Thread(target=lambda: said.append(llm_query('from a thread')))
thread.start(); thread.join()
program = "from rlm_agent.repl import llm_query; print(llm_query('from a program'), end='')"
said.append(subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout)
print(said)
"""


@check("calls.one")
async def one(arena: Arena) -> None:
    """A call reaches the host with its prompt and model, and its answer is a str that says so."""
    async with arena.session() as session:
        result = await session.execute(
            "r = llm_query('é\\0', model='m')\nprint(ascii(str(r)), r.ok, r.model)"
        )
        expect(result.stdout, f"{'echo é' + chr(0)!a} True m\n")


@check("calls.failure")
async def failure(arena: Arena) -> None:
    """A call that fails is an answer, and in a batch it fails one slot."""
    async with arena.session() as session:
        result = await session.execute("print([r.ok for r in llm_query_batched(['a', 'fail', 'c'])])")
        expect(result.stdout, "[True, False, True]\n")


@check("calls.batch")
async def batch(arena: Arena) -> None:
    """The answers of 200 calls come back in the order of their prompts."""
    async with arena.session() as session:
        code = "print(llm_query_batched([str(n) for n in range(200)]) == [f'echo {n}' for n in range(200)])"
        expect((await session.execute(code)).stdout, "True\n")


@check("calls.at_once")
async def at_once(arena: Arena) -> None:
    """Eight calls of a batch are with the host at the same time."""
    waiting: set[str] = set()
    all_there = asyncio.Event()

    async def wait_for_all(call: Call) -> Answer | Failure:
        waiting.add(call.prompt)
        if len(waiting) == AT_ONCE:
            all_there.set()
        async with asyncio.timeout(WAIT_SECONDS):
            await all_there.wait()
        return await echo(call)

    async with arena.session(wait_for_all) as session:
        code = f"print(all(r.ok for r in llm_query_batched([str(n) for n in range({AT_ONCE})])))"
        expect((await session.execute(code)).stdout, "True\n")


@check("calls.from_everywhere")
async def from_everywhere(arena: Arena) -> None:
    """Calls work from threads and from programs that a cell starts."""
    async with arena.session() as session:
        result = await session.execute(FROM_EVERYWHERE)
        expect(result.stdout, "['echo from a thread', 'echo from a program']\n")


@check("calls.large")
async def large(arena: Arena) -> None:
    """A prompt of 3 MB and an answer of 3 MB arrive whole."""
    async with arena.session() as session:
        code = "p = 'x' * 3_000_000\nr = llm_query(p)\nprint(len(r), r == 'echo ' + p)"
        expect((await session.execute(code)).stdout, "3000005 True\n")


@check("calls.cancelled")
async def cancelled(arena: Arena) -> None:
    """A cell that ends cancels the calls that it had open, on the host."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def never(call: Call) -> Answer | Failure:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with arena.session(never) as session, asyncio.timeout(WAIT_SECONDS):
        cell = asyncio.ensure_future(session.execute("llm_query('x')"))
        await began.wait()
        await session.interrupt()
        expect((await cell).status, "interrupted")
        await ended.wait()


@check("calls.long_wait")
async def long_wait(arena: Arena) -> None:
    """A call that waits while output flows holds up neither."""

    async def late(call: Call) -> Answer | Failure:
        await asyncio.sleep(1)
        return await echo(call)

    code = (
        "import threading\nthread = threading.Thread(target=lambda: print(llm_query('x')))\nthread.start()\n"
        "for n in range(2000): print('.' * 100)\nthread.join()"
    )
    async with arena.session(late) as session:
        expect((await session.execute(code)).stdout.endswith("echo x\n"), True, "the answer after the output")
