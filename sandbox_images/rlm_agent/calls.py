"""Calls out of a session's cells: from its socket in the sandbox up to the host, and the answers back.

Nothing that arrives here is believed: the call's id is minted here, its cell is the one that runs, and
depth, budget and model policy are the host's.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rlm_agent import limits
from rlm_agent.cell import Cell
from rlm_agent.frames import Frame, FrameBuffer, FrameError, Kind
from rlm_agent.rpc.reader import Reader, read_buffer
from rlm_agent.rpc.v1 import agent_pb2 as pb

Deferred = Callable[[], pb.AgentMessage | None]
KINDS = {"llm": pb.CALL_KIND_LLM, "rlm": pb.CALL_KIND_RLM, "tool": pb.CALL_KIND_TOOL}


@dataclass(frozen=True, slots=True)
class Pending:
    connection: "Connection"
    local_id: int
    message: pb.Call


class Calls:
    """The calls of one session that have no answer yet."""

    def __init__(self, up: "Callable[[pb.AgentMessage | Deferred], None]") -> None:
        self._up = up
        self.read_buffer = read_buffer()
        self._pending_bytes = 0
        self.partial_bytes = 0
        self.refused_bytes = 0
        """Of refusals that have not been read, as far as is known."""
        self._pending: dict[str, Pending] = {}
        self._connections: dict[Connection, None] = {}
        """In the order of their turns, when there are too many calls."""
        self._server: asyncio.Server | None = None
        self._minted = 0
        self.cell: Cell | None = None

    async def listen(self, sock: socket.socket) -> None:
        """On a socket that has its name already, and is ours from now on; only the session's own user can
        connect to it. The loop does not look at the name, which may be of another view of the files."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), sock=sock, start_serving=False)
        await self._server.start_serving()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.drop()

    def unanswered(self) -> list[pb.AgentMessage]:
        """To deliver again when the host has reconnected."""
        return [pb.AgentMessage(call=pending.message) for pending in self._pending.values()]

    def begin_cell(self, cell: Cell) -> None:
        self.cell = cell

    def end_cell(self) -> None:
        """A call can't outlive its cell: what is open is cancelled on the host and failed here."""
        self.cell = None
        for call_id in list(self._pending):
            self._cancel(call_id, "the cell has ended")

    def reply(self, reply: pb.CallReply) -> None:
        """Hand a host's answer to the cell; one for a call that is not open is dropped."""
        pending = self._pending.pop(reply.call_id, None)
        if pending is None:
            return
        self._pending_bytes -= len(pending.message.prompt)
        ok = reply.WhichOneof("outcome") == "answer"
        if self.cell is not None:
            self.cell.call_ended(reply.call_id, ok=ok, was_last=not self._pending)
        header: dict[str, Any] = {"id": pending.local_id}
        body = b""
        if ok:
            usage = reply.answer.usage
            header["model"] = reply.answer.model
            header["usage"] = {name.name: value for name, value in usage.ListFields()}
            body = reply.answer.text
        else:
            header["error"] = reply.failure.message or pb.CallErrorCode.Name(reply.failure.code)
        pending.connection.answer(Frame(Kind.REPLY, header, body))
        self._resume()

    async def fork(self, call_id: str, header: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        """Have the thread that waits for this call fork its session.

        Raises:
            KeyError: no such call is open.
        """
        pending = self._pending[call_id]
        return await pending.connection.fork({**header, "id": pending.local_id}, fds)

    def admit(self, connection: "Connection", frame: Frame) -> str | None:
        """Take a call; otherwise the reason why not, in words for the cell."""
        cell = self.cell
        if cell is None:
            return "no cell is running: a call can't outlive the cell that made it"
        kind = KINDS.get(str(frame.header.get("kind")))
        model, tool = frame.header.get("model", ""), frame.header.get("tool", "")
        if kind is None or not _is_name(model) or not _is_name(tool):
            return "not a valid call"
        if len(frame.body) > limits.MAX_PROMPT:
            return f"the prompt has {len(frame.body):,} bytes; at most {limits.MAX_PROMPT:,}"
        self._minted += 1
        call_id = f"{cell.id}/{self._minted}"
        message = pb.Call(
            call_id=call_id, cell_id=cell.id, kind=kind, model=model, prompt=frame.body, tool=tool
        )
        self._pending[call_id] = Pending(connection, frame.header["id"], message)
        self._pending_bytes += len(message.prompt)
        cell.call_started(call_id)
        self._up(lambda: self._deliverable(call_id))
        self._connections[connection] = self._connections.pop(connection)
        if self.is_full():
            for each in self._connections:
                each.pause()
        return None

    def _deliverable(self, call_id: str) -> pb.AgentMessage | None:
        """The call when its turn to be sent has come; None when nobody waits for it any more."""
        pending = self._pending.get(call_id)
        return pb.AgentMessage(call=pending.message) if pending is not None else None

    def is_full(self) -> bool:
        """Whether calls have to wait in their connections."""
        return len(self._pending) >= limits.MAX_PENDING_CALLS or self._pending_bytes >= limits.MAX_CALL_BYTES

    def add(self, connection: "Connection") -> bool:
        if len(self._connections) >= limits.MAX_CALL_CONNECTIONS:
            return False
        self._connections[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """The caller is gone: nobody waits for its answers any more."""
        self._connections.pop(connection, None)
        for call_id, pending in list(self._pending.items()):
            if pending.connection is connection:
                self._cancel(call_id, "the caller is gone")

    def _cancel(self, call_id: str, why: str) -> None:
        self._up(pb.AgentMessage(cancel=pb.CancelCall(call_id=call_id)))
        failure = pb.CallFailure(code=pb.CALL_ERROR_CODE_CANCELLED, message=why)
        self.reply(pb.CallReply(call_id=call_id, failure=failure))

    def _resume(self) -> None:
        for connection in list(self._connections):
            if self.is_full():
                return
            connection.resume()


class Connection(Reader):
    """One thread or process of a cell."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls.read_buffer)
        self._calls = calls
        self._frames = FrameBuffer(limits.MAX_CALL_HEADER)
        self._refused = 0
        self._open: set[int] = set()
        self._partial = 0
        self._waiting: deque[Frame] = deque()
        """Calls that came with what was read before it was paused. Where there are any, there are too many
        calls, and no connection is read: so they are of one connection, and of one read."""
        self._forked: asyncio.Future[dict[str, Any]] | None = None
        self._fork_turn = asyncio.Lock()
        self._written = asyncio.Event()
        """Whether the kernel has all of the answers so far."""
        self._written.set()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        if not self._calls.add(self):
            self._transport.abort()
        elif self._calls.is_full():
            self.pause()

    def take(self, data: memoryview) -> None:
        try:
            frames = self._frames.feed(data)
            self._count_partial(len(self._frames))
            for frame in frames:
                if frame.kind is Kind.FORKED:
                    self._on_forked(frame)
                else:
                    self._waiting.append(frame)
            self._take_waiting()
            if self._waiting:
                self.pause()
        except FrameError:
            self._transport.abort()

    def _take_waiting(self) -> None:
        while self._waiting and not self._calls.is_full():
            self._on_call(self._waiting.popleft())

    def _count_partial(self, size: int) -> None:
        """Raises FrameError when the session's connections hold too much of frames that are not whole yet."""
        self._calls.partial_bytes += size - self._partial
        self._partial = size
        if size and self._calls.partial_bytes > limits.MAX_CALL_BYTES:
            raise FrameError("too many partial frames")

    def connection_lost(self, exc: Exception | None) -> None:
        self._count_partial(0)
        self._waiting.clear()
        self.resume_writing()
        self._calls.remove(self)
        if self._forked is not None and not self._forked.done():
            self._forked.set_result({"error": "the caller is gone"})

    def answer(self, frame: Frame) -> None:
        self._open.discard(frame.header["id"])
        if not self._transport.is_closing():
            self._transport.write(frame.encode())

    def pause_writing(self) -> None:
        self._written.clear()

    def resume_writing(self) -> None:
        self._written.set()
        self._calls.refused_bytes -= self._refused
        self._refused = 0

    def _refuse(self, local_id: int, why: str) -> None:
        """Raises FrameError when too much of this has not been read."""
        frame = Frame(Kind.REPLY, {"id": local_id, "error": why})
        if not self._transport.get_write_buffer_size():
            self.resume_writing()
        self.answer(frame)
        if self._transport.get_write_buffer_size():
            size = len(frame.encode())
            self._refused += size
            self._calls.refused_bytes += size
        if self._calls.refused_bytes > limits.MAX_REFUSED_BYTES:
            raise FrameError("refusals that are not read")

    async def fork(self, header: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        async with self._fork_turn:  # a thread forks for one of its calls after the other
            return await self._fork(header, fds)

    async def _fork(self, header: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        self._forked = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(limits.READY_SECONDS):
                await self._send_with_fds(Frame(Kind.FORK, header).encode(), fds)
                return await self._forked
        except TimeoutError:
            return {"error": "the caller did not fork"}

    async def _send_with_fds(self, data: bytes, fds: Sequence[int]) -> None:
        """Past the transport, which can't send any: between two answers, never into the middle of one."""
        while not self._transport.is_closing():
            await self._written.wait()
            with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as sock:
                try:
                    socket.send_fds(sock, [data], list(fds))
                    return
                except BlockingIOError:
                    await _writable(sock)

    def pause(self) -> None:
        if self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport.is_closing():
            return
        try:
            self._take_waiting()
        except FrameError:
            self._transport.abort()
            return
        if not self._waiting and not self._transport.is_reading():
            self._transport.resume_reading()

    def drop(self) -> None:
        self._transport.abort()

    def _on_forked(self, frame: Frame) -> None:
        if self._forked is not None and not self._forked.done():
            self._forked.set_result(frame.header)

    def _on_call(self, frame: Frame) -> None:
        local_id = frame.header.get("id")
        if frame.kind is not Kind.CALL or type(local_id) is not int or not 0 <= local_id < 1 << 63:
            raise FrameError("not a call")
        if local_id in self._open:
            raise FrameError("call id used twice")
        self._open.add(local_id)
        if refusal := self._calls.admit(self, frame):
            self._refuse(local_id, refusal)


def _is_name(value: object) -> bool:
    """Whether it can go into a str field of the wire, which is UTF-8: it may be half of a surrogate pair."""
    if not isinstance(value, str) or len(value) > limits.MAX_ID_CHARS:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _writable(sock: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock)
