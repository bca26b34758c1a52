"""When providers are asked again: a real HTTP server that counts what it gets, and when."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_core import ProviderError, ProviderOverloaded, ScriptedClient
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.retry import Pace, RetryPolicy, with_retries
from rlm_core.clients import LMRequest, make_client
from rlm_core.clients.failures import retry_after
from tests.support.lm_server import lm_server

FAST = RetryPolicy(first_delay=0.01, longest_delay=0.05)


def overloaded(seconds: float | None = None) -> ProviderOverloaded:
    error = ProviderOverloaded("busy")
    error.retry_after = seconds
    return error


async def test_a_request_has_the_same_key_at_every_attempt() -> None:
    replies: Iterator[Any] = iter([(500, {"error": {"message": "oops"}}), (503, {}), "fine"])
    with lm_server(lambda request: next(replies)) as server:
        client = make_client("openai", {"model_name": "m", "base_url": server.base_url})
        broker = Broker(Models([client]), BrokerConfig(retry=FAST))
        response = await broker.ask(client, LMRequest.of_prompt("x"), Account())
        again = [each["idempotency-key"] for each in server.headers]
        await client.aclose()
    assert response.text == "fine" and len(again) == 3 and len(set(again)) == 1 and len(again[0]) == 32


async def test_retry_after_is_waited_for_by_all_calls_of_the_client() -> None:
    asked: list[float] = []

    def answer(request: LMRequest) -> Any:
        asked.append(time.monotonic())
        return overloaded(0.3) if len(asked) == 1 else "fine"

    client = ScriptedClient(answer)
    broker = Broker(Models([client]), BrokerConfig(retry=FAST))
    first = asyncio.ensure_future(broker.ask(client, LMRequest.of_prompt("1"), Account()))
    await asyncio.wait_for(broker.models.pace(client).held.wait(), 20)
    second = await broker.ask(client, LMRequest.of_prompt("2"), Account())
    assert (await first).text == second.text == "fine"
    assert min(asked[1:]) - asked[0] >= 0.3


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
