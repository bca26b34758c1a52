"""Calls that wait for answers on their way: none begins beyond the limit, and few at once after it."""

import asyncio

import pytest
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.unsent import Unsent


def reply(number: int, size: int) -> pb.CallReply:
    return pb.CallReply(call_id=str(number), answer=pb.CallAnswer(text=b"x" * size))


async def test_waiting_calls_begin_as_there_is_room_and_never_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_REPLY", 1_000)
    monkeypatch.setattr(limits, "MAX_UNSENT_BYTES", 4_000)
    monkeypatch.setattr(limits, "MAX_BATCH_BYTES", 1)
    unsent, begun, most = Unsent(), 0, 0

    async def call(number: int) -> None:
        nonlocal begun
        async with unsent.room():
            begun += 1
            await asyncio.sleep(0)
            unsent.add(str(number), reply(number, 1_000))

    for number in range(5):
        unsent.add(str(number), reply(number, 1_000))
    tasks = [asyncio.ensure_future(call(number)) for number in range(5, 105)]
    await asyncio.sleep(0)
    assert begun == 0
    taken: list[str] = []
    async with asyncio.timeout(10):
        while len(taken) < 105:
            taken += [each.call_id for each in unsent.take().replies]
            for _ in range(5):
                await asyncio.sleep(0)
                most = max(most, len(unsent))
    await asyncio.gather(*tasks)
    assert begun == 100 and sorted(map(int, taken)) == list(range(105))
    assert most <= 5 + 4  # what is over the limit by one, and the calls that then had begun


async def test_a_waiting_call_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_UNSENT_BYTES", 0)
    unsent = Unsent()
    unsent.add("large", reply(0, 1))

    async def call() -> None:
        async with unsent.room():
            raise AssertionError

    first, second = asyncio.ensure_future(call()), asyncio.ensure_future(call())
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled() and second.cancelled()
    unsent.clear()
    async with asyncio.timeout(10), unsent.room():
        assert len(unsent) == 0
