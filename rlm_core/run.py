"""One completion: the loop between the root LM and its REPL."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlm_core.broker.broker import Broker
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.cell import CellResult
from rlm_core.clients.base import LMRequest, LMResponse, Message
from rlm_core.context import Encoded
from rlm_core.environment import Sandbox, SandboxSource
from rlm_core.errors import EmptyReply, LogError, in_one_line
from rlm_core.feedback import TurnOutcome, feedback
from rlm_core.logger import RunLog
from rlm_core.observer import Observer, isolated
from rlm_core.parsing import ParsedReply, parse_reply, without_thinking
from rlm_core.prompts import PromptConfig, first_messages, last_request, turn_prompt
from rlm_core.session import Session
from rlm_core.tasks import finish_first
from rlm_core.types import CodeBlock, REPLResult, RLMChatCompletion, RLMIteration

log = logging.getLogger("rlm_core.run")

MAX_EMPTY_REPLIES = 3


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: a context, and a question about it unless the context itself holds the request."""

    context: Any
    encoded: Encoded
    question: str | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))


@dataclass(frozen=True, slots=True)
class LoopConfig:
    max_iterations: int = 30
    prompt: PromptConfig = field(default_factory=PromptConfig)


class Run:
    def __init__(
        self, task: Task, config: LoopConfig, broker: Broker, observer: Observer, log: RunLog | None
    ) -> None:
        self._task = task
        self._config = config
        self._broker = broker
        self._observer = isolated(observer)
        self._log = log
        self._started = time.monotonic()
        self._messages: list[Message] = []
        self._logged_messages = 0
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
        self._observer.run_started(self._task.question or "", self._task.run_id)
        try:
            sandbox = await source.start()
            try:
                completion = await self._in_sandbox(sandbox, source)
            finally:
                await finish_first(sandbox.stop())
        except BaseException as error:
            self._fail(error)
            raise
        return self._end(completion)

    async def ask_directly(self) -> RLMChatCompletion:
        """Without a REPL: the context is the LM's prompt."""
        context = self._task.context
        text = context if isinstance(context, str) else str(context)
        prompt = f"{self._task.question}\n\n{text}" if self._task.question else text
        self._observer.run_started(self._task.question or "", self._task.run_id)
        try:
            response = await self._broker.ask_root(LMRequest.of_prompt(prompt))
            if not response.text.strip():
                raise EmptyReply(f"model {response.model!r} gave an empty reply")
        except BaseException as error:
            self._fail(error)
            raise
        return self._end(self._completion(response.text, "answered"))

    def _end(self, completion: RLMChatCompletion) -> RLMChatCompletion:
        """An answer that was paid for is given even where its log can't be finished."""
        if self._log is not None:
            try:
                self._log.finish(completion)
            except LogError as error:
                log.warning("%s", error)
        self._observer.run_ended(completion)
        return completion

    async def _in_sandbox(self, sandbox: Sandbox, source: SandboxSource) -> RLMChatCompletion:
        async with Session(sandbox, source.spec, self._handle, observer=self._observer) as session:
            await session.put_context(self._task.encoded)
            answer = await self._turns(session)
        if answer is not None:
            return self._completion(answer, "answered")
        return self._completion(await self._last_words(), "max_iterations")

    async def _handle(self, call: Call) -> Answer | Failure:
        self._calls_made += 1
        self._in_flight += 1
        self._observer.calls_changed(self._in_flight, self._calls_made)
        try:
            return await self._broker.handle(call)
        finally:
            self._in_flight -= 1
            self._observer.calls_changed(self._in_flight, self._calls_made)

    async def _turns(self, session: Session) -> str | None:
        """The answer, or None when the turns are used up."""
        turns = self._config.max_iterations
        window = self._broker.models.sub.context_window
        self._messages = first_messages(self._config.prompt, self._task.context, self._task.question, window)
        previous: TurnOutcome | None = None
        for self._turn in range(1, turns + 1):
            self._observer.turn_started(self._turn, turns)
            started = time.monotonic()
            self._say(turn_prompt(self._turn, turns))
            response = await self._ask()
            parsed = parse_reply(response.text)
            outcome, blocks = await self._act(session, response, parsed)
            answer = _answer_of(outcome)
            if answer is None and parsed.answer is not None and not parsed.answer.is_variable:
                answer = parsed.answer.value
            await self._end_turn(response, blocks, answer, started)
            if answer is not None:
                return answer
            self._messages.append({"role": "assistant", "content": response.text})
            self._say(feedback(outcome, previous))
            previous = outcome
        return None

    async def _ask(self) -> LMResponse:
        response = await self._broker.ask_root(LMRequest(tuple(self._messages)))
        self._empty_replies = 0 if response.text.strip() else self._empty_replies + 1
        if self._empty_replies == MAX_EMPTY_REPLIES:
            why = f" (finish reason {response.finish_reason!r})" if response.finish_reason else ""
            raise EmptyReply(f"model {response.model!r} gave {MAX_EMPTY_REPLIES} empty replies in a row{why}")
        return response

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
            self._observer.cell_started(code)
            result = await session.execute(code)
            results.append(result)
            blocks.append(CodeBlock(code, self._repl_result(session, result)))
            self._observer.cell_ended(result)
            self._partial_answer = result.answer or self._partial_answer
            if result.answer_ready:
                break
        outcome = TurnOutcome(response.text, tuple(codes), tuple(results), parsed.unlabelled)
        return outcome, blocks

    def _repl_result(self, session: Session, result: CellResult) -> REPLResult:
        calls = self._broker.cell_ended(session.id, result.cell_id, ok=result.status == "ok")
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
        new_messages = [dict(message) for message in self._messages[self._logged_messages :]]
        self._logged_messages = len(self._messages) + 1  # the reply is in `response`
        seconds = time.monotonic() - started
        iteration = RLMIteration(new_messages, response.text, blocks, answer, seconds)
        if self._log is not None:
            await asyncio.to_thread(self._log.turn, iteration)
        usage = self._broker.usage()
        tokens = usage.total_input_tokens + usage.total_output_tokens
        self._observer.turn_ended(iteration, self._turn, tokens)

    async def _last_words(self) -> str:
        """The turns are used up: ask once more, for a text."""
        self._say(last_request(self._partial_answer))
        started = time.monotonic()
        response = await self._broker.ask_root(LMRequest(tuple(self._messages)))
        parsed = parse_reply(response.text)
        text = without_thinking(response.text)
        answer = parsed.answer.value if parsed.answer and not parsed.answer.is_variable else text
        answer = answer.strip() or self._partial_answer
        await self._end_turn(response, [], answer, started)
        return answer

    def _say(self, text: str) -> None:
        """Add to our message, so that the roles alternate."""
        if not text:
            return
        if self._messages and self._messages[-1]["role"] == "user":
            content = f"{self._messages[-1]['content']}\n\n{text}"
            self._messages[-1] = {"role": "user", "content": content}
        else:
            self._messages.append({"role": "user", "content": text})

    def _completion(self, response: str, status: str, error: str | None = None) -> RLMChatCompletion:
        return RLMChatCompletion(
            root_model=self._broker.models.root.model_name,
            prompt=self._task.context,
            response=response,
            usage_summary=self._broker.usage(),
            execution_time=time.monotonic() - self._started,
            metadata=self._log.trajectory() if self._log is not None else None,
            error=error,
            status=status,
            iterations=self._turn,
            run_id=self._task.run_id,
            log=self._log.path if self._log is not None else None,
        )

    def _fail(self, error: BaseException) -> None:
        what = in_one_line(error)
        if self._log is not None:
            with contextlib.suppress(LogError):
                self._log.finish(self._completion(self._partial_answer, "failed", what))
        self._observer.run_failed(error)


def _answer_of(outcome: TurnOutcome) -> str | None:
    last = outcome.results[-1] if outcome.results else None
    return last.answer if last is not None and last.answer_ready else None
