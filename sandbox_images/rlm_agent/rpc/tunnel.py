"""Connections of local sockets, and streams of messages, carried over one byte stream in the envelope. The
same at both ends.

The host's end accepts connections (gRPC's, on a unix socket), and the agent's end dials its own server for
each. The host opens streams of messages, and the agent serves them. Whoever owns the byte stream calls
`connected`, `feed` and `disconnected`, and hands on its flow control; a stream that broke is replaced by a
new one and nothing is lost.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import cast

from rlm_agent.rpc.envelope import Arrived, Envelope, EnvelopeError, Kind, TakenOver
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.reader import Reader, read_buffer

MAX_CONNECTIONS = 8
MAX_STREAMS = 512
BEATS_PER_LEASE = 4
WRITE_BYTES = 64 << 10
"""Handed to the byte stream at once."""

Dial = Callable[[Callable[[], asyncio.BaseProtocol]], Awaitable[object]]
Serve = Callable[[MessageStream, bytes], None]


class Tunnel:
    def __init__(
        self,
        envelope: Envelope,
        *,
        dial: Dial | None = None,
        serve: Serve | None = None,
        on_silence: Callable[[], None] | None = None,
    ) -> None:
        """`dial` connects a protocol to the local server, and `serve` serves a stream of messages, given with
        what the host said at its opening; without them this end only opens.

        `on_silence` is called when nothing has come for a lease, and again with every beat until it does.
        """
        self._envelope = envelope
        self._dial, self._serve = dial, serve
        self._on_silence = on_silence
        self._tasks: set[asyncio.Future[object]] = set()
        self._ends: dict[int, LocalEnd | MessageStream] = {}
        self._waiting: deque[tuple[Kind, LocalEnd | MessageStream, bytes]] = deque()
        """What each of them is held back with, in the order of their turns."""
        self._is_over = False
        self.read_buffer = read_buffer()
        self._closing: set[asyncio.Future[None]] = set()
        self._opened = 0
        self._stream: asyncio.WriteTransport | None = None
        self._stream_full = False
        self._beats: asyncio.Task[None] | None = None
        self.heard_at = time.monotonic()
        """When the other end was last heard of."""
        self.welcomed = asyncio.Event()
        """Whether it has answered."""

    # -- the byte stream

    def connected(self, stream: asyncio.WriteTransport) -> None:
        """Go on over this stream, from where the other end says it is."""
        self._stream, self._stream_full = stream, False
        self._envelope.hello()
        self._pump()

    def disconnected(self) -> None:
        self._stream = None

    def feed(self, data: bytes | memoryview) -> None:
        """Take what the stream brought.

        Raises:
            EnvelopeError: the other end breaks the protocol.
            TakenOver: another host has the agent now.
        """
        self.heard_at = time.monotonic()
        events = self._envelope.feed(data)
        if self._envelope.is_welcome:
            self.welcomed.set()
        for event in events:
            if isinstance(event, Arrived):
                self._take(event)
            elif isinstance(event, TakenOver):
                raise event
            else:
                self.close_connections()
        self._pump()

    def set_stream_full(self, full: bool) -> None:
        """The stream's flow control: whether it wants no more for now."""
        self._stream_full = full
        self._pump()

    def keep(self, lease: float) -> None:
        """Show life several times in each lease (seconds), and expect it."""
        self.heard_at = time.monotonic()
        self._beats = asyncio.ensure_future(self._beat(lease))

    async def _beat(self, lease: float) -> None:
        while True:
            self._envelope.regular_beat()
            self._pump()
            await asyncio.sleep(lease / BEATS_PER_LEASE)
            if self._on_silence is not None and time.monotonic() - self.heard_at > lease:
                self._on_silence()

    def _pump(self) -> None:
        while True:
            while self._stream is not None and not self._stream_full and self._envelope.is_waiting:
                self._stream.write(self._envelope.take(WRITE_BYTES))
            if self._is_full or not self._waiting:
                return
            kind, end, data = self._waiting.popleft()
            self._envelope.send(kind, end.number, data)
            end.let_send(True)

    @property
    def _is_full(self) -> bool:
        return self._envelope.full or self._stream_full

    # -- local connections and streams

    def accept(self) -> "LocalEnd":
        """A protocol for a connection that was accepted here."""
        end = LocalEnd(self, self._new_number())
        self._ends[end.number] = end
        self._envelope.send(Kind.OPEN, end.number)
        return end

    def open_stream(self, greeting: bytes) -> MessageStream:
        """A stream of messages; the agent is given the greeting, which is not empty, and decides."""
        stream = MessageStream(self, self._new_number())
        if self._is_over:
            stream.close()
            return stream
        self._ends[stream.number] = stream
        self._envelope.send(Kind.OPEN, stream.number, greeting)
        self._pump()
        return stream

    def _new_number(self) -> int:
        while True:
            self._opened = self._opened % 0xFFFF + 1
            if self._opened not in self._ends:
                return self._opened

    def send(self, end: "LocalEnd | MessageStream", data: memoryview | bytes, kind: Kind = Kind.DATA) -> None:
        """At most MAX_PAYLOAD bytes. Where they have to wait for their turn, their end may send no more until
        then: so each has its turn, however much another one sends."""
        if self._is_full or self._waiting:
            self._waiting.append((kind, end, bytes(data)))
            end.let_send(False)
        else:
            self._envelope.send(kind, end.number, data)
        self._pump()

    def ended(self, end: "LocalEnd | MessageStream", status: bytes = b"") -> None:
        """It has ended here; the other end closes its own."""
        if self._ends.get(end.number) is end:
            del self._ends[end.number]
            self.send(end, status, Kind.CLOSE)
        self.hold()

    def hold(self) -> None:
        """Acknowledge nothing while one of them can't take what arrives."""
        was_held = self._envelope.held
        self._envelope.held = any(isinstance(end, LocalEnd) and end.full for end in self._ends.values())
        if was_held and not self._envelope.held:
            self._envelope.beat()
            self._pump()

    def end(self) -> None:
        """There will be no other byte stream."""
        self._is_over = True
        self.close_connections()

    def close_connections(self) -> None:
        ends, self._ends = self._ends, {}
        self._waiting.clear()
        for end in ends.values():
            self._close_end(end)
        self.hold()

    def _close_end(self, end: "LocalEnd | MessageStream", status: bytes = b"") -> None:
        end.close(status)
        if isinstance(end, LocalEnd) and end.is_connected:
            self._closing.add(end.gone)
            end.gone.add_done_callback(self._closing.discard)

    def close(self) -> None:
        if self._beats is not None:
            self._beats.cancel()
        for task in self._tasks:
            task.cancel()
        self.end()
        self._stream = None

    async def closed(self) -> None:
        """Wait until the local connections that were closed are gone."""
        if self._closing:
            await asyncio.wait(self._closing)

    def _take(self, event: Arrived) -> None:
        end = self._ends.get(event.stream)
        if event.kind is Kind.DATA and end is not None:
            end.deliver(event.payload)
        elif event.kind is Kind.CLOSE and end is not None:
            del self._ends[event.stream]
            self._close_end(end, event.payload)
            self.hold()
        elif event.kind is Kind.OPEN and end is not None:
            raise EnvelopeError("opened twice")
        elif event.kind is Kind.OPEN and event.payload and self._serve is not None:
            stream = MessageStream(self, event.stream)
            self._add(stream, MAX_STREAMS)
            self._serve(stream, event.payload)
        elif event.kind is Kind.OPEN and not event.payload and self._dial is not None:
            connection = LocalEnd(self, event.stream)
            self._add(connection, MAX_CONNECTIONS)
            self._start(self._connect(self._dial, connection))
            self.hold()
        elif event.kind is Kind.OPEN:
            raise EnvelopeError("opened at an end that serves none")
        else:
            self._envelope.count_idle()  # for one that has been closed here, or was never there

    def _add(self, end: "LocalEnd | MessageStream", limit: int) -> None:
        if sum(type(each) is type(end) for each in self._ends.values()) >= limit:
            raise EnvelopeError("too many connections or streams")
        self._ends[end.number] = end

    def _start(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, dial: Dial, end: "LocalEnd") -> object:
        try:
            return await dial(lambda: end)
        except OSError:
            self.ended(end)
            return None


class LocalEnd(Reader):
    """One local connection."""

    def __init__(self, tunnel: Tunnel, number: int) -> None:
        super().__init__(tunnel.read_buffer)
        self.number = number
        self.full = True
        """Not connected yet, or not reading what it is given."""
        self._tunnel = tunnel
        self._early: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._closed = False
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_connected(self) -> bool:
        return self._transport is not None and not self.gone.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.full = False
        for data in self._early:
            self._transport.write(data)
        self._early.clear()
        if self._closed:
            self._transport.close()
        self._tunnel.hold()

    def take(self, data: memoryview) -> None:
        self._tunnel.send(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.full = False
        if not self.gone.done():
            self.gone.set_result(None)
        self._tunnel.ended(self)

    def pause_writing(self) -> None:
        self.full = True
        self._tunnel.hold()

    def resume_writing(self) -> None:
        self.full = False
        self._tunnel.hold()

    def deliver(self, data: bytes) -> None:
        if self._transport is None:
            self._early.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def close(self, status: bytes = b"") -> None:
        self._closed = True
        if self._transport is not None:
            self._transport.close()

    def let_send(self, allowed: bool) -> None:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.is_reading() == allowed:
            return
        if allowed:
            transport.resume_reading()
        else:
            transport.pause_reading()
