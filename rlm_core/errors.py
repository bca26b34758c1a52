"""Everything this library raises.

RLMError
├── CallFailed                   one query failed: the model is shown it and goes on
├── SandboxLost                  the session is over, and its variables with it
├── RunFailed                    the run can't go on
│   ├── ProviderError            the LM did not answer
│   │   ├── ProviderUnreachable
│   │   ├── ProviderRefused      wrong key, no permission
│   │   ├── ProviderOverloaded   rate limit or server error, after retries
│   │   ├── ProviderRejected     the request itself: unknown model, prompt too long, …
│   │   └── EmptyReply           no text, several times in a row
│   ├── LimitExceeded            a limit of the caller's; `partial_answer` is the best answer so far
│   │   ├── BudgetExceededError  (max_budget)    ├── TokenLimitExceededError     (max_tokens)
│   │   ├── CallLimitExceededError (max_calls)   ├── TimeoutExceededError        (max_timeout)
│   │   └── ErrorThresholdExceededError (max_errors)
│   ├── CancellationError        Ctrl-C; `partial_answer` too
│   ├── ScriptError              a scripted LM was asked too often, or too seldom
│   └── LogError                 the log can't be written
└── UsageError                   what the caller must mend
    ├── ConfigError              an argument, or what it names
    ├── MissingExtra             a package to install
    ├── PolicyNotEnforceable     a sandbox field that the environment can't hold
    ├── EngineError              the container engine does not answer, refuses, or is full
    └── VersionMismatch          host and agent are of different versions

gRPC's errors and the SDKs' are mapped where they enter (`rlm_core/transport/errors.py`,
`rlm_core/clients/`) and never leak.
"""

import asyncio
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rlm_core.types import RLMChatCompletion


class RLMError(Exception):
    """Root of all errors of this library; `str()` is one line for the user."""

    completion: "RLMChatCompletion | None" = None
    """Of an error that ended a run: its usage, cost and log; `response` is the best answer known.
    Its `prompt` is None."""


def in_one_line(error: BaseException) -> str:
    """What went wrong, as it is told to a person."""
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "interrupted"
    return str(error) if isinstance(error, RLMError) else repr(error)


class CallFailed(RLMError):
    """One query of a cell failed; `code` is a name of the wire's CallErrorCode without its prefix."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BudgetRefused(CallFailed):
    """What is left of a limit is not enough for a call; `limit` is the limit's name."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__("BUDGET", message)
        self.limit = limit


class SandboxLost(RLMError):
    """The sandbox or its session is gone."""


class RunFailed(RLMError):
    """The run ended without an answer."""


class LimitExceeded(RunFailed):
    """A limit of the caller's ended the run."""

    limit: ClassVar[str] = ""
    """The argument of `RLM` that set it."""

    def __init__(self, message: str, partial_answer: str | None = None) -> None:
        super().__init__(message)
        self.partial_answer = partial_answer


class BudgetExceededError(LimitExceeded):
    """In USD."""

    limit = "max_budget"

    def __init__(
        self, spent: float, budget: float, partial_answer: str | None = None, message: str | None = None
    ) -> None:
        text = f"the budget is used up: ${spent:.6f} of ${budget:.6f} spent"
        super().__init__(message or text, partial_answer)
        self.spent, self.budget = spent, budget


class TokenLimitExceededError(LimitExceeded):
    limit = "max_tokens"

    def __init__(
        self,
        tokens_used: int,
        token_limit: int,
        partial_answer: str | None = None,
        message: str | None = None,
    ) -> None:
        text = f"the tokens are used up: {tokens_used:,} of {token_limit:,}"
        super().__init__(message or text, partial_answer)
        self.tokens_used, self.token_limit = tokens_used, token_limit


class CallLimitExceededError(LimitExceeded):
    limit = "max_calls"

    def __init__(
        self, calls: int, call_limit: int, partial_answer: str | None = None, message: str | None = None
    ) -> None:
        super().__init__(message or f"the calls are used up: {calls:,} of {call_limit:,}", partial_answer)
        self.calls, self.call_limit = calls, call_limit


class TimeoutExceededError(LimitExceeded):
    """In seconds."""

    limit = "max_timeout"

    def __init__(
        self, elapsed: float, timeout: float, partial_answer: str | None = None, message: str | None = None
    ) -> None:
        super().__init__(message or f"the time is up: {elapsed:.1f} s of {timeout:.1f} s", partial_answer)
        self.elapsed, self.timeout = elapsed, timeout


class ErrorThresholdExceededError(LimitExceeded):
    limit = "max_errors"

    def __init__(
        self,
        error_count: int,
        threshold: int,
        last_error: str | None = None,
        partial_answer: str | None = None,
        message: str | None = None,
    ) -> None:
        text = f"{error_count} turns in a row had errors, of {threshold} allowed; the last: {last_error}"
        super().__init__(message or text, partial_answer)
        self.error_count, self.threshold, self.last_error = error_count, threshold, last_error


class CancellationError(RunFailed, KeyboardInterrupt):
    """The run was interrupted from the keyboard: what the original library raises, and what Python does."""

    def __init__(self, partial_answer: str | None = None, message: str | None = None) -> None:
        super().__init__(message or "interrupted; nothing is left running")
        self.partial_answer = partial_answer


class ProviderError(RunFailed):
    """An LM provider did not give an answer."""

    may_be_billed: bool = False
    """Whether it may have worked on the request all the same."""
    retry_after: float | None = None
    """Seconds that it asks to be left alone."""
    try_again: bool | None = None
    """Whether the same request may be answered later; None: as for others of its kind."""


class ProviderUnreachable(ProviderError):
    """No connection, or none in time."""


class ProviderRefused(ProviderError):
    """Authentication or permission."""


class ProviderOverloaded(ProviderError):
    """Rate limit or server error, after the client's retries."""


class ProviderRejected(ProviderError):
    """The provider says that the request is wrong."""

    most_output_tokens: int | None = None
    """How long an answer of this model may be, where one that was asked for is longer."""


class EmptyReply(ProviderError):
    """The LM answered with no text several times in a row."""


class ScriptError(RunFailed):
    """A scripted LM ran out of replies, or some were never asked for."""


class LogError(RunFailed):
    """A line of the log could not be written to disk."""


class UsageError(RLMError):
    """The caller must mend something."""


class ConfigError(UsageError):
    """An argument is wrong, or names something that does not exist."""


class MissingExtra(UsageError):
    """An optional package is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a package that is not installed: pip install 'rlm-sandbox[{extra}]', "
            f"or in a clone: pip install -e '.[{extra}]'"
        )


class PolicyNotEnforceable(UsageError):
    """The environment can't enforce a field of the sandbox policy, so it does not start."""


class EngineError(UsageError):
    """The container engine can't do what it is asked; says what to do."""


class VersionMismatch(UsageError):
    """The agent in the sandbox is of another version than this library."""
