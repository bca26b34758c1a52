"""A unix socket past the engine, where engine and host are on one machine.

Between a container's stdio and us are two processes of the engine's, which copy all that passes: 0.3 ms for a
message and its answer (measured). The agent of a container that has our folder connects to a socket in it,
before any cell. It is let in once; then the name is gone, and nobody listens any more. All that goes wrong
(another user namespace, gVisor, SELinux) leaves us with stdio, over which everything works, too.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rlm_agent.rpc.reader import Reader, read_buffer

from rlm_core.errors import SandboxLost
from rlm_core.uploads import CONTEXT_MODE

CONNECT_MODE = CONTEXT_MODE | 0o020
"""Whoever may read our contexts may connect: that is the agent."""


class Shortcut(Reader):
    """Where an agent may connect, once, and its connection."""

    def __init__(
        self,
        on_data: Callable[[memoryview], None],
        on_full: Callable[[bool], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(read_buffer())
        self._on_data, self._on_full, self._on_lost = on_data, on_full, on_lost
        self.transport: asyncio.Transport | None = None
        """While there is a connection."""
        self._path: Path | None = None
        self._listener: socket.socket | None = None
        self._accepted: asyncio.Task[object] | None = None
        self._is_closed = False

    def listen(self, path: Path) -> None:
        """Raises OSError where that is not to be had."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            _bind(listener, path)
            path.chmod(CONNECT_MODE)
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._path, self._listener = path, listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    async def connection(self, *, is_made: bool) -> asyncio.Transport | None:
        """The agent's, which has told whether it has made one. From here on nobody can.

        Raises:
            SandboxLost: it has not.
        """
        if is_made and self._listener is not None:
            self._accept()  # it was made before it was told: it waits there, unless the loop has taken it
            if self._accepted is None:
                raise SandboxLost("its agent says that it has connected, and has not")
        self._stop_listening()
        if self._accepted is not None:
            await asyncio.wait([self._accepted])
        is_there = self.transport is not None and not self.transport.is_closing()
        return self.transport if is_made and is_there else None

    def close(self) -> None:
        self._is_closed = True
        self._stop_listening()
        if self.transport is not None:
            self.transport.abort()

    def _accept(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(OSError):  # it has gone again
            sock = self._listener.accept()[0]
            self._stop_listening()
            connecting = asyncio.get_running_loop().connect_accepted_socket(lambda: self, sock)
            self._accepted = asyncio.ensure_future(connecting)

    def _stop_listening(self) -> None:
        if self._listener is not None and self._path is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._path.unlink(missing_ok=True)
            self._listener = None

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        if self._is_closed:  # meanwhile
            made.abort()
        else:
            self.transport = made

    def take(self, data: memoryview) -> None:
        if self.transport is not None:
            self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:
            self.transport = None
            self._on_lost()

    def pause_writing(self) -> None:
        self._on_full(True)

    def resume_writing(self) -> None:
        self._on_full(False)


def _bind(listener: socket.socket, path: Path) -> None:
    """By a name that may be long, and tells a container nothing of our folders: it is in /proc/net/unix."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
