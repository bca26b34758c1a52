"""Sandboxes that are started before they are needed: a claim takes one that is ready.

A sandbox is given to one run and ends with it; it is never used again after a user's first byte.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import grpc.aio
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core import limits
from rlm_core.environment import TOKEN_KEY, Sandbox, SandboxSpec, make_environment
from rlm_core.errors import ConfigError, RLMError
from rlm_core.portal import portal
from rlm_core.tasks import finish_first
from rlm_core.transport.errors import from_rpc_error

log = logging.getLogger("rlm_core.pool")

MAX_SIZE = 64
REFILL_SECONDS = 0.1
"""After a claim: a start takes the processors that the first cell of the claimed one wants."""


class SandboxPool:
    """Keeps sandboxes of one environment warm. Use it as a context manager, or close it.

    Args:
        environment: name of an installed environment.
        size: how many are kept ready or on their way, at most 64; those that runs have taken don't count.
        environment_kwargs: fields of `SandboxSpec`.

    Raises:
        ConfigError: a wrong argument.
    """

    def __init__(
        self, environment: str, size: int = 1, environment_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"size must be 1 to {MAX_SIZE}, not {size!r}")
        self._environment = make_environment(environment, dict(environment_kwargs or {}))
        self._size = size
        self._ready: deque[Sandbox] = deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def name(self) -> str:
        return self._environment.name

    @property
    def spec(self) -> SandboxSpec:
        return self._environment.spec

    @property
    def ready(self) -> int:
        """How many a claim would find."""
        return len(self._ready)

    async def start(self) -> Sandbox:
        """Claim a sandbox, and have another one started in its place; runs call this.

        Raises:
            RLMError: none was ready, and none could be started.
        """
        while True:
            if not self._ready and self._starting:
                await asyncio.wait(self._starting, return_when=asyncio.FIRST_COMPLETED)
            if self._closed:
                raise ConfigError("the sandbox pool was closed")
            if not self._ready:
                self._fill(self._size)
                return await self._environment.start()
            sandbox = self._ready.popleft()
            asyncio.get_running_loop().call_later(REFILL_SECONDS, self._fill, self._size)
            if not await sandbox.epitaph():
                return sandbox
            await finish_first(sandbox.stop())

    async def filled(self) -> None:
        """Wait until those that are on their way have come up; for the library's own loop."""
        while self._starting:
            await asyncio.wait(self._starting)

    def _fill(self, size: int) -> None:
        while len(self._ready) + len(self._starting) < size and not self._closed:
            starting = asyncio.ensure_future(self._start_one())
            self._starting.add(starting)
            starting.add_done_callback(self._starting.discard)

    async def _start_one(self) -> None:
        """One that can't be started is not tried again before the next claim, which then says why."""
        try:
            sandbox = await self._environment.start()
            try:
                await _warm(sandbox)
            except BaseException:
                await finish_first(sandbox.stop())
                raise
        except RLMError as error:
            log.warning("no sandbox for the pool: %s", error)
            return
        if self._closed:
            await finish_first(sandbox.stop())
        else:
            self._ready.append(sandbox)

    async def _open(self) -> None:
        self._fill(self._size)

    async def _close(self) -> None:
        self._closed = True
        for starting in self._starting:
            starting.cancel()
        if self._starting:
            await asyncio.wait(self._starting)
        ready, self._ready = list(self._ready), deque()
        await asyncio.gather(*(sandbox.stop() for sandbox in ready))

    def close(self) -> None:
        """End all that nobody has claimed; safe to repeat."""
        portal().run(finish_first(self._close()))

    async def aclose(self) -> None:
        await portal().await_(finish_first(self._close()))

    def __enter__(self) -> "SandboxPool":
        portal().run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> "SandboxPool":
        await portal().await_(self._open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()


async def _warm(sandbox: Sandbox) -> None:
    """Until a session can be opened at once: an agent answers when the processes of its first one are there.

    Raises:
        SandboxLost: it does not.
    """
    stub: Any = AgentServiceStub(sandbox.channel)
    metadata = ((TOKEN_KEY, sandbox.token),)
    try:
        await stub.Health(pb.HealthRequest(), metadata=metadata, timeout=limits.START_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
