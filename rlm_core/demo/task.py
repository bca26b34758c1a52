"""The question, and its truth, which is computed from the whole text without any LM."""

import lzma
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files

QUESTION = "Which ten names occur most often in this text, and in which section does each occur most?"
TOP = 10
NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
"""A capitalised word inside a sentence; good enough for a demo, and the same for every text."""
NOT_NAMES = frozenset({"God", "Lord", "The", "And", "Behold", "Let", "Thou", "Thy", "Then", "For", "But"})
HEADING = re.compile(r"^== (.+) ==$", re.MULTILINE)
PART_CHARS = 200_000
"""Length of a section of a text without headings."""


def load_text() -> str:
    """The King James Bible, 4.4 million characters with headings and verse numbers."""
    return lzma.decompress(files("rlm_core.demo").joinpath("kjv.txt.xz").read_bytes()).decode()


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Title and text of each section: by its headings, or in parts of equal length without any."""
    headings = list(HEADING.finditer(text))
    if len(headings) < 2:
        for number, start in enumerate(range(0, len(text), PART_CHARS), 1):
            yield f"part {number}", text[start : start + PART_CHARS]
        return
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        end = following.start() if following else len(text)
        yield heading.group(1), text[heading.end() : end]


def truth(text: str) -> str:
    """The right answer, in the form that the root LM is asked for: `name: count, most in section (count)`."""
    by_section = {title: _count(body) for title, body in sections(text)}
    total: Counter[str] = sum(by_section.values(), Counter())
    lines = []
    for name, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:TOP]:
        section, most = max(((t, c[name]) for t, c in by_section.items()), key=lambda item: item[1])
        lines.append(f"{name}: {count}, most in {section} ({most})")
    return "\n".join(lines)


def _count(text: str) -> Counter[str]:
    return Counter(name for name in NAME.findall(text) if name not in NOT_NAMES)
