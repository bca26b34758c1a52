"""The agent's side of its supervisor: the one that makes and ends processes."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlm_agent.frames import Frame, FrameBuffer, FrameError, Kind

WORKER_ENV = {
    # Huge pages make the fork of a large heap 30 times cheaper (measured; glibc ≥ 2.35).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # A thread pool of numpy's would cost a cell its checkpoint.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
ANSWER_SECONDS = 5.0


class SupervisorGone(Exception):
    """The supervisor has ended; no session of this agent can go on."""


class Supervision:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        self._buffer = FrameBuffer()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._send_turn = asyncio.Lock()
        self.gone = asyncio.Event()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "rlm_agent.supervisor", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**WORKER_ENV, **os.environ},
            )
        asyncio.get_running_loop().add_reader(ours, self._on_readable)

    async def spawn(self, session: str, cwd: Path, env: dict[str, str], memory: int, fds: list[int]) -> int:
        """Start a session's first process; fds are its link, stdout and stderr."""
        header = {"session": session, "cwd": str(cwd), "env": env, "memory": memory}
        return int((await self._ask(Kind.SPAWN, header, fds))["pid"])

    async def adopt(self, session: str, parent: str, pid: int) -> None:
        await self._ask(Kind.ADOPT, {"session": session, "parent": parent, "pid": pid})

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
