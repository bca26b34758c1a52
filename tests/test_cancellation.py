"""What ends a run, or a cell, ends its requests at the provider: a server counts those that are open."""

import asyncio
import signal
import threading
from typing import Any

import pytest

from rlm_core import RLM, CancellationError, TimeoutExceededError
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
    with counting_lm(tree) as server, make(server, max_timeout=4.0) as rlm:
        with pytest.raises(TimeoutExceededError):
            rlm.completion("x")
        server.wait_for(lambda it: it.open == 0)
        assert server.begun == 10


def test_a_cells_timeout_ends_the_requests_that_it_made() -> None:
    def once(request: dict[str, Any]) -> str | None:
        messages = request["messages"]
        if len(messages) == 1:
            return None
        return BATCH if len(messages) < 4 else "```repl\nFINAL('went on')\n```"

    with counting_lm(once) as server, make(server, environment_kwargs={"cell_timeout": 2.0}) as rlm:
        assert rlm.completion("x").response == "went on"
        server.wait_for(lambda it: it.open == 0)
        assert server.begun == 5
