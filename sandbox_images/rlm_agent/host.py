"""The host at the other end of one `AgentService.Connect`: what it says, and what it is told."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NoReturn, Protocol

from rlm_agent import errors, limits
from rlm_agent.cell import Cell
from rlm_agent.rpc.v1 import agent_pb2 as pb
from rlm_agent.session import Outgoing, Session

SHORT_BYTES = 32 << 10
"""What is longer can wait for a turn of the loop."""


class Responses(Protocol):
    """Where a host is written to: by gRPC, or by a stream of ours."""

    async def write(self, response: pb.ConnectResponse, /) -> None: ...

    @property
    def is_free(self) -> bool:
        """Whether something can be written at once."""
        ...

    def write_now(self, response: pb.ConnectResponse, /) -> bool:
        """Whether it could be handed on at once; else nothing has been done."""
        ...


class Host:
    def __init__(self, find_session: Callable[[str], Session], responses: Responses) -> None:
        """`find_session` raises UnknownSession."""
        self._find_session = find_session
        self._responses = responses
        self._waiting: deque[Outgoing] = deque()
        self._wake = asyncio.Event()
        self._session: Session | None = None
        self._cell: Cell | None = None
        self._is_over = False

    def take(self, request: pb.ConnectRequest) -> None:
        """What it says; what is wrong with that ends the connection."""
        if self._is_over:
            return
        try:
            self._take(request)
        except Exception as error:  # noqa: BLE001 - the host is told of it
            self.end(error)

    def tell(self, message: Outgoing) -> None:
        """Soon, together with what else there is to tell by then."""
        self._waiting.append(message)
        self._wake.set()

    async def tell_all(self) -> NoReturn:
        """Whatever has its turn, until an error has: that is raised, and the end."""
        while True:
            await self._tell_waiting()

    def end(self, error: Exception) -> None:
        """Tell nothing more but this, and what waits before it."""
        self._is_over = True
        self.tell(error)

    def leave(self) -> None:
        """The connection is gone; the session stays, and the cell goes on."""
        self._is_over = True
        if self._session is not None:
            self._session.detach(self.tell)
        if self._cell is not None:
            self._cell.unfollow(self._tell_events)

    def _take(self, request: pb.ConnectRequest) -> None:
        kind = request.WhichOneof("message")
        if self._session is None:
            self._session = self._find_session(request.attach.session_id)
            self._session.attach(self.tell)
        elif kind == "replies":
            if len(request.replies.replies) > limits.MAX_BATCH_MESSAGES:
                raise errors.Invalid(f"at most {limits.MAX_BATCH_MESSAGES} answers come together")
            for reply in request.replies.replies:
                self._session.calls.reply(reply)
        elif kind == "execute":
            self._cell = self._session.execute(request.execute)
            self._cell.follow(request.execute.from_event, self._tell_events)
        else:
            raise errors.Invalid("unexpected message on Connect")

    def _tell_events(self, events: list[pb.CellEvent]) -> None:
        for event in events:
            self.tell(pb.AgentMessage(event=event))
        if events[-1].HasField("finished"):
            self._tell_now()

    def _tell_now(self) -> None:
        """Whatever waits, if it can be written at once: who waits for a cell is spared a turn of the loop."""
        if not self._responses.is_free or len(self._waiting) > limits.MAX_BATCH_MESSAGES:
            return
        messages = [each for each in self._waiting if isinstance(each, pb.AgentMessage)]
        is_all = len(messages) == len(self._waiting)
        if not is_all or sum(each.ByteSize() for each in messages) > SHORT_BYTES:
            return
        if self._responses.write_now(pb.ConnectResponse(messages=messages)):
            self._waiting.clear()
            self._wake.clear()

    async def _tell_waiting(self) -> None:
        """Wait for something to send, and send all that is there, in messages of a bounded size."""
        await self._wake.wait()
        response, size = pb.ConnectResponse(), 0
        waiting = [self._waiting.popleft() for _ in range(min(len(self._waiting), limits.MAX_BATCH_MESSAGES))]
        error: Exception | None = None
        for each in waiting:
            if isinstance(each, Exception):
                error = each
                break
            message = each if isinstance(each, pb.AgentMessage) else each()
            if message is None:
                continue
            if size and size + message.ByteSize() > limits.MAX_BATCH_BYTES:
                await self._responses.write(response)
                response, size = pb.ConnectResponse(), 0
            response.messages.append(message)
            size += message.ByteSize()
        if response.messages:
            await self._responses.write(response)
        if error is not None:
            raise error
        if not self._waiting:
            self._wake.clear()
