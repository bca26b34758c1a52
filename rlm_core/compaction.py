"""When a conversation has grown too long for its LM: go on from a summary, with all of it in the REPL."""

from dataclasses import dataclass

from rlm_core.clients.base import LMResponse, Message
from rlm_core.prompts import CHARS_PER_TOKEN
from rlm_core.text import shorten

LEAST_CHARS = 1_000

SUMMARIZE = """\
The conversation is getting too long for you and will be cut. Write a summary to go on from, in one to three \
paragraphs: what is done and what is left to do; every result that you will need, with exact numbers, names \
and the variables that hold them; and what you do next."""
GO_ON = """\
The conversation so far was replaced by your summary above (this has happened {times}×). All of it is in the \
REPL's list `history`, and your variables are as they were: `SHOW_VARS()`. Don't do again what is done."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """`share` of the root LM's context window that a conversation may fill."""

    share: float = 0.85

    def is_due(self, response: LMResponse, messages: tuple[Message, ...], window: int) -> bool:
        """After this response to these messages; by what the provider counted, where it says that."""
        tokens = response.recorded_tokens or response.usage.input_tokens + response.usage.output_tokens
        new = messages[-1:] if tokens else messages  # what came after the response was not counted
        tokens += sum(len(each["content"]) for each in new) // CHARS_PER_TOKEN
        return tokens >= self.share * window

    def request(self, messages: tuple[Message, ...], window: int) -> tuple[Message, ...]:
        """Ask for a summary; the newest message may be what fills the window, and is cut to half of what the
        share leaves."""
        room = int((1 - self.share) * window * CHARS_PER_TOKEN / 2)
        newest = shorten(messages[-1]["content"], max(room, LEAST_CHARS))
        return (*messages[:-1], {"role": "user", "content": f"{newest}\n\n{SUMMARIZE}"})
