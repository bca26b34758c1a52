"""The LM broker of a tree of runs: keys, clients and limits stay on this side of the sandbox.

Per call: policy → recorded answer? → budget reservation → journal (intent) → client, with a deadline →
journal (answer) → settle → reply. Cancelling the task of a call cancels its request on the wire.
"""

import asyncio
import secrets
import time
from dataclasses import dataclass, field, replace

from rlm_core.broker.account import Account
from rlm_core.broker.budget import Budget, Limits, likely_tokens
from rlm_core.broker.cache import DiskCache
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.broker.models import Models
from rlm_core.broker.retry import RetryPolicy, with_retries
from rlm_core.broker.seams import Journal, KnownKinds, MemoryJournal, Policy
from rlm_core.clients.base import LMClient, LMRequest, LMResponse
from rlm_core.deadline import without
from rlm_core.errors import (
    CallFailed,
    ConfigError,
    ProviderError,
    ProviderRefused,
    ProviderRejected,
    RunFailed,
)
from rlm_core.prices import Price, PriceTable
from rlm_core.text import without_surrogates

MAX_REFUSED = 2_000
"""Requests of a tree that a provider refuses without a bill: cells could send them without end."""
CUT = frozenset({"length", "max_tokens", "max_output_tokens"})
"""Finish reasons of an answer that had no more tokens; in lower case."""

__all__ = ["Broker", "BrokerConfig", "Models"]


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    max_concurrent_calls: int = 64
    call_timeout: float = 300.0
    """Seconds, from when a call has its place."""
    limits: Limits = field(default_factory=Limits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    prices: PriceTable = field(default_factory=PriceTable)
    policy: Policy = field(default_factory=KnownKinds)


class Broker:
    def __init__(
        self,
        models: Models,
        config: BrokerConfig | None = None,
        cache: DiskCache | None = None,
        journal: Journal | None = None,
    ) -> None:
        """The journal is of this tree alone.

        Raises:
            ConfigError: a model has no price and there is a limit in USD.
        """
        self.models = models
        self._config = config or BrokerConfig()
        self._cache = cache
        self._journal = journal or MemoryJournal()
        self.budget = Budget(self._config.limits)
        self.children = 0
        """Runs of the tree that are at work below its root."""
        self._refused = 0
        """Requests that cost nothing, and are in no budget."""
        self._longest: dict[str, int] = {}
        """Tokens that an answer of a model may have, as its provider has told."""
        self._places = asyncio.Semaphore(self._config.max_concurrent_calls)
        self._prices = {id(client): self._price(client) for client in models.clients}

    async def ask(
        self,
        client: LMClient,
        request: LMRequest,
        account: Account,
        *,
        deadline: float | None = None,
        limit: asyncio.Timeout | None = None,
        call: Call | None = None,
    ) -> LMResponse:
        """Ask an LM within the budget, again where that is worth it; what the cache has costs nothing.

        Args:
            deadline: on the loop's clock.
            limit: of the call's time, which does not run while it waits for the client's turn.
            call: what it is asked for, for the journal.

        Raises:
            ProviderError: it did not answer.
            BudgetRefused: what is left of a limit is not enough.
        """
        request = _sendable(request)
        if self._cache is not None and (cached := await self._cache.get(client, request)) is not None:
            return cached
        keyed = replace(request, idempotency_key=secrets.token_hex(16))
        price, pace = self._prices[id(client)], self.models.pace(client)

        async def attempt() -> LMResponse:
            tokens = likely_tokens(request.messages) + (client.output_tokens or 0)
            with without(limit):
                slot = await pace.take(tokens, self._places)
            try:
                response = await self._ask_knowing_its_length(client, keyed, price, call)
            finally:
                pace.release(self._places)
            slot.tokens = response.usage.input_tokens + response.usage.output_tokens or slot.tokens
            account.add(client.model_name, response.usage)
            return response

        policy = self._config.retry
        if client.max_retries is not None:
            policy = replace(policy, attempts=client.max_retries + 1)
        response = await with_retries(policy, pace, deadline, attempt)
        if self._cache is not None and response.text and not self._was_cut(client, request, response):
            await self._cache.put(client, request, response)
        return response

    def _was_cut(self, client: LMClient, request: LMRequest, response: LMResponse) -> bool:
        """Whether it is shorter than it would be without the budget."""
        wanted = request.max_output_tokens or client.output_tokens
        ours = self.budget.limits.count_tokens and (not wanted or response.usage.output_tokens < wanted)
        return ours and response.finish_reason.lower() in CUT

    async def handle(self, call: Call, account: Account, deadline: float | None = None) -> Answer | Failure:
        """A call out of a cell; a failure is an answer too, and ends nothing but this call."""
        started = time.monotonic()
        seconds = self._config.call_timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                result: Answer | Failure = await self._answer(call, account, deadline, limit)
        except TimeoutError:
            result = Failure("DEADLINE", f"no answer within {seconds:.0f} s")
        except (CallFailed, ConfigError, RunFailed) as error:
            result = failure_of(error)
        account.remember(call, result, time.monotonic() - started)
        return result

    def take_recorded(self, call: Call) -> Answer | None:
        """An answer that was paid for already, in a cell that did not end well."""
        recorded = self._journal.recorded(call)
        if recorded is not None:
            self._journal.end(call, recorded)
        return recorded

    def record(self, call: Call, answer: Answer) -> None:
        self._journal.end(call, answer)

    def cell_ended(self, session_id: str, cell_id: str, *, ok: bool) -> None:
        """What a cell had bought that did not end well is there again for the same questions."""
        self._journal.cell_ended(session_id, cell_id, ok=ok)

    async def _answer(
        self, call: Call, account: Account, deadline: float | None, limit: asyncio.Timeout
    ) -> Answer:
        self._config.policy.check(call)
        client = self.models.for_call(call.model)
        if recorded := self.take_recorded(call):
            return recorded
        request = LMRequest.of_prompt(call.prompt)
        response = await self.ask(client, request, account, deadline=deadline, limit=limit, call=call)
        if not response.text.strip():
            why = f" (finish reason {response.finish_reason!r})" if response.finish_reason else ""
            raise ProviderError(f"model {response.model!r} gave an empty reply{why}")
        return answer_of(response)

    async def _ask_knowing_its_length(
        self, client: LMClient, request: LMRequest, price: Price | None, call: Call | None
    ) -> LMResponse:
        """A budget asks for an answer of a certain length, which a model may be too small for: it says so."""
        try:
            return await self._ask_once(client, request, price, call)
        except ProviderRejected as error:
            if error.most_output_tokens is None or request.max_output_tokens or client.output_tokens:
                raise
            self._longest[client.model_name] = error.most_output_tokens
        return await self._ask_once(client, request, price, call)

    async def _ask_once(
        self, client: LMClient, request: LMRequest, price: Price | None, call: Call | None
    ) -> LMResponse:
        """Reserve, write the intent down, ask, write the answer down, settle."""
        if call is not None and self._refused > MAX_REFUSED:  # the root LM still has its turns
            raise CallFailed(
                "TOO_MANY", f"{MAX_REFUSED:,} requests of this run were refused: no more are sent"
            )
        wanted = request.max_output_tokens or client.output_tokens or self._longest.get(client.model_name)
        reservation = await self.budget.reserve(
            request.messages,
            wanted,
            price,
            client.context_window,
            least=client.least_output_tokens,
            beside=client.tokens_beside,
        )
        response: LMResponse | None = None
        may_be_billed = True  # where it is cancelled, nobody knows
        try:
            if call is not None:
                self._journal.begin(call)
            answered = await client.complete(_bounded(request, reservation.output_tokens))
            response = _priced(replace(answered, text=without_surrogates(answered.text)), price)
            if call is not None and response.text.strip():
                self._journal.end(call, answer_of(response))
            return response
        except ProviderError as error:
            may_be_billed = error.may_be_billed
            self._refused += isinstance(error, (ProviderRejected, ProviderRefused))
            raise
        except (RunFailed, ConfigError):
            may_be_billed = False
            raise
        finally:
            usage = response.usage if response is not None else None
            self.budget.settle(reservation, usage, may_be_billed=may_be_billed)

    def _price(self, client: LMClient) -> Price | None:
        model = client.model_name
        price = client.price or self._config.prices.find(model)
        if price is None and self._config.limits.max_budget is not None:
            raise ConfigError(
                f"max_budget: model {model!r} has no known price; "
                f"give it in RLM(prices={{{model!r}: {{'input': …, 'output': …}}}}), USD per million tokens, "
                "or in a TOML file by --prices"
            )
        return price


def answer_of(response: LMResponse) -> Answer:
    return Answer(response.text, response.model, response.usage)


def _sendable(request: LMRequest) -> LMRequest:
    """Lone surrogates, of a command line or of a JSON escape, can't be sent to anybody."""
    if all(each["content"].isascii() for each in request.messages):
        return request
    clean = [{**each, "content": without_surrogates(each["content"])} for each in request.messages]
    return replace(request, messages=tuple(clean))


def _bounded(request: LMRequest, output_tokens: int | None) -> LMRequest:
    """With as long an answer as there is room for; the key is that of a body, and this may change it."""
    if output_tokens == request.max_output_tokens:
        return request
    key = f"{request.idempotency_key}-{output_tokens}"
    return replace(request, max_output_tokens=output_tokens, idempotency_key=key)


def _priced(response: LMResponse, price: Price | None) -> LMResponse:
    """With its cost: the provider's own figure where it gives one."""
    if response.usage.cost or price is None:  # 0 is said where somebody else's account is charged
        return response
    return replace(response, usage=replace(response.usage, cost=price.of(response.usage)))


def failure_of(error: CallFailed | ConfigError | RunFailed) -> Failure:
    """What a cell is told of a call that failed."""
    if isinstance(error, CallFailed):
        return Failure(error.code, str(error))
    return Failure("INVALID" if isinstance(error, ConfigError) else "PROVIDER", str(error))
