"""One session: a worker chain, its cells one after the other, and what its host is told."""

import asyncio
import contextlib
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from rlm_agent import limits
from rlm_agent.calls import Calls
from rlm_agent.cell import Cell
from rlm_agent.chain import Chain, Ended, Work
from rlm_agent.errors import Busy, Invalid, SessionGone
from rlm_agent.folders import Places
from rlm_agent.frames import Frame, Kind
from rlm_agent.inputs import Inputs
from rlm_agent.output import Pipe, make_pipe
from rlm_agent.result import Death, describe_death, finished_cell, rolled_back_cell, text_of
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.supervision import ProcessLimits, Supervision
from rlm_agent.worker.query import SOCKET_VARIABLE

Outgoing: TypeAlias = "pb.AgentMessage | Exception | Callable[[], pb.AgentMessage | None]"
Up = Callable[[Outgoing], None]


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Times in seconds, sizes in bytes."""

    output_bytes: int = limits.OUTPUT_BYTES
    interrupt_grace: float = limits.INTERRUPT_GRACE_SECONDS
    limits: ProcessLimits = field(default_factory=ProcessLimits)
    env: dict[str, str] = field(default_factory=dict)


class Session:
    def __init__(
        self, session_id: str, places: Places, config: SessionConfig, supervision: Supervision
    ) -> None:
        self.id = session_id
        self.calls = Calls(self._tell)
        self.config = config
        self._closed = False
        self._places = places
        self._supervision = supervision
        self._up: Up | None = None
        self._cells: OrderedDict[str, Cell] = OrderedDict()
        self._inherited_contexts = 0
        self.inputs = Inputs(self._perform)
        self._chain = Chain(session_id, supervision, self._tell_loss)
        self._cell: Cell | None = None
        """That has been asked for, and has not ended."""
        self._cell_work: Work | None = None
        self._unwanted = ""
        """Id of a cell that is to be interrupted, although it has not come yet."""
        self._loop = asyncio.get_running_loop()
        self._stdout, self._worker_stdout = make_pipe()
        self._stderr, self._worker_stderr = make_pipe()

    @property
    def lost(self) -> str | None:
        """Why it is over, once it is."""
        return self._chain.lost

    # -- start and end

    async def start(self) -> None:
        """Spawn an empty worker."""
        self._hear()
        env = {**self.config.env, SOCKET_VARIABLE: str(self._places.socket)}
        await self._supervision.spawn(self.id, self._places.cwd, env, self.config.limits, self._worker_fds())
        await self._begin()

    @property
    def contexts(self) -> int:
        """How many there are, those of the session it was forked from among them."""
        return self._inherited_contexts + self.inputs.contexts

    @property
    def running_cell(self) -> str:
        """Its id; empty when none runs."""
        return self._cell.id if self._cell is not None else ""

    async def fork(self, new: "Session", call_id: str) -> None:
        """Start `new` from this session's memory: idle, or where the call waits for its answer.

        Raises:
            Invalid: it can't be forked now, and why.
        """
        new._hear()
        header: dict[str, Any] = {"cwd": str(new._places.cwd), "socket": str(new._places.socket)}
        if call_id:
            try:
                answer = await self.calls.fork(call_id, {**header, "child": True}, new._worker_fds())
            except KeyError:
                raise Invalid(f"no call {call_id!r} is open") from None
        else:
            ended = await self._perform(Frame(Kind.FORK, header), 0, fds=new._worker_fds())
            if isinstance(ended, Death):
                raise Invalid(f"the fork failed: {describe_death(ended)}")
            answer = ended.header
        if answer.get("error"):
            raise Invalid(str(answer["error"]))
        new._inherited_contexts = self.contexts
        await self._supervision.adopt(new.id, self.id, int(answer["pid"]), new._places.cwd)
        await new._begin()

    async def close(self) -> None:
        """End every process of the session; safe to repeat."""
        if self._closed:
            return
        self._closed = True
        await self._chain.close()
        await self.calls.close()
        for pipe in (self._stdout, self._stderr):
            self._loop.remove_reader(pipe.fd)
            pipe.close()
        self._close_worker_fds()

    # -- what the host asks

    def attach(self, up: Up) -> None:
        """Send what comes up to a new host connection, calls without an answer first."""
        if self._up is not None:
            self._up(Busy("a newer connection of the host took this session over"))
        self._up = up
        for message in self.calls.unanswered():
            up(message)
        if self.lost is not None:
            self._tell(pb.AgentMessage(lost=pb.SessionLost(detail=self.lost)))

    def detach(self, up: Up) -> None:
        if self._up == up:
            self._up = None

    def execute(self, request: pb.ExecuteCell) -> Cell:
        """Start a cell, or find the one that this id already names: it is never run twice.

        Raises:
            Invalid: too much code, or an id that was used for other code.
            Busy: another cell runs.
        """
        known = self._cells.get(request.cell_id)
        if known is not None:
            if known.code != request.code:
                raise Invalid(f"cell id {request.cell_id!r} was used for other code")
            return known
        if not request.cell_id or len(request.cell_id) > limits.MAX_ID_CHARS:
            raise Invalid(f"a cell id has 1 to {limits.MAX_ID_CHARS} characters")
        if len(request.code) > limits.MAX_CODE:
            raise Invalid(f"a cell has at most {limits.MAX_CODE:,} characters of code")
        if self._cell is not None:
            raise Busy(f"cell {self._cell.id!r} is running")
        cell = self._cell = Cell(request.cell_id, request.code, self.config.output_bytes)
        self._cells[cell.id] = cell
        while len(self._cells) > limits.MAX_CELLS_REMEMBERED:
            self._cells.popitem(last=False)
        work = self._cell_work = Work(
            Frame(Kind.EXECUTE, {"cell": cell.id}, cell.code.encode("utf-8", "replace")),
            partial(self._end_cell, cell, time.monotonic()),
            self.config.interrupt_grace,
            request.timeout_ms / 1000,
            is_unwanted=cell.id == self._unwanted,
            on_begin=partial(self._begin_cell, cell),
        )
        self._chain.do(work)
        return cell

    async def list_variables(self) -> list[list[str]]:
        """Name, type name and short repr of each; taken from a worker, so each is checked."""
        found = (await self._look(Frame(Kind.LIST)))[0].get("variables")
        rows = [row for row in found if isinstance(row, list)] if isinstance(found, list) else []
        return [[text_of(value, limits.MAX_NAME_CHARS) for value in row[:3]] for row in rows if len(row) == 3]

    async def read_variable(self, name: str, max_bytes: int) -> tuple[str, bytes, int]:
        """Type name, first bytes of the text, and the whole text's size."""
        header, body = await self._look(Frame(Kind.READ, {"name": name, "max_bytes": max_bytes}))
        size = header.get("size")
        return text_of(header.get("type"), limits.MAX_NAME_CHARS), body, size if type(size) is int else 0

    def interrupt_cell(self, cell_id: str) -> None:
        """Interrupt this cell, also when the request has overtaken it; without an id the running one."""
        cell, work = self._cell, self._cell_work
        if cell is not None and work is not None and cell_id in ("", cell.id):
            self._chain.interrupt(work)
        elif cell_id not in self._cells:
            self._unwanted = cell_id

    # -- cells

    def _begin_cell(self, cell: Cell) -> None:
        for pipe in (self._stdout, self._stderr):
            pipe.drain()  # of what earlier cells left, and of forks; no cell to show it in
        self.calls.begin_cell(cell)

    def _end_cell(self, cell: Cell, started: float, ended: Ended) -> None:
        self._cell = self._cell_work = None
        if self.calls.cell is cell:  # it had begun
            self.calls.end_cell()
            if data := self._stdout.drain():
                cell.write_stdout(data)
            if data := self._stderr.drain():
                cell.write_stderr(data)
        if isinstance(ended, SessionGone):
            return  # told by _tell_loss
        if isinstance(ended, Frame):
            result = finished_cell(ended, self._chain.interrupt_reason)
        elif isinstance(ended, Death):
            result = rolled_back_cell(ended)
        else:
            result = pb.CellFinished(status=pb.CELL_STATUS_INTERRUPTED)
        if late := self._chain.take_late_rollback():
            result.notices.append(late)
        result.wall_us = int((time.monotonic() - started) * 1e6)
        cell.finish(result)

    async def _look(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Ask the idle worker; a `__repr__` that hangs or dies is stopped and changes nothing."""
        if not self._chain.is_idle:
            raise Busy("a cell is running")
        ended = await self._perform(frame, limits.LOOK_SECONDS)
        if isinstance(ended, Death):
            raise Invalid(f"looking at the variables killed the worker: {describe_death(ended)}")
        if ended.header.get("error"):
            raise Invalid(str(ended.header["error"]))
        return ended.header, ended.body

    async def _perform(self, frame: Frame, timeout: float, *, fds: Sequence[int] = ()) -> Frame | Death:
        return await self._chain.outcome(frame, self.config.interrupt_grace, timeout, fds)

    # -- plumbing

    def _on_output(self, pipe: Pipe) -> None:
        data = pipe.read()
        cell = self.calls.cell
        if data == b"":
            self._loop.remove_reader(pipe.fd)  # else it would be readable for ever
        if not data or cell is None:
            return
        if pipe is self._stdout:
            cell.write_stdout(data)
        else:
            cell.write_stderr(data)

    def _hear(self) -> None:
        self._chain.hear()
        for pipe in (self._stdout, self._stderr):
            self._loop.add_reader(pipe.fd, self._on_output, pipe)

    async def _begin(self) -> None:
        """Once its processes are known to the supervisor: take calls, and wait for a worker.

        Raises:
            SessionGone: none comes up.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await self._supervision.name(self.id, self._places.socket, sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise SessionGone(f"it has no way to make calls: {error}") from None
            raise
        await self.calls.listen(sock)
        self._close_worker_fds()
        await self._chain.started()

    def _worker_fds(self) -> list[int]:
        return [self._chain.worker_link.fileno(), self._worker_stdout, self._worker_stderr]

    def _close_worker_fds(self) -> None:
        """Our copies, so that the end of the chain is the end of the link."""
        self._chain.worker_link.close()
        for fd in (self._worker_stdout, self._worker_stderr):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._worker_stdout = self._worker_stderr = -1

    def _tell_loss(self, detail: str) -> None:
        self._tell(pb.AgentMessage(lost=pb.SessionLost(detail=detail)))

    def _tell(self, message: Outgoing) -> None:
        if self._up is not None:
            self._up(message)
