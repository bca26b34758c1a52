"""What a reply of the root LM asks for: blocks of code, or an answer in its text.

Markdown is read by a CommonMark parser, so nested and longer fences, `~~~`, indented fences and a fence
that is not closed at the end mean what they mean elsewhere.
"""

import ast
import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

REPL = "repl"
PYTHON = frozenset({"", "python", "py", "python3"})
_markdown = MarkdownIt("commonmark")
_FENCE = re.compile(r" {0,3}(?:[-*+] +|> ?)*(`{3,}|~{3,})(.*)$")
_FINAL = re.compile(r"^[ \t>*]*(FINAL_VAR|FINAL)\(", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """`FINAL(…)` or `FINAL_VAR(…)` in the text of a reply."""

    value: str
    is_variable: bool


@dataclass(frozen=True, slots=True)
class ParsedReply:
    blocks: tuple[str, ...]
    """Code to run, in order."""
    unlabelled: bool = False
    """The code stood in plain or python fences and is run as if it were `repl`."""
    answer: TextAnswer | None = None
    """Only in a reply without code."""


def parse_reply(text: str) -> ParsedReply:
    visible = without_thinking(text)
    fences = [
        (token.info.split()[0].lower() if token.info.split() else "", token.content)
        for token in _markdown.parse(visible)
        if token.type == "fence" and token.content.strip()
    ]
    if blocks := tuple(code for language, code in fences if language == REPL):
        return ParsedReply(blocks)
    if blocks := tuple(code for language, code in fences if language in PYTHON):
        return ParsedReply(blocks, unlabelled=True)
    return ParsedReply((), answer=_text_answer(_without_fences(visible)))


def without_thinking(text: str) -> str:
    """The reply without its `<think>` parts; a tag inside a fence is code and stays."""
    kept: list[str] = []
    fence = ""
    thinking = False
    opened = text.find("<think>")
    closed = text.find("</think>")
    if closed >= 0 and not 0 <= opened < closed and not _inside_fence(text[:closed]):
        text = text[closed + len("</think>") :]  # the opening tag was in the LM's template
    for line in text.splitlines(keepends=True):
        rest = line
        while rest:
            if thinking:
                _, end, rest = rest.partition("</think>")
                thinking = not end
            elif fence or "<think>" not in rest:
                fence = _after(fence, rest)
                kept.append(rest)
                rest = ""
            else:
                before, _, rest = rest.partition("<think>")
                kept.append(before)
                thinking = True
    return "".join(kept)


def _after(fence: str, line: str) -> str:
    """The fence that is open after a line, given the one before it; empty for none."""
    match = _FENCE.match(line.rstrip("\n"))
    if match is None:
        return fence
    marks, info = match.groups()
    if not fence:
        return "" if marks[0] == "`" and "`" in info else str(marks)
    closes = marks[0] == fence[0] and len(marks) >= len(fence) and not info.strip()
    return "" if closes else fence


def _inside_fence(text: str) -> bool:
    fence = ""
    for line in text.splitlines():
        fence = _after(fence, line)
    return bool(fence)


def _without_fences(text: str) -> str:
    lines = text.splitlines(keepends=True)
    for token in _markdown.parse(text):
        if token.type in ("fence", "code_block") and token.map:
            start, end = token.map
            lines[start:end] = ["\n"] * (end - start)
    return "".join(lines)


def _text_answer(text: str) -> TextAnswer | None:
    match = _FINAL.search(text)
    if match is None:
        return None
    rest = text[match.end() :]
    value = _quoted(rest)
    is_variable = match.group(1) == "FINAL_VAR"
    return TextAnswer(_balanced(rest).strip() if value is None else value, is_variable)


def _balanced(text: str) -> str:
    """Up to the parenthesis that closes the one before the text; without one, up to the last, or all."""
    depth = 1
    for position, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:position]
    return text[: text.rindex(")")] if ")" in text else text


MAX_ENDS = 32
"""Closing parentheses that are looked at, from the start and from the end."""


def _quoted(text: str) -> str | None:
    """The value of a string literal that is all there is up to a closing parenthesis; None for no such."""
    if text.lstrip()[:1] not in ("'", '"'):
        return None
    ends = [match.start() for match in re.finditer(r"\)", text)]
    if len(ends) > 2 * MAX_ENDS:  # each is tried, and costs its length
        ends = [*ends[:MAX_ENDS], *ends[-MAX_ENDS:]]
    for end in ends:
        try:
            value = ast.literal_eval(text[:end].strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, str) else None
    return None
