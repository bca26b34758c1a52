"""The broker: what it asks in which order, deadlines, concurrency, usage."""

import asyncio

import pytest
from rlm_agent.limits import MAX_PENDING_CALLS

from rlm_core import CallFailed, LMRequest, LMResponse, ProviderRejected, ScriptedClient, limits
from rlm_core.broker import broker as broker_module
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.budget import Amount
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.clients.scripted import Reply
from rlm_core.replies import Replies, reply_message
from rlm_core.types import TokenUsage


def call(prompt: str = "p", number: int = 1, **changes: object) -> Call:
    values: dict[str, object] = {"id": f"c1/{number}", "session_id": "s", "cell_id": "c1", "kind": "llm"}
    values |= {"prompt": prompt, "model": None, "depth": 1, **changes}
    return Call(**values)  # type: ignore[arg-type]


class Recording:
    """Policy and journal in one: notes the order in which the broker asks them, and what is reserved then."""

    def __init__(self, refuse: str = "") -> None:
        self.steps: list[tuple[str, int]] = []
        self.refuse = refuse
        self.broker: Broker

    def check(self, call: Call) -> None:
        self._step("check")

    def recorded(self, call: Call) -> Answer | None:
        self._step("recorded")
        return None

    def begin(self, call: Call) -> None:
        self._step("begin")

    def end(self, call: Call, answer: Answer) -> None:
        self._step("end")

    def cell_ended(self, session_id: str, cell_id: str, *, ok: bool) -> None:
        self._step("cell ended")

    def _step(self, name: str) -> None:
        self.steps.append((name, self.broker.budget.reserved.calls))
        if name == self.refuse:
            raise CallFailed("BUDGET", "no more")


def broker(client: ScriptedClient, seams: Recording | None = None, **config: object) -> Broker:
    if seams is not None:
        config |= {"policy": seams}
    made = Broker(Models([client]), BrokerConfig(**config), journal=seams)  # type: ignore[arg-type]
    if seams is not None:
        seams.broker = made
    return made


async def test_the_budget_is_reserved_from_before_the_intent_is_written_until_the_answer_is() -> None:
    seams = Recording()
    made = broker(ScriptedClient(["a"]), seams)
    assert await made.handle(call(), Account()) == Answer("a", "scripted", TokenUsage(0, 0))
    assert seams.steps == [("check", 0), ("recorded", 0), ("begin", 1), ("end", 1)]
    assert made.budget.reserved == Amount() and made.budget.spent == Amount(calls=1)


async def test_what_was_reserved_is_given_back_when_the_provider_refuses() -> None:
    seams = Recording()
    made = broker(ScriptedClient([ProviderRejected("no")]), seams)
    assert await made.handle(call(), Account()) == Failure("PROVIDER", "no")
    assert [name for name, _ in seams.steps] == ["check", "recorded", "begin"]
    assert made.budget.reserved == made.budget.spent == Amount()


@pytest.mark.parametrize("step", ["check", "begin"])
async def test_a_refused_call_is_never_sent(step: str) -> None:
    client = ScriptedClient(["a"])
    assert await broker(client, Recording(step)).handle(call(), Account()) == Failure("BUDGET", "no more")
    assert client.requests == []


async def test_a_call_without_an_answer_in_time_fails() -> None:
    async def never(request: LMRequest) -> str:
        await asyncio.Event().wait()
        return ""

    result = await broker(ScriptedClient(never), call_timeout=0.05).handle(call(), Account())
    assert isinstance(result, Failure) and result.code == "DEADLINE"


async def test_no_more_calls_than_allowed_are_on_their_way() -> None:
    now = most = 0

    async def count(request: LMRequest) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(3):
            await asyncio.sleep(0)
        now -= 1
        return "a"

    one = broker(ScriptedClient(count), max_concurrent_calls=5)
    results = await asyncio.gather(*(one.handle(call(number=number), Account()) for number in range(40)))
    assert len(results) == 40 and most == 5


async def test_usage_is_the_sum_of_all_calls_and_each_cell_has_its_record() -> None:
    replies: list[Reply] = [
        LMResponse("a", "m-2026-01-01", TokenUsage(10, 1, 2, 3, 0.5)),
        LMResponse("b", "m", TokenUsage(20, 2)),
        ProviderRejected("no"),
    ]
    one = broker(ScriptedClient(replies, "m"))
    tree = Account()
    account = Account(tree)
    for number in range(3):
        await one.handle(call(number=number), account)
    for each in (account, tree):
        assert each.usage().model_usage_summaries["m"].to_dict() == {
            "total_calls": 2,
            "total_input_tokens": 30,
            "total_output_tokens": 3,
            "total_cost": 0.5,
            "total_cached_tokens": 2,
            "total_reasoning_tokens": 3,
        }
    records = account.take_records("s", "c1")
    assert [(record.response, record.error) for record in records] == [("a", None), ("b", None), ("", "no")]
    assert account.take_records("s", "c1") == tree.take_records("s", "c1") == []


async def test_an_unknown_kind_is_refused() -> None:
    result = await broker(ScriptedClient(["a"])).handle(call(kind=""), Account())
    assert isinstance(result, Failure) and result.code == "INVALID"


async def test_calls_that_cost_nothing_do_not_fill_the_host() -> None:
    made, account = broker(ScriptedClient(["unused"])), Account()
    for number in range(1, 1_200):
        await made.handle(call("x" * 100_000, number, model="no-such-model"), account)
    records = account.take_records("s", "c1")
    assert len(records) == 1_000
    assert records[0].prompt == "x" * 1_000 + "… [99,000 more characters]"


def test_answers_that_are_kept_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_REPLIES_BYTES", 1_000)
    monkeypatch.setattr(limits, "MAX_AGENT_CALLS", 3)
    replies = Replies()
    for number in range(10):
        replies.add(f"c1/{number}", reply_message(f"c1/{number}", Answer("x" * 300, "m", TokenUsage())))
    replies.remove("c1/8")
    assert [number for number in range(10) if replies.get(f"c1/{number}")] == [7, 9]
    assert MAX_PENDING_CALLS == 1_024  # of the agent: what it may still ask for is never dropped


async def test_requests_that_are_refused_without_a_bill_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "MAX_REFUSED", 3)
    asked: list[LMRequest] = []

    def refuse(request: LMRequest) -> str:
        asked.append(request)
        raise ProviderRejected("no")

    one = broker(ScriptedClient(refuse))
    answers = [await one.handle(call(number=number), Account()) for number in range(6)]
    assert [answer.code for answer in answers if isinstance(answer, Failure)] == ["PROVIDER"] * 4 + [
        "TOO_MANY"
    ] * 2
    assert len(asked) == 4
    with pytest.raises(ProviderRejected):  # the root LM is asked all the same
        await one.ask(one.models.root, LMRequest.of_prompt("x"), Account())
