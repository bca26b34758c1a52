"""What a cell prints, as it comes and when it has ended."""

import asyncio

from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import check, ensure, expect
from rlm_core.observer import Observer

WAIT_SECONDS = 30.0
PROGRAM = """
import os, subprocess, sys
os.write(1, b"raw\\n")
program = "import os; os.write(1, b'out\\\\n'); os.write(2, b'err\\\\n')"
done = subprocess.run([sys.executable, "-c", program])
"""


class Listener(Observer):
    """Keeps what a session told while it ran, and wakes who waits for it."""

    def __init__(self) -> None:
        self.text = ""
        self._changed = asyncio.Event()

    def output(self, text: str, *, is_error: bool) -> None:
        self.text += text
        self._changed.set()

    async def heard(self, text: str) -> None:
        """Raises TimeoutError when it does not come."""
        async with asyncio.timeout(WAIT_SECONDS):
            while text not in self.text:
                self._changed.clear()
                await self._changed.wait()


@check("output.streams")
async def streams(arena: Arena) -> None:
    """Output arrives while the cell still runs."""
    listener = Listener()
    async with arena.session(observer=listener) as session:
        cell = asyncio.ensure_future(session.execute("print('begun')\nimport time\ntime.sleep(600)"))
        await listener.heard("begun")
        await session.interrupt()
        expect((await cell).stdout, "begun\n")


@check("output.programs")
async def programs(arena: Arena) -> None:
    """Output of subprocesses and of C code is captured, stdout and stderr apart."""
    async with arena.session() as session:
        result = await session.execute(PROGRAM)
        expect((result.stdout, result.stderr), ("raw\nout\n", "err\n"))


@check("output.bounded")
async def bounded(arena: Arena) -> None:
    """Of endless output head and tail are kept, and the rest is counted."""
    async with arena.session() as session:
        result = await session.execute(
            "print('head')\nfor _ in range(200): print('x' * 50_000)\nprint('tail')"
        )
        expect(result.stdout_bytes, 5 + 200 * 50_001 + 5, "the true size")
        ensure(
            result.stdout.startswith("head\n") and result.stdout.endswith("tail\n"), "head or tail is missing"
        )
        ensure(len(result.stdout) < 2_000_000, "more was kept than the limit")
