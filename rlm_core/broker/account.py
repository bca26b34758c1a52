"""What one run used and asked; a child's is part of its parent's."""

from collections import Counter
from dataclasses import replace

from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.broker.usage import UsageMeter
from rlm_core.types import RLMChatCompletion, TokenUsage, UsageSummary

FREE_PROMPT_CHARS = 1_000
"""Of the prompt of a call that cost nothing, in the record of its cell."""
MAX_FREE = 1_000
"""Calls of one cell that cost nothing, beyond which no further ones are recorded."""


class Account:
    def __init__(self, parent: "Account | None" = None) -> None:
        self._parent = parent
        self._meter = UsageMeter()
        self._of_cell: dict[tuple[str, str], list[RLMChatCompletion]] = {}
        self._free: Counter[tuple[str, str]] = Counter()

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
        if _is_free(result):
            self._free[call.session_id, call.cell_id] += 1
            if self._free[call.session_id, call.cell_id] > MAX_FREE:
                return  # a cell can make as many calls that cost nothing as it likes
        records.append(_record(call, result, seconds))

    def take_records(self, session_id: str, cell_id: str) -> list[RLMChatCompletion]:
        self._free.pop((session_id, cell_id), None)
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
    prompt = _cut(call.prompt) if _is_free(result) else call.prompt
    return RLMChatCompletion(result.model, prompt, result.text, meter.summary(), seconds)


def _is_free(result: Answer | Failure) -> bool:
    """Whether it cost nothing: it failed, or was kept on disk."""
    return isinstance(result, Failure) or (result.child is None and result.usage == TokenUsage(cost=0.0))


def _cut(prompt: str) -> str:
    left_out = len(prompt) - FREE_PROMPT_CHARS
    return f"{prompt[:FREE_PROMPT_CHARS]}… [{left_out:,} more characters]" if left_out > 0 else prompt
