"""A user for each session, so that the kernel keeps its processes off the agent's and other sessions'.

For the first process of a container, which is root with SETUID, SETGID and KILL and nothing else.
"""

import contextlib
import ctypes
import os
import secrets
import site
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlm_agent import namespaces

AGENT_USER = 64_000
"""The agent's own user, inside its container."""
FIRST, LAST = 1 << 20, (1 << 31) - 1
"""Users of sessions: so many that two containers of one engine hardly ever share one. The kernel counts
processes per user over all containers."""
FIRST_OF_FEW = 10_000
"""Where the container's user namespace has only some 65,536 users."""
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CAPABILITY_VERSION_3 = 0x20080522
AGENT_LIBRARIES = "/opt/rlm/lib"


class Users:
    def __init__(self) -> None:
        self._used: set[int] = set()
        self._range = _mapped_range()

    def new(self) -> int:
        """A user that nobody in this container has had: it finds nothing that another one left."""
        first, last = self._range
        while (user := first + secrets.randbelow(last - first)) in self._used:
            pass
        self._used.add(user)
        return user

    @contextlib.contextmanager
    def acting_as(self, user: int) -> Iterator[None]:
        """Have the rights of a session's user for a moment, and no others."""
        os.seteuid(user)
        try:
            yield
        finally:
            os.seteuid(0)

    @contextlib.contextmanager
    def making_for(self, user: int) -> Iterator[None]:
        """Make files, for a moment, that have this user's group, in which nobody else is."""
        os.setegid(user)
        try:
            yield
        finally:
            os.setegid(0)


def become(user: int, groups: Sequence[int] = ()) -> None:
    """Be this user for good, without capabilities: the kernel takes all away but the inheritable ones, and no
    program gives any (by its set-user-id bit, or capabilities of its file).

    Raises:
        OSError: the kernel does not know that.
    """
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("a program could give a session rights: PR_SET_NO_NEW_PRIVS is refused")
    namespaces.forbid()
    os.setgroups(groups)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def be_open_to_own_user() -> None:
    """Let a process see its own /proc/self again, which a change of user hides from it."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def live_in(folder: str) -> None:
    """Let cells find their packages, and none of the agent's libraries but rlm_agent itself."""
    os.environ["HOME"] = folder
    os.umask(0o077)  # what a session leaves open is nobody else's to read
    sys.path[:] = [each for each in sys.path if each != AGENT_LIBRARIES]
    environment = Path(os.environ.get("VIRTUAL_ENV", "/nowhere"))
    for packages in environment.glob("lib/python3.*/site-packages"):
        site.addsitedir(str(packages))
        sys.executable = str(environment / "bin/python")  # for programs that a cell starts


def _mapped_range() -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        highest = max(int(inside) + int(count) - 1 for inside, _, count in rows)
        if highest < LAST:
            return FIRST_OF_FEW, min(highest, AGENT_USER - 1)
    return FIRST, LAST
