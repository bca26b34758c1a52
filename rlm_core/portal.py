"""One event loop for the whole library, in a thread of its own; the sync API is this portal to it.

The async API goes through it too: a caller's loop is then never blocked by ours, gRPC runs in one loop
(it logs errors when several share a process), and a run does not care which loop started it.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
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
        """Run to the end and return its result; an interrupt of the caller cancels it and waits for it, and a
        second one does not wait."""
        if threading.get_ident() == self._thread.ident:
            work.close()
            raise ConfigError(
                "a blocking call from an observer or a client, in the library's own event loop, can't end: "
                "use the async method"
            )
        started = _Started(self._loop, work)
        try:
            started.begin()
            started.wait()
        except BaseException:
            started.cancel()
            started.wait()
            raise
        try:
            return started.result()
        except asyncio.CancelledError:
            raise concurrent.futures.CancelledError from None  # no error of a caller without a loop

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """For finalizers, in whatever thread they come: waits a little, but never in the loop itself."""
        started = _Started(self._loop, work)
        started.begin()
        if threading.get_ident() != self._thread.ident:
            started.wait(FINISH_SECONDS)

    async def await_(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a caller in an event loop of its own."""
        started = _Started(self._loop, work)
        ended = started.future(asyncio.get_running_loop())
        try:
            started.begin()
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            started.cancel()
            await asyncio.wait([ended])
            raise
        return started.result()


class _Started(Generic[T]):
    """Work in the portal's loop. It has ended when it is cleaned up, after a cancel too.

    Nobody who waits takes a lock that the loop needs: an interrupt can come in the moment in which one has
    been taken, and then nobody gives it back (concurrent.futures has such locks).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self._has_ended = False
        self._end = threading.Lock()
        self._end.acquire()
        self._on_end: Callable[[], object] = self._end.release

    def begin(self) -> None:
        self._loop.call_soon_threadsafe(self._begin)

    def cancel(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel)

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or this time is over."""
        if seconds is not None:
            self._end.acquire(timeout=seconds)
            return
        while not self._has_ended:  # an interrupt can have come just when the lock was taken
            self._end.acquire()

    def future(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
        """That is done in this loop, the waiter's, when it has ended."""
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # nobody waits in a loop that is closed
                loop.call_soon_threadsafe(end)

        self._on_end = tell
        return ended

    def result(self) -> T:
        """Or what it raised."""
        assert self._task is not None
        return self._task.result()

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._note_end)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self._has_ended:  # an interrupt came before its beginning
            self._work.close()
            self._note_end(None)

    def _note_end(self, task: "asyncio.Task[T] | None") -> None:
        if task is not None and not task.cancelled():
            task.exception()  # looked at, also where its waiter was interrupted
        self._has_ended = True
        self._on_end()


_lock = threading.RLock()  # a finalizer may come in between
_portal: Portal | None = None


def portal() -> Portal:
    """The portal of this process; a forked child gets one of its own."""
    global _portal
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = Portal()
        return _portal
