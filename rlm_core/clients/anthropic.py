"""Anthropic's Messages API, by its official SDK."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import anthropic

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS, NO_KEY, Peer, transport_errors
from rlm_core.clients.sampling import json_size, refuse_ours
from rlm_core.errors import ConfigError, ProviderError
from rlm_core.text import one_line
from rlm_core.types import TokenUsage

DEFAULT_BASE_URL = "https://api.anthropic.com"
MAX_TOKENS = 32_768
"""Of an answer, which this API wants to be told; as in the original library."""
LEAST_TEXT_TOKENS = 256
"""Beside what it may think, which is part of the answer."""
STREAMED_TOKENS = 16_384
"""Longer answers are streamed: the SDK refuses to wait in one piece for what may take ten minutes."""
CONTEXT_WINDOW = 200_000
EPHEMERAL = {"type": "ephemeral"}


class AnthropicClient(LMClient):
    """Keyword names are those of the original library; unknown ones go to `anthropic.AsyncAnthropic`."""

    def __init__(
        self,
        model_name: str | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        max_tokens: int | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        context_window: int = CONTEXT_WINDOW,
        timeout: float = 600.0,
        max_retries: int | None = None,
        **client_kwargs: Any,
    ) -> None:
        """Raises ConfigError for a wrong argument, or without a key."""
        if not model_name:
            raise ConfigError("backend 'anthropic' needs backend_kwargs={'model_name': …}")
        self.model_name = model_name
        self.context_window = context_window
        self.max_retries = max_retries
        self.base_url = base_url or os.environ.get("ANTHROPIC_BASE_URL") or DEFAULT_BASE_URL
        self.resolved = {"base_url": self.base_url}
        refuse_ours(sampling_args)
        self._sampling = {key: value for key, value in (sampling_args or {}).items() if value is not None}
        self.output_tokens = self._sampling.pop("max_tokens", max_tokens)
        self.tokens_beside = json_size(self._sampling)
        self.least_output_tokens = _thinking(self._sampling)
        try:
            self._client = anthropic.AsyncAnthropic(
                api_key=api_key or _key_for(self.base_url),
                base_url=self.base_url,
                timeout=timeout,
                max_retries=0,
                **client_kwargs,
            )
            if urlsplit(self.base_url).hostname != urlsplit(DEFAULT_BASE_URL).hostname:
                # It takes others from ANTHROPIC_CUSTOM_HEADERS, which are for Anthropic.
                self._client._custom_headers = dict(client_kwargs.get("default_headers") or {})
        except (TypeError, ValueError, anthropic.AnthropicError) as error:
            detail = one_line(str(error), DETAIL_CHARS)
            raise ConfigError(f"backend_kwargs for 'anthropic': {detail}") from None

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        peer = Peer.at(self.base_url, model, self.context_window, self._client.api_key)
        limit = request.max_output_tokens or self.output_tokens or MAX_TOKENS
        arguments = {**self._sampling, **_messages(request), "model": model, "max_tokens": limit}
        if request.idempotency_key:
            headers = {"Idempotency-Key": request.idempotency_key}
            arguments["extra_headers"] = {**headers, **arguments.get("extra_headers", {})}
        try:
            if limit > STREAMED_TOKENS:
                async with self._client.messages.stream(**arguments) as stream:
                    message = await stream.get_final_message()
            else:
                message = await self._client.messages.create(**arguments)
            return _response(message, model, peer)
        except anthropic.AnthropicError as error:
            raise _failure(error, peer) from None
        except transport_errors() as error:  # of a stream, which the SDK lets through
            raise peer.lost(error, timeout=isinstance(error, TimeoutError)) from None
        except (TypeError, ValueError, AttributeError, LookupError, AssertionError, RecursionError) as error:
            if "sampling" in str(error) or "unexpected keyword" in str(error):
                detail = one_line(str(error), DETAIL_CHARS)
                raise ConfigError(f"sampling_args: {detail}; use extra_body for others") from None
            raise peer.not_understood("a message; is it Anthropic's API?") from None

    async def aclose(self) -> None:
        await self._client.close()


def _key_for(base_url: str) -> str:
    """The environment's key, for Anthropic only."""
    if urlsplit(base_url).hostname != urlsplit(DEFAULT_BASE_URL).hostname:
        return NO_KEY
    key = os.environ.get("ANTHROPIC_API_KEY")
    if not key:
        raise ConfigError(
            "no API key for Anthropic: set ANTHROPIC_API_KEY, or pass api_key (in backend_kwargs)"
        )
    return key


def _thinking(sampling: Mapping[str, Any]) -> int:
    """Tokens that an answer must be allowed to have, so that the API takes the request at all."""
    thinking = sampling.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return budget + LEAST_TEXT_TOKENS if isinstance(budget, int) else 0


def _messages(request: LMRequest) -> dict[str, Any]:
    """System text apart, and marks for the prompt cache where the next request begins with the same."""
    system = "\n\n".join(each["content"] for each in request.messages if each["role"] == "system")
    messages: list[dict[str, Any]] = [dict(each) for each in request.messages if each["role"] != "system"]
    if request.goes_on and messages:
        last = messages[-1]
        last["content"] = [{"type": "text", "text": last["content"], "cache_control": EPHEMERAL}]
    arguments: dict[str, Any] = {"messages": messages}
    if system:
        block = {"type": "text", "text": system}
        arguments["system"] = [block | ({"cache_control": EPHEMERAL} if request.goes_on else {})]
    return arguments


def _response(message: Any, model: str, peer: Peer) -> LMResponse:
    """The text blocks; what it thought is not for the REPL."""
    if not message.stop_reason:
        raise peer.cut_off()
    text = "".join(block.text for block in message.content if block.type == "text")
    usage = message.usage
    read = usage.cache_read_input_tokens or 0
    written = usage.cache_creation_input_tokens or 0
    return LMResponse(
        text,
        str(message.model or model),
        TokenUsage(
            input_tokens=usage.input_tokens + read + written,
            output_tokens=usage.output_tokens,
            cached_tokens=read,
            cache_write_tokens=written,
        ),
        str(message.stop_reason),
    )


def _failure(error: anthropic.AnthropicError, peer: Peer) -> ProviderError:
    if isinstance(error, anthropic.APIConnectionError):
        return peer.lost(error, timeout=isinstance(error, anthropic.APITimeoutError))
    if isinstance(error, anthropic.APIStatusError):
        began_well = error.status_code < 400  # it is an event of the stream
        status = 500 if began_well else error.status_code
        failure = peer.of_status(status, str(error), error.response.headers)
        failure.may_be_billed = failure.may_be_billed or began_well
        return failure
    return peer.not_understood(f"what its SDK expects: {one_line(str(error), DETAIL_CHARS)}")
