"""What a task is, and when it is solved."""

import random
import re
from dataclasses import dataclass

from rlm_core.demo.task import load_text

NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana")
CITIES = ("Lima", "Oslo", "Cairo", "Perth", "Quito", "Dakar", "Hanoi", "Turin")


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    question: str
    context: str
    truth: str

    def is_solved_by(self, response: str) -> bool:
        """Whether the truth is in the answer, and nothing else of its kind is."""
        if self.truth.replace(".", "").isdigit():
            found = {number.rstrip(".") for number in re.findall(r"\d[\d.]*", response.replace(",", ""))}
            return {_plain(number) for number in found} == {_plain(self.truth)}
        kin = next((names for names in (NAMES, CITIES) if self.truth in names), (self.truth,))
        return [name for name in kin if re.search(rf"\b{name}\b", response, re.I)] == [self.truth]


def _plain(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def hidden(rng: random.Random, sentence: str) -> str:
    """A long text with this sentence somewhere in it."""
    lines = load_text()[200_000:224_000].splitlines()
    lines.insert(rng.randint(len(lines) // 4, 3 * len(lines) // 4), sentence)
    return "\n".join(lines)
