"""What a whole tree of runs may spend: the worst case is set aside before a call is sent, and settled after.

    spent + reserved ≤ limit, at every moment, for USD, tokens and calls

A call whose worst case does not fit waits while others are on their way, whose worst cases may be given back.
Then it is sent with as many tokens for its answer as are left, or refused where that is next to nothing.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rlm_core.clients.base import Message
from rlm_core.errors import (
    BudgetExceededError,
    BudgetRefused,
    CallLimitExceededError,
    LimitExceeded,
    TokenLimitExceededError,
)
from rlm_core.prices import Price
from rlm_core.types import TokenUsage

OUTPUT_TOKENS = 16_384
"""Of an answer under a budget, where the caller sets no limit of its own."""
LEAST_OUTPUT_TOKENS = 256
"""An answer that has to be shorter is not worth its prompt."""
MESSAGE_TOKENS, REQUEST_TOKENS = 32, 256
"""Around each message, and around all of them: chat formats add 3 to 12 (measured), and some a preamble of
their own when there is no system message (measured 30; the longest that we know of has some 70)."""
EPSILON = 1e-9
"""USD; sums of floating-point numbers."""

BYTES_PER_TOKEN = 4
"""English text; measured 4.15 on the King James Bible with cl100k."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a run and all its children together; None is no limit."""

    max_budget: float | None = None
    """USD."""
    max_tokens: int | None = None
    """Input and output."""
    max_calls: int | None = None

    @property
    def count_tokens(self) -> bool:
        return self.max_budget is not None or self.max_tokens is not None


@dataclass(frozen=True, slots=True)
class Amount:
    usd: float = 0.0
    tokens: int = 0
    calls: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.usd + other.usd, self.tokens + other.tokens, self.calls + other.calls)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.usd - other.usd, self.tokens - other.tokens, self.calls - other.calls)


@dataclass(frozen=True, slots=True)
class Reservation:
    amount: Amount
    output_tokens: int | None
    """That the answer may have; None: as many as the provider likes."""


def most_tokens(messages: Sequence[Message]) -> int:
    """An upper bound: no tokenizer in use makes more tokens of a text than it has bytes."""
    sizes = (len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
    return REQUEST_TOKENS + sum(size + MESSAGE_TOKENS for size in sizes)


def likely_tokens(messages: Sequence[Message]) -> float:
    """Of English text; no bound."""
    return sum(len(message["content"]) for message in messages) / BYTES_PER_TOKEN


class Budget:
    """Of one tree. In the library's event loop only."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.spent = Amount()
        """What was billed, and the worst case of what may have been: calls that were cancelled or cut off."""
        self.reserved = Amount()
        self._settled = asyncio.Event()

    async def reserve(
        self,
        messages: Sequence[Message],
        output_tokens: int | None,
        price: Price | None,
        window: int = 4 * OUTPUT_TOKENS,
        *,
        least: int = 0,
        beside: int = 0,
    ) -> Reservation:
        """Set the worst case of a call aside; waits while others on their way may give enough back.

        Args:
            output_tokens: that the answer may have; None: a quarter of the model's `window` at most.
            least: tokens that the answer must be allowed to have.
            beside: tokens that the prompt may have beside its messages.

        Raises:
            BudgetRefused: what is left is not enough.
        """
        prompt = most_tokens(messages) + beside if self.limits.count_tokens else 0
        wanted = output_tokens or max(least, 1, min(OUTPUT_TOKENS, window // 4))
        least = min(wanted, max(least, LEAST_OUTPUT_TOKENS))
        while True:
            fits = self._fitting(prompt, price, wanted, self.spent + self.reserved)
            if fits == wanted or (fits >= least and not self.reserved.calls):
                break
            if self._fitting(prompt, price, least, self.spent) < least:
                raise self._refusal(prompt, price, least)
            self._settled.clear()
            await self._settled.wait()
        if self.limits.count_tokens:
            reservation = Reservation(Amount(_worst(prompt, fits, price), prompt + fits, 1), fits)
        else:
            reservation = Reservation(Amount(calls=1), output_tokens)
        self.reserved += reservation.amount
        return reservation

    def settle(
        self, reservation: Reservation, usage: TokenUsage | None, *, may_be_billed: bool = False
    ) -> None:
        """Take what a call really used, nothing for None, or all of it where nobody knows."""
        used = Amount()
        if usage is not None:
            used = Amount(usage.cost or 0.0, usage.input_tokens + usage.output_tokens, 1)
            if not used.tokens and self.limits.count_tokens:
                used = reservation.amount  # a provider that does not say what it used
        elif may_be_billed:
            used = reservation.amount
        self.reserved -= reservation.amount
        if not self.reserved.calls:
            self.reserved = Amount()
        self.spent += used
        self._settled.set()

    @property
    def is_spent(self) -> bool:
        """Whether nothing at all is left of a limit."""
        limits, spent = self.limits, self.spent
        return (
            (limits.max_calls is not None and spent.calls >= limits.max_calls)
            or (limits.max_tokens is not None and spent.tokens >= limits.max_tokens)
            or (limits.max_budget is not None and spent.usd >= limits.max_budget)
        )

    def exceeded(self, limit: str, why: str) -> LimitExceeded:
        """The error that ends a run for which nothing is left of this limit."""
        limits, spent = self.limits, self.spent
        if limit == "max_budget":
            return BudgetExceededError(spent.usd, limits.max_budget or 0.0, message=why)
        if limit == "max_tokens":
            return TokenLimitExceededError(spent.tokens, limits.max_tokens or 0, message=why)
        return CallLimitExceededError(spent.calls, limits.max_calls or 0, message=why)

    def _fitting(self, prompt: int, price: Price | None, wanted: int, taken: Amount) -> int:
        """Tokens of an answer that fit beside what is taken, at most those wanted; -1 for no call at all."""
        limits = self.limits
        fits = wanted
        if limits.max_calls is not None and taken.calls >= limits.max_calls:
            return -1
        if limits.max_tokens is not None:
            fits = min(fits, limits.max_tokens - taken.tokens - prompt)
        if limits.max_budget is not None and price is not None:
            left = limits.max_budget - taken.usd - price.worst_input(prompt)
            each = price.worst_output(prompt)
            if left < -EPSILON:
                return -1
            if each:
                fits = min(fits, int((left + EPSILON) / each))
        return max(fits, -1)

    def _refusal(self, prompt: int, price: Price | None, least: int) -> BudgetRefused:
        limits, spent = self.limits, self.spent
        if limits.max_calls is not None and spent.calls >= limits.max_calls:
            return BudgetRefused("max_calls", f"all {limits.max_calls:,} calls of this run are made")
        if limits.max_tokens is not None and limits.max_tokens - spent.tokens < prompt + least:
            left = max(0, limits.max_tokens - spent.tokens)
            return BudgetRefused(
                "max_tokens",
                f"{left:,} tokens are left of this run, and this call may take {prompt + least:,}",
            )
        left_usd = max(0.0, (limits.max_budget or 0.0) - spent.usd)
        need = _worst(prompt, least, price)
        return BudgetRefused(
            "max_budget", f"${left_usd:.6f} is left of this run's budget, and this call may cost ${need:.6f}"
        )


def _worst(prompt: int, output: int, price: Price | None) -> float:
    return 0.0 if price is None else price.worst_input(prompt) + output * price.worst_output(prompt)
