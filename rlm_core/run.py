"""One completion: the loop between the root LM and its REPL."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlm_core import repl_history
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.callbacks import Callbacks
from rlm_core.cell import CellResult
from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.compaction import GO_ON, Compaction
from rlm_core.context import Encoded, encode
from rlm_core.conversation import Conversation
from rlm_core.deadline import Deadline
from rlm_core.environment import SandboxSource
from rlm_core.errors import (
    BudgetRefused,
    ConfigError,
    EmptyReply,
    ErrorThresholdExceededError,
    LimitExceeded,
    LogError,
    RLMError,
    in_one_line,
)
from rlm_core.feedback import TurnOutcome, feedback
from rlm_core.foreign import Places
from rlm_core.logger import RunLog
from rlm_core.observer import Observer, isolated
from rlm_core.parsing import ParsedReply, parse_reply, without_thinking
from rlm_core.prompts import PromptConfig, first_messages, last_request, turn_prompt
from rlm_core.recursion import Children
from rlm_core.session import Session
from rlm_core.tasks import finish_first
from rlm_core.text import one_line, printable
from rlm_core.tools import Tools
from rlm_core.types import CodeBlock, REPLResult, RLMChatCompletion, RLMIteration

log = logging.getLogger("rlm_core.run")

T = TypeVar("T")
MAX_EMPTY_REPLIES = 3
EMPTY_REPLY = "(no text)"
"""In the place of one: providers refuse messages without any."""
LEAST_CELL_SECONDS = 0.1
MAX_TOOL_CALLS = 16
"""Of one run, at work at the same time."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: a context, and a question about it unless the context itself holds the request."""

    context: Any
    encoded: Encoded
    question: str | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Of a run and its children."""

    max_iterations: int = 30
    max_depth: int = 1
    max_errors: int | None = None
    max_timeout: float | None = None
    """Seconds."""
    max_concurrent_subcalls: int = 4
    child_isolation: str = "fork"
    """fork or sandbox."""
    on_limit: str = "raise"
    """raise or return."""
    compaction: Compaction | None = None
    tools: Tools = field(default_factory=Tools)
    sub_tools: Tools = field(default_factory=Tools)
    """Of its children."""
    prompt: PromptConfig = field(default_factory=PromptConfig)


class Run:
    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        broker: Broker,
        *,
        observer: Observer | None = None,
        log: RunLog | None = None,
        callbacks: Callbacks | None = None,
        parent: "Run | None" = None,
        client: LMClient | None = None,
        depth: int = 0,
    ) -> None:
        """`client`: the root LM, where it is not that of the broker's models; `depth` is of a run without a
        parent."""
        self.config = config
        self.broker = broker
        self.callbacks = callbacks or Callbacks()
        self.depth: int = parent.depth + 1 if parent is not None else depth
        self.account: Account = Account(parent.account if parent is not None else None)
        self._task = task
        self._parent = parent
        self._client = client or broker.models.root
        self.observer = isolated(observer or Observer())
        self._log = log
        self._deadline: Deadline = parent._deadline if parent is not None else Deadline(config.max_timeout)
        self._children: Children | None = None
        self._born = 0
        self._tool_places = Places(MAX_TOOL_CALLS)
        self._errors = 0
        self._started = time.monotonic()
        self._talk = Conversation()
        self._told_repl = 0
        """Messages that are in the REPL's `history`."""
        self._compacted = 0
        self.earlier: tuple[int, int] = (0, 0)
        """Contexts and histories that the session had before."""
        self._turn = 0
        self._empty_replies = 0
        self._partial_answer = ""
        self._in_flight = 0
        self._calls_made = 0

    async def complete(self, source: SandboxSource) -> RLMChatCompletion:
        """Run to an answer; the sandbox is gone when this returns or raises.

        Raises:
            RLMError: one of its kinds; nothing is left running.
        """
        return await self.watched(self._in_sandbox(source))

    async def complete_in(
        self, session: Session, source: SandboxSource, *, forked: bool
    ) -> RLMChatCompletion:
        """In a session that is open: its context is there already where it is a fork.

        Raises:
            RLMError: one of its kinds.
        """
        return await self.watched(self.in_session(session, source, put_context=not forked))

    async def ask_directly(self) -> RLMChatCompletion:
        """Without a REPL: the context is the LM's prompt."""
        return await self.watched(self._directly())

    def child(self, call: Call) -> "Run":
        """The run that answers an rlm call. Raises ConfigError for a model that is not known."""
        client = self.broker.models.for_child(call.model)
        self._born += 1
        run_id = f"{self._task.run_id}.{self._born}"
        return Run(
            Task(call.prompt, encode(call.prompt), run_id=run_id),
            replace(
                self.config,
                on_limit="raise",
                tools=self.config.sub_tools,
                prompt=replace(self.config.prompt, is_child=True),
            ),
            self.broker,
            log=self._log.of_child(run_id, client.model_name) if self._log is not None else None,
            callbacks=self.callbacks,
            parent=self,
            client=client,
        )

    @property
    def root_model(self) -> str:
        return self._client.model_name

    async def watched(self, work: Coroutine[Any, Any, RLMChatCompletion]) -> RLMChatCompletion:
        """Tell of its beginning and its end; a limit's error carries the best answer known."""
        self.observer.run_started(self._task.question or "", self._task.run_id)
        try:
            completion = await work
        except LimitExceeded as error:
            error.partial_answer = self._partial_answer
            if self.config.on_limit == "raise":
                self._fail(error)
                raise
            completion = self._completion(self._partial_answer, error.limit, str(error))
        except BaseException as error:
            self._fail(error)
            raise
        return self._end(completion)

    async def _directly(self) -> RLMChatCompletion:
        context = self._task.context
        text = context if isinstance(context, str) else str(context)
        prompt = f"{self._task.question}\n\n{text}" if self._task.question else text
        response = await self._ask_lm(LMRequest.of_prompt(prompt))
        if not response.text.strip():
            raise EmptyReply(f"model {response.model!r} gave an empty reply")
        return self._completion(response.text, "answered")

    async def _in_sandbox(self, source: SandboxSource) -> RLMChatCompletion:
        async with self._deadline.limit():
            sandbox = await source.start()
        try:
            async with Session(sandbox, source.spec, self.handle, observer=self.observer) as session:
                return await self.in_session(session, source, put_context=True)
        finally:
            await finish_first(sandbox.stop())

    def _end(self, completion: RLMChatCompletion) -> RLMChatCompletion:
        """An answer that was paid for is given even where its log can't be finished."""
        if self._log is not None:
            try:
                self._log.finish(completion)
            except LogError as error:
                log.warning("%s", error)
        self.observer.run_ended(completion)
        return completion

    async def in_session(
        self, session: Session, source: SandboxSource, *, put_context: bool
    ) -> RLMChatCompletion:
        """The run itself; around it goes `watched`."""
        places = asyncio.Semaphore(self.config.max_concurrent_subcalls)
        self._children = Children(self, session, source, places)
        inherited = None if put_context or self._parent is None else self._parent.config.tools
        bindings = self.config.tools.bindings(inherited)
        async with self._deadline.limit():
            if put_context:
                await session.put_context(self._task.encoded)
            if bindings:
                await session.bind(bindings)
        answer = await self._turns(session)
        if answer is not None:
            return self._completion(answer, "answered")
        return self._completion(await self._last_words(), "max_iterations")

    async def handle(self, call: Call) -> Answer | Failure:
        """A call out of one of the run's cells."""
        self._calls_made += 1
        self._in_flight += 1
        self.observer.calls_changed(self._in_flight, self._calls_made)
        try:
            if call.kind == "tool":
                return await self.config.tools.call(call.tool, call.prompt, self._tool_places)
            if call.kind == "rlm" and self._children is not None and self.depth + 1 < self.config.max_depth:
                return await self._children.answer(call)
            return await self.broker.handle(call, self.account, self._deadline.at)
        finally:
            self._in_flight -= 1
            self.observer.calls_changed(self._in_flight, self._calls_made)

    async def _turns(self, session: Session) -> str | None:
        """The answer, or None when the turns are used up."""
        turns = self.config.max_iterations
        window = self.broker.models.sub.context_window
        prompt = replace(self.config.prompt, tools=self.config.tools.descriptions)
        self._talk.begin(
            first_messages(prompt, self._task.context, self._task.question, window, self.earlier)
        )
        previous: TurnOutcome | None = None
        for self._turn in range(1, turns + 1):
            self.observer.turn_started(self._turn, turns)
            await self.callbacks.call("on_iteration_start", self.depth, self._turn)
            started = time.monotonic()
            self._talk.say(turn_prompt(self._turn, turns, self._task.question))
            response = await self._ask()
            parsed = parse_reply(response.text)
            outcome, blocks = await self._act(session, response, parsed)
            answer = _answer_of(outcome)
            if answer is None and parsed.answer is not None and not parsed.answer.is_variable:
                answer = parsed.answer.value
            await self._end_turn(response, blocks, answer, started)
            await self.callbacks.call(
                "on_iteration_complete", self.depth, self._turn, time.monotonic() - started
            )
            if answer is not None:
                self._talk.reply(response.text)
                return answer
            self._check_limits(outcome)
            self._talk.reply(response.text if response.text.strip() else EMPTY_REPLY)
            self._talk.say(feedback(outcome, previous))
            previous = outcome
            if self.config.compaction is not None:
                await self.in_time(self._compact(session, response, self.config.compaction))
        return None

    async def _ask(self) -> LMResponse:
        response = await self._ask_lm(LMRequest(tuple(self._talk.messages), goes_on=True))
        self._empty_replies = 0 if response.text.strip() else self._empty_replies + 1
        if self._empty_replies == MAX_EMPTY_REPLIES:
            why = f" (finish reason {response.finish_reason!r})" if response.finish_reason else ""
            raise EmptyReply(f"model {response.model!r} gave {MAX_EMPTY_REPLIES} empty replies in a row{why}")
        return response

    async def _ask_lm(self, request: LMRequest) -> LMResponse:
        """Raises LimitExceeded when there is no time, or nothing left of another limit."""
        try:
            async with self._deadline.limit():
                return await self.broker.ask(self._client, request, self.account, deadline=self._deadline.at)
        except BudgetRefused as error:
            raise self.broker.budget.exceeded(error.limit, str(error)) from None

    async def _compact(self, session: Session, response: LMResponse, compaction: Compaction) -> None:
        """Keep the REPL's `history` whole, and go on from a summary when the LM's window fills up."""
        messages = tuple(self._talk.messages)
        new = messages[self._told_repl or self._talk.first :]
        await self._tell_history(session, [dict(each) for each in new])
        if compaction.is_due(response, messages, self._client.context_window):
            asked = compaction.request(messages, self._client.context_window)
            summary = without_thinking((await self._ask_lm(LMRequest(asked))).text).strip()
            if summary:
                await self._tell_history(session, [{"type": "summary", "content": summary}])
                self._compacted += 1
                self._talk.compact(summary, GO_ON.format(times=self._compacted))
        self._told_repl = len(self._talk.messages)

    async def _tell_history(self, session: Session, messages: list[dict[str, Any]]) -> None:
        """A REPL that can't take it, because a cell has broken it, costs its history and not the run."""
        try:
            await repl_history.extend(session, "history", messages)
        except ConfigError as error:
            log.warning("the REPL's history is not whole: %s", one_line(str(error), 300))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said between us and the LM, without the system message."""
        return [dict(each) for each in self._talk.messages if each["role"] != "system"]

    async def in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises TimeoutExceededError when it takes longer than the run has."""
        async with self._deadline.limit():
            return await work

    def _check_limits(self, outcome: TurnOutcome) -> None:
        """After a turn without an answer. Raises LimitExceeded."""
        self._deadline.check()
        bad = [result for result in outcome.results if result.status != "ok"]
        self._errors = self._errors + 1 if bad else 0
        if self.config.max_errors is not None and self._errors >= self.config.max_errors:
            last = printable(one_line(bad[-1].stderr or bad[-1].rollback or bad[-1].status, 200))
            raise ErrorThresholdExceededError(self._errors, self.config.max_errors, last)

    async def _act(
        self, session: Session, response: LMResponse, parsed: ParsedReply
    ) -> tuple[TurnOutcome, list[CodeBlock]]:
        """Run the reply's blocks until one finishes the run; later ones are not run."""
        codes: Sequence[str] = parsed.blocks
        if parsed.answer is not None and parsed.answer.is_variable:
            codes = (f"FINAL_VAR({parsed.answer.value!r})",)
        results: list[CellResult] = []
        blocks: list[CodeBlock] = []
        for code in codes:
            self.observer.cell_started(code)
            result = await self._execute(session, code)
            results.append(result)
            blocks.append(CodeBlock(code, self._repl_result(session, result)))
            self.observer.cell_ended(result)
            self._partial_answer = result.answer or self._partial_answer
            if result.answer_ready:
                break
        outcome = TurnOutcome(response.text, tuple(codes), tuple(results), parsed.unlabelled)
        return outcome, blocks

    async def _execute(self, session: Session, code: str) -> CellResult:
        """A cell gets no more time than the run has left; then it ends as any whose time is up."""
        left = max(self._deadline.left, LEAST_CELL_SECONDS)
        return await session.execute(code, timeout=min(session.cell_timeout, left))

    def _repl_result(self, session: Session, result: CellResult) -> REPLResult:
        self.broker.cell_ended(session.id, result.cell_id, ok=result.status == "ok")
        calls = self.account.take_records(session.id, result.cell_id)
        return REPLResult(
            stdout=result.stdout,
            stderr=result.stderr,
            locals=dict(result.variables),
            execution_time=result.seconds,
            rlm_calls=calls,
            final_answer=result.answer if result.answer_ready else None,
            status=result.status,
            rollback=result.rollback,
            no_checkpoint=result.no_checkpoint,
        )

    async def _end_turn(
        self, response: LMResponse, blocks: list[CodeBlock], answer: str | None, started: float
    ) -> None:
        """On disk before the next turn."""
        new_messages = self._talk.take_new()
        seconds = time.monotonic() - started
        iteration = RLMIteration(new_messages, response.text, blocks, answer, seconds)
        if self._log is not None:
            await asyncio.to_thread(self._log.turn, iteration)
        usage = self.account.usage()
        tokens = usage.total_input_tokens + usage.total_output_tokens
        self.observer.turn_ended(iteration, self._turn, tokens)

    async def _last_words(self) -> str:
        """The turns are used up: ask once more, for a text."""
        self._talk.say(last_request(self._partial_answer, self._task.question))
        started = time.monotonic()
        response = await self._ask_lm(LMRequest(tuple(self._talk.messages)))
        parsed = parse_reply(response.text)
        text = without_thinking(response.text)
        answer = parsed.answer.value if parsed.answer and not parsed.answer.is_variable else text
        answer = answer.strip() or self._partial_answer
        await self._end_turn(response, [], answer, started)
        return answer

    def _completion(self, response: str, status: str, error: str | None = None) -> RLMChatCompletion:
        return RLMChatCompletion(
            root_model=self.root_model,
            prompt=self._task.context,
            response=response,
            usage_summary=self.account.usage(),
            execution_time=time.monotonic() - self._started,
            metadata=self._log.trajectory() if self._log is not None else None,
            error=error,
            status=status,
            iterations=self._turn,
            run_id=self._task.run_id,
            log=self._log.path if self._log is not None else None,
        )

    @property
    def partial_answer(self) -> str:
        """The best answer known: what `answer["content"]` held when a cell ended."""
        return self._partial_answer

    def failed(self, why: str) -> RLMChatCompletion:
        """What there is of a run that ended without an answer."""
        return self._completion(self._partial_answer, "failed", why)

    def _fail(self, error: BaseException) -> None:
        failed = self.failed(in_one_line(error))
        if self._log is not None:
            with contextlib.suppress(LogError):
                self._log.finish(failed)
        if isinstance(error, RLMError):
            error.completion = replace(failed, prompt=None)  # a text may be large, and its user has it
        self.observer.run_failed(error)


def _answer_of(outcome: TurnOutcome) -> str | None:
    last = outcome.results[-1] if outcome.results else None
    return last.answer if last is not None and last.answer_ready else None
