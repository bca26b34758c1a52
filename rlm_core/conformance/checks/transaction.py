"""A cell is a transaction: whatever ends it, no variable is lost."""

import asyncio

from rlm_core.cell import CellResult
from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import NotApplicable, check, ensure, expect
from rlm_core.conformance.checks.output import Listener
from rlm_core.session import Session

SEGFAULT = "import ctypes; ctypes.string_at(0)"
HANG_IN_C = "import ctypes, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\nctypes.PyDLL(None).pause()"
TAKE_MEMORY = "block = bytearray({bytes})\nfor i in range(0, len(block), 4096): block[i] = 1"


async def _died(session: Session, code: str, timeout: float | None = None) -> CellResult:
    """Run a cell that dies, and see that nothing was lost."""
    await session.execute("kept = [1, 2]")
    result = await session.execute(f"kept.append(3)\nlost = 1\n{code}", timeout=timeout)
    expect(result.status, "rolled_back", "the status")
    ensure(result.rollback, "no reason is given")
    expect((await session.execute("print(kept, 'lost' in globals())")).stdout, "[1, 2] False\n")
    return result


@check("transaction.exit")
async def exits(arena: Arena) -> None:
    """A cell that ends its process is rolled back."""
    async with arena.session() as session:
        await _died(session, "import os; os._exit(3)")


@check("transaction.crash")
async def crash(arena: Arena) -> None:
    """A cell that crashes in native code is rolled back."""
    async with arena.session() as session:
        await _died(session, SEGFAULT)


@check("transaction.memory")
async def memory(arena: Arena) -> None:
    """A cell over the memory limit gets MemoryError or is rolled back; the session lives."""
    if "memory" not in type(arena.environment).capabilities.enforces:
        raise NotApplicable("memory is not limited")
    async with arena.fresh(memory="512MiB") as (_, session):
        await session.execute("kept = [1, 2]")
        result = await session.execute(TAKE_MEMORY.format(bytes=1 << 30))
        ensure(
            result.rolled_back or (result.error is not None and result.error.type == "MemoryError"),
            f"it ended with status {result.status!r}",
        )
        expect((await session.execute("print(kept)")).stdout, "[1, 2]\n")


@check("transaction.timeout")
async def timeout(arena: Arena) -> None:
    """A cell whose time is up is interrupted, and its variables stay."""
    async with arena.session() as session:
        result = await session.execute("n = 1\nwhile True: n += 1", timeout=0.3)
        expect(result.status, "timeout")
        expect((await session.execute("n > 1")).stdout, "True\n")


@check("transaction.hang")
async def hang(arena: Arena) -> None:
    """A cell that hangs in native code is killed and rolled back."""
    async with arena.session() as session:
        await _died(session, HANG_IN_C, timeout=0.3)


@check("transaction.interrupt")
async def interrupt(arena: Arena) -> None:
    """The host can interrupt a cell; the session goes on with its variables."""
    listener = Listener()
    async with arena.session(observer=listener) as session:
        cell = asyncio.ensure_future(session.execute("kept = 7\nprint('on')\nimport time\ntime.sleep(600)"))
        await listener.heard("on")
        await session.interrupt()
        expect((await cell).status, "interrupted")
        expect((await session.execute("print(kept)")).stdout, "7\n")


@check("transaction.cancel")
async def cancel(arena: Arena) -> None:
    """A cell whose caller was cancelled is stopped, and the next one runs."""
    listener = Listener()
    async with arena.session(observer=listener) as session:
        cell = asyncio.ensure_future(session.execute("print('on')\nwhile True: pass"))
        await listener.heard("on")
        cell.cancel()
        await asyncio.wait([cell])
        expect((await session.execute("print('next')")).stdout, "next\n")


@check("transaction.apart")
async def apart(arena: Arena) -> None:
    """What ends a cell of one session does nothing to another."""
    async with arena.session() as one, arena.session() as two:
        await two.execute("kept = 1")
        await _died(one, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        expect((await two.execute("print(kept)")).stdout, "1\n")
