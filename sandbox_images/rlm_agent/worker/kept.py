"""What a fork does not keep by itself, although a user would expect it to."""

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import Any

from rlm_agent.worker import bound


@dataclass(frozen=True, slots=True)
class Kept:
    """State of the process at the moment of a checkpoint."""

    random_state: tuple[Any, ...]
    file_offsets: dict[int, int]

    @classmethod
    def now(cls) -> "Kept":
        return cls(bound.get_random_state(), _file_offsets())

    def restore_random(self) -> None:
        """The standard library reseeds `random` in every forked child, which would undo a cell's seed()."""
        bound.set_random_state(self.random_state)

    def restore_offsets(self) -> None:
        """Parent and child share the offset of an open file: a dead cell's reads have moved it."""
        for fd, offset in self.file_offsets.items():
            with contextlib.suppress(OSError):
                os.lseek(fd, offset, os.SEEK_SET)


def _file_offsets() -> dict[int, int]:
    offsets: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                fd = int(name)
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    offsets[fd] = os.lseek(fd, 0, os.SEEK_CUR)
    return offsets
