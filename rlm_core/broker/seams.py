"""Where policy and journal join the broker; what is here is the least that each can be."""

import hashlib
from collections import defaultdict
from typing import Protocol

from rlm_core.broker.call import Answer, Call
from rlm_core.errors import CallFailed


class Policy(Protocol):
    def check(self, call: Call) -> None:
        """Raise CallFailed for a call that must not be made."""


class Journal(Protocol):
    def recorded(self, call: Call) -> Answer | None:
        """An answer that was paid for already and that this call may take; it is given once."""

    def begin(self, call: Call) -> None:
        """Write the intent down, before the call is sent."""

    def end(self, call: Call, answer: Answer) -> None:
        """Write the answer down, before the cell gets it."""

    def cell_ended(self, session_id: str, cell_id: str, *, ok: bool) -> None:
        """What a cell had bought that did not end well is there again for the same questions."""


class KnownKinds:
    """Policy: llm calls, and rlm calls which at the last depth are llm calls."""

    def check(self, call: Call) -> None:
        if call.kind not in ("llm", "rlm"):
            raise CallFailed("INVALID", f"unknown kind of call {call.kind!r}")


Question = tuple[str, str, str | None, bytes]
"""Of a session, so that no child can answer in its parent's place; the prompt by its hash: a cell may ask a
lot."""


class MemoryJournal:
    """Journal: for the life of a run, in memory.

    What a cell bought that died, raised or was interrupted is not bought again when it is asked again.
    """

    def __init__(self) -> None:
        self._by_cell: defaultdict[tuple[str, str], list[tuple[Question, Answer]]] = defaultdict(list)
        self._free: defaultdict[Question, list[Answer]] = defaultdict(list)

    def recorded(self, call: Call) -> Answer | None:
        answers = self._free.get(_question(call))
        return answers.pop(0) if answers else None

    def begin(self, call: Call) -> None:
        return None

    def end(self, call: Call, answer: Answer) -> None:
        self._by_cell[call.session_id, call.cell_id].append((_question(call), answer))

    def cell_ended(self, session_id: str, cell_id: str, *, ok: bool) -> None:
        bought = self._by_cell.pop((session_id, cell_id), [])
        if not ok:
            for question, answer in bought:
                self._free[question].append(answer)


def _question(call: Call) -> Question:
    digest = hashlib.sha256(call.prompt.encode("utf-8", "surrogatepass")).digest()
    return call.session_id, call.kind, call.model, digest
