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


class RLMError(Exception):
    """Root of all errors of this library; `str()` is one line for the user."""


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


class SandboxLost(RLMError):
    """The sandbox or its session is gone."""


class RunFailed(RLMError):
    """The run ended without an answer."""


class ProviderError(RunFailed):
    """An LM provider did not give an answer."""


class ProviderUnreachable(ProviderError):
    """No connection, or none in time."""


class ProviderRefused(ProviderError):
    """Authentication or permission."""


class ProviderOverloaded(ProviderError):
    """Rate limit or server error, after the client's retries."""


class ProviderRejected(ProviderError):
    """The provider says that the request is wrong."""


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
