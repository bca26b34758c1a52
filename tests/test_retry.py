"""When providers are asked again: a real HTTP server that counts what it gets, and when."""

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from rlm_core import RLM, ConfigError, ProviderError, ProviderOverloaded, ProviderRejected, ScriptedClient
from rlm_core.broker import pace as pace_module
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.broker.pace import Pace, Rate
from rlm_core.broker.retry import RetryPolicy, with_retries
from rlm_core.clients import LMRequest, LMResponse, make_client
from rlm_core.clients.failures import retry_after
from rlm_core.types import TokenUsage
from tests.support.lm_server import lm_server

FAST = RetryPolicy(first_delay=0.01, longest_delay=0.05)


def overloaded(seconds: float | None = None) -> ProviderOverloaded:
    error = ProviderOverloaded("busy")
    error.retry_after = seconds
    return error


@pytest.mark.parametrize("backend", ["openai", "anthropic"])
async def test_a_request_has_the_same_key_at_every_attempt(backend: str) -> None:
    replies: Iterator[Any] = iter([(500, {"error": {"message": "oops"}}), (503, {}), (400, {})])
    with lm_server(lambda request: next(replies)) as server:
        client = make_client(backend, {"model_name": "m", "base_url": server.base_url, "api_key": "k"})
        broker = Broker(Models([client]), BrokerConfig(retry=FAST))
        with pytest.raises(ProviderRejected):
            await broker.ask(client, LMRequest.of_prompt("x"), Account())
        again = [each["idempotency-key"] for each in server.headers]
        await client.aclose()
    assert len(again) == 3 and len(set(again)) == 1 and len(again[0]) == 32


async def test_retry_after_is_waited_for_by_all_calls_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def answer(request: LMRequest) -> Any:
        asked.append(time.monotonic())
        return overloaded(0.3) if len(asked) == 1 else "fine"

    client = ScriptedClient(answer)
    broker = Broker(Models([client]), BrokerConfig(retry=FAST))
    pace, held = broker.models.pace(client), asyncio.Event()
    hold = pace.hold

    def noticed(seconds: float) -> None:
        hold(seconds)
        held.set()

    monkeypatch.setattr(pace, "hold", noticed)
    first = asyncio.ensure_future(broker.ask(client, LMRequest.of_prompt("1"), Account()))
    await asyncio.wait_for(held.wait(), 20)
    second = await broker.ask(client, LMRequest.of_prompt("2"), Account())
    assert (await first).text == second.text == "fine"
    assert min(asked[1:]) - asked[0] >= 0.3


@pytest.mark.parametrize("rate", [Rate(3), Rate(tokens_per_minute=30), Rate(5, 30)])
async def test_no_minute_has_more_than_the_callers_own_limits(
    rate: Rate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_module, "WINDOW_SECONDS", 0.15)
    pace, places = Pace(rate), asyncio.Semaphore(100)
    slots = await asyncio.gather(*[pace.take(10, places) for _ in range(8)])
    times = [slot.at for slot in slots]
    assert times == sorted(times)  # first come, first served
    assert all(later - earlier >= 0.15 for earlier, later in zip(times, times[3:], strict=False))
    big = await pace.take(1_000, places)  # more than ever fits waits for an empty minute, not for ever
    assert big.at - times[-1] >= 0.15 or rate.tokens_per_minute is None


async def test_a_limit_counts_what_answers_took_and_a_cancelled_one_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace_module, "WINDOW_SECONDS", 0.2)
    asked: list[float] = []

    def answer(request: LMRequest) -> LMResponse:
        asked.append(time.monotonic())
        return LMResponse("fine", "m", TokenUsage(90, 20))

    client = ScriptedClient(answer)
    client.rate = Rate(tokens_per_minute=100)
    broker = Broker(Models([client]))
    for _ in range(2):
        await broker.ask(client, LMRequest.of_prompt("x"), Account())
    waiting = asyncio.ensure_future(broker.ask(client, LMRequest.of_prompt("x"), Account()))
    await asyncio.wait([waiting], timeout=0.01)
    waiting.cancel()
    await broker.ask(client, LMRequest.of_prompt("x"), Account())
    assert len(asked) == 3 and all(b - a >= 0.19 for a, b in pairwise(asked))


async def test_waiting_for_its_turn_takes_nothing_of_a_calls_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "WINDOW_SECONDS", 0.4)
    client = ScriptedClient(lambda request: "fine")
    client.rate = Rate(1)
    broker = Broker(Models([client]), BrokerConfig(call_timeout=0.3))
    calls = [Call(str(n), "s", "c", "llm", "x", None, 1) for n in range(3)]
    answers = await asyncio.gather(*[broker.handle(call, Account()) for call in calls])
    assert [type(answer) for answer in answers] == [Answer] * 3


async def test_a_client_works_on_no_more_than_it_can() -> None:
    at_work = most = 0

    class Local(ScriptedClient):
        max_concurrent = 2

        async def complete(self, request: LMRequest) -> LMResponse:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            for _ in range(5):
                await asyncio.sleep(0)
            at_work -= 1
            return await super().complete(request)

    client = Local(lambda request: overloaded() if len(client.requests) % 3 == 1 else "fine")
    broker = Broker(Models([client]), BrokerConfig(retry=FAST))
    await asyncio.gather(*[broker.ask(client, LMRequest.of_prompt("x"), Account()) for _ in range(9)])
    assert most == 2 and at_work == 0


def test_limits_are_named_among_the_backends_arguments() -> None:
    kwargs = {"model_name": "m", "api_key": "k", "requests_per_minute": 60}
    assert make_client("openai", kwargs).rate == Rate(60)
    with pytest.raises(ConfigError, match="tokens_per_minute must be more than 0"):
        make_client("openai", {**kwargs, "tokens_per_minute": 0})


async def test_what_could_only_be_answered_too_late_is_not_asked_again() -> None:
    client = ScriptedClient(lambda request: overloaded(30))
    broker = Broker(Models([client]))
    deadline = asyncio.get_running_loop().time() + 5
    with pytest.raises(ProviderOverloaded):
        await asyncio.wait_for(
            broker.ask(client, LMRequest.of_prompt("x"), Account(), deadline=deadline), timeout=4
        )
    assert len(client.requests) == 1


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(overloaded(), 4), (overloaded(1_000), 1), (ProviderError("odd"), 1), (ValueError("bug"), 1)],
)
async def test_only_what_may_go_better_is_asked_again(error: Exception, attempts: int) -> None:
    made = 0

    async def attempt() -> None:
        nonlocal made
        made += 1
        raise error

    with pytest.raises(type(error)):
        await with_retries(FAST, Pace(), None, attempt)
    assert made == attempts


async def test_a_pause_that_is_too_long_holds_up_no_other_call() -> None:
    replies: Iterator[Any] = iter([overloaded(86_400), "fine"])
    client = ScriptedClient(lambda request: next(replies))
    broker = Broker(Models([client]), BrokerConfig(retry=FAST))
    with pytest.raises(ProviderOverloaded):
        await broker.ask(client, LMRequest.of_prompt("1"), Account())
    response = await asyncio.wait_for(broker.ask(client, LMRequest.of_prompt("2"), Account()), 10)
    assert response.text == "fine"


async def test_an_account_without_money_is_not_asked_again() -> None:
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    with lm_server(lambda request: (429, body)) as server:
        client = make_client("openai", {"model_name": "m", "base_url": server.base_url})
        broker = Broker(Models([client]), BrokerConfig(retry=FAST))
        with pytest.raises(ProviderOverloaded, match="exceeded your quota"):
            await broker.ask(client, LMRequest.of_prompt("x"), Account())
        await client.aclose()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"retry-after-ms": "x"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


async def test_a_minute_begins_when_a_request_is_sent_and_not_when_it_waits_for_a_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace_module, "WINDOW_SECONDS", 0.3)
    sent: list[float] = []

    async def slow(request: LMRequest) -> str:
        sent.append(time.monotonic())
        if len(sent) <= 4:
            await asyncio.sleep(0.4)  # longer than the window: others wait for a place meanwhile
        return "fine"

    client = ScriptedClient(slow)
    client.rate = Rate(8)
    broker = Broker(Models([client]), BrokerConfig(max_concurrent_calls=4))
    calls = [broker.ask(client, LMRequest.of_prompt("x"), Account()) for _ in range(20)]
    await asyncio.gather(*calls)
    assert all(later - earlier >= 0.25 for earlier, later in zip(sent, sent[8:], strict=False))


def test_a_model_that_is_asked_with_two_samplings_has_one_rate_and_goes_by_its_name_to_the_sub_calls() -> (
    None
):
    asked: list[Any] = []

    def serve(request: dict[str, Any]) -> str:
        asked.append((request.get("temperature"), request.get("seed")))
        return "fine" if len(request["messages"]) == 1 else "```repl\nFINAL(llm_query('q', model='m'))\n```"

    with lm_server(serve) as server:
        kwargs = {"model_name": "m", "base_url": server.base_url, "requests_per_minute": 100}
        sampling = {"sampling_args": {"temperature": 0, "seed": 7}, "sub_sampling_args": {"temperature": 1}}
        with RLM("vllm", kwargs, **sampling) as rlm:  # type: ignore[arg-type]
            assert rlm.completion("x").response == "fine"
            models = rlm._get_models()
            assert models.pace(models.root) is models.pace(models.sub) and models.root is not models.sub
    assert asked == [(0, 7), (1, 7)]


async def test_a_reply_of_white_space_is_none() -> None:
    client = ScriptedClient(["  \n"])
    answer = await Broker(Models([client])).handle(Call("1", "s", "c", "llm", "x", None, 1), Account())
    assert isinstance(answer, Failure) and "empty reply" in answer.message
    root = ScriptedClient(["  \n", "FINAL(1)"])
    with RLM(root) as rlm:
        assert (await rlm.acompletion("x")).response == "1"
    assert root.requests[1].messages[-2]["content"] == "(no text)"


async def test_a_run_that_has_no_place_left_holds_up_no_other_run_of_the_same_client() -> None:
    gate, begun = asyncio.Event(), asyncio.Event()

    async def reply(request: LMRequest) -> str:
        if request.messages[0]["content"] == "slow":
            begun.set()
            await gate.wait()
        return "fine"

    client = ScriptedClient(reply)
    models = Models([client])
    first, other = Broker(models, BrokerConfig(max_concurrent_calls=1)), Broker(models)
    slow = [asyncio.create_task(first.ask(client, LMRequest.of_prompt("slow"), Account())) for _ in range(5)]
    await begun.wait()
    async with asyncio.timeout(5):
        assert (await other.ask(client, LMRequest.of_prompt("quick"), Account())).text == "fine"
    gate.set()
    await asyncio.gather(*slow)
