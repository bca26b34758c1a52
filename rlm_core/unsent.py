"""Answers of one session that are on their way to its agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits


class Unsent:
    """Those that the agent has not taken from the stream yet, by call."""

    def __init__(self) -> None:
        self._of_call: dict[str, pb.CallReply] = {}
        self._bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._late = asyncio.Semaphore(max(1, limits.MAX_UNSENT_BYTES // limits.MAX_REPLY))

    def __len__(self) -> int:
        return len(self._of_call)

    @contextlib.asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """For a call that begins. While too many bytes wait, none does; then only as many of those that have
        come meanwhile at once as have room for the largest answers. An agent that reads nothing gets no
        further answers, beyond those to the calls that had begun by then.
        """
        if self._has_room.is_set():
            yield
            return
        async with self._late:
            await self._has_room.wait()
            yield

    def add(self, call_id: str, reply: pb.CallReply) -> None:
        self._remove(call_id)
        self._of_call[call_id] = reply
        self._bytes += len(reply.answer.text)
        self._signal()

    def take(self) -> pb.CallReplies:
        """The next that go together: a message costs more than what it carries."""
        batch, size = pb.CallReplies(), 0
        while (
            self._of_call and size < limits.MAX_BATCH_BYTES and len(batch.replies) < limits.MAX_BATCH_MESSAGES
        ):
            reply = self._remove(next(iter(self._of_call)))
            batch.replies.append(reply)
            size += reply.ByteSize()
        self._signal()
        return batch

    def clear(self) -> None:
        self._of_call.clear()
        self._bytes = 0
        self._signal()

    def _remove(self, call_id: str) -> pb.CallReply:
        reply = self._of_call.pop(call_id, _NONE)
        self._bytes -= len(reply.answer.text)
        return reply

    def _signal(self) -> None:
        if self._bytes > limits.MAX_UNSENT_BYTES:
            self._has_room.clear()
        else:
            self._has_room.set()


_NONE = pb.CallReply()
