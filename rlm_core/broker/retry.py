"""When a provider that did not answer is asked again: one policy for all of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from rlm_core.broker.pace import Pace
from rlm_core.errors import ProviderError, ProviderOverloaded, ProviderUnreachable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Times in seconds. The wait doubles from `first_delay` to `longest_delay`, with a random part; what a
    provider asks for by Retry-After takes its place."""

    attempts: int = 4
    first_delay: float = 0.5
    longest_delay: float = 20.0
    longest_retry_after: float = 120.0
    """A provider that asks for more is not waited for."""

    def delay(self, attempt: int, error: BaseException | None) -> float:
        """Before the next attempt, after this one (from 1)."""
        asked = getattr(error, "retry_after", None)
        if isinstance(asked, (int, float)):
            return float(asked) * random.uniform(1.0, 1.1)  # not all at once
        doubled: float = self.first_delay * 2 ** (attempt - 1)
        return min(self.longest_delay, doubled) * random.uniform(0.5, 1.0)


async def with_retries(
    policy: RetryPolicy, pace: Pace, deadline: float | None, attempt: Callable[[], Awaitable[T]]
) -> T:
    """`deadline` is of the loop's clock: what could only be answered after it is not asked again. An attempt
    waits for its pace by itself; a pause that the provider asks for is the pace's.

    Raises:
        ProviderError: that of the last attempt.
    """
    loop = asyncio.get_running_loop()

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        seconds: float = policy.delay(state.attempt_number, error)
        asked = getattr(error, "retry_after", None)
        if asked is not None and asked <= policy.longest_retry_after:
            pace.hold(seconds)
        return seconds

    def stop(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "retry_after", None) or 0.0
        late = deadline is not None and loop.time() + state.upcoming_sleep >= deadline
        return late or asked > policy.longest_retry_after or state.attempt_number >= policy.attempts

    first: list[ProviderError] = []

    async def next_attempt() -> T:
        if first:
            raise first.pop()
        return await attempt()

    try:
        return await attempt()  # nearly always the only one: it is spared the machinery (0.1 ms)
    except ProviderError as error:
        first.append(error)
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_is_worth_it), wait=wait, stop=stop, reraise=True
    )
    return await retrying(next_attempt)


def _is_worth_it(error: BaseException) -> bool:
    if isinstance(error, ProviderError) and error.try_again is not None:
        return error.try_again
    return isinstance(error, (ProviderOverloaded, ProviderUnreachable))
