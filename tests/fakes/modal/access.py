"""Who may ask Modal's service for something."""

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from tests.fakes.modal.boxes import State

TOKEN = ("ak-test", f"as-{secrets.token_hex(16)}")


class Check(grpc.aio.ServerInterceptor):
    """Refuses who has no token: the account's, or for the command router one that was given and still holds."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]
        self._state.requests.append(method)
        handler = await continuation(handler_call_details)
        sent = dict(handler_call_details.invocation_metadata)
        if "TaskCommandRouter" in handler_call_details.method:
            known = sent.get("authorization", "").removeprefix("Bearer ") in self._state.tokens
        else:
            known = (sent.get("x-modal-token-id"), sent.get("x-modal-token-secret")) == TOKEN
        return handler if known or handler is None else _refusing(handler)


def _refusing(handler: Any) -> Any:
    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known")

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await refuse(request, context)
        yield Empty()

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream, handler.request_deserializer)
    return grpc.unary_unary_rpc_method_handler(refuse, handler.request_deserializer)


def jwt() -> str:
    """One that ends soon, so that the SDK asks for another as soon as it is refused."""

    def part(content: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part({'exp': int(time.time()) + 20, 'id': secrets.token_hex(8)})}.x"
