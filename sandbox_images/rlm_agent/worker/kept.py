"""What a fork does not keep by itself, although a user would expect it to."""

import os
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
            try:
                bound.seek(fd, offset, os.SEEK_SET)
            except OSError:
                continue


def _file_offsets() -> dict[int, int]:
    offsets: dict[int, int] = {}
    try:
        names = bound.list_folder("/proc/self/fd")
    except OSError:
        return offsets
    for name in names:
        fd = int(name)
        try:
            if bound.is_regular(bound.fstat(fd).st_mode):
                offsets[fd] = bound.seek(fd, 0, os.SEEK_CUR)
        except OSError:
            continue
    return offsets
