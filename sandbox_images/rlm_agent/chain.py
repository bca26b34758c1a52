"""The workers of a session, as its agent sees them: one thing to do after the other, and how each ended.

All of it is done where it is heard of: two turns of the loop in between are a twentieth of a cell that does
nothing.
"""

import asyncio
import contextlib
import signal
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlm_agent import limits
from rlm_agent.errors import SessionGone
from rlm_agent.frames import FIRST, PACKET_BYTES, Frame, FrameError, Kind, PacketBuffer, packets
from rlm_agent.memory import out_of_memory_kills
from rlm_agent.result import Death, late_rollback, text_of
from rlm_agent.rpc.alarm import Alarm
from rlm_agent.sender import NOBODY, Sender, receive_with_sender
from rlm_agent.supervision import Supervision, SupervisorGone
from rlm_agent.watch import Watch

MAX_PID = 1 << 22
"""The kernel's own limit."""
Ended: TypeAlias = Frame | Death | SessionGone | None
"""The worker's result, how it died, or that there is none any more; None for what was interrupted before it
had begun."""


def _nothing() -> None: ...


@dataclass(slots=True, eq=False)
class Work:
    """Something for the worker to do. Times in seconds."""

    frame: Frame
    on_end: Callable[[Ended], None]
    grace: float
    """That it has after SIGINT."""
    timeout: float = 0.0
    """0: none."""
    fds: Sequence[int] = ()
    is_unwanted: bool = False
    """Whether it is to be interrupted once it has begun."""
    on_begin: Callable[[], None] = _nothing

    @property
    def name(self) -> object:
        """Which its result repeats."""
        return self.frame.header.get("cell", "")


class Chain:
    def __init__(self, session_id: str, supervision: Supervision, on_lost: Callable[[str], None]) -> None:
        """`on_lost` is told once, and why, when no worker can work any more."""
        self.lost: str | None = None
        self.interrupt_reason = ""
        """At the end of a work, why it was interrupted; empty when it was not."""
        self._session_id = session_id
        self._supervision = supervision
        self._on_lost = on_lost
        self._queue: deque[Work] = deque()
        self._work: Work | None = None
        """What the worker has been given."""
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        """Packets of it, each with its fds."""
        self._is_full = False
        self._ready = asyncio.Event()
        self._is_second_try = False
        self._is_killed = False
        """Whether SIGKILL is on its way to the worker."""
        self._held: Frame | None = None
        """A result that came all the same: whether it stays is known when a worker is ready again."""
        self._worker_pid = 0
        """As it names itself: the supervisor may know it by another."""
        self._ready_sender = NOBODY
        """Who said last that it is ready, as the kernel knows it."""
        self._rescue_tried = False
        self._watch = Watch(lambda: self._spawn_task(self._resume()), self._overdue)
        self._late_rollback = ""
        self._last_death: object = None
        """Pid of the worker whose end was told last: one may be told twice."""
        self._memory_kills = out_of_memory_kills()
        """By the time a worker was last ready."""
        self._last_cell: object = ""
        self._timeout = Alarm(lambda: self._interrupt("timeout"))
        self._grace = Alarm(self._kill_work)
        self._lateness = Alarm(self._overdue)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._frames = PacketBuffer()
        self._link, self.worker_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setblocking(False)
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    # -- start and end

    def hear(self) -> None:
        self._loop.add_reader(self._link, self._on_link)

    async def started(self) -> None:
        """Raises SessionGone when no worker comes up."""
        try:
            async with asyncio.timeout(limits.READY_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            raise SessionGone("the worker did not start") from None
        if self.lost is not None:
            raise SessionGone(self.lost)

    def lose(self, detail: str) -> None:
        """End every process of the session, and whatever they had to do."""
        if self.lost is not None:
            return
        self.lost = detail
        for alarm in (self._timeout, self._grace, self._lateness):
            alarm.close()
        self._watch.end()
        self._spawn_task(self._end_processes())
        self._loop.remove_reader(self._link)
        self._loop.remove_writer(self._link)
        self._ready.set()
        self._on_lost(detail)
        works = [*([self._work] if self._work else ()), *self._queue]
        self._work = None
        self._queue.clear()
        self._unsent.clear()
        for work in works:
            work.on_end(SessionGone(detail))

    async def close(self) -> None:
        self.lose("the session was closed")
        if self._tasks:
            await asyncio.wait(self._tasks)  # the one that ends the processes
        self._link.close()
        self.worker_link.close()

    # -- what there is to do

    @property
    def is_idle(self) -> bool:
        return self._work is None and not self._queue

    def do(self, work: Work) -> None:
        """Once all is done that was asked for before."""
        if self.lost is not None:
            work.on_end(SessionGone(self.lost))
            return
        self._queue.append(work)
        self._begin_next()

    async def outcome(self, frame: Frame, grace: float, timeout: float, fds: Sequence[int]) -> Frame | Death:
        """Do it, and wait for its end; cancelled, it is not begun any more.

        Raises:
            SessionGone: the whole chain has died.
        """
        ended: asyncio.Future[Ended] = self._loop.create_future()

        def end(outcome: Ended) -> None:
            if not ended.done():
                ended.set_result(outcome)

        work = Work(frame, end, grace, timeout, fds)
        self.do(work)
        try:
            outcome = await ended
        finally:
            self._withdraw(work)
        if isinstance(outcome, SessionGone):
            raise outcome
        assert outcome is not None  # nobody interrupts it before it has begun
        return outcome

    def _withdraw(self, work: Work) -> None:
        """If the worker has been given nothing of it: its files are about to be closed."""
        if work in self._queue:
            self._queue.remove(work)
        elif work is self._work and self._drop_untouched():
            self._work = None
            self._stop_timers()
            self._ready.set()
            self._begin_next()

    def _drop_untouched(self) -> bool:
        """Forget what has been given to no worker, not even its first packet: nobody may get its fds later,
        which can be other files by then."""
        is_untouched = bool(self._unsent) and self._unsent[0][0].startswith(FIRST)
        if is_untouched:
            self._unsent.clear()
        return is_untouched

    def interrupt(self, work: Work) -> None:
        """SIGINT now and SIGKILL after the grace period; what has not begun just ends."""
        if work is self._work:
            self._interrupt("interrupt")
        elif work in self._queue:
            self._queue.remove(work)
            work.on_end(None)

    def take_late_rollback(self) -> str:
        """What is to be told of cells that had ended and are undone, once."""
        told, self._late_rollback = self._late_rollback, ""
        return told

    def _begin_next(self) -> None:
        if self._work is not None or self._unsent or not self._queue or not self._ready.is_set():
            return
        work = self._queue.popleft()
        first, *rest = packets(work.frame.encode())
        work.on_begin()
        self._work = work
        self._ready.clear()
        self.interrupt_reason, self._is_killed, self._held = "", False, None
        self._is_second_try = False
        if work.timeout:
            self._timeout.set(work.timeout)
        self._unsent.extend([(first, work.fds), *((packet, ()) for packet in rest)])
        self._send()
        if work.is_unwanted:
            self._interrupt("interrupt")

    def _send(self) -> None:
        """As much as the link takes now, the rest when it takes more."""
        try:
            while self._unsent:
                packet, fds = self._unsent[0]
                if fds:
                    socket.send_fds(self._link, [packet], fds)
                else:
                    self._link.send(packet)
                self._unsent.popleft()
        except BlockingIOError:
            self._is_full = True
            self._loop.add_writer(self._link, self._send)
            return
        except (BrokenPipeError, ConnectionResetError):  # the reading side tells
            self._unsent.clear()
        except OSError as error:
            self.lose(f"the worker can't be given anything: {error}")
        if self._is_full:
            self._is_full = False
            self._loop.remove_writer(self._link)
            self._begin_next()

    def _end_work(self, outcome: Frame | Death) -> None:
        work, self._work = self._work, None
        self._drop_untouched()  # of a worker that says that it has died of it all the same
        self._stop_timers()
        if not self._ready.is_set():
            self._lateness.set(limits.READY_SECONDS)
        if work is not None:
            work.on_end(outcome)
        self._begin_next()

    # -- signals

    def _interrupt(self, reason: str) -> None:
        if self._work is None or self.interrupt_reason:
            return
        self.interrupt_reason = reason
        self._signal(signal.SIGINT)
        self._grace.set(self._work.grace)

    def _interrupt_again(self) -> None:
        """The signal may have gone to the process before this one."""
        reason, self.interrupt_reason = self.interrupt_reason, ""
        if reason:
            self._is_killed, self._is_second_try = False, True
            self._interrupt(reason)

    def _kill_work(self) -> None:
        if self._work is not None:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._is_killed = True
            self._lateness.set(limits.READY_SECONDS)
        self._spawn_task(self._deliver_signal(self._worker_pid, number))

    async def _deliver_signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.signal(self._session_id, pid, number)
        if number == signal.SIGKILL:
            await self._resume()  # where nothing tells of a death, as on gVisor

    async def _resume(self) -> None:
        """Whoever is to take the place of a worker that died may have been stopped."""
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.resume(self._session_id)

    async def _end_processes(self) -> None:
        with contextlib.suppress(OSError, SupervisorGone):
            await self._supervision.end(self._session_id)

    def _overdue(self) -> None:
        """No worker is ready: kill once what hangs, for the checkpoint behind it; then it is over."""
        if self._ready.is_set():
            return
        if self._rescue_tried:
            self.lose("the worker died and its checkpoint did not come back")
            return
        self._rescue_tried = True
        self._signal(signal.SIGKILL)

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
        except Exception as error:  # noqa: BLE001 - whatever it sent, it hurts its own session only
            self.lose(f"{type(error).__name__}: {error}")

    def _on_frame(self, frame: Frame, sender: Sender) -> None:
        work = self._work
        if frame.kind is Kind.READY:
            self._on_ready(frame, sender)
        elif frame.kind in (Kind.RESULT, Kind.FORKED):
            if work is None or sender != self._ready_sender or frame.header.get("cell", "") != work.name:
                return  # a process of the cell's made it up
            if self._is_killed:
                self._held = frame
            else:
                self._last_cell = work.name or self._last_cell
                self._end_work(frame)
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
        work = self._work
        outcome: Frame | Death | None = None
        death: Death | None = None
        # Counted while the host thinks. Once a cell is given, its worker would wait for that (45 µs): the
        # kernel has it run where we do, after us.
        memory_kills, self._memory_kills = self._memory_kills, out_of_memory_kills()
        if died is not None:
            no_memory = self._memory_kills > memory_kills
            death = Death.from_header(died, self.interrupt_reason, no_memory=no_memory)
        is_undone = work is not None and died is not None and died.get("begun") is True
        if death is not None and is_undone:
            outcome = death
        elif work is not None and self._held is not None:
            self._last_cell = work.name or self._last_cell
            outcome = self._held
        if death is not None and frame.header.get("cell") != self._last_cell:
            self._last_cell = text_of(frame.header.get("cell"), limits.MAX_ID_CHARS)
            self._late_rollback = late_rollback(death, is_undone=is_undone)
        if work is not None and outcome is None and self._is_second_try:
            outcome = death  # nobody has the cell any more: who had it gave no result
        if work is not None and outcome is None:
            self._interrupt_again()  # the cell goes on in a fresh fork
            return
        self._stop_timers()
        self._rescue_tried = False
        self._ready.set()
        if outcome is not None:
            self._end_work(outcome)
        else:
            self._begin_next()

    # -- plumbing

    def _stop_timers(self) -> None:
        for alarm in (self._timeout, self._grace, self._lateness):
            alarm.stop()

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
