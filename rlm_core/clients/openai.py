"""OpenAI chat completions, and every server that speaks them (vLLM, Ollama, llama.cpp, OpenRouter, …)."""

import inspect
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.resources.chat.completions import AsyncCompletions
from openai.types.chat import ChatCompletion

from rlm_core.clients.base import DEFAULT_CONTEXT_WINDOW, LMClient, LMRequest, LMResponse
from rlm_core.errors import (
    ConfigError,
    ProviderError,
    ProviderOverloaded,
    ProviderRefused,
    ProviderRejected,
    ProviderUnreachable,
)
from rlm_core.text import one_line, printable, without_userinfo
from rlm_core.types import TokenUsage

DEFAULT_BASE_URL = "https://api.openai.com/v1"
NO_KEY = "no-key"
DETAIL_CHARS = 300


class OpenAIClient(LMClient):
    """Keyword names are those of the original library; unknown ones go to `openai.AsyncOpenAI`."""

    def __init__(
        self,
        model_name: str | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        context_window: int = DEFAULT_CONTEXT_WINDOW,
        timeout: float = 600.0,
        **client_kwargs: Any,
    ) -> None:
        if not model_name:
            raise ConfigError("backend 'openai' needs backend_kwargs={'model_name': …}")
        self.model_name = model_name
        self.context_window = context_window
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ConfigError(f"base_url must start with http:// or https://, not {self.base_url!r:.80}")
        self._sampling = _sampling(sampling_args or {})
        known = inspect.signature(AsyncCompletions.create).parameters
        if unknown := sorted(self._sampling.keys() - known.keys()):
            raise ConfigError(
                f"sampling_args: openai knows no {', '.join(unknown)}; use extra_body for others"
            )
        try:
            self._client = openai.AsyncOpenAI(
                api_key=api_key or _key_for(self.base_url),
                base_url=self.base_url,
                timeout=timeout,
                **client_kwargs,
            )
        except (TypeError, AttributeError, ValueError, openai.OpenAIError) as error:
            raise ConfigError(f"backend_kwargs for 'openai': {one_line(str(error), DETAIL_CHARS)}") from None

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        try:
            messages: Any = [dict(message) for message in request.messages]
            create = self._client.chat.completions.create
            return _response(await create(model=model, messages=messages, **self._sampling), model)
        except openai.OpenAIError as error:
            raise self._mapped(error, model) from None
        except (ValueError, TypeError, AttributeError, LookupError):
            # The SDK makes its objects from whatever JSON arrives, unchecked.
            where = without_userinfo(self.base_url)
            raise ProviderError(
                f"{where} did not answer with a chat completion; is it an OpenAI API?"
            ) from None

    async def aclose(self) -> None:
        await self._client.close()

    def _mapped(self, error: openai.OpenAIError, model: str) -> ProviderError:
        where = f"{without_userinfo(self.base_url)} (model {model!r})"
        detail = printable(one_line(str(error), DETAIL_CHARS))
        if isinstance(error, openai.APITimeoutError):
            return ProviderUnreachable(f"{where} did not answer in time")
        if isinstance(error, openai.APIConnectionError):
            cause = printable(one_line(str(error.__cause__ or error), DETAIL_CHARS))
            return ProviderUnreachable(f"can't reach {where}: {cause}; is the server running?")
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return ProviderRefused(f"{where} refused the API key: {detail}")
        if isinstance(error, (openai.RateLimitError, openai.InternalServerError)):
            return ProviderOverloaded(f"{where} failed or is overloaded: {detail}")
        if isinstance(error, openai.APIStatusError):
            return ProviderRejected(f"{where} rejected the request: {detail}")
        return ProviderError(f"{where}: {detail}")


def _key_for(base_url: str) -> str:
    """The environment's OpenAI key, for OpenAI only: a key goes to its own provider and nowhere else."""
    if urlsplit(base_url).hostname != urlsplit(DEFAULT_BASE_URL).hostname:
        return NO_KEY
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise ConfigError(
            "no API key for OpenAI: set OPENAI_API_KEY, pass api_key (in backend_kwargs), "
            "or pass base_url for a server that needs none"
        )
    return key


def _sampling(args: Mapping[str, Any]) -> dict[str, Any]:
    """`max_tokens` under the name that today's chat completions take, as the original library does."""
    renamed = {"max_completion_tokens" if key == "max_tokens" else key: value for key, value in args.items()}
    return {key: value for key, value in renamed.items() if value is not None}


def _response(completion: ChatCompletion, model: str) -> LMResponse:
    choice = completion.choices[0]
    content: Any = choice.message.content
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str | None):
        raise TypeError("content is not text")
    text = content or ""
    return LMResponse(
        text, str(completion.model or model), _usage(completion), str(choice.finish_reason or "")
    )


def _usage(completion: ChatCompletion) -> TokenUsage:
    usage = completion.usage
    if usage is None:
        return TokenUsage()
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None
    cost = (usage.model_extra or {}).get("cost")
    return TokenUsage(
        _count(usage.prompt_tokens),
        _count(usage.completion_tokens),
        _count(cached),
        _count(reasoning),
        float(cost) if isinstance(cost, (int, float)) else None,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
