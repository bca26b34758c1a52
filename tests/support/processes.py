"""What the tests ask the kernel about processes."""

import os
from pathlib import Path


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> dict[int, str]:
    """Pid to state and name of everything below a process."""
    found: dict[int, str] = {}
    queue = [pid]
    while queue:
        for child in _children(queue.pop()):
            stat = Path(f"/proc/{child}/stat").read_text()
            found[child] = f"{stat.rpartition(')')[2].split()[0]} {stat}"
            queue.append(child)
    return found


def open_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
