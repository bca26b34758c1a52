"""The LM broker of one run: keys, clients and limits stay on this side of the sandbox.

Per call: policy → recorded answer? → budget reservation → journal (intent) → client, with a deadline →
journal (answer) → settle → reply. Cancelling the task of a call cancels its request on the wire.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.broker.seams import Budget, Journal, KnownKinds, MemoryJournal, Policy, Unlimited
from rlm_core.broker.usage import UsageMeter
from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.errors import CallFailed, ConfigError, ProviderError, RunFailed
from rlm_core.types import RLMChatCompletion, UsageSummary

FAILED_PROMPT_CHARS = 1_000
"""Of the prompt of a call that failed, in the record of its cell."""
MAX_FAILURES = 1_000
"""Failed calls in a row of one cell, beyond which no further ones are recorded."""


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    max_concurrent_calls: int = 64
    call_timeout: float = 300.0
    """Seconds, waiting for a place included."""
    policy: Policy = field(default_factory=KnownKinds)
    budget: Budget = field(default_factory=Unlimited)
    journal: Journal = field(default_factory=MemoryJournal)


class Models:
    """The clients of a run. The first is the root's; sub-calls take the second, if any, or one by name."""

    def __init__(self, clients: Sequence[LMClient]) -> None:
        self.clients = tuple(clients)
        self.root = clients[0]
        self.sub = clients[1] if len(clients) > 1 else clients[0]
        self._by_name = {client.model_name: client for client in reversed(clients)}

    def for_call(self, model: str | None) -> LMClient:
        """Raises ConfigError for an unknown name, with the known ones."""
        if model is None:
            return self.sub
        if model not in self._by_name:
            raise ConfigError(f"unknown model {model!r}; known: {', '.join(sorted(self._by_name))}")
        return self._by_name[model]


class Broker:
    def __init__(self, models: Models, config: BrokerConfig | None = None) -> None:
        self.models = models
        self._config = config or BrokerConfig()
        self._places = asyncio.Semaphore(self._config.max_concurrent_calls)
        self._usage = UsageMeter()
        self._of_cell: dict[tuple[str, str], list[RLMChatCompletion]] = {}

    async def ask_root(self, request: LMRequest) -> LMResponse:
        """One turn of the root LM.

        Raises:
            ProviderError: it did not answer.
        """
        response = await self.models.root.complete(request)
        self._usage.add(response.model, response.usage)
        return response

    async def handle(self, call: Call) -> Answer | Failure:
        """A call out of a cell; a failure is an answer too, and ends nothing but this call."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._config.call_timeout):
                result: Answer | Failure = await self._answer(call)
        except CallFailed as error:
            result = Failure(error.code, str(error))
        except ConfigError as error:
            result = Failure("INVALID", str(error))
        except TimeoutError:
            result = Failure("DEADLINE", f"no answer within {self._config.call_timeout:.0f} s")
        except RunFailed as error:
            result = Failure("PROVIDER", str(error))
        self._remember(call, result, time.monotonic() - started)
        return result

    def cell_ended(self, session_id: str, cell_id: str, *, ok: bool) -> list[RLMChatCompletion]:
        """Close a cell's account; the record of its calls."""
        self._config.journal.cell_ended(session_id, cell_id, ok=ok)
        return self._of_cell.pop((session_id, cell_id), [])

    def usage(self) -> UsageSummary:
        return self._usage.summary()

    async def _answer(self, call: Call) -> Answer:
        config = self._config
        config.policy.check(call)
        client = self.models.for_call(call.model)
        if recorded := config.journal.recorded(call):
            config.journal.end(call, recorded)
            return recorded
        async with self._places:
            reservation = config.budget.reserve(call)
            answer: Answer | None = None
            try:
                config.journal.begin(call)
                response = await client.complete(LMRequest.of_prompt(call.prompt, call.model))
                if not response.text:
                    why = f" (finish reason {response.finish_reason!r})" if response.finish_reason else ""
                    raise ProviderError(f"model {response.model!r} gave an empty reply{why}")
                answer = Answer(response.text, response.model, response.usage)
                self._usage.add(answer.model, answer.usage)
                config.journal.end(call, answer)
                return answer
            finally:
                config.budget.settle(reservation, answer)

    def _remember(self, call: Call, result: Answer | Failure, seconds: float) -> None:
        meter = UsageMeter()
        if isinstance(result, Answer):
            meter.add(result.model, result.usage)
        records = self._of_cell.setdefault((call.session_id, call.cell_id), [])
        failed = isinstance(result, Failure)
        if failed and sum(record.error is not None for record in records[-MAX_FAILURES:]) == MAX_FAILURES:
            return  # a cell can make as many calls that cost nothing as it likes
        record = RLMChatCompletion(
            root_model=result.model if isinstance(result, Answer) else (call.model or ""),
            prompt=_cut(call.prompt) if failed else call.prompt,
            response=result.text if isinstance(result, Answer) else "",
            usage_summary=meter.summary(),
            execution_time=seconds,
            error=result.message if isinstance(result, Failure) else None,
        )
        records.append(record)


def _cut(prompt: str) -> str:
    left_out = len(prompt) - FAILED_PROMPT_CHARS
    return f"{prompt[:FAILED_PROMPT_CHARS]}… [{left_out:,} more characters]" if left_out > 0 else prompt
