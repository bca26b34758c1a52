"""The calls of one session that are at work on the host, and those that were cancelled and clean up."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class OpenCalls:
    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sizes: dict[str, int] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """A child run that was cancelled ends its session."""
        self.bytes = 0
        """Of their prompts."""

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._tasks

    def start(self, call_id: str, size: int, work: Coroutine[Any, Any, None]) -> None:
        """`size` is of its prompt, in bytes."""
        self._tasks[call_id] = asyncio.create_task(work)
        self._sizes[call_id] = size
        self.bytes += size

    def answered(self, call_id: str) -> None:
        self._tasks.pop(call_id, None)
        self.bytes -= self._sizes.pop(call_id, 0)

    def cancel(self, call_id: str) -> None:
        task = self._tasks.get(call_id)
        self.answered(call_id)
        if task is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def cancel_all(self) -> None:
        for call_id in list(self._tasks):
            self.cancel(call_id)

    async def cleaned_up(self) -> None:
        """Wait for those that were cancelled."""
        if self._ending:
            await asyncio.wait(self._ending)
