"""What OpenAI's SDK and its relatives give back, as ours."""

from typing import Any

import openai

from rlm_core.clients.base import LMResponse
from rlm_core.clients.failures import Peer
from rlm_core.errors import ProviderError
from rlm_core.types import TokenUsage


def of_completion(completion: Any, model: str) -> LMResponse:
    """Of chat completions.

    Raises:
        TypeError, AttributeError, LookupError: it is none.
    """
    choice = completion.choices[0]
    content: Any = choice.message.content
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str | None):
        raise TypeError("content is not text")
    usage = _usage(completion.usage, "prompt_tokens", "completion_tokens")
    return LMResponse(content or "", str(completion.model or model), usage, str(choice.finish_reason or ""))


def of_response(response: Any, model: str) -> LMResponse:
    """Of the Responses API.

    Raises:
        TypeError, AttributeError, LookupError: it is none.
    """
    text = response.output_text
    if not isinstance(text, str):
        raise TypeError("no text")
    why = response.incomplete_details.reason if response.incomplete_details else response.status
    usage = _usage(response.usage, "input_tokens", "output_tokens")
    return LMResponse(text, str(response.model or model), usage, str(why or ""))


def _usage(usage: Any, input_name: str, output_name: str) -> TokenUsage:
    if usage is None:
        return TokenUsage()
    read = getattr(usage, f"{input_name}_details", None)
    written = getattr(usage, f"{output_name}_details", None)
    return TokenUsage(
        count(getattr(usage, input_name, None)),
        count(getattr(usage, output_name, None)),
        count(getattr(read, "cached_tokens", None)),
        count(getattr(written, "reasoning_tokens", None)),
        _cost(usage),
    )


def _cost(usage: Any) -> float | None:
    """In USD, where it is told. With a key of the caller's, OpenRouter says 0 and what it cost elsewhere."""
    extra = getattr(usage, "model_extra", None) or {}
    details = extra.get("cost_details")
    elsewhere = details.get("upstream_inference_cost") if isinstance(details, dict) else None
    told = [extra.get("cost") or elsewhere, extra.get("cost"), getattr(usage, "cost", None)]
    return next((float(each) for each in told if isinstance(each, (int, float)) and each >= 0), None)


def count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def failure(error: Any, peer: Peer, errors: Any = openai) -> ProviderError:
    """`errors` is the module that has the SDK's exceptions, with OpenAI's names."""
    if isinstance(error, errors.APIConnectionError):
        return peer.lost(error, timeout=isinstance(error, errors.APITimeoutError))
    if isinstance(error, errors.APIStatusError):
        body: Any = error.body
        told = body.get("message") if isinstance(body, dict) else None
        code = f" ({error.code})" if error.code else ""
        return peer.of_status(error.status_code, f"{told or error}{code}", error.response.headers)
    return peer.not_understood(f"what its SDK expects: {error}")
