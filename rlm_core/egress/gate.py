"""Takes the connections that code in one sandbox makes to its proxy, as the agent passes them up."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.proxy import CHUNK, Proxy, Resolve, look_up
from rlm_core.environment import TOKEN_KEY
from rlm_core.text import told

log = logging.getLogger("rlm_core.egress")

END_SECONDS = 5.0
MAX_CONNECTIONS = 64
MAX_SAID = 20
"""Refused connections that are logged one by one; a cell may try as many as it likes."""


class Gate:
    def __init__(
        self, channel: grpc.aio.Channel, token: str, allowlist: Allowlist, resolve: Resolve = look_up
    ) -> None:
        """Open it: in the running event loop, until it is closed or the agent has gone."""
        self._stub: Any = AgentServiceStub(channel)
        self._metadata = ((TOKEN_KEY, token),)
        self._proxy = Proxy(allowlist, self._on_denied, resolve)
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._serving: set[asyncio.Task[None]] = set()
        self.denied = 0
        self._accepting = asyncio.ensure_future(self._accept_all())

    async def aclose(self) -> None:
        tasks = {self._accepting, *self._serving}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _accept_all(self) -> None:
        while True:
            await self._places.acquire()
            stream = self._stub.Accept(metadata=self._metadata)
            try:
                if await stream.read() is grpc.aio.EOF:
                    return
            except grpc.aio.AioRpcError as error:
                log.debug("no more connections of the sandbox: %s", told(error.details() or ""))
                return
            task = asyncio.ensure_future(self._serve(stream))
            self._serving.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._places.release()
        if not task.cancelled() and (error := task.exception()):
            log.debug("a connection of the sandbox was broken: %s", told(repr(error)))

    async def _serve(self, stream: Any) -> None:
        async def send(data: bytes) -> None:
            for start in range(0, len(data), CHUNK):
                await stream.write(pb.AcceptRequest(data=data[start : start + CHUNK]))

        try:
            await self._proxy.serve(_received(stream), send)
            await stream.done_writing()
            async with asyncio.timeout(END_SECONDS):
                async for _ in _received(stream):
                    pass  # until the agent has written what it had, and closed the connection
        finally:
            stream.cancel()

    def _on_denied(self, why: str) -> None:
        self.denied += 1
        if self.denied <= MAX_SAID:
            log.warning("the sandbox was denied a connection: %s", told(why))
        if self.denied == MAX_SAID:
            log.warning("further ones are not logged")


async def _received(stream: Any) -> AsyncIterator[bytes]:
    while (response := await stream.read()) is not grpc.aio.EOF:
        if response.data:
            yield response.data
