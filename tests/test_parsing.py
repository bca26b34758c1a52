"""What counts as code and as an answer in a reply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_core.parsing import ParsedReply, TextAnswer, parse_reply, without_thinking

BLOCKS = {
    "plain": ("```repl\nx = 1\n```", ["x = 1\n"]),
    "two": ("```repl\na\n```\ntext\n```repl\nb\n```", ["a\n", "b\n"]),
    "other languages do not run beside repl": (
        "```python\nno\n```\n```repl\nyes\n```\n```json\n{}\n```",
        ["yes\n"],
    ),
    "longer fence holds a shorter one": ("````repl\ns = '''\n```\n'''\n````", ["s = '''\n```\n'''\n"]),
    "tildes": ("~~~repl\nx\n~~~", ["x\n"]),
    "tildes hold backticks": ("~~~repl\n```\nx\n```\n~~~", ["```\nx\n```\n"]),
    "indented in a list": ("1. look:\n\n   ```repl\n   if 1:\n       x\n   ```", ["if 1:\n    x\n"]),
    "indented fence": ("   ```repl\n   x\n   ```", ["x\n"]),
    "unclosed at the end": ("text\n```repl\nx = 1\ny = 2", ["x = 1\ny = 2"]),
    "info after the language": ("```repl title=a\nx\n```", ["x\n"]),
    "upper case": ("```REPL\nx\n```", ["x\n"]),
    "a literal in a text": ("Use ```repl in a line``` here", []),
    "empty": ("```repl\n\n```", []),
    "crlf": ("```repl\r\nx = 1\r\n```\r\n", ["x = 1\n"]),
    "thinking does not run": ("<think>\n```repl\nno\n```\n</think>\n```repl\nyes\n```", ["yes\n"]),
    "thinking without its opening tag": ("plan\n```repl\nno\n```\n</think>\n```repl\nyes\n```", ["yes\n"]),
    "thinking that never ends": ("<think>\n```repl\nno\n```", []),
    "a tag inside code stays": (
        "```repl\nre.sub('<think>.*?</think>', '', x)\n```",
        ["re.sub('<think>.*?</think>', '', x)\n"],
    ),
    "a closing tag inside code stays": ("```repl\nx.split('</think>')\n```", ["x.split('</think>')\n"]),
    "thinking in a line": ("a <think>```repl</think> b\n```repl\nx\n```", ["x\n"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    text, expected = BLOCKS[name]
    parsed = parse_reply(text)
    assert [block.rstrip("\n") for block in parsed.blocks] == [block.rstrip("\n") for block in expected]
    assert not parsed.unlabelled


@pytest.mark.parametrize("fence", ["```", "```python", "```py", "~~~Python", "```python3"])
def test_plain_and_python_fences_run_when_there_is_no_repl_block(fence: str) -> None:
    assert parse_reply(f"{fence}\nx = 1\n{fence[:3]}") == ParsedReply(("x = 1\n",), unlabelled=True)


@pytest.mark.parametrize("fence", ["```json", "```text", "```bash", "    "])
def test_other_fences_do_not_run(fence: str) -> None:
    assert parse_reply(f"{fence}\nx = 1\n```").blocks == ()


ANSWERS = {
    "FINAL(42)": ("42", False),
    "So:\nFINAL(The answer is (a) or (b).)": ("The answer is (a) or (b).", False),
    'FINAL("quoted")': ("quoted", False),
    "FINAL('''two\nlines''')": ("two\nlines", False),
    "FINAL(two\nlines)": ("two\nlines", False),
    "FINAL(it's fine) and more": ("it's fine", False),
    "FINAL(no end": ("no end", False),
    "FINAL(smile :( end)": ("smile :( end", False),
    "FINAL_VAR(result)": ("result", True),
    'FINAL_VAR("result")': ("result", True),
    "  **FINAL(x)": ("x", False),
    "<think>FINAL(no)</think>\nFINAL(yes)": ("yes", False),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_in_text(text: str) -> None:
    assert parse_reply(text).answer == TextAnswer(*ANSWERS[text])


@pytest.mark.parametrize(
    "text",
    [
        "I will use FINAL(x) later.",
        "MY_FINAL(x)",
        "```text\nFINAL(x)\n```",
        "    FINAL(x)",
        "```repl\nx\n```\nFINAL(x)",
        "```python\nx\n```\nFINAL(x)",
        "<think>FINAL(x)</think>",
    ],
)
def test_what_is_no_answer_in_text(text: str) -> None:
    assert parse_reply(text).answer is None


@given(st.text(st.sampled_from("`~ \nab(<think>/FINAL_VAR)'\"rep")))
def test_any_text_parses(text: str) -> None:
    parsed = parse_reply(text)
    assert all(block.strip() for block in parsed.blocks)


@given(st.text(alphabet="ab \n`~", max_size=80))
def test_text_without_tags_is_left_alone(text: str) -> None:
    assert without_thinking(text) == text
