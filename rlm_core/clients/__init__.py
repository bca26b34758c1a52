"""LM clients by backend name. Each SDK is imported when its backend is first asked for."""

from collections.abc import Callable, Mapping
from typing import Any

from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.clients.scripted import ScriptedClient
from rlm_core.errors import ConfigError, MissingExtra

__all__ = ["LMClient", "LMRequest", "LMResponse", "ScriptedClient", "known_backends", "make_client"]


def _openai(**kwargs: Any) -> LMClient:
    from rlm_core.clients.openai import OpenAIClient

    return OpenAIClient(**kwargs)


BACKENDS: dict[str, Callable[..., LMClient]] = {"openai": _openai, "scripted": ScriptedClient}


def known_backends() -> list[str]:
    return sorted(BACKENDS)


def make_client(backend: str, kwargs: Mapping[str, Any]) -> LMClient:
    """A client by backend name.

    Raises:
        ConfigError: unknown name (with the known ones) or wrong arguments.
        MissingExtra: its SDK is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(known_backends())}")
    try:
        return BACKENDS[backend](**kwargs)
    except ImportError:
        raise MissingExtra(f"backend {backend!r}", backend) from None
    except TypeError as error:
        raise ConfigError(f"backend_kwargs for {backend!r}: {error}") from None
