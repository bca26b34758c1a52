"""What the service knows of a sandbox and of the processes in it."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.machines import Machines

KEPT_BYTES = 64 << 20
"""Of a process's output, for a reader that comes again; the real service's bound is not known."""
CHUNK = 64 << 10


@dataclass
class Process:
    """An exec: its output is kept, and read by offset; its input is written by offset."""

    child: asyncio.subprocess.Process
    output: dict[int, bytearray] = field(default_factory=lambda: {1: bytearray(), 2: bytearray()})
    dropped: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    ended: set[int] = field(default_factory=set)
    written: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self, fd: int, offset: int) -> bytes:
        """What there is from this offset on, as soon as there is something; empty at the end."""
        async with self.changed:
            while fd not in self.ended and offset >= self.dropped[fd] + len(self.output[fd]):
                await self.changed.wait()
            start = offset - self.dropped[fd]
            return bytes(self.output[fd][start : start + CHUNK])

    async def keep(self, fd: int) -> None:
        stream = self.child.stdout if fd == 1 else self.child.stderr
        assert stream is not None
        while data := await stream.read(CHUNK):
            async with self.changed:
                self.output[fd] += data
                if (excess := len(self.output[fd]) - KEPT_BYTES) > 0:
                    del self.output[fd][:excess]
                    self.dropped[fd] += excess
                self.changed.notify_all()
        async with self.changed:
            self.ended.add(fd)
            self.changed.notify_all()


@dataclass
class Box:
    id: str
    task_id: str
    definition: Any
    tags: dict[str, str]
    created: float
    app_id: str
    machine: str = ""
    result: Any = None
    """Set when it has ended."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    processes: dict[str, Process] = field(default_factory=dict)
    tunnels: dict[int, asyncio.Server] = field(default_factory=dict)
    connections: set[asyncio.StreamWriter] = field(default_factory=set)
    active: float = 0.0
    secret_sources: list[Any] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.result is None

    @property
    def is_used(self) -> bool:
        return bool(self.connections) or any(
            each.child.returncode is None for each in self.processes.values()
        )


class State:
    """What the parts of the service share."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        self.boxes: dict[str, Box] = {}
        self.images: dict[str, str] = {}
        """Of the machines, by the service's ids."""
        self.dropped = asyncio.Event()
        """Set when the streams that are open now break."""
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        """For the command router, that were given and still hold."""

    def break_streams(self) -> None:
        self.dropped.set()
        self.dropped = asyncio.Event()
