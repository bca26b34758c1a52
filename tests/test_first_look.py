"""What the root LM is shown of a question's words before it writes any code."""

from hypothesis import given
from hypothesis import strategies as st

from rlm_core import first_look as look
from rlm_core.first_look import first_look

FILLER = "Nothing of interest happened.\n" * 1_000
LINE = "The code of the vault is 48213."


def test_a_rare_word_is_shown_on_its_line() -> None:
    shown = first_look(f"{FILLER}{LINE}\n{FILLER}", "What is the code of the vault?")
    assert f"- 'vault' once, as in `{LINE}`" in shown and "'What'" not in shown


def test_of_a_frequent_word_one_place_is_enough() -> None:
    shown = first_look("step done ERROR\n" * 3_000, "How many have the level ERROR?")
    assert shown == "Words of the question in it:\n- 'ERROR' 3,000 times, as in `step done ERROR`"


def test_a_word_in_quotes_is_found() -> None:
    assert "'ERROR' 3,000 times" in first_look("step done ERROR\n" * 3_000, "How many lines say 'ERROR'?")


def test_parts_of_words_are_not_counted() -> None:
    text = "the start of it all\n" * 500
    assert not first_look(text, "Which art?")
    assert "- 'art' once, as in `an art of its own`" in first_look(f"{text}an art of its own\n", "Which art?")


def test_of_a_long_question_the_end_counts() -> None:
    rules = " ".join(f"rule{number}" for number in range(2_000))
    text = f"{LINE}\n" + "x" * 1_000_000
    assert "'vault' once" in first_look(text, f"{rules}. What is the code of the vault?")


def test_what_stands_everywhere_is_not_shown() -> None:
    assert not first_look("ERROR\n" * (look.MAX_COUNTED + 1), "How many ERROR?")


def test_where_nothing_is_to_be_shown_nothing_is_said() -> None:
    assert not first_look(FILLER, "Who was the keeper?")
    assert not first_look(FILLER, None)
    assert not first_look(LINE, "What is the code of the vault?")  # the prompt has all of it
    assert not first_look(["vault"] * 5_000, "What is the code of the vault?")


def test_a_text_that_is_too_long_is_not_searched() -> None:
    assert not first_look(LINE + "x" * look.MAX_SEARCHED, "What is the code of the vault?")


@given(st.text(max_size=400), st.text(max_size=200))
def test_it_is_short_and_one_line_a_word_whatever_the_text(text: str, question: str) -> None:
    shown = first_look(text * 10 + "y" * 1_000, question)
    assert len(shown) < (look.SHOWN_WORDS + 1) * 1_500
    assert shown.count("\n") <= look.SHOWN_WORDS
    shown.encode()  # can be sent
