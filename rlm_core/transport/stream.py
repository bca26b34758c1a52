"""The stream of a session, `AgentService.Connect`: over gRPC, or straight in the envelope."""

from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.errors import SandboxLost

STATUSES = {status.value[0]: status for status in grpc.StatusCode}


class Stream(Protocol):
    """As gRPC's own `grpc.aio.StreamStreamCall` has it."""

    async def write(self, request: pb.ConnectRequest, /) -> None: ...

    async def read(self) -> Any:
        """A ConnectResponse, None for what is none, or `grpc.aio.EOF`."""

    def cancel(self) -> bool: ...

    async def code(self) -> grpc.StatusCode: ...

    async def details(self) -> str | None: ...


async def error_of(stream: Stream) -> grpc.aio.AioRpcError:
    """What a stream that has ended ended with."""
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(await stream.code(), none, none, details=await stream.details())


class DirectStream:
    """Without a socket and gRPC's threads in between."""

    def __init__(self, stream: MessageStream, is_stopped: Callable[[], bool]) -> None:
        """`is_stopped` tells whether this end has stopped the sandbox."""
        self._stream = stream
        self._is_stopped = is_stopped

    async def write(self, request: pb.ConnectRequest, /) -> None:
        """Raises ConnectionError when the stream is over."""
        await self._stream.write(request.SerializeToString())

    async def read(self) -> Any:
        """Raises SandboxLost when this end has stopped the sandbox."""
        data = await self._stream.read()
        if data is None and self._is_stopped():
            raise SandboxLost("the sandbox has been stopped")
        if data is None:
            return grpc.aio.EOF
        try:
            return pb.ConnectResponse.FromString(data)
        except DecodeError:
            return None

    def cancel(self) -> bool:
        self._stream.end()
        return True

    async def code(self) -> grpc.StatusCode:
        """UNAVAILABLE where this end has cut it, or the link."""
        status = self._stream.status
        return STATUSES.get(status[0], grpc.StatusCode.UNKNOWN) if status else grpc.StatusCode.UNAVAILABLE

    async def details(self) -> str | None:
        return self._stream.status[1:].decode("utf-8", "replace") or "the stream was cut"
