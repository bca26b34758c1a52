"""Where the words of a question stand in its text: a look that every root LM would begin with."""

import re
from typing import Any

from rlm_core.context import HEAD_CHARS, TAIL_CHARS
from rlm_core.text import one_line, printable

SHOWN_WHOLE = HEAD_CHARS + TAIL_CHARS
"""Characters of a text that is in the prompt already."""
MAX_SEARCHED = 8_000_000
"""Characters; a longer text is not searched, so that nobody waits for it: a word takes some milliseconds."""
MAX_WORDS = 20
"""Of a question that are looked for."""
SHOWN_WORDS = 4
SHOWN_PLACES = 2
"""Of a word that stands at few; of one that stands at many, one."""
FEW = 20
PLACE_CHARS = 160
WORD = re.compile(r"\w[\w'-]{1,38}\w")


def first_look(context: Any, question: str | None) -> str:
    """The rarest of the question's words that a text has, each with a place or two; empty where there is
    nothing to show."""
    if not question or not isinstance(context, str) or not SHOWN_WHOLE < len(context) <= MAX_SEARCHED:
        return ""
    words = list(dict.fromkeys(WORD.findall(question)))[:MAX_WORDS]
    found = sorted((count, word) for word in words if (count := context.count(word)))
    lines = [_line(context, word, count) for count, word in found[:SHOWN_WORDS]]
    return "\n".join(["Words of the question in it:", *lines]) if lines else ""


def _line(context: str, word: str, count: int) -> str:
    places: list[int] = []
    for _ in range(SHOWN_PLACES if count <= FEW else 1):
        if (at := context.find(word, places[-1] + len(word) if places else 0)) >= 0:
            places.append(at)
    shown = " and ".join(f"`{_place(context, at, len(word))}`" for at in places)
    times = "once" if count == 1 else f"{count:,} times"
    return f"- {word!r} {times}, as in {shown}"


def _place(context: str, at: int, length: int) -> str:
    """What stands around it, on its line."""
    room = (PLACE_CHARS - length) // 2
    start = max(context.rfind("\n", 0, at) + 1, at - room, 0)
    end = context.find("\n", at)
    end = min(end if end >= 0 else len(context), at + length + room)
    return one_line(printable(context[start:end]), 2 * PLACE_CHARS)
