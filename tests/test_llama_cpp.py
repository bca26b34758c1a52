"""A small real model: in this process, and behind llama.cpp's own HTTP server. What it says is never asserted."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlm_core import RLM, ConfigError, ProviderError, ProviderRejected
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.broker.budget import Limits
from rlm_core.clients import LMClient, LMRequest, ScriptedClient, llama_cpp, make_client
from tests.support.llama_server import llama_server, small_weights

N_CTX = 1024
KWARGS = {
    "model_path": small_weights(),
    "model_name": "small",
    "n_ctx": N_CTX,
    "n_threads": 1,
    "sampling_args": {"max_tokens": 8, "temperature": 0},
}
ROOT = LMRequest(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello. {☃}"}))
LONG = LMRequest.of_prompt("word " * (2 * N_CTX))
ENDLESS = {**KWARGS, "sampling_args": {"max_tokens": 16_000, "ignore_eos": True}, "n_ctx": 16_384}


@pytest.fixture
async def client() -> AsyncIterator[LMClient]:
    made = make_client("llama_cpp", KWARGS)
    yield made
    await made.aclose()


def listening_ports() -> set[str]:
    """Of this process, by the kernel's tables."""
    sockets = {path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [
        row.split()
        for name in ("tcp", "tcp6")
        for row in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


async def test_an_answer_costs_nothing_and_opens_no_port(client: LMClient) -> None:
    before = listening_ports()  # of other tests
    broker = Broker(Models([client]), BrokerConfig(limits=Limits(max_budget=0.01, max_tokens=5_000)))
    response = await broker.ask(client, ROOT, Account())
    assert response.text and response.model == "small" and response.finish_reason in ("stop", "length")
    assert response.usage.input_tokens > 10 and 0 < response.usage.output_tokens <= 8
    assert broker.budget.spent.usd == 0.0 and broker.budget.spent.tokens > 10
    assert listening_ports() <= before


async def test_a_prompt_that_is_too_long_says_how_long_it_may_be(client: LMClient) -> None:
    with pytest.raises(ProviderRejected, match="too long, at most 1,024 tokens"):
        await client.complete(LONG)
    with pytest.raises(ProviderRejected):
        await client.complete(LMRequest.of_prompt("half a \ud800"))
    assert (await client.complete(ROOT)).text


async def test_a_call_that_is_cancelled_works_no_more_nor_does_one_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, loop, began = make_client("llama_cpp", ENDLESS), asyncio.get_running_loop(), asyncio.Event()
    take = llama_cpp._Answer.take

    def noticed(answer: llama_cpp._Answer, chunk: Mapping[str, Any]) -> bool:
        loop.call_soon_threadsafe(began.set)
        return take(answer, chunk)

    monkeypatch.setattr(llama_cpp._Answer, "take", noticed)
    async with asyncio.timeout(60):
        calls = [asyncio.create_task(client.complete(ROOT)) for _ in range(3)]
        await began.wait()
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        await client.aclose()  # which waits for what still works: 16,000 tokens are minutes


FORKS = """
import asyncio, gc, os, sys
from pathlib import Path
from rlm_core.clients import LMRequest, make_client

client = make_client("llama_cpp", {"model_path": sys.argv[1], "n_threads": 1, "sampling_args": {"max_tokens": 4}})
ask = lambda: asyncio.run(client.complete(LMRequest.of_prompt("x"))).text
assert ask()
(folder,) = {Path(name).parent for name in client._params.hostnames}
if not (child := os.fork()):
    asyncio.run(client.aclose())
    del client
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert folder.exists() and ask()
asyncio.run(client.aclose())
assert not folder.exists()
"""


def test_a_forked_process_leaves_the_parents_model_alone() -> None:
    subprocess.run([sys.executable, "-c", FORKS, str(KWARGS["model_path"])], check=True, timeout=60)


async def test_two_at_once() -> None:
    client = make_client("llama_cpp", {**KWARGS, "n_parallel": 2})
    assert all(response.text for response in await asyncio.gather(*[client.complete(ROOT) for _ in range(4)]))
    await client.aclose()


def test_a_model_for_sub_calls() -> None:
    root = ScriptedClient(["```repl\nsaid = llm_query_batched([context, context])\n```", "FINAL_VAR(said)"])
    with RLM(
        root,
        other_backends=["llama_cpp"],
        other_backend_kwargs=[KWARGS],
        max_budget=1.0,
        prices={"scripted": {"input": 0, "output": 0}},
    ) as rlm:
        result = rlm.completion("Say hello.")
    assert (
        "[ERROR" not in result.response
        and result.usage_summary.model_usage_summaries["small"].total_calls == 2
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs backend_kwargs={'model_path'.*none was given"),
        ({"model_path": "/nowhere.gguf"}, "/nowhere.gguf is not one"),
        ({**KWARGS, "n_ctx": 0}, "n_ctx"),
        ({**KWARGS, "threads": 0}, "threads"),
    ],
)
def test_what_is_wrong_is_one_line(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_client("llama_cpp", kwargs)
    assert "\n" not in str(caught.value)


async def test_a_file_that_is_no_model_fails_its_first_call() -> None:
    client = make_client("llama_cpp", {"model_path": __file__})
    with pytest.raises(ConfigError, match=r"can.t load .*test_llama_cpp.py"):
        await client.complete(ROOT)
    await client.aclose()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with llama_server(small_weights(), N_CTX) as url:
        yield url


WAYS = {
    "openai": ("openai", {}),
    "openai, responses": ("openai", {"api": "responses"}),
    "vllm": ("vllm", {}),
    "ollama": ("ollama", {}),
    "anthropic": ("anthropic", {"max_tokens": 8}),
    "anthropic, streamed": ("anthropic", {"max_tokens": 30_000}),
    "litellm": ("litellm", {"model_name": "openai/small"}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDKs, in their own code
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_clients_against_the_server_of_llama_cpp(
    way: tuple[str, dict[str, object]], server: str
) -> None:
    backend, kwargs = way
    url = server.removesuffix("/v1") if backend == "anthropic" else server
    client = make_client(
        backend,
        {"model_name": "small", "base_url": url, "max_retries": 0, **kwargs},
    )
    broker, account = Broker(Models([client])), Account()
    # Each way its own: of a prompt that it knows already, this server leaves out the start of Anthropic's stream.
    messages = (ROOT.messages[0], {"role": "user", "content": f"Say hello to {way}."})
    request = LMRequest(messages, max_output_tokens=None if "max_tokens" in kwargs else 8)
    try:
        response = await broker.ask(client, request, account)
        assert response.text and response.finish_reason
        assert response.usage.input_tokens > 10 and response.usage.output_tokens > 0
        with pytest.raises(ProviderError, match="too long"):
            await broker.ask(client, LONG, account)
    finally:
        await client.aclose()
