"""Takes the connections that code in one sandbox makes to its proxy, as the agent passes them up."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc.aio
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.proxy import CHUNK, CLOSE_SECONDS, Proxy, look_up
from rlm_core.environment import TOKEN_KEY
from rlm_core.text import told
from rlm_core.transport.errors import RECONNECTABLE

log = logging.getLogger("rlm_core.egress")

MAX_CONNECTIONS = 64
MAX_LOOKUPS = 2
"""At once, of the few that all sandboxes share."""
MAX_SAID = 20
"""Refused connections that are logged one by one; a cell may try as many as it likes."""
AGAIN_SECONDS = (0.05, 2.0)
"""Between attempts to reach an agent whose connection broke, from the first to the longest."""


CHANNEL_OPTIONS = [
    # A server that does not read must not have its data pile up here: gRPC's windows stay small.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 << 10),
    ("grpc.max_receive_message_length", 2 * CHUNK),
]
MAX_BROKEN = 1_000
"""Connections whose agent does not keep to the protocol, after which nothing more is taken from it."""


class BrokenProtocol(Exception):
    """Of the agent's doing: no cell can bring it about."""


Dial: TypeAlias = Callable[[Sequence[tuple[str, int]]], grpc.aio.Channel]
"""Gives a channel with these options."""


class Gate:
    def __init__(self, dial: Dial, token: str, allowlist: Allowlist) -> None:
        """Open it: in the running event loop, until it is closed or the agent has gone.

        `dial` makes another channel to the agent: this one has limits of its own.
        """
        self._channel = dial(CHANNEL_OPTIONS)
        self._stub: Any = AgentServiceStub(self._channel)
        self._metadata = ((TOKEN_KEY, token),)
        self._proxy = Proxy(allowlist, self._on_denied, self._look_up)
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._broken = 0
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._serving: set[asyncio.Task[None]] = set()
        self.denied = 0
        self._accepting = asyncio.ensure_future(self._accept_all())

    async def aclose(self) -> None:
        tasks = {self._accepting, *self._serving}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._channel.close()

    async def _look_up(self, host: str, port: int) -> list[str]:
        """One that nobody waits for any more goes on in its thread, and keeps its place until that ends."""
        await self._lookups.acquire()
        looking = asyncio.ensure_future(look_up(host, port))
        looking.add_done_callback(self._looked_up)
        return await asyncio.shield(looking)

    def _looked_up(self, looking: "asyncio.Future[list[str]]") -> None:
        self._lookups.release()
        if not looking.cancelled():
            looking.exception()  # looked at, even where nobody waits for it

    async def _accept_all(self) -> None:
        delay = AGAIN_SECONDS[0]
        while self._broken < MAX_BROKEN:
            await self._places.acquire()
            stream = self._stub.Accept(metadata=self._metadata)
            try:
                there = await stream.read() is not grpc.aio.EOF
                delay = AGAIN_SECONDS[0]
            except grpc.aio.AioRpcError as error:
                there = False
                if error.code() not in RECONNECTABLE:
                    log.warning("the sandbox's way out is closed: %s", told(error.details() or ""))
                    return
            except grpc.aio.UsageError:
                return  # the channel was closed
            if there:
                task = asyncio.ensure_future(self._serve(stream))
                self._serving.add(task)
                task.add_done_callback(self._served)
            else:
                self._places.release()
                await asyncio.sleep(delay)
                delay = min(2 * delay, AGAIN_SECONDS[1])
        log.warning("the sandbox's way out is closed: too many of its connections were broken")

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._places.release()
        if not task.cancelled() and (error := task.exception()):
            self._broken += isinstance(error, BrokenProtocol)
            log.debug("a connection of the sandbox was broken: %s", told(repr(error)))

    async def _serve(self, stream: Any) -> None:
        async def send(data: bytes) -> None:
            await stream.write(pb.AcceptRequest(data=data))

        incoming = Incoming(stream)
        try:
            await self._proxy.serve(incoming.read, send)
            await stream.done_writing()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    while await incoming.read():
                        pass  # until the agent has written what it had, and closed the connection
        finally:
            stream.cancel()
            await incoming.close()

    def _on_denied(self, why: str) -> None:
        self.denied += 1
        if self.denied <= MAX_SAID:
            log.warning("the sandbox was denied a connection: %s", told(why))
        if self.denied == MAX_SAID:
            log.warning("further ones are not logged")


class Incoming:
    """The bytes of one connection. A cancelled read goes on: gRPC would end the connection with it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._reading: asyncio.Future[Any] | None = None

    async def read(self) -> bytes:
        """The next bytes; empty at the end."""
        reading = self._reading = self._reading or asyncio.ensure_future(self._stream.read())
        response = await asyncio.shield(reading)
        self._reading = None
        if not isinstance(response, pb.AcceptResponse):
            return b""
        if not response.data:
            raise BrokenProtocol("an empty message of the agent")
        return response.data

    async def close(self) -> None:
        """When the stream was cancelled."""
        if self._reading is not None:
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()
