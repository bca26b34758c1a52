"""What a cell finds in its REPL, and what it leaves there."""

import pytest

from rlm_core.errors import ConfigError
from rlm_core.session import Session


async def out(session: Session, code: str) -> str:
    result = await session.execute(code)
    return result.stdout + result.stderr


async def test_the_last_bare_expression_is_echoed(session: Session) -> None:
    assert await out(session, "x = 2\nx * 21") == "42\n"
    assert await out(session, "None") == ""
    assert await out(session, "for i in range(2): i") == ""


async def test_classes_functions_and_pickles_work_as_in_main(session: Session) -> None:
    code = """
import pickle
from dataclasses import dataclass
@dataclass
class Point:
    x: int
copy = pickle.loads(pickle.dumps(Point(3)))
print(copy, __name__, Point.__module__)
"""
    assert await out(session, code) == "Point(x=3) __main__ __main__\n"


async def test_a_traceback_shows_the_cells_own_lines(session: Session) -> None:
    await session.execute("def divide(a, b):\n    return a / b")
    text = await out(session, "divide(1, 0)")
    assert "return a / b" in text and "divide(1, 0)" in text and "ZeroDivisionError" in text
    assert "rlm_agent" not in text


async def test_a_syntax_error_points_at_its_place(session: Session) -> None:
    result = await session.execute("x = = 1")
    assert result.error is not None and result.error.type == "SyntaxError"
    assert "x = = 1" in result.stderr and "^" in result.stderr


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import sys; sys.exit()", "exit()"])
async def test_exit_is_an_exception_and_the_repl_goes_on(session: Session, code: str) -> None:
    result = await session.execute(f"x = 1\n{code}")
    assert result.status == "error" and result.error is not None and result.error.type == "SystemExit"
    assert await out(session, "print(x)") == "1\n"


@pytest.mark.parametrize("base", ["BaseException", "KeyboardInterrupt", "GeneratorExit"])
async def test_an_exception_with_a_hostile_text_is_bounded(session: Session, base: str) -> None:
    code = f"""
class Evil({base}):
    def __str__(self): raise {base}("again")
raise Evil
"""
    result = await session.execute(code)
    assert result.status == "error" and result.error is not None and result.error.type == "Evil"
    long = await session.execute("raise ValueError('x' * 10_000_000)")
    assert long.error is not None and len(long.error.message) < 100_000


async def test_stdin_is_empty(session: Session) -> None:
    result = await session.execute("input()")
    assert result.error is not None and result.error.type == "EOFError"


async def test_show_vars_lists_what_was_made(session: Session) -> None:
    assert await out(session, "print(SHOW_VARS())") == "No variables yet.\n"
    await session.execute("import os\nrows = [1]\ndef f(): ...\n_hidden = 1")
    assert await out(session, "print(SHOW_VARS())") == "Variables: rows (list), f (function)\n"


@pytest.mark.parametrize(
    "code",
    [
        'answer["content"] = "42"; answer["ready"] = True',
        'answer.update(content="42", ready=True)',
        'answer = {"content": "42", "ready": True}',
        "FINAL(42)",
        "x = 42\nFINAL_VAR('x')",
        "x = 42\nFINAL_VAR(x)",
        "x = '42'\nFINAL_VAR(' x ')",
        "FINAL('42')\n1/0",
        "class Text:\n  def __str__(self): return '42'\nFINAL(Text())",
    ],
)
async def test_an_answer_is_read_whatever_way_it_was_set(session: Session, code: str) -> None:
    result = await session.execute(code)
    assert (result.answer_ready, result.answer) == (True, "42")


async def test_final_var_of_no_variable_is_an_error_and_no_answer(session: Session) -> None:
    result = await session.execute("FINAL_VAR('output')")
    assert not result.answer_ready
    assert result.error is not None and "there is no variable 'output'" in result.error.message


async def test_an_answer_with_more_text_than_one_name_is_a_value(session: Session) -> None:
    result = await session.execute("FINAL_VAR('two words')")
    assert (result.answer_ready, result.answer) == (True, "two words")


async def test_an_answer_that_is_too_long_is_refused_and_the_next_one_counts(session: Session) -> None:
    result = await session.execute("FINAL('x' * 5_000_000)")
    assert not result.answer_ready and result.error is not None and "at most" in result.error.message
    assert (await session.execute("FINAL('short')")).answer == "short"


async def test_an_unready_answer_is_told(session: Session) -> None:
    result = await session.execute('answer["content"] = "so far"')
    assert (result.answer_ready, result.answer) == (False, "so far")


async def test_an_answer_whose_text_fails_is_an_error_of_the_cell(session: Session) -> None:
    result = await session.execute("class Bad:\n  def __str__(self): raise ValueError('no')\nFINAL(Bad())")
    assert result.status == "error" and result.error is not None and result.error.type == "ValueError"


async def test_an_answer_whose_text_never_ends_costs_its_own_cell_and_no_other(session: Session) -> None:
    code = "import time\nclass Slow:\n  def __str__(self): time.sleep(600)\nanswer['content'] = Slow()"
    assert (await session.execute(code, timeout=0.3)).status == "timeout"
    result = await session.execute("print('on')", timeout=20)
    assert (result.status, result.stdout, result.answer) == ("ok", "on\n", "")
    assert (await session.execute("answer['ready'] = True", timeout=0.3)).status == "timeout"
    result = await session.execute("answer.update(content='so far')")
    assert (result.answer_ready, result.answer) == (False, "so far")


async def test_repl_names_come_back_and_the_users_value_is_kept(session: Session) -> None:
    await session.put_context("the text")
    result = await session.execute("llm_query = 5\ncontext = context.upper()\nanswer = 'mine'\ndel FINAL")
    assert len(result.notices) == 3
    assert await out(session, "print(llm_query_, context_, answer_, context, callable(FINAL), answer)") == (
        "5 THE TEXT mine the text True {'content': '', 'ready': False}\n"
    )


async def test_replaced_and_closed_streams_come_back(session: Session) -> None:
    await session.execute("import sys, os\nsys.stdout = None\nos.close(1)\nos.close(2)\nsys.stderr.close()")
    assert await out(session, "print('here')") == "here\n"
    await session.execute("import os; os.dup2(os.open('/dev/null', os.O_WRONLY), 1)")
    assert await out(session, "print('again')") == "again\n"


async def test_an_own_module_in_the_working_folder_imports(session: Session) -> None:
    await session.execute("open('helper.py', 'w').write('def f(): return 7')")
    assert await out(session, "import helper; print(helper.f())") == "7\n"


async def test_rlm_query_without_recursion_is_an_lm_call(session: Session) -> None:
    assert await out(session, "rlm_query('hi')") == "'echo hi'\n"
    assert await out(session, "rlm_query_batched(['a', 'b'])") == "['echo a', 'echo b']\n"


async def test_variables_are_listed_and_read_with_bounded_reprs(session: Session) -> None:
    await session.execute(
        "a = 'x' * 10_000\nb = {'k': list(range(10_000))}\nclass Bad:\n  def __repr__(self): raise ValueError\nbad = Bad()"
    )
    found = {each.name: each for each in await session.variables()}
    assert list(found) == ["a", "b", "Bad", "bad"]
    assert all(len(each.repr) <= 200 for each in found.values())
    assert found["b"].type == "dict" and found["bad"].repr.startswith("<Bad instance at")
    assert await session.read_variable("a", max_bytes=5) == "xxxxx"
    assert (await session.read_variable("b")).startswith("{'k': [0, 1,")


async def test_a_repr_that_dies_or_hangs_changes_nothing(
    session: Session,
) -> None:
    await session.execute("import os\nkept = 1\nclass Dies:\n  def __repr__(self): os._exit(1)\nd = Dies()")
    with pytest.raises(ConfigError, match="killed the worker"):
        await session.variables()
    assert await out(session, "print(kept)") == "1\n"


async def test_reading_a_variable_that_is_not_there_names_it(session: Session) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        await session.read_variable("nothing")


@pytest.mark.parametrize(
    "value", ["re.search('b', 'abc')", "(n for n in 'abc')", "object()", "map(str, [1])"]
)
async def test_an_object_that_says_nothing_is_no_answer(session: Session, value: str) -> None:
    result = await session.execute(f"import re\nFINAL({value})")
    assert not result.answer_ready and "is no answer: give what it holds" in result.stderr
    assert (await session.execute("FINAL('<object>')")).answer == "<object>"


async def test_a_cell_that_takes_poll_away_undoes_nothing(session: Session) -> None:
    assert (await session.execute("import select; del select.poll; x = 1")).status == "ok"
    assert (await session.execute("print(x)")).stdout == "1\n"
