"""Where the words of a question stand in its text: a look that every root LM would begin with."""

import re
from typing import Any

from rlm_core.context import HEAD_CHARS, TAIL_CHARS
from rlm_core.text import one_line, printable

SHOWN_WHOLE = HEAD_CHARS + TAIL_CHARS
"""Characters of a text that is in the prompt already."""
MAX_SEARCHED = 8_000_000
"""Characters of a text; a longer one is not searched, so that nobody waits for it."""
MAX_READ = 160_000_000
"""Characters that are gone through for all words together, which takes some tens of milliseconds."""
MAX_COUNTED = 10_000
"""Places of a word; one that stands at more is not rare."""
SHOWN_WORDS = 4
SHOWN_PLACES = 2
"""Of a word that stands at few; of one that stands at many, one."""
FEW = 20
PLACE_CHARS = 160
WORD = re.compile(r"\w[\w'-]{1,38}\w")


def first_look(context: Any, question: str | None) -> str:
    """The rarest of the question's words that a text has, spelled as there, each with a place or two; empty
    where there is nothing to show.

    Of a very long question the last words are looked for: what is asked for stands at its end.
    """
    if not question or not isinstance(context, str) or not SHOWN_WHOLE < len(context) <= MAX_SEARCHED:
        return ""
    words = list(dict.fromkeys(WORD.findall(question)))[-(MAX_READ // len(context)) :]
    found = sorted((len(places), word, places) for word in words if (places := _places(context, word)))
    lines = [_line(context, word, places) for _, word, places in found[:SHOWN_WORDS]]
    return "\n".join(["Words of the question in it:", *lines]) if lines else ""


def _places(context: str, word: str) -> list[int]:
    """Where it stands as a word of its own; none when it stands at too many to be of use."""
    if not 0 < context.count(word) <= MAX_COUNTED:
        return []
    starts = (match.start() for match in re.finditer(re.escape(word), context))
    return [at for at in starts if not _goes_on(context, at - 1) and not _goes_on(context, at + len(word))]


def _goes_on(context: str, at: int) -> bool:
    """Whether the character there, if there is one, is of a word."""
    return 0 <= at < len(context) and (context[at].isalnum() or context[at] == "_")


def _line(context: str, word: str, places: list[int]) -> str:
    few = places[: SHOWN_PLACES if len(places) <= FEW else 1]
    shown = " and ".join(f"`{_place(context, at, len(word))}`" for at in few)
    times = "once" if len(places) == 1 else f"{len(places):,} times"
    return f"- {word!r} {times}, as in {shown}"


def _place(context: str, at: int, length: int) -> str:
    """What stands around it, on its line."""
    room = (PLACE_CHARS - length) // 2
    start = max(context.rfind("\n", 0, at) + 1, at - room, 0)
    end = context.find("\n", at)
    end = min(end if end >= 0 else len(context), at + length + room)
    return one_line(printable(context[start:end]), 2 * PLACE_CHARS)
