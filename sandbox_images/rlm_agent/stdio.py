"""The agent's end of the byte stream to its host, and the lease that it keeps alive: on stdin and stdout, or
beside them on a unix socket of a host on the same machine."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import cast

from rlm_agent.rpc.envelope import Envelope, EnvelopeError
from rlm_agent.rpc.reader import Reader, read_buffer
from rlm_agent.rpc.tunnel import Serve, Tunnel


class Stdio:
    """`ended` is set when the host is gone: stdin has ended, or nothing came for a lease."""

    def __init__(self, server: Path, serve: Serve, token: str, lease: float) -> None:
        loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self._lease = lease
        self._buffer = read_buffer()
        self._stdout: asyncio.WriteTransport | None = None
        self._shortcut: asyncio.Transport | None = None
        self._tunnel = Tunnel(
            Envelope(None, token.encode()),
            dial=lambda end: loop.create_unix_connection(end, str(server)),
            serve=serve,
            on_silence=self.ended.set,
        )

    async def take_shortcut(self, path: str) -> bool:
        """Connect to a host on the same machine; from there on all goes by this connection while it lasts."""
        with contextlib.suppress(OSError):
            if path:
                await asyncio.get_running_loop().create_unix_connection(lambda: _Shortcut(self), path)
        return self._shortcut is not None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            os.set_blocking(0, False)
        self._stdout, _ = await loop.connect_write_pipe(lambda: _Output(self._tunnel), os.fdopen(1, "wb", 0))
        if self._shortcut is None:
            self._tunnel.connected(self._stdout)
        if self._lease:
            self._tunnel.keep(self._lease)
        loop.add_reader(0, self._on_readable)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(0)
        self._tunnel.close()
        shortcut, self._shortcut = self._shortcut, None
        if shortcut is not None:
            shortcut.abort()

    def feed(self, data: memoryview) -> None:
        try:
            self._tunnel.feed(data)
        except EnvelopeError:
            self.ended.set()

    def connected(self, shortcut: asyncio.Transport) -> None:
        self._shortcut = shortcut
        self._tunnel.connected(shortcut)

    def disconnected(self) -> None:
        """The host has left the shortcut; it, or another one, comes by stdin."""
        if self._shortcut is None:
            return
        self._shortcut.abort()
        self._shortcut = None
        self._tunnel.disconnected()
        if self._stdout is not None:
            self._tunnel.connected(self._stdout)

    def set_full(self, full: bool) -> None:
        self._tunnel.set_stream_full(full)

    def _on_readable(self) -> None:
        try:
            count = os.readv(0, [self._buffer])
            if count:
                self.disconnected()
                self.feed(self._buffer[:count])
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(0)
        self.ended.set()


class _Shortcut(Reader):
    """The connection to a host on the same machine."""

    def __init__(self, stdio: Stdio) -> None:
        super().__init__(read_buffer())
        self._stdio = stdio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stdio.connected(cast(asyncio.Transport, transport))

    def take(self, data: memoryview) -> None:
        self._stdio.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stdio.disconnected()

    def pause_writing(self) -> None:
        self._stdio.set_full(True)

    def resume_writing(self) -> None:
        self._stdio.set_full(False)


class _Output(asyncio.Protocol):
    """Flow control of stdout."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def pause_writing(self) -> None:
        self._tunnel.set_stream_full(True)

    def resume_writing(self) -> None:
        self._tunnel.set_stream_full(False)
