"""A container's stdio: the socket of an attach request, and the frames that its output comes in.

Docker Engine API, "Attach to a container", stream format: stream type (1 byte: 1 stdout, 2 stderr), three
zero bytes, size (4 bytes, big-endian), payload. What goes in is raw.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

from rlm_agent.rpc.reader import Reader, read_buffer

from rlm_environments.containers.bridge import Bridge

HEADER = struct.Struct("!BxxxI")
STDOUT, STDERR = 1, 2
MAX_FRAME = 16 << 20


class Demultiplexer:
    """Feed it what the engine sends; gives pieces of stdout and stderr as they come."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._kind = 0
        self._left = 0

    def feed(self, data: memoryview) -> list[tuple[int, memoryview]]:
        """Raises ValueError for what is not in the engine's format."""
        pieces: list[tuple[int, memoryview]] = []
        start = 0
        while start < len(data):
            if self._left:
                piece = data[start : start + self._left]
                pieces.append((self._kind, piece))
                self._left -= len(piece)
                start += len(piece)
                continue
            missing = HEADER.size - len(self._header)
            self._header += data[start : start + missing]
            start += missing
            if len(self._header) == HEADER.size:
                self._kind, self._left = HEADER.unpack(self._header)
                self._header.clear()
                if self._kind not in (STDOUT, STDERR) or self._left > MAX_FRAME:
                    raise ValueError("not the engine's stream format")
        return pieces


class AttachedStream(Reader):
    """One attach connection, in the event loop."""

    def __init__(
        self,
        on_output: Callable[[int, memoryview], None],
        on_full: Callable[[bool], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(read_buffer())
        self._demultiplexer = Demultiplexer()
        self._on_output, self._on_full, self._on_lost = on_output, on_full, on_lost
        self.transport: asyncio.Transport
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def take(self, data: memoryview) -> None:
        try:
            for kind, piece in self._demultiplexer.feed(data):
                self._on_output(kind, piece)
        except ValueError:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._on_lost()

    def pause_writing(self) -> None:
        self._on_full(True)

    def resume_writing(self) -> None:
        self._on_full(False)


def plain_socket(attached: Any) -> socket.socket:
    """The SDK's attach socket as one that an event loop can use."""
    inner = getattr(attached, "_sock", attached)
    if type(inner) is not socket.socket:
        return Bridge(inner).socket
    sock = inner.dup()
    for ours in (attached, inner):
        ours.close()
    sock.setblocking(False)
    return sock
