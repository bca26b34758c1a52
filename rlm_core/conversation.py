"""The messages between a run and its root LM."""

from collections.abc import Sequence

from rlm_core.clients.base import Message


class Conversation:
    """Ours and the LM's, in turns: ours that follow each other are one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.first = 0
        """How many messages there were before the first turn."""
        self._logged = 0

    def begin(self, messages: Sequence[Message]) -> None:
        self.messages = list(messages)
        self.first = len(self.messages)

    def say(self, text: str) -> None:
        if not text:
            return
        if self.messages and self.messages[-1]["role"] == "user":
            content = f"{self.messages[-1]['content']}\n\n{text}"
            self.messages[-1] = {"role": "user", "content": content}
        else:
            self.messages.append({"role": "user", "content": text})

    def reply(self, text: str) -> None:
        """What the LM said."""
        self.messages.append({"role": "assistant", "content": text})

    def take_new(self) -> list[dict[str, str]]:
        """For the log: those since the last time; the reply that comes next is in the log by itself."""
        new = [dict(message) for message in self.messages[self._logged :]]
        self._logged = len(self.messages) + 1
        return new

    def compact(self, summary: str, request: str) -> None:
        """Go on from a summary: what was said after the first messages is left out."""
        self.messages = self.messages[: self.first]
        self._logged = min(self._logged, self.first)
        self.reply(summary)
        self.say(request)
