"""What the root LM is told before its first turn."""

from dataclasses import dataclass
from typing import Any

from rlm_core.clients.base import Message
from rlm_core.context import describe
from rlm_core.first_look import first_look
from rlm_core.text import one_line

SUB_WINDOW_SHARE = 0.6
"""Of a sub-LM's window that a chunk should fill; the rest is for the question and the answer."""
CHARS_PER_TOKEN = 4
"""English text; measured 4.15 on the King James Bible with cl100k."""
MAX_CHUNK_CHARS = 100_000
"""Beyond this, LMs miss details even where the window is larger."""
REPEATED_CHARS = 300
"""Of a question, in each turn."""

SYSTEM = """\
You answer questions about texts that are too long to read at once. The text is the variable `context` in \
a Python REPL that you control. You write code, you are shown what it prints, and you go on until you have \
the answer.

To run code, put it in a fenced block with the language `repl`:

```repl
print(type(context), len(context))
```

The REPL keeps its variables from turn to turn. It shows you what a block prints and the value of a last \
bare expression; long output is cut in the middle, so print samples, not whole texts. It has:

- `context`: the text (or list, or dict) of the question. Never print all of it.
- `llm_query(prompt, model=None)`: asks a sub-LM and returns its reply, a str. It sees nothing but the \
prompt: put the piece of text in, and say in which form you want the answer. One prompt can hold about \
{window} characters; pieces of about {chunk} are read best.
- `llm_query_batched(prompts, model=None)`: asks many at once and returns the replies in order. Much faster \
than a loop. A reply that failed has `.ok == False`; the others are unharmed.
- `rlm_query(prompt, model=None)` and `rlm_query_batched(prompts, model=None)`: the same for subtasks that \
need several steps of their own.
- `SHOW_VARS()`: the variables you have made.
- `answer`: set `answer["content"]` to your final answer and `answer["ready"] = True` to finish. \
`FINAL(value)` does both; `FINAL_VAR("name")` does it with the value of a variable.

If a block crashes the interpreter or takes too long, its process is ended and every variable is as it was \
before the block.

How to work:

1. Look first: at how `context` is divided, and at what stands around the words of the question. Print a \
few places before you write a pattern for them.
2. What code can decide exactly (counting, adding up, searching, sorting), decide with code.
3. What needs understanding (is this a joke? who is meant?) ask sub-LMs, never by searching for words: \
split the text at natural borders, ask about all pieces in one `llm_query_batched`, and combine the replies \
with code.
4. Check a sample of the result. Then finish with exactly what was asked for: the number, not the list.

Example: how many litres of milk were sold? Lines look like `sale 17: 3 l milk to Ida`, so code decides it:

```repl
import re
sales = re.findall(r"sale \\d+: (\\d+) l (\\w+) to (\\w+)", context)
print(len(sales), sales[:3])
litres = sum(int(amount) for amount, what, who in sales if what == "milk")
print(litres)
```

and, having seen that every line was read:

```repl
FINAL(litres)
```

Example: in how many scenes does somebody lose their temper? Scenes are short enough for one prompt each:

```repl
import re
scenes = [scene.strip() for scene in re.split(r"SCENE \\d+", context) if scene.strip()]
task = "Does somebody lose their temper in this scene? Answer YES or NO only.\\n\\n"
replies = llm_query_batched([task + scene for scene in scenes])
yes = [reply.ok and reply.strip().upper().startswith("YES") for reply in replies]
print(len(scenes), "scenes;", sum(not reply.ok for reply in replies), "failed;", replies[:5], sum(yes))
```

Example: in which year was the treaty signed? A search narrows the text down, and a sub-LM reads what is left:

```repl
import re
places = [match.start() for match in re.finditer(r"treaty", context, re.I)]
excerpts = "\\n---\\n".join(context[max(0, place - 300):place + 300] for place in places[:40])
print(len(places), excerpts[:600])
print(llm_query(f"In which year was the treaty signed? Quote the sentence that says so.\\n\\n{{excerpts}}"))
```

Reply with a short plan and then one `repl` block, each turn, until you finish."""

ORCHESTRATE = """\
Keep your own messages short: let sub-LMs do the reading and code do the counting, store what they return \
in variables, and print only what you need for your next decision."""


TOOLS = "The REPL also has these, which only your code can use; functions take and return JSON's types:"

CHILD = """\
You work on one part of a larger task, which is in `context`. Where whoever gave it to you shares the \
REPL's memory, `parent_context` is their text, and their variables are there (`SHOW_VARS()`); what you \
change is yours alone. Your answer goes back to their code: give exactly what was asked for."""


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """How the first request is made."""

    system_prompt: str | None = None
    """Replaces ours; taken as it is, braces included."""
    orchestrator: bool = True
    user_prologue: str | None = None
    is_child: bool = False
    """Whether it is for a run that another run's cell asked for."""
    tools: tuple[str, ...] = ()
    """A line about each of the user's tools."""


def first_messages(
    config: PromptConfig,
    context: Any,
    question: str | None,
    sub_window: int,
    earlier: tuple[int, int] = (0, 0),
) -> list[Message]:
    """System message and first user message; sub_window is the sub-LM's, in tokens; earlier: how many
    contexts and histories the REPL has of questions before this one."""
    system = config.system_prompt if config.system_prompt is not None else _system(sub_window)
    if config.orchestrator:
        system = f"{system}\n\n{ORCHESTRATE}"
    if config.tools:
        system = f"{system}\n\n{TOOLS}\n\n" + "\n".join(f"- {tool}" for tool in config.tools)
    if config.is_child:
        system = f"{system}\n\n{CHILD}"
    user = (describe(context) + _before(*earlier), first_look(context, question), _task(question))
    messages: list[Message] = [
        {"role": "system", "content": system},
        {"role": "user", "content": "\n\n".join(part for part in user if part)},
    ]
    if config.user_prologue:
        messages.append({"role": "user", "content": config.user_prologue})
    return messages


def _before(contexts: int, histories: int) -> str:
    if not contexts:
        return ""
    said = f" and what was said then in `history_0` to `history_{histories - 1}`" if histories else ""
    return (
        f"\n\nThis REPL has answered before: earlier contexts are in `context_0` to `context_{contexts - 1}`"
        f"{said}, and the variables made then are there (`SHOW_VARS()`)."
    )


def turn_prompt(turn: int, turns: int, question: str | None) -> str:
    """Closes every message of ours; turn counts from 1. It ends with what to do: a small LM repeats what is
    only a statement."""
    left = f"You have {turns - turn + 1} turns" + (" left" if turn > 1 else "")
    if turn == turns:
        return (
            f"This is your last turn. Write a `repl` block with FINAL(…): the best answer to {_it(question)}"
        )
    if turn == 1:
        return f"{left}. Write your first `repl` block."
    return (
        f"{left}. When you know the answer to {_it(question)} write a `repl` block with FINAL(…); else write "
        "your next one."
    )


def last_request(partial_answer: str, question: str | None) -> str:
    """Asks for an answer when the turns are used up."""
    known = (
        f'\n\nThis is what `answer["content"]` holds now:\n\n{partial_answer}'
        if partial_answer.strip()
        else ""
    )
    return (
        f"There are no turns left and no code will run any more.{known}\n\nFrom what you have seen, write "
        f"your best answer, as plain text and nothing else, to {_it(question)}"
    )


def _system(sub_window: int) -> str:
    window = sub_window * CHARS_PER_TOKEN
    chunk = min(MAX_CHUNK_CHARS, int(window * SUB_WINDOW_SHARE))
    return SYSTEM.format(window=f"{_round(window):,}", chunk=f"{_round(chunk):,}")


def _round(number: int) -> int:
    """Two leading digits: it is a hint."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit


def _task(question: str | None) -> str:
    if question:
        return f"Question: {question}"
    return "The request is in `context` itself: find out what is asked there and do it."


def _it(question: str | None) -> str:
    """The question again: much may have been said since."""
    return f"the question: {one_line(question, REPEATED_CHARS)}" if question else "what `context` asks for."
