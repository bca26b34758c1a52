"""Answers of one session that are on their way to its agent."""

import asyncio

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits


class Unsent:
    """Those that the agent has not taken from the stream yet, by call. While they are too many bytes, no
    further call begins: an agent that reads nothing gets no more answers, and one that reads goes on.
    """

    def __init__(self) -> None:
        self._of_call: dict[str, pb.CallReply] = {}
        self._bytes = 0
        self.has_room = asyncio.Event()
        self.has_room.set()

    def __len__(self) -> int:
        return len(self._of_call)

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
        reply = self._of_call.pop(call_id, pb.CallReply())
        self._bytes -= len(reply.answer.text)
        return reply

    def _signal(self) -> None:
        if self._bytes > limits.MAX_UNSENT_BYTES:
            self.has_room.clear()
        else:
            self.has_room.set()
