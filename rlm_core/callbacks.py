"""Functions of the user's that are told how a run goes on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlm_core.foreign import Places

log = logging.getLogger("rlm_core.callbacks")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Names and arguments are those of the original library; each may be a coroutine function too."""

    on_subcall_start: Callable[[int, str, str], Any] | None = None
    """Depth, model, first characters of the prompt, of a child run."""
    on_subcall_complete: Callable[[int, str, float, str | None], Any] | None = None
    """Depth, model, seconds, error or None, of a child run."""
    on_iteration_start: Callable[[int, int], Any] | None = None
    """Depth (0 is the root's) and turn, from 1."""
    on_iteration_complete: Callable[[int, int, float], Any] | None = None
    """Depth, turn and seconds."""

    async def call(self, name: str, *arguments: Any) -> None:
        """In a thread, so that one that takes its time holds up nothing but its own run. What it raises is
        logged, and harms nothing."""
        function = getattr(self, name)
        if function is None:
            return
        try:
            await Places(1).call(function, *arguments)
        except Exception:
            log.exception("%s failed", name)
