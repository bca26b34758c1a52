"""Checks of what callers pass: one clear line for each mistake, before anything starts."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlm_core.errors import ConfigError
from rlm_core.logger import RLMLogger
from rlm_core.observer import Observer
from rlm_core.pool import SandboxPool


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raises ConfigError for a value of none of these types; `type(None)` is None."""
    if not isinstance(value, kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} must be {expected}, not {type(value).__name__}")


def check_number(
    name: str, value: object, least: float, *, whole: bool = True, optional: bool = True
) -> None:
    """Raises ConfigError for what is no number, less than `least`, or `least` itself if it is not whole."""
    if value is None and optional:
        return
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "int" if whole else "a number"
        none = " or None" if optional else ""
        raise ConfigError(f"{name} must be {expected}{none}, not {type(value).__name__}")
    if not math.isfinite(value) or value < least or (not whole and not value > least):
        raise ConfigError(f"{name} must be {'at least' if whole else 'more than'} {least:g}, not {value}")


def check_choice(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r:.80}")


def check_callable(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be a function or None, not {type(value).__name__}")


Rule = Callable[[str, object], None]


def _a(*kinds: type) -> Rule:
    return lambda name, value: check_type(name, value, *kinds)


def _number(least: float, *, whole: bool = True, optional: bool = True) -> Rule:
    return lambda name, value: check_number(name, value, least, whole=whole, optional=optional)


def _one_of(*choices: str) -> Rule:
    return lambda name, value: check_choice(name, value, *choices)


def _share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be a number above 0 and at most 1, not {value!r:.80}")


NONE = type(None)
RULES: dict[str, Rule] = {
    "backend_kwargs": _a(Mapping, NONE),
    "environment_kwargs": _a(Mapping, NONE),
    "other_backends": _a(list, tuple, NONE),
    "depth": _number(0, optional=False),
    "max_depth": _number(0, optional=False),
    "max_iterations": _number(1, optional=False),
    "max_budget": _number(0, whole=False),
    "max_timeout": _number(0, whole=False),
    "max_tokens": _number(1),
    "max_calls": _number(1),
    "max_errors": _number(1),
    "max_concurrent_subcalls": _number(1, optional=False),
    "max_concurrent_calls": _number(1, optional=False),
    "on_limit": _one_of("raise", "return"),
    "child_isolation": _one_of("fork", "sandbox"),
    "persistent": _a(bool),
    "compaction": _a(bool),
    "compaction_threshold_pct": _share,
    "custom_tools": _a(Mapping, NONE),
    "custom_sub_tools": _a(Mapping, NONE),
    "custom_system_prompt": _a(str, NONE),
    "user_prologue": _a(str, NONE),
    "cache": _a(str, Path, NONE),
    "cache_scope": _a(str, NONE),
    "logger": _a(RLMLogger, NONE),
    "observer": _a(Observer, NONE),
    "pool": _a(SandboxPool, NONE),
    "on_subcall_start": check_callable,
    "on_subcall_complete": check_callable,
    "on_iteration_start": check_callable,
    "on_iteration_complete": check_callable,
}
"""Of the arguments of `RLM`."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first that is wrong."""
    for name, rule in RULES.items():
        rule(name, arguments[name])
    if arguments["cache_scope"] is not None and arguments["cache"] is None:
        raise ConfigError("cache_scope goes with cache, the path of a file")
    pool, environment = arguments["pool"], arguments["environment"]
    if pool is not None and environment not in ("local", pool.name):
        raise ConfigError(f"the pool is of environment {pool.name!r}, not {environment!r}")
    if pool is not None and arguments["environment_kwargs"]:
        raise ConfigError("environment_kwargs: give the policy to the pool, whose sandboxes are used")
