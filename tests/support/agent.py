"""A raw gRPC client of a real agent, for tests of the wire itself."""

import asyncio
import contextlib
from collections import deque
from typing import Any

import grpc.aio
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core.environment import Sandbox


class RawHost:
    """Speaks the protocol by hand."""

    def __init__(self, sandbox: Sandbox, token: str | None = None) -> None:
        self.stub: Any = AgentServiceStub(sandbox.channel)
        self.metadata = (("rlm-token", sandbox.token if token is None else token),)
        self.stream: Any = None
        self._waiting: deque[pb.AgentMessage] = deque()

    async def ask(self, method: str, request: Any) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=20)

    async def open(
        self, session_id: str, version: int = pb.PROTOCOL_VERSION_CURRENT
    ) -> pb.OpenSessionResponse:
        request = pb.OpenSessionRequest(protocol_version=version, session_id=session_id)  # type: ignore[arg-type]
        response: pb.OpenSessionResponse = await self.ask("OpenSession", request)
        return response

    def dial(self) -> None:
        self.stream = self.stub.Connect(metadata=self.metadata)

    async def attach(self, session_id: str) -> None:
        self.dial()
        with contextlib.suppress(grpc.aio.AioRpcError):  # reading tells why it was refused
            await self.stream.write(pb.ConnectRequest(attach=pb.Attach(session_id=session_id)))

    async def execute(self, cell_id: str, code: str, from_event: int = 0) -> None:
        request = pb.ExecuteCell(cell_id=cell_id, code=code, from_event=from_event)
        await self.stream.write(pb.ConnectRequest(execute=request))

    async def read(self) -> pb.AgentMessage:
        if not self._waiting:
            async with asyncio.timeout(20):
                response = await self.stream.read()
            if response is grpc.aio.EOF:
                none = grpc.aio.Metadata()
                raise grpc.aio.AioRpcError(await self.stream.code(), none, none, await self.stream.details())
            self._waiting.extend(response.messages)
        return self._waiting.popleft()

    async def read_until(self, kind: str) -> tuple[list[pb.AgentMessage], pb.AgentMessage]:
        """What came before a message or event of this kind, and it."""
        before: list[pb.AgentMessage] = []
        while True:
            message = await self.read()
            name = message.WhichOneof("message")
            if name == kind or (name == "event" and message.event.WhichOneof("kind") == kind):
                return before, message
            before.append(message)

    def break_off(self) -> None:
        self.stream.cancel()
        self._waiting.clear()
