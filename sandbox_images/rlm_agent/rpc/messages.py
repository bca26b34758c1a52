"""Messages straight in the envelope, without a socket and gRPC's threads at each end of it.

The host opens a stream of these with an OPEN frame whose payload is the sandbox's token. It carries what
`AgentService.Connect` does, delimited as gRPC does it ("gRPC over HTTP/2", Length-Prefixed-Message): a zero,
a size (4 bytes, big-endian), the message. Its CLOSE frame brings gRPC's status (1 byte) and the details.
"""

import asyncio
import struct
from collections import deque
from typing import TYPE_CHECKING

from rlm_agent.rpc.envelope import MAX_PAYLOAD, EnvelopeError

if TYPE_CHECKING:
    from rlm_agent.rpc.tunnel import Tunnel

PREFIX = struct.Struct("!BI")
RESOURCE_EXHAUSTED = 8
MAX_MESSAGE = 8 << 20
MAX_UNREAD = 1 << 20
"""Bytes that wait for whoever reads; beyond it, nothing more is taken from the other end."""


TOO_LONG = bytes([RESOURCE_EXHAUSTED]) + b"a message is longer than any may be"


class MessageStream:
    """One end of it. Write and read from one task each."""

    def __init__(self, tunnel: "Tunnel", number: int) -> None:
        self.number = number
        self.full = False
        """Whether too much is unread."""
        self.closed = False
        self.status = b""
        """What it was closed with, at either end."""
        self._tunnel = tunnel
        self._pending = bytearray()
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def write(self, message: bytes) -> None:
        """Give it to the tunnel, as it takes it. Cancelled, it ends the stream: a part may be on its way. One
        over the limit ends it too.

        Raises:
            ConnectionError: the stream is over.
        """
        if len(message) > MAX_MESSAGE:
            self.end(TOO_LONG)
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

    async def read(self) -> bytes | None:
        """The next message; None at the end."""
        while not self._unread:
            if self.closed:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        message = self._unread.popleft()
        self._unread_bytes -= PREFIX.size + len(message)
        if self.full and self._unread_bytes <= MAX_UNREAD:
            self.full = False
            self._tunnel.hold()
        return message

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
        while len(self._pending) - start >= PREFIX.size:
            flag, size = PREFIX.unpack_from(self._pending, start)
            if flag or size > MAX_MESSAGE:
                raise EnvelopeError("a message that is compressed, or longer than any")
            end = start + PREFIX.size + size
            if len(self._pending) < end:
                break
            self._unread.append(bytes(memoryview(self._pending)[start + PREFIX.size : end]))
            self._unread_bytes += end - start
            start = end
        del self._pending[:start]
        if self._unread_bytes > MAX_UNREAD and not self.full:
            self.full = True
            self._tunnel.hold()
        self._arrived.set()

    def let_send(self, allowed: bool) -> None:
        if allowed or self.closed:
            self._room.set()
        else:
            self._room.clear()

    def close(self, status: bytes = b"") -> None:
        self.closed, self.status, self.full = True, status, False
        self._pending.clear()
        self._arrived.set()
        self._room.set()
