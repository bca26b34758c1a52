"""A cell is a transaction: the chain of forks that every session is.

At any moment a session has two processes. The **standby** waits for a cell and runs it. Its parent,
the **checkpoint**, does nothing but wait for it: when the standby dies, the checkpoint, whose memory
is as it was before the cell, forks another. When a cell ends, the standby becomes the checkpoint of
the next one and forks the next standby soon (while the host waits for its LM), which ends the old
checkpoint when it has shown that it can work. Nothing is pickled, so any object survives.

A cell that leaves Python threads running can't be forked: its process goes on without a checkpoint
of its own and the last checkpoint stays, so that a crash costs the cells since then and no more.
"""

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rlm_agent.frames import Frame, FrameError, Kind
from rlm_agent.worker import bound, context, process, root, variables
from rlm_agent.worker.kept import Kept
from rlm_agent.worker.link import EXIT_BROKEN, EXIT_CLOSED, EXIT_LINK, LinkClosed, PacketLink, leave
from rlm_agent.worker.query import SOCKET_VARIABLE, Queries
from rlm_agent.worker.repl import Outcome, Repl

OOM_VICTIM, OOM_SURVIVOR = 1000, 0
CHECKPOINT_SECONDS = 5.0
"""That a process has to become a checkpoint, at least: what a cell registered for a fork runs first."""
MAX_STRIKES = 5
MAX_PAUSE_SECONDS = 1.0
READY, AT_WORK = 1, 2
"""How far a standby has come: it can work; it was given something to do."""
RESULT_SECONDS = 0.001
"""That a result has the processors for itself on its way to the host: a fork takes them from those who carry
it (measured on two of them, in a container: 0.2 ms of a cell; with twice the time, the next checkpoint is
often late for a cell that comes 5 ms after this one)."""
Served = tuple[Frame, list[int]]
"""A frame, and the fds that came with it."""
SAVED_FD = 200
"""Copies of fd 1 and 2 are kept from here up, out of the way of a cell's own files."""


@dataclass(slots=True)
class Failures:
    """Standbys of one checkpoint that came to nothing, one after the other."""

    strikes: int = 0
    """Those that could not even work."""
    pause: float = 0.0
    """Seconds until the next one is made; else they would be made and die without end."""

    def count(self, progress: int) -> None:
        """One more, which had come so far."""
        self.strikes = 0 if progress else self.strikes + 1
        self.pause = 0.0 if progress == AT_WORK else bound.least(2 * self.pause + 0.01, MAX_PAUSE_SECONDS)


class Worker:
    """The state of a session; each process of the chain has its own copy of it."""

    def __init__(self, link: PacketLink) -> None:
        self._link = link
        self._queries = Queries(os.environ[SOCKET_VARIABLE], self._fork_session)
        self._repl = Repl(self._queries)
        self._last_cell = ""
        self._saved = [_high_copy(fd) for fd in (1, 2)]
        self._captures = [_inode(fd) for fd in self._saved]
        self._doomed = 0
        self._has_fallback = False
        """Whether the process before the checkpoint has become one: it takes over where that does not."""
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._progress = bound.shared_memory(-1, 2)
        """Shared with the parent: how far this standby has come, and whether the parent is its checkpoint."""
        self._checkpoint = 0
        """Pid of the process that this one was forked from."""

    def serve(self) -> NoReturn:
        """Be the checkpoint, again and again; never returns."""
        predecessor = 0
        died: dict[str, Any] | None = None
        pending: Served | None = None
        failures = Failures()
        while True:
            on_child = _become_quiet()
            if self._last_cell and pending is None and died is None:
                self._link.wait(RESULT_SECONDS)
            kept = Kept.now()
            bound.freeze()
            # A cell may have ended the old checkpoint, and its pid may be another process by now.
            doomed = predecessor if predecessor == bound.getppid() else 0
            me = bound.getpid()
            try:
                progress = bound.shared_memory(-1, 2)
                progress[0] = 0  # the page is there from now on
                standby = bound.fork()
            except OSError as error:
                _become_loud(on_child)
                pending = self._work(pending, died, f"fork failed: {error.strerror}")
                died = None
                continue
            if standby == 0:
                predecessor = self._checkpoint = me
                self._has_fallback = self._progress[1] == 1
                self._progress, failures = progress, Failures()
                kept.restore_random()
                self._doomed = doomed
                os.setpgid(0, 0)
                _become_loud(on_child)
                pending = self._work(pending, died, "")
                died = None
                process.prefer_as_oom_victim(OOM_SURVIVOR)
                continue
            progress[1] = 1
            untold, died = died, {**_wait(standby, on_child), "pid": standby}
            died["begun"] = pending is not None or progress[0] == AT_WORK
            if untold is not None and progress[0] == 0:
                died = untold  # of a cell, it may be: the host still waits for that
            # Whatever was begun was received. (Told twice, it is the host's agent that knows.)
            died["begun"] = died["begun"] and (pending is not None or not self._link.has_frame())
            _close_all(pending)
            pending = None
            if self._link.ended():
                leave(EXIT_CLOSED)
            failures.count(progress[0])
            if failures.strikes == MAX_STRIKES:
                leave(EXIT_BROKEN)
            bound.sleep(failures.pause)
            kept.restore_offsets()

    def _work(self, pending: Served | None, died: dict[str, Any] | None, no_checkpoint: str) -> Served | None:
        """Serve frames until this process should become the checkpoint.

        Returns a frame that is still to be served by the next standby, or None.
        """
        while True:
            if pending is None and not no_checkpoint:
                self._rehearse()
            self._repl.look_at_growth()
            self._end_old_checkpoint()
            self._send(Frame(Kind.READY, {"pid": bound.getpid(), "cell": self._last_cell, "died": died}))
            self._progress[0] = READY
            died = None
            if pending is None:
                pending = self._receive()
                alone = no_checkpoint or bound.getppid() != self._checkpoint
                if alone and _fork_blocker() == "":
                    return pending
            self._progress[0] = AT_WORK
            self._restore_streams()
            frame, fds = pending
            changed = self._serve_one(frame, fds, no_checkpoint)
            _close_all(pending)
            pending = None
            if changed:
                no_checkpoint = _fork_blocker()
                if not no_checkpoint:
                    return None

    def _serve_one(self, frame: Frame, fds: list[int], no_checkpoint: str) -> bool:
        """Whether the frame may have changed the session."""
        me = bound.getpid()
        header = frame.header
        if frame.kind is Kind.FORK:
            self._send(self._fork_session(frame, fds))
            return False
        if frame.kind is Kind.EXECUTE:
            action: Callable[[], Any] = lambda: self._repl.execute(frame.body.decode())  # noqa: E731
        elif frame.kind is Kind.CONTEXT:
            action = lambda: self._put_context(fds[0], header["kind"], header["index"])  # noqa: E731
        elif frame.kind is Kind.BIND:
            action = lambda: self._bind_names(frame.body)  # noqa: E731
        elif frame.kind is Kind.FILE:
            action = lambda: context.write_file(fds[0], header["path"])  # noqa: E731
        else:
            self._tell_variables(frame)
            return False
        outcome = self._repl.run(action)
        if bound.getpid() != me:
            leave(0)  # a child that the cell forked came back into our frames: only its maker reports
        self._last_cell = str(header["cell"])
        self._send(self._result(outcome, no_checkpoint))
        return True

    def _result(self, outcome: Outcome, no_checkpoint: str) -> Frame:
        header = {
            "cell": self._last_cell,
            "status": outcome.status,
            "error": outcome.error,
            "ready": outcome.answer_ready,
            "notices": [*outcome.notices, *_warning(no_checkpoint)],
            "variables": outcome.variables,
            "no_checkpoint": no_checkpoint,
        }
        return Frame(Kind.RESULT, header, outcome.answer.encode("utf-8", "surrogatepass"))

    def _end_old_checkpoint(self) -> None:
        """Once this process has shown that it can work, its parent is checkpoint enough.

        Done here and not by the parent, which a fast next cell could overtake. Where that has died, the old
        one forks another of us: there must not be two.
        """
        doomed, self._doomed = self._doomed, 0
        if not doomed:
            return
        if self._has_fallback:
            self._await_checkpoint()
        if bound.getppid() != self._checkpoint:
            leave(EXIT_CLOSED)
        _send_signal(doomed, signal.SIGKILL)

    def _await_checkpoint(self) -> None:
        """One that does not come to it is ended: the old one takes over."""
        left = CHECKPOINT_SECONDS
        while not self._progress[1] and bound.getppid() == self._checkpoint:
            if left <= 0:
                _send_signal(self._checkpoint, signal.SIGKILL)
                leave(EXIT_CLOSED)
            _send_signal(self._checkpoint, signal.SIGCONT)  # a hook may have stopped it
            bound.sleep(0.001)
            left -= 0.001

    def _rehearse(self) -> None:
        """Copy the pages that the next cell will write to, while the host waits for its LM.

        Where it goes wrong, no cell can run here any more, and the checkpoint before takes over.
        """
        process.prefer_as_oom_victim(OOM_VICTIM)
        self._restore_streams()
        outcome = self._repl.rehearse()
        full = outcome.error is not None and outcome.error["type"] == "MemoryError"
        # About a full memory, the next cell can do something.
        if (outcome.status == "error" and not full) or not self._carries_frames():
            leave(EXIT_BROKEN)

    def _carries_frames(self) -> bool:
        try:
            near, far = PacketLink.pair()
        except OSError:  # no file is free: the next cell can do something
            return True
        frame = self._result(Outcome("ok"), "")
        near.send(frame)
        near.close()  # so that nothing waits for more than was sent
        received = far.receive()
        far.close()
        return received == (frame, [])

    def _put_context(self, fd: int, kind: str, index: int) -> None:
        self._repl.names.add_context(index, context.load(fd, kind))

    def _bind_names(self, body: bytes) -> None:
        self._repl.names.bind_all(bound.loads(body.decode("utf-8", "surrogatepass")))

    def _tell_variables(self, frame: Frame) -> None:
        answer: dict[str, Any] = {"error": None}
        body = b""

        def look() -> None:
            nonlocal body
            if frame.kind is Kind.LIST:
                found = variables.visible(self._repl.namespace, self._repl.names.reserved)
                answer["variables"] = [
                    [name, variables.type_name(value), variables.short_repr(value)]
                    for name, value in found.items()
                ]
            else:
                value = self._repl.namespace[frame.header["name"]]
                body = variables.full_text(value)
                answer["type"], answer["size"] = variables.type_name(value), len(body)
                body = body[: int(frame.header["max_bytes"])]

        outcome = self._repl.run(look)
        if outcome.error is not None:
            answer["error"] = f"{outcome.error['type']}: {outcome.error['message'][:500]}"
        self._send(Frame(Kind.RESULT, answer, body))

    def _fork_session(self, frame: Frame, fds: list[int]) -> Frame:
        """Start a second session with a copy of this memory; only the caller's process returns.

        In the middle of a call the child starts a worker loop of its own and never returns to the cell.
        """
        blocker = _fork_blocker()
        if blocker:
            return Frame(Kind.FORKED, {"error": f"this session can't be forked now: {blocker}"})
        kept = Kept.now()
        bound.freeze()
        try:
            child = bound.fork()
        except OSError as error:
            return Frame(Kind.FORKED, {"error": f"fork failed: {error.strerror}"})
        if child:
            return Frame(Kind.FORKED, {"pid": child, "error": None})
        try:
            kept.restore_random()
            self._become_session(frame, fds)
        finally:
            leave(EXIT_BROKEN)

    def _become_session(self, frame: Frame, fds: list[int]) -> NoReturn:
        header = frame.header
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        old = self._link.fileno()
        self._link = root.enter(fds, str(header["cwd"]))
        os.close(old)
        self._queries.move(str(header["socket"]))
        self._progress = bound.shared_memory(-1, 2)  # the other one is the parent's
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(fd, saved, inheritable=False)
        self._captures = [_inode(fd) for fd in self._saved]
        os.environ[SOCKET_VARIABLE] = str(header["socket"])
        if header.get("child"):
            self._repl.names.begin_child(frame.body.decode("utf-8", "surrogatepass"))
        self._last_cell = ""
        root.run(self._link, self.serve)

    def _restore_streams(self) -> None:
        """A cell may have closed or redirected fd 1 and 2; what it starts with is always the capture."""
        try:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != min(self._files, hard):
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(self._files, hard), hard))
        except (OSError, ValueError):  # it is as the cell has left it
            pass
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, fd)
            bound.set_blocking(fd, True)

    def _receive(self) -> Served:
        try:
            self._link.await_frame()
            self._progress[0] = AT_WORK
            return self._link.receive()
        except (LinkClosed, OSError):
            leave(EXIT_CLOSED)
        except FrameError:
            leave(EXIT_LINK)

    def _send(self, frame: Frame) -> None:
        if not self._link.intact() or [_inode(fd) for fd in self._saved] != self._captures:
            leave(EXIT_LINK)
        try:
            bound.set_blocking(self._link.fileno(), True)
            self._link.send(frame)
        except OSError:
            leave(EXIT_CLOSED)


def _become_quiet() -> Any:
    """A checkpoint only waits: no timer or signal that a cell left behind may end it, and none may keep the
    end of its child from it. Gives the handler of ended children, which a worker gets back."""
    bound.mask_signals(signal.SIG_BLOCK, bound.ALL_SIGNALS)
    for timer in bound.TIMERS:
        bound.set_timer(timer, 0)
    process.outlive_parent()
    bound.cancel_watchdog()
    on_child = bound.handler_of(signal.SIGCHLD)
    bound.handle(signal.SIGCHLD, bound.DEFAULT)
    return on_child


def _become_loud(on_child: Any) -> None:
    _react_to_children(on_child)
    bound.mask_signals(signal.SIG_SETMASK, ())


def _react_to_children(handler: Any) -> None:
    if handler is not None:  # else C code has set it
        bound.handle(signal.SIGCHLD, handler)


def _fork_blocker() -> str:
    """Why this process can't be forked now; empty when it can."""
    threads = bound.length(bound.frames_of_threads()) - 1
    return f"{threads} Python thread(s) of an earlier cell still run" if threads else ""


def _warning(no_checkpoint: str) -> list[str]:
    """For a cell that is the first to cost the next ones their checkpoint."""
    if no_checkpoint or not (blocker := _fork_blocker()):
        return []
    return [
        f"{blocker.replace('an earlier', 'this')}. Until they have ended there is no checkpoint: "
        "a block whose process dies then costs what this one and all since have assigned."
    ]


def _close_all(served: Served | None) -> None:
    for fd in served[1] if served else ():
        try:  # noqa: SIM105 - with nothing of a module that a cell may have changed
            bound.close_file(fd)
        except OSError:  # the cell has closed it
            pass


def _wait(pid: int, on_child: Any) -> dict[str, Any]:
    """How a standby died; then the session's own handler of ended children is back."""
    status = bound.waitpid(pid, 0)[1]
    _react_to_children(on_child)
    if bound.was_signalled(status):
        return {"signal": bound.signal_of(status)}
    code = bound.code_of(status)
    return {"exit": code, "link": code == EXIT_LINK, "broken": code == EXIT_BROKEN}


def _send_signal(pid: int, number: int) -> None:
    try:  # noqa: SIM105 - with nothing of a module that a cell may have changed
        bound.kill(pid, number)
    except ProcessLookupError:  # one before this one has ended it, and died
        pass


def _high_copy(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SAVED_FD)


def _inode(fd: int) -> int:
    """Of what is open under this number: another one, or 0, once a cell has closed or replaced it."""
    try:
        return bound.fstat(fd).st_ino
    except OSError:
        return 0


def start(link: PacketLink) -> NoReturn:
    """The worker of a new, empty session."""
    Worker(link).serve()
