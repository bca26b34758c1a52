"""An agent that speaks gRPC and means no good: it answers Connect with whatever bytes a test gives it."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import grpc.aio
from rlm_agent.rpc.envelope import Envelope
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.tunnel import Tunnel
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_environments.byte_stream import ByteStreamSandbox

from rlm_core.environment import Sandbox
from rlm_core.janitor import REMOVE, Janitor
from rlm_core.transport.stream import Stream, Take
from rlm_core.transport.unix import unix_channel
from tests.support.inbox import Inbox
from tests.support.pipe import Pipe

SERVICE = "rlm_agent.rpc.v1.AgentService"
OPENED = pb.OpenSessionResponse(protocol_version=pb.PROTOCOL_VERSION_CURRENT)


class Way(ByteStreamSandbox):
    """Over which Connect goes straight through an envelope, both ends of which are here."""

    def __init__(
        self, connect: Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]], *, reads: bool
    ) -> None:
        super().__init__(Janitor.hire(*REMOVE).new_folder(), 60.0)
        self._reads = reads
        self._connect = connect
        self._tasks: list[asyncio.Task[None]] = []
        self._agent = Tunnel(Envelope(None, self.token.encode()), serve=self._serve)

    async def open(self) -> None:
        self._agent.connected(Pipe(self.on_stdout))
        await self.link.resume(Pipe(self._agent.feed))

    def _serve(self, stream: MessageStream, token: bytes) -> None:
        if not self._reads:
            self._take_no_more()
        self._tasks.append(asyncio.ensure_future(self._answer(Inbox(stream))))

    def _take_no_more(self) -> None:
        """Acknowledge nothing."""
        self._agent._envelope.held = True

    async def _answer(self, inbox: Inbox) -> None:
        async def requests() -> AsyncIterator[bytes]:
            yield await inbox.read() or b""  # the session
            cell = await inbox.read() or b""
            self._take_no_more()
            yield cell

        with contextlib.suppress(ConnectionError):  # the host has had enough
            async for answer in self._connect(requests(), None):
                await inbox.write(answer)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.close_link()
        self._agent.close()

    def kill(self) -> None:
        """It ends with its test."""


class HostileAgent(Sandbox):
    """`answers` go up on Connect once the host has said something; a function makes them from the id of the
    cell. `refusal` is what OpenSession says. It is deaf to interrupts: it hears them, and says nothing."""

    is_enveloped: ClassVar[bool] = False
    """Whether Connect goes by a `Way`."""

    def __init__(
        self,
        answers: Iterable[bytes] | Callable[[str], Iterable[bytes] | AsyncIterator[bytes]] = (),
        *,
        refusal: str = "",
        compression: grpc.Compression | None = None,
        reads: bool = True,
    ) -> None:
        self.id, self.token, self.shared_folder = "hostile", "token", None
        self.connections = 0
        self._way: Way | None = None
        self._answers, self._refusal, self._reads = answers, refusal, reads
        self.heard = asyncio.Event()
        """Whether a cell has come."""
        self._folder = Janitor.hire(*REMOVE).new_folder()
        self.address: Path = self._folder / "agent.sock"
        self.channel = unix_channel(self.address)
        options = [("grpc.max_send_message_length", -1)]
        self._server = grpc.aio.server(options=options, compression=compression)
        self._server.add_insecure_port(f"unix:{self.address}")
        handlers: dict[str, Any] = {
            "OpenSession": grpc.unary_unary_rpc_method_handler(self._open),
            "CloseSession": grpc.unary_unary_rpc_method_handler(self._nothing),
            "InterruptCell": grpc.unary_unary_rpc_method_handler(self._silence),
            "Health": grpc.unary_unary_rpc_method_handler(self._nothing),
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def __aenter__(self) -> "HostileAgent":
        await self._server.start()
        if self.is_enveloped:
            self._way = Way(self._connect, reads=self._reads)
            await self._way.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def stream(self, take: Take) -> Stream:
        return self._way.stream(take) if self._way else super().stream(take)

    async def stop(self) -> None:
        if self._way:
            await self._way.stop()
        await self.channel.close()
        await self._server.stop(grace=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """It ends with its test."""

    async def epitaph(self, wait: float = 0.0) -> str:
        return await self._way.epitaph(wait) if self._way else ""

    async def _open(self, request: bytes, context: Any) -> bytes:
        if self._refusal:
            await context.abort(grpc.StatusCode.DATA_LOSS, self._refusal)
        return OPENED.SerializeToString()

    async def _nothing(self, request: bytes, context: Any) -> bytes:
        return b""

    async def _silence(self, request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def _connect(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.connections += 1
        cell = ""
        if self._reads:
            await anext(requests)
            cell = pb.ConnectRequest.FromString(await anext(requests)).execute.cell_id
            self.heard.set()
        answers = self._answers(cell) if callable(self._answers) else self._answers
        if isinstance(answers, AsyncIterator):
            async for answer in answers:
                yield answer
        else:
            for answer in answers:
                yield answer
        await asyncio.Event().wait()
