"""The time that a run and its children have together."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from rlm_core.errors import TimeoutExceededError


class Deadline:
    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds; infinite without a limit, negative when it has passed."""
        return float("inf") if self._seconds is None else self._seconds - self.elapsed

    @property
    def at(self) -> float | None:
        """On the clock of the loop."""
        return None if self._seconds is None else asyncio.get_running_loop().time() + self.left

    def check(self) -> None:
        """Raises TimeoutExceededError when it has passed."""
        if self.left <= 0:
            raise TimeoutExceededError(self.elapsed, self._seconds or 0.0)

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Around what must have ended by then.

        Raises:
            TimeoutExceededError: it had not.
        """
        limit = asyncio.timeout_at(self.at)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise  # somebody else's
            raise TimeoutExceededError(self.elapsed, self._seconds or 0.0) from None


@contextlib.contextmanager
def without(limit: asyncio.Timeout | None) -> Iterator[None]:
    """The time of this limit does not run inside."""
    at = None if limit is None else limit.when()
    if limit is None or at is None:
        yield
        return
    clock = asyncio.get_running_loop().time
    left = at - clock()
    limit.reschedule(None)
    yield  # where this is cancelled, the limit is over anyway
    limit.reschedule(clock() + left)
