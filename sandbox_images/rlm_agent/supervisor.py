"""Makes and ends the processes of sessions, for an agent that may not. Standard library only.

It is started once and stays small and single-threaded, so that a session starts as a fork of it (a
millisecond, a few pages) instead of a new interpreter. It obeys only its own socket, and touches only
processes below the session roots it knows.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rlm_agent import posture, users
from rlm_agent.frames import Frame, FrameError, Kind
from rlm_agent.users import Users
from rlm_agent.worker import chain, process, root
from rlm_agent.worker.link import Link, LinkClosed, leave
from rlm_agent.worker.remove import remove_all_of, remove_tree

PROBE_SECONDS = 3.0
REMOVE_SECONDS = 20
WAIT_SECONDS = 0.2
SHARED_FOLDERS = ("/tmp", "/dev/shm")
"""Where each session's user may leave files, in a sandbox in which it has a user of its own."""


@dataclass(frozen=True, slots=True)
class Known:
    """A session: its first process, its user (None: our own), its working folder and the socket it calls."""

    root: int
    user: int | None
    cwd: str
    socket: Path | None = None


class Supervisor:
    def __init__(self, link: Link, users: Users | None = None) -> None:
        """With `users`, which takes a root of its own, each session is another user."""
        self._link = link
        self._users = users
        self._sessions: dict[str, Known] = {}
        self._helpers: set[int] = set()
        self._wakeup: tuple[int, ...] = ()

    def run(self) -> NoReturn:
        self._wakeup = reader, writer = os.pipe()
        for fd in self._wakeup:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while self._serve(reader):
            pass
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        process.end_below(os.getpid())
        leave(0)

    def _serve(self, children: int) -> bool:
        """Wait for a request or for the end of a child; False when the agent is gone.

        Children are reaped here and not in the signal's handler, which would come in between anything.
        """
        link = self._link.fileno()
        ready = select.select([link, children], [], [])[0]
        if children in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(children, 1 << 12)
            self._reap()
        if link not in ready:
            return True
        try:
            frame, fds = self._link.receive()
            answer = self._obey(frame, fds)
            for fd in fds:
                os.close(fd)
            self._link.send(Frame(Kind.DONE, {"id": frame.header.get("id"), **answer}))
        except (LinkClosed, FrameError, OSError):
            return False
        return True

    def _obey(self, frame: Frame, fds: list[int]) -> dict[str, Any]:
        header = frame.header
        try:
            session = str(header["session"])
            if frame.kind is Kind.PROBE:
                return {"posture": self._probe(outside=bool(header.get("outside")))}
            if frame.kind is Kind.SPAWN:
                self._spawn(session, header, fds)
            elif frame.kind is Kind.NAME:
                self._name(session, Path(header["path"]), fds[0])
            elif frame.kind is Kind.ADOPT:
                self._adopt(session, str(header["parent"]), int(header["pid"]), str(header["cwd"]))
            elif frame.kind is Kind.SIGNAL:
                self._signal(session, int(header["pid"]), int(header["signal"]))
            elif frame.kind is Kind.RESUME:
                self._resume(session)
            elif frame.kind is Kind.END:
                return {"left": self._end(session)}
        except Exception as error:  # what is wrong with one session must not end the others
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _spawn(self, session: str, header: dict[str, Any], fds: list[int]) -> None:
        user = self._users.new() if self._users else None
        cwd = str(header["cwd"])

        def begin() -> None:
            _limit(header)
            if user is not None:
                users.live_in(cwd)
            os.environ.update(header["env"])
            link = root.enter(fds, cwd)
            sys.argv = [""]
            sys.path.append(cwd)
            root.run(link, lambda: chain.start(link))

        self._sessions[session] = Known(self._fork(user, begin), user, cwd)

    def _name(self, session: str, path: Path, fd: int) -> None:
        """Give the agent's socket a name that only the session's user can connect to: not every kernel says
        truly who has connected (gVisor), but each holds the rights of files."""
        known = self._known(session)
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(0o711)  # others may pass, and not look around
        with socket.socket(fileno=os.dup(fd)) as sock, contextlib.ExitStack() as stack:
            if self._users is not None and known.user is not None:
                stack.enter_context(self._users.making_for(known.user))
            sock.bind(str(path))
        self._sessions[session] = replace(known, socket=path)
        path.chmod(0o660)

    def _fork(self, user: int | None, begin: Callable[[], None]) -> int:
        """Do something in a new process, which is this user; its pid."""
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Whoever has an end of our pipe can fill it, and stop us in the middle of a signal.
            for fd in self._wakeup:
                os.close(fd)
            self._link.close()
            if user is not None:
                users.become(user)
                users.be_open_to_own_user()
            process.die_with_parent()
            begin()
        except OSError as error:
            os.write(2, f"a process of a session could not begin: {error}\n".encode())
        finally:
            leave(1)

    def _probe(self, *, outside: bool) -> dict[str, Any]:
        """Have a process like a session's look around."""
        reader, writer = os.pipe()
        user = self._users.new() if self._users else None
        self._helpers.add(self._fork(user, lambda: posture.report(writer, outside=outside)))
        os.close(writer)
        return posture.receive(reader, PROBE_SECONDS)

    def _adopt(self, session: str, parent: str, pid: int, cwd: str) -> None:
        """Take note of a forked session, whose first process its parent session has named."""
        self._sessions[session] = Known(self._own(parent, pid), self._known(parent).user, cwd)

    def _signal(self, session: str, pid: int, number: int) -> None:
        """Signal a cell's process; SIGKILL takes its whole process group.

        The pid comes from the session itself, so it is only believed within the session.
        """
        self._own(session, pid)
        if number == signal.SIGKILL and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)

    def _resume(self, session: str) -> None:
        """SIGCONT everything of a session: a cell may have stopped the checkpoint that is needed now."""
        known = self._known(session)
        if known.user is not None:
            self._kill_user(known.user, signal.SIGCONT)
            return
        for pid in process.descendants(known.root):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def _end(self, session: str) -> int:
        """Kill all processes of a session and remove its folder; how many were still there at the end."""
        known = self._sessions.pop(session, None)
        left = 0
        if known:
            alone = known.user is not None and all(
                each.user != known.user for each in self._sessions.values()
            )
            if alone and known.user is not None:
                self._kill_user(known.user, signal.SIGKILL)
            left = self._end_tree(known)
            self._remove_files(known, alone=alone)
        return left + self._end_strays()

    def _end_tree(self, known: Known) -> int:
        """Kill a session's first process and all below it; how many were still there at the end."""
        if known.user is not None and process.owner(known.root) != known.user:
            return 0  # a forked one, which has ended, and its pid is somebody else's now
        left = process.end_below(known.root, self._own_children())
        with contextlib.suppress(OSError):
            os.kill(known.root, signal.SIGKILL)
        return left

    def _remove_files(self, known: Known, *, alone: bool) -> None:
        """With the session's own rights, in a process of its own: what it has left may be anything."""

        def remove() -> None:
            signal.alarm(REMOVE_SECONDS)
            remove_tree(known.cwd)
            if alone and known.user is not None:
                remove_all_of(known.user, SHARED_FOLDERS)
            leave(0)

        if known.socket is not None:
            with contextlib.suppress(OSError):
                known.socket.unlink()
        with contextlib.suppress(OSError):  # no process can be made at the moment: it goes with the sandbox
            helper = self._fork(known.user, remove)
            if not _ends_soon(helper):
                self._helpers.add(helper)

    def _kill_user(self, user: int, number: int) -> None:
        """Signal every process of a session's user, wherever it has gone."""
        assert self._users is not None
        with self._users.acting_as(user), contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)

    def _end_strays(self) -> int:
        """Kill what has lost its root, because a cell killed it: it belongs to no session any more."""
        if self._users is not None:
            return 0  # told apart by their user; the agent itself is a child of ours
        return process.end_below(os.getpid(), self._own_children())

    def _own_children(self) -> frozenset[int]:
        """Made by us and still wanted: the sessions' roots, and who removes files or looks around."""
        return frozenset(known.root for known in self._sessions.values()) | self._helpers

    def _known(self, session: str) -> Known:
        known = self._sessions.get(session)
        if known is None:
            raise ProcessLookupError(f"session {session} has ended")
        return known

    def _own(self, session: str, pid: int) -> int:
        """The pid, if it is the session's own: told by its user, or else by its descent."""
        known = self._known(session)
        by_descent = known.user is None
        owned = process.is_below(pid, known.root) if by_descent else process.owner(pid) == known.user
        if not owned:
            raise ProcessLookupError(f"process {pid} is not of session {session}")
        return pid

    def _reap(self) -> None:
        """A root that has ended takes its session with it, and its pid may be somebody else's soon."""
        ended: set[int] = set()
        with contextlib.suppress(OSError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                ended.add(pid)
        strays = ended - self._own_children()
        self._helpers -= ended
        for name in [name for name, known in self._sessions.items() if known.root in ended]:
            self._end(name)
        if strays:  # of a session that has lost its root: where one has ended there may be more
            self._end_strays()


def _ends_soon(pid: int) -> bool:
    """Wait for what is quick as a rule; a longer one is reaped later."""
    deadline = time.monotonic() + WAIT_SECONDS
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
    return True


LIMITS = {
    "memory": resource.RLIMIT_DATA,
    "processes": resource.RLIMIT_NPROC,
    "space": resource.RLIMIT_AS,
}


def _limit(header: dict[str, Any]) -> None:
    """To what a session was given; 0 is no limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, number in LIMITS.items():
        if value := int(header.get(name) or 0):
            resource.setrlimit(number, (value, value))


def main() -> NoReturn:
    """Started by the agent as `python -m rlm_agent.supervisor [--users] FD`, with nothing else inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.adopt_orphans()
    link = socket.socket(fileno=int(sys.argv[-1]))
    link.set_inheritable(False)
    Supervisor(Link(link), Users() if "--users" in sys.argv else None).run()


if __name__ == "__main__":
    main()
