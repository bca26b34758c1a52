"""LiteLLM, which knows how to speak to many providers."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import openai

from rlm_core.clients import openai_answers
from rlm_core.clients.base import DEFAULT_CONTEXT_WINDOW, LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS, Peer
from rlm_core.errors import ConfigError, ProviderError
from rlm_core.text import one_line, without_userinfo

# It would fetch its table of prices from the internet when it is imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
import litellm

NO_KEY = "no-key"


class LiteLLMClient(LMClient):
    """`model_name` with the provider's name before it, as `anthropic/claude-sonnet-4-5`; keys come from the
    variables that LiteLLM documents. Other keywords go to `litellm.acompletion`."""

    alive: ClassVar[int] = 0

    def __init__(
        self,
        model_name: str | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        context_window: int = DEFAULT_CONTEXT_WINDOW,
        timeout: float = 600.0,
        max_retries: int | None = None,
        **call_kwargs: Any,
    ) -> None:
        """Raises ConfigError for a wrong argument."""
        if not model_name:
            raise ConfigError("backend 'litellm' needs backend_kwargs={'model_name': …}")
        litellm.suppress_debug_info = True
        LiteLLMClient.alive += 1
        self.model_name = model_name
        self.context_window = context_window
        self.max_retries = max_retries
        self._where = without_userinfo(base_url) if base_url else "LiteLLM"
        self._arguments: dict[str, Any] = {**call_kwargs, **(sampling_args or {})}
        self._arguments |= {"timeout": timeout, "num_retries": 0, "max_retries": 0}
        if base_url:  # to which it would send the environment's key of whatever provider the model names
            self._arguments |= {"base_url": base_url, "api_key": api_key or NO_KEY}
        elif api_key:
            self._arguments["api_key"] = api_key
        self.output_tokens = self._arguments.get("max_completion_tokens") or self._arguments.get("max_tokens")

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        peer = Peer(self._where, model, self.context_window)
        arguments = dict(self._arguments)
        if request.max_output_tokens is not None:
            name = "max_completion_tokens" if "max_completion_tokens" in arguments else "max_tokens"
            arguments[name] = request.max_output_tokens
        messages: Any = [dict(message) for message in request.messages]
        try:
            made: Any = await litellm.acompletion(model=model, messages=messages, **arguments)
            response = openai_answers.of_completion(made, model)
        except openai.OpenAIError as error:  # its own are made from these
            raise _failure(error, peer) from None
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it lets through whatever the providers' code raises
            raise peer.not_understood(f"a completion: {one_line(repr(error), DETAIL_CHARS)}") from None
        return response

    async def aclose(self) -> None:
        """LiteLLM's connections are shared by the whole process: the last one closes them."""
        LiteLLMClient.alive -= 1
        if not LiteLLMClient.alive:
            close: Any = litellm.close_litellm_async_clients  # type: ignore[attr-defined]
            await close()


def _failure(error: Any, peer: Peer) -> ProviderError:
    """It keeps a provider's status and headers where OpenAI's SDK has not got them."""
    status = getattr(error, "status_code", None)
    if isinstance(error, (openai.APITimeoutError, openai.APIConnectionError)) or not isinstance(status, int):
        return openai_answers.failure(error, peer)
    return peer.of_status(status, str(error), getattr(error, "litellm_response_headers", None) or {})
