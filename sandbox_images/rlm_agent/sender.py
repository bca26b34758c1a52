"""Who sent a packet: told by the kernel, where what a process says of itself may be a lie."""

import array
import os
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("iII")
_SPACE = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(1024)


class Sender(NamedTuple):
    """Pid and user as this process sees them; pid 0 and user -1 when the kernel does not tell."""

    pid: int
    user: int


NOBODY = Sender(0, -1)


def receive_with_sender(sock: socket.socket, size: int) -> tuple[bytes, Sender]:
    """One packet from a socket that has SO_PASSCRED set. File descriptors that come with it are closed."""
    data, ancillary, _, _ = sock.recvmsg(size, _SPACE)
    sender = NOBODY
    for level, kind, payload in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS and len(payload) == _UCRED.size:
            pid, user, _ = _UCRED.unpack(payload)
            sender = Sender(pid, user)
        elif kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            for fd in fds:
                os.close(fd)
    return data, sender
