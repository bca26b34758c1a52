"""The events of one cell, numbered and kept, so that a host that lost its connection can go on reading."""

from collections.abc import Callable

from rlm_agent import limits
from rlm_agent.output import Capture
from rlm_agent.rpc.v1 import agent_pb2 as pb

Follower = Callable[[list[pb.CellEvent]], None]


class Cell:
    def __init__(self, cell_id: str, code: str, keep_bytes: int) -> None:
        self.id = cell_id
        self.code = code
        self.stdout = Capture(keep_bytes)
        self.stderr = Capture(keep_bytes)
        self.finished = False
        self._events: list[pb.CellEvent] = []
        self._follower: Follower | None = None
        self._told = 0
        """Events that the follower has been given."""

    def write_stdout(self, data: bytes) -> None:
        if live := self.stdout.feed(data, live=self._may_stream()):
            self._add(pb.CellEvent(stdout=live))

    def write_stderr(self, data: bytes) -> None:
        if live := self.stderr.feed(data, live=self._may_stream()):
            self._add(pb.CellEvent(stderr=live))

    def call_started(self, call_id: str) -> None:
        if self._may_stream():
            self._add(pb.CellEvent(call_started=pb.CallStarted(call_id=call_id)))

    def call_ended(self, call_id: str, *, ok: bool, was_last: bool) -> None:
        """The end of the only open call is told with what comes next: mostly that is another call, and a
        message of its own would be in that one's way."""
        if self._may_stream():
            self._add(pb.CellEvent(call_ended=pb.CallEnded(call_id=call_id, ok=ok)), at_once=not was_last)

    def finish(self, result: pb.CellFinished) -> None:
        result.stdout.total_bytes, result.stdout.tail = self.stdout.total, self.stdout.tail
        result.stderr.total_bytes, result.stderr.tail = self.stderr.total, self.stderr.tail
        self.finished = True
        self._add(pb.CellEvent(finished=result))

    def follow(self, start: int, follower: Follower) -> None:
        """Give it the events from index start on, and those that come; it takes the place of another one."""
        self._follower, self._told = follower, start
        self._pass_on()

    def unfollow(self, follower: Follower) -> None:
        if self._follower == follower:
            self._follower = None

    def _pass_on(self) -> None:
        if self._follower is not None and (untold := self._events[self._told :]):
            self._told = len(self._events)
            self._follower(untold)

    def _may_stream(self) -> bool:
        return not self.finished and len(self._events) < limits.MAX_EVENTS

    def _add(self, event: pb.CellEvent, *, at_once: bool = True) -> None:
        event.cell_id, event.index = self.id, len(self._events)
        self._events.append(event)
        if at_once:
            self._pass_on()
