"""An LM that follows a script: for tests and demos, public, and never silent about a wrong script."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from rlm_core.clients.base import DEFAULT_CONTEXT_WINDOW, LMClient, LMRequest, LMResponse
from rlm_core.errors import ConfigError, ScriptError
from rlm_core.text import one_line
from rlm_core.types import TokenUsage

Reply: TypeAlias = "str | LMResponse | BaseException"
Script: TypeAlias = "Sequence[Reply] | Callable[[LMRequest], Reply | Awaitable[Reply]]"
CHARS_PER_TOKEN = 4


class ScriptedClient(LMClient):
    """Answers from a list, one reply a call, or from a function of the request.

    A list fails when it is exhausted, and in `check_finished` (which `RLM.close` calls) when it is not
    used up, whoever made the client. An exception in place of a reply is raised. A plain function runs in
    a thread. Usage is counted as a token every four characters.
    """

    def __init__(
        self, replies: Script, model_name: str = "scripted", context_window: int = DEFAULT_CONTEXT_WINDOW
    ) -> None:
        if isinstance(replies, str) or not (callable(replies) or isinstance(replies, Sequence)):
            raise ConfigError("backend 'scripted' needs replies=[…] or replies=function")
        self.model_name = model_name
        self.context_window = context_window
        self.requests: list[LMRequest] = []
        """Every request so far, in the order of arrival."""
        self._replies = replies

    async def complete(self, request: LMRequest) -> LMResponse:
        index = len(self.requests)
        self.requests.append(request)
        reply = await self._reply(index, request)
        if isinstance(reply, BaseException):
            raise reply
        if isinstance(reply, LMResponse):
            return reply
        if not isinstance(reply, str):
            raise ScriptError(f"a scripted reply is a str, an LMResponse or an exception, not {reply!r:.80}")
        read = sum(len(message["content"]) for message in request.messages)
        usage = TokenUsage(read // CHARS_PER_TOKEN, len(reply) // CHARS_PER_TOKEN)
        return LMResponse(reply, request.model or self.model_name, usage, "stop")

    async def _reply(self, index: int, request: LMRequest) -> Reply:
        if isinstance(self._replies, Sequence):
            if index >= len(self._replies):
                asked = one_line(request.messages[-1]["content"], 120)
                raise ScriptError(
                    f"the script has {len(self._replies)} replies; call {index + 1} was: {asked}"
                )
            return self._replies[index]
        if inspect.iscoroutinefunction(self._replies):
            result: Any = await self._replies(request)
        else:
            result = await asyncio.to_thread(self._replies, request)
            if inspect.isawaitable(result):
                result = await result
        return result  # type: ignore[no-any-return]

    def check_finished(self) -> None:
        if isinstance(self._replies, Sequence) and len(self.requests) < len(self._replies):
            left = len(self._replies) - len(self.requests)
            raise ScriptError(f"{left} of {len(self._replies)} scripted replies were never asked for")
