"""Google's Gemini API, by its official SDK."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from google.genai import Client, errors, types

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS, NO_KEY, Peer, transport_errors
from rlm_core.clients.sampling import json_size, refuse_ours
from rlm_core.errors import ConfigError
from rlm_core.text import one_line
from rlm_core.types import TokenUsage

DEFAULT_BASE_URL = "https://generativelanguage.googleapis.com"
CONTEXT_WINDOW = 1_000_000
ROLES = {"user": "user", "assistant": "model"}


class GeminiClient(LMClient):
    """Keyword names are those of the original library. `sampling_args` are fields of
    `GenerateContentConfig`; `max_tokens` is its `max_output_tokens`."""

    def __init__(
        self,
        model_name: str | None = "gemini-2.5-flash",
        api_key: str | None = None,
        base_url: str | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        context_window: int = CONTEXT_WINDOW,
        timeout: float = 600.0,
        max_retries: int | None = None,
        api_version: str = "v1beta",
    ) -> None:
        """Raises ConfigError for a wrong argument, or without a key."""
        if not model_name:
            raise ConfigError("backend 'gemini' needs backend_kwargs={'model_name': …}")
        self.model_name = model_name
        self.context_window = context_window
        self.max_retries = max_retries
        self.base_url = base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or DEFAULT_BASE_URL
        self.resolved = {"base_url": self.base_url}
        refuse_ours(sampling_args)
        self._sampling = {key: value for key, value in (sampling_args or {}).items() if value is not None}
        if "max_tokens" in self._sampling:
            self._sampling["max_output_tokens"] = self._sampling.pop("max_tokens")
        self.output_tokens = self._sampling.get("max_output_tokens")
        if unknown := sorted(self._sampling.keys() - types.GenerateContentConfig.model_fields.keys()):
            raise ConfigError(f"sampling_args: gemini knows no {', '.join(unknown)}")
        self.tokens_beside = json_size(self._sampling)
        self._key = api_key or _key_for(self.base_url)
        try:
            types.GenerateContentConfig(**self._sampling)
            options = types.HttpOptions(
                base_url=self.base_url,
                api_version=api_version,
                timeout=int(timeout * 1000),
                retry_options=types.HttpRetryOptions(attempts=1),  # it is the broker that asks again
            )
            self._client = Client(api_key=self._key, vertexai=False, http_options=options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"backend 'gemini': {one_line(str(error), DETAIL_CHARS)}") from None

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        peer = Peer.at(self.base_url, model, self.context_window, self._key)
        try:
            made = await self._client.aio.models.generate_content(
                model=model, contents=_contents(request), config=self._config(request)
            )
            return _response(made, model, peer)
        except errors.APIError as error:
            headers = getattr(error.response, "headers", None) or {}
            raise peer.of_status(int(error.code or 500), str(error), headers) from None
        except transport_errors() as error:
            raise peer.lost(error, timeout="timeout" in type(error).__name__.lower()) from None
        except (TypeError, ValueError, AttributeError, LookupError, RecursionError):
            raise peer.not_understood("generated content; is it Gemini's API?") from None

    async def aclose(self) -> None:
        await self._client.aio.aclose()
        self._client.close()

    def _config(self, request: LMRequest) -> types.GenerateContentConfig:
        system = "\n\n".join(each["content"] for each in request.messages if each["role"] == "system")
        fields = {**self._sampling, **({"system_instruction": system} if system else {})}
        if request.max_output_tokens is not None:
            fields["max_output_tokens"] = request.max_output_tokens
        return types.GenerateContentConfig(**fields)


def _key_for(base_url: str) -> str:
    """The environment's key, for Google only."""
    if urlsplit(base_url).hostname != urlsplit(DEFAULT_BASE_URL).hostname:
        return NO_KEY
    key = os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY")
    if not key:
        raise ConfigError("no API key for Gemini: set GEMINI_API_KEY, or pass api_key (in backend_kwargs)")
    return key


def _contents(request: LMRequest) -> list[types.ContentUnion]:
    return [
        types.Content(role=ROLES[each["role"]], parts=[types.Part(text=each["content"])])
        for each in request.messages
        if each["role"] != "system"
    ]


def _response(made: types.GenerateContentResponse, model: str, peer: Peer) -> LMResponse:
    if made.usage_metadata is None and not made.candidates:
        raise ValueError("no content")
    candidate = made.candidates[0] if made.candidates else None
    parts = (candidate.content.parts if candidate and candidate.content else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    finish = candidate.finish_reason.name if candidate and candidate.finish_reason else ""
    used = made.usage_metadata or types.GenerateContentResponseUsageMetadata()
    thought = used.thoughts_token_count or 0
    return LMResponse(
        text,
        made.model_version or model,
        TokenUsage(
            input_tokens=(used.prompt_token_count or 0) + (used.tool_use_prompt_token_count or 0),
            output_tokens=(used.candidates_token_count or 0) + thought,
            cached_tokens=used.cached_content_token_count or 0,
            reasoning_tokens=thought,
        ),
        finish,
    )
