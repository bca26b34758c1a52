"""What one run used and asked; a child's is part of its parent's."""

from dataclasses import replace

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.broker.usage import UsageMeter
from rlm_core.types import RLMChatCompletion, TokenUsage, UsageSummary

FAILED_PROMPT_CHARS = 1_000
"""Of the prompt of a call that failed, in the record of its cell."""
MAX_FAILURES = 1_000
"""Failed calls in a row of one cell, beyond which no further ones are recorded."""


class Account:
    def __init__(self, parent: "Account | None" = None) -> None:
        self._parent = parent
        self._meter = UsageMeter()
        self._of_cell: dict[tuple[str, str], list[RLMChatCompletion]] = {}

    def add(self, model: str, usage: TokenUsage) -> None:
        self._meter.add(model, usage)
        if self._parent is not None:
            self._parent.add(model, usage)

    def usage(self) -> UsageSummary:
        """Its children's included."""
        return self._meter.summary()

    def remember(self, call: Call, result: Answer | Failure, seconds: float) -> None:
        """For the record of the call's cell."""
        records = self._of_cell.setdefault((call.session_id, call.cell_id), [])
        failed = isinstance(result, Failure)
        if failed and sum(record.error is not None for record in records[-MAX_FAILURES:]) == MAX_FAILURES:
            return  # a cell can make as many calls that cost nothing as it likes
        records.append(_record(call, result, seconds))

    def take_records(self, session_id: str, cell_id: str) -> list[RLMChatCompletion]:
        return self._of_cell.pop((session_id, cell_id), [])


def _record(call: Call, result: Answer | Failure, seconds: float) -> RLMChatCompletion:
    if result.child is not None:  # whose prompt costs nothing by itself
        return replace(result.child, prompt=_cut(call.prompt))
    if isinstance(result, Failure):
        prompt, usage = _cut(call.prompt), UsageSummary()
        return RLMChatCompletion(
            call.model or "", prompt, "", usage, seconds, error=result.message, status="failed"
        )
    meter = UsageMeter()
    meter.add(result.model, result.usage)
    return RLMChatCompletion(result.model, call.prompt, result.text, meter.summary(), seconds)


def _cut(prompt: str) -> str:
    left_out = len(prompt) - FAILED_PROMPT_CHARS
    return f"{prompt[:FAILED_PROMPT_CHARS]}… [{left_out:,} more characters]" if left_out > 0 else prompt
