"""The worker's end of a framed socket: blocking, and sure that the fd is still its own."""

import os
import select
import socket
from collections.abc import Sequence
from typing import NoReturn

from rlm_agent.frames import FIRST, PACKET_BYTES, PREFIX, Frame, PacketBuffer, packets, parse, parse_prefix
from rlm_agent.worker import bound

_INPUT, _HANGUP = select.POLLIN, select.POLLHUP
EXIT_CLOSED = 90
"""Exit code of a worker whose agent is gone."""
EXIT_LINK = 91
"""Exit code of a worker whose cell closed or replaced the link to the agent, or what its output goes to."""
EXIT_BROKEN = 92
"""Exit code of a worker in which no cell can run."""


class LinkClosed(Exception):
    """The other end is gone."""


class Link:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._inode = os.fstat(sock.fileno()).st_ino

    def fileno(self) -> int:
        return self._socket.fileno()

    def intact(self) -> bool:
        """False when a cell closed the fd, or closed it and opened something else under its number."""
        try:
            return bound.fstat(self._socket.fileno()).st_ino == self._inode
        except OSError:
            return False

    def ended(self) -> bool:
        """Whether the other end is gone."""
        return self._poll(_HANGUP, 0)

    def wait(self, seconds: float) -> None:
        """Until something comes, or this time is over."""
        self._poll(_INPUT, int(seconds * 1000))

    def _poll(self, events: int, milliseconds: int) -> bool:
        poll = bound.new_poll()
        try:
            poll.register(self._socket.fileno(), events)
            return bool(poll.poll(milliseconds))
        except (OSError, ValueError):
            return False  # a cell has taken the means to know

    def send(self, frame: Frame) -> None:
        self._socket.sendall(frame.encode())

    def send_with_fds(self, frame: Frame, fds: Sequence[int]) -> None:
        data = frame.encode()
        sent = socket.send_fds(self._socket, [data], list(fds))
        self._socket.sendall(data[sent:])

    def receive(self) -> tuple[Frame, list[int]]:
        """The next frame, and the fds that came with it.

        Raises:
            LinkClosed: end of stream.
            FrameError: not a frame.
        """
        prefix, fds = self._first_bytes(PREFIX.size)
        kind, header_size, body_size = parse_prefix(prefix)
        header = self._exactly(header_size)
        return parse(kind, header, self._exactly(body_size)), fds

    def _first_bytes(self, size: int) -> tuple[bytes, list[int]]:
        """Ancillary data arrives with the first byte of a frame, so only that read looks for it."""
        data, fds = _receive_with_fds(self._socket, size)
        return data + self._exactly(size - bound.length(data)), fds

    def _exactly(self, size: int) -> bytes:
        if size == 0:
            return b""
        data = bytearray(size)
        view, read = memoryview(data), 0
        while read < size:
            count = self._socket.recv_into(view[read:])
            if count == 0:
                raise LinkClosed
            read += count
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


class PacketLink(Link):
    """A worker's link to its agent, which stays in step when a worker is killed in the middle of a frame."""

    @classmethod
    def pair(cls) -> tuple["PacketLink", "PacketLink"]:
        one, other = bound.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def send(self, frame: Frame) -> None:
        for packet in packets(frame.encode()):
            self._socket.sendall(packet)

    def await_frame(self) -> None:
        """Until one comes, or the other end is gone; it is still to be received."""
        self._socket.recv(1, socket.MSG_PEEK)

    def has_frame(self) -> bool:
        """Whether one has come of which nothing has been received."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == FIRST
        except OSError:
            return False

    def receive(self) -> tuple[Frame, list[int]]:
        buffer, fds = PacketBuffer(), []
        while True:
            packet, received = _receive_with_fds(self._socket, PACKET_BYTES + 1)
            fds += received
            frame = buffer.feed(packet)
            if frame is not None:
                return frame, fds


def _receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Raises LinkClosed at the end of the stream."""
    fds = bound.new_array("i")
    data, ancillary, _, _ = sock.recvmsg(size, bound.FDS_SPACE)
    if not data:
        raise LinkClosed
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: bound.length(payload) - bound.length(payload) % fds.itemsize])
    return data, list(fds)


def leave(code: int) -> NoReturn:
    """End this process without running anything that a cell registered to run at exit."""
    bound.exit_now(code)
