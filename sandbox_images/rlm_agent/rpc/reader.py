"""A protocol that reads into one buffer which stays. The same at both ends."""

import asyncio

READ_BYTES = 64 << 10


def read_buffer() -> memoryview:
    """For the readers of one event loop: what was read is taken before anything else is read.

    asyncio's own way makes an object of 256 KiB for each read, and shrinks it to what has come. From 128 KiB
    on, glibc maps and unmaps that each time (mallopt(3), M_MMAP_THRESHOLD): a message of 100 bytes takes
    19 µs instead of 2, in gVisor 310 instead of 100.
    """
    return memoryview(bytearray(READ_BYTES))


class Reader(asyncio.BufferedProtocol):
    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.take(self._buffer[:nbytes])

    def take(self, data: memoryview) -> None:
        """What has come. The memory is used again afterwards: copy what is kept."""
        raise NotImplementedError
