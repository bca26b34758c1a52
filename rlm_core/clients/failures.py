"""A provider's refusals and silences as our errors: one line each, and whether to ask again."""

import importlib
import os
import re
from collections.abc import Iterator, Mapping
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
from rlm_core.text import one_line, printable, without_userinfo

DETAIL_CHARS = 300
NO_KEY = "no-key"
"""Sent where there is none, as the SDKs insist on one."""
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
LENGTH_NAMES = re.compile("max_(completion_|output_)?tokens|maxOutputTokens|completion tokens|output tokens")
SHORTEST_LENGTH = 16
"""A smaller number in an error is not that of an answer's length."""
NEVER_CONNECTED = frozenset(
    {
        "ClientConnectorError",
        "ClientConnectorCertificateError",
        "ClientConnectorDNSError",
        "ClientConnectorSSLError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionRefusedError",
        "ConnectionTimeoutError",
    }
)
BROKEN = frozenset(
    {"ServerDisconnectedError", "ClientPayloadError", "ClientOSError", "RemoteProtocolError", "ReadError"}
)
"""Exceptions of the HTTP libraries by which nothing was sent, and by which a connection broke after that."""
KEY_VARIABLES = ("_API_KEY", "_AUTH_TOKEN")
SHORTEST_KEY = 8


@dataclass(frozen=True, slots=True)
class Peer:
    """Who was asked, with which key."""

    where: str
    model: str
    context_window: int
    key: str = ""

    @classmethod
    def at(cls, url: str, model: str, context_window: int, key: str | None) -> "Peer":
        """A URL may have a password, or a key in its query."""
        return cls(without_userinfo(url).partition("?")[0], model, context_window, key or "")

    def __str__(self) -> str:
        return f"{self.where} (model {self.model!r})"

    def _detail(self, text: str) -> str:
        """What it says, in one line. Some say the key again, which is then told to cells and logs."""
        keys = [value for name, value in os.environ.items() if name.endswith(KEY_VARIABLES)]
        for key in sorted([self.key, *keys], key=len, reverse=True):
            if len(key) >= SHORTEST_KEY and key != NO_KEY:
                text = text.replace(key, "[key]")
        return printable(one_line(text, DETAIL_CHARS))

    def of_status(self, status: int, text: str, headers: Mapping[str, str]) -> ProviderError:
        """A reply with an HTTP status of 400 or more. Providers don't charge for most of these."""
        detail = self._detail(text)
        lower = text.lower()
        if status in (401, 403) and self.key == NO_KEY:
            return ProviderRefused(
                f"{self} wants an API key, and none was sent: pass api_key in backend_kwargs, or "
                f"--api-key-env NAME (keys of the environment go to their own providers only): {detail}"
            )
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
        rejected = ProviderRejected(f"{self} rejected the request: {detail}")
        rejected.most_output_tokens = _length_in(text)
        return rejected

    def lost(self, error: BaseException, *, timeout: bool = False) -> ProviderError:
        """There was no reply, or not all of it: by the exceptions that led to this one."""
        causes = list(_causes(error))
        names = {type(each).__name__ for each in causes}
        if names & NEVER_CONNECTED and not names & BROKEN:
            return self.unreachable(causes[-1], sent=False)
        # What HTTP libraries say of a connection that broke is a timeout for some SDKs.
        broke = names & BROKEN or any(
            isinstance(each, OSError) and not isinstance(each, TimeoutError) for each in causes
        )
        if timeout and not broke:
            return self.too_slow()
        return self.unreachable(causes[-1], sent=True)

    def too_slow(self) -> ProviderError:
        error = ProviderUnreachable(f"{self} did not answer in time")
        error.may_be_billed = True
        return error

    def unreachable(self, cause: object, *, sent: bool) -> ProviderError:
        """No connection, or one that broke: then the request may have been worked on."""
        reason = self._detail(str(cause) or type(cause).__name__)
        what = f"the connection to {self} broke" if sent else f"can't reach {self}"
        error = ProviderUnreachable(f"{what}: {reason}; is the server running?")
        error.may_be_billed = sent
        return error

    def cut_off(self) -> ProviderError:
        error = ProviderUnreachable(f"{self} stopped in the middle of its answer")
        error.may_be_billed = True
        return error

    def not_understood(self, what: str) -> ProviderError:
        """An answer in a form that the provider's API has not got: charged, if it is the provider at all."""
        error = ProviderError(f"{self.where} did not answer with {self._detail(what)}")
        error.may_be_billed = True
        return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came from, what that came from, …"""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # these two can make a circle
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _length_in(text: str) -> int | None:
    """The length that an answer may have, where a refusal names that beside the one that was asked for."""
    if not LENGTH_NAMES.search(text):
        return None
    numbers = {int(each.replace(",", "")) for each in re.findall(r"\b\d[\d,]{0,12}\b", text)}
    fitting = sorted(each for each in numbers if each >= SHORTEST_LENGTH)
    return fitting[0] - ("exclusive" in text) if len(fitting) > 1 else None


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
