"""One check: a name, what it shows in words, and the code that shows it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlm_core.conformance.arena import Arena

Run: TypeAlias = Callable[[Arena], Awaitable[None]]


class CheckFailed(AssertionError):
    """What was expected, and what came."""


class NotApplicable(Exception):
    """Why there is nothing to check: the environment says that it does not do this."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    """`group.what`, the same in every version."""
    says: str
    """What holds when it passes."""
    run: Run

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


class Refused(Exception):
    """The environment says of a field of the policy, by its name, that it can't hold it."""


CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Run], Run]:
    """Register a check; the first line of its docstring is what it shows."""

    def register(run: Run) -> Run:
        CHECKS[name] = Check(name, (run.__doc__ or "").partition("\n")[0], run)
        return run

    return register


def expect(found: Any, wanted: Any, what: str = "") -> None:
    """Raises CheckFailed when they differ."""
    if found != wanted:
        raise CheckFailed(f"{what or 'the result'}: expected {_short(wanted)}, got {_short(found)}")


def ensure(holds: object, what: str) -> None:
    """Raises CheckFailed with `what` went wrong."""
    if not holds:
        raise CheckFailed(what)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-60:]}"
