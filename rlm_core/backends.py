"""Which LMs a run has: names with their arguments, or clients that the caller owns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlm_core.clients import LMClient, check_backend
from rlm_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Backend:
    """Which LM: a name and its arguments, or a client that the caller owns."""

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    client: LMClient | None = None

    @property
    def model_name(self) -> str:
        if self.client is not None:
            return self.client.model_name
        return str(self.kwargs.get("model_name") or self.name)


def backends_of(
    backend: str | LMClient,
    kwargs: Mapping[str, Any] | None,
    other_backends: Sequence[str | LMClient] | None,
    other_kwargs: Sequence[Mapping[str, Any]] | None,
    sampling: Mapping[str, Any] | None,
    sub_sampling: Mapping[str, Any] | None,
) -> list[Backend]:
    """The root's backend, then the others; sampling arguments become arguments of the backend."""
    others = list(other_backends or ())
    arguments = [dict(each) for each in other_kwargs or [{} for _ in others]]
    if len(others) != len(arguments):
        raise ConfigError(f"{len(others)} other_backends but {len(arguments)} other_backend_kwargs")
    if sub_sampling and not others:
        others, arguments = [backend], [_with_sampling(kwargs or {}, sampling)]
    root = _backend(backend, kwargs or {}, sampling)
    samplings = [sub_sampling, *[None] * len(others)]
    return [root, *(_backend(*each) for each in zip(others, arguments, samplings, strict=False))]


def _backend(
    backend: str | LMClient, kwargs: Mapping[str, Any], sampling: Mapping[str, Any] | None
) -> Backend:
    if not isinstance(backend, LMClient):
        check_backend(backend)
        return Backend(backend, _with_sampling(kwargs, sampling))
    if kwargs or sampling:
        raise ConfigError("backend and sampling arguments go with a backend's name, not with a client")
    return Backend(type(backend).__name__, client=backend)


def _with_sampling(kwargs: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    if not sampling:
        return dict(kwargs)
    return {**kwargs, "sampling_args": {**(kwargs.get("sampling_args") or {}), **sampling}}
