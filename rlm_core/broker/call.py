"""A call and what comes of it."""

from dataclasses import dataclass

from rlm_core.types import RLMChatCompletion, TokenUsage


@dataclass(frozen=True, slots=True)
class Call:
    """A call out of a cell. Session, cell and depth are the host's knowledge, never the sandbox's word."""

    id: str
    session_id: str
    cell_id: str
    kind: str
    """llm, rlm or tool."""
    prompt: str
    model: str | None
    depth: int
    tool: str = ""
    """Its name; then the prompt is the JSON of its arguments."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    model: str
    usage: TokenUsage
    child: RLMChatCompletion | None = None
    """The run that it is the answer of."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`code` is a name of the wire's CallErrorCode without its prefix."""

    code: str
    message: str
    child: RLMChatCompletion | None = None
    """The run that failed."""
