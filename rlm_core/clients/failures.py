"""A provider's refusals and silences as our errors: one line each, and whether to ask again."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec

from rlm_core.errors import (
    ProviderError,
    ProviderOverloaded,
    ProviderRefused,
    ProviderRejected,
    ProviderUnreachable,
)
from rlm_core.text import one_line, printable

DETAIL_CHARS = 300
TOO_LONG = (
    "context_length_exceeded",
    "exceed_context_size",
    "context length",
    "context window",
    "context size",
    "too long",
)
"""Codes and words by which providers say that a prompt has too many tokens."""
NO_MONEY = ("insufficient_quota", "billing_hard_limit", "credit balance")
"""A 429 that waiting does not help."""


GAVE_UP = (408, 504, 524)
"""Statuses of a gateway that did not wait for the provider, which may have gone on."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who was asked."""

    where: str
    model: str
    context_window: int

    def __str__(self) -> str:
        return f"{self.where} (model {self.model!r})"

    def of_status(self, status: int, text: str, headers: Mapping[str, str]) -> ProviderError:
        """A reply with an HTTP status of 400 or more. Providers don't charge for most of these."""
        detail = printable(one_line(text, DETAIL_CHARS))
        lower = text.lower()
        if status in (401, 403):
            return ProviderRefused(f"{self} refused the API key: {detail}")
        if status == 429 or status == 408 or status >= 500:
            error = ProviderOverloaded(f"{self} failed or is overloaded: {detail}")
            error.retry_after = retry_after(headers)
            error.may_be_billed = status in GAVE_UP
            error.try_again = not any(word in lower for word in NO_MONEY)
            return error
        if status in (400, 413) and any(word in lower for word in TOO_LONG):
            return ProviderRejected(
                f"{self}: the prompt is too long, at most {self.context_window:,} tokens "
                f"(about {self.context_window * 4:,} characters): split it ({detail})"
            )
        return ProviderRejected(f"{self} rejected the request: {detail}")

    def too_slow(self) -> ProviderError:
        error = ProviderUnreachable(f"{self} did not answer in time")
        error.may_be_billed = True
        return error

    def unreachable(self, cause: object, *, sent: bool) -> ProviderError:
        """No connection, or one that broke: then the request may have been worked on."""
        reason = printable(one_line(str(cause), DETAIL_CHARS))
        error = ProviderUnreachable(f"can't reach {self}: {reason}; is the server running?")
        error.may_be_billed = sent
        return error

    def cut_off(self) -> ProviderError:
        error = ProviderUnreachable(f"{self} stopped in the middle of its answer")
        error.may_be_billed = True
        return error

    def not_understood(self, what: str) -> ProviderError:
        """An answer in a form that the provider's API has not got: charged, if it is the provider at all."""
        error = ProviderError(f"{self.where} did not answer with {what}")
        error.may_be_billed = True
        return error


def transport_errors() -> tuple[type[Exception], ...]:
    """Of the HTTP libraries below the SDKs, which some of them let through."""
    names = {"httpx": "TransportError", "httpx2": "TransportError", "aiohttp": "ClientError"}
    found = [getattr(importlib.import_module(each), name) for each, name in names.items() if find_spec(each)]
    return (TimeoutError, *found)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds (RFC 9110, section 10.2.3: a number or a date; some have a header of their own in ms)."""
    lower = {key.lower(): value for key, value in headers.items()}
    try:
        if "retry-after-ms" in lower:
            return max(0.0, float(lower["retry-after-ms"]) / 1000)
        value = lower.get("retry-after", "")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        if value:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        pass
    return None
