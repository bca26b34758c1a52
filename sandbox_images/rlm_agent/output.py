"""Keeps the head and the tail of a stream of any length, and its true length."""

import contextlib
import fcntl
import os
import sys
import termios

from rlm_agent.rpc.reader import READ_BYTES

NO_BYTES = bytes(4)
"""Where the kernel writes how many there are, a C int."""


class Capture:
    """Of what is fed, the first `keep` bytes go out live and the last `keep` are kept for the end."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._live = 0
        self._tail = b""
        self.total = 0

    def feed(self, data: bytes, *, live: bool) -> bytes:
        """The part of data to send now; all of the rest counts, and its last bytes stay."""
        self.total += len(data)
        head = data[: self._keep - self._live] if live and not self._tail else b""
        self._live += len(head)
        rest = data[len(head) :]
        if rest:
            self._tail = (self._tail + rest)[-self._keep :]
        return head

    @property
    def tail(self) -> bytes:
        return self._tail


class Pipe:
    """The reading end of a session's stdout or stderr."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    def read(self) -> bytes | None:
        """What is there, at most READ_BYTES; None when there is nothing, empty when all writers are gone."""
        try:
            return os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return None

    def drain(self) -> bytes:
        """All that was written before this call, and no more than one read of what is written during it."""
        if self.fd < 0:
            return b""
        left = int.from_bytes(fcntl.ioctl(self.fd, termios.FIONREAD, NO_BYTES), sys.byteorder)
        if not left:
            return b""
        chunks: list[bytes] = []
        while left > 0 and (data := self.read()):  # a cell's own process can have read it meanwhile
            chunks.append(data)
            left -= len(data)
        return b"".join(chunks)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


def make_pipe() -> tuple[Pipe, int]:
    """A pipe as large as the system lets it be, so that a cell that prints is seldom held up."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    return Pipe(reader), writer
