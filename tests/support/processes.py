"""What the tests ask the kernel about processes."""

import asyncio
import contextlib
from pathlib import Path

from rlm_agent.worker import process


def descendants(pid: int) -> dict[int, str]:
    """Pid to state and name of everything below a process."""
    found: dict[int, str] = {}
    for each in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
        with contextlib.suppress(OSError):  # it has gone since
            stat = Path(f"/proc/{each}/stat").read_text()
            if process.is_below(each, pid):
                found[each] = f"{stat.rpartition(')')[2].split()[0]} {stat}"
    return found


async def only(count: int, below: int) -> dict[int, str]:
    """Wait until a process has as many below it: one that was ended may still be on its way out."""
    async with asyncio.timeout(20):
        while len(found := await asyncio.to_thread(descendants, below)) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return found


async def child_of(pid: int) -> int:
    """The one child of a process, once it has one."""
    async with asyncio.timeout(20):
        while not (found := process.children(pid)):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    (child,) = found
    return child


async def none_but(these: set[int], below: int) -> None:
    """Wait until a process has nothing else below it."""
    async with asyncio.timeout(20):
        while not set(await asyncio.to_thread(descendants, below)) <= these:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def open_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def peak_megabytes(pid: int) -> int:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


async def removed(folder: str) -> None:
    """Wait until another process has removed it."""
    async with asyncio.timeout(20):
        while await asyncio.to_thread(Path(folder).exists):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)
