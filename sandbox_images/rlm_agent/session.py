"""One session: a worker chain, its cells one after the other, and what its host is told."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rlm_agent import limits
from rlm_agent.calls import Calls
from rlm_agent.cell import Cell
from rlm_agent.errors import Busy, Invalid, SessionGone
from rlm_agent.folders import Places
from rlm_agent.frames import PACKET_BYTES, Frame, FrameError, Kind, PacketBuffer, packets
from rlm_agent.inputs import Inputs
from rlm_agent.memory import out_of_memory_kills
from rlm_agent.output import Pipe, make_pipe
from rlm_agent.result import (
    Death,
    describe_death,
    finished_cell,
    late_rollback,
    rolled_back_cell,
    text_of,
)
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.sender import NOBODY, Sender, receive_with_sender
from rlm_agent.supervision import ProcessLimits, Supervision, SupervisorGone
from rlm_agent.watch import Watch
from rlm_agent.worker.query import SOCKET_VARIABLE

MAX_PID = 1 << 22
"""The kernel's own limit."""
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
        self.lost: str | None = None
        self._closed = False
        self._places = places
        self.config = config
        self._supervision = supervision
        self._up: Up | None = None
        self._cells: OrderedDict[str, Cell] = OrderedDict()
        self._inherited_contexts = 0
        self.inputs = Inputs(self._perform)
        self._turn = asyncio.Lock()
        self._ready = asyncio.Event()
        self._running: asyncio.Future[Frame | Death] | None = None
        self._interrupt_reason = ""
        self._is_second_try = False
        self._is_killed = False
        """Whether SIGKILL is on its way to the worker."""
        self._held: Frame | None = None
        """A result that came all the same: whether it stays is known when a worker is ready again."""
        self._unwanted = ""
        """Id of a cell that is to be interrupted, although it may not have begun yet."""
        self._worker_pid = 0
        """As it names itself: the supervisor may know it by another."""
        self._ready_sender = NOBODY
        """Who said last that it is ready, as the kernel knows it."""
        self._given_cell = ""
        """Name of what the worker was given to do, which its result repeats."""
        self._rescue_tried = False
        self._watch = Watch(lambda: self._spawn_task(self._resume()), self._overdue)
        self._late_rollback = ""
        self._last_death: object = None
        """Pid of the worker whose end was told last: one may be told twice."""
        self._memory_kills = 0
        self._last_cell = ""
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._frames = PacketBuffer()
        self._link, self._worker_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setblocking(False)
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._stdout, self._worker_stdout = make_pipe()
        self._stderr, self._worker_stderr = make_pipe()

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
        self._lose("the session was closed")
        if self._tasks:
            await asyncio.wait(self._tasks)  # that of a running cell, and the one that ends its processes
        await self.calls.close()
        for pipe in (self._stdout, self._stderr):
            self._loop.remove_reader(pipe.fd)
            pipe.close()
        self._link.close()
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
        if self.calls.cell is not None:
            raise Busy(f"cell {self.calls.cell.id!r} is running")
        cell = Cell(request.cell_id, request.code, self.config.output_bytes)
        self._cells[cell.id] = cell
        while len(self._cells) > limits.MAX_CELLS_REMEMBERED:
            self._cells.popitem(last=False)
        self.calls.begin_cell(cell)
        self._spawn_task(self._run_cell(cell, request.timeout_ms / 1000))
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
        cell = self.calls.cell
        if cell is not None and cell_id in ("", cell.id):
            self._unwanted = cell.id
            self.interrupt("interrupt")
        elif cell_id not in self._cells:
            self._unwanted = cell_id

    def interrupt(self, reason: str) -> None:
        """SIGINT now, SIGKILL after the grace period; nothing when nothing runs."""
        if self._running is None or self._running.done() or self._interrupt_reason:
            return
        self._interrupt_reason = reason
        self._signal(signal.SIGINT)
        self._timers.append(self._loop.call_later(self.config.interrupt_grace, self._kill_cell))

    def _interrupt_again(self) -> None:
        """The signal may have gone to the process before this one."""
        reason, self._interrupt_reason = self._interrupt_reason, ""
        if reason:
            self._is_killed, self._is_second_try = False, True
            self.interrupt(reason)

    def _kill_cell(self) -> None:
        if self._running is not None and not self._running.done():
            self._signal(signal.SIGKILL)

    # -- cells

    async def _run_cell(self, cell: Cell, timeout: float) -> None:
        started = time.monotonic()
        try:
            ended = await self._perform(
                Frame(Kind.EXECUTE, {"cell": cell.id}, cell.code.encode("utf-8", "replace")),
                timeout,
                cell=cell,
            )
        except SessionGone:
            return  # told by _lose
        except Exception as error:
            self._lose(f"the cell could not be run: {type(error).__name__}: {error}")
            raise
        if isinstance(ended, Death):
            result = rolled_back_cell(ended)
        else:
            result = finished_cell(ended, self._interrupt_reason)
        if self._late_rollback:
            result.notices.append(self._late_rollback)
            self._late_rollback = ""
        result.wall_us = int((time.monotonic() - started) * 1e6)
        cell.finish(result)

    async def _look(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Ask the idle worker; a `__repr__` that hangs or dies is stopped and changes nothing."""
        if self._turn.locked():
            raise Busy("a cell is running")
        ended = await self._perform(frame, limits.LOOK_SECONDS)
        if isinstance(ended, Death):
            raise Invalid(f"looking at the variables killed the worker: {describe_death(ended)}")
        if ended.header.get("error"):
            raise Invalid(str(ended.header["error"]))
        return ended.header, ended.body

    async def _perform(
        self, frame: Frame, timeout: float, *, cell: Cell | None = None, fds: list[int] | None = None
    ) -> Frame | Death:
        """Give the worker a frame and wait for its result, or for its death.

        Raises:
            SessionGone: the whole chain has died.
        """
        async with self._turn:
            await self._wait_ready()
            for pipe in (self._stdout, self._stderr):
                pipe.drain()  # of processes that an earlier cell left; no cell to show it in
            self._ready.clear()
            self._interrupt_reason, self._is_killed, self._held = "", False, None
            self._is_second_try = False
            self._running = self._loop.create_future()
            self._given_cell = frame.header.get("cell", "")
            if timeout:
                self._timers.append(self._loop.call_later(timeout, self.interrupt, "timeout"))
            try:
                await self._send(frame, fds)
                self._memory_kills = out_of_memory_kills()  # while the worker begins: nobody waits for it
                if cell is not None and cell.id == self._unwanted:
                    self.interrupt("interrupt")
                ended = await self._running
            finally:
                self._stop_timers()
                self._running = None
                if cell is not None:
                    self.calls.end_cell()
                    self._collect_output(cell)
            if not self._ready.is_set():
                self._timers.append(self._loop.call_later(limits.READY_SECONDS, self._overdue))
            return ended

    async def _send(self, frame: Frame, fds: list[int] | None) -> None:
        first, *rest = packets(frame.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reading side tells
            if fds:
                socket.send_fds(self._link, [first], fds)
            else:
                await self._loop.sock_sendall(self._link, first)
            for packet in rest:
                await self._loop.sock_sendall(self._link, packet)

    def _collect_output(self, cell: Cell) -> None:
        cell.write_stdout(self._stdout.drain())
        cell.write_stderr(self._stderr.drain())

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._is_killed = True
            self._timers.append(self._loop.call_later(limits.READY_SECONDS, self._overdue))
        self._spawn_task(self._deliver_signal(self._worker_pid, number))

    async def _deliver_signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.signal(self.id, pid, number)

    # -- what the worker says

    def _on_link(self) -> None:
        try:
            packet, sender = receive_with_sender(self._link, PACKET_BYTES + 1)
            if not packet:
                raise FrameError("every process of the session has ended")
            if frame := self._frames.feed(packet):
                self._on_frame(frame, sender)
        except BlockingIOError:
            return
        except Exception as error:  # whatever it sent, it hurts its own session only
            self._lose(f"{type(error).__name__}: {error}")

    def _on_frame(self, frame: Frame, sender: Sender) -> None:
        running = self._running
        if frame.kind is Kind.READY:
            self._on_ready(frame, sender)
        elif frame.kind in (Kind.RESULT, Kind.FORKED):
            own = sender == self._ready_sender and frame.header.get("cell", "") == self._given_cell
            if not own:
                return  # a process of the cell's made it up
            if self._is_killed:
                self._held = frame
            elif running is not None and not running.done():
                self._finish(running, frame)
        else:
            raise FrameError(f"unexpected {frame.kind.name} from the worker")

    def _on_ready(self, frame: Frame, sender: Sender) -> None:
        pid, died = frame.header.get("pid"), frame.header.get("died")
        if type(pid) is not int or not 1 < pid < MAX_PID or not (died is None or isinstance(died, dict)):
            raise FrameError("malformed READY from the worker")
        self._worker_pid, self._ready_sender = pid, sender
        self._watch.begin(sender.pid)
        if died is not None and died.get("pid") == self._last_death:
            died = None
        self._last_death = died.get("pid") if died is not None else self._last_death
        running = self._running if self._running is not None and not self._running.done() else None
        death = self._death(died) if died is not None else None
        is_undone = running is not None and died is not None and died.get("begun") is True
        if running is not None and death is not None and is_undone:
            running.set_result(death)
        elif running is not None and self._held is not None:
            self._finish(running, self._held)
        if death is not None and frame.header.get("cell") != self._last_cell:
            self._last_cell = text_of(frame.header.get("cell"), limits.MAX_ID_CHARS)
            self._late_rollback = late_rollback(death, is_undone=is_undone)
        if running is not None and not running.done() and death is not None and self._is_second_try:
            running.set_result(death)  # nobody has the cell any more: who had it gave no result
        elif running is not None and not running.done():
            self._interrupt_again()  # the cell goes on in a fresh fork
            return
        self._stop_timers()
        self._rescue_tried = False
        self._ready.set()

    def _death(self, died: dict[str, Any]) -> Death:
        no_memory = out_of_memory_kills() > self._memory_kills
        return Death.from_header(died, self._interrupt_reason, no_memory=no_memory)

    def _finish(self, running: "asyncio.Future[Frame | Death]", result: Frame) -> None:
        self._last_cell = self._given_cell or self._last_cell
        running.set_result(result)

    async def _resume(self) -> None:
        """Whoever is to take the place of a worker that died may have been stopped."""
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.resume(self.id)

    def _overdue(self) -> None:
        """No worker is ready: kill once what hangs, for the checkpoint behind it; then it is over."""
        if self._ready.is_set():
            return
        if self._rescue_tried:
            self._lose("the worker died and its checkpoint did not come back")
            return
        self._rescue_tried = True
        self._signal(signal.SIGKILL)

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

    # -- plumbing

    def _hear(self) -> None:
        self._loop.add_reader(self._link, self._on_link)
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
        try:
            async with asyncio.timeout(limits.READY_SECONDS):
                await self._wait_ready()
        except TimeoutError:
            raise SessionGone("the worker did not start") from None

    def _worker_fds(self) -> list[int]:
        return [self._worker_link.fileno(), self._worker_stdout, self._worker_stderr]

    def _close_worker_fds(self) -> None:
        """Our copies, so that the end of the chain is the end of the link."""
        self._worker_link.close()
        for fd in (self._worker_stdout, self._worker_stderr):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._worker_stdout = self._worker_stderr = -1

    async def _wait_ready(self) -> None:
        if self.lost is None:
            await self._ready.wait()
        if self.lost is not None:
            raise SessionGone(self.lost)

    def _lose(self, detail: str) -> None:
        if self.lost is not None:
            return
        self.lost = detail
        self._stop_timers()
        self._watch.end()
        self._spawn_task(self._end_processes())
        self._loop.remove_reader(self._link)
        self._ready.set()
        if self._running is not None and not self._running.done():
            self._running.set_exception(SessionGone(detail))
        self._tell(pb.AgentMessage(lost=pb.SessionLost(detail=detail)))

    async def _end_processes(self) -> None:
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.end(self.id)

    def _tell(self, message: Outgoing) -> None:
        if self._up is not None:
            self._up(message)

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
