"""Cells that do nothing in Docker, ours and the peer's in turns: what slows the machine slows both."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.ours import THINKING_SECONDS, _no_calls
from rlm_core.environment import make_environment
from rlm_core.session import Session

SANDBOXES, SECONDS, CELLS = 3, 15.0, 20
"""For each context: sandboxes of either, how long they take turns, and cells of ours in a turn; the peer has
one. A shared machine is slow for 5 to 20 s at a time (measured: our cells take up to 1.6 times as long, the
peer's, which also wait for other things, 1.2 times): less would show one such time, and not the machine."""
Figures = dict[str, float]


async def noops(python: str, base_url: str, image: str) -> tuple[Figures, Figures]:
    """Seconds of ours, and of the peer's; `python` is its interpreter."""
    ours, peers = Figures(), Figures()
    for megabytes in (1, 10, 100):
        mine: list[float] = []
        its: list[float] = []
        for _ in range(SANDBOXES):
            async with _session(megabytes) as session, _peer(python, base_url, image, megabytes) as peer:
                end = time.perf_counter() + SECONDS
                while time.perf_counter() < end:
                    mine += await _turn(session)
                    its.append(await _cell(peer))
        name = f"noop_{megabytes}_mb_s"
        ours[name], peers[name] = statistics.median(mine), statistics.median(its)
    return ours, peers


async def _turn(session: Session) -> list[float]:
    seconds: list[float] = []
    for _ in range(CELLS):
        begun = time.perf_counter()
        await session.execute("pass")
        seconds.append(time.perf_counter() - begun)
        await asyncio.sleep(THINKING_SECONDS)
    return seconds


@asynccontextmanager
async def _session(megabytes: int) -> AsyncIterator[Session]:
    environment = make_environment("docker", {})
    sandbox = await environment.start()
    try:
        async with Session(sandbox, environment.spec, _no_calls) as session:
            await session.put_context("x" * (megabytes * 1_000_000))
            yield session
    finally:
        await sandbox.stop()


@asynccontextmanager
async def _peer(
    python: str, base_url: str, image: str, megabytes: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a cell for each line that it is given, and says how long that took."""
    pipe = asyncio.subprocess.PIPE
    command = [python, str(Path(__file__).parent / "peer.py"), base_url, image, str(megabytes)]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        await _cell(process)  # once it is there
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _cell(peer: asyncio.subprocess.Process) -> float:
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write(b"\n")
    return float(await peer.stdout.readline())
