"""The agent's watch over a worker's life."""

import asyncio

import pytest
from rlm_agent import limits
from rlm_agent.watch import Watch


async def sleeper() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec("sleep", "60")


@pytest.mark.parametrize("is_replaced", [True, False])
async def test_a_worker_that_died_is_missed_unless_another_takes_its_place(
    is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "READY_SECONDS", 0.3)
    died, missed = asyncio.Event(), asyncio.Event()
    watch = Watch(died.set, missed.set)
    first, second = await sleeper(), await sleeper()
    try:
        watch.begin(first.pid)
        assert not died.is_set()
        first.kill()
        async with asyncio.timeout(10):
            await died.wait()
        if is_replaced:
            watch.begin(second.pid)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.6):
                    await missed.wait()
        else:
            async with asyncio.timeout(10):
                await missed.wait()
    finally:
        watch.end()
        second.kill()
        for process in (first, second):
            await process.wait()
