"""`RLM`: what a user instantiates. Keywords, defaults and results are those of the original library."""

import asyncio
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rlm_core.arguments import check_arguments, check_type
from rlm_core.backends import backends_of
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.budget import Limits
from rlm_core.broker.cache import DiskCache
from rlm_core.callbacks import Callbacks
from rlm_core.clients import LMClient, make_client
from rlm_core.compaction import Compaction
from rlm_core.console import ConsoleObserver
from rlm_core.context import encode, read_path
from rlm_core.environment import make_environment
from rlm_core.errors import CancellationError
from rlm_core.loggable import loggable
from rlm_core.logger import RLMLogger, RunLog
from rlm_core.observer import Observer
from rlm_core.persistence import PersistentRepl
from rlm_core.pool import SandboxPool
from rlm_core.portal import portal
from rlm_core.prices import PriceTable
from rlm_core.prompts import PromptConfig
from rlm_core.run import LoopConfig, Run, Task
from rlm_core.tasks import finish_first
from rlm_core.tools import Tools
from rlm_core.types import RLMChatCompletion, RLMMetadata


class RLM:
    """A recursive language model.

    Args:
        backend: name of an LM backend (`openai`, `scripted`), or an `LMClient`, which you then close.
        backend_kwargs: for the backend: `model_name`, `api_key`, `base_url`, `context_window` (tokens), …
        environment: where code runs: `local`, or the name of another installed environment.
        environment_kwargs: fields of `SandboxSpec`, e.g. `cell_timeout` (seconds), `memory`.
        depth: of this run, where it is itself a part of another one; callbacks are told of it.
        max_depth: levels of runs: 1: a sub-call is a plain LM call. 2: `rlm_query` starts a child run with a
            REPL of its own; 3: children have children. 0: no REPL, the LM is asked directly.
        max_iterations: turns of the root LM; then it is asked once more for its best answer.
        max_budget: USD that a completion may cost, its children included. The worst case of each call is set
            aside before it is sent, so it is never exceeded.
        max_timeout: seconds for a completion.
        max_tokens: input and output tokens of all of its calls together.
        max_calls: LM calls of a completion.
        max_errors: turns in a row with an error, after which it ends.
        on_limit: "raise": a limit raises its error, with `partial_answer`; "return": a completion whose
            `status` is the name of the limit and whose response is the best answer known.
        prices: of models that have no known one, or another: {"my-model": {"input": 0.1, "output": 0.4}}, USD
            per million tokens, or the path of such a TOML file.
        cache: path of an SQLite file of answers: what was asked before, of the same model with the same
            arguments, is not asked nor paid for again; by default that is within one completion (or one
            session, with `persistent`).
        cache_scope: a name, by which other completions and processes find these answers, and what was
            written under it before.
        persistent: keeps the sandbox and its variables between completions, until `close`: contexts are
            `context_0`, `context_1`, … (`context` is the newest), earlier conversations `history_0`, ….
        compaction: goes on from a summary when the conversation fills the root LM's window, with all of it
            in the REPL's list `history`.
        compaction_threshold_pct: share of the window that may be filled.
        custom_tools: names of the REPL: functions of this process, sync or async, whose arguments and result
            are JSON's types, and plain data; each may be {"tool": …, "description": …}.
        custom_sub_tools: those of children; None: the same.
        max_concurrent_subcalls: children of one run at the same time.
        max_concurrent_calls: LM calls of a completion at the same time.
        child_isolation: "fork": a child shares its parent's sandbox, and sees its variables copy-on-write;
            "sandbox": it has one of its own.
        on_subcall_start, on_subcall_complete, on_iteration_start, on_iteration_complete: see `Callbacks`.
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
        depth: int = 0,
        max_depth: int = 1,
        max_iterations: int = 30,
        max_budget: float | None = None,
        max_timeout: float | None = None,
        max_tokens: int | None = None,
        max_calls: int | None = None,
        max_errors: int | None = None,
        on_limit: str = "raise",
        prices: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        custom_system_prompt: str | None = None,
        other_backends: Sequence[str | LMClient] | None = None,
        other_backend_kwargs: Sequence[Mapping[str, Any]] | None = None,
        logger: RLMLogger | None = None,
        verbose: bool = False,
        cache: str | Path | None = None,
        cache_scope: str | None = None,
        persistent: bool = False,
        compaction: bool = False,
        compaction_threshold_pct: float = 0.85,
        custom_tools: Mapping[str, Any] | None = None,
        custom_sub_tools: Mapping[str, Any] | None = None,
        max_concurrent_subcalls: int = 4,
        max_concurrent_calls: int = 64,
        child_isolation: str = "fork",
        on_subcall_start: Callable[[int, str, str], Any] | None = None,
        on_subcall_complete: Callable[[int, str, float, str | None], Any] | None = None,
        on_iteration_start: Callable[[int, int], Any] | None = None,
        on_iteration_complete: Callable[[int, int, float], Any] | None = None,
        sampling_args: Mapping[str, Any] | None = None,
        sub_sampling_args: Mapping[str, Any] | None = None,
        orchestrator: bool = True,
        user_prologue: str | None = None,
        observer: Observer | None = None,
        pool: SandboxPool | None = None,
    ) -> None:
        check_arguments(locals())
        self.depth, self.max_depth, self.max_iterations = depth, max_depth, max_iterations
        self._backends = backends_of(
            backend, backend_kwargs, other_backends, other_backend_kwargs, sampling_args, sub_sampling_args
        )
        self._environment_name = environment if pool is None else pool.name
        self._environment_kwargs = dict(environment_kwargs or {})
        self._source = pool or make_environment(environment, self._environment_kwargs)
        tools = Tools.of(custom_tools)
        self._loop_config = LoopConfig(
            max_iterations=max_iterations,
            max_depth=max_depth,
            max_errors=max_errors,
            max_timeout=max_timeout,
            max_concurrent_subcalls=max_concurrent_subcalls,
            child_isolation=child_isolation,
            on_limit=on_limit,
            compaction=Compaction(compaction_threshold_pct) if compaction else None,
            tools=tools,
            sub_tools=tools if custom_sub_tools is None else Tools.of(custom_sub_tools),
            prompt=PromptConfig(custom_system_prompt, orchestrator, user_prologue),
        )
        limits = Limits(max_budget, max_tokens, max_calls)
        self._broker_config = BrokerConfig(max_concurrent_calls, limits=limits, prices=PriceTable(prices))
        self._callbacks = Callbacks(
            on_subcall_start, on_subcall_complete, on_iteration_start, on_iteration_complete
        )
        self.logger, self._observer, self._verbose = logger, observer, verbose
        self._cache, self._cache_scope = cache, cache_scope
        self.persistent, self._session_id = persistent, secrets.token_hex(16)
        self._repl: PersistentRepl | None = None
        self._models: Models | None = None
        self._repl_pid = self._models_pid = os.getpid()
        self._opened: list[LMClient | PersistentRepl] = []
        """To be closed, in this order."""
        self._left_open: weakref.finalize[..., RLM] | None = None

    def completion(self, prompt: Any, root_prompt: str | None = None) -> RLMChatCompletion:
        """Answer a question about a context of any length.

        Args:
            prompt: the context: str, bytes, list or dict; a `Path` is read (a folder becomes a dict).
            root_prompt: the question. Without one, the request is in the context itself.

        Raises:
            RLMError: what went wrong, in one line; nothing is left running. `completion` of it says what the
                run used, and where its log is. A limit's error has `partial_answer`, and so has that of
                Ctrl-C (`CancellationError`).
        """
        begun: list[Run] = []
        try:
            return portal().run(self._complete(prompt, root_prompt, begun))
        except KeyboardInterrupt:
            error = CancellationError(begun[0].partial_answer if begun else None)
            error.completion = replace(begun[0].failed("interrupted"), prompt=None) if begun else None
            raise error from None

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

    async def _complete(
        self, prompt: Any, root_prompt: str | None, begun: list[Run] | None = None
    ) -> RLMChatCompletion:
        check_type("root_prompt", root_prompt, str, type(None))
        context = await asyncio.to_thread(read_path, prompt) if isinstance(prompt, Path) else prompt
        encoded = await asyncio.to_thread(encode, context)  # refuses before anything is started or paid for
        task = Task(context, encoded, root_prompt, secrets.token_hex(4))
        cache = await asyncio.to_thread(self._open_cache)
        async with cache or nullcontext():
            run = Run(
                task,
                self._loop_config,
                Broker(self._get_models(), self._broker_config, cache),
                observer=self._get_observer(),
                log=await asyncio.to_thread(self._start_log, task),
                callbacks=self._callbacks,
                depth=self.depth,
            )
            if begun is not None:
                begun.append(run)
            try:
                return await self._complete_run(run)
            finally:
                if cache is not None and self._cache_scope is None and not self.persistent:
                    await finish_first(cache.forget())

    async def _complete_run(self, run: Run) -> RLMChatCompletion:
        if self.depth >= self.max_depth:
            return await run.ask_directly()
        if self.persistent:
            return await self._get_repl().complete(run)
        return await run.complete(self._source)

    def _get_repl(self) -> PersistentRepl:
        if self._repl is None or self._repl_pid != os.getpid():
            self._repl, self._repl_pid = PersistentRepl(self._source), os.getpid()
            self._opened.insert(0, self._repl)
        return self._repl

    def _open_cache(self) -> DiskCache | None:
        if self._cache is None:
            return None
        session = self._session_id if self.persistent else secrets.token_hex(16)
        scope = f"session {session}" if self._cache_scope is None else f"scope {self._cache_scope}"
        return DiskCache(self._cache, scope)

    def _get_models(self) -> Models:
        """The clients, made when they are first needed."""
        if self._models is None or self._models_pid != os.getpid():  # a forked child needs its own
            self._models_pid = os.getpid()
            self._opened = []
            clients: list[LMClient] = []
            for backend in self._backends:
                client = backend.client
                if client is None:
                    client = make_client(backend.name, backend.kwargs)
                    self._opened.append(client)
                clients.append(client)
            self._models = Models(clients)
            self._left_open = weakref.finalize(self, _close_left_open, self._opened, os.getpid())
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
            backend_kwargs=loggable(root.kwargs),
            environment_type=self._environment_name,
            environment_kwargs=loggable(self._environment_kwargs),
            other_backends=[other.name for other in self._backends[1:]] or None,
        )
        return self.logger.start_run(task.run_id, metadata, task.encoded)

    async def _close(self, *, check: bool = True) -> None:
        self._repl, models, self._models = None, self._models, None
        opened, self._opened = self._opened, []
        if self._left_open is not None:
            self._left_open.detach()
        for each in opened:
            if isinstance(each, LMClient) or self._repl_pid == os.getpid():
                await each.aclose()
        if models is not None and self.persistent and self._cache_scope is None:
            async with await asyncio.to_thread(self._open_cache) or nullcontext() as cache:
                if cache is not None:
                    await cache.forget()
        self._session_id = secrets.token_hex(16)
        if check and models is not None:
            for client in models.clients:
                client.check_finished()


def _close_left_open(opened: list[LMClient | PersistentRepl], pid: int) -> None:
    """Of an RLM that nobody closed, at its end or at that of the program."""

    async def close() -> None:
        for each in opened:
            with suppress(RuntimeError):  # threads can't be started any more when a program ends
                await each.aclose()

    if pid == os.getpid():
        portal().finish(close())
