"""Cancellation that lets a clean-up end."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish_first(cleanup: Coroutine[Any, Any, T]) -> T:
    """Run a clean-up to its end, whatever cancels the caller meanwhile; the cancellation is raised then."""
    task = asyncio.ensure_future(cleanup)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                break
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return task.result()
