"""Makes and ends the processes of sessions, for an agent that may not. Standard library only.

It is started once and stays small and single-threaded, so that a session starts as a fork of it (a
millisecond, a few pages) instead of a new interpreter. It obeys only its own socket, and touches only
processes below the session roots it knows.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

from rlm_agent.frames import Frame, FrameError, Kind
from rlm_agent.worker import chain, process, root
from rlm_agent.worker.link import Link, LinkClosed, leave


class Supervisor:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._roots: dict[str, int] = {}

    def run(self) -> NoReturn:
        signal.signal(signal.SIGCHLD, self._reap)
        while True:
            try:
                frame, fds = self._link.receive()
            except (LinkClosed, FrameError, OSError):
                break
            answer = self._obey(frame, fds)
            for fd in fds:
                os.close(fd)
            self._link.send(Frame(Kind.DONE, {"id": frame.header.get("id"), **answer}))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        process.end_below(os.getpid())
        leave(0)

    def _obey(self, frame: Frame, fds: list[int]) -> dict[str, Any]:
        header = frame.header
        try:
            session = str(header["session"])
            if frame.kind is Kind.SPAWN:
                return {"pid": self._spawn(session, header, fds)}
            if frame.kind is Kind.ADOPT:
                self._adopt(session, str(header["parent"]), int(header["pid"]))
            elif frame.kind is Kind.SIGNAL:
                self._signal(session, int(header["pid"]), int(header["signal"]))
            elif frame.kind is Kind.RESUME:
                self._resume(session)
            elif frame.kind is Kind.END:
                return {"left": self._end(session)}
        except Exception as error:  # what is wrong with one session must not end the others
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _spawn(self, session: str, header: dict[str, Any], fds: list[int]) -> int:
        # A root that is not noted yet would be taken for a stray.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            pid = os.fork()
            if pid:
                self._roots[session] = pid
                return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._link.close()
            process.die_with_parent()
            _limit(int(header.get("memory") or 0))
            os.environ.update(header["env"])
            link = root.enter(fds, str(header["cwd"]))
            sys.argv = [""]
            sys.path.append(str(header["cwd"]))
            root.run(link, lambda: chain.start(link))
        finally:
            leave(1)

    def _adopt(self, session: str, parent: str, pid: int) -> None:
        """Take note of a forked session, whose first process its parent session has named."""
        if pid not in process.descendants(self._root(parent)):
            raise ProcessLookupError(f"process {pid} is not of session {parent}")
        self._roots[session] = pid

    def _signal(self, session: str, pid: int, number: int) -> None:
        """Signal a cell's process; SIGKILL takes its whole process group.

        The pid comes from the session itself, so it is only believed within the session.
        """
        if pid not in process.descendants(self._root(session)):
            raise ProcessLookupError(f"process {pid} is not of this session")
        if number == signal.SIGKILL and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)

    def _resume(self, session: str) -> None:
        """SIGCONT everything of a session: a cell may have stopped the checkpoint that is needed now."""
        for pid in process.descendants(self._root(session)):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def _end(self, session: str) -> int:
        """Kill everything below a session's root and then the root; how many were still there at the end."""
        top = self._roots.pop(session, 0)
        left = 0
        if top:
            left = process.end_below(top, frozenset(self._roots.values()))
            with contextlib.suppress(OSError):
                os.kill(top, signal.SIGKILL)
        return left + self._end_strays()

    def _end_strays(self) -> int:
        """Kill what has lost its root, because a cell killed it: it belongs to no session any more."""
        return process.end_below(os.getpid(), frozenset(self._roots.values()))

    def _root(self, session: str) -> int:
        top = self._roots.get(session)
        if top is None:
            raise ProcessLookupError(f"session {session} has ended")
        return top

    def _reap(self, *_: object) -> None:
        """A root that has ended takes its session with it, and its pid may be somebody else's soon."""
        ended: set[int] = set()
        with contextlib.suppress(OSError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                ended.add(pid)
        sessions = [name for name, top in self._roots.items() if top in ended]
        for name in sessions:
            del self._roots[name]
        if sessions:
            self._end_strays()


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def main() -> NoReturn:
    """Started by the agent as `python -m rlm_agent.supervisor FD`, with nothing else inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.adopt_orphans()
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    Supervisor(Link(link)).run()


if __name__ == "__main__":
    main()
