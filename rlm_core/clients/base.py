"""What an LM client is: messages in, one text and its usage out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from rlm_core.broker.pace import Rate
from rlm_core.prices import Price
from rlm_core.types import TokenUsage

Message = Mapping[str, str]
DEFAULT_CONTEXT_WINDOW = 128_000


@dataclass(frozen=True, slots=True)
class LMRequest:
    """`messages` are {"role", "content"} of system, user, assistant; `model` overrides the client's own."""

    messages: tuple[Message, ...]
    model: str | None = None
    max_output_tokens: int | None = None
    """That the answer may have, reasoning included; in the place of the client's own."""
    idempotency_key: str = ""
    """The same for every attempt at this request."""
    goes_on: bool = False
    """Whether a next request will begin with these messages: worth keeping in the provider's prompt cache."""

    @classmethod
    def of_prompt(cls, prompt: str, model: str | None = None) -> "LMRequest":
        return cls(({"role": "user", "content": prompt},), model)


@dataclass(frozen=True, slots=True)
class LMResponse:
    text: str
    """Empty when the provider gave none."""
    model: str
    usage: TokenUsage = field(default_factory=TokenUsage)
    finish_reason: str = ""
    recorded_tokens: int = 0
    """Of an answer that was not asked for again: input and output, which `usage` does not have."""


class LMClient(ABC):
    """One model of one provider. Used from the library's event loop only."""

    model_name: str
    context_window: int = DEFAULT_CONTEXT_WINDOW
    """Tokens that a prompt may have."""
    output_tokens: int | None = None
    """Tokens that an answer may have, where the caller set that."""
    least_output_tokens: int = 0
    """That it must be allowed to have, as it thinks first."""
    tokens_beside: int = 0
    """Tokens that its prompts may have beside their messages: of a schema for the answer, …"""
    max_concurrent: int | None = None
    """Requests that it works on at once; more wait for their turn, and their time does not run."""
    rate: Rate = Rate()
    """The caller's own limits."""
    account: str = ""
    """Clients of one provider, key and model, which differ in sampling only, share this, their rate and the
    pauses that the provider asks for."""
    resolved: Mapping[str, str] = MappingProxyType({})
    """What its answers depend on and it did not get as an argument: an address of the environment, …"""
    identity: str = ""
    """Stands for all that its answers depend on beside the request; empty: not known, so none is cached."""
    price: Price | None = None
    """Where the client knows it; else it is looked up by the model's name."""
    max_retries: int | None = None
    """How often it is asked again, where the caller set that."""

    @abstractmethod
    async def complete(self, request: LMRequest) -> LMResponse:
        """Ask once; who calls it asks again where that is worth it. Cancelling ends the request on the wire.

        Raises:
            ProviderError: one of its kinds, with one clear line.
        """

    async def aclose(self) -> None:  # noqa: B027 - a client may have nothing to close
        """Close connections."""

    def check_finished(self) -> None:  # noqa: B027 - only a script can be left unfinished
        """Raise when the client was to be used differently than it was; see ScriptedClient."""
