"""Answers on disk: found again where they should be, and nowhere else."""

import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlm_core import RLM, ConfigError
from tests.support.lm_server import LMServer, lm_server

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


def test_a_completion_finds_its_own_and_a_session_too(tmp_path: Path) -> None:
    twice = '```repl\nfirst = llm_query("what?")\n```'
    replies = iter([twice, twice + "\n```repl\nFINAL(first)\n```"] * 2)
    with lm_server(lambda request: "same" if len(request["messages"]) == 1 else next(replies)) as server:
        kwargs: dict[str, Any] = {"model_name": "m", "base_url": server.base_url}
        with RLM("openai", kwargs, persistent=True, cache=tmp_path / "answers.sqlite") as rlm:
            assert rlm.completion("x").response == "same" and len(server.requests) == 3
            assert rlm.completion("y").response == "same" and len(server.requests) == 5


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
    with lm_server(lambda request: "FINAL(short)") as server:
        for calls in (1, 1):  # a budget in which an answer of the usual length does not fit
            scope: dict[str, Any] = {"cache": tmp_path / "b.sqlite", "cache_scope": "s"}
            assert complete(server, max_tokens=9_000, **scope)[1] == calls


def test_only_its_user_can_read_it_and_it_has_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    headers = {"default_headers": {"X-Token": "sk-secret-header"}}
    with lm_server(answer) as server:
        complete(server, "a secret text", cache=path, backend_kwargs={"api_key": "sk-secret-key", **headers})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.iterdir())
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM answers").fetchone() == (3,)


def test_a_broken_cache_harms_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.sqlite"

    def break_it(request: dict[str, Any]) -> str:
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("DROP TABLE IF EXISTS answers")
        return answer(request)

    with lm_server(break_it) as server:
        assert complete(server, cache=path) == ("reply of m", 3)
    assert "cache: can't write" in caplog.text
    path.write_text("something else\n" * 1_000)
    with lm_server(answer) as server, pytest.raises(ConfigError, match=r"cache: can.t use .*answers.sqlite"):
        complete(server, cache=path)
    with pytest.raises(ConfigError, match="cache_scope goes with cache"):
        RLM("openai", {"model_name": "m"}, cache_scope="s")
