"""The host's end of one session: cells down, events and calls up, over one stream that can break."""

import asyncio
import contextlib
import logging
import secrets
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from rlm_agent.rpc.alarm import Alarm
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core import limits
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.cell import CellResult, Variable
from rlm_core.context import Encoded, encode
from rlm_core.environment import TOKEN_KEY, Sandbox, SandboxSpec
from rlm_core.errors import ConfigError, SandboxLost, VersionMismatch
from rlm_core.observer import Observer, isolated
from rlm_core.open_calls import OpenCalls
from rlm_core.replies import Replies, reply_message
from rlm_core.running_cell import RunningCell
from rlm_core.tasks import finish_first
from rlm_core.text import told, without_surrogates
from rlm_core.transport.errors import RECONNECTABLE, from_rpc_error
from rlm_core.transport.stream import Stream
from rlm_core.unsent import Unsent
from rlm_core.uploads import context_parts, file_parts, write_new

log = logging.getLogger("rlm_core.session")

CallHandler = Callable[[Call], Awaitable[Answer | Failure]]
KINDS = {pb.CALL_KIND_LLM: "llm", pb.CALL_KIND_RLM: "rlm", pb.CALL_KIND_TOOL: "tool"}
CONTEXT_KINDS = {
    "text": pb.CONTEXT_KIND_TEXT,
    "bytes": pb.CONTEXT_KIND_BYTES,
    "json": pb.CONTEXT_KIND_JSON,
}


class Session:
    """Open it, run cells one after the other, close it. Use it as an async context manager."""

    def __init__(
        self,
        sandbox: Sandbox,
        spec: SandboxSpec,
        handle_call: CallHandler,
        *,
        depth: int = 1,
        observer: Observer | None = None,
        session_id: str | None = None,
    ) -> None:
        """`session_id` is that of a session to take over; without one it is new."""
        self.id = session_id or secrets.token_hex(8)
        self.agent_build = ""
        self.python_version = ""
        self._sandbox = sandbox
        self._spec = spec
        self._handle_call = handle_call
        self._depth = depth
        self._observer = isolated(observer or Observer())
        self._turn = asyncio.Lock()
        self._reconnects = 0
        self._stub: Any = AgentServiceStub(sandbox.channel)
        self._metadata = ((TOKEN_KEY, sandbox.token),)
        self._stream: Stream | None = None
        self._reader: asyncio.Task[None] | None = None
        self._write_turn = asyncio.Lock()
        self._cell: RunningCell | None = None
        self._patience = Alarm(self._give_up)
        self._calls = OpenCalls()
        self._replies = Replies()
        self._unsent = Unsent()
        self._sending: asyncio.Task[None] | None = None
        self._contexts = 0
        self._cells = 0
        self._tag = f"c{secrets.token_hex(3)}-"
        """So that a host that takes the session over uses no id of the one before it."""
        self._former_cell = ""
        """That of a host before, which may still run."""
        self._lost: SandboxLost | None = None

    @property
    def cell_timeout(self) -> float:
        """Seconds that a cell has, where nothing else is said."""
        return self._spec.cell_timeout

    async def __aenter__(self) -> "Session":
        if self._reader is None:  # a fork is open already
            await self._open_or_close()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Open it in the agent and exchange versions.

        Raises:
            VersionMismatch: names both versions.
            SandboxLost: the agent does not answer.
        """
        response = await self._introduce()
        self._contexts = response.contexts
        self.agent_build = told(response.agent_build)
        self.python_version = told(response.capabilities.python_version)
        await self._connect()
        self._reader = asyncio.create_task(self._read())
        for name, path in (self._spec.files or {}).items():
            await self.put_file(name, path)

    async def _introduce(self) -> pb.OpenSessionResponse:
        spec = self._spec
        response: pb.OpenSessionResponse = await self._ask(
            self._stub.OpenSession,
            pb.OpenSessionRequest(
                protocol_version=pb.PROTOCOL_VERSION_CURRENT,
                session_id=self.id,
                limits=pb.SessionLimits(
                    output_bytes=spec.output_bytes,
                    interrupt_grace_ms=max(1, int(spec.interrupt_grace * 1000)),
                    memory_bytes=spec.memory or 0,
                ),
                env=dict(spec.env),
            ),
        )
        if response.protocol_version != pb.PROTOCOL_VERSION_CURRENT:
            raise VersionMismatch(
                f"this library speaks protocol {pb.PROTOCOL_VERSION_CURRENT}, the agent "
                f"{told(response.agent_build)} speaks {response.protocol_version}: update the older one"
            )
        self._former_cell = response.running_cell[: limits.MAX_ID_CHARS]
        return response

    async def put_context(self, value: Any) -> int:
        """Bind the next `context_<n>`, and `context` to it; returns n. Takes a value, or one encoded.

        Raises:
            ConfigError: a value that can't be sent, or that the worker can't load.
        """
        encoded = value if isinstance(value, Encoded) else await asyncio.to_thread(encode, value)
        size = await asyncio.to_thread(lambda: encoded.size)
        seconds = limits.START_SECONDS + size / limits.CONTEXT_BYTES_PER_SECOND
        index, self._contexts = self._contexts, self._contexts + 1
        header = pb.ContextHeader(session_id=self.id, index=index, kind=CONTEXT_KINDS[encoded.kind])
        folder = self._sandbox.shared_folder
        header.size_bytes = size
        if folder is None:
            await self._ask(self._stub.PutContext, context_parts(header, encoded), timeout=seconds)
            return index
        path = folder / secrets.token_hex(16)  # all sessions may read there, and none may list
        try:
            await asyncio.to_thread(write_new, path, encoded)
            header.shared_file = path.name
            await self._ask(self._stub.PutContext, context_parts(header, None), timeout=seconds)
        finally:
            path.unlink(missing_ok=True)
        return index

    async def bind(self, bindings: Sequence[pb.Binding]) -> None:
        """Give names of the REPL their values, and functions of the host; see `rlm_core/tools.py`.

        Raises:
            ConfigError: the worker could not take them.
        """
        request = pb.BindNamesRequest(session_id=self.id, request_id=secrets.token_hex(8), bindings=bindings)
        if request.ByteSize() > limits.MAX_MESSAGE:
            raise ConfigError(f"too much for names of the REPL: at most {limits.MAX_MESSAGE:,} bytes")
        await self._ask(self._stub.BindNames, request)

    async def put_file(self, name: str, path: Path) -> None:
        """Copy a file of the host's into the session's working folder.

        Raises:
            ConfigError: it can't be read, or its name is not within the folder.
        """
        try:
            status = await asyncio.to_thread(path.stat)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"files: {name}: not a regular file: {path}")
            size = status.st_size
            file = await asyncio.to_thread(path.open, "rb")
        except OSError as error:
            raise ConfigError(f"files: {name}: {error.strerror}: {path}") from None
        with file:
            seconds = limits.START_SECONDS + size / limits.CONTEXT_BYTES_PER_SECOND
            header = pb.FileHeader(session_id=self.id, path=name, size_bytes=size)
            await self._ask(self._stub.PutFile, file_parts(header, file), timeout=seconds)

    async def execute(self, code: str, *, timeout: float | None = None) -> CellResult:
        """Run a cell to its end. Cancelling this interrupts the cell.

        Args:
            timeout: seconds; the spec's `cell_timeout` by default.

        Raises:
            SandboxLost: the session is over.
            ConfigError: the code is over the agent's limit, or a cell of the host before still runs.
        """
        if self._lost is not None:
            raise self._lost
        if len(code) > limits.MAX_CODE:
            raise ConfigError(f"a cell has at most {limits.MAX_CODE:,} characters of code, not {len(code):,}")
        async with self._turn:
            if self._former_cell and self._lost is None and (await self._introduce()).running_cell:
                raise ConfigError("a cell of the host before still runs: wait for its end, or interrupt it")
            if self._lost is not None:
                raise self._lost
            self._cells += 1
            seconds = self._spec.cell_timeout if timeout is None else timeout
            request = pb.ExecuteCell(
                cell_id=f"{self._tag}{self._cells}",
                code=without_surrogates(code),
                timeout_ms=max(1, int(seconds * 1000)),
            )
            cell = self._cell = RunningCell(request, self._observer)
            try:
                return await self._result_of(cell, seconds, pb.ConnectRequest(execute=request))
            except asyncio.CancelledError:
                await finish_first(self._stop_cell(cell))
                raise
            finally:
                self._cell = None
                self._calls.cancel_all()
                self._replies.clear()
                self._unsent.clear()

    async def _result_of(
        self, cell: RunningCell, seconds: float, request: pb.ConnectRequest | None = None
    ) -> CellResult:
        """The agent ends a cell whose time is up; one that does not, or does not even read, is broken."""
        seconds += self._spec.interrupt_grace + limits.CELL_GRACE_SECONDS
        self._patience.set(seconds)
        try:
            if request is not None and not self._write_at_once(request):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._write(request)
            return await cell.result()
        finally:
            self._patience.stop()

    def _give_up(self) -> None:
        if self._cell is not None and not self._cell.has_ended:
            self._lose(SandboxLost("the agent did not end a cell whose time was up"))

    async def _stop_cell(self, cell: RunningCell) -> None:
        """Interrupt a cell that nobody waits for any more, and see it end: the session can be used again."""
        try:
            await self.interrupt()
            await self._result_of(cell, 0)
        except (SandboxLost, ConfigError, VersionMismatch):
            self._lose(SandboxLost("the agent did not interrupt a cell"))

    async def interrupt(self) -> None:
        """Interrupt the running cell, also that of a host before; nothing when none runs."""
        if cell_id := self._former_cell if self._cell is None else self._cell.id:
            request = pb.InterruptCellRequest(session_id=self.id, cell_id=cell_id)
            await self._ask(self._stub.InterruptCell, request, timeout=limits.INTERRUPT_SECONDS)

    def break_connection(self) -> None:
        """Cut the stream as a broken network would: the session connects again and goes on."""
        if self._stream is not None:
            self._stream.cut()

    def beside(self, handle_call: CallHandler) -> "Session":
        """Another session of the same sandbox, to be opened: nothing of this one is there."""
        return Session(self._sandbox, self._spec, handle_call, depth=self._depth + 1)

    async def fork(self, *, call_id: str = "", handle_call: CallHandler | None = None) -> "Session":
        """A second session with a copy of this one's variables; of the middle of a cell with `call_id`.

        Raises:
            ConfigError: it can't be forked there, and why.
        """
        handle = handle_call or self._handle_call
        child = Session(self._sandbox, self._spec, handle, depth=self._depth + bool(call_id))
        request = pb.ForkSessionRequest(session_id=self.id, new_session_id=child.id, call_id=call_id)
        try:
            await self._ask(self._stub.ForkSession, request)
        except BaseException:
            await finish_first(child.aclose())
            raise
        await child._open_or_close()
        return child

    async def _open_or_close(self) -> None:
        """What could not be opened may be there all the same."""
        try:
            await self.open()
        except BaseException:
            await finish_first(self.aclose())
            raise

    async def variables(self) -> list[Variable]:
        """Raises ConfigError while a cell runs."""
        response = await self._ask(self._stub.ListVariables, pb.ListVariablesRequest(session_id=self.id))
        return [
            Variable(told(each.name), told(each.type), told(each.repr))
            for each in response.variables[: limits.MAX_VARIABLES]
        ]

    async def read_variable(self, name: str, max_bytes: int = 0) -> str:
        """The text of a str, the repr of anything else, cut to max_bytes (0: the agent's limit)."""
        request = pb.ReadVariableRequest(session_id=self.id, name=name, max_bytes=max_bytes)
        response = await self._ask(self._stub.ReadVariable, request)
        text: str = response.text.decode("utf-8", "replace")
        return text

    async def aclose(self) -> None:
        """End the session in the agent; safe to repeat, quiet when the sandbox is gone."""
        self._lose(SandboxLost("the session was closed"))
        await self._calls.cleaned_up()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._reader = None
        if self._sending is not None:
            self._sending.cancel()
        self._stream = None
        with contextlib.suppress(SandboxLost, ConfigError, VersionMismatch):
            request = pb.CloseSessionRequest(session_id=self.id)
            await self._ask(self._stub.CloseSession, request, timeout=limits.CLOSE_SECONDS)

    # -- the stream

    async def _connect(self) -> None:
        """Open the stream; nothing goes down it before its first message and the cell to go on with."""
        async with self._write_turn:
            self._stream = self._sandbox.stream(self._take_response)
            await self._write_now(pb.ConnectRequest(attach=pb.Attach(session_id=self.id)))
            if self._cell is not None:
                await self._write_now(pb.ConnectRequest(execute=self._cell.continuation()))

    async def _read(self) -> None:
        """Take what comes up, across broken connections, until the session is lost."""
        try:
            while True:
                assert self._stream is not None
                error = await self._stream.run()
                if self._lost is not None:
                    break
                if error.code() not in RECONNECTABLE or not await self._reconnect():
                    self._lose(await self._why(error))
                    break
        except SandboxLost as lost:
            self._lose(lost)
        except Exception as error:
            log.exception("session %s can't go on", self.id)
            self._lose(SandboxLost(f"the session can't go on: {error!r}"))
        finally:
            self._lose(SandboxLost("the sandbox has been stopped"))  # whoever waits must know

    async def _reconnect(self) -> bool:
        """Dial again until the deadline; then take up the running cell where its events ended."""
        self._reconnects += 1
        if await self._sandbox.epitaph(limits.LAST_BREATH_SECONDS):
            return False
        if self._reconnects > limits.MAX_RECONNECTS:
            raise SandboxLost(f"its connection broke {self._reconnects} times before anything came on it")
        log.warning("the connection to sandbox %s broke; connecting again", self._sandbox.id)
        delay = 0.02
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.RECONNECT_SECONDS):
                while not await self._sandbox.epitaph():
                    try:
                        await self._stub.Health(pb.HealthRequest(), metadata=self._metadata)
                        await self._connect()
                        return True
                    except (grpc.aio.AioRpcError, SandboxLost):
                        await asyncio.sleep(delay)
                        delay = min(delay * 2, 1.0)
                    except grpc.aio.UsageError:
                        raise SandboxLost("the sandbox has been stopped") from None
        return False

    def _write_at_once(self, message: pb.ConnectRequest) -> bool:
        """Without the cost of a wait, where there is none."""
        if self._stream is None or self._write_turn.locked():
            return False
        return self._stream.write_now(message)

    async def _write(self, message: pb.ConnectRequest) -> None:
        async with self._write_turn:
            await self._write_now(message)

    async def _write_now(self, message: pb.ConnectRequest) -> None:
        if self._stream is None:
            raise self._lost or SandboxLost("the session is not open")
        with contextlib.suppress(ConnectionError):
            # The reader sees the same end of the stream, and what was not answered is sent again.
            await self._stream.write(message)

    def _take_response(self, response: pb.ConnectResponse | None) -> None:
        if response is None or not response.messages:
            raise SandboxLost("the agent sent what is no message of ours")
        self._reconnects = 0
        if len(response.messages) > limits.MAX_BATCH_MESSAGES:
            raise SandboxLost("the agent sent too many messages at once")
        for each in response.messages:
            self._take(each)

    def _take(self, message: pb.AgentMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "event":
            if self._cell is not None:
                self._cell.take(message.event)
            # The agent has handed this answer on: it will not ask for it again.
            self._replies.remove(message.event.call_ended.call_id)
        elif kind == "call":
            self._take_call(message.call)
        elif kind == "cancel":
            self._calls.cancel(message.cancel.call_id)
        else:
            raise SandboxLost(f"the session is gone: {told(message.lost.detail)}")

    def _take_call(self, call: pb.Call) -> None:
        """Start work on a call; one that is delivered again gets the same answer, never a second one."""
        if (reply := self._replies.get(call.call_id)) is not None:
            self._send_soon(call.call_id, reply)
            return
        if call.call_id in self._calls:
            return
        cell = self._cell
        if cell is None or call.cell_id != cell.id or not 0 < len(call.call_id) <= limits.MAX_ID_CHARS:
            return
        if max(len(call.model), len(call.tool)) > limits.MAX_ID_CHARS:
            raise SandboxLost("the agent made a call with a name that is too long")
        if (
            len(self._calls) + len(self._unsent) >= limits.MAX_OPEN_CALLS
            or self._calls.bytes + len(call.prompt) > limits.MAX_OPEN_CALL_BYTES
        ):
            raise SandboxLost("the agent opened more calls at once than it may")
        self._calls.start(call.call_id, len(call.prompt), self._answer(call))

    async def _answer(self, message: pb.Call) -> None:
        async with self._unsent.room():
            call = Call(
                id=message.call_id,
                session_id=self.id,
                cell_id=message.cell_id,
                kind=KINDS.get(message.kind, ""),
                prompt=message.prompt.decode("utf-8", "replace"),
                model=message.model or None,
                depth=self._depth,
                tool=message.tool,
            )
            try:
                reply = reply_message(call.id, await self._handle_call(call))
            except Exception as error:
                # A client or a tool of somebody else's: one query has failed, and its cell must hear of it.
                log.exception("call %s failed", told(call.id))
                reply = reply_message(call.id, Failure("PROVIDER", f"{type(error).__name__}: {error}"))
            self._replies.add(call.id, reply)
            self._calls.answered(call.id)
            self._send_soon(call.id, reply)

    def _send_soon(self, call_id: str, reply: pb.CallReply) -> None:
        self._unsent.add(call_id, reply)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_replies())

    async def _send_replies(self) -> None:
        """All that are there by the time they can be written: a message costs more than what it carries."""
        async with self._write_turn:
            while self._unsent:
                with contextlib.suppress(SandboxLost):  # told to whoever waits for the cell
                    await self._write_now(pb.ConnectRequest(replies=self._unsent.take()))

    def _lose(self, error: SandboxLost) -> None:
        if self._lost is None:
            self._lost = error
        self._calls.cancel_all()
        self._patience.close()
        if self._cell is not None:
            self._cell.end(self._lost)
        if self._stream is not None:
            self._stream.cut()

    async def _ask(self, method: Any, request: Any, timeout: float = limits.START_SECONDS) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() in RECONNECTABLE:
                raise await self._why(error) from None
            raise from_rpc_error(error) from None
        except grpc.aio.UsageError:
            raise SandboxLost("the sandbox has been stopped") from None

    async def _why(self, error: grpc.aio.AioRpcError) -> SandboxLost:
        epitaph = await self._sandbox.epitaph(limits.EPITAPH_SECONDS)
        return SandboxLost(epitaph) if epitaph else SandboxLost(str(from_rpc_error(error)))
