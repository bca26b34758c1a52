"""A gRPC channel over any byte stream to a process in a sandbox, such as its stdin and stdout.

Neutral to providers: whoever has the stream hands it to `connected`, and what it brings to `feed`. gRPC dials
a unix socket in a private folder of this process, and each of its connections travels in the envelope of
`rlm_agent/rpc/envelope.py`, which survives a stream that breaks or loses bytes.
"""

import asyncio
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
from rlm_agent.rpc.envelope import LINK_ID_BYTES, Envelope, EnvelopeError, TakenOver
from rlm_agent.rpc.tunnel import Tunnel

from rlm_core import limits
from rlm_core.errors import SandboxLost
from rlm_core.transport.stream import DirectStream, Take
from rlm_core.transport.unix import unix_channel


class StdioLink:
    """The host's end."""

    def __init__(self, folder: Path, token: str, lease: float, on_silence: Callable[[], None]) -> None:
        """`lease` in seconds: the agent ends when it has not heard of us for that long.

        `on_silence` is called when we have not heard of it for that long: the stream may be dead.
        """
        self.folder = folder
        self.socket = folder / "agent.sock"
        """Where gRPC dials."""
        self.channel: grpc.aio.Channel = unix_channel(self.socket)
        envelope = Envelope(secrets.token_bytes(LINK_ID_BYTES), token.encode())
        self._tunnel = Tunnel(envelope, on_silence=on_silence)
        self.lease = lease
        self.is_taken = False
        """Whether another host has the agent now."""
        self._server: asyncio.Server | None = None
        self._is_closed = False
        self._greeting: bytearray | None = bytearray()
        self._greeted: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def begin(self, stream: asyncio.WriteTransport, config: Mapping[str, Any]) -> dict[str, Any]:
        """Configure a new agent and wait until it serves; gives what it says of itself.

        Raises:
            SandboxLost: it said something else.
        """
        stream.write(json.dumps(dict(config)).encode() + b"\n")
        return await self._greeted

    async def welcomed(self) -> None:
        """Wait until the agent has answered; it never does where it has another token."""
        await self._tunnel.welcomed.wait()

    async def resume(self, stream: asyncio.WriteTransport) -> None:
        """Go on over this stream: the first one after `begin`, or a new one after one that broke."""
        self._greeting = None
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(self._tunnel.accept, str(self.socket))
            self._tunnel.keep(self.lease)
        self._tunnel.connected(stream)

    def move(self, stream: asyncio.WriteTransport) -> None:
        """Go on over this stream, which was there beside the one that has ended; nothing before `resume`."""
        if self._server is not None:
            self._tunnel.connected(stream)

    def stream(self, token: str, take: Take) -> DirectStream:
        """A stream of a session, for whoever has the sandbox's token."""
        return DirectStream(self._tunnel.open_stream(token.encode()), take, lambda: self._is_closed)

    def feed(self, data: bytes | memoryview) -> None:
        """What the agent's stdout brought, or what is used instead.

        Raises:
            SandboxLost: the agent breaks the protocol, or another host has it now.
        """
        if self._greeting is not None:
            data = self._take_greeting(self._greeting, bytes(data))
        if data:
            try:
                self._tunnel.feed(data)
            except TakenOver:
                self.is_taken = True
                raise SandboxLost("another host has taken it over") from None
            except EnvelopeError as error:
                raise SandboxLost(f"the agent broke the protocol: {error}") from None

    def set_stream_full(self, full: bool) -> None:
        self._tunnel.set_stream_full(full)

    def disconnected(self, why: str) -> None:
        """The stream has ended; without an agent that had said that it serves, that is the end."""
        self._tunnel.disconnected()
        if not self._greeted.done():
            self._greeted.set_exception(SandboxLost(why))
            self._greeted.exception()  # looked at, even where nobody waits for it any more

    def end(self) -> None:
        """There will be no other stream: who waits for the agent is told."""
        if self._server is not None:
            self._server.close()
        self._tunnel.end()

    async def close(self) -> None:
        self._is_closed = True
        await self.channel.close()
        self._tunnel.close()
        await self._tunnel.closed()
        if self._server is not None:
            self._server.close()
        self.remove_folder()

    def remove_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_greeting(self, greeting: bytearray, data: bytes) -> bytes:
        """The rest of the data, after the line with which an agent says that it serves."""
        line, newline, rest = data.partition(b"\n")
        greeting += line[: limits.MAX_GREETING + 1]
        if len(greeting) > limits.MAX_GREETING:
            self.disconnected("what the sandbox said at its start is too long")
            return b""
        if newline:
            self._greeting = None
            try:
                self._greeted.set_result(dict(json.loads(bytes(greeting))))
            except (ValueError, TypeError, RecursionError, asyncio.InvalidStateError):
                self.disconnected("what runs in the sandbox is not our agent")
        return rest
