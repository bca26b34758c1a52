"""`AgentService.Connect` straight from the envelope, for a host at the other end of stdin and stdout."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError

from rlm_agent import errors
from rlm_agent.guard import MAX_DETAILS, STATUS, status_of
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.v1 import agent_pb2 as pb

log = logging.getLogger("rlm_agent")


class Responses(Protocol):
    """Where `Connect` writes to: gRPC's context, or a stream of ours."""

    async def write(self, response: pb.ConnectResponse, /) -> None: ...


class Direct:
    def __init__(self, connect: Callable[["DirectCall", "DirectCall"], Awaitable[None]], token: str) -> None:
        self._connect = connect
        self._token = token.encode()

    async def serve(self, stream: MessageStream, token: bytes) -> None:
        """One call, to its end; for whoever has the token, as with gRPC."""
        if not hmac.compare_digest(token, self._token):
            return _end(stream, grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")
        call = DirectCall(stream)
        try:
            await self._connect(call, call)
        except tuple(STATUS) as error:
            _end(stream, status_of(error), str(error))
        except Exception as error:
            log.exception("a stream can't go on")
            _end(stream, grpc.StatusCode.UNKNOWN, repr(error))
        finally:
            stream.end()


class DirectCall:
    """What comes, and where the answers go."""

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream

    def __aiter__(self) -> "DirectCall":
        return self

    async def __anext__(self) -> pb.ConnectRequest:
        data = await self._stream.read()
        if data is None:
            raise StopAsyncIteration
        try:
            return pb.ConnectRequest.FromString(data)
        except DecodeError:
            raise errors.Invalid("what came is no message of ours") from None

    async def write(self, response: pb.ConnectResponse) -> None:
        await self._stream.write(response.SerializeToString())


def _end(stream: MessageStream, status: grpc.StatusCode, details: str) -> None:
    stream.end(bytes([status.value[0]]) + details[:MAX_DETAILS].encode("utf-8", "replace"))
