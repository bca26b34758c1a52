"""Streams of messages in the envelope: whole, in order, held back, and ended with a status."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlm_agent import errors
from rlm_agent.cell import Cell
from rlm_agent.direct import Direct
from rlm_agent.host import Host
from rlm_agent.rpc import tunnel as tunnels
from rlm_agent.rpc.envelope import LINK_ID_BYTES, MAX_PAYLOAD, WINDOW, Envelope, EnvelopeError, Kind
from rlm_agent.rpc.messages import MAX_MESSAGE, PREFIX, MessageStream
from rlm_agent.rpc.tunnel import Dial, Serve, Tunnel
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.session import Session

from rlm_core.errors import SandboxLost
from rlm_core.transport.stream import DirectStream
from tests.support.inbox import Inbox
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


def serving(work: Callable[[Inbox, bytes], Awaitable[None]]) -> Serve:
    """Each stream by a task of its own."""
    tasks = []

    def serve(stream: MessageStream, greeting: bytes) -> None:
        tasks.append(asyncio.ensure_future(work(Inbox(stream), greeting)))

    return serve


async def echo_each(inbox: Inbox, greeting: bytes) -> None:
    while (message := await inbox.read()) is not None:
        with contextlib.suppress(ConnectionError):
            await inbox.write(message)


echo = serving(echo_each)


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
            stream = Inbox(host.open_stream(GREETING))
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


async def _read(stream: Inbox, number: int) -> list[bytes | None]:
    return [await stream.read() for _ in range(number)]


@given(st.lists(st.lists(st.integers(0, MAX_PAYLOAD), max_size=3), max_size=5))
@settings(max_examples=20, deadline=None)
def test_what_is_written_at_once_keeps_its_place(rounds: list[list[int]]) -> None:
    """Beside a task that writes: between two frames of its message, nothing else may be written."""

    async def run() -> None:
        async with linked(echo) as (host, _, _):
            inbox = Inbox(host.open_stream(GREETING))
            stream, written = inbox.stream, list[bytes]()
            for number, sizes in enumerate(rounds):
                written.append(bytes([number]) * (3 * WINDOW // 2))
                writing = asyncio.ensure_future(inbox.write(written[-1]))
                await asyncio.sleep(0)  # the window is full now
                while not writing.done():
                    assert not stream.write_now(b"x")
                    await asyncio.sleep(0)
                written += [short for size in sizes if stream.write_now(short := bytes([number]) * size)]
            assert await _read(inbox, len(written)) == written

    asyncio.run(run())


async def test_a_connection_that_is_not_read_holds_up_all_and_nothing_is_lost(tmp_path: Path) -> None:
    gate, ended, message, streams = asyncio.Event(), asyncio.Event(), b"x" * 100_000, 20
    taken = sent = 0

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await gate.wait()
        while data := await reader.read(1 << 16):
            taken += len(data)
        writer.close()
        await writer.wait_closed()
        ended.set()

    async def fill(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(message)
        sent += len(message)
        await writer.drain()

    address = str(tmp_path / "server")
    dial = lambda end: asyncio.get_running_loop().create_unix_connection(end, address)  # noqa: E731
    async with (
        await asyncio.start_unix_server(late, address),
        linked(echo, dial) as (host, _, _),
        await asyncio.get_running_loop().create_unix_server(host.accept, str(tmp_path / "relay")),
    ):
        _, unread = await asyncio.open_unix_connection(str(tmp_path / "relay"))
        filling = asyncio.ensure_future(fill(unread))
        while (await asyncio.wait([filling], timeout=10 * BEAT))[0]:
            filling = asyncio.ensure_future(fill(unread))  # until nothing more goes in
        opened = [Inbox(host.open_stream(GREETING)) for _ in range(streams)]
        written = 0

        async def write(stream: Inbox) -> None:
            nonlocal written
            for _ in range(20):
                await stream.write(message)
                written += len(message)

        writing = [asyncio.ensure_future(write(stream)) for stream in opened]
        done, _ = await asyncio.wait(writing, timeout=10 * BEAT)
        assert not done
        assert written <= streams * len(message)
        gate.set()
        await filling
        got = await asyncio.gather(*(_read(stream, 20) for stream in opened))
        await asyncio.gather(*writing)
        unread.close()
        await unread.wait_closed()
        await ended.wait()
    assert got == [[message] * 20] * streams and taken == sent > WINDOW


async def test_each_has_its_turn_however_much_another_one_sends(tmp_path: Path) -> None:
    shouted = asyncio.Event()

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        shouted.set()

    async def take(inbox: Inbox, greeting: bytes) -> None:
        while (message := await inbox.read()) is not None:
            if greeting == GREETING:
                await inbox.write(message)

    address = str(tmp_path / "server")
    loop = asyncio.get_running_loop()
    async with (
        await asyncio.start_unix_server(shout, address),
        linked(serving(take), lambda end: loop.create_unix_connection(end, address)) as (host, _, _),
        await loop.create_unix_server(host.accept, str(tmp_path / "relay")),
    ):
        flood = host.open_stream(b"flood")

        async def send_without_end() -> None:
            while True:
                await flood.write(b"x" * WINDOW)

        flooding = asyncio.ensure_future(send_without_end())
        stream = Inbox(host.open_stream(GREETING))
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
        stream, other = direct(host), Inbox(host.open_stream(GREETING))
        with pytest.raises(ConnectionError):
            await stream.write(pb.ConnectRequest(execute=pb.ExecuteCell(code="x" * MAX_MESSAGE)))
        assert (await stream.run()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await other.write(b"x" * MAX_MESSAGE)
        assert await other.read() == b"x" * MAX_MESSAGE


async def test_a_stream_of_a_link_that_has_ended_has_ended_too() -> None:
    async with linked(echo) as (host, _, _):
        before = direct(host)
        host.end()
        late = direct(host)
        assert (await before.run()).code() is (await late.run()).code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(ConnectionError):
            await late.write(pb.ConnectRequest())
        with pytest.raises(SandboxLost, match="stopped"):
            await DirectStream(host.open_stream(GREETING), lambda response: None, lambda: True).run()


@pytest.mark.parametrize(
    "prefix", [PREFIX.pack(1, 5), PREFIX.pack(0, MAX_MESSAGE + 1)], ids=["zipped", "long"]
)
async def test_what_is_no_message_breaks_the_link(prefix: bytes) -> None:
    async with linked(echo) as (host, _, _):
        with pytest.raises(EnvelopeError):
            host.open_stream(GREETING).deliver(prefix)


async def test_a_write_that_is_cancelled_ends_the_stream() -> None:
    ended = asyncio.Event()

    async def take(inbox: Inbox, greeting: bytes) -> None:
        while await inbox.read() is not None:
            pass
        ended.set()

    async with linked(serving(take)) as (host, down, _):
        stream = Inbox(host.open_stream(GREETING))
        down.cut = True  # so that nothing is acknowledged
        writing = asyncio.ensure_future(stream.write(b"x" * MAX_MESSAGE))
        assert not (await asyncio.wait([writing], timeout=2 * BEAT))[0]
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert await stream.read() is None
        with pytest.raises(ConnectionError):
            await stream.write(b"more")
        down.cut = False
        host.connected(down)
        await ended.wait()


async def test_a_stream_that_ended_gives_what_had_come_before() -> None:
    async def say_and_go(inbox: Inbox, greeting: bytes) -> None:
        await inbox.write(b"last words")
        inbox.stream.end(b"\x0fgone")

    async with linked(serving(say_and_go)) as (host, _, _):
        inbox = Inbox(host.open_stream(GREETING))
        assert [await inbox.read(), await inbox.read()] == [b"last words", None]
        assert inbox.stream.closed and inbox.stream.status == b"\x0fgone"


async def test_what_comes_after_the_end_is_given_to_nobody() -> None:
    """Messages in one frame, the first of which is enough."""

    def had_enough(response: pb.ConnectResponse | None) -> None:
        taken.append(response)
        raise SandboxLost("enough")

    taken: list[pb.ConnectResponse | None] = []
    async with linked(echo) as (host, _, _):
        inner = host.open_stream(GREETING)
        stream = DirectStream(inner, had_enough, lambda: False)
        inner.deliver((PREFIX.pack(0, 2) + b"\xff\xff") * 3)
        with pytest.raises(SandboxLost, match="enough"):
            await stream.run()
    assert taken == [None]


def direct(host: Tunnel, greeting: bytes = GREETING) -> DirectStream:
    return DirectStream(host.open_stream(greeting), lambda response: None, lambda: False)


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


class Refusing:
    """A session that says something when a host comes, and refuses its cell."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def attach(self, up: Callable[[pb.AgentMessage], None]) -> None:
        up(pb.AgentMessage())

    def detach(self, up: object) -> None: ...

    def execute(self, request: object) -> None:
        raise self._error


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
    session: Any = Refusing(raised)
    taken: list[pb.ConnectResponse | None] = []
    agent = Direct(lambda responses: Host(lambda _: session, responses), "token")
    async with linked(agent.serve) as (host, _, _):
        stream = DirectStream(host.open_stream(GREETING), taken.append, lambda: False)
        await stream.write(pb.ConnectRequest())
        await stream.write(pb.ConnectRequest(execute=pb.ExecuteCell()))
        error = await stream.run()
        assert error.code() is status and "it is gone" in (error.details() or "")
        assert taken == [pb.ConnectResponse(messages=[pb.AgentMessage()])]


async def test_a_host_that_has_left_is_forgotten() -> None:
    """A cell that goes on does not tell it anything, and does not keep it."""
    cell = Cell("c", "", 100)
    session: Any = Refusing(RuntimeError())
    session.execute = lambda request: cell

    class Nowhere:
        is_free = True

        async def write(self, response: pb.ConnectResponse) -> None: ...

        def write_now(self, response: pb.ConnectResponse) -> bool:
            return False

    host = Host(lambda _: session, Nowhere())
    host.take(pb.ConnectRequest())
    host.take(pb.ConnectRequest(execute=pb.ExecuteCell()))
    host.leave()
    left = weakref.ref(host)
    del host
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(
    ("greeting", "message", "status"),
    [
        (b"another", b"", grpc.StatusCode.UNAUTHENTICATED),
        (GREETING, b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["wrong token", "no message"],
)
async def test_the_agent_refuses(greeting: bytes, message: bytes, status: grpc.StatusCode) -> None:
    def find(session_id: str) -> Session:
        raise AssertionError("it was taken")

    async with linked(Direct(lambda responses: Host(find, responses), "token").serve) as (host, _, _):
        inner = host.open_stream(greeting)
        await inner.write(message)
        error = await DirectStream(inner, lambda response: None, lambda: False).run()
        assert error.code() is status


async def test_a_stream_that_was_cut_at_this_end_can_be_opened_again() -> None:
    async with linked(echo) as (host, _, _):
        stream = direct(host)
        stream.cut()
        assert (await stream.run()).code() is grpc.StatusCode.UNAVAILABLE
        again = Inbox(host.open_stream(GREETING))
        await again.write(b"again")
        assert await again.read() == b"again"
