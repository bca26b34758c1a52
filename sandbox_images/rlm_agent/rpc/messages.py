"""Messages straight in the envelope, without a socket and gRPC's threads at each end of it.

The host opens a stream of these with an OPEN frame whose payload is the sandbox's token. It carries what
`AgentService.Connect` does, delimited as gRPC does it ("gRPC over HTTP/2", Length-Prefixed-Message): a zero,
a size (4 bytes, big-endian), the message. Its CLOSE frame brings gRPC's status (1 byte) and the details.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlm_agent.rpc.envelope import MAX_PAYLOAD, EnvelopeError

if TYPE_CHECKING:
    from rlm_agent.rpc.tunnel import Tunnel

PREFIX = struct.Struct("!BI")
RESOURCE_EXHAUSTED = 8
MAX_MESSAGE = 8 << 20
TOO_LONG = bytes([RESOURCE_EXHAUSTED]) + b"a message is longer than any may be"


class MessageStream:
    """One end of it. Write from one task; what comes is handed on at once."""

    def __init__(self, tunnel: "Tunnel", number: int) -> None:
        self.number = number
        self.closed = False
        self.status = b""
        """What it was closed with, at either end."""
        self._tunnel = tunnel
        self._pending = bytearray()
        self._on_message: Callable[[bytes], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._is_writing = False
        self._room = asyncio.Event()
        self._room.set()

    def hear(self, on_message: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        """To be called where it was opened, before anything can come. Neither may raise."""
        self._on_message, self._on_end = on_message, on_end
        if self.closed:
            on_end()

    async def write(self, message: bytes) -> None:
        """Give it to the tunnel, as it takes it. Cancelled, it ends the stream: a part may be on its way. One
        over the limit ends it too.

        Raises:
            ConnectionError: the stream is over.
        """
        if self.write_now(message):
            return
        if len(message) > MAX_MESSAGE:
            self.end(TOO_LONG)
        self._is_writing = True
        data = memoryview(PREFIX.pack(0, len(message)) + message)
        try:
            for start in range(0, len(data), MAX_PAYLOAD):
                await self._room.wait()
                if self.closed:
                    raise ConnectionError("the stream is over")
                self._tunnel.send(self, data[start : start + MAX_PAYLOAD])
        except asyncio.CancelledError:
            self.end()
            raise
        finally:
            self._is_writing = False

    @property
    def is_free(self) -> bool:
        """Whether what is written has to wait for nothing."""
        return self._room.is_set() and not self._is_writing and not self.closed

    def write_now(self, message: bytes) -> bool:
        """Give it to the tunnel, unless it has to wait or is too long for one frame; whether it did."""
        is_short = PREFIX.size + len(message) <= MAX_PAYLOAD
        if not is_short or not self.is_free:
            return False
        self._tunnel.send(self, PREFIX.pack(0, len(message)) + message)
        return True

    def end(self, status: bytes = b"") -> None:
        """Close it, and tell the other end with what status (1 byte) and details, in at most MAX_PAYLOAD."""
        if not self.closed:
            self.close(status)
            self._tunnel.ended(self, status)

    # -- for the tunnel

    def deliver(self, data: bytes) -> None:
        """Raises EnvelopeError for a message that is over its limit."""
        self._pending += data
        start = 0
        while not self.closed and len(self._pending) - start >= PREFIX.size:
            flag, size = PREFIX.unpack_from(self._pending, start)
            if flag or size > MAX_MESSAGE:
                raise EnvelopeError("a message that is compressed, or longer than any")
            end = start + PREFIX.size + size
            if len(self._pending) < end:
                break
            message = bytes(memoryview(self._pending)[start + PREFIX.size : end])
            start = end
            if self._on_message is not None:
                self._on_message(message)
        del self._pending[:start]

    def let_send(self, allowed: bool) -> None:
        if allowed or self.closed:
            self._room.set()
        else:
            self._room.clear()

    def close(self, status: bytes = b"") -> None:
        self.closed, self.status = True, status
        self._pending.clear()
        self._room.set()
        if self._on_end is not None:
            self._on_end()
