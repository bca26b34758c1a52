"""The sandbox's only way out, where its policy names hosts: a port on its own loopback, whose connections
are passed up to the host. The host decides on each; here nothing is looked at.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from rlm_agent import limits
from rlm_agent.errors import Invalid
from rlm_agent.rpc.v1 import agent_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def environment(port: int) -> dict[str, str]:
    """What makes programs use the proxy."""
    address = f"http://127.0.0.1:{port}"
    return {"HTTPS_PROXY": address, "https_proxy": address} if port else {}


class Egress:
    """Connections that wait for the host to take them."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Connection] = asyncio.Queue(limits.MAX_WAITING_CONNECTIONS)
        self._server: asyncio.Server | None = None

    async def listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        while not self._waiting.empty():
            self._waiting.get_nowait()[1].transport.abort()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._waiting.full():
            writer.transport.abort()
        else:
            self._waiting.put_nowait((reader, writer))

    async def accept(self, requests: AsyncIterator[pb.AcceptRequest], context: Context) -> None:
        """Give the host the next connection, and serve it to its end."""
        if self._server is None:
            raise Invalid("this sandbox has no way out")
        reader, writer = await self._waiting.get()
        ways: list[asyncio.Future[None]] = []
        try:
            await context.write(pb.AcceptResponse())
            ways = [asyncio.ensure_future(way) for way in (_up(reader, context), _down(requests, writer))]
            ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ended:
                with contextlib.suppress(OSError):
                    way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.shield(_close(writer))


async def _close(writer: asyncio.StreamWriter) -> None:
    """Once what was written has been read, or nobody has read it for long."""
    writer.close()
    try:
        async with asyncio.timeout(limits.EGRESS_CLOSE_SECONDS):
            await writer.wait_closed()
    except (TimeoutError, OSError):
        writer.transport.abort()


async def _down(requests: AsyncIterator[pb.AcceptRequest], writer: asyncio.StreamWriter) -> None:
    async for request in requests:
        if len(request.data) > limits.MAX_CHUNK:
            raise Invalid("a chunk over its limit")
        writer.write(request.data)
        await writer.drain()


async def _up(reader: asyncio.StreamReader, context: Context) -> None:
    while data := await reader.read(limits.EGRESS_CHUNK):
        await context.write(pb.AcceptResponse(data=data))
