"""A cell is a transaction: the chain of forks that every session is.

At any moment a session has two processes. The **standby** waits for a cell and runs it. Its parent,
the **checkpoint**, does nothing but wait for it: when the standby dies, the checkpoint, whose memory
is as it was before the cell, forks another. When a cell ends, the standby becomes the checkpoint of
the next one, forks the next standby at once (while the host waits for its LM), and ends the old
checkpoint. Nothing is pickled, so any object survives.

A cell that leaves Python threads running can't be forked: its process goes on without a checkpoint
of its own and the last checkpoint stays, so that a crash costs the cells since then and no more.
"""

import fcntl
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rlm_agent.frames import PREFIX, Frame, FrameError, Kind, parse_prefix
from rlm_agent.worker import context, process, root, variables
from rlm_agent.worker.kept import Kept
from rlm_agent.worker.link import EXIT_CLOSED, EXIT_LINK, LinkClosed, PacketLink, leave
from rlm_agent.worker.query import SOCKET_VARIABLE, Queries
from rlm_agent.worker.repl import Repl

OOM_VICTIM, OOM_SURVIVOR = 1000, 0
SAVED_FD = 200
"""Copies of fd 1 and 2 are kept from here up, out of the way of a cell's own files."""


class Worker:
    """The state of a session; each process of the chain has its own copy of it."""

    def __init__(self, link: PacketLink) -> None:
        self._link = link
        self._queries = Queries(self._fork_session)
        self._repl = Repl(self._queries)
        self._last_cell = ""
        self._saved = [_high_copy(fd) for fd in (1, 2)]

    def serve(self) -> NoReturn:
        """Be the checkpoint, again and again; never returns."""
        predecessor = 0
        died: dict[str, Any] | None = None
        pending: Frame | None = None
        while True:
            kept = Kept.now()
            gc.freeze()
            # A cell may have ended the old checkpoint, and its pid may be another process by now.
            doomed = predecessor if predecessor == os.getppid() else 0
            try:
                standby = os.fork()
            except OSError as error:
                pending = self._work(pending, died, f"fork failed: {error.strerror}")
                died = None
                continue
            if standby == 0:
                predecessor = os.getppid()
                kept.restore_random()
                self._begin_standby(doomed)
                pending = self._work(pending, died, "")
                died = None
                process.prefer_as_oom_victim(OOM_SURVIVOR)
                continue
            predecessor = 0
            pending = None
            died = _wait(standby)
            kept.restore_offsets()

    def _begin_standby(self, old_checkpoint: int) -> None:
        # By the new standby and not by its parent, which a fast next cell could overtake.
        if old_checkpoint:
            os.kill(old_checkpoint, signal.SIGKILL)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _work(self, frame: Frame | None, died: dict[str, Any] | None, no_checkpoint: str) -> Frame | None:
        """Serve frames until this process should become the checkpoint.

        Returns a frame that is still to be served by the next standby, or None.
        """
        while True:
            self._send(Kind.READY, {"pid": os.getpid(), "cell": self._last_cell, "died": died})
            died = None
            fds: list[int] = []
            if frame is None:
                if not no_checkpoint:
                    self._rehearse()
                frame, fds = self._receive()
                if no_checkpoint and _fork_blocker() == "":
                    return frame
            self._restore_streams()
            changed = self._serve_one(frame, fds, no_checkpoint)
            frame = None
            if changed:
                no_checkpoint = _fork_blocker()
                if not no_checkpoint:
                    return None

    def _serve_one(self, frame: Frame, fds: list[int], no_checkpoint: str) -> bool:
        """Whether the frame may have changed the session."""
        me = os.getpid()
        header = frame.header
        if frame.kind is Kind.FORK:
            self._send(Kind.FORKED, self._fork_session(frame, fds).header)
            for fd in fds:
                os.close(fd)
            return False
        if frame.kind is Kind.EXECUTE:
            action: Callable[[], Any] = lambda: self._repl.execute(frame.body.decode())  # noqa: E731
        elif frame.kind is Kind.CONTEXT:
            action = lambda: self._put_context(header["path"], header["kind"], header["index"])  # noqa: E731
        else:
            self._tell_variables(frame)
            return False
        outcome = self._repl.run(action)
        if os.getpid() != me:
            leave(0)  # a child that the cell forked came back into our frames: only its maker reports
        self._last_cell = str(header["cell"])
        self._send(
            Kind.RESULT,
            {
                "cell": self._last_cell,
                "status": outcome.status,
                "error": outcome.error,
                "ready": outcome.answer_ready,
                "notices": outcome.notices,
                "variables": outcome.variables,
                "no_checkpoint": no_checkpoint,
            },
            outcome.answer.encode("utf-8", "surrogatepass"),
        )
        return True

    def _rehearse(self) -> None:
        """Copy the pages that the next cell will write to, while the host waits for its LM."""
        process.prefer_as_oom_victim(OOM_VICTIM)
        self._restore_streams()
        self._repl.rehearse()
        frame = Frame(Kind.RESULT, {"cell": self._last_cell, "variables": {}, "notices": []})
        parse_prefix(frame.encode()[: PREFIX.size])

    def _put_context(self, path: str, kind: str, index: int) -> None:
        self._repl.names.add_context(index, context.load(path, kind))

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
        self._send(Kind.RESULT, answer, body)

    def _fork_session(self, frame: Frame, fds: list[int]) -> Frame:
        """Start a second session with a copy of this memory; only the caller's process returns.

        In the middle of a call the child starts a worker loop of its own and never returns to the cell.
        """
        blocker = _fork_blocker()
        if blocker:
            return Frame(Kind.FORKED, {"error": f"this session can't be forked now: {blocker}"})
        kept = Kept.now()
        gc.freeze()
        try:
            child = os.fork()
        except OSError as error:
            return Frame(Kind.FORKED, {"error": f"fork failed: {error.strerror}"})
        if child:
            return Frame(Kind.FORKED, {"pid": child, "error": None})
        try:
            kept.restore_random()
            self._become_session(frame, fds)
        finally:
            leave(EXIT_LINK)

    def _become_session(self, frame: Frame, fds: list[int]) -> NoReturn:
        header = frame.header
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        old = self._link.fileno()
        self._link = root.enter(fds, str(header["cwd"]))
        os.close(old)
        self._queries.forget()
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(fd, saved, inheritable=False)
        os.environ[SOCKET_VARIABLE] = str(header["socket"])
        if header.get("child"):
            self._repl.names.begin_child(frame.body.decode("utf-8", "surrogatepass"))
        self._last_cell = ""
        root.run(self._link, self.serve)

    def _restore_streams(self) -> None:
        """A cell may have closed or redirected fd 1 and 2; what it starts with is always the capture."""
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, fd)

    def _receive(self) -> tuple[Frame, list[int]]:
        try:
            return self._link.receive()
        except (LinkClosed, OSError):
            leave(EXIT_CLOSED)
        except FrameError:
            leave(EXIT_LINK)

    def _send(self, kind: Kind, header: dict[str, Any], body: bytes = b"") -> None:
        if not self._link.intact():
            leave(EXIT_LINK)
        try:
            self._link.send(Frame(kind, header, body))
        except OSError:
            leave(EXIT_CLOSED)


def _fork_blocker() -> str:
    """Why this process can't be forked now; empty when it can."""
    threads = len(sys._current_frames()) - 1
    return f"{threads} Python thread(s) of an earlier cell still run" if threads else ""


def _wait(pid: int) -> dict[str, Any]:
    """How a standby died. Ends this process too when the session is over."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    code = os.WEXITSTATUS(status)
    if code == EXIT_CLOSED:
        leave(EXIT_CLOSED)
    return {"exit": code, "link": code == EXIT_LINK}


def _high_copy(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SAVED_FD)


def start(link: PacketLink) -> NoReturn:
    """The worker of a new, empty session."""
    Worker(link).serve()
