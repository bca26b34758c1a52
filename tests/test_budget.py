"""Whatever the order of calls, failures and cancellations: spent + reserved stays within the limits."""

import asyncio
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_core.broker.budget import Amount, Budget, Limits, most_tokens
from rlm_core.errors import BudgetRefused, ConfigError
from rlm_core.prices import Price, PriceTable
from rlm_core.types import TokenUsage

PRICE = Price(input=1.0, output=4.0, cached_input=0.1, cache_write=1.25)


def prompt(characters: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "x" * characters}]


@dataclass(frozen=True)
class Planned:
    characters: int
    output: int | None
    outcome: str
    used_input: float
    """Of the bound."""
    used_output: float


PLANNED = st.builds(
    Planned,
    st.integers(0, 3_000),
    st.none() | st.integers(1, 3_000),
    st.sampled_from(["answered", "refused", "cut off", "cancelled"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
LIMITS = st.builds(
    Limits,
    st.none() | st.floats(0.0001, 0.05),
    st.none() | st.integers(100, 40_000),
    st.none() | st.integers(1, 12),
)


class Checked(Budget):
    """Looks after every change."""

    def look(self) -> None:
        taken, limits = self.spent + self.reserved, self.limits
        if limits.max_budget is not None:
            assert taken.usd <= limits.max_budget + 1e-7
        assert limits.max_tokens is None or taken.tokens <= limits.max_tokens
        assert limits.max_calls is None or taken.calls <= limits.max_calls
        assert self.reserved.tokens >= 0 and self.reserved.calls >= 0 and self.reserved.usd >= -1e-9


async def carry_out(budget: Checked, plan: Planned, gate: asyncio.Event, billed: list[TokenUsage]) -> None:
    try:
        reservation = await budget.reserve(prompt(plan.characters), plan.output, PRICE)
    except BudgetRefused:
        return
    finally:
        budget.look()
    usage: TokenUsage | None = None
    may_be_billed = True
    try:
        await gate.wait()
        if plan.outcome == "answered":
            most = most_tokens(prompt(plan.characters))
            output = int((reservation.output_tokens or 1_000) * plan.used_output)
            usage = TokenUsage(max(1, int(most * plan.used_input)), output)
            usage = TokenUsage(usage.input_tokens, output, cost=PRICE.of(usage))
            billed.append(usage)
        may_be_billed = plan.outcome != "refused"
    finally:
        budget.settle(reservation, usage, may_be_billed=may_be_billed)
        budget.look()


@settings(deadline=None, max_examples=150)
@given(limits=LIMITS, plans=st.lists(PLANNED, max_size=14), order=st.randoms(use_true_random=False))
def test_spent_and_reserved_never_exceed_a_limit(limits: Limits, plans: list[Planned], order: object) -> None:
    async def main() -> None:
        budget, billed = Checked(limits), list[TokenUsage]()
        gates = [asyncio.Event() for _ in plans]
        tasks = [
            asyncio.ensure_future(carry_out(budget, *each, billed)) for each in zip(plans, gates, strict=True)
        ]
        turns = list(range(len(plans)))
        order.shuffle(turns)  # type: ignore[attr-defined]
        for index in turns:
            await asyncio.sleep(0)
            if plans[index].outcome == "cancelled":
                tasks[index].cancel()
            gates[index].set()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)  # nobody waits for ever
        assert budget.reserved == Amount()
        assert budget.spent.tokens >= sum(each.input_tokens + each.output_tokens for each in billed)
        certain = all(plan.outcome in ("answered", "refused") for plan in plans)
        if certain:  # then what was spent is what was billed, to the last token
            assert budget.spent.calls == len(billed)
            assert budget.spent.usd == pytest.approx(sum(each.cost or 0 for each in billed))

    asyncio.run(main())


async def test_a_call_waits_for_what_others_may_give_back() -> None:
    budget = Budget(Limits(max_tokens=20_000))
    first = await budget.reserve(prompt(1_000), 15_000, None)
    waiting = asyncio.ensure_future(budget.reserve(prompt(1_000), 8_000, None))
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.settle(first, TokenUsage(200, 800))
    assert (await waiting).output_tokens == 8_000


async def test_the_last_tokens_are_given_to_an_answer_that_is_shorter() -> None:
    budget = Budget(Limits(max_tokens=2_000))
    reservation = await budget.reserve(prompt(1_000), None, None)
    assert reservation.output_tokens == 2_000 - most_tokens(prompt(1_000))
    budget.settle(reservation, TokenUsage(250, 900))
    with pytest.raises(BudgetRefused, match="850 tokens are left of this run, and this call may take"):
        await budget.reserve(prompt(1_000), None, None)


async def test_what_may_have_been_billed_counts() -> None:
    budget = Budget(Limits(max_calls=2))
    cancelled = await budget.reserve(prompt(1), None, None)
    budget.settle(cancelled, None, may_be_billed=True)
    refused = await budget.reserve(prompt(1), None, None)
    budget.settle(refused, None)
    assert budget.spent.calls == 1
    budget.settle(await budget.reserve(prompt(1), None, None), TokenUsage(1, 1))
    with pytest.raises(BudgetRefused) as caught:
        await budget.reserve(prompt(1), None, None)
    assert caught.value.limit == "max_calls"


@pytest.mark.parametrize("text", ["", "plain", "Natásha ☃ 🎻", "\ud800 alone", "\x00\n"])
def test_the_bound_of_tokens_holds_for_any_text(text: str) -> None:
    assert most_tokens([{"role": "user", "content": text}]) >= len(text.encode("utf-8", "surrogatepass"))


def test_prices_are_found_by_names_and_snapshots() -> None:
    table = PriceTable({"mine": {"input": 1, "output": 2}})
    mine = table.find("mine")
    assert mine is not None and mine.of(TokenUsage(1_000_000, 500_000)) == 2.0
    for name in ("gpt-5-mini", "gpt-5-mini-2025-08-07", "openai/gpt-5-mini", "claude-sonnet-4-20250514"):
        assert table.find(name) is not None, name
    assert table.find("gpt-5-mini-of-somebody-else") is None and table.find("nobody-knows") is None


def test_prices_of_ones_own_may_be_a_file_and_ours_have_their_date_and_sources(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("[mine]\ninput = 1\noutput = 2\n")
    mine = PriceTable(path).find("mine")
    assert mine is not None and mine.of(TokenUsage(1_000_000, 500_000)) == 2.0
    ours = files("rlm_core.prices").joinpath("prices.toml").read_text()
    assert re.search(r'^date = "\d{4}-\d\d-\d\d"$', ours, re.M)
    assert len(re.findall(r"^# [^:\n]+: https://\S+$", ours, re.M)) >= 5


def test_cached_tokens_and_long_prompts_have_prices_of_their_own() -> None:
    assert PRICE.of(TokenUsage(1_000_000, 0, cached_tokens=500_000, cache_write_tokens=100_000)) == (
        0.4 + 0.05 + 0.125
    )
    tiered = Price.model_validate(
        {"input": 1, "output": 2, "above": [{"tokens": 200_000, "input": 3, "output": 5}]}
    )
    assert tiered.of(TokenUsage(200_000, 100_000)) == pytest.approx(0.4)
    assert tiered.of(TokenUsage(200_001, 100_000)) == pytest.approx(1.100003)
    assert tiered.worst_input(300_000) == pytest.approx(0.9) and tiered.worst_output(1) == 2e-6


def test_wrong_prices_are_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"prices\['m'\]: output"):
        PriceTable({"m": {"input": 1}})


async def test_a_provider_that_does_not_say_what_it_used_is_charged_the_worst() -> None:
    budget = Budget(Limits(max_tokens=10_000))
    reservation = await budget.reserve(prompt(100), 500, None)
    budget.settle(reservation, TokenUsage())
    assert budget.spent == reservation.amount


async def test_no_more_is_asked_for_than_a_small_model_has() -> None:
    budget = Budget(Limits(max_tokens=1_000_000))
    assert (await budget.reserve(prompt(10), None, None, window=8_192)).output_tokens == 2_048
