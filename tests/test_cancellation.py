"""What ends a run, or a cell, ends its requests at the provider: a server counts those that are open."""

import asyncio
import signal
import threading
from typing import Any

import pytest

from rlm_core import RLM, CancellationError, ErrorThresholdExceededError, TimeoutExceededError
from tests.support.counting_lm import CountingLM, counting_lm

BATCH = "```repl\nr = llm_query_batched(['leaf'] * 5)\nprint(len(r))\n```"
CHILDREN = "```repl\nr = rlm_query_batched(['child one', 'child two'])\n```"


def tree(request: dict[str, Any]) -> str | None:
    """A root with two children, whose cells ask five leaves each, which never answer."""
    messages = request["messages"]
    if len(messages) == 1:
        return None
    return BATCH if "child" in messages[1]["content"] else CHILDREN


def make(server: CountingLM, **kwargs: Any) -> RLM:
    return RLM("openai", {"model_name": "m", "base_url": server.base_url}, max_depth=2, **kwargs)


async def test_cancelling_the_task_ends_the_requests_of_the_whole_tree() -> None:
    with counting_lm(tree) as server:
        async with make(server) as rlm:
            task = asyncio.ensure_future(rlm.acompletion("x"))
            await asyncio.to_thread(server.wait_for, lambda it: it.open == 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.wait_for, lambda it: it.open == 0)
        assert server.begun == 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDKs, in their own code
@pytest.mark.parametrize("backend", ["openai", "anthropic", "gemini", "litellm", "portkey", "vllm"])
async def test_cancelling_ends_the_request_of_every_backend(backend: str) -> None:
    with counting_lm(lambda request: None) as server:
        model = "openai/m" if backend == "litellm" else "m"
        kwargs = {"model_name": model, "base_url": server.base_url, "api_key": "k"}
        async with RLM(backend, kwargs, max_depth=0) as rlm:
            task = asyncio.ensure_future(rlm.acompletion("x"))
            await asyncio.to_thread(server.wait_for, lambda it: it.open == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.wait_for, lambda it: it.open == 0)


def test_a_budget_that_is_used_up_ends_the_requests_that_are_open() -> None:
    """A thread's calls are open when the cell of the last allowed error has ended."""
    code = """```repl
import threading
threads = [threading.Thread(target=llm_query, args=('leaf',)) for _ in range(5)]
[thread.start() for thread in threads]
print(llm_query('ready?'))
1/0
```"""

    def answer(request: dict[str, Any]) -> str | None:
        if len(request["messages"]) > 1:
            return code
        if request["messages"][0]["content"] == "leaf":
            return None
        server.wait_for(lambda it: it.open == 5)
        return "yes"

    with counting_lm(answer, in_thread=True) as server, make(server, max_errors=1) as rlm:
        with pytest.raises(ErrorThresholdExceededError):
            rlm.completion("x")
        server.wait_for(lambda it: it.open == 0)
        assert server.begun == 5


def test_ctrl_c_ends_the_requests_of_the_whole_tree() -> None:
    main = threading.main_thread().ident
    assert main is not None
    with counting_lm(tree) as server, make(server) as rlm:

        def interrupt() -> None:
            server.wait_for(lambda it: it.open == 10)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(CancellationError):
            rlm.completion("x")
        thread.join()
        server.wait_for(lambda it: it.open == 0)


def test_the_time_of_the_run_ends_the_requests_of_the_whole_tree() -> None:
    with counting_lm(tree) as server, make(server, max_timeout=6.0) as rlm:
        with pytest.raises(TimeoutExceededError):
            rlm.completion("x")
        server.wait_for(lambda it: it.open == 0)
        assert server.begun == 10


def test_a_cells_timeout_ends_the_requests_of_the_subtree_that_it_made() -> None:
    def once(request: dict[str, Any]) -> str | None:
        return "```repl\nFINAL('went on')\n```" if len(request["messages"]) >= 4 else tree(request)

    with counting_lm(once) as server, make(server, environment_kwargs={"cell_timeout": 6.0}) as rlm:
        assert rlm.completion("x").response == "went on"
        server.wait_for(lambda it: it.open == 0)
        assert server.begun == 10
