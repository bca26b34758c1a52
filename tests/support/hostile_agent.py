"""An agent that speaks gRPC and means no good: it answers Connect with whatever bytes a test gives it."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.environment import Sandbox
from rlm_core.janitor import REMOVE, Janitor
from rlm_core.transport.unix import unix_channel

SERVICE = "rlm_agent.rpc.v1.AgentService"
OPENED = pb.OpenSessionResponse(protocol_version=pb.PROTOCOL_VERSION_CURRENT)


class HostileAgent(Sandbox):
    """`answers` go up on Connect once the host has said something; a function makes them from the id of the
    cell. `refusal` is what OpenSession says. It is deaf to interrupts: it hears them, and says nothing."""

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
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        await self.channel.close()
        await self._server.stop(grace=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """It ends with its test."""

    async def epitaph(self, wait: float = 0.0) -> str:
        return ""

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
