"""What the demo's two scripted LMs say: a root that works as a good one does, a sub-LM that reads."""

import json
from collections import Counter

from rlm_core.clients.base import LMRequest
from rlm_core.clients.scripted import ScriptedClient
from rlm_core.demo.task import NAME

ROOT = (
    """I look at the text first: how long it is, and how it is divided.

```repl
import re
headings = list(re.finditer(r"^== (.+) ==$", context, re.M))
print(f"{len(context):,} characters, {len(headings)} headings")
print([h.group(1) for h in headings[:5]], "...")
```""",
    """I cut it into pieces that a sub-LM reads well, at its headings where it has any, and ask about all of \
them at once.

```repl
if len(headings) > 1:
    ends = [h.start() for h in headings[1:]] + [len(context)]
    sections = [(h.group(1), context[h.end():end]) for h, end in zip(headings, ends)]
else:
    starts = range(0, len(context), 200_000)
    sections = [(f"part {n}", context[i:i + 200_000]) for n, i in enumerate(starts, 1)]

def pieces(text, size=100_000):
    while len(text) > size:
        cut = text.rfind("\\n", 0, size) + 1 or size
        yield text[:cut]
        text = text[cut:]
    yield text

asked = [(title, piece) for title, text in sections for piece in pieces(text)]
task = "Count each name in this text. Reply with one JSON object from name to count.\\n\\n"
replies = llm_query_batched([task + piece for _, piece in asked])
print(len(asked), "pieces,", sum(not r.ok for r in replies), "failed; the first:", replies[0][:60])
```""",
    """I add the replies up by section, and leave out titles that are not names.

```repl
import json
from collections import Counter, defaultdict
not_names = {"God", "Lord", "The", "And", "Behold", "Let", "Thou", "Thy", "Then", "For", "But"}
by_section = defaultdict(Counter)
for (title, _), reply in zip(asked, replies):
    by_section[title].update({k: v for k, v in json.loads(reply).items() if k not in not_names})
total = sum(by_section.values(), Counter())
top = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:10]
print(top[:3])
```""",
    """The counts make sense. I finish.

```repl
lines = []
for name, count in top:
    section, most = max(((t, c[name]) for t, c in by_section.items()), key=lambda item: item[1])
    lines.append(f"{name}: {count}, most in {section} ({most})")
FINAL("\\n".join(lines))
```""",
)


def read_piece(request: LMRequest) -> str:
    """The sub-LM: a JSON object of the names in the piece that the prompt holds."""
    piece = request.messages[-1]["content"].partition("\n\n")[2]
    return json.dumps(Counter(NAME.findall(piece)))


def root_lm() -> ScriptedClient:
    return ScriptedClient(ROOT, "scripted-root")


def sub_lm() -> ScriptedClient:
    return ScriptedClient(read_piece, "scripted-sub")
