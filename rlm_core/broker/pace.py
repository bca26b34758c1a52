"""How fast one client is asked: by its provider's word (Retry-After), and by the caller's own limits."""

import asyncio
import math
import sys
from dataclasses import dataclass

WINDOW_SECONDS = 60.0
LOOKS = 60
"""In a window, where what is waited for has no time."""


@dataclass(frozen=True, slots=True)
class Rate:
    """None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Input and output."""


@dataclass(slots=True)
class Slot:
    """One request's part of the last minute."""

    at: float
    """When it was sent, on the loop's clock; infinite until then."""
    tokens: float
    """What it was taken to need; set it to what it did need when that is known."""


class Pace:
    """Of one client, for all runs that ask it. In one event loop only."""

    def __init__(self, rate: Rate | None = None, max_concurrent: int | None = None) -> None:
        self._rate = rate or Rate()
        self._places = asyncio.Semaphore(max_concurrent or sys.maxsize)
        self._not_before = 0.0
        self._recent: list[Slot] = []
        self._turn = asyncio.Lock()

    def hold(self, seconds: float) -> None:
        """Nothing is asked for so long."""
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + seconds)

    async def take(self, tokens: float, shared: asyncio.Semaphore) -> Slot:
        """Wait until one more request may be sent; first come, first served. Then `release` it.

        Args:
            tokens: that it will need, as far as one can tell.
            shared: places of its run; one is taken last, so that a client that has to wait takes none from
                the run's other clients, and out of turn, so that a run that has none left holds up no other.
        """
        async with self._turn:
            await self._places.acquire()
            try:
                await self._until_it_may(tokens)
            except BaseException:
                self._places.release()
                raise
            slot = Slot(math.inf, tokens)
            if self._rate != Rate():
                self._recent.append(slot)
        try:
            await shared.acquire()
        except BaseException:
            self._recent = [each for each in self._recent if each is not slot]
            self._places.release()
            raise
        slot.at = asyncio.get_running_loop().time()
        return slot

    def release(self, shared: asyncio.Semaphore) -> None:
        """The request has ended."""
        shared.release()
        self._places.release()

    async def _until_it_may(self, tokens: float) -> None:
        clock = asyncio.get_running_loop().time
        while (seconds := self._wait(tokens, clock())) > 0:  # noqa: ASYNC110 - it is the time that passes
            await asyncio.sleep(seconds)

    def _wait(self, tokens: float, now: float) -> float:
        """Seconds until something changes; 0 when it may be sent. A request that is larger than the limit
        waits for an empty minute."""
        self._recent = [slot for slot in self._recent if slot.at + WINDOW_SECONDS > now]
        full = bool(self._recent) and (
            _exceeds(len(self._recent) + 1, self._rate.requests_per_minute)
            or _exceeds(sum(slot.tokens for slot in self._recent) + tokens, self._rate.tokens_per_minute)
        )
        until = now
        if full:  # one that is not sent yet has no time, so this looks again
            first = min(slot.at for slot in self._recent) + WINDOW_SECONDS
            until = min(first, now + WINDOW_SECONDS / LOOKS)
        return max(until, self._not_before) - now


def _exceeds(number: float, limit: float | None) -> bool:
    return limit is not None and number > limit
