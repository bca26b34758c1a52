"""A sandbox whose agent is reached over the stdin and stdout of a process, wherever that runs."""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.gate import Gate
from rlm_core.environment import Sandbox
from rlm_core.errors import SandboxLost
from rlm_core.text import one_line, printable
from rlm_core.transport.stdio import StdioLink

STDERR_BYTES = 8 << 10
"""Kept from the end of the agent's stderr, to say why it ended."""


class ByteStreamSandbox(Sandbox):
    """Whoever has the stream hands it on: to `_begin` or `_link.resume`, what comes to `_on_stdout` and
    `_on_stderr`, its end to `_end`."""

    called = "the sandbox"
    """In errors."""

    def __init__(self, folder: Path, lease: float, *, sandbox_id: str = "", token: str = "") -> None:
        """`folder` is private to this process, and goes with the sandbox; `lease` is in seconds."""
        self.id = sandbox_id or secrets.token_hex(8)
        self.token = token or secrets.token_urlsafe(32)
        self._lease = lease
        self._link = StdioLink(folder, lease, self._on_silence)
        self.channel = self._link.channel
        self._stderr = bytearray()
        self._ended = asyncio.Event()
        self._gate: Gate | None = None

    def open_gate(self, allowlist: Allowlist | None) -> None:
        """Let through what the allowlist of its network names."""
        if allowlist is not None:
            self._gate = Gate(self._link.socket, self.token, allowlist)

    async def epitaph(self, wait: float = 0.0) -> str:
        if wait:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), wait)
        return f"{self.called} has ended{self._because()}" if self._ended.is_set() else ""

    def last_words(self) -> str:
        """The end of what the agent wrote to stderr."""
        lines = printable(self._stderr.decode("utf-8", "replace")).strip().splitlines()
        return one_line(lines[-1], 300) if lines else ""

    def _because(self) -> str:
        words = self.last_words()
        return f": {words}" if words else ""

    async def _begin(self, stream: asyncio.WriteTransport, config: Mapping[str, Any]) -> dict[str, Any]:
        """Configure the agent; what it says of itself and found out.

        Raises:
            SandboxLost: it is not the agent that was started.
        """
        common = {"token": self.token, "nonce": self.id, "stdio": True, "lease": self._lease}
        greeting = await self._link.begin(stream, {**common, **config})
        if greeting.get("nonce") != self.id:
            raise SandboxLost(f"what runs in {self.called} is not the agent that was started")
        return greeting

    def _on_stdout(self, data: bytes) -> None:
        try:
            self._link.feed(data)
        except SandboxLost as lost:
            self._end(str(lost))

    def _on_stderr(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-STDERR_BYTES:]

    def _on_silence(self) -> None:
        """Nothing has come for a lease, although the agent shows life several times in each."""

    def _end(self, why: str) -> None:
        """There is no agent any more: tell all who wait for it."""
        if why:
            self._stderr += f"\n{why}".encode()
        self._ended.set()
        self._link.disconnected(f"{self.called} has ended{self._because()}")
        self._link.end()

    async def _close_link(self) -> None:
        if self._gate is not None:
            await self._gate.aclose()
        await self._link.close()
