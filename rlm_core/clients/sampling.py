"""The caller's `sampling_args`, which go to a provider as they are, but for what a call is made of."""

import json
from collections.abc import Mapping
from typing import Any

from rlm_core.errors import ConfigError

OURS = frozenset(
    {
        *("model", "messages", "input", "contents", "system", "system_instruction", "instructions"),
        *("stream", "stream_options", "background", "previous_response_id", "conversation"),
        *("n", "best_of", "candidate_count"),
        *("tools", "tool_choice", "functions", "function_call"),
    }
)
LENGTHS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens"})


def refuse_ours(args: Mapping[str, Any] | None) -> None:
    """A call is one request for one text, which is what its budget reserves.

    Raises:
        ConfigError: an argument that would make it another.
    """
    extra = (args or {}).get("extra_body")
    inside = extra.keys() & (OURS | LENGTHS) if isinstance(extra, Mapping) else frozenset()
    if taken := sorted(((args or {}).keys() & OURS) | inside):
        raise ConfigError(f"sampling_args can't have {', '.join(taken)}: a call is one request for one text")


def json_size(args: Mapping[str, Any]) -> int:
    """An upper bound of the tokens that they add to a prompt, as a schema for the answer does."""
    return len(json.dumps(args, default=str).encode())
