"""Runs checks against an environment, and what came of each."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from rlm_core.conformance import checks
from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import CHECKS, Check, NotApplicable, Refused
from rlm_core.environment import Environment
from rlm_core.errors import ConfigError
from rlm_core.text import one_line, printable

assert checks.__all__  # importing them is what registers them
CHECK_SECONDS = 180.0
CLOUD_CHECK_SECONDS = 1_800.0
"""Where a first use may build an image."""
Status = Literal["passed", "failed", "known failure", "fixed", "not applicable", "refused"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`fixed` is a known failure that passes: the environment has to strike it off its list."""

    check: Check
    status: Status
    detail: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status not in ("failed", "fixed")


def select(patterns: Iterable[str] = ()) -> list[Check]:
    """The checks whose name matches one of these shell patterns; all when there are none.

    Raises:
        ConfigError: a pattern that no check matches.
    """
    wanted = [f"{each}.*" if each in groups() else each for each in patterns]
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in CHECKS):
            raise ConfigError(f"no check is named {pattern!r}; groups: {', '.join(groups())}")
    return [each for each in CHECKS.values() if not wanted or any(fnmatch(each.name, p) for p in wanted)]


def groups() -> list[str]:
    return list(dict.fromkeys(each.group for each in CHECKS.values()))


def allow(environment: type[Environment]) -> None:
    """Raises ConfigError when a known failure is of a check that there is not: it would hide nothing."""
    if unknown := sorted(environment.known_failures.keys() - CHECKS.keys()):
        raise ConfigError(f"known_failures of {environment.name!r}: no check is named {', '.join(unknown)}")


async def run_one(check: Check, arena: Arena) -> Outcome:
    """Run a check; never raises for one that fails."""
    kind = type(arena.environment)
    known = kind.known_failures.get(check.name)
    began = time.monotonic()
    detail = ""
    try:
        async with asyncio.timeout(CLOUD_CHECK_SECONDS if kind.capabilities.costs_money else CHECK_SECONDS):
            await check.run(arena)
        status: Status = "passed" if known is None else "fixed"
    except Refused as error:
        status, detail = "refused", str(error)
    except NotApplicable as error:
        status, detail = "not applicable", str(error)
    except Exception as error:  # noqa: BLE001 - whatever an environment raises is its failure
        await arena.aclose()  # it may have left its sandbox in any state
        status = "failed" if known is None else "known failure"
        detail = known or one_line(printable(f"{type(error).__name__}: {error}"), 500)
    return Outcome(check, status, detail, time.monotonic() - began)


async def run(
    name: str,
    kwargs: Mapping[str, Any],
    patterns: Iterable[str] = (),
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the checks against the environment of this name, and tell of each as it ends.

    Raises:
        ConfigError: there is no such environment, field or check.
        RLMError: no sandbox starts there.
    """
    chosen = select(patterns)
    arena = Arena(name, kwargs)
    allow(type(arena.environment))
    outcomes: list[Outcome] = []
    try:
        await arena.sandbox()  # where none starts, that is all there is to say
        for each in chosen:
            outcomes.append(await run_one(each, arena))
            told(outcomes[-1])
    finally:
        await arena.aclose()
    return outcomes
