"""Turns what a worker said of a cell, or how it died, into the result the host gets.

A worker runs hostile code: each field is taken only in its own type, and cut to its limit.
"""

import signal
from dataclasses import dataclass
from typing import Any

from rlm_agent import limits
from rlm_agent.frames import Frame
from rlm_agent.rpc.v1 import agent_pb2 as pb

TEXT_CHARS = 64 << 10
STATUSES = {"ok": pb.CELL_STATUS_OK, "error": pb.CELL_STATUS_ERROR, "interrupted": pb.CELL_STATUS_ERROR}
INTERRUPTED = {"timeout": pb.CELL_STATUS_TIMEOUT, "interrupt": pb.CELL_STATUS_INTERRUPTED}


@dataclass(frozen=True, slots=True)
class Death:
    """How the process of a cell died."""

    reason: pb.RollbackReason.ValueType
    detail: str

    @classmethod
    def from_header(cls, died: dict[str, Any], interrupt_reason: str, *, no_memory: bool = False) -> "Death":
        number, code = died.get("signal"), died.get("exit")
        if interrupt_reason and number == signal.SIGKILL:
            reason = {
                "timeout": pb.ROLLBACK_REASON_TIMEOUT,
                "interrupt": pb.ROLLBACK_REASON_INTERRUPT,
            }[interrupt_reason]
            return cls(reason, f"it did not stop on SIGINT ({interrupt_reason})")
        if no_memory and number == signal.SIGKILL:
            return cls(pb.ROLLBACK_REASON_MEMORY, "it took more memory than the sandbox has")
        if died.get("link"):
            return cls(pb.ROLLBACK_REASON_LINK, "it closed or replaced file descriptors of the REPL")
        if died.get("broken"):
            return cls(pb.ROLLBACK_REASON_EXIT, "it left the REPL's process unable to run another cell")
        if isinstance(number, int):
            return cls(pb.ROLLBACK_REASON_SIGNAL, _signal_name(number))
        return cls(pb.ROLLBACK_REASON_EXIT, f"exit code {code if isinstance(code, int) else '?'}")


def describe_death(death: Death) -> str:
    return death.detail


def rolled_back_cell(death: Death) -> pb.CellFinished:
    return pb.CellFinished(
        status=pb.CELL_STATUS_ROLLED_BACK, rollback=death.reason, rollback_detail=death.detail
    )


def late_rollback(death: Death, *, is_undone: bool) -> str:
    """What is told where cells that had ended are undone, too: beside the running one's end, or alone."""
    if is_undone:
        return (
            "Earlier cells had no checkpoint of their own: what they had assigned is undone, too, and "
            "variables are as they were before those."
        )
    return (
        f"The REPL's process died after an earlier cell had ended ({describe_death(death)}); "
        "variables are as they were before that cell."
    )


def finished_cell(frame: Frame, interrupt_reason: str) -> pb.CellFinished:
    header = frame.header
    status = STATUSES.get(str(header.get("status")), pb.CELL_STATUS_ERROR)
    if header.get("status") == "interrupted" and interrupt_reason:
        status = INTERRUPTED[interrupt_reason]
    result = pb.CellFinished(
        status=status,
        answer_ready=header.get("ready") is True,
        answer_content=frame.body[: limits.MAX_ANSWER],
        no_checkpoint=text_of(header.get("no_checkpoint"), 200),
        notices=[text_of(notice, 500) for notice in _list(header.get("notices"))[: limits.MAX_NOTICES]],
    )
    variables = header.get("variables")
    if isinstance(variables, dict):
        for name, kind in list(variables.items())[: limits.MAX_VARIABLES]:
            result.variables.add(
                name=text_of(name, limits.MAX_NAME_CHARS), type=text_of(kind, limits.MAX_NAME_CHARS)
            )
    error = header.get("error")
    if isinstance(error, dict):
        result.error.type = text_of(error.get("type"), 200)
        result.error.message = text_of(error.get("message"), TEXT_CHARS)
        result.error.traceback = text_of(error.get("traceback"), TEXT_CHARS)
    return result


def text_of(value: object, limit: int) -> str:
    """A str field of the wire is UTF-8: lone surrogates become visible escapes."""
    text = value if isinstance(value, str) else ""
    return text[:limit].encode("utf-8", "backslashreplace").decode()


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
