"""The public surface, and that a host process is left as it was."""

import asyncio
import importlib
import importlib.metadata
import inspect
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import rlm_core
from rlm_core import RLM, ConfigError, LMRequest, RLMLogger, ScriptedClient
from rlm_core.clients import BACKENDS, EXTRAS, make_client
from tests.support.processes import descendants

ORIGINAL = {  # rlms 0.1.3: keyword and default of RLM.__init__
    "backend": "openai", "backend_kwargs": None, "environment": "local", "environment_kwargs": None,
    "depth": 0, "max_depth": 1, "max_iterations": 30, "max_budget": None, "max_timeout": None,
    "max_tokens": None, "max_errors": None, "custom_system_prompt": None, "other_backends": None,
    "other_backend_kwargs": None, "logger": None, "verbose": False, "persistent": False,
    "custom_tools": None, "custom_sub_tools": None, "compaction": False, "compaction_threshold_pct": 0.85,
    "max_concurrent_subcalls": 4, "on_subcall_start": None, "on_subcall_complete": None,
    "on_iteration_start": None, "on_iteration_complete": None, "sampling_args": None,
    "sub_sampling_args": None, "orchestrator": True, "user_prologue": None,
}  # fmt: skip


def answer_its_context(request: LMRequest) -> str:
    return "```repl\nFINAL(llm_query(context))\n```"


def shout(request: LMRequest) -> str:
    return request.messages[-1]["content"].upper()


def make(**kwargs: Any) -> RLM:
    lm, sub = ScriptedClient(answer_its_context), ScriptedClient(shout, "sub")
    return RLM(backend=lm, other_backends=[sub], **kwargs)


def test_all_names_are_exported_and_nothing_else() -> None:
    public = {
        name
        for name, value in vars(rlm_core).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(rlm_core.__all__)
    assert importlib.import_module("rlm_core.logger").RLMLogger is RLMLogger


def test_keywords_and_defaults_are_those_of_the_original() -> None:
    parameters = inspect.signature(RLM).parameters
    ours = {name: each.default for name, each in parameters.items() if name in ORIGINAL}
    assert ours == ORIGINAL
    assert list(inspect.signature(RLM.completion).parameters) == ["self", "prompt", "root_prompt"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"persistent": 1}, "persistent must be bool, not int"),
        ({"compaction_threshold_pct": 85}, "compaction_threshold_pct must be a number above 0 and at most 1"),
        ({"max_depth": -1}, "max_depth must be at least 0"),
        ({"max_depth": 1.5}, "max_depth must be int, not float"),
        ({"max_budget": 0}, "max_budget must be more than 0"),
        ({"max_timeout": "5"}, "max_timeout must be a number or None"),
        ({"on_limit": "shrug"}, "on_limit must be one of 'raise', 'return'"),
        ({"on_subcall_start": 3}, "on_subcall_start must be a function"),
        ({"prices": {"m": {"input": -1, "output": 1}}}, "prices.*m.*input"),
        ({"prices": "/no/such/prices.toml"}, "prices: No such file"),
        ({"max_budget": 1.0}, "model 'scripted' has no known price; give it in RLM"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"environment": "dokker"}, "unknown environment 'dokker', did you mean 'docker'.*local"),
        ({"environment_kwargs": {"cpus": 3}}, "can't enforce cpus"),
        (
            {"backend": "opnai"},
            "unknown backend 'opnai'; did you mean 'openai'\\? known: .*, openai, .*, scripted",
        ),
        ({"backend": "scripted", "backend_kwargs": {"replies": 3}}, "needs replies"),
        ({"backend": "scripted", "backend_kwargs": {"rep": 3}}, "rep"),
        (
            {"other_backends": ["openai"], "other_backend_kwargs": []},
            "1 other_backends but 0|no API key|needs",
        ),
    ],
)
def test_wrong_arguments_are_one_clear_line_before_anything_starts(
    kwargs: dict[str, Any], message: str
) -> None:
    before = set(Path("/tmp").glob("rlm-*"))
    with pytest.raises(rlm_core.UsageError, match=message) as caught:
        RLM(**{"backend": ScriptedClient(["x"]), **kwargs}).completion("x")
    assert "\n" not in str(caught.value)
    assert set(Path("/tmp").glob("rlm-*")) == before


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "rlm_core.clients.openai", raising=False)
    with pytest.raises(rlm_core.MissingExtra, match=r"pip install 'rlm-sandbox\[openai\]'"):
        RLM(backend="openai", backend_kwargs={"model_name": "m"}).completion("x")


def test_every_backend_that_needs_a_package_has_an_extra_of_its_own() -> None:
    extras = set(importlib.metadata.metadata("rlm-sandbox").get_all("Provides-Extra") or ())
    needed = {EXTRAS.get(name, name) for name in BACKENDS if name != "scripted"}
    assert {name.replace("_", "-") for name in needed} <= {name.replace("_", "-") for name in extras}


def test_ten_completions_in_threads_of_one_rlm_give_ten_answers_and_ten_logs(tmp_path: Path) -> None:
    with make(logger=RLMLogger(tmp_path)) as rlm, ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda n: rlm.completion(f"text {n}"), range(10)))
    assert [result.response for result in results] == [f"TEXT {n}" for n in range(10)]
    check_logs(results)


async def test_ten_acompletions_in_one_loop_give_ten_answers_and_ten_logs(tmp_path: Path) -> None:
    async with make(logger=RLMLogger(tmp_path)) as rlm:
        results = await asyncio.gather(*(rlm.acompletion(f"text {n}") for n in range(10)))
    assert [result.response for result in results] == [f"TEXT {n}" for n in range(10)]
    check_logs(results)


def check_logs(results: list[rlm_core.RLMChatCompletion]) -> None:
    paths = {result.log for result in results}
    assert len(paths) == 10
    for result in results:
        assert result.log is not None and f'"response": "{result.response}"' in Path(result.log).read_text()


def test_the_host_process_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, Any]:
        signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
        streams = [id(sys.stdin), id(sys.stdout), id(sys.stderr), sys.displayhook, sys.excepthook]
        return {
            "cwd": Path.cwd(),
            "env": dict(os.environ),
            "signals": signals,
            "streams": streams,
            "umask": umask(),
        }

    monkeypatch.chdir(tmp_path)
    make().completion("warm up")
    before = state()
    code = "```repl\nimport os, sys, signal\nos.chdir('/'); os.environ['X'] = '1'; os.umask(0); sys.stdout = None\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nFINAL(1)\n```"
    RLM(backend=ScriptedClient([code])).completion("x")
    assert state() == before
    assert list(tmp_path.iterdir()) == []


def umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def test_nothing_runs_after_a_completion_whether_it_succeeds_or_not() -> None:
    before = set(descendants(os.getpid()))
    make().completion("x")
    for bad in (RuntimeError("from the script"), KeyboardInterrupt()):
        with pytest.raises(type(bad)):
            RLM(backend=ScriptedClient(["```repl\n1\n```", bad])).completion("x")
    assert set(descendants(os.getpid())) == before


def test_an_interrupted_completion_cleans_up_before_it_raises() -> None:
    before = set(descendants(os.getpid()))
    asked = threading.Event()

    def slow(request: LMRequest) -> str:
        asked.set()
        return "```repl\nimport time; time.sleep(600)\n```"

    def interrupt() -> None:
        asked.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        RLM(backend=ScriptedClient(slow)).completion("x")
    assert set(descendants(os.getpid())) == before


def test_completion_works_inside_a_running_loop() -> None:
    async def inside() -> str:
        return make().completion("nested").response  # blocks this loop, as it says

    assert asyncio.run(inside()) == "NESTED"


def test_results_survive_to_dict_and_back() -> None:
    completion = make().completion("x")
    again = rlm_core.RLMChatCompletion.from_dict(completion.to_dict())
    assert again == completion


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "opnai"}, "unknown backend 'opnai'; did you mean 'openai'?"),
        ({"environment": "daytona"}, "unknown environment 'daytona' in this version"),
    ],
)
def test_a_name_that_there_is_not_is_told_at_once(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RLM(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"context_window": "200"},
        {"context_window": 0},
        {"max_retries": "two"},
        {"model_name": 5},
        {"timeout": "1"},
    ],
)
def test_wrong_types_of_backend_kwargs_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_client("vllm", {"model_name": "m", "base_url": "http://127.0.0.1:1", **wrong})
