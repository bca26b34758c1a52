"""Every provider's official SDK against a server that is not ours: llmock, with the faults that it injects."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock

from rlm_core import ConfigError, ProviderError, ProviderRefused, ProviderRejected, ProviderUnreachable
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.budget import Limits
from rlm_core.broker.retry import RetryPolicy
from rlm_core.clients import LMClient, LMRequest, LMResponse, make_client
from rlm_core.errors import BudgetRefused, ProviderOverloaded
from rlm_core.types import TokenUsage
from tests.support.lm_server import HangUp, completion, lm_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDKs, in their own code
FAST = RetryPolicy(first_delay=0.01, longest_delay=0.05)
ROOT = LMRequest(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something."},
        {"role": "assistant", "content": "Something."},
        {"role": "user", "content": "Again: {braces} ☃"},
    ),
    goes_on=True,
)


@dataclass(frozen=True)
class Way:
    """A backend, and where llmock serves its protocol."""

    backend: str
    provider: str = "openai"
    kwargs: dict[str, Any] = field(default_factory=dict)
    model: str = "gpt-4o-mini"

    def make(self, llmock: LLMock, **more: Any) -> LMClient:
        kwargs = {"model_name": self.model, "base_url": llmock.base_url(self.provider), "api_key": "k"}
        return make_client(self.backend, {**kwargs, **self.kwargs, **more})


WAYS = {
    "openai": Way("openai"),
    "openai, responses": Way("openai", kwargs={"api": "responses"}),
    "anthropic": Way("anthropic", "anthropic", {"max_tokens": 1_000}, "claude-sonnet-4-5"),
    "anthropic, streamed": Way("anthropic", "anthropic", {}, "claude-sonnet-4-5"),
    "gemini": Way("gemini", "gemini", {}, "gemini-2.5-flash"),
    "litellm": Way("litellm", model="openai/gpt-4o-mini"),
    "openrouter": Way("openrouter"),
    "vercel": Way("vercel"),
    "vllm": Way("vllm"),
    "ollama": Way("ollama"),
    "portkey": Way("portkey"),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@asynccontextmanager
async def asked(client: LMClient, policy: RetryPolicy = FAST) -> AsyncIterator[Any]:
    broker = Broker(Models([client]), BrokerConfig(retry=policy))
    account = Account()

    async def ask(request: LMRequest = ROOT) -> LMResponse:
        return await broker.ask(client, request, account)

    try:
        yield ask
    finally:
        await client.aclose()


@ways
async def test_an_answer_with_its_usage(way: Way, llmock: LLMock) -> None:
    llmock.reply("All well ☃", times=None)
    for _ in range(2):  # a client that was closed leaves the next one alone
        async with asked(way.make(llmock)) as ask:
            response = await ask()
        assert response.text == "All well ☃" and response.finish_reason
        assert response.usage.input_tokens > 0 and response.usage.output_tokens > 0


@ways
async def test_a_rate_limit_is_waited_for(way: Way, llmock: LLMock) -> None:
    llmock.rate_limit(times=2, retry_after=0.2).reply("at last", times=None)
    async with asked(way.make(llmock)) as ask:
        assert (await ask()).text == "at last"
    llmock.assert_resilient()


@ways
async def test_a_server_error_is_tried_again(way: Way, llmock: LLMock) -> None:
    llmock.fail(503, times=1).reply("at last", times=None)
    async with asked(way.make(llmock)) as ask:
        assert (await ask()).text == "at last"
    llmock.outage()
    async with asked(way.make(llmock, max_retries=1)) as ask:
        with pytest.raises(ProviderOverloaded):
            await ask()
    llmock.assert_resilient()


@ways
@pytest.mark.parametrize(
    ("status", "error"),
    [(401, ProviderRefused), (403, ProviderRefused), (404, ProviderRejected), (422, ProviderRejected)],
)
async def test_what_is_refused_is_said_in_one_line_and_not_tried_again(
    way: Way, status: int, error: type[ProviderError], llmock: LLMock
) -> None:
    llmock.fail(status, times=None)
    async with asked(way.make(llmock)) as ask:
        with pytest.raises(error) as caught:
            await ask()
    assert "\n" not in str(caught.value) and way.model in str(caught.value)
    assert not caught.value.may_be_billed
    llmock.assert_resilient()


@ways
async def test_a_prompt_that_is_too_long_says_how_long_it_may_be(way: Way, llmock: LLMock) -> None:
    llmock.context_overflow(times=None)
    async with asked(way.make(llmock, context_window=8_000)) as ask:
        with pytest.raises(ProviderRejected, match=r"the prompt is too long, at most 8,000 tokens"):
            await ask()


@ways
async def test_an_answer_that_does_not_come_may_have_been_billed(way: Way, llmock: LLMock) -> None:
    llmock.delay(5.0, times=None)
    async with asked(way.make(llmock, timeout=0.3, max_retries=0)) as ask:
        with pytest.raises(ProviderUnreachable) as caught:
            await ask()
    assert caught.value.may_be_billed


@ways
async def test_a_connection_that_breaks_may_have_been_billed_and_is_the_brokers_to_try_again(
    way: Way,
) -> None:
    with lm_server(lambda request: HangUp()) as server:
        kwargs = {"model_name": way.model, "base_url": server.base_url, "api_key": "k", "max_retries": 0}
        async with asked(make_client(way.backend, {**kwargs, **way.kwargs})) as ask:
            with pytest.raises(ProviderUnreachable, match="broke") as caught:
                await ask()
    assert caught.value.may_be_billed and len(server.requests) == 1


@ways
async def test_a_server_that_is_not_there_has_billed_nothing(way: Way) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    kwargs = {"model_name": way.model, "base_url": f"http://127.0.0.1:{port}/v1", "api_key": "k"}
    async with asked(make_client(way.backend, {**kwargs, **way.kwargs, "max_retries": 0})) as ask:
        with pytest.raises(ProviderUnreachable, match="is the server running") as caught:
            await ask()
    assert not caught.value.may_be_billed


@pytest.mark.parametrize("fault", ["disconnect", "truncate", "stall"])
async def test_a_stream_that_breaks_is_never_taken_for_an_answer(fault: str, llmock: LLMock) -> None:
    getattr(llmock, fault)(after_chunks=2, times=1)
    llmock.reply("the whole of it, in as many words as it takes", times=None)
    client = WAYS["anthropic, streamed"].make(llmock, timeout=1.0)
    async with asked(client) as ask:
        assert (await ask()).text == "the whole of it, in as many words as it takes"
    assert [bool(each.body.get("stream")) for each in llmock.requests] == [True, True]
    llmock.assert_resilient()


async def test_anthropics_shorter_answers_are_not_streamed(llmock: LLMock) -> None:
    llmock.reply("short", times=None)
    async with asked(WAYS["anthropic"].make(llmock)) as ask:
        await ask()
    assert not llmock.requests[0].body.get("stream")


@pytest.mark.parametrize(
    "told",
    [
        "max_tokens is too large: {asked}. This model supports at most 4096 completion tokens, whereas you provided {asked}.",
        "max_tokens: {asked} > 4096, which is the maximum allowed number of output tokens for m-20241022",
        "it has a maxOutputTokens value of {asked} but the supported range is from 1 (inclusive) to 4097 (exclusive).",
    ],
)
async def test_a_model_that_is_too_small_for_the_budgets_answers_is_asked_for_shorter_ones(told: str) -> None:
    def answer(request: dict[str, Any]) -> str | tuple[int, dict[str, Any]]:
        if (asked_for := request["max_tokens"]) > 4096:
            return 400, {"error": {"message": told.format(asked=asked_for)}}
        return "short"

    with lm_server(answer) as server:
        client = make_client("vllm", {"model_name": "m", "base_url": server.base_url})
        broker = Broker(Models([client]), BrokerConfig(limits=Limits(max_tokens=100_000)))
        for _ in range(2):
            assert (await broker.ask(client, ROOT, Account())).text == "short"
        await client.aclose()
    assert [each["max_tokens"] for each in server.requests] == [16_384, 4096, 4096]


async def test_an_answer_is_never_asked_to_be_shorter_than_its_thoughts() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2_000}
    client = WAYS["anthropic"]
    kwargs = {"model_name": client.model, "api_key": "k", "sampling_args": {"thinking": thinking}}
    made = make_client("anthropic", {**kwargs, "base_url": "http://127.0.0.1:1"})
    broker = Broker(Models([made]), BrokerConfig(limits=Limits(max_tokens=2_000)))
    with pytest.raises(BudgetRefused):
        await broker.ask(made, ROOT, Account())
    await made.aclose()


@ways
async def test_a_key_that_a_server_says_again_is_told_to_nobody(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-of-the-environment")
    told = "sk-that-was-sent and sk-of-the-environment are bad"
    with lm_server(lambda request: (401, {"error": {"message": told}})) as server:
        url = f"{server.base_url}?token=secret-in-the-query" if way.backend == "openai" else server.base_url
        kwargs = {"model_name": way.model, "base_url": url, "api_key": "sk-that-was-sent", **way.kwargs}
        async with asked(make_client(way.backend, kwargs)) as ask:
            with pytest.raises(ProviderRefused) as caught:
                await ask()
    assert "sk-" not in str(caught.value) and "secret" not in str(caught.value)


@ways
async def test_lone_surrogates_come_and_go_as_escapes(way: Way, llmock: LLMock) -> None:
    llmock.reply("fine", times=None)
    async with asked(way.make(llmock)) as ask:
        await ask(LMRequest.of_prompt("caf\udce9"))
    assert "caf\\\\udce9" in json.dumps(llmock.requests[0].body)


async def test_a_lone_surrogate_of_an_answer_ends_nothing() -> None:
    body = json.dumps(completion("a \ud83d b", "m")).encode()
    with lm_server(lambda request: body) as server:
        client = make_client("vllm", {"model_name": "m", "base_url": server.base_url})
        async with asked(client) as ask:
            assert (await ask()).text == "a \\ud83d b"


@ways
def test_what_would_make_another_request_of_a_call_is_no_sampling(way: Way) -> None:
    for name in ("n", "stream", "model", "messages", "tools", "extra_body"):
        value = {"max_tokens": 9} if name == "extra_body" else 3
        kwargs = {"model_name": way.model, "api_key": "k", "base_url": "http://127.0.0.1:1/v1", **way.kwargs}
        with pytest.raises(ConfigError, match="one request for one text"):
            make_client(way.backend, {**kwargs, "sampling_args": {name: value}})


@ways
async def test_an_answers_length_is_bounded_where_the_budget_says_so(way: Way, llmock: LLMock) -> None:
    llmock.reply("short", times=None)
    async with asked(way.make(llmock)) as ask:
        await ask(replace(ROOT, max_output_tokens=77))
    (sent,) = llmock.requests
    assert ": 77" in str(sent.body), sent.body


async def test_azure_has_its_address_its_version_and_its_deployment() -> None:
    kwargs = {"model_name": "gpt-4o", "api_key": "mine", "api_version": "2024-12-01-preview"}
    with lm_server(lambda request: "from azure") as server:
        endpoint = server.base_url.removesuffix("/v1")
        client = make_client(
            "azure_openai", {**kwargs, "azure_endpoint": endpoint, "azure_deployment": "dep"}
        )
        async with asked(client) as ask:
            assert (await ask()).text == "from azure"
    (headers,) = server.headers
    assert headers["api-key"] == "mine"
    (path,) = server.paths
    assert path == "/openai/deployments/dep/chat/completions?api-version=2024-12-01-preview"


KEYS = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "vercel": "AI_GATEWAY_API_KEY",
    "portkey": "PORTKEY_API_KEY",
}


@ways
async def test_no_key_of_the_environment_goes_to_another_server(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*KEYS.values(), "GOOGLE_API_KEY", "ANTHROPIC_AUTH_TOKEN", "AZURE_OPENAI_API_KEY"):
        monkeypatch.setenv(name, "sk-secret-of-the-environment")
    if way.backend not in ("litellm", "portkey"):  # whose SDKs send these wherever they are told to
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, "sk-secret-name")
        for name in ("OPENAI_CUSTOM_HEADERS", "ANTHROPIC_CUSTOM_HEADERS"):
            monkeypatch.setenv(name, "X-Gateway: sk-secret-token")
    with lm_server(lambda request: (400, {"error": {"message": "no"}})) as server:
        kwargs = {**way.kwargs, "model_name": way.model, "base_url": server.base_url}
        async with asked(make_client(way.backend, kwargs)) as ask:
            with pytest.raises(ProviderRejected):
                await ask()
    assert server.headers and "sk-secret" not in f"{server.headers} {server.paths} {server.requests}"


@pytest.mark.parametrize(("backend", "variable"), KEYS.items())
def test_a_missing_key_says_which_variable(
    backend: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*KEYS.values(), "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=f"set {variable}"):
        make_client(backend, {"model_name": "m"})


async def test_thoughts_and_the_prompt_cache_of_anthropic() -> None:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "the answer"},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "output_tokens": 7,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 20,
        },
    }
    with lm_server(lambda request: (200, message)) as server:
        client = make_client(
            "anthropic",
            {
                "model_name": "claude-sonnet-4-5",
                "api_key": "k",
                "base_url": server.base_url.removesuffix("/v1"),
                "max_tokens": 2_000,
                "sampling_args": {"thinking": {"type": "enabled", "budget_tokens": 1_024}},
            },
        )
        async with asked(client) as ask:
            response = await ask()
    assert response.text == "the answer"
    used = response.usage
    assert (used.input_tokens, used.cached_tokens, used.cache_write_tokens) == (125, 100, 20)
    (sent,) = server.requests
    assert sent["thinking"]["budget_tokens"] == 1_024
    assert sent["system"][0]["cache_control"] == sent["messages"][-1]["content"][0]["cache_control"]
    assert len(sent["messages"]) == 3


async def test_openais_prompt_cache_is_hinted_at_openai_only(llmock: LLMock) -> None:
    async with asked(WAYS["openai"].make(llmock)) as ask:
        await ask()
    assert "prompt_cache_key" not in str(llmock.requests[0].body)


async def test_geminis_thoughts_are_no_text_and_its_cached_and_reasoning_tokens_are_told() -> None:
    parts = [{"text": "hm", "thought": True}, {"text": "the answer"}]
    reply = {
        "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}],
        "usageMetadata": {
            "promptTokenCount": 100,
            "cachedContentTokenCount": 40,
            "candidatesTokenCount": 7,
            "thoughtsTokenCount": 5,
        },
        "modelVersion": "gemini-2.5-flash-001",
    }
    with lm_server(lambda request: (200, reply)) as server:
        client = make_client("gemini", {"model_name": "m", "api_key": "k", "base_url": server.base_url})
        async with asked(client) as ask:
            response = await ask()
    assert (response.text, response.model) == ("the answer", "gemini-2.5-flash-001")
    assert response.usage == TokenUsage(100, 12, 40, 5)


async def test_the_responses_apis_cached_and_reasoning_tokens_are_told() -> None:
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed"}
    reply = {
        "id": "r",
        "object": "response",
        "created_at": 0,
        "status": "completed",
        "model": "m",
        "output": [{**message, "content": [{"type": "output_text", "text": "yes", "annotations": []}]}],
        "usage": {
            "input_tokens": 100,
            "output_tokens": 12,
            "total_tokens": 112,
            "input_tokens_details": {"cached_tokens": 40},
            "output_tokens_details": {"reasoning_tokens": 5},
        },
    }
    with lm_server(lambda request: (200, reply)) as server:
        kwargs = {"model_name": "m", "base_url": server.base_url, "api": "responses"}
        async with asked(make_client("openai", kwargs)) as ask:
            response = await ask()
    assert response.text == "yes" and response.usage == TokenUsage(100, 12, 40, 5)


@pytest.mark.parametrize(
    "usage", [{"cost": 0.3}, {"cost": 0, "cost_details": {"upstream_inference_cost": 0.3}}]
)
@pytest.mark.parametrize("backend", ["openrouter", "litellm"])
async def test_a_cost_that_is_told_counts(usage: dict[str, Any], backend: str) -> None:
    reply = completion("yes", "m")
    reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, **usage}
    with lm_server(lambda request: (200, reply)) as server:
        model = "openai/m" if backend == "litellm" else "m"
        client = make_client(backend, {"model_name": model, "base_url": server.base_url, "api_key": "k"})
        async with asked(client) as ask:
            assert (await ask()).usage.cost == 0.3


def test_openais_prompt_cache_is_hinted_by_the_start_of_a_conversation() -> None:
    client: Any = make_client("openai", {"model_name": "m", "api_key": "k"})
    longer = replace(ROOT, messages=(*ROOT.messages, {"role": "assistant", "content": "more"}))
    hint = client._hints(ROOT)
    assert hint["prompt_cache_key"] and client._hints(longer) == hint
    other = LMRequest(({"role": "system", "content": "Be long."},), goes_on=True)
    assert client._hints(other) != hint and client._hints(replace(ROOT, goes_on=False)) == {}


@pytest.mark.parametrize("wrong", [{"base_url": 5}, {"sampling_args": {"temperature": "hot"}}])
def test_wrong_arguments_of_gemini_are_one_line_before_anything_is_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_client("gemini", {"model_name": "m", "api_key": "k", **wrong})
    assert "\n" not in str(caught.value) and "gemini" in str(caught.value)


async def test_json_that_is_nested_deeply_is_no_answer() -> None:
    deep = b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with lm_server(lambda request: deep) as server:
        for way in (WAYS["openai"], WAYS["anthropic"], WAYS["gemini"]):
            kwargs = {"model_name": way.model, "base_url": server.base_url, "api_key": "k", "max_retries": 0}
            async with asked(make_client(way.backend, {**kwargs, **way.kwargs})) as ask:
                with pytest.raises(ProviderError, match="did not answer with"):
                    await ask()


@pytest.mark.parametrize("variable", ["OPENAI_API_BASE", "OPENAI_BASE_URL", "api_base"])
async def test_litellm_sends_no_key_to_where_the_environment_sends_it(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-environment")
    with lm_server(lambda request: (401, {"error": {"message": "who is it?"}})) as server:
        kwargs = {"model_name": "openai/m"}
        if variable == "api_base":
            kwargs[variable] = server.base_url
        else:
            monkeypatch.setenv(variable, server.base_url)
        async with asked(make_client("litellm", kwargs)) as ask:
            with pytest.raises(ProviderRefused, match="none was sent"):
                await ask()
    assert server.headers and "sk-secret" not in str(server.headers)


async def test_azures_key_goes_to_its_own_resource_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-azure")
    elsewhere: Any = make_client("azure_openai", {"model_name": "m", "azure_endpoint": "http://127.0.0.1:1"})
    own: Any = make_client(
        "azure_openai", {"model_name": "m", "azure_endpoint": "https://me.openai.azure.com"}
    )
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "http://127.0.0.1:2")
    named: Any = make_client("azure_openai", {"model_name": "m"})
    assert [each._client.api_key for each in (elsewhere, own, named)] == ["no-key", "sk-azure", "sk-azure"]
