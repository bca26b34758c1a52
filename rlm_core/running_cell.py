"""Collects the events of the cell that runs, in order, until it has a result."""

import asyncio
import codecs
from functools import cached_property

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.cell import CellError, CellResult
from rlm_core.errors import SandboxLost
from rlm_core.observer import Observer
from rlm_core.text import told

STATUSES = {
    pb.CELL_STATUS_OK: "ok",
    pb.CELL_STATUS_ERROR: "error",
    pb.CELL_STATUS_INTERRUPTED: "interrupted",
    pb.CELL_STATUS_TIMEOUT: "timeout",
    pb.CELL_STATUS_ROLLED_BACK: "rolled_back",
}


class RunningCell:
    def __init__(self, request: pb.ExecuteCell, observer: Observer) -> None:
        self.id = request.cell_id
        self._ended = asyncio.Event()
        self._outcome: CellResult | SandboxLost | None = None
        self._request = request
        self._events = 0
        self._stdout = _Stream(observer, is_error=False)
        self._stderr = _Stream(observer, is_error=True)

    async def result(self) -> CellResult:
        """When it has ended. Raises SandboxLost when its session is lost before."""
        await self._ended.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, SandboxLost):
            raise self._outcome
        return self._outcome

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def end(self, outcome: CellResult | SandboxLost) -> None:
        """The first outcome stays."""
        if not self.has_ended:
            self._outcome = outcome
            self._ended.set()

    def continuation(self) -> pb.ExecuteCell:
        """The same request, from the first event that has not arrived."""
        request = pb.ExecuteCell()
        request.CopyFrom(self._request)
        request.from_event = self._events
        return request

    def take(self, event: pb.CellEvent) -> None:
        """Raises SandboxLost for events out of order, or beyond the limit."""
        if event.cell_id != self.id:
            raise SandboxLost("the agent told of a cell that is not running")
        if event.index < self._events:
            return
        if event.index > self._events:
            raise SandboxLost("the agent left out events of a cell")
        if self.has_ended:
            raise SandboxLost("the agent told of a cell that has ended")
        self._events += 1
        kind = event.WhichOneof("kind")
        if kind == "stdout":
            self._stdout.add(event.stdout)
        elif kind == "stderr":
            self._stderr.add(event.stderr)
        elif kind == "finished":
            self.end(self._finish(event.finished))

    def _finish(self, end: pb.CellFinished) -> CellResult:
        return CellResult(
            cell_id=self.id,
            status=STATUSES.get(end.status, "error"),
            stdout=self._stdout.whole(end.stdout),
            stderr=self._stderr.whole(end.stderr),
            stdout_bytes=end.stdout.total_bytes,
            stderr_bytes=end.stderr.total_bytes,
            error=_error_of(end.error) if end.HasField("error") else None,
            rollback=told(end.rollback_detail) if end.status == pb.CELL_STATUS_ROLLED_BACK else None,
            answer_ready=end.answer_ready,
            answer=end.answer_content.decode("utf-8", "replace"),
            no_checkpoint=told(end.no_checkpoint) or None,
            notices=tuple(told(notice) for notice in end.notices[: limits.MAX_NOTICES]),
            variables={told(each.name): told(each.type) for each in end.variables[: limits.MAX_VARIABLES]},
            seconds=end.wall_us / 1e6,
        )


def _error_of(error: pb.CellError) -> CellError:
    limit = limits.MAX_ERROR_CHARS
    return CellError(told(error.type), error.message[:limit], error.traceback[:limit])


class _Stream:
    """The head of stdout or stderr as it arrives, and head and tail once the cell has ended."""

    def __init__(self, observer: Observer, *, is_error: bool) -> None:
        self._observer = observer
        self._is_error = is_error
        self._head = bytearray()

    @cached_property
    def _decoder(self) -> codecs.IncrementalDecoder:
        """Most cells print nothing."""
        return codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        self._head += data
        if len(self._head) > limits.MAX_OUTPUT:
            raise SandboxLost("the agent streamed more output than it may")
        if text := self._decoder.decode(data):
            self._observer.output(text, is_error=self._is_error)

    def whole(self, tail: pb.OutputTail) -> str:
        left_out = tail.total_bytes - len(self._head) - len(tail.tail)
        if left_out <= 0:
            return (bytes(self._head) + tail.tail).decode("utf-8", "replace")
        head, end = self._head.decode("utf-8", "replace"), tail.tail.decode("utf-8", "replace")
        return f"{head}\n… [{left_out:,} of {tail.total_bytes:,} bytes left out] …\n{end}"
