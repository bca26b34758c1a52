"""A sandbox whose agent is reached over the stdin and stdout of a process, wherever that runs."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.gate import Gate
from rlm_core.environment import Sandbox
from rlm_core.errors import SandboxLost
from rlm_core.tasks import finish_first
from rlm_core.text import one_line, printable
from rlm_core.transport.stdio import StdioLink
from rlm_core.transport.stream import Stream, Take
from rlm_core.transport.unix import unix_channel

STDERR_BYTES = 8 << 10
"""Kept from the end of the agent's stderr, to say why it ended."""


class ByteStreamSandbox(Sandbox):
    """Whoever has the stream hands it on: to `configure` or `link.resume`, what comes to `on_stdout` and
    `on_stderr`, its end to `has_ended`."""

    called = "the sandbox"
    """In errors."""

    def __init__(self, folder: Path, lease: float, *, sandbox_id: str = "", token: str = "") -> None:
        """`folder` is private to this process, and goes with the sandbox; `lease` is in seconds."""
        self.id = sandbox_id or secrets.token_hex(8)
        self.token = token or secrets.token_urlsafe(32)
        self.lease = lease
        self.link = StdioLink(folder, self.token, lease, self.on_silence)
        self.channel = self.link.channel
        self._stderr = bytearray()
        self.ended = asyncio.Event()
        self._gate: Gate | None = None

    def open_gate(self, allowlist: Allowlist | None) -> None:
        """Let through what the allowlist of its network names."""
        if allowlist is not None:
            self._gate = Gate(self.dial, self.token, allowlist)

    def dial(self, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
        """Another channel to the agent; `options` take the place of the usual ones of the same name."""
        return unix_channel(self.link.socket, options)

    def stream(self, take: Take) -> Stream:
        # Where there is another way to the agent (a provider's tunnel), sessions go by it.
        if self.channel is self.link.channel:
            return self.link.stream(self.token, take)
        return super().stream(take)

    async def epitaph(self, wait: float = 0.0) -> str:
        if wait:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), wait)
        return self._how_it_ended() if self.ended.is_set() else ""

    def last_words(self) -> str:
        """The end of what the agent wrote to stderr."""
        lines = printable(self._stderr.decode("utf-8", "replace")).strip().splitlines()
        return one_line(lines[-1], 300) if lines else ""

    def _how_it_ended(self) -> str:
        if self.link.is_taken:
            return f"another host has taken {self.called} over"
        words = self.last_words()
        return f"{self.called} has ended{': ' if words else ''}{words}"

    async def configure(self, stream: asyncio.WriteTransport, config: Mapping[str, Any]) -> dict[str, Any]:
        """Configure the agent; what it says of itself and found out.

        Raises:
            SandboxLost: it is not the agent that was started.
        """
        common = {"token": self.token, "nonce": self.id, "stdio": True, "lease": self.lease}
        greeting = await self.link.begin(stream, {**common, **config})
        if greeting.get("nonce") != self.id:
            raise SandboxLost(f"what runs in {self.called} is not the agent that was started")
        await self.link.resume(await self.stream_after(greeting) or stream)
        return greeting

    async def stream_after(self, greeting: Mapping[str, Any]) -> asyncio.WriteTransport | None:
        """To use from now on instead of the one that the agent was configured on; None: there is no other."""
        return None

    def on_stdout(self, data: bytes | memoryview) -> None:
        if self.ended.is_set():
            return  # it has broken the protocol, and may say more for as long as it likes
        try:
            self.link.feed(data)
        except SandboxLost as lost:
            self.has_ended(str(lost))

    def on_stderr(self, data: bytes | memoryview) -> None:
        self._stderr = (self._stderr + data)[-STDERR_BYTES:]

    def on_silence(self) -> None:
        """Nothing has come for a lease, although the agent shows life several times in each: it has gone, or
        the way to it, and it ends as well. Where there is another way, it can be tried instead."""
        if not self.ended.is_set():
            self.has_ended(f"nothing was heard of it for {self.lease:g} s")

    def has_ended(self, why: str) -> None:
        """There is no agent any more: tell all who wait for it."""
        if why:
            self.on_stderr(f"\n{why}".encode())
        self.ended.set()
        self.link.disconnected(self._how_it_ended())
        self.link.end()

    async def close_link(self) -> None:
        if self._gate is not None:
            await self._gate.aclose()
        await self.link.close()


@contextlib.asynccontextmanager
async def nothing_left_of(sandbox: ByteStreamSandbox) -> AsyncIterator[None]:
    """Around a start: when it fails or is cancelled, the sandbox is ended first.

    Raises:
        SandboxLost: it did not start, and why.
    """
    try:
        yield
    except BaseException as error:
        await finish_first(sandbox.stop())
        if isinstance(error, (TimeoutError, SandboxLost)):
            why = sandbox.last_words() or str(error) or "it took too long"
            raise SandboxLost(f"{sandbox.called} did not start: {why}") from None
        raise
