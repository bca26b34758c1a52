"""`RLM`: what a user instantiates. Keywords, defaults and results are those of the original library."""

import asyncio
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rlm_core.broker.broker import Broker, Models
from rlm_core.clients import LMClient, make_client
from rlm_core.console import ConsoleObserver
from rlm_core.context import encode, read_path
from rlm_core.environment import make_environment
from rlm_core.errors import ConfigError
from rlm_core.logger import RLMLogger, RunLog
from rlm_core.observer import Observer
from rlm_core.pool import SandboxPool
from rlm_core.portal import portal
from rlm_core.prompts import PromptConfig
from rlm_core.run import LoopConfig, Run, Task
from rlm_core.text import without_userinfo
from rlm_core.types import RLMChatCompletion, RLMMetadata

NOT_YET: dict[str, Any] = {
    "depth": 0,
    "max_budget": None,
    "max_timeout": None,
    "max_tokens": None,
    "max_errors": None,
    "persistent": False,
    "custom_tools": None,
    "custom_sub_tools": None,
    "compaction": False,
    "compaction_threshold_pct": 0.85,
    "max_concurrent_subcalls": 4,
    "on_subcall_start": None,
    "on_subcall_complete": None,
    "on_iteration_start": None,
    "on_iteration_complete": None,
}
"""Keywords of the original library that this version does not serve, with their defaults."""


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


class RLM:
    """A recursive language model.

    Args:
        backend: name of an LM backend (`openai`, `scripted`), or an `LMClient`, which you then close.
        backend_kwargs: for the backend: `model_name`, `api_key`, `base_url`, `context_window` (tokens), …
        environment: where code runs: `local`, or the name of another installed environment.
        environment_kwargs: fields of `SandboxSpec`, e.g. `cell_timeout` (seconds), `memory`.
        max_depth: 1: a sub-call is a plain LM call. 0: no REPL, the LM is asked directly.
        max_iterations: turns of the root LM; then it is asked once more for its best answer.
        custom_system_prompt: replaces ours, taken as it is.
        other_backends: names or clients; the first is the LM of sub-calls; any can be asked for by the
            name of its model.
        other_backend_kwargs: one for each of `other_backends`, empty for a client.
        logger: captures the trajectory, and writes it when it has a `log_dir`.
        verbose: shows the turns on the console.
        sampling_args: for the root LM, e.g. `temperature`.
        sub_sampling_args: for the LM of sub-calls.
        orchestrator: adds our advice on dividing the work to the system prompt.
        user_prologue: a user message between the task and the first turn.
        observer: is told what happens as it happens.
        pool: warm sandboxes to take one from, in the place of `environment` and `environment_kwargs`.

    Raises:
        ConfigError: a wrong argument, or one of the original library that is not served yet.
    """

    def __init__(
        self,
        backend: str | LMClient = "openai",
        backend_kwargs: Mapping[str, Any] | None = None,
        environment: str = "local",
        environment_kwargs: Mapping[str, Any] | None = None,
        *,
        max_depth: int = 1,
        max_iterations: int = 30,
        custom_system_prompt: str | None = None,
        other_backends: Sequence[str | LMClient] | None = None,
        other_backend_kwargs: Sequence[Mapping[str, Any]] | None = None,
        logger: RLMLogger | None = None,
        verbose: bool = False,
        sampling_args: Mapping[str, Any] | None = None,
        sub_sampling_args: Mapping[str, Any] | None = None,
        orchestrator: bool = True,
        user_prologue: str | None = None,
        observer: Observer | None = None,
        pool: SandboxPool | None = None,
        **not_yet: Any,
    ) -> None:
        _refuse(not_yet)
        _check("backend_kwargs", backend_kwargs, Mapping, type(None))
        _check("environment_kwargs", environment_kwargs, Mapping, type(None))
        _check("other_backends", other_backends, list, tuple, type(None))
        _check("max_depth", max_depth, int)
        _check("max_iterations", max_iterations, int)
        _check("custom_system_prompt", custom_system_prompt, str, type(None))
        _check("user_prologue", user_prologue, str, type(None))
        _check("logger", logger, RLMLogger, type(None))
        _check("observer", observer, Observer, type(None))
        _check("pool", pool, SandboxPool, type(None))
        if pool is not None and environment not in ("local", pool.name):
            raise ConfigError(f"the pool is of environment {pool.name!r}, not {environment!r}")
        if pool is not None and environment_kwargs:
            raise ConfigError("environment_kwargs: give the policy to the pool, whose sandboxes are used")
        if max_depth not in (0, 1):
            raise ConfigError(f"max_depth={max_depth} is not served yet; this version has max_depth 0 and 1")
        if max_iterations < 1:
            raise ConfigError(f"max_iterations must be at least 1, not {max_iterations}")
        self.max_depth = max_depth
        self.max_iterations = max_iterations
        self.logger = logger
        self._backends = _backends(
            backend, backend_kwargs, other_backends, other_backend_kwargs, sampling_args, sub_sampling_args
        )
        self._environment_name = environment if pool is None else pool.name
        self._environment_kwargs = dict(environment_kwargs or {})
        self._source = pool or make_environment(environment, self._environment_kwargs)
        prompt = PromptConfig(custom_system_prompt, orchestrator, user_prologue)
        self._loop_config = LoopConfig(max_iterations, prompt)
        self._observer = observer
        self._verbose = verbose
        self._models: Models | None = None
        self._models_pid = os.getpid()
        self._owned: list[LMClient] = []

    def completion(self, prompt: Any, root_prompt: str | None = None) -> RLMChatCompletion:
        """Answer a question about a context of any length.

        Args:
            prompt: the context: str, bytes, list or dict; a `Path` is read (a folder becomes a dict).
            root_prompt: the question. Without one, the request is in the context itself.

        Raises:
            RLMError: what went wrong, in one line; nothing is left running.
        """
        return portal().run(self._complete(prompt, root_prompt))

    async def acompletion(self, prompt: Any, root_prompt: str | None = None) -> RLMChatCompletion:
        """`completion` for async code. Cancelling it ends the run and its sandbox."""
        return await portal().await_(self._complete(prompt, root_prompt))

    def close(self) -> None:
        """Close the LM clients that were made from names; safe to repeat."""
        portal().run(self._close())

    async def aclose(self) -> None:
        await portal().await_(self._close())

    def __enter__(self) -> "RLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        portal().run(self._close(check=error is None))

    async def __aenter__(self) -> "RLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await portal().await_(self._close(check=error is None))

    async def _complete(self, prompt: Any, root_prompt: str | None) -> RLMChatCompletion:
        _check("root_prompt", root_prompt, str, type(None))
        context = await asyncio.to_thread(read_path, prompt) if isinstance(prompt, Path) else prompt
        encoded = await asyncio.to_thread(encode, context)  # refuses before anything is started or paid for
        broker = Broker(self._get_models())
        task = Task(context, encoded, root_prompt, secrets.token_hex(4))
        log = await asyncio.to_thread(self._start_log, task)
        run = Run(task, self._loop_config, broker, self._get_observer(), log)
        if self.max_depth == 0:
            return await run.ask_directly()
        return await run.complete(self._source)

    def _get_models(self) -> Models:
        """The clients, made when they are first needed."""
        if self._models is None or self._models_pid != os.getpid():  # a forked child needs its own
            self._models_pid = os.getpid()
            self._owned = []
            clients: list[LMClient] = []
            for backend in self._backends:
                client = backend.client
                if client is None:
                    client = make_client(backend.name, backend.kwargs)
                    self._owned.append(client)
                clients.append(client)
            self._models = Models(clients)
        return self._models

    def _get_observer(self) -> Observer:
        return self._observer or (ConsoleObserver() if self._verbose else Observer())

    def _start_log(self, task: Task) -> RunLog | None:
        if self.logger is None:
            return None
        root = self._backends[0]
        metadata = RLMMetadata(
            root_model=root.model_name,
            max_depth=self.max_depth,
            max_iterations=self.max_iterations,
            backend=root.name,
            backend_kwargs=_loggable(root.kwargs),
            environment_type=self._environment_name,
            environment_kwargs=_loggable(self._environment_kwargs),
            other_backends=[other.name for other in self._backends[1:]] or None,
        )
        return self.logger.start_run(task.run_id, metadata, task.encoded)

    async def _close(self, *, check: bool = True) -> None:
        models, self._models = self._models, None
        owned, self._owned = self._owned, []
        for client in owned:
            await client.aclose()
        if check and models is not None:
            for client in models.clients:
                client.check_finished()


def _check(name: str, value: object, *kinds: type) -> None:
    if not isinstance(value, kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} must be {expected}, not {type(value).__name__}")


def _refuse(not_yet: Mapping[str, Any]) -> None:
    """Raise for a keyword that is unknown, or known but not served; its default value is harmless."""
    for name, value in not_yet.items():
        if name not in NOT_YET:
            raise ConfigError(f"RLM has no argument {name!r}")
        if value != NOT_YET[name]:
            raise ConfigError(f"RLM({name}=…) is not served yet by this version")


def _backends(
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
        others, arguments = [backend], [dict(kwargs or {})]
    root = _backend(backend, kwargs or {}, sampling)
    samplings = [sub_sampling, *[None] * len(others)]
    return [root, *(_backend(*each) for each in zip(others, arguments, samplings, strict=False))]


def _backend(
    backend: str | LMClient, kwargs: Mapping[str, Any], sampling: Mapping[str, Any] | None
) -> Backend:
    if not isinstance(backend, LMClient):
        return Backend(backend, _with_sampling(kwargs, sampling))
    if kwargs or sampling:
        raise ConfigError("backend and sampling arguments go with a backend's name, not with a client")
    return Backend(type(backend).__name__, client=backend)


def _with_sampling(kwargs: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    if not sampling:
        return dict(kwargs)
    return {**kwargs, "sampling_args": {**(kwargs.get("sampling_args") or {}), **sampling}}


LOGGED_KWARGS = frozenset({"model_name", "context_window", "timeout"})
LOGGED_FIELDS = frozenset({"cell_timeout", "memory", "interrupt_grace", "output_bytes", "network"})


def _loggable(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An allow-list: what is not on it is named, and never shown."""
    return {key: _loggable_value(key, value) for key, value in kwargs.items()}


def _loggable_value(key: str, value: Any) -> Any:
    if key in LOGGED_KWARGS | LOGGED_FIELDS:
        return value
    if key == "base_url" and isinstance(value, str):
        return without_userinfo(value)
    if key == "sampling_args" and isinstance(value, Mapping):
        numbers = (int, float, bool, type(None))
        return {k: v if isinstance(v, numbers) else f"<{type(v).__name__}>" for k, v in value.items()}
    return f"<{type(value).__name__}>"
