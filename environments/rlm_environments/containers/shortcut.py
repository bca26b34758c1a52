"""A unix socket past the engine, where engine and host are on one machine.

Between a container's stdio and us are two processes of the engine's, which copy all that passes: 0.3 ms for a
message and its answer (measured). The agent of a container that has our folder connects to a socket in it,
before there is any session. It is let in once; then the name is gone, and nobody listens any more. All that
goes wrong (another user namespace, gVisor, SELinux) leaves us with stdio, over which everything works, too.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rlm_agent.rpc.reader import Reader, read_buffer

from rlm_core.uploads import CONTEXT_MODE

CONNECT_MODE = CONTEXT_MODE | 0o020
"""Whoever may read our contexts may connect: that is the agent."""


class Shortcut(Reader):
    """Listens for one connection, and is it then."""

    def __init__(
        self,
        on_data: Callable[[memoryview], None],
        on_full: Callable[[bool], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(read_buffer())
        self._on_data, self._on_full, self._on_lost = on_data, on_full, on_lost
        self._path: Path | None = None
        self._server: asyncio.Server | None = None
        self._made = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    async def listen(self, path: Path) -> None:
        """Raises OSError, as for a path that is too long for a socket."""
        loop = asyncio.get_running_loop()
        self._path = path
        self._server = await loop.create_unix_server(lambda: self, sock=_socket_at(path), backlog=1)

    async def connection(self, *, is_made: bool) -> asyncio.Transport | None:
        """What the agent has made, if it says that it has. From here on nobody else can."""
        try:
            if is_made and self._server is not None:
                await self._made.wait()
            return self.transport
        finally:
            self._stop_listening()

    def close(self) -> None:
        self._stop_listening()
        if self.transport is not None:
            self.transport.abort()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        if self._made.is_set():
            made.abort()
        self.transport = self.transport or made
        self._made.set()

    def take(self, data: memoryview) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()

    def pause_writing(self) -> None:
        self._on_full(True)

    def resume_writing(self) -> None:
        self._on_full(False)


def _socket_at(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        path.chmod(CONNECT_MODE)
    except OSError:
        made.close()
        raise
    return made
