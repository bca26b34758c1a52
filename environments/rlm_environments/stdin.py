"""A process's stdin that a provider's SDK takes in requests, as a transport of asyncio."""

import asyncio
from collections.abc import Awaitable, Callable

REQUEST_BYTES = 1 << 20
"""Sent in one request at most; what comes meanwhile goes into the next one."""
FULL_BYTES = 2 << 20
"""Waiting to be sent, beyond which nothing more is wanted."""


class StdinTransport(asyncio.WriteTransport):
    """One request after the other, so that the bytes stay in order."""

    def __init__(
        self,
        send: Callable[[bytes], Awaitable[None]],
        on_full: Callable[[bool], None],
        on_lost: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._send = send
        self._on_full, self._on_lost = on_full, on_lost
        self._waiting = bytearray()
        self._is_full = False
        self._task: asyncio.Task[None] | None = None
        self._aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._aborted:
            return
        self._waiting += data
        self._tell()
        if self._task is None:
            self._task = asyncio.ensure_future(self._drain())

    def abort(self) -> None:
        self._aborted = True
        if self._task is not None:
            self._task.cancel()

    def is_closing(self) -> bool:
        return self._aborted

    async def _drain(self) -> None:
        try:
            while self._waiting:
                data = bytes(self._waiting[:REQUEST_BYTES])
                del self._waiting[:REQUEST_BYTES]
                await self._send(data)
                self._tell()
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises, the way is closed
            self._aborted = True
            self._on_lost(f"its stdin is closed: {error}")
        finally:
            self._task = None

    def _tell(self) -> None:
        full = len(self._waiting) > FULL_BYTES
        if full is not self._is_full:
            self._is_full = full
            self._on_full(full)
