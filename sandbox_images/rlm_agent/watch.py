"""Notices the death of a worker, even where nobody is left to tell, and that no other takes its place."""

import asyncio
import contextlib
import os
from collections.abc import Callable

from rlm_agent import limits


class Watch:
    """Of one process at a time."""

    def __init__(self, on_death: Callable[[], None], on_missed: Callable[[], None]) -> None:
        """`on_missed` is called READY_SECONDS after a death, unless another process is watched by then."""
        self._on_death, self._on_missed = on_death, on_missed
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._missed: asyncio.TimerHandle | None = None

    def begin(self, pid: int) -> None:
        self.end()
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(pid)
            self._loop.add_reader(self._pidfd, self._died)

    def end(self) -> None:
        if self._missed is not None:
            self._missed.cancel()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _died(self) -> None:
        self.end()
        self._missed = self._loop.call_later(limits.READY_SECONDS, self._on_missed)
        self._on_death()
