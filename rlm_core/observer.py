"""What can be watched while a run goes on. Every method may be left out."""

import logging
from collections.abc import Callable
from typing import Any, cast

from rlm_core.cell import CellResult
from rlm_core.types import RLMChatCompletion, RLMIteration


class Observer:
    """Called in the library's event loop, so it must return at once. What it raises is logged and harms
    nothing."""

    def run_started(self, question: str, run_id: str) -> None: ...

    def turn_started(self, turn: int, turns: int) -> None: ...

    def cell_started(self, code: str) -> None: ...

    def output(self, text: str, *, is_error: bool) -> None: ...

    def calls_changed(self, in_flight: int, made: int) -> None: ...

    def cell_ended(self, result: CellResult) -> None: ...

    def turn_ended(self, iteration: RLMIteration, turn: int, tokens: int) -> None: ...

    def run_ended(self, completion: RLMChatCompletion) -> None: ...

    def run_failed(self, error: BaseException) -> None: ...


def isolated(observer: Observer) -> Observer:
    """The same observer, whose exceptions go to the log."""
    return cast(Observer, _Isolated(observer))


class _Isolated:
    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._observer, name)

        def call(*args: Any, **kwargs: Any) -> None:
            try:
                method(*args, **kwargs)
            except Exception:
                logging.getLogger("rlm_core.observer").exception("%s of an observer failed", name)

        return call
