"""A byte relay in front of an agent, whose connections can be cut."""

import asyncio
from pathlib import Path

from rlm_core.environment import Sandbox
from rlm_core.transport.unix import unix_channel


class Relay:
    """While it is open, the sandbox's channel goes through it."""

    def __init__(self, sandbox: Sandbox) -> None:
        assert sandbox.shared_folder is not None
        self._agent = sandbox.shared_folder.parent / "agent.sock"
        self._path = sandbox.shared_folder.parent / "relay.sock"
        self._direct = sandbox.channel
        self._sandbox = sandbox
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._sandbox.channel = unix_channel(Path(self._path))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._sandbox.channel.close()
        self._sandbox.channel = self._direct
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()

    def cut(self) -> None:
        """Break every connection there is; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        up_reader, up_writer = await asyncio.open_unix_connection(str(self._agent))
        self._writers |= {writer, up_writer}
        for source, target in ((reader, up_writer), (up_reader, writer)):
            self._tasks.add(asyncio.create_task(_pump(source, target)))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass
    finally:
        target.close()
