"""`rlm_query`: a child run in a session of its own, mostly a fork of its parent's within the call."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlm_core.broker.broker import failure_of
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.environment import SandboxSource
from rlm_core.errors import CallFailed, ConfigError, LimitExceeded, RLMError, RunFailed, in_one_line
from rlm_core.session import Session
from rlm_core.tasks import finish_first
from rlm_core.types import RLMChatCompletion, TokenUsage

if TYPE_CHECKING:
    from rlm_core.run import Run

log = logging.getLogger("rlm_core.recursion")

PREVIEW_CHARS = 80
MAX_CHILDREN = 64
"""At work at the same time, of a whole tree."""


@dataclass(frozen=True, slots=True)
class Children:
    """Of one run. Each has a place while it runs; a grandchild has one of its own parent's, so that none
    waits for its own."""

    parent: "Run"
    session: Session
    source: SandboxSource
    places: asyncio.Semaphore

    async def answer(self, call: Call) -> Answer | Failure:
        """Run a child on the prompt of the call; a failure is an answer too."""
        broker, account = self.parent.broker, self.parent.account
        if recorded := broker.take_recorded(call):
            account.remember(call, recorded, 0.0)
            return recorded
        started = time.monotonic()
        try:
            child = self.parent.child(call)
        except ConfigError as error:
            result: Answer | Failure = failure_of(error)
        else:
            result = await self._run(child, call)
        if isinstance(result, Answer):
            broker.record(call, result)
        account.remember(call, result, time.monotonic() - started)
        return result

    async def _run(self, child: "Run", call: Call) -> Answer | Failure:
        broker = child.broker
        async with self.places:
            if broker.budget.is_spent:
                return Failure("BUDGET", "nothing is left of a limit of this run")
            if broker.children >= MAX_CHILDREN:
                return Failure("TOO_MANY", f"{MAX_CHILDREN} child runs are at work already")
            broker.children += 1
            try:
                return await self._run_now(child, call)
            finally:
                broker.children -= 1

    async def _run_now(self, child: "Run", call: Call) -> Answer | Failure:
        began = time.monotonic()
        told = child.callbacks.call
        await told("on_subcall_start", child.depth, child.root_model, call.prompt[:PREVIEW_CHARS])
        error: str | None = "interrupted"
        try:
            async with self._session_for(child, call) as (session, forked):
                completion = await child.complete_in(session, self.source, forked=forked)
            error = None
            return Answer(completion.response, completion.root_model, _total(completion), completion)
        except RLMError as failed:
            error = in_one_line(failed)
            return replace(_failure(failed), child=child.failed(error))
        except Exception as failed:  # of a client of the caller's; the call fails by it
            error = in_one_line(failed)
            raise
        finally:
            seconds = time.monotonic() - began
            await finish_first(told("on_subcall_complete", child.depth, child.root_model, seconds, error))

    @contextlib.asynccontextmanager
    async def _session_for(self, child: "Run", call: Call) -> AsyncIterator[tuple[Session, bool]]:
        """A session for the child, and whether it is a fork, which has its context already."""
        if child.config.child_isolation == "sandbox":
            sandbox = await self.source.start()
            try:
                async with Session(sandbox, self.source.spec, child.handle) as session:
                    yield session, False
            finally:
                await finish_first(sandbox.stop())
            return
        try:
            session = await self.session.fork(call_id=call.id, handle_call=child.handle)
        except ConfigError as error:
            log.info("rlm_query %s gets a new session: %s", call.id, error)
            async with self.session.beside(child.handle) as session:
                yield session, False
            return
        try:
            yield session, True
        finally:
            await finish_first(session.aclose())


def _failure(error: RLMError) -> Failure:
    if isinstance(error, LimitExceeded):
        partial = f"; its best answer so far: {error.partial_answer}" if error.partial_answer else ""
        return Failure("BUDGET", f"{error}{partial}")
    if isinstance(error, (CallFailed, ConfigError, RunFailed)):
        return failure_of(error)
    return Failure("PROVIDER", in_one_line(error))


def _total(completion: RLMChatCompletion) -> TokenUsage:
    total = TokenUsage()
    for each in completion.usage_summary.model_usage_summaries.values():
        total = replace(
            total,
            input_tokens=total.input_tokens + each.total_input_tokens,
            output_tokens=total.output_tokens + each.total_output_tokens,
            cached_tokens=total.cached_tokens + each.total_cached_tokens,
            reasoning_tokens=total.reasoning_tokens + each.total_reasoning_tokens,
        )
    return replace(total, cost=completion.usage_summary.total_cost)
