"""Each limit of a completion: its error, the best answer known, and what was really sent."""

import asyncio
import signal
import threading
from typing import Any

import pytest

from rlm_core import (
    RLM,
    BudgetExceededError,
    CallLimitExceededError,
    CancellationError,
    ErrorThresholdExceededError,
    LimitExceeded,
    LMRequest,
    LMResponse,
    RLMError,
    ScriptedClient,
    TimeoutExceededError,
    TokenLimitExceededError,
    TokenUsage,
)
from tests.support.lm_server import completion, lm_server

PARTIAL = "```repl\nanswer['content'] = 'so far'\n```"
PRICES = {"root": {"input": 1.0, "output": 10.0}, "sub": {"input": 1.0, "output": 10.0}}


def turns(*replies: str, usage: TokenUsage | None = None) -> ScriptedClient:
    """The replies, the last one again and again."""

    def reply(request: LMRequest) -> LMResponse:
        number = sum(each["role"] == "assistant" for each in request.messages)
        return LMResponse(replies[min(number, len(replies) - 1)], "root", usage or TokenUsage(1_000, 100))

    return ScriptedClient(reply, "root")


def sub(text: str = "yes", usage: TokenUsage | None = None) -> ScriptedClient:
    return ScriptedClient(lambda request: LMResponse(text, "sub", usage or TokenUsage(10, 10)), "sub")


@pytest.mark.parametrize(
    ("kwargs", "error", "status"),
    [
        ({"max_budget": 0.12, "prices": PRICES}, BudgetExceededError, "max_budget"),
        ({"max_tokens": 60_000}, TokenLimitExceededError, "max_tokens"),
        ({"max_calls": 4}, CallLimitExceededError, "max_calls"),
        ({"max_timeout": 3.0}, TimeoutExceededError, "max_timeout"),
    ],
)
def test_a_limit_ends_the_run_with_the_best_answer_known(
    kwargs: dict[str, Any], error: type[LimitExceeded], status: str
) -> None:
    usage = TokenUsage(10_000, 1_000)
    with RLM(backend=turns(PARTIAL, "```repl\n1\n```", usage=usage), **kwargs, max_iterations=999) as rlm:
        with pytest.raises(error) as caught:
            rlm.completion("x")
    assert caught.value.partial_answer == "so far" and isinstance(caught.value, RLMError)
    used = caught.value.completion
    assert used is not None and used.usage_summary.model_usage_summaries and used.response == "so far"
    with RLM(
        backend=turns(PARTIAL, "```repl\n1\n```", usage=usage),
        **kwargs,
        max_iterations=999,
        on_limit="return",
    ) as rlm:
        result = rlm.completion("x")
    assert (result.status, result.response) == (status, "so far")
    assert result.error is not None and "\n" not in result.error


def test_errors_in_a_row_end_the_run() -> None:
    lm = turns("```repl\n1/0\n```", "```repl\n1\n```", "```repl\nnope\n```")
    with RLM(backend=lm, max_errors=2) as rlm, pytest.raises(ErrorThresholdExceededError) as caught:
        rlm.completion("x")
    assert caught.value.error_count == 2 and "NameError" in str(caught.value.last_error)
    assert len(lm.requests) == 4  # the second turn was well, and began the count anew


def test_an_answer_of_the_turn_in_which_a_limit_is_reached_is_returned() -> None:
    code = "```repl\nr = llm_query_batched(['q'] * 6)\nFINAL(sum(x.ok for x in r))\n```"
    with RLM(backend=turns(code), other_backends=[sub()], max_calls=4) as rlm:
        assert rlm.completion("x").response == "3"
    with RLM(backend=turns("```repl\nimport time; time.sleep(1.2); FINAL(7)\n```"), max_timeout=1.0) as rlm:
        with pytest.raises(TimeoutExceededError):  # the cell itself was cut off
            rlm.completion("x")
    with RLM(backend=turns("```repl\nFINAL(7)\nimport time; time.sleep(9)\n```"), max_timeout=2.0) as rlm:
        assert rlm.completion("x").response == "7"
    with RLM(backend=turns("```repl\nFINAL(3); 1/0\n```"), max_errors=1) as rlm:
        assert rlm.completion("x").response == "3"


def test_a_budget_holds_in_the_middle_of_a_batch_and_the_server_bills_no_more() -> None:
    billed = 0.0

    def serve(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal billed
        last = request["messages"][-1]["content"]
        text = "```repl\nr = llm_query_batched(['y' * 2000] * 200)\nprint(sum(x.ok for x in r))\n```"
        tokens = min(request["max_completion_tokens"], 400)
        usage = {"prompt_tokens": len(last.encode()), "completion_tokens": tokens, "total_tokens": 0}
        billed += (usage["prompt_tokens"] * 1.0 + tokens * 10.0) / 1e6
        return 200, completion(text if len(request["messages"]) > 1 else "z", "m") | {"usage": usage}

    with lm_server(serve) as server:
        backend_kwargs = {"model_name": "m", "base_url": server.base_url}
        prices = {"m": {"input": 1.0, "output": 10.0}}
        with RLM("openai", backend_kwargs, max_budget=0.5, prices=prices, on_limit="return") as rlm:
            result = rlm.completion("x")
    assert result.status == "max_budget"
    assert 0.4 < billed <= 0.5 and result.usage_summary.total_cost == pytest.approx(billed)


def test_a_cell_that_is_cut_off_by_the_time_keeps_what_it_had() -> None:
    lm = turns("```repl\nanswer['content'] = 'half'\nwhile True: pass\n```")
    with RLM(backend=lm, max_timeout=1.0) as rlm, pytest.raises(TimeoutExceededError) as caught:
        rlm.completion("x")
    assert caught.value.partial_answer == "half" and caught.value.elapsed < 10


async def test_a_run_that_is_cancelled_is_cancelled_as_asyncio_has_it() -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never(request: LMRequest) -> str:
        loop.call_soon_threadsafe(begun.set)
        await asyncio.Event().wait()
        return ""

    async with RLM(backend=ScriptedClient(never)) as rlm:
        task = asyncio.ensure_future(rlm.acompletion("x"))
        await asyncio.wait_for(begun.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_ctrl_c_is_the_originals_error_and_pythons() -> None:
    main = threading.main_thread().ident
    assert main is not None

    def reply(request: LMRequest) -> str:
        if len(request.messages) > 2:
            signal.pthread_kill(main, signal.SIGINT)
        return PARTIAL

    with RLM(backend=ScriptedClient(reply)) as rlm:
        with pytest.raises(CancellationError) as caught:
            rlm.completion("x")
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.partial_answer == "so far"
    assert caught.value.completion is not None and caught.value.completion.error == "interrupted"


def test_a_sub_call_that_could_only_be_answered_after_the_runs_time_fails_and_the_run_goes_on() -> None:
    def serve(request: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]] | str:
        if len(request["messages"]) == 1:
            return 429, {"error": {"message": "later"}}, {"Retry-After": "60"}
        return "```repl\nFINAL(llm_query('q').error)\n```"

    with lm_server(serve) as server:
        with RLM("vllm", {"model_name": "m", "base_url": server.base_url}, max_timeout=30) as rlm:
            result = rlm.completion("x")
    assert "overloaded" in result.response and result.execution_time < 20


def test_a_provider_that_fails_for_one_prompt_of_a_batch_fails_its_slot() -> None:
    def serve(request: dict[str, Any]) -> tuple[int, dict[str, Any]] | str:
        if len(request["messages"]) > 1:
            return "```repl\nFINAL([each.ok for each in llm_query_batched(['a', 'bad', 'c'])])\n```"
        return (400, {"error": {"message": "no"}}) if request["messages"][0]["content"] == "bad" else "fine"

    with lm_server(serve) as server, RLM("vllm", {"model_name": "m", "base_url": server.base_url}) as rlm:
        assert rlm.completion("x").response == "[True, False, True]"


def test_what_one_completion_bought_is_not_given_to_another() -> None:
    asked: list[str] = []

    def ask(request: LMRequest) -> str:
        asked.append(request.messages[0]["content"])
        return f"answer {len(asked)}"

    root = turns("```repl\nr = llm_query('q')\n1/0\n```", "```repl\nFINAL(llm_query('q'))\n```")
    with RLM(backend=root, other_backends=[ScriptedClient(ask, "sub")]) as rlm:
        assert [rlm.completion("x").response for _ in range(2)] == ["answer 1", "answer 2"]
    assert asked == ["q", "q"]
