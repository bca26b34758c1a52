"""The agent's end of the byte stream on its stdin and stdout, and the lease that it keeps alive."""

import asyncio
import contextlib
import os
from pathlib import Path

from rlm_agent.rpc.envelope import Envelope, EnvelopeError
from rlm_agent.rpc.reader import read_buffer
from rlm_agent.rpc.tunnel import Serve, Tunnel


class Stdio:
    """`ended` is set when the host is gone: its stream has ended, or nothing came for a lease."""

    def __init__(self, server: Path, serve: Serve, lease: float) -> None:
        loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self._lease = lease
        self._buffer = read_buffer()
        self._tunnel = Tunnel(
            Envelope(None),
            dial=lambda end: loop.create_unix_connection(end, str(server)),
            serve=serve,
            on_silence=self.ended.set,
        )

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            os.set_blocking(0, False)
        transport, _ = await loop.connect_write_pipe(lambda: _Output(self._tunnel), os.fdopen(1, "wb", 0))
        self._tunnel.connected(transport)
        if self._lease:
            self._tunnel.keep(self._lease)
        loop.add_reader(0, self._on_readable)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(0)
        self._tunnel.close()

    def _on_readable(self) -> None:
        try:
            count = os.readv(0, [self._buffer])
            if count:
                self._tunnel.feed(self._buffer[:count])
                return
        except BlockingIOError:
            return
        except (OSError, EnvelopeError):
            pass
        asyncio.get_running_loop().remove_reader(0)
        self.ended.set()


class _Output(asyncio.Protocol):
    """Flow control of stdout."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def pause_writing(self) -> None:
        self._tunnel.set_stream_full(True)

    def resume_writing(self) -> None:
        self._tunnel.set_stream_full(False)
