"""Answers on disk: found again where they should be, and nowhere else."""

import asyncio
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlm_core import RLM, CallLimitExceededError, ConfigError
from rlm_core.broker import cache as cache_module
from rlm_core.broker.cache import DiskCache
from rlm_core.clients import LMRequest, LMResponse, ScriptedClient, make_client
from tests.support.lm_server import LMServer, completion, lm_server

ASK = '```repl\nsaid = llm_query("what?")\n```'
SAY = "```repl\nFINAL(said)\n```"


def complete(server: LMServer, prompt: str = "x", **kwargs: Any) -> tuple[str, int]:
    """The answer, and how many requests it took."""
    before = len(server.requests)
    backend = kwargs.pop("backend_kwargs", {})
    with RLM("openai", {"model_name": "m", "base_url": server.base_url, **backend}, **kwargs) as rlm:
        result = rlm.completion(prompt)
    calls = sum(each.total_calls for each in result.usage_summary.model_usage_summaries.values())
    assert calls == len(server.requests) - before  # what was billed, no more
    return result.response, calls


def answer(request: dict[str, Any]) -> str:
    if len(request["messages"]) == 1:
        return f"reply of {request['model']}"
    return SAY if len([each for each in request["messages"] if each["role"] == "assistant"]) else ASK


def test_a_run_in_the_same_scope_asks_nothing_again(tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache": tmp_path / "new" / "answers.sqlite", "cache_scope": "a study"}
    with lm_server(answer) as server:
        assert complete(server, **cache) == ("reply of m", 3)
        assert complete(server, **cache) == ("reply of m", 0)
        assert complete(server, **cache, backend_kwargs={"api_key": "another", "max_retries": 1})[1] == 0
        assert complete(server, "another text", **cache)[1] == 2  # not the sub-call, which is the same
        assert complete(server, **cache, max_tokens=100_000)[1] == 0


def test_nothing_crosses_a_scope_or_other_arguments(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with lm_server(answer) as server:
        for kwargs in (
            {},
            {},  # without a scope, each completion has its own
            {"cache_scope": "a"},
            {"cache_scope": "b"},
            {"cache_scope": "a", "sampling_args": {"temperature": 1}},
            {"cache_scope": "a", "backend_kwargs": {"model_name": "n"}},
        ):
            assert complete(server, cache=path, **kwargs)[1] == 3, kwargs


def test_what_answers_depend_on_is_told_apart_wherever_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: dict[str, Any] = {"cache": tmp_path / "answers.sqlite", "cache_scope": "s"}
    with lm_server(answer) as one, lm_server(answer) as other:
        for server in (one, other):
            monkeypatch.setenv("VLLM_BASE_URL", server.base_url)
            with RLM("vllm", {"model_name": "m"}, **cache) as rlm:
                rlm.completion("x")
            assert len(server.requests) == 3
        for deployment in ("large", "small"):
            monkeypatch.setenv("AZURE_OPENAI_DEPLOYMENT", deployment)
            kwargs = {"model_name": "m", "api_key": "k", "azure_endpoint": one.base_url.removesuffix("/v1")}
            with RLM("azure_openai", kwargs, **cache) as rlm:
                rlm.completion("x")
            assert [deployment in path for path in one.paths].count(True) == 3


async def test_a_client_that_does_not_say_what_it_depends_on_is_not_cached(tmp_path: Path) -> None:
    def script(request: LMRequest) -> str:
        return "FINAL(1)"

    for identity, requests in (("", 1), ("", 1), ("mine", 1), ("mine", 0)):
        client = ScriptedClient(script)
        client.identity = identity
        async with RLM(client, cache=tmp_path / "answers.sqlite", cache_scope="s") as rlm:
            await rlm.acompletion("x")
        assert len(client.requests) == requests
    object_ = make_client("scripted", {"replies": script})
    assert object_.identity == "" and make_client("scripted", {"replies": ["x"]}).identity


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda n: DiskCache(tmp_path / f"{n // 8}.sqlite", "s"), range(64)))
    for cache in opened:
        cache._close()


async def test_a_file_that_is_locked_holds_up_one_call_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.1)
    path = tmp_path / "answers.sqlite"
    client = ScriptedClient([])
    client.identity = "mine"
    async with DiskCache(path, "s") as cache:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            requests = [LMRequest.of_prompt(str(n)) for n in range(50)]
            await asyncio.gather(*[cache.put(client, each, LMResponse("x", "m")) for each in requests])
    assert caplog.text.count("can't be used any more") == 1


def test_a_completion_finds_its_own_and_a_session_too(tmp_path: Path) -> None:
    twice = '```repl\nfirst = llm_query("what?")\n```'
    replies = iter([twice, twice + "\n```repl\nFINAL(first)\n```"] * 2)
    with lm_server(lambda request: "same" if len(request["messages"]) == 1 else next(replies)) as server:
        kwargs: dict[str, Any] = {"model_name": "m", "base_url": server.base_url}
        with RLM("openai", kwargs, persistent=True, cache=tmp_path / "answers.sqlite") as rlm:
            assert rlm.completion("x").response == "same" and len(server.requests) == 3
            assert rlm.completion("y").response == "same" and len(server.requests) == 5
    assert rows(tmp_path / "answers.sqlite") == 0


def test_a_completion_that_fails_leaves_no_answers_that_nobody_can_find(tmp_path: Path) -> None:
    with lm_server(answer) as server:
        kwargs: dict[str, Any] = {"model_name": "m", "base_url": server.base_url}
        with RLM("openai", kwargs, max_calls=1, cache=tmp_path / "a.sqlite") as rlm:
            with pytest.raises(CallLimitExceededError):
                rlm.completion("x")
    assert len(server.requests) == 1 and rows(tmp_path / "a.sqlite") == 0


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_what_failed_was_empty_or_cut_by_a_budget_is_not_kept(tmp_path: Path) -> None:
    with lm_server(lambda request: "" if len(request["messages"]) == 1 else answer(request)) as server:
        for _ in range(2):
            with RLM(
                "openai",
                {"model_name": "m", "base_url": server.base_url},
                cache=tmp_path / "a.sqlite",
                cache_scope="s",
            ) as rlm:
                rlm.completion("x")
    assert [len(request["messages"]) for request in server.requests].count(1) == 2

    def cut(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        whole = completion("FINAL(short)", "m")
        whole["choices"][0]["finish_reason"] = "length"
        return 200, whole

    scope: dict[str, Any] = {"cache": tmp_path / "b.sqlite", "cache_scope": "s"}
    with lm_server(cut) as server:
        assert [complete(server, max_tokens=50_000, **scope)[1] for _ in range(2)] == [1, 1]
        assert [complete(server, **scope)[1] for _ in range(2)] == [1, 0]  # its own limit, as ever


def test_only_its_user_can_read_it_and_it_has_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    headers = {"default_headers": {"X-Token": "sk-secret-header"}}
    with lm_server(answer) as server:
        complete(
            server,
            "a secret text",
            cache=path,
            cache_scope="s",
            backend_kwargs={"api_key": "sk-secret-key", **headers},
        )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.iterdir())
    assert rows(path) == 3
    with lm_server(answer) as server:
        complete(server, cache=path)
    assert rows(path) == 3  # nobody could ask for the answers of a session again


def test_a_broken_cache_harms_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.sqlite"

    def break_it(request: dict[str, Any]) -> str:
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("DROP TABLE IF EXISTS answers")
        return answer(request)

    with lm_server(break_it) as server:
        assert complete(server, cache=path) == ("reply of m", 3)
    assert "can't be used any more" in caplog.text
    path.write_text("something else\n" * 1_000)
    with lm_server(answer) as server, pytest.raises(ConfigError, match=r"cache: can.t use .*answers.sqlite"):
        complete(server, cache=path)
    with pytest.raises(ConfigError, match="cache_scope goes with cache"):
        RLM("openai", {"model_name": "m"}, cache_scope="s")
