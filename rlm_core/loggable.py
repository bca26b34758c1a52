"""What a log may show of the arguments of a run."""

from collections.abc import Mapping
from typing import Any

from rlm_core.text import without_userinfo

LOGGED_KWARGS = frozenset({"model_name", "context_window", "timeout"})
LOGGED_FIELDS = frozenset({"cell_timeout", "memory", "interrupt_grace", "output_bytes", "network"})


def loggable(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An allow-list: what is not on it is named, and never shown."""
    return {key: _loggable_value(key, value) for key, value in kwargs.items()}


def _loggable_value(key: str, value: Any) -> Any:
    if key in LOGGED_KWARGS | LOGGED_FIELDS:
        return value
    if key == "base_url" and isinstance(value, str):
        return without_userinfo(value)
    if key == "sampling_args" and isinstance(value, Mapping):
        numbers = (int, float, bool, type(None))
        return {k: v if isinstance(v, numbers) else f"<{type(v).__name__}>" for k, v in value.items()}
    return f"<{type(value).__name__}>"
