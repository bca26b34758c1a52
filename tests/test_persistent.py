"""A REPL that goes on from one completion to the next, and conversations that outgrow their LM."""

import asyncio
import gc
import os

import pytest

from rlm_core import (
    RLM,
    LMRequest,
    LMResponse,
    RLMLogger,
    SandboxLost,
    ScriptedClient,
    TokenUsage,
    persistence,
)
from tests.conftest import Recorder
from tests.support.processes import descendants, none_but


def script(*codes: str) -> ScriptedClient:
    return ScriptedClient([f"```repl\n{code}\n```" for code in codes])


def test_contexts_variables_and_histories_add_up() -> None:
    lm = script(
        "kept = context.upper(); FINAL(kept)",
        "FINAL([kept, context, context_0, context_1, dict(answer), len(history), history_0 == history])",
        "FINAL([context, context_2, kept, history_0[-1]['content'][:20], history == history_1, type(history)])",
    )
    with RLM(backend=lm, persistent=True) as rlm:
        assert rlm.completion("one", root_prompt="first?").response == "ONE"
        second = rlm.completion({"two": 2}).response
        assert second == str(["ONE", {"two": 2}, "one", {"two": 2}, {"content": "", "ready": False}, 2, True])
        third = rlm.completion("three").response
        assert third == str(["three", "three", "ONE", "```repl\nkept = conte", True, list])
    later = lm.requests[2].messages[1]["content"]
    assert "`context_0` to `context_1`" in later and "`history_0` to `history_1`" in later
    assert "first?" not in later and "answered before" not in lm.requests[0].messages[1]["content"]


def test_without_it_every_completion_begins_anew() -> None:
    lm = script("kept = 1; FINAL(1)", "FINAL('kept' in globals())")
    with RLM(backend=lm) as rlm:
        rlm.completion("x")
        assert rlm.completion("x").response == "False"


def test_close_ends_its_sandbox_and_the_next_completion_starts_another() -> None:
    before = set(descendants(os.getpid()))
    lm = ScriptedClient(lambda request: "```repl\nFINAL('kept' in globals()); kept = 1\n```")
    with RLM(backend=lm, persistent=True) as rlm:
        rlm.completion("x")
        assert set(descendants(os.getpid())) != before
        rlm.close()
        assert set(descendants(os.getpid())) == before
        assert rlm.completion("x").response == "False"
    assert set(descendants(os.getpid())) == before


async def test_an_interrupted_completion_leaves_the_repl_usable() -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def reply(request: LMRequest) -> str:
        if len(request.messages) == 1:
            loop.call_soon_threadsafe(begun.set)
        turn = len([each for each in request.messages if each["role"] == "assistant"])
        if len(request.messages) > 1 and "second" in request.messages[1]["content"]:
            return "```repl\nFINAL(kept)\n```"
        return ["```repl\nkept = 7\n```", "```repl\nllm_query('go')\nwhile True: pass\n```"][turn]

    async with RLM(backend=ScriptedClient(reply), persistent=True) as rlm:
        task = asyncio.ensure_future(rlm.acompletion("x"))
        await asyncio.wait_for(begun.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await rlm.acompletion("second")).response == "7"


def test_a_lost_sandbox_is_told_and_replaced() -> None:
    lm = script("FINAL(1)", "FINAL(2)")
    with RLM(backend=lm, persistent=True) as rlm:
        rlm.completion("x")
        repl = rlm._repl
        assert repl is not None and repl._sandbox is not None
        repl._sandbox.kill()
        with pytest.raises(SandboxLost):
            rlm.completion("x")
        assert rlm.completion("x").response == "2"


def counted(*replies: str, tokens: int) -> ScriptedClient:
    """Each reply's usage says that the conversation has so many tokens a message."""
    left = iter(replies)

    def reply(request: LMRequest) -> LMResponse:
        return LMResponse(next(left), "m", TokenUsage(tokens * len(request.messages), 10))

    return ScriptedClient(reply, "m", context_window=10_000)


def test_a_conversation_that_fills_the_window_goes_on_from_a_summary() -> None:
    lm = counted(
        *["```repl\nx = 1\nprint('seen 1')\n```", "```repl\nx += 1\nprint('seen 2')\n```"],
        "I have x, which is 2. Next I add one.",
        "```repl\nFINAL([x + 1, len(history), [each.get('type') for each in history], history[0]['content']])\n```",
        tokens=2_000,
    )
    with RLM(backend=lm, compaction=True, compaction_threshold_pct=0.7) as rlm:
        answer = rlm.completion("the text", root_prompt="q").response
    asked, after = lm.requests[2].messages, lm.requests[3].messages
    assert "Write a summary" in asked[-1]["content"] and "seen 2" in asked[-1]["content"]
    assert [each["role"] for each in after] == ["system", "user", "assistant", "user"]
    assert after[2]["content"] == "I have x, which is 2. Next I add one." and "seen" not in str(after[1:])
    assert "replaced by your summary" in after[3]["content"] and "28 turns left" in after[3]["content"]
    assert answer == str([3, 5, [None, None, None, None, "summary"], "```repl\nx = 1\nprint('seen 1')\n```"])


def test_a_conversation_that_fits_is_left_alone() -> None:
    lm = counted("```repl\n1\n```", "```repl\nFINAL(len(history))\n```", tokens=2_000)
    with RLM(backend=lm, compaction=True, persistent=True) as rlm:
        assert rlm.completion("x").response == "2"
    assert len(lm.requests) == 2


def test_a_cell_that_breaks_the_history_costs_no_answer() -> None:
    code = "import rlm_agent.worker.context as c\ndef no(*a): raise ValueError\nc.decode = no\nFINAL('paid')"
    with RLM(backend=script(code, "FINAL('kept' in globals())"), persistent=True) as rlm:
        assert rlm.completion("x").response == "paid"
        assert rlm.completion("x").response == "False"  # in a new sandbox
    with RLM(backend=script(code.replace("FINAL('paid')", ""), "FINAL(2)"), compaction=True) as rlm:
        assert rlm.completion("x").response == "2"


def test_long_outputs_fit_into_the_history() -> None:
    block = "```repl\nprint('\U0001f600' * 19_990)\n```\n"
    lm = ScriptedClient([block * 14 + "and", "```repl\nFINAL(len(history))\n```"])
    with RLM(backend=lm, compaction=True, persistent=True) as rlm:
        assert rlm.completion("x").response == "2"


def test_a_persistent_run_is_watched_as_any_other(recorder: Recorder) -> None:
    lm = script("print('one')\nFINAL(1)", "print('two')\nFINAL(2)")
    with RLM(backend=lm, persistent=True, observer=recorder) as rlm:
        rlm.completion("x")
        rlm.completion("x")
    assert recorder.text == "one\ntwo\n"


def test_a_start_that_takes_longer_than_the_run_has_is_a_limit_as_any_other(recorder: Recorder) -> None:
    kwargs = {"persistent": True, "max_timeout": 0.001, "on_limit": "return"}
    lm = ScriptedClient(lambda request: "FINAL(1)")
    with RLM(backend=lm, logger=RLMLogger(), **kwargs) as rlm:  # type: ignore[arg-type]
        result = rlm.completion("x")
    assert (result.status, result.response) == ("max_timeout", "")


def test_a_conversation_that_a_limit_ended_is_kept_too() -> None:
    lm = ScriptedClient(
        [
            *["```repl\nkept = 1\n```", "```repl\n1\n```"],
            "```repl\nFINAL([kept, len(history_0), context_1])\n```",
        ]
    )
    with RLM(backend=lm, persistent=True, max_calls=2, on_limit="return") as rlm:
        assert rlm.completion("one").status == "max_calls"
        assert rlm.completion("two").response == "[1, 5, 'two']"


async def test_a_persistent_one_that_nobody_closes_leaves_nothing() -> None:
    before = set(descendants(os.getpid()))
    rlm = RLM(backend=script("FINAL(1)"), persistent=True)
    await rlm.acompletion("x")
    assert set(descendants(os.getpid())) - before
    del rlm
    gc.collect()
    await none_but(before, below=os.getpid())


def test_what_the_newest_output_adds_to_a_conversation_counts() -> None:
    fills = "```repl\nprint('y' * 19_000)\n```"
    lm = counted(fills, "<think>hm</think>so far", "```repl\nFINAL(1)\n```", tokens=2_000)
    with RLM(backend=lm, compaction=True) as rlm:
        assert rlm.completion("x").response == "1"
    asked, after = lm.requests[1].messages, lm.requests[2].messages
    assert "Write a summary" in asked[-1]["content"] and len(asked[-1]["content"]) < 6_000
    assert after[-2]["content"] == "so far"


def test_a_repl_that_takes_long_to_take_the_conversation_costs_the_repl_and_not_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(persistence, "HISTORY_SECONDS", 0.2)
    code = "import rlm_agent.worker.context as c, time\nc.decode = lambda *a: time.sleep(60)\nFINAL('paid')"
    with RLM(backend=script(code, "FINAL('c' in globals())"), persistent=True) as rlm:
        first = rlm.completion("x")
        assert first.response == "paid" and first.execution_time < 30
        assert rlm.completion("x").response == "False"  # in a new sandbox
