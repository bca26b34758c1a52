"""The stream of a session, `AgentService.Connect`: over gRPC, or straight in the envelope."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.errors import SandboxLost

STATUSES = {status.value[0]: status for status in grpc.StatusCode}
Take = Callable[[Any], None]
"""Is given each ConnectResponse, None for what is none; what it raises ends the stream."""


class Stream(Protocol):
    def write_now(self, request: pb.ConnectRequest, /) -> bool:
        """Whether it could be handed on at once; else nothing has been done."""
        ...

    async def write(self, request: pb.ConnectRequest, /) -> None:
        """Raises ConnectionError when the stream is over."""

    async def run(self) -> grpc.aio.AioRpcError:
        """To its end, which is always an error.

        Raises:
            SandboxLost: this end has stopped the sandbox.
            Exception: what `Take` raised.
        """
        ...

    def cut(self) -> None:
        """End it here."""


class GrpcStream:
    def __init__(self, call: Any, take: Take) -> None:
        """`call` is a `grpc.aio.StreamStreamCall`."""
        self._call = call
        self._take = take
        self._is_cut = False

    def write_now(self, request: pb.ConnectRequest) -> bool:
        return False  # gRPC's own writing waits

    async def write(self, request: pb.ConnectRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise ConnectionError("the stream is over") from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise ConnectionError("the stream was cut") from None

    async def run(self) -> grpc.aio.AioRpcError:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
        except grpc.aio.AioRpcError as error:
            return error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            if not self._is_cut:
                raise SandboxLost("the sandbox has been stopped") from None
        return _error(await self._call.code(), await self._call.details())

    def cut(self) -> None:
        self._is_cut = True
        self._call.cancel()


class DirectStream:
    """Without a socket and gRPC's threads in between."""

    def __init__(self, stream: MessageStream, take: Take, is_stopped: Callable[[], bool]) -> None:
        """`is_stopped` tells whether this end has stopped the sandbox."""
        self._stream = stream
        self._take = take
        self._is_stopped = is_stopped
        self._ended = asyncio.Event()
        self._raised: Exception | None = None
        stream.hear(self._take_data, self._ended.set)

    def write_now(self, request: pb.ConnectRequest) -> bool:
        return self._stream.is_free and self._stream.write_now(request.SerializeToString())

    async def write(self, request: pb.ConnectRequest) -> None:
        await self._stream.write(request.SerializeToString())

    async def run(self) -> grpc.aio.AioRpcError:
        await self._ended.wait()
        if self._raised is not None:
            raise self._raised
        if self._is_stopped():
            raise SandboxLost("the sandbox has been stopped")
        status = self._stream.status
        code = STATUSES.get(status[0], grpc.StatusCode.UNKNOWN) if status else grpc.StatusCode.UNAVAILABLE
        return _error(code, status[1:].decode("utf-8", "replace") or "the stream was cut")

    def cut(self) -> None:
        self._stream.end()

    def _take_data(self, data: bytes) -> None:
        try:
            self._take(_parsed(data))
        except Exception as error:  # noqa: BLE001 - for whoever waits for the end
            self._raised = error
            self._stream.end()


def _parsed(data: bytes) -> pb.ConnectResponse | None:
    try:
        return pb.ConnectResponse.FromString(data)
    except DecodeError:
        return None


def _is_cancelled() -> bool:
    """The current task, that is: gRPC raises the same in it when its call has been."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _error(code: grpc.StatusCode, details: str | None) -> grpc.aio.AioRpcError:
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, none, none, details=details)
