"""What the agent answers when it can't do what was asked; each becomes one gRPC status in guard.py."""


class AgentError(Exception):
    """Root of this file's tree; its text is one line for the user."""


class UnknownSession(AgentError):
    pass


class SessionGone(AgentError):
    """The session's processes are gone, and its variables with them."""


class Busy(AgentError):
    """A cell is running."""


class Invalid(AgentError):
    """The request itself is wrong, or over a limit."""


class Mismatch(AgentError):
    """The two ends speak different versions."""
