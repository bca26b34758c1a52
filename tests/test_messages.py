"""Streams of messages in the envelope: whole, in order, held back, and ended with a status."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlm_agent import errors
from rlm_agent.direct import Direct, DirectCall
from rlm_agent.rpc import tunnel as tunnels
from rlm_agent.rpc.envelope import LINK_ID_BYTES, WINDOW, Envelope, EnvelopeError, Kind
from rlm_agent.rpc.messages import MAX_MESSAGE, MAX_UNREAD, PREFIX, MessageStream
from rlm_agent.rpc.tunnel import Dial, Serve, Tunnel
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.errors import SandboxLost
from rlm_core.transport.stream import DirectStream
from tests.support.pipe import Pipe

SECONDS = 30
BEAT = 0.05
GREETING = b"token"


@asynccontextmanager
async def linked(serve: Serve, dial: Dial | None = None) -> AsyncIterator[tuple[Tunnel, Pipe, Pipe]]:
    """The host's tunnel to an agent that serves, and the pipes down and up."""
    host, agent = Tunnel(Envelope(b"h" * LINK_ID_BYTES)), Tunnel(Envelope(None), serve=serve, dial=dial)
    down, up = Pipe(agent.feed), Pipe(host.feed)
    agent.connected(up)
    host.connected(down)
    for each in (host, agent):
        each.keep(BEAT * tunnels.BEATS_PER_LEASE)
    try:
        async with asyncio.timeout(SECONDS):
            yield host, down, up
    finally:
        for each in (host, agent):
            each.close()
            await each.closed()


async def echo(stream: MessageStream, greeting: bytes) -> None:
    assert greeting == GREETING
    while (message := await stream.read()) is not None:
        await stream.write(message)


@pytest.mark.parametrize("payload", [b"", GREETING], ids=["connection", "stream"])
async def test_an_agent_opens_nothing(payload: bytes) -> None:
    agent = Envelope(b"a" * LINK_ID_BYTES)
    agent.send(Kind.OPEN, 1, payload)
    host = Tunnel(Envelope(b"a" * LINK_ID_BYTES))
    with pytest.raises(EnvelopeError, match="serves none"):
        host.feed(agent.take(1))


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.CLOSE])
async def test_frames_for_nobody_are_counted(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_agent.rpc.envelope.MAX_IDLE", 10)
    agent, host = Envelope(b"a" * LINK_ID_BYTES), Tunnel(Envelope(b"a" * LINK_ID_BYTES))
    for _ in range(10):
        agent.send(kind, 7, b"x")
    host.feed(agent.take(10_000))
    agent.send(kind, 7, b"x")
    with pytest.raises(EnvelopeError, match="than a stream needs"):
        host.feed(agent.take(1))


sizes = st.lists(
    st.sampled_from([0, 1, 100, 65_530, 65_531, 65_536, 200_000]) | st.integers(0, 3000), max_size=12
)


@given(sizes, st.sets(st.integers(0, 11), max_size=3))
@settings(max_examples=40, deadline=None)
def test_messages_of_any_size_arrive_whole_and_in_order_over_a_stream_that_breaks(
    sizes: list[int], cuts: set[int]
) -> None:
    messages = [bytes([index]) * size for index, size in enumerate(sizes)]

    async def run() -> list[bytes | None]:
        async with linked(echo) as (host, down, up):
            stream = host.open_stream(GREETING)
            reading = asyncio.ensure_future(_read(stream, len(messages)))
            for index, message in enumerate(messages):
                down.cut = up.cut = index in cuts
                await stream.write(message)
                if down.cut:
                    await asyncio.sleep(0)
                    down.cut = up.cut = False
                    host.connected(down)
            return await reading

    assert asyncio.run(run()) == messages


async def _read(stream: MessageStream, number: int) -> list[bytes | None]:
    return [await stream.read() for _ in range(number)]


async def test_who_does_not_read_holds_up_who_writes_and_nothing_is_lost() -> None:
    gate = asyncio.Event()

    async def late(stream: MessageStream, greeting: bytes) -> None:
        await gate.wait()
        await echo(stream, greeting)

    message, streams = b"x" * 100_000, 20
    async with linked(late) as (host, _, _):
        opened = [host.open_stream(GREETING) for _ in range(streams)]
        written = 0

        async def write(stream: MessageStream) -> None:
            nonlocal written
            for _ in range(20):
                await stream.write(message)
                written += len(message)

        writing = [asyncio.ensure_future(write(stream)) for stream in opened]
        done, _ = await asyncio.wait(writing, timeout=10 * BEAT)
        assert len(done) < streams
        assert written <= WINDOW + streams * MAX_UNREAD
        gate.set()
        got = await asyncio.gather(*(_read(stream, 20) for stream in opened))
        await asyncio.gather(*writing)
    assert got == [[message] * 20] * streams


async def test_a_stream_that_ends_unread_lets_go_of_the_others() -> None:
    async def only_the_second(stream: MessageStream, greeting: bytes) -> None:
        if greeting == GREETING:
            await echo(stream, greeting)

    async with linked(only_the_second) as (host, _, _):
        unread = host.open_stream(b"unread")
        await unread.write(b"x" * 2 * MAX_UNREAD)
        unread.end()
        stream = host.open_stream(GREETING)
        for _ in range(5):
            await stream.write(b"y" * WINDOW)
            assert await stream.read() == b"y" * WINDOW


async def test_each_has_its_turn_however_much_another_one_sends(tmp_path: Path) -> None:
    shouted = asyncio.Event()

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        shouted.set()

    async def take(stream: MessageStream, greeting: bytes) -> None:
        while (message := await stream.read()) is not None:
            if greeting == GREETING:
                await stream.write(message)

    address = str(tmp_path / "server")
    loop = asyncio.get_running_loop()
    async with (
        await asyncio.start_unix_server(shout, address),
        linked(take, lambda end: loop.create_unix_connection(end, address)) as (host, _, _),
        await loop.create_unix_server(host.accept, str(tmp_path / "relay")),
    ):
        flood = host.open_stream(b"flood")

        async def send_without_end() -> None:
            while True:
                await flood.write(b"x" * WINDOW)

        flooding = asyncio.ensure_future(send_without_end())
        stream = host.open_stream(GREETING)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay"))
        for number in range(20):
            message = b"%d" % number
            await stream.write(message)
            writer.write(message)
            assert await stream.read() == await reader.readexactly(len(message)) == message
        assert not flooding.done()
        flooding.cancel()
        writer.close()
        await writer.wait_closed()
        await shouted.wait()


async def test_a_message_over_the_limit_ends_its_stream_and_no_other() -> None:
    async with linked(echo) as (host, _, _):
        stream, other = host.open_stream(GREETING), host.open_stream(GREETING)
        with pytest.raises(ConnectionError):
            await stream.write(b"x" * (MAX_MESSAGE + 1))
        assert await DirectStream(stream, lambda: False).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await other.write(b"x" * MAX_MESSAGE)
        assert await other.read() == b"x" * MAX_MESSAGE


async def test_a_stream_of_a_link_that_has_ended_has_ended_too() -> None:
    async with linked(echo) as (host, _, _):
        before = host.open_stream(GREETING)
        host.end()
        late = host.open_stream(GREETING)
        assert await before.read() is await late.read() is None
        assert await DirectStream(late, lambda: False).code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(SandboxLost, match="stopped"):
            await DirectStream(late, lambda: True).read()


async def test_empty_messages_count_too() -> None:
    async with linked(echo) as (host, _, _):
        stream = host.open_stream(GREETING)
        stream.deliver(PREFIX.pack(0, 0) * (MAX_UNREAD // PREFIX.size))
        assert not stream.full
        stream.deliver(PREFIX.pack(0, 0))
        assert stream.full
        assert await stream.read() == b""
        assert not stream.full


@pytest.mark.parametrize(
    "prefix", [PREFIX.pack(1, 5), PREFIX.pack(0, MAX_MESSAGE + 1)], ids=["zipped", "long"]
)
async def test_what_is_no_message_breaks_the_link(prefix: bytes) -> None:
    async with linked(echo) as (host, _, _):
        with pytest.raises(EnvelopeError):
            host.open_stream(GREETING).deliver(prefix)


async def test_a_write_that_is_cancelled_ends_the_stream() -> None:
    gate, ended = asyncio.Event(), asyncio.Event()

    async def late(stream: MessageStream, greeting: bytes) -> None:
        await gate.wait()
        while await stream.read() is not None:
            pass
        ended.set()

    async with linked(late) as (host, _, _):
        stream = host.open_stream(GREETING)
        await stream.write(b"x" * MAX_UNREAD * 2)  # more than the other end keeps
        writing = asyncio.ensure_future(stream.write(b"x" * MAX_MESSAGE))
        assert not (await asyncio.wait([writing], timeout=2 * BEAT))[0]
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert await stream.read() is None
        with pytest.raises(ConnectionError):
            await stream.write(b"more")
        gate.set()
        await ended.wait()


async def test_a_stream_that_ended_gives_what_had_come_before() -> None:
    async def say_and_go(stream: MessageStream, greeting: bytes) -> None:
        await stream.write(b"last words")
        if greeting == GREETING:
            stream.end(b"\x0fgone")

    async with linked(say_and_go) as (host, _, _):
        stream, later = host.open_stream(GREETING), host.open_stream(b"later")
        assert await later.read() == b"last words"
        assert stream.closed
        assert [await stream.read(), await stream.read()] == [b"last words", None]
        assert stream.status == b"\x0fgone"


async def test_there_are_only_so_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "MAX_STREAMS", 3)
    agent, host = Tunnel(Envelope(None), serve=echo), Tunnel(Envelope(b"h" * LINK_ID_BYTES))
    sent: list[bytes] = []
    host.connected(Kept(sent))
    for _ in range(4):
        host.open_stream(GREETING)
    agent.connected(Kept(sent := []))
    with pytest.raises(EnvelopeError, match="too many"):
        for each in host._stream.kept:  # type: ignore[union-attr]
            agent.feed(each)
    for tunnel in (host, agent):
        tunnel.close()


class Kept(Pipe):
    def __init__(self, kept: list[bytes]) -> None:
        super().__init__(kept.append)
        self.kept = kept

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.kept.append(bytes(data))


Connect = Callable[[DirectCall, DirectCall], Awaitable[None]]


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (errors.SessionGone("it is gone"), grpc.StatusCode.DATA_LOSS),
        (errors.UnknownSession("it is gone"), grpc.StatusCode.NOT_FOUND),
        (RuntimeError("it is gone"), grpc.StatusCode.UNKNOWN),
    ],
)
async def test_an_error_of_the_agent_is_a_status_with_its_text(
    raised: Exception, status: grpc.StatusCode
) -> None:
    async def connect(requests: DirectCall, responses: DirectCall) -> None:
        async for _ in requests:
            await responses.write(pb.ConnectResponse(messages=[pb.AgentMessage()]))
            raise raised

    async with linked(Direct(connect, "token").serve) as (host, _, _):
        stream = DirectStream(host.open_stream(GREETING), lambda: False)
        await stream.write(pb.ConnectRequest())
        assert await stream.read() == pb.ConnectResponse(messages=[pb.AgentMessage()])
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is status
        assert "it is gone" in (await stream.details() or "")


@pytest.mark.parametrize(
    ("greeting", "message", "status"),
    [
        (b"another", b"", grpc.StatusCode.UNAUTHENTICATED),
        (GREETING, b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["wrong token", "no message"],
)
async def test_the_agent_refuses(greeting: bytes, message: bytes, status: grpc.StatusCode) -> None:
    async def connect(requests: DirectCall, responses: DirectCall) -> None:
        async for _ in requests:
            raise AssertionError("it was taken")

    async with linked(Direct(connect, "token").serve) as (host, _, _):
        inner = host.open_stream(greeting)
        await inner.write(message)
        stream = DirectStream(inner, lambda: False)
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is status


async def test_a_stream_that_was_cut_at_this_end_can_be_opened_again() -> None:
    async with linked(echo) as (host, _, _):
        stream = DirectStream(host.open_stream(GREETING), lambda: False)
        assert stream.cancel()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        again = host.open_stream(GREETING)
        await again.write(b"again")
        assert await again.read() == b"again"
