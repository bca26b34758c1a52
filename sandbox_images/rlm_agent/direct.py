"""`AgentService.Connect` straight from the envelope, for a host at the other end of stdin and stdout."""

import asyncio
import hmac
import logging
from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError

from rlm_agent import errors
from rlm_agent.guard import MAX_DETAILS, STATUS, status_of
from rlm_agent.host import Host, Responses
from rlm_agent.rpc.messages import MessageStream
from rlm_agent.rpc.v1 import agent_pb2 as pb

log = logging.getLogger("rlm_agent")


class Direct:
    def __init__(self, new_host: Callable[[Responses], Host], token: str) -> None:
        self._new_host = new_host
        self._token = token.encode()
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, stream: MessageStream, token: bytes) -> None:
        """One call, to its end; for whoever has the token, as with gRPC."""
        if not hmac.compare_digest(token, self._token):
            _end(stream, grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")
            return
        host = self._new_host(DirectResponses(stream))
        stream.hear(
            lambda data: _take(host, data),
            lambda: host.end(errors.SessionGone("the host closed the connection")),
        )
        task = asyncio.ensure_future(_tell_all(host, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class DirectResponses:
    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream

    async def write(self, response: pb.ConnectResponse) -> None:
        await self._stream.write(response.SerializeToString())

    @property
    def is_free(self) -> bool:
        return self._stream.is_free

    def write_now(self, response: pb.ConnectResponse) -> bool:
        return self._stream.write_now(response.SerializeToString())


def _take(host: Host, data: bytes) -> None:
    try:
        request = pb.ConnectRequest.FromString(data)
    except DecodeError:
        host.end(errors.Invalid("what came is no message of ours"))
    else:
        host.take(request)


async def _tell_all(host: Host, stream: MessageStream) -> None:
    try:
        await host.tell_all()
    except tuple(STATUS) as error:
        _end(stream, status_of(error), str(error))
    except Exception as error:
        log.exception("a stream can't go on")
        _end(stream, grpc.StatusCode.UNKNOWN, repr(error))
    finally:
        host.leave()
        stream.end()


def _end(stream: MessageStream, status: grpc.StatusCode, details: str) -> None:
    stream.end(bytes([status.value[0]]) + details[:MAX_DETAILS].encode("utf-8", "replace"))
