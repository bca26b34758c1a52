"""Nothing the root LM does is met with silence."""

import pytest

from rlm_core import feedback as feedback_module
from rlm_core.cell import CellResult
from rlm_core.feedback import (
    EMPTY,
    FOUND_NOTHING,
    NUDGE,
    OUTPUT_CHARS,
    SAME_CODE,
    SAME_REPLY,
    UNLABELLED,
    TurnOutcome,
    feedback,
    show,
)
from rlm_core.text import printable


def outcome(reply: str, code: str = "", **result: object) -> TurnOutcome:
    if not code:
        return TurnOutcome(reply)
    return TurnOutcome(reply, (code,), (CellResult("c1", **{"status": "ok", **result}),))  # type: ignore[arg-type]


def test_no_code_gets_a_nudge_and_an_empty_reply_says_so() -> None:
    assert feedback(outcome("I think it is 42."), None) == NUDGE
    assert feedback(outcome("  \n"), None) == EMPTY


def test_the_same_reply_and_the_same_code_get_a_remark() -> None:
    first, other = outcome("plan", "x"), outcome("other words", "x\n")
    assert SAME_REPLY in feedback(first, first)
    assert SAME_CODE in feedback(other, first)
    assert SAME_CODE not in feedback(outcome("plan", "y"), first)
    assert SAME_REPLY in feedback(outcome("text"), outcome("text"))


def test_a_search_that_found_nothing_gets_a_remark() -> None:
    for printed in ("0\n", "[]\n", "None", "  0 []\n"):
        assert FOUND_NOTHING in feedback(outcome("plan", "x", stdout=printed), None)
    for printed in ("10\n", "[0]\n", "0 of 3\n", ""):
        assert FOUND_NOTHING not in feedback(outcome("plan", "x", stdout=printed), None)


def test_unlabelled_code_is_remarked_on() -> None:
    assert feedback(TurnOutcome("r", ("x",), (CellResult("c1", "ok"),), unlabelled=True), None).startswith(
        UNLABELLED
    )


def test_long_output_keeps_head_and_tail() -> None:
    text = show(CellResult("c1", "ok", stdout="HEAD" + "x" * 100_000 + "TAIL"))
    assert text.startswith("HEAD") and text.endswith("TAIL") and len(text) < OUTPUT_CHARS + 100
    assert "of 100,008 characters left out" in text


def test_what_happened_to_a_cell_is_told() -> None:
    assert "SIGSEGV" in show(CellResult("c1", "rolled_back", rollback="SIGSEGV"))
    assert "as it was before" in show(CellResult("c1", "rolled_back", rollback="x"))
    assert "time was up" in show(CellResult("c1", "timeout"))
    assert "interrupted" in show(CellResult("c1", "interrupted"))
    assert "no output" in show(CellResult("c1", "ok"))
    assert "[variables: a, b]" in show(CellResult("c1", "ok", variables={"a": "int", "b": "str"}))
    assert "[a remark]" in show(CellResult("c1", "ok", notices=("a remark",)))


def test_names_and_notices_that_a_cell_makes_up_do_not_fill_the_prompt() -> None:
    many = {f"{'v' * 190}{n}": "int" for n in range(256)}
    text = show(CellResult("c1", "ok", variables=many, notices=("n" * 500,) * 64))
    assert len(text) < 6_000


def test_control_characters_are_made_visible() -> None:
    assert show(CellResult("c1", "ok", stdout="\x1b[31m\u202ered")) == "\\x1b[31m\\u202ered"


def test_each_of_several_blocks_has_its_output() -> None:
    two = TurnOutcome(
        "r", ("a", "b"), (CellResult("c1", "ok", stdout="1"), CellResult("c2", "ok", stdout="2"))
    )
    assert feedback(two, None) == "Output of block 1 of 2:\n1\n\nOutput of block 2 of 2:\n2"


def test_output_is_cut_before_it_is_made_printable_which_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(text: str) -> str:
        made.append(len(text))
        return printable(text)

    monkeypatch.setattr(feedback_module, "printable", counted)
    hostile = "\x01" * (256 << 10)
    text = show(CellResult("c1", "ok", stdout=hostile, stderr=hostile))
    assert max(made) < OUTPUT_CHARS + 100 and len(text) < 5 * OUTPUT_CHARS and "\\x01" in text
