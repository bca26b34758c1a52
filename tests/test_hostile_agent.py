"""The host against an agent that is hostile itself: H of the catalogue, over the wire."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.errors import SandboxLost
from rlm_core.janitor import REMOVE, Janitor
from rlm_core.session import Session
from rlm_core.transport.stdio import StdioLink
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, echo
from tests.support.hostile_agent import HostileAgent

ZEROS = 400_000_000
EMPTY_MESSAGES = b"\x0a\x00" * 2_000_000
HOST = """
import asyncio, resource, sys
from pathlib import Path
from rlm_core.session import Session
from rlm_core.transport.unix import unix_channel
from tests.conftest import SPEC, echo
from tests.support.hostile_agent import HostileAgent

async def main():
    agent = HostileAgent()
    agent.channel = unix_channel(Path(sys.argv[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        async with Session(agent, SPEC, echo) as session:
            await session.execute("x")
    except Exception as error:
        print(type(error).__name__, error)
    await agent.stop()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)

asyncio.run(main())
"""


async def lost_with(agent: HostileAgent) -> str:
    async with agent:
        with pytest.raises(SandboxLost) as caught:
            async with Session(agent, SPEC, echo) as session:
                await session.execute("x")
    return str(caught.value)


async def host_of(agent: HostileAgent) -> tuple[str, int]:
    """What a host process of its own says of this agent, and the megabytes that it cost it."""
    async with agent:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOST, str(agent.address), stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
    said, megabytes = output.decode().splitlines()
    return said, int(megabytes)


def event(**fields: Any) -> bytes:
    message = pb.AgentMessage(event=pb.CellEvent(**fields))
    return pb.ConnectResponse(messages=[message]).SerializeToString()


@pytest.fixture(autouse=True, params=[False, True], ids=["gRPC", "envelope"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Connect goes by."""
    monkeypatch.setattr(HostileAgent, "is_enveloped", request.param)


@pytest.fixture(autouse=True)
def few_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_RECONNECTS", 2)


@pytest.mark.parametrize(
    "answer",
    [
        b"\x0b" * 20_000,
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\xff" * 1000,
        event(stdout=b"cut off")[:-3],
        event(cell_id="?").replace(b"?", b"\xff"),
        b"",
    ],
    ids=["H01: nested 20,000 deep", "a length beyond the end", "none", "cut off", "H07: no UTF-8", "empty"],
)
async def test_what_is_no_message_ends_the_session(answer: bytes) -> None:
    assert "no message of ours" in await lost_with(HostileAgent([answer]))


async def test_h03_a_message_over_the_limit_ends_the_session() -> None:
    said = await lost_with(HostileAgent([b"\x12" + b"x" * limits.MAX_MESSAGE * 2]))
    assert "larger than max" in said or "longer than any" in said


async def test_h04_a_compressed_bomb_is_not_unpacked() -> None:
    said, megabytes = await host_of(HostileAgent([bytes(ZEROS)], compression=grpc.Compression.Gzip))
    assert said.startswith("SandboxLost") and megabytes < 100, (said, megabytes)


async def test_h05_two_million_empty_messages_are_too_many() -> None:
    said, megabytes = await host_of(HostileAgent([EMPTY_MESSAGES]))
    assert "too many messages" in said and megabytes < 400, (said, megabytes)


async def test_a_cell_ends_once() -> None:
    def ends(cell: str) -> list[bytes]:
        events = [pb.CellEvent(cell_id=cell, index=n, finished=pb.CellFinished()) for n in range(2)]
        messages = [pb.AgentMessage(event=event) for event in events]
        return [pb.ConnectResponse(messages=messages).SerializeToString()]

    async with HostileAgent(ends) as agent, Session(agent, SPEC, echo) as session:
        assert (await session.execute("x")).status == "error"
        with pytest.raises(SandboxLost, match="told of a cell that has ended"):
            await session.execute("x")


@pytest.mark.parametrize(
    "refusal",
    ["\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\nERROR: all is well", "x" * 7000],
    ids=["H10: steers the terminal", "H24: long"],
)
async def test_the_text_of_an_error_is_short_and_can_not_steer(refusal: str) -> None:
    said = await lost_with(HostileAgent(refusal=refusal))
    assert len(said) < 700 and not set(said) & set("\x1b\x07\r\u202e"), said


async def test_h22_an_agent_that_never_reads_holds_up_its_own_session_for_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "CELL_GRACE_SECONDS", 0.2)
    async with HostileAgent(reads=False) as agent, Session(agent, SPEC, echo) as session:
        reply = pb.ConnectRequest(replies=pb.CallReplies(replies=[pb.CallReply(call_id="x" * 1_000_000)]))
        while (await asyncio.wait([asyncio.create_task(session._write(reply))], timeout=1))[0]:
            pass  # until nothing more goes into the stream
        with pytest.raises(SandboxLost, match="did not end a cell"):
            await session.execute("x" * 1_000_000, timeout=0.1)


def calls(number: int, prompt: bytes = b"", **fields: Any) -> Callable[[str], list[bytes]]:
    """An agent's messages with so many calls of the cell that runs."""

    def made(cell: str) -> list[bytes]:
        each = (pb.Call(call_id=f"{cell}/{n}", cell_id=cell, prompt=prompt, **fields) for n in range(number))
        return [
            pb.ConnectResponse(messages=[pb.AgentMessage(call=call)]).SerializeToString() for call in each
        ]

    return made


async def never(call: Call) -> Answer | Failure:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    "agent_calls, said",
    [
        (calls(1, model="m" * (limits.MAX_ID_CHARS + 1)), "a name that is too long"),
        (calls(1, tool="t" * (limits.MAX_ID_CHARS + 1)), "a name that is too long"),
        (calls(4, b"x" * 300), "more calls at once than it may"),
        (calls(6), "more calls at once than it may"),
    ],
    ids=["model", "tool", "bytes of prompts", "number"],
)
async def test_calls_of_an_agent_have_limits(
    agent_calls: Callable[[str], list[bytes]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_OPEN_CALL_BYTES", 1_000)
    monkeypatch.setattr(limits, "MAX_OPEN_CALLS", 5)
    async with HostileAgent(agent_calls) as agent, Session(agent, SPEC, never) as session:
        with pytest.raises(SandboxLost, match=said):
            await session.execute("x", timeout=20)
        assert len(session._calls) == 0


@pytest.mark.parametrize("agent_calls", [calls(3, b"x" * 300), calls(5)], ids=["bytes", "number"])
async def test_calls_within_the_limits_are_at_work(
    agent_calls: Callable[[str], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_OPEN_CALL_BYTES", 1_000)
    monkeypatch.setattr(limits, "MAX_OPEN_CALLS", 5)
    at_work, all_there = 0, asyncio.Event()

    async def count(call: Call) -> Answer | Failure:
        nonlocal at_work
        at_work += 1
        if at_work == len(agent_calls("c")):
            all_there.set()
        return await never(call)

    async with HostileAgent(agent_calls) as agent, Session(agent, SPEC, count) as session:
        cell = asyncio.create_task(session.execute("x"))
        async with asyncio.timeout(20):
            await all_there.wait()
        assert not cell.done()
    with pytest.raises(SandboxLost, match="closed"):
        await cell


@pytest.mark.parametrize("size, least, most", [(1, 12, 12), (limits.MAX_REPLY, 6, 8)], ids=["small", "large"])
async def test_an_agent_that_takes_no_answers_gets_no_more(
    size: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some may be on their way, and four wait: the next is one too many, and after it no call begins."""
    monkeypatch.setattr(limits, "MAX_UNSENT_BYTES", 4 * limits.MAX_REPLY)
    monkeypatch.setattr(limits, "CELL_GRACE_SECONDS", 0.5)
    given, turn = 0, asyncio.Semaphore(0)

    async def answer(call: Call) -> Answer | Failure:
        nonlocal given
        given += 1
        turn.release()
        return Answer("x" * size, "model", TokenUsage())

    async def one_after_the_other(cell: str) -> AsyncIterator[bytes]:
        for message in calls(12)(cell):
            yield message
            if given < 6:
                await turn.acquire()

    async with HostileAgent(one_after_the_other) as agent, Session(agent, SPEC, answer) as session:
        with pytest.raises(SandboxLost, match="did not end a cell"):
            await session.execute("x", timeout=3)
        assert least <= given <= most


async def test_an_agent_that_is_deaf_to_an_interrupt_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INTERRUPT_SECONDS", 0.2)
    async with HostileAgent() as agent, Session(agent, SPEC, echo) as session:
        cell = asyncio.create_task(session.execute("x"))
        async with asyncio.timeout(20):
            await agent.heard.wait()
            cell.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cell
        with pytest.raises(SandboxLost, match="did not interrupt a cell"):
            await session.execute("y")


@pytest.mark.parametrize(
    "greeting",
    [
        b"[" * 100_000 + b"\n",
        b"{" * 1000 + b"\n",
        b"[1]\n",
        b"NaN\n",
        b"\xff\n",
        b"x" * (limits.MAX_GREETING + 1),
    ],
    ids=["H02: nested 100,000 deep", "no JSON", "no object", "no number", "no text", "no end"],
)
async def test_a_greeting_that_is_none_is_one_line(greeting: bytes) -> None:
    link = StdioLink(Janitor.hire(*REMOVE).new_folder(), "s", 10, lambda: None)
    waiting: Callable[[], Any] = lambda: link.begin(NoStream(), {})  # noqa: E731
    begin = asyncio.ensure_future(waiting())
    await asyncio.sleep(0)
    link.feed(greeting)
    with pytest.raises(SandboxLost, match=r"not our agent|too long"):
        await begin
    await link.close()


class NoStream(asyncio.WriteTransport):
    def write(self, data: Any) -> None:
        """To nobody."""
