"""A relay in front of the container engine, on TCP or a unix socket, that can stop as an engine stops."""

import asyncio
import ssl
from pathlib import Path

ENGINE = "/var/run/docker.sock"


class EngineRelay:
    """`address` is for DOCKER_HOST."""

    def __init__(self, path: str = "", tls: ssl.SSLContext | None = None) -> None:
        self._path, self._tls = path, tls
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def __aenter__(self) -> "EngineRelay":
        if self._path:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
            self.address = f"unix://{self._path}"
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
            self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        if self._path:
            Path(self._path).unlink(missing_ok=True)  # noqa: ASYNC240 - a socket of our own
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Nobody listens any more, and every connection breaks."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(ENGINE)
        self._writers |= {writer, up_writer}
        for source, target in ((reader, up_writer), (up_reader, writer)):
            self._tasks.add(asyncio.create_task(_pump(source, target)))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        if target.can_write_eof():
            target.write_eof()
    except (ConnectionError, RuntimeError):
        pass
    finally:
        if source.at_eof() and target.is_closing():
            target.close()
