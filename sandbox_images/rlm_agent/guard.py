"""Before every method, and before any message is read: the sandbox's bearer token. After every method: one
table from errors to statuses.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from rlm_agent import errors
from rlm_agent.supervision import SupervisorGone

TOKEN_KEY = "rlm-token"
MAX_DETAILS = 2_000
"""Characters."""
STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.UnknownSession: grpc.StatusCode.NOT_FOUND,
    errors.SessionGone: grpc.StatusCode.DATA_LOSS,
    errors.Busy: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Mismatch: grpc.StatusCode.UNIMPLEMENTED,
    SupervisorGone: grpc.StatusCode.DATA_LOSS,
    OSError: grpc.StatusCode.INTERNAL,
}
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        metadata: Any = handler_call_details.invocation_metadata or ()
        sent = dict(metadata).get(TOKEN_KEY, "")
        allowed = isinstance(sent, str) and hmac.compare_digest(sent.encode(), self._token.encode())
        if allowed and handler is not None:
            return _guarded(handler)
        # As a stream, whatever it is: nothing is received of it, and nothing parsed.
        return grpc.stream_stream_rpc_method_handler(_unknown if allowed else _refuse)


def _guarded(handler: Any) -> Handler:
    codec = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    method = handler.stream_stream or handler.stream_unary or handler.unary_unary

    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except tuple(STATUS) as error:
            if handler.stream_unary:
                # A client that is still writing would lose the status: its gRPC sees the broken write first.
                async for _ in request:
                    pass
            await _abort(context, error)

    if handler.stream_stream:
        return grpc.stream_stream_rpc_method_handler(guarded, **codec)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(guarded, **codec)
    return grpc.unary_unary_rpc_method_handler(guarded, **codec)


def status_of(error: Exception) -> grpc.StatusCode:
    """Of one of the errors that have one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


async def _unknown(requests: Any, context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
    raise AssertionError("abort returned")


async def _refuse(requests: Any, context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token")
    raise AssertionError("abort returned")


async def _abort(context: Context, error: Exception) -> NoReturn:
    await context.abort(status_of(error), str(error)[:MAX_DETAILS])
    raise AssertionError("abort returned")
