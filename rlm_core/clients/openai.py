"""OpenAI's APIs, by its official SDK: chat completions, or the Responses API on request."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import openai
from openai.resources.chat.completions import AsyncCompletions
from openai.resources.responses import AsyncResponses
from openai.types.chat import ChatCompletion

from rlm_core.clients import openai_answers
from rlm_core.clients.base import DEFAULT_CONTEXT_WINDOW, LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS, NO_KEY, Peer
from rlm_core.clients.sampling import json_size, refuse_ours
from rlm_core.errors import ConfigError, ProviderError
from rlm_core.text import one_line, without_userinfo

DEFAULT_BASE_URL = "https://api.openai.com/v1"
ROUTERS = {"openrouter.ai": "OPENROUTER_API_KEY", "ai-gateway.vercel.sh": "AI_GATEWAY_API_KEY"}
"""Whose key is whose, where `base_url` names one of them."""
APIS = ("chat", "responses")
OPTIONS = {
    "extra_headers": "headers",
    "extra_query": "params",
    "extra_body": "extra_json",
    "timeout": "timeout",
}
"""Arguments of a call that are not part of its body, and what the SDK's `post` calls them."""
SDK_FOLDER = str(Path(openai.__file__).parent)


def with_fast_http(url: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Another HTTP library than the one that the SDK takes by itself, which has an eighth of the throughput:
    1,000 calls of 100 ms, 100 at once, took it 15 s, and this one 1.9 s. It wants a name and a password
    beside the address, not in it."""
    if "http_client" in arguments:
        return url, dict(arguments)
    parts = urlsplit(url)
    auth = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    return without_userinfo(url), {"http_client": openai.DefaultAioHttpClient(auth=auth), **arguments}


def only_what_was_passed(sdk: Any, arguments: Mapping[str, Any]) -> None:
    """Drop what the SDK took from OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS: OpenAI's."""
    sdk.organization, sdk.project = arguments.get("organization"), arguments.get("project")
    sdk._custom_headers = dict(arguments.get("default_headers") or {})


def _is_watched(create: Any) -> bool:
    """Whether it is not the SDK's own any more: libraries for tracing put theirs in its place."""
    own = type(create) is FunctionType and create.__code__.co_filename.startswith(SDK_FOLDER)
    return not own


class OpenAIClient(LMClient):
    """Keyword names are those of the original library; unknown ones go to `openai.AsyncOpenAI`."""

    backend: ClassVar[str] = "openai"
    called: ClassVar[str] = "OpenAI"
    default_base_url: ClassVar[str] = DEFAULT_BASE_URL
    base_url_variable: ClassVar[str] = "OPENAI_BASE_URL"
    key_variable: ClassVar[str] = "OPENAI_API_KEY"
    """Where its key is; a key goes to its own provider and nowhere else."""
    errors: ClassVar[Any] = openai
    """The module that has the SDK's exceptions."""

    def __init__(
        self,
        model_name: str | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        context_window: int = DEFAULT_CONTEXT_WINDOW,
        timeout: float = 600.0,
        max_retries: int | None = None,
        api: str = "chat",
        **client_kwargs: Any,
    ) -> None:
        """`api`: "chat" or "responses".

        Raises:
            ConfigError: a wrong argument, or no key.
        """
        if not model_name:
            raise ConfigError(f"backend {self.backend!r} needs backend_kwargs={{'model_name': …}}")
        if api not in APIS:
            raise ConfigError(f"api must be one of {', '.join(APIS)}, not {api!r}")
        self.model_name = model_name
        self.context_window = context_window
        self.max_retries = max_retries
        self.api = api
        self.base_url = self._base_url(base_url)
        self.resolved = {"base_url": self.base_url}
        refuse_ours(sampling_args)
        self._sampling = self._checked_sampling(sampling_args or {})
        self.tokens_beside = json_size(self._sampling)
        self.output_tokens = self._sampling.get(self._limit_name)
        try:
            self._client = self._make_sdk(api_key, timeout=timeout, max_retries=0, **client_kwargs)
        except (TypeError, AttributeError, ValueError, openai.OpenAIError) as error:
            detail = one_line(str(error), DETAIL_CHARS)
            raise ConfigError(f"backend_kwargs for {self.backend!r}: {detail}") from None

    async def complete(self, request: LMRequest) -> LMResponse:
        model = request.model or self.model_name
        peer = Peer.at(self.base_url, model, self.context_window, getattr(self._client, "api_key", None))
        arguments = {**self._sampling, **self._hints(request)}
        if request.max_output_tokens is not None:
            arguments[self._limit_name] = request.max_output_tokens
        if request.idempotency_key:
            arguments["extra_headers"] = {
                "Idempotency-Key": request.idempotency_key,
                **arguments.get("extra_headers", {}),
            }
        messages: Any = [dict(message) for message in request.messages]
        try:
            if self.api == "responses":
                made = await self._client.responses.create(model=model, input=messages, **arguments)
                return openai_answers.of_response(made, model)
            completion = await self._chat({"model": model, "messages": messages, **arguments})
            return openai_answers.of_completion(completion, model)
        except self.errors.OpenAIError as error:
            raise openai_answers.failure(error, peer, self.errors) from None
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            # The SDK makes its objects from whatever JSON arrives, unchecked.
            raise self._not_understood(peer) from None

    async def aclose(self) -> None:
        await self._client.close()

    async def _chat(self, arguments: Mapping[str, Any]) -> Any:
        """As `chat.completions.create`, by the SDK's `post`: `create` goes over the whole body by its types
        first, which takes a third of the processor's time of a short call (measured: 0.9 ms, and 0.6 by
        `post`), and more of a long one."""
        if _is_watched(AsyncCompletions.create):
            return await self._client.chat.completions.create(**arguments)
        options: Any = {name: arguments[key] for key, name in OPTIONS.items() if key in arguments}
        return await self._client.post(
            "/chat/completions",
            cast_to=ChatCompletion,
            body={key: value for key, value in arguments.items() if key not in OPTIONS},
            options=options,
        )

    def _make_sdk(self, api_key: str | None, **arguments: Any) -> openai.AsyncOpenAI:
        key = api_key or self._key_of_environment()
        url, arguments = with_fast_http(self.base_url, arguments)
        made = openai.AsyncOpenAI(api_key=key, base_url=url, **arguments)
        if self.backend != "openai" or self._is_elsewhere():
            only_what_was_passed(made, arguments)
        return made

    def _base_url(self, given: str | None) -> str:
        url = given or os.environ.get(self.base_url_variable) or self.default_base_url
        if not url:
            raise ConfigError(f"backend {self.backend!r} needs backend_kwargs={{'base_url': …}}")
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"base_url must start with http:// or https://, not {url!r:.80}")
        return url

    def _key_of_environment(self) -> str:
        """The environment's key of this provider, for its own servers only."""
        if self._is_elsewhere():
            host = urlsplit(self.base_url).hostname or ""
            return os.environ.get(ROUTERS.get(host, "")) or NO_KEY
        key = os.environ.get(self.key_variable)
        if not key:
            raise ConfigError(
                f"no API key for {self.called}: set {self.key_variable}, pass api_key (in backend_kwargs), "
                "or pass base_url for a server that needs none"
            )
        return key

    def _is_elsewhere(self) -> bool:
        return urlsplit(self.base_url).hostname != urlsplit(self.default_base_url).hostname

    @property
    def _limit_name(self) -> str:
        return "max_output_tokens" if self.api == "responses" else "max_completion_tokens"

    def _checked_sampling(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """`max_tokens` under the name that today's APIs take, as the original library does."""
        other_names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        renamed = {self._limit_name if key in other_names else key: value for key, value in args.items()}
        create = AsyncResponses.create if self.api == "responses" else AsyncCompletions.create
        known = inspect.signature(create).parameters.keys() - {"self"}
        if unknown := sorted(renamed.keys() - known):
            raise ConfigError(
                f"sampling_args: {self.backend} knows no {', '.join(unknown)}; use extra_body for others"
            )
        given = {key: value for key, value in renamed.items() if value is not None}
        body = {key: value for key, value in given.items() if key == "extra_body" or key not in OPTIONS}
        try:
            json.dumps(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"sampling_args have to be JSON: {one_line(str(error), DETAIL_CHARS)}"
            ) from None
        return given

    def _hints(self, request: LMRequest) -> dict[str, Any]:
        """For OpenAI's prompt cache: requests that begin alike should meet the same machine."""
        if not request.goes_on or self._is_elsewhere() or self.backend != "openai":
            return {}
        start = request.messages[0]["content"].encode("utf-8", "surrogatepass")
        return {"prompt_cache_key": hashlib.sha256(start).hexdigest()[:32]}

    def _not_understood(self, peer: Peer) -> ProviderError:
        what = "a response" if self.api == "responses" else "a chat completion; is it an OpenAI API?"
        return peer.not_understood(what)
