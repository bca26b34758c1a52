"""The agent's side of its supervisor: the one that makes and ends processes."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlm_agent.config import FILTER, AgentConfig
from rlm_agent.frames import Frame, FrameBuffer, FrameError, Kind

WORKER_ENV = {
    # Huge pages make the fork of a large heap 30 times cheaper (measured; glibc ≥ 2.35).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # A thread pool of numpy's would cost a cell its checkpoint.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
SUPERVISOR = "import sys; sys.path[:] = {path!r}; from rlm_agent.supervisor import main; main()"
"""It finds what we have found, wherever that was put."""
ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Of a session's processes; 0 is no limit."""

    memory: int = 0
    """Bytes of data, per process."""
    processes: int = 0
    """Of the session's user, threads included."""
    space: int = 0
    """Bytes of address space, per process."""


class SupervisorGone(Exception):
    """The supervisor has ended; no session of this agent can go on."""


class Supervision:
    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        """Talk to a supervisor over this socket; to one of our own, which `process` is, or to another's."""
        sock.setblocking(False)
        self._socket = sock
        self._process = process
        self._buffer = FrameBuffer()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._send_turn = asyncio.Lock()
        self.gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(sock, self._on_readable)

    @classmethod
    def launch(cls, config: AgentConfig) -> "Supervision":
        """Start a supervisor, with the environment's own command where it gives one."""
        command = config.supervisor or (sys.executable, "-I", "-c", SUPERVISOR.format(path=sys.path))
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as stack:
            fds = [theirs.fileno()]
            if config.supervisor_filter:
                fds.append(stack.enter_context(Path(config.supervisor_filter).open("rb")).fileno())
                command = tuple(str(fds[-1]) if part == FILTER else part for part in command)
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**WORKER_ENV, **os.environ},
            )
        return cls(ours, process)

    async def spawn(
        self, session: str, cwd: Path, env: dict[str, str], limits: ProcessLimits, fds: list[int]
    ) -> None:
        """Start a session's first process; fds are its link, stdout and stderr."""
        header = {"session": session, "cwd": str(cwd), "env": env, **asdict(limits)}
        await self._ask(Kind.SPAWN, header, fds)

    async def adopt(self, session: str, parent: str, pid: int, cwd: Path) -> None:
        header = {"session": session, "parent": parent, "pid": pid, "cwd": str(cwd)}
        await self._ask(Kind.ADOPT, header)

    async def name(self, session: str, path: Path, sock: socket.socket) -> None:
        """Give a new socket a path, as sessions see it, that only this session's user can connect to."""
        await self._ask(Kind.NAME, {"session": session, "path": str(path)}, [sock.fileno()])

    async def probe(self, *, outside: bool) -> dict[str, Any]:
        """What a process of a session is able to do here; with `outside`, whom it can reach, too."""
        answer = await self._ask(Kind.PROBE, {"session": "", "outside": outside})
        return dict(answer["posture"])

    async def signal(self, session: str, pid: int, number: int) -> None:
        await self._ask(Kind.SIGNAL, {"session": session, "pid": pid, "signal": number})

    async def resume(self, session: str) -> None:
        await self._ask(Kind.RESUME, {"session": session})

    async def end(self, session: str) -> None:
        """End every process of a session; OSError when some could not be ended."""
        left = (await self._ask(Kind.END, {"session": session})).get("left")
        if left:
            raise OSError(f"{left} processes of session {session} could not be ended")

    def close(self) -> None:
        """End the supervisor, which ends every session first."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    async def _ask(self, kind: Kind, header: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """Raises SupervisorGone, or OSError with what the supervisor could not do."""
        loop = asyncio.get_running_loop()
        async with self._send_turn:
            self._next_id += 1
            number = self._next_id
            answer = self._waiting[number] = loop.create_future()
            data = Frame(kind, {**header, "id": number}).encode()
            try:
                sent = socket.send_fds(self._socket, [data], fds or []) if fds else 0
                await loop.sock_sendall(self._socket, data[sent:])
            except OSError as error:
                self._waiting.pop(number)
                raise SupervisorGone(str(error)) from None
        try:
            result: dict[str, Any] = await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise SupervisorGone("the supervisor does not answer") from None
        finally:
            self._waiting.pop(number, None)
        if error_text := result.get("error"):
            raise OSError(error_text)
        return result

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
            frames = self._buffer.feed(data)
        except (OSError, FrameError):
            data, frames = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(self._socket)
            self.gone.set()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(SupervisorGone("the supervisor has ended"))
        for frame in frames:
            waiting = self._waiting.get(int(frame.header["id"]))
            if waiting is not None and not waiting.done():
                waiting.set_result(frame.header)
