"""The loop between a scripted root LM and a real sandbox."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rlm_core import RLM, EmptyReply, LMRequest, LMResponse, RLMChatCompletion, ScriptedClient, ScriptError


def repl(code: str) -> str:
    return f"```repl\n{code}\n```"


def run(replies: Sequence[Any], context: Any = "text", **kwargs: Any) -> tuple[RLMChatCompletion, list[str]]:
    """The completion, and the last message of each request to the root LM."""
    lm = ScriptedClient(replies)
    with RLM(backend=lm, **kwargs) as rlm:
        completion = rlm.completion(context, root_prompt="question")
    lm.check_finished()
    return completion, [request.messages[-1]["content"] for request in lm.requests]


def test_a_run_from_question_to_answer() -> None:
    completion, seen = run([repl("n = len(context)\nprint(n)"), repl("FINAL(n + 1)")], "x" * 1000)
    assert (completion.response, completion.status, completion.iterations) == ("1001", "answered", 2)
    assert completion.root_model == "scripted" and completion.execution_time > 0
    assert seen[1].startswith("Output:\n1000\n[variables: n]\n\nYou have 29 turns left. When you know")
    usage = completion.usage_summary.to_dict()["model_usage_summaries"]["scripted"]
    assert usage["total_calls"] == 2 and usage["total_input_tokens"] > 100


def test_blocks_after_the_one_that_finishes_do_not_run(tmp_path: Any) -> None:
    marker = tmp_path / "ran"
    reply = f"{repl('a = 1')}\n{repl('FINAL(a)')}\n{repl(f'open({str(marker)!r}, chr(119))')}"
    assert run([reply])[0].response == "1"
    assert not marker.exists()


def test_a_death_is_told_and_the_next_cell_has_everything() -> None:
    completion, seen = run([repl("x = 7"), repl("x = 0\nimport os; os._exit(9)"), repl("FINAL(x)")])
    assert completion.response == "7"
    assert "process died: exit code 9" in seen[2] and "as it was before" in seen[2]


def test_plain_fences_run_and_the_model_is_told() -> None:
    completion, seen = run(["```python\nx = 3\n```", "```\nFINAL(x)\n```"])
    assert completion.response == "3" and "not labelled `repl`" in seen[1]


def test_a_reply_without_code_is_nudged() -> None:
    _, seen = run(["I think it is 42.", repl("FINAL(42)")])
    assert "no code and no answer" in seen[1]


def test_an_answer_in_text_counts() -> None:
    assert run(["FINAL(It is (about) 42.)"])[0].response == "It is (about) 42."
    assert run([repl("result = [1, 2]"), "FINAL_VAR(result)"])[0].response == "[1, 2]"


def test_final_var_of_nothing_is_shown_and_is_no_answer() -> None:
    completion, seen = run(["FINAL_VAR(output)", repl("FINAL('right')")])
    assert completion.response == "right" and "there is no variable 'output'" in seen[1]


def test_repeating_oneself_gets_a_remark() -> None:
    _, seen = run([repl("1"), repl("1"), f"again\n{repl('1')}", repl("FINAL(1)")])
    assert "same as your last one" in seen[2] and "code is the same" in seen[3]


def test_roles_alternate_and_the_last_turn_is_announced() -> None:
    lm = ScriptedClient(["hm", "hm again", "so be it"])
    completion = RLM(backend=lm, max_iterations=2).completion("text")
    assert (completion.response, completion.status) == ("so be it", "max_iterations")
    roles = [message["role"] for message in lm.requests[-1].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "your last" in lm.requests[1].messages[-1]["content"]
    assert "no turns left" in lm.requests[2].messages[-1]["content"]


def test_at_the_end_the_model_sees_its_own_draft() -> None:
    completion, seen = run([repl('answer["content"] = "a draft"'), "better"], max_iterations=1)
    assert "a draft" in seen[1] and completion.response == "better"


def test_an_empty_last_word_falls_back_to_the_draft() -> None:
    completion, _ = run([repl('answer["content"] = "a draft"'), ""], max_iterations=1)
    assert (completion.response, completion.status) == ("a draft", "max_iterations")


def test_empty_replies_are_nudged_and_then_end_the_run() -> None:
    completion, seen = run(["", repl("FINAL(1)")])
    assert completion.response == "1" and "was empty" in seen[1]
    empty = LMResponse("", "m", finish_reason="length")
    with pytest.raises(EmptyReply, match=r"3 empty replies in a row \(finish reason 'length'\)"):
        run([empty, empty, empty])


def test_sub_calls_go_to_the_second_model_and_their_usage_is_counted() -> None:
    sub = ScriptedClient(lambda request: request.messages[-1]["content"].upper(), "sub")
    completion, _ = run([repl("FINAL(llm_query_batched(['a', 'b']) + [llm_query('c', model='scripted2')])")], other_backends=[sub, ScriptedClient(["sea"], "scripted2")])  # fmt: skip
    assert completion.response == "['A', 'B', 'sea']"
    calls = {name: each.total_calls for name, each in completion.usage_summary.model_usage_summaries.items()}
    assert calls == {"scripted": 1, "sub": 2, "scripted2": 1}


def test_an_unknown_model_is_an_error_that_lists_the_known_ones() -> None:
    _, seen = run([repl("print(llm_query('x', model='nope'))"), repl("FINAL(1)")])
    assert "unknown model 'nope'; known: scripted" in seen[1]


def test_what_a_rolled_back_cell_bought_is_not_bought_again() -> None:
    asked: list[str] = []

    def sub(request: LMRequest) -> str:
        asked.append(request.messages[-1]["content"])
        return f"{asked[-1]} number {len(asked)}"

    batch = "rs = llm_query_batched(['a', 'b'])"
    completion, _ = run(
        [
            repl(f"{batch}\nimport os; os._exit(1)"),
            repl(f"{batch}\nrs.append(llm_query('a'))\nFINAL(sorted(rs))"),
        ],
        other_backends=[ScriptedClient(sub, "sub")],
    )
    assert sorted(asked) == ["a", "a", "b"]  # the third question was new: each answer is given once
    assert "a number 3" in completion.response


def test_max_depth_0_asks_directly() -> None:
    lm = ScriptedClient(["plain"])
    completion = RLM(backend=lm, max_depth=0).completion("the context", root_prompt="q")
    assert completion.response == "plain" and lm.requests[0].messages[0]["content"] == "q\n\nthe context"


def test_a_script_that_is_too_short_fails_the_run() -> None:
    with pytest.raises(ScriptError, match="script has 1 replies; call 2"):
        run([repl("1")])


def test_a_script_that_is_not_used_up_fails_at_close() -> None:
    rlm = RLM(backend="scripted", backend_kwargs={"replies": [repl("FINAL(1)"), "more"]})
    rlm.completion("x")
    with pytest.raises(ScriptError, match="1 of 2 scripted replies"):
        rlm.close()


async def test_cancelling_a_completion_ends_its_sandbox_and_its_calls() -> None:
    cancelled = asyncio.Event()
    loop = asyncio.get_running_loop()
    started = asyncio.Event()

    async def never(request: LMRequest) -> str:
        loop.call_soon_threadsafe(started.set)
        try:
            await asyncio.Event().wait()
        finally:
            loop.call_soon_threadsafe(cancelled.set)
        return ""

    rlm = RLM(backend=ScriptedClient([repl("llm_query('x')")]), other_backends=[ScriptedClient(never, "sub")])
    task = asyncio.create_task(rlm.acompletion("text"))
    async with asyncio.timeout(20):
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cancelled.wait()
