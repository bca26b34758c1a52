"""LM clients by backend name. Each SDK is imported when its backend is first asked for."""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rlm_core.arguments import check_number
from rlm_core.broker.pace import Rate
from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.clients.failures import DETAIL_CHARS
from rlm_core.clients.scripted import ScriptedClient
from rlm_core.errors import ConfigError, MissingExtra
from rlm_core.text import one_line

__all__ = ["LMClient", "LMRequest", "LMResponse", "ScriptedClient", "known_backends", "make_client"]

BACKENDS = {
    "anthropic": "anthropic:AnthropicClient",
    "azure_openai": "azure_openai:AzureOpenAIClient",
    "gemini": "gemini:GeminiClient",
    "litellm": "litellm:LiteLLMClient",
    "llama_cpp": "llama_cpp:LlamaCppClient",
    "ollama": "openai_compatible:OllamaClient",
    "openai": "openai:OpenAIClient",
    "openrouter": "openai_compatible:OpenRouterClient",
    "portkey": "portkey:PortkeyClient",
    "scripted": "scripted:ScriptedClient",
    "vercel": "openai_compatible:VercelClient",
    "vllm": "openai_compatible:VllmClient",
}

EXTRAS = {"llama_cpp": "local"}
"""Where the extra has another name than the backend."""

WITHOUT_EFFECT = frozenset({"api_key", "timeout", "max_retries"})
"""Arguments on which no answer depends."""


def known_backends() -> list[str]:
    return sorted(BACKENDS)


def check_backend(backend: object) -> None:
    """Raises ConfigError for an unknown name, with the known ones."""
    if backend not in BACKENDS:
        close = difflib.get_close_matches(str(backend), BACKENDS, 1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown backend {backend!r}; {guess}known: {', '.join(known_backends())}")


def _check_common(kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError for arguments of all clients that are of a wrong type."""
    for name in ("context_window", "max_retries"):
        check_number(name, kwargs.get(name), 0 if name == "max_retries" else 1)
    if isinstance(timeout := kwargs.get("timeout"), (str, bytes)):
        raise ConfigError(f"timeout must be a number of seconds, not {timeout!r}")
    if not isinstance(kwargs.get("model_name"), str | None):
        raise ConfigError(f"model_name must be str, not {type(kwargs['model_name']).__name__}")


def make_client(backend: str, kwargs: Mapping[str, Any]) -> LMClient:
    """A client by backend name.

    Raises:
        ConfigError: unknown name (with the known ones) or wrong arguments.
        MissingExtra: its SDK is not installed.
    """
    check_backend(backend)
    module, name = BACKENDS[backend].split(":")
    try:
        kind: Callable[..., LMClient] = getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError:
        raise MissingExtra(f"backend {backend!r}", EXTRAS.get(backend, backend)) from None
    rate, arguments = _rate(kwargs)
    _check_common(arguments)
    try:
        client = kind(**arguments)
    except (TypeError, ValueError) as error:
        detail = one_line(str(error), DETAIL_CHARS)
        raise ConfigError(f"backend_kwargs for {backend!r}: {detail}") from None
    client.rate, client.identity = rate, _identity(client, backend, arguments)
    if client.max_concurrent is None:
        shared = {name: value for name, value in kwargs.items() if name != "sampling_args"}
        client.account = _hash([backend, shared, dict(client.resolved)])
    return client


def _rate(kwargs: Mapping[str, Any]) -> tuple[Rate, dict[str, Any]]:
    """The caller's limits, and the other arguments."""
    given = {field.name: kwargs.get(field.name) for field in fields(Rate)}
    for name, value in given.items():
        check_number(name, value, 0, whole=False)
    return Rate(**given), {name: value for name, value in kwargs.items() if name not in given}


def _identity(client: LMClient, backend: str, kwargs: Mapping[str, Any]) -> str:
    """A hash, as arguments may be secret; empty where one of them is an object."""
    decisive = {name: value for name, value in kwargs.items() if name not in WITHOUT_EFFECT}
    decisive |= {name: str(value) for name, value in decisive.items() if isinstance(value, Path)}
    return _hash([backend, decisive, dict(client.resolved)])


def _hash(parts: list[Any]) -> str:
    try:
        text = json.dumps(parts, sort_keys=True)
    except (TypeError, ValueError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()
