"""Whatever a tree of runs does, and whenever it is stopped: no budget is overrun, and what it says it used is what
the server billed."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlm_core import RLM, ProviderError, UsageSummary
from rlm_core.broker import broker as broker_module
from rlm_core.broker.budget import Amount, Budget
from tests.support.billing_lm import BillingLM, Plan
from tests.support.counting_lm import serving

WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each try starts a tree of sandboxes
PRICE = {"m": {"input": 1.0, "output": 2.0}}

plain = st.sampled_from(
    [
        'llm_query("short")',
        'llm_query("long " * 200)',
        'llm_query_batched([f"piece {n}" for n in range(7)])',
        'x = [llm_query("first"), 1 / 0]',
        "import threading\nthreads = [threading.Thread(target=llm_query, args=('beside',)) for _ in range(3)]\n"
        "[t.start() for t in threads]\n[t.join() for t in threads]",
        'import os\nllm_query("then it dies")\nos._exit(1)',
    ]
)


def calling(*children: int) -> st.SearchStrategy[str]:
    """Cells that start the runs of these plans."""
    one = st.sampled_from(children).map(lambda n: f'rlm_query("plan {n}")')
    many = st.lists(st.sampled_from(children), min_size=2, max_size=3).map(
        lambda plans: f"rlm_query_batched({[f'plan {n}' for n in plans]})"
    )
    return st.one_of(one, many)


def run_of(cells: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(cells, min_size=1, max_size=3).map(tuple)


numbers = st.frozensets(st.integers(1, 25), max_size=5)
plans = st.builds(
    Plan,
    runs=st.tuples(
        run_of(st.one_of(plain, calling(1, 2))),  # of the root
        run_of(st.one_of(plain, calling(2))),
        run_of(plain),
    ),
    failing=numbers,
    slow=numbers,
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4).map(tuple),
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(10_000, 150_000),
        "max_budget": st.floats(0.01, 0.2),
        "max_calls": st.integers(1, 20),
    },
)


class Watched(Budget):
    """Looks after every change whether a limit is overrun."""

    made: "list[Watched]" = []  # noqa: RUF012 - of the test that is running

    def __init__(self, *args: Any) -> None:
        self.overrun: list[Amount] = []  # raising would be lost in a call's own task
        super().__init__(*args)
        self.made.append(self)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("spent", "reserved") and hasattr(self, "reserved"):
            taken = self.spent + self.reserved
            if (
                taken.calls > (self.limits.max_calls or taken.calls)
                or taken.tokens > (self.limits.max_tokens or taken.tokens)
                or taken.usd > (self.limits.max_budget or taken.usd) + 1e-9
            ):
                self.overrun.append(taken)


async def run(server: BillingLM, stop_at: int | None, **kwargs: Any) -> UsageSummary | None:
    """What the tree says it used; None when it was stopped, or its root's own request failed again and again."""
    backend = {"model_name": "m", "base_url": server.base_url, "max_retries": 1}
    rlm = RLM("vllm", backend, max_depth=3, max_iterations=5, on_limit="return", prices=PRICE, **kwargs)
    running = asyncio.create_task(rlm.acompletion("some text", root_prompt="plan 0"))
    if stop_at is not None:
        stopping = asyncio.to_thread(server.wait_for, lambda it: it.begun >= stop_at or running.done(), 60)
        ended = asyncio.create_task(stopping)
        await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        server.wake()
        await ended
    try:
        return (await running).usage_summary
    except (asyncio.CancelledError, ProviderError):
        return None
    finally:
        await rlm.aclose()


@settings(
    max_examples=25,
    deadline=None,
    phases=WITHOUT_SHRINKING,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(plan=plans, limits=limits, stop_at=st.none() | st.integers(1, 12))
@pytest.mark.timeout(300)
def test_a_tree_never_takes_more_than_its_budget_and_tells_what_it_took(
    plan: Plan, limits: dict[str, Any], stop_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "Budget", Watched)
    Watched.made.clear()
    with serving(BillingLM(plan)) as server:
        usage = asyncio.run(run(server, stop_at, **limits))
    (budget,) = Watched.made  # one for the whole tree
    billed = sum(server.billed)
    assert budget.overrun == []
    assert budget.reserved.calls == 0
    if limits.keys() & {"max_tokens", "max_budget"}:
        assert billed <= budget.spent.tokens <= limits.get("max_tokens", budget.spent.tokens)
    assert len(server.billed) <= limits.get("max_calls", len(server.billed))
    if usage is None:
        return
    models = usage.model_usage_summaries.values()
    assert sum(each.total_input_tokens + each.total_output_tokens for each in models) == billed
    assert (usage.total_cost or 0.0) == pytest.approx(server.usd)
