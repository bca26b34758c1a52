"""No namespaces of a session's own, whatever the engine lets through: gVisor takes no notice of the engine's
filter, and in a user namespace a cell could listen to what other sessions send over the sandbox's loopback.

The filter is one of the kernel's (seccomp(2), classic BPF). Standard library only.
"""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
NEW_NAMESPACES = 0x7E020000
"""The CLONE_NEW* flags of clone(2)."""
OTHER_ABI = 0x40000000
"""Numbers from here up are x32's, another way to make the same calls."""
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in what a filter is shown of a call, struct seccomp_data; of an argument the lower half."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR = 0x7FFF0000, 0x00050000


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one kind of processor: its own in seccomp_data, and those of system calls."""

    machine: int
    clone: int
    unshare: int
    setns: int
    clone3: int = 435


NUMBERS = {
    "x86_64": Numbers(0xC000003E, clone=56, unshare=272, setns=308),
    "aarch64": Numbers(0xC00000B7, clone=220, unshare=97, setns=268),
}


def forbid() -> None:
    """For this process and all that it starts; needs PR_SET_NO_NEW_PRIVS.

    Raises:
        OSError: this machine or its kernel does not know that.
    """
    numbers = NUMBERS.get(os.uname().machine)
    if numbers is None:
        raise OSError(f"namespaces can't be forbidden on a machine of kind {os.uname().machine}")
    code = program(numbers)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0):
        raise OSError(ctypes.get_errno(), "namespaces can't be forbidden: PR_SET_SECCOMP is refused")


def program(numbers: Numbers) -> bytes:
    """Each instruction is a code, how many to skip if true and if false, and a constant."""
    allow, refuse, missing = 10, 11, 12
    lines = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 0, refuse - 2, numbers.machine),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, refuse - 4, 0, OTHER_ABI),
        (EQUAL, refuse - 5, 0, numbers.unshare),
        (EQUAL, refuse - 6, 0, numbers.setns),
        (EQUAL, missing - 7, 0, numbers.clone3),  # has its flags where no filter sees them
        (EQUAL, 0, allow - 8, numbers.clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, refuse - 10, 0, NEW_NAMESPACES),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
