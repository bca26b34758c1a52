"""LiteLLM, which knows how to speak to many providers."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import openai

from rlm_core.clients import openai_answers
from rlm_core.clients.base import DEFAULT_CONTEXT_WINDOW, LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import NO_KEY, Peer
from rlm_core.clients.sampling import json_size, refuse_ours
from rlm_core.errors import ConfigError, ProviderError

# It would fetch its table of prices from the internet when it is imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
import litellm

ADDRESS_VARIABLES = ("_API_BASE", "_BASE_URL", "_API_VERSION", "_ENDPOINT")


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
        refuse_ours(sampling_args)
        base_url = base_url or call_kwargs.pop("api_base", None) or _address_for(model_name)
        self._where, self._key = base_url or "LiteLLM", api_key or (NO_KEY if base_url else "")
        self.resolved = {} if base_url else _addresses()
        self.tokens_beside = json_size(sampling_args or {})
        self._arguments: dict[str, Any] = {**call_kwargs, **(sampling_args or {})}
        self._arguments |= {"timeout": timeout, "num_retries": 0, "max_retries": 0}
        if base_url:  # to which it would send the environment's key of whatever provider the model names
            self._arguments |= {"base_url": base_url, "api_key": self._key}
        elif api_key:
            self._arguments["api_key"] = api_key
        self.output_tokens = self._arguments.get("max_completion_tokens") or self._arguments.get("max_tokens")

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        peer = Peer.at(self._where, model, self.context_window, self._key)
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
            raise peer.not_understood(f"a completion: {error!r}") from None
        return response

    async def aclose(self) -> None:
        """LiteLLM's connections are shared by the whole process: the last one closes them."""
        LiteLLMClient.alive -= 1
        if not LiteLLMClient.alive:
            close: Any = litellm.close_litellm_async_clients  # type: ignore[attr-defined]
            await close()
            kept: Any = litellm.in_memory_llm_clients_cache
            kept.flush_cache()  # else the next client would get closed connections


def _failure(error: Any, peer: Peer) -> ProviderError:
    """It keeps a provider's status and headers where OpenAI's SDK has not got them."""
    status, headers = getattr(error, "status_code", None), getattr(error, "litellm_response_headers", None)
    if isinstance(error, (openai.APITimeoutError, openai.APIConnectionError)) or not isinstance(status, int):
        return openai_answers.failure(error, peer)
    if status >= 500 and not headers:  # made up: there was no reply
        return peer.lost(error)
    return peer.of_status(status, str(error), headers or {})


def _addresses() -> dict[str, str]:
    """Of the environment, where LiteLLM finds its providers."""
    return {name: value for name, value in os.environ.items() if name.endswith(ADDRESS_VARIABLES)}


def _address_for(model: str) -> str | None:
    """Where the environment sends a model's provider, as LiteLLM would; its key is not for that server."""
    try:
        provider = litellm.get_llm_provider(model)[1].upper()
    except openai.OpenAIError:
        return None  # the first call says what is wrong with the name
    names = (f"{provider}_API_BASE", f"{provider}_BASE_URL")
    return next((value for name in names if (value := os.environ.get(name))), None)
