"""The OpenAI client against a real HTTP server."""

import functools
import inspect
import socket
from types import MappingProxyType
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.resources.chat.completions import AsyncCompletions
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from rlm_core import (
    RLM,
    ConfigError,
    EmptyReply,
    ProviderError,
    ProviderOverloaded,
    ProviderRefused,
    ProviderRejected,
    ProviderUnreachable,
)
from rlm_core.clients import LMRequest, make_client
from rlm_core.clients.openai import OPTIONS
from rlm_core.types import TokenUsage
from tests.support.lm_server import lm_server

REPL = "```repl\nFINAL(llm_query('sub') + str(len(context)))\n```"


def openai(base_url: str, **kwargs: Any) -> dict[str, Any]:
    backend_kwargs = {"model_name": "m", "base_url": base_url, "max_retries": 0, **kwargs}
    return {"backend": "openai", "backend_kwargs": backend_kwargs}


def test_a_whole_run_over_http() -> None:
    with lm_server(lambda request: "sub says " if len(request["messages"]) == 1 else REPL) as server:
        with RLM(**openai(server.base_url), sampling_args={"temperature": 0.5, "max_tokens": 9}) as rlm:
            completion = rlm.completion("x" * 50, root_prompt="q")
    assert completion.response == "sub says 50"
    assert completion.usage_summary.to_dict() == {
        "model_usage_summaries": {
            "m": {
                "total_calls": 2,
                "total_input_tokens": 22,
                "total_output_tokens": 6,
                "total_cost": 0.5,
                "total_cached_tokens": 0,
                "total_reasoning_tokens": 0,
            }
        },
        "total_cost": 0.5,
    }
    assert server.requests[0]["temperature"] == 0.5 and server.requests[0]["max_completion_tokens"] == 9


def test_sub_sampling_args_are_for_the_sub_lm_only() -> None:
    with lm_server(lambda request: "s" if len(request["messages"]) == 1 else REPL) as server:
        with RLM(**openai(server.base_url), sub_sampling_args={"temperature": 1}) as rlm:
            rlm.completion("x")
    assert [request.get("temperature") for request in server.requests] == [None, 1]


def test_a_key_goes_only_to_its_own_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with lm_server(lambda request: "FINAL(1)") as server:
        with RLM(**openai(server.base_url)) as rlm:
            rlm.completion("x")
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        with RLM(backend="openai", backend_kwargs={"model_name": "m"}) as rlm:
            rlm.completion("x")
        with RLM(**openai(server.base_url, api_key="mine")) as rlm:
            rlm.completion("x")
    assert "sk-secret" not in repr(server.headers)
    assert "Bearer mine" in repr(server.headers)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), ProviderRefused, "refused the API key.*bad key"),
        ((403, {"error": {"message": "no"}}), ProviderRefused, "refused"),
        ((404, {"error": {"message": "no such model"}}), ProviderRejected, "no such model"),
        ((400, {"error": {"message": "too\n long \x1b[31m"}}), ProviderRejected, r"too long \\x1b\[31m"),
        ((429, {"error": {"message": "slow down"}}), ProviderOverloaded, "slow down"),
        ((500, {"error": {"message": "oops"}}), ProviderOverloaded, "oops"),
        ((200, {"something": "else"}), ProviderError, "is it an OpenAI API"),
        (None, EmptyReply, "3 empty replies"),
        ("", EmptyReply, "3 empty replies"),
    ],
)
def test_what_a_provider_does_wrong_is_one_clear_line(
    reply: Any, error: type[Exception], message: str
) -> None:
    with lm_server(lambda request: reply) as server, RLM(**openai(server.base_url, api_key="mine")) as rlm:
        with pytest.raises(error, match=message) as caught:
            rlm.completion("x")
    assert "\n" not in str(caught.value)


def test_a_server_that_wants_a_key_is_said_to_have_got_none() -> None:
    with lm_server(lambda request: (401, {"error": {"message": "who is it?"}})) as server:
        with (
            RLM(**openai(server.base_url)) as rlm,
            pytest.raises(ProviderRefused, match="none was sent: pass"),
        ):
            rlm.completion("x")


def test_a_router_that_is_named_by_its_address_gets_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-router")
    for url, key in (
        ("https://openrouter.ai/api/v1", "sk-router"),
        ("https://openrouter.ai.evil.com", "no-key"),
    ):
        client: Any = make_client("openai", {"model_name": "m", "base_url": url})
        assert client._client.api_key == key


def test_an_unreachable_server_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with RLM(**openai(url)) as rlm, pytest.raises(ProviderUnreachable, match="is the server running"):
            rlm.completion("x")


def test_an_empty_reply_to_a_sub_call_fails_that_call() -> None:
    script = iter(["```repl\nprint(llm_query('sub'))\n```", "```repl\nFINAL(1)\n```"])
    with lm_server(lambda request: None if len(request["messages"]) == 1 else next(script)) as server:
        with RLM(**openai(server.base_url)) as rlm:
            rlm.completion("x")
    assert "Error: model 'm' gave an empty reply" in server.requests[2]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs backend_kwargs"),
        ({"model_name": "m"}, "set OPENAI_API_KEY"),
        ({"model_name": "m", "api_key": "k", "nonsense": 1}, "nonsense"),
        ({"model_name": "m", "base_url": "localhost:8000/v1"}, "must start with http"),
    ],
)
def test_wrong_arguments_say_what_to_do(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_client("openai", kwargs)


async def test_usage_is_read_where_it_is_told() -> None:
    details = {
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 2},
        }
    }
    from tests.support.lm_server import completion

    with lm_server(lambda request: (200, completion("a", "m") | details)) as server:
        client = make_client("openai", openai(server.base_url)["backend_kwargs"])
        response = await client.complete(LMRequest.of_prompt("x"))
        await client.aclose()
    assert response.usage == TokenUsage(10, 5, 4, 2, None)
    with lm_server(lambda request: (200, completion("a", "m") | {"usage": None})) as server:
        client = make_client("openai", openai(server.base_url)["backend_kwargs"])
        assert (await client.complete(LMRequest.of_prompt("x"))).usage == TokenUsage()
        await client.aclose()


def test_two_batches_in_a_row_on_a_server_that_keeps_connections_open() -> None:
    code = "```repl\nr = [len([x for x in llm_query_batched(['q'] * 40) if x.ok]) for _ in range(2)]\nFINAL(r)\n```"
    with lm_server(lambda request: "a" if len(request["messages"]) == 1 else code) as server:
        with RLM(**openai(server.base_url)) as rlm:
            assert rlm.completion("x").response == "[40, 40]"
            assert rlm.completion("x").response == "[40, 40]"


def test_json_in_a_system_prompt_is_just_text() -> None:
    prompt = 'Answer as {"a": {"b": [{}, {{}}]}} and {0} {context} %s.'
    with lm_server(lambda request: "```repl\nFINAL(1)\n```") as server:
        with RLM(**openai(server.base_url), custom_system_prompt=prompt, orchestrator=False) as rlm:
            rlm.completion("x")
    assert server.requests[0]["messages"][0]["content"] == prompt


async def test_a_request_is_what_the_sdk_itself_would_send() -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.5,
        "stop": ["\n```"],
        "logit_bias": {"50256": -100},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}},
        },
        "extra_body": {"top_k": 3},
        "extra_headers": {"X-Mine": "1"},
        "extra_query": {"trace": "a b"},
        "timeout": 30.0,
    }
    with lm_server(lambda request: "fine") as server:
        client = make_client(
            "openai",
            {"model_name": "m", "base_url": server.base_url, "api_key": "k", "sampling_args": sampling},
        )
        async with AsyncOpenAI(
            base_url=server.base_url, api_key="k", http_client=DefaultAioHttpClient()
        ) as sdk:
            await sdk.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], **sampling
            )
        assert (await client.complete(LMRequest.of_prompt("x"))).text == "fine"
        await client.aclose()
    theirs, ours = server.requests
    assert ours == theirs and ours["top_k"] == 3
    assert server.paths[0] == server.paths[1] and server.paths[0].endswith("?trace=a+b")
    assert server.headers[1] == server.headers[0] and server.headers[1]["x-mine"] == "1"


def test_all_arguments_of_the_sdk_that_are_not_of_the_body_are_known() -> None:
    arguments = inspect.signature(AsyncCompletions.create).parameters.keys() - {"self"}
    assert arguments - CompletionCreateParamsNonStreaming.__annotations__.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name, value", [("stop", MappingProxyType({})), ("extra_body", {"a": object()})])
def test_sampling_that_is_not_json_is_told_at_once(name: str, value: Any) -> None:
    kwargs = {"model_name": "m", "base_url": "http://127.0.0.1:1/v1", "sampling_args": {name: value}}
    with pytest.raises(ConfigError, match="have to be JSON"):
        make_client("openai", kwargs)


async def test_what_traces_the_sdk_sees_our_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own = AsyncCompletions.create

    @functools.wraps(own)
    async def traced(self: AsyncCompletions, **kwargs: Any) -> Any:
        seen.append(kwargs["model"])
        return await own(self, **kwargs)

    monkeypatch.setattr(AsyncCompletions, "create", traced)
    with lm_server(lambda request: "fine") as server:
        client = make_client("openai", {"model_name": "m", "base_url": server.base_url, "api_key": "k"})
        assert (await client.complete(LMRequest.of_prompt("x"))).text == "fine"
        await client.aclose()
    assert seen == ["m"]


async def test_a_timeout_of_a_calls_own_is_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        kwargs = {"model_name": "m", "base_url": f"http://127.0.0.1:{port}/v1", "api_key": "k"}
        client = make_client("openai", {**kwargs, "sampling_args": {"timeout": 0.2}})
        with pytest.raises(ProviderUnreachable, match="did not answer in time"):
            await client.complete(LMRequest.of_prompt("x"))
        await client.aclose()
