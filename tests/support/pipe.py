"""One way of a byte stream between two tunnels, in memory."""

import asyncio
from collections.abc import Callable


class Pipe(asyncio.WriteTransport):
    """It can be cut: what is written then is lost."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        super().__init__()
        self._deliver = deliver
        self.lost_bytes = 0
        self.cut = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.cut:
            self.lost_bytes += len(data)
        else:
            asyncio.get_running_loop().call_soon(self._deliver, bytes(data))
