"""Child runs: what they see, what they can't change, what they cost, and how they end."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from rlm_core import RLM, CallLimitExceededError, LMRequest, LMResponse, RLMLogger, ScriptedClient, TokenUsage

Replies = Callable[[str, LMRequest], str]


def model(replies: Replies, name: str = "root") -> ScriptedClient:
    """Plays roots and sub-LMs: `replies` gets a run's context or a prompt, as far as it can be seen."""

    def reply(request: LMRequest) -> LMResponse:
        first = (
            request.messages[-1]["content"] if len(request.messages) == 1 else request.messages[1]["content"]
        )
        return LMResponse(replies(first, request), name, TokenUsage(10, 1))

    return ScriptedClient(reply, name)


def is_lm(request: LMRequest) -> bool:
    return len(request.messages) == 1


def test_a_child_sees_its_parents_variables_and_cannot_change_them() -> None:
    parent = """```repl
shared = [1, 2]
told = rlm_query("sum it, with all of the context")
FINAL((str(told), told.ok, shared, "made" in globals()))
```"""
    child = """```repl
shared.append(len(parent_context)); made = 1
FINAL(f"{sum(shared)} {context[:6]} {answer['content']!r}")
```"""
    lm = model(lambda first, request: child if "sum it" in first else parent)
    with RLM(backend=lm, max_depth=2) as rlm:
        result = rlm.completion("x" * 100, root_prompt="q")
    assert result.response == "(\"103 sum it ''\", True, [1, 2], False)"
    assert result.usage_summary.model_usage_summaries["root"].total_calls == 2


def test_depth_is_the_hosts_and_ends_in_plain_calls() -> None:
    depths: list[tuple[int, str, str]] = []

    def replies(first: str, request: LMRequest) -> str:
        if is_lm(request):
            return f"plain {first}"
        return "```repl\nFINAL('<' + rlm_query('d' + context[-1:]) + '>')\n```"

    with RLM(backend=model(replies), max_depth=3, on_subcall_start=lambda *each: depths.append(each)) as rlm:
        assert rlm.completion("x").response == "<<<plain dx>>>"
    assert [depth for depth, _, _ in depths] == [1, 2]


def test_children_are_told_of_and_are_in_the_trajectory() -> None:
    told: list[Any] = []

    def replies(first: str, request: LMRequest) -> str:
        if is_lm(request):
            return "sub"
        if "child task" in first:
            return "```repl\nFINAL(llm_query('part'))\n```"
        return "```repl\nFINAL(rlm_query('child task'))\n```"

    def broken(*arguments: Any) -> None:
        told.append(("start", *arguments))
        raise ValueError("of the user's")

    async def slow(*arguments: Any) -> None:
        told.append(("end", *arguments[:2], arguments[3]))

    logger = RLMLogger()
    with RLM(
        backend=model(replies),
        max_depth=2,
        logger=logger,
        on_subcall_start=broken,
        on_subcall_complete=slow,
        on_iteration_start=lambda *each: told.append(("turn", *each)),
        on_iteration_complete=lambda *each: told.append(("turned", *each[:2])),
    ) as rlm:
        result = rlm.completion("x")
    assert result.response == "sub"
    assert told == [
        ("turn", 0, 1),
        ("start", 1, "root", "child task"),
        ("turn", 1, 1),
        ("turned", 1, 1),
        ("end", 1, "root", None),
        ("turned", 0, 1),
    ]
    assert result.metadata is not None
    (call,) = result.metadata["iterations"][0]["code_blocks"][0]["result"]["rlm_calls"]
    assert (
        call["response"] == "sub"
        and call["usage_summary"]["model_usage_summaries"]["root"]["total_calls"] == 2
    )
    (inner,) = call["metadata"]["iterations"]
    assert inner["code_blocks"][0]["result"]["rlm_calls"][0]["response"] == "sub"
    assert result.usage_summary.model_usage_summaries["root"].total_calls == 3


def test_a_batch_of_children_runs_at_once_within_its_limit() -> None:
    now = most = 0

    def start(*_: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)

    def end(*_: Any) -> None:
        nonlocal now
        now -= 1

    def replies(first: str, request: LMRequest) -> str:
        if "task" in first:
            return "```repl\nimport time; time.sleep(0.2); FINAL(context)\n```"
        return "```repl\nFINAL(' '.join(rlm_query_batched([f'task {n}' for n in range(6)])))\n```"

    with RLM(
        backend=model(replies),
        max_depth=2,
        max_concurrent_subcalls=3,
        on_subcall_start=start,
        on_subcall_complete=end,
    ) as rlm:
        assert rlm.completion("x").response == "task 0 task 1 task 2 task 3 task 4 task 5"
    assert most == 3


@pytest.mark.parametrize("isolation", ["fork", "sandbox"])
def test_a_child_that_fails_fails_its_call_only(isolation: str) -> None:
    def replies(first: str, request: LMRequest) -> str:
        if "good" in first:
            return "```repl\nFINAL('good ' + str('secret' in globals()))\n```"
        if "bad" in first:
            return "```repl\nimport os; os.kill(os.getpid(), 9)\n```"
        return (
            "```repl\nsecret = 1\nr = rlm_query_batched(['good', 'bad'], )\nFINAL([str(r[0]), r[1].ok])\n```"
        )

    with RLM(
        backend=model(replies), max_depth=2, max_errors=2, child_isolation=isolation, max_iterations=5
    ) as rlm:
        answer = rlm.completion("x").response
    assert answer == f"['good {isolation == 'fork'}', False]"


def test_where_threads_run_a_child_has_a_new_session() -> None:
    code = """```repl
import threading
secret = 1
got = []
ts = [threading.Thread(target=lambda: got.append(rlm_query('child task'))) for _ in range(2)]
[t.start() for t in ts]; [t.join() for t in ts]
FINAL([str(g) for g in got])
```"""
    child = "```repl\nFINAL(context + str('secret' in globals()))\n```"
    lm = model(lambda first, request: child if "child task" in first else code)
    with RLM(backend=lm, max_depth=2) as rlm:
        assert rlm.completion("x").response == "['child taskFalse', 'child taskFalse']"


def test_children_draw_on_their_parents_budget() -> None:
    def replies(first: str, request: LMRequest) -> str:
        if "again" in first:
            return "```repl\n1\n```"  # never ends
        return "```repl\nr = rlm_query('again')\nprint(r.ok, r)\n```"

    with RLM(backend=model(replies), max_depth=2, max_calls=10, max_iterations=50) as rlm:
        with pytest.raises(CallLimitExceededError):
            rlm.completion("x")


def test_a_child_may_have_another_model() -> None:
    other = model(lambda first, request: "```repl\nFINAL('by the other')\n```", "other")
    code = "```repl\nr = rlm_query_batched(['a', 'b'], model='other')\nu = rlm_query('c', model='nobody')\nFINAL([*r, u])\n```"
    with RLM(backend=model(lambda first, request: code), other_backends=[other], max_depth=2) as rlm:
        answer = rlm.completion("x").response
    assert answer.count("by the other") == 2 and re.search(
        "unknown model 'nobody'; known: other, root", answer
    )


async def test_cancelling_the_root_ends_its_children() -> None:
    begun = asyncio.Event()
    ended: list[str | None] = []
    loop = asyncio.get_running_loop()

    async def reply(request: LMRequest) -> str:
        if "child task" in request.messages[1]["content"]:
            loop.call_soon_threadsafe(begun.set)
            await asyncio.Event().wait()
        return "```repl\nrlm_query('child task')\n```"

    rlm = RLM(
        backend=ScriptedClient(reply), max_depth=2, on_subcall_complete=lambda *each: ended.append(each[3])
    )
    async with rlm:
        task = asyncio.ensure_future(rlm.acompletion("x"))
        await asyncio.wait_for(begun.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["interrupted"]


def test_a_child_starts_where_its_parents_cell_has_deleted_its_names() -> None:
    code = "```repl\ndel context_0, context, history, answer, llm_query\nFINAL(str(rlm_query('child task')))\n```"
    lm = model(lambda first, request: "```repl\nFINAL(context)\n```" if "child task" in first else code)
    with RLM(backend=lm, max_depth=2) as rlm:
        assert rlm.completion("x").response == "child task"


def test_a_child_that_failed_is_in_the_trajectory_with_what_it_cost() -> None:
    def replies(first: str, request: LMRequest) -> str:
        if "child task" in first:
            return "```repl\nanswer['content'] = 'half'; 1/0\n```"
        return "```repl\nr = rlm_query('child task')\nFINAL(r.error)\n```"

    with RLM(backend=model(replies), max_depth=2, max_errors=2, logger=RLMLogger()) as rlm:
        result = rlm.completion("x")
    assert result.metadata is not None
    (call,) = result.metadata["iterations"][0]["code_blocks"][0]["result"]["rlm_calls"]
    assert (call["status"], call["root_model"], call["response"]) == ("failed", "root", "half")
    assert "2 turns in a row had errors" in call["error"] and len(call["metadata"]["iterations"]) == 2
    used = call["usage_summary"]["model_usage_summaries"]["root"]
    assert (used["total_calls"], used["total_input_tokens"]) == (2, 20)
    assert result.usage_summary.model_usage_summaries["root"].total_calls == 3


@pytest.mark.parametrize(
    "error", [ValueError("no"), StopIteration(), SystemExit(3), asyncio.CancelledError()]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_callback_raises_is_logged_and_harms_nothing(
    error: BaseException, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise error

    async def fails_later(*_: Any) -> None:
        fails()

    callback: Any = fails_later if is_async else fails
    code = "```repl\nFINAL(str(rlm_query('child task')))\n```"
    lm = model(lambda first, request: "FINAL(fine)" if "child task" in first else code)
    names = ("on_iteration_start", "on_iteration_complete", "on_subcall_start", "on_subcall_complete")
    with RLM(backend=lm, max_depth=2, **dict.fromkeys(names, callback)) as rlm:
        assert rlm.completion("x").response == "fine"
    assert {f"{name} failed" for name in names} <= {record.getMessage() for record in caplog.records}


async def test_a_clients_own_exception_is_told_to_the_callback() -> None:
    ended: list[str | None] = []

    def replies(first: str, request: LMRequest) -> str:
        if "child task" in first:
            raise KeyError("of the client")
        return "```repl\nFINAL(rlm_query('child task').ok)\n```"

    told = lambda *each: ended.append(each[3])  # noqa: E731
    async with RLM(backend=model(replies), max_depth=2, on_subcall_complete=told) as rlm:
        assert (await rlm.acompletion("x")).response == "False"
    assert ended == ["KeyError('of the client')"]


def test_what_a_child_has_bought_is_never_its_parents_answer() -> None:
    def replies(first: str, request: LMRequest) -> str:
        if is_lm(request):
            return "FORGED"
        if "child 1" in first:
            return "```repl\nrlm_query('child 2'); raise SystemError\n```"
        if "child 2" in first:
            return "FINAL(honest)"
        return "```repl\nrlm_query('child 1')\nFINAL(str(rlm_query('child 2')))\n```"

    with RLM(backend=model(replies), max_depth=2, max_errors=1, child_isolation="sandbox") as rlm:
        assert rlm.completion("x").response == "honest"
