"""What the root LM is shown after its turn. Nothing it does is met with silence."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlm_core.cell import CellResult
from rlm_core.text import one_line, printable, shorten

OUTPUT_CHARS = 20_000
"""Of each block's output; head and tail are kept."""

VARIABLES_CHARS = 1_000
"""Of the list of variables; SHOW_VARS() shows them all."""
MAX_NOTICES = 8

NUDGE = (
    "Your reply had no code and no answer, so nothing happened. Write Python in a fenced block that starts "
    "with ```repl to look at `context`, or finish with FINAL(...) inside such a block."
)
EMPTY = "Your reply was empty. " + NUDGE
UNLABELLED = (
    "Your code was in a block that is not labelled `repl`; it was run as if it were. "
    "Label the next one ```repl."
)
NOTHING = frozenset({"0", "0.0", "[]", "{}", "()", "set()", "None", "''", '""', "0 []"})
"""What is printed where a search has found nothing."""
FOUND_NOTHING = (
    "Nothing was found. It may be written in another way than your code expects: print a few whole lines of "
    "`context` that have a word of the question, and copy from them. If there is really nothing, say so."
)
SAME_REPLY = (
    "This reply is the same as your last one, and so is its result. Try another way: look at another part of "
    "`context`, ask differently, or give the answer you have."
)
SAME_CODE = "This code is the same as in your last turn. Running it again shows nothing new: try another way."


@dataclass(frozen=True, slots=True)
class TurnOutcome:
    """A reply and what came of it."""

    reply: str
    codes: tuple[str, ...] = ()
    results: tuple[CellResult, ...] = ()
    unlabelled: bool = False


def feedback(outcome: TurnOutcome, previous: TurnOutcome | None) -> str:
    """The text of the user message after a turn, without its turn counter."""
    parts: list[str] = []
    if outcome.unlabelled:
        parts.append(UNLABELLED)
    parts += _outputs(outcome.results, len(outcome.codes))
    if outcome.results and outcome.results[-1].stdout.strip() in NOTHING:
        parts.append(FOUND_NOTHING)
    if not outcome.codes:
        parts.append(NUDGE if outcome.reply.strip() else EMPTY)
    if previous is not None and outcome.reply.strip():
        if outcome.reply.strip() == previous.reply.strip():
            parts.append(SAME_REPLY)
        elif outcome.codes and _same(outcome.codes, previous.codes):
            parts.append(SAME_CODE)
    return "\n\n".join(parts)


def _same(codes: Sequence[str], others: Sequence[str]) -> bool:
    return [code.strip() for code in codes] == [code.strip() for code in others]


def _outputs(results: Sequence[CellResult], count: int) -> list[str]:
    return [
        f"{f'Output of block {number} of {count}' if count > 1 else 'Output'}:\n{show(result)}"
        for number, result in enumerate(results, 1)
    ]


def show(result: CellResult) -> str:
    """One cell's output and state, for the LM."""
    lines: list[str] = []
    lines += [_shown(text) for text in (result.stdout, result.stderr) if text.strip("\n")]
    lines += _state(result)
    lines += [f"[{notice}]" for notice in result.notices[:MAX_NOTICES]]
    if not lines:
        lines.append("(no output: print what you want to see)")
    if result.variables:
        names = ", ".join(result.variables)
        lines.append(f"[variables: {one_line(names, VARIABLES_CHARS)}]")
    return "\n".join(lines)


def _shown(output: str) -> str:
    """Cut before it is made printable, which takes time and may take six characters for one; then again."""
    return shorten(printable(shorten(output.rstrip("\n"), OUTPUT_CHARS)), 2 * OUTPUT_CHARS)


def _state(result: CellResult) -> list[str]:
    if result.status == "rolled_back":
        before = "" if result.notices else "Every variable is as it was before this block; "
        return [
            f"[The block's process died: {result.rollback}. {before}what it had assigned is undone. "
            "Do it another way.]"
        ]
    if result.status == "timeout":
        return ["[The block's time was up and it was interrupted; what it had assigned is kept.]"]
    if result.status == "interrupted":
        return ["[The block was interrupted; what it had assigned is kept.]"]
    return []
