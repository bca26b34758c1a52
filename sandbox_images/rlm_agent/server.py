"""AgentService: the gRPC face of the agent. Checks what enters; guard.py turns its errors into statuses."""

import asyncio
import contextlib
import os
import platform
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import grpc.aio

from rlm_agent import egress, errors, limits
from rlm_agent.build import agent_build
from rlm_agent.config import AgentConfig
from rlm_agent.egress import Egress
from rlm_agent.folders import Folders, Places
from rlm_agent.host import Host, Responses
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.rpc.v1 import agent_pb2_grpc as rpc
from rlm_agent.session import Session, SessionConfig
from rlm_agent.supervision import ProcessLimits, Supervision, SupervisorGone

CONTEXT_KINDS = {
    pb.CONTEXT_KIND_TEXT: "text",
    pb.CONTEXT_KIND_BYTES: "bytes",
    pb.CONTEXT_KIND_JSON: "json",
}
SAFE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AgentService(rpc.AgentServiceServicer):
    def __init__(self, supervision: Supervision, folders: Folders, config: AgentConfig) -> None:
        self._supervision = supervision
        self._folders = folders
        self._config = config
        self._sessions: dict[str, Session] = {}
        self._egress = Egress()
        self._ahead: asyncio.Task[Session] | None = None
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Context) -> pb.OpenSessionResponse:
        if request.protocol_version != pb.PROTOCOL_VERSION_CURRENT:
            raise errors.Mismatch(
                f"the host speaks protocol {request.protocol_version}, "
                f"this agent ({agent_build()}) speaks {pb.PROTOCOL_VERSION_CURRENT}"
            )
        async with self._opening[request.session_id]:
            if request.session_id not in self._sessions:
                config = _session_config(request, self._config)
                session = await self._take_ahead(config)
                if session is None:
                    session = self._new_session(request.session_id, config)
                    await _begin(session, session.start())
                self._sessions[request.session_id] = session
        return pb.OpenSessionResponse(
            protocol_version=pb.PROTOCOL_VERSION_CURRENT,
            agent_build=agent_build(),
            contexts=self._sessions[request.session_id].contexts,
            running_cell=self._sessions[request.session_id].running_cell,
            capabilities=pb.SandboxCapabilities(
                python_version=platform.python_version(), fork=True, huge_pages=_huge_pages()
            ),
        )

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        session = self._sessions.pop(request.session_id, None)
        self._opening.pop(request.session_id, None)
        if session is not None:
            await session.close()
        return pb.CloseSessionResponse()

    async def PutContext(
        self, request_iterator: AsyncIterator[pb.PutContextRequest], context: Context
    ) -> pb.PutContextResponse:
        first = await anext(aiter(request_iterator), pb.PutContextRequest())
        header = first.header
        session = self._session(header.session_id)
        kind = CONTEXT_KINDS.get(header.kind)
        if kind is None or header.size_bytes > limits.MAX_CONTEXT:
            raise errors.Invalid("a context needs a kind, and a size within the limit")
        if header.shared_file:
            await session.inputs.put_context(header.index, kind, self._shared(header.shared_file))
            return pb.PutContextResponse()
        path = self._folders.incoming / f"{session.id}_{header.index}"
        try:
            await _receive(request_iterator, path, header.size_bytes)
            await session.inputs.put_context(header.index, kind, path)
        finally:
            path.unlink(missing_ok=True)
        return pb.PutContextResponse()

    async def PutFile(
        self, request_iterator: AsyncIterator[pb.PutFileRequest], context: Context
    ) -> pb.PutFileResponse:
        first = await anext(aiter(request_iterator), pb.PutFileRequest())
        header = first.header
        session = self._session(header.session_id)
        parts = PurePosixPath(header.path).parts
        if not parts or parts[0] == "/" or ".." in parts or len(header.path) > limits.MAX_PATH_CHARS:
            raise errors.Invalid(f"a file needs a path within the working folder, not {header.path!r}")
        if header.size_bytes > limits.MAX_FILE:
            raise errors.Invalid(f"a file has at most {limits.MAX_FILE:,} bytes")
        path = self._folders.incoming / secrets.token_hex(8)
        try:
            await _receive(request_iterator, path, header.size_bytes)
            await session.inputs.put_file(header.path, path)
        finally:
            path.unlink(missing_ok=True)
        return pb.PutFileResponse()

    async def BindNames(self, request: pb.BindNamesRequest, context: Context) -> pb.BindNamesResponse:
        session = self._session(request.session_id)
        bindings: list[list[str]] = []
        for each in request.bindings:
            kind = each.WhichOneof("kind")
            if kind is None or not each.name.isidentifier() or len(each.name) > limits.MAX_NAME_CHARS:
                raise errors.Invalid(f"not a name and its value: {each.name[:100]!r}")
            value = getattr(each, kind)
            text = value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else str(value)
            bindings.append([each.name, kind, text])
        await session.inputs.bind(request.request_id, bindings)
        return pb.BindNamesResponse()

    async def Connect(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> None:
        """Writes to the context itself, which takes half of the time that a generator takes."""
        host = self.new_host(GrpcResponses(context))
        hearing = asyncio.ensure_future(_hear(host, request_iterator))
        try:
            await host.tell_all()
        finally:
            hearing.cancel()
            host.leave()

    def new_host(self, responses: Responses) -> Host:
        return Host(self._session, responses)

    async def InterruptCell(
        self, request: pb.InterruptCellRequest, context: Context
    ) -> pb.InterruptCellResponse:
        self._session(request.session_id).interrupt_cell(request.cell_id)
        return pb.InterruptCellResponse()

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        session = self._session(request.session_id)
        async with self._opening[request.new_session_id]:
            if request.new_session_id not in self._sessions:
                new = self._new_session(request.new_session_id, session.config)
                await _begin(new, session.fork(new, request.call_id))
                self._sessions[request.new_session_id] = new
        return pb.ForkSessionResponse()

    async def ListVariables(
        self, request: pb.ListVariablesRequest, context: Context
    ) -> pb.ListVariablesResponse:
        found = await self._session(request.session_id).list_variables()
        return pb.ListVariablesResponse(
            variables=[pb.Variable(name=name, type=kind, repr=text) for name, kind, text in found]
        )

    async def ReadVariable(
        self, request: pb.ReadVariableRequest, context: Context
    ) -> pb.ReadVariableResponse:
        limit = min(request.max_bytes or limits.MAX_ANSWER, limits.MAX_ANSWER)
        kind, text, size = await self._session(request.session_id).read_variable(request.name, limit)
        return pb.ReadVariableResponse(type=kind, text=text, total_bytes=size)

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        if self._ahead is not None:
            await asyncio.wait([self._ahead])
        return pb.HealthResponse(agent_build=agent_build(), session_ids=sorted(self._sessions))

    async def Accept(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.AcceptRequest], context: Context
    ) -> None:
        await self._egress.accept(request_iterator, context)

    async def open_egress(self) -> None:
        if self._config.proxy_port:
            await self._egress.listen(self._config.proxy_port)

    async def close(self) -> None:
        await self._egress.close()
        ahead = await self._take_ahead(None)
        for session in (*self._sessions.values(), *([ahead] if ahead else [])):
            await session.close()

    def start_ahead(self) -> None:
        """Start the processes of the session that will be opened first, while nobody waits for them."""
        none = pb.OpenSessionRequest()
        session = self._new_session(secrets.token_hex(8), _session_config(none, self._config))
        self._ahead = asyncio.ensure_future(_begin(session, session.start()))

    async def _take_ahead(self, config: SessionConfig | None) -> Session | None:
        """The session that was started ahead, if it can be this one; only what its processes know matters."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        try:
            session = await asyncio.shield(ahead)
        except (errors.AgentError, OSError, SupervisorGone):
            return None
        if config is None:
            return session
        known = session.config
        if session.lost is not None or (config.env, config.limits) != (known.env, known.limits):
            await session.close()
            return None
        session.config = config
        return session

    def _session(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise errors.UnknownSession(f"no session {session_id!r}")
        return session

    def _new_session(self, session_id: str, config: SessionConfig) -> Session:
        if not SAFE_ID.fullmatch(session_id):
            raise errors.Invalid("a session id has 1 to 64 letters, digits, - and _")
        if len(self._sessions) >= limits.MAX_SESSIONS:
            raise errors.Invalid(f"at most {limits.MAX_SESSIONS} sessions in one agent")
        # A name that no other session can guess.
        places = Places(self._folders.work / session_id, self._folders.calls / secrets.token_hex(8))
        return Session(session_id, places, config, self._supervision)

    def _shared(self, name: str) -> Path:
        folder = self._folders.shared
        if folder is None or Path(name).name != name or not (folder / name).is_file():
            raise errors.Invalid(f"no file {name!r} is shared with this agent")
        return folder / name


async def _begin(session: Session, start: Coroutine[Any, Any, None]) -> Session:
    """A session that did not start leaves nothing behind."""
    try:
        await start
    except BaseException:
        await asyncio.shield(session.close())
        raise
    return session


async def _hear(host: Host, requests: AsyncIterator[pb.ConnectRequest]) -> None:
    async for request in requests:
        host.take(request)
    host.end(errors.SessionGone("the host closed the connection"))


class GrpcResponses:
    is_free = False
    """gRPC's own writing waits."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def write(self, response: pb.ConnectResponse) -> None:
        await self._context.write(response)

    def write_now(self, response: pb.ConnectResponse) -> bool:
        return False


async def _receive(requests: AsyncIterator[Any], path: Path, size: int) -> None:
    received = 0
    try:
        with os.fdopen(_new_private(path), "wb") as file:
            async for request in requests:
                received += len(request.chunk)
                if len(request.chunk) > limits.MAX_CHUNK or received > size:
                    raise errors.Invalid("more bytes than the header or the chunk limit allow")
                file.write(request.chunk)
    except OSError as error:
        why = f"after {received:,} of {size:,} bytes: {os.strerror(error.errno or 0)}"
        raise errors.Invalid(f"the sandbox can't store it ({why}); its disk may be too small") from None
    if received != size:
        raise errors.Invalid(f"the stream ended after {received:,} of {size:,} bytes")


def _new_private(path: Path) -> int:
    """In gVisor, other users can open what a process has open, if the file's own mode lets them."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _session_config(request: pb.OpenSessionRequest, config: AgentConfig) -> SessionConfig:
    asked = request.limits
    default = SessionConfig()
    memory = asked.memory_bytes if config.process_memory is None else config.process_memory
    return SessionConfig(
        output_bytes=min(asked.output_bytes, limits.MAX_OUTPUT_BYTES) or default.output_bytes,
        interrupt_grace=asked.interrupt_grace_ms / 1000 or default.interrupt_grace,
        limits=ProcessLimits(memory, config.processes, config.process_space),
        env={**egress.environment(config.proxy_port), **request.env},
    )


def _huge_pages() -> bool:
    with contextlib.suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return "[never]" not in text
    return False
