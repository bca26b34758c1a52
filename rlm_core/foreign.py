"""Functions of somebody else's, called from the library's event loop: tools and callbacks."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any


class Places:
    """How many of them may be at work at once. One that runs in a thread has its place until that has ended,
    whether anybody still waits for it or not."""

    def __init__(self, number: int) -> None:
        self._places = asyncio.Semaphore(number)

    async def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call it in a thread, or await it if it is async; whatever it raises comes out as an Exception.

        It may end its own call, by any door (StopIteration, SystemExit, …), and nothing else.
        """
        await self._places.acquire()
        if inspect.iscoroutinefunction(inspect.unwrap(function)):
            try:
                return await _awaited(function(*args, **kwargs))
            finally:
                self._places.release()
        made = await _in_thread(lambda: function(*args, **kwargs), self._places.release)
        return await _awaited(made) if inspect.isawaitable(made) else made


async def _awaited(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise RuntimeError(repr(error)) from error


async def _in_thread(work: Callable[[], Any], ended: Callable[[], None]) -> Any:
    """A thread of its own, which nothing waits for when its cell, or this process, has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        ended()
        if not done.done():
            done.set_result((result, error))

    def target() -> None:
        result, raised = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - SystemExit and others would end the thread unheard
            raised = error
        loop.call_soon_threadsafe(tell, result, raised)

    try:
        threading.Thread(target=target, name="rlm-foreign", daemon=True).start()
    except RuntimeError:  # there can be no more threads
        ended()
        raise
    result, error = await done
    if error is None:
        return result
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        raise error
    raise RuntimeError(repr(error)) from error
