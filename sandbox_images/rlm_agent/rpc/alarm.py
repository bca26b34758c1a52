"""A time limit that is set anew for each of many short works. The same at both ends."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once its time has come, unless it was stopped by then. Until one of both, no later time takes the
    place of an earlier one: whoever can have it set again can't put it off.

    A timer of the event loop is left where it is when the alarm is stopped and set to later, and looks at its
    end whether the time has come. One for each work costs more than the rest of its bookkeeping (measured:
    10 µs, which grow with the ended ones that the loop still holds).
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """From now, unless it is to ring before that."""
        due = asyncio.get_running_loop().time() + seconds
        if self._due is not None and self._due <= due:
            return
        self._due = due
        if self._timer is None or self._timer.when() > self._due:
            self._start()

    def stop(self) -> None:
        """Until it is set again."""
        self._due = None

    def close(self) -> None:
        """Stop it, and let go of whoever is to hear it."""
        self.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        assert self._due is not None
        self._timer = asyncio.get_running_loop().call_at(self._due, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if asyncio.get_running_loop().time() < self._due:
            self._start()
            return
        self._due = None
        self._ring()
