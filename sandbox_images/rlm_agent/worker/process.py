"""Linux calls that the standard library does not wrap. Each degrades to nothing where it is missing."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SURE = 3
"""Looks in a row that find nothing, while processes come and go."""
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> bool:
    prctl = getattr(_libc, "prctl", None)
    return prctl is not None and prctl(option, value, 0, 0, 0) == 0


def die_with_parent() -> bool:
    """SIGKILL this process when the thread that made it ends."""
    return _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> bool:
    """No signal at the end of the parent, whatever was asked for."""
    return _prctl(PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent dies, so that it can be reaped and ended."""
    return _prctl(PR_SET_CHILD_SUBREAPER, 1)


def prefer_as_oom_victim(score: int) -> None:
    """Let the kernel kill a running cell (1000) rather than its checkpoint (0)."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"%d" % score)


def owner(pid: int) -> int:
    """The real user of a process; -1 when it is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:")[2].split()[0])
    return -1


def parent(pid: int) -> int:
    """0 when it is gone, or out of our sight."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def is_below(pid: int, ancestor: int) -> bool:
    """Told by going up from it: a list of children may leave some out while others come and go."""
    for _ in range(SURE):
        at = parent(pid)
        while at > 1 and at != ancestor:
            at = parent(at)
        if at:
            return at == ancestor
    return False  # it is gone, or each time one above it has just ended


def children(pid: int) -> list[int]:
    """Children of every thread of pid; empty when it is gone or /proc can't tell.

    The kernel may leave out some while others come and go.
    """
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int, spare: frozenset[int] = frozenset()) -> list[int]:
    """All below pid, without the trees of the spared."""
    found: list[int] = []
    queue = [pid]
    while queue:
        for child in children(queue.pop()):
            if child not in spare:
                found.append(child)
                queue.append(child)
    return found


END_SECONDS = 1.0


def is_zombie(pid: int) -> bool:
    """Whether it has ended and its parent does not look; true for one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def end_below(pid: int, spare: frozenset[int] = frozenset()) -> int:
    """SIGKILL everything below pid, except the trees of the spared; how many were still there at the end."""
    found: list[int] = []
    looks = 0
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        found = [each for each in descendants(pid, spare) if not is_zombie(each)]
        if not found:
            looks += 1
            if looks == SURE:
                break
            continue
        looks = 0
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, a fork bomb can't outrun this
            for each in found:
                with contextlib.suppress(OSError):
                    os.kill(each, number)
        time.sleep(0.001)  # for their parents to reap them
    return len(found)
