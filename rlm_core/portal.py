"""One event loop for the whole library, in a thread of its own; the sync API is this portal to it.

The async API goes through it too: a caller's loop is then never blocked by ours, gRPC runs in one loop
(it logs errors when several share a process), and a run does not care which loop started it.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from rlm_core.errors import ConfigError

T = TypeVar("T")
FINISH_SECONDS = 2.0


class Portal:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="rlm-core", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            # These two leave the loop as well as their task, which has them: the other runs go on.
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self._loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return its result; an interrupt of the caller cancels it and waits for it."""
        if threading.get_ident() == self._thread.ident:
            work.close()
            raise ConfigError(
                "a blocking call from an observer or a client, in the library's own event loop, can't end: "
                "use the async method"
            )
        started = self._start(work)
        try:
            return started.outcome.result()
        except BaseException:
            if not started.outcome.done():
                started.cancel()
                concurrent.futures.wait([started.outcome])
            raise

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """For finalizers, in whatever thread they come: waits a little, but never in the loop itself."""
        started = self._start(work)
        if threading.get_ident() != self._thread.ident:
            concurrent.futures.wait([started.outcome], FINISH_SECONDS)

    async def await_(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a caller in an event loop of its own."""
        started = self._start(work)
        waiting = asyncio.wrap_future(started.outcome)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            started.cancel()
            await asyncio.wait([waiting])
            if not waiting.cancelled():
                waiting.exception()  # looked at: it is our own cancellation
            raise

    def _start(self, work: Coroutine[Any, Any, T]) -> "_Started[T]":
        started = _Started(self._loop, work)
        self._loop.call_soon_threadsafe(started.begin)
        return started


class _Started(Generic[T]):
    """Work in the portal's loop. Its outcome is there when it has ended, cleaned up after a cancel too."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self.outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def _end(self, task: "asyncio.Task[T]") -> None:
        if task.cancelled():
            self.outcome.set_exception(concurrent.futures.CancelledError())
        elif error := task.exception():
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


_lock = threading.RLock()  # a finalizer may come in between
_portal: Portal | None = None


def portal() -> Portal:
    """The portal of this process; a forked child gets one of its own."""
    global _portal
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = Portal()
        return _portal
