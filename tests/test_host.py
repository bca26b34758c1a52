"""The host's side when things go wrong there: cancellation, defects of others, disks, signals."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rlm_core import RLM, ConfigError, LMRequest, LogError, Observer, ProviderError, RLMLogger, ScriptedClient
from rlm_core.broker.call import Answer, Call, Failure
from rlm_core.cell import CellResult
from rlm_core.environment import Sandbox, make_environment
from rlm_core.errors import SandboxLost
from rlm_core.portal import portal
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.conftest import SPEC, Recorder, echo
from tests.support.lm_server import completion, lm_server
from tests.support.processes import descendants, gone


def repl(code: str) -> str:
    return f"```repl\n{code}\n```"


async def test_after_a_cancelled_cell_the_session_goes_on(session: Session) -> None:
    await session.execute("kept = 42")
    for code in ("import time; time.sleep(600)", "sum(range(10**15))"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await session.execute(code)
        assert (await session.execute("print(kept)")).stdout == "42\n"


async def test_cells_that_are_asked_for_at_once_run_one_after_the_other(session: Session) -> None:
    results = await asyncio.gather(*(session.execute(f"print({n})") for n in range(5)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(5)]


async def test_stopping_the_sandbox_under_a_cell_ends_the_wait(recorder: Recorder) -> None:
    sandbox = await make_environment("local", {}).start()
    async with Session(sandbox, SPEC, echo, observer=recorder) as session:
        running = asyncio.create_task(session.execute("print('on')\nimport time; time.sleep(600)"))
        await recorder.saw("on")
        await sandbox.stop()
        with pytest.raises(SandboxLost):
            await running


async def test_too_much_code_is_a_clear_error_and_the_session_lives(session: Session) -> None:
    with pytest.raises(ConfigError, match="at most 1,048,576 characters"):
        await session.execute("#" * (1 << 21))
    assert (
        await session.execute("print('\ud800'.encode('utf-16', 'surrogatepass')[2:])")
    ).stdout == "b'\\x00\\xd8'\n"


async def test_a_result_at_all_its_limits_arrives(sandbox: Sandbox) -> None:
    spec = make_environment("local", {"output_bytes": "1MiB"}).spec
    async with Session(sandbox, spec, echo) as session:
        code = "import sys\nsys.stdout.write('o' * 6_000_000)\nsys.stderr.write('e' * 6_000_000)\nFINAL('x' * 4_000_000)"
        result = await session.execute(code)
        assert (result.stdout_bytes, result.stderr_bytes, len(result.answer)) == (
            6_000_000,
            6_000_000,
            4_000_000,
        )
    with pytest.raises(ConfigError, match="output_bytes"):
        make_environment("local", {"output_bytes": "2MiB"})


@pytest.mark.parametrize(
    "answer",
    [
        KeyError("defect"),
        Answer("\ud800", "\ud800", TokenUsage(-1, -1)),
        Failure("PROVIDER", "\ud800" * 10_000),
    ],
    ids=["raises", "odd answer", "odd failure"],
)
async def test_whatever_comes_of_a_call_its_cell_hears_of_it(sandbox: Sandbox, answer: Any) -> None:
    async def answer_oddly(call: Call) -> Answer | Failure:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    async with Session(sandbox, SPEC, answer_oddly) as session:
        result = await session.execute("r = llm_query('x')\nprint(r.ok, ascii(str(r))[:40])")
    assert result.status == "ok" and result.stdout.startswith(
        ("True '\\ud800'", "False 'Error: ", 'False "Error: KeyError')
    )


class Breaking(Observer):
    """Raises in every method."""

    def __getattribute__(self, name: str) -> Any:
        if hasattr(Observer, name) and not name.startswith("_"):

            def fail(*args: object, **kwargs: object) -> None:
                raise ValueError(name)

            return fail
        return super().__getattribute__(name)


def test_an_observer_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    lm = ScriptedClient([repl("print(llm_query('x'))"), repl("FINAL(1)")])
    sub = ScriptedClient(["y"], "sub")
    assert RLM(backend=lm, other_backends=[sub], observer=Breaking()).completion("x").response == "1"
    assert "output of an observer failed" in caplog.text
    with pytest.raises(ProviderError, match="first"):
        RLM(backend=ScriptedClient([ProviderError("first")]), observer=Breaking()).completion("x")


def test_a_blocking_call_from_an_observer_is_refused_and_not_a_deadlock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Calling(Observer):
        def cell_ended(self, result: CellResult) -> None:
            portal().run(asyncio.sleep(0))

    assert RLM(backend=ScriptedClient([repl("FINAL(1)")]), observer=Calling()).completion("x").response == "1"
    assert "can't end" in caplog.text


def test_a_block_takes_what_the_block_before_it_had_bought() -> None:
    asked: list[str] = []

    def sub(request: LMRequest) -> str:
        asked.append(request.messages[-1]["content"])
        return "bought"

    first = repl("r = llm_query('a')\nimport os; os._exit(1)")
    lm = ScriptedClient(
        [
            f"{first}\n{repl('r = llm_query(chr(97))')}\n{repl('1/0 if llm_query(chr(98)) else 0')}",
            repl("FINAL(llm_query('b'))"),
        ]
    )
    assert RLM(backend=lm, other_backends=[ScriptedClient(sub, "sub")]).completion("x").response == "bought"
    assert asked == ["a", "b"]


BODIES = {
    "not json": b"{nope",
    "not text": b"\xff\xfe{",
    "null message": json.dumps(completion("x", "m") | {"choices": [{"index": 0, "message": None}]}).encode(),
    "choices is text": json.dumps(completion("x", "m") | {"choices": "x"}).encode(),
    "no choices": json.dumps(completion("x", "m") | {"choices": []}).encode(),
    "content is a number": json.dumps(completion(5, "m")).encode(),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("body", BODIES)
def test_a_malformed_reply_is_a_provider_error(body: str) -> None:
    with lm_server(lambda request: BODIES[body]) as server:
        kwargs = {"model_name": "m", "base_url": server.base_url, "max_retries": 0}
        with (
            RLM(backend="openai", backend_kwargs=kwargs) as rlm,
            pytest.raises(ProviderError, match="chat completion"),
        ):
            rlm.completion("x")


def test_parts_of_text_and_odd_usage_are_read() -> None:
    parts: Any = [{"type": "text", "text": "FINAL("}, {"type": "text", "text": "1)"}]
    usage = {"usage": {"prompt_tokens": "ten", "completion_tokens": -3, "total_tokens": None}}
    with lm_server(lambda request: (200, completion(parts, "m") | usage)) as server:
        with RLM(backend="openai", backend_kwargs={"model_name": "m", "base_url": server.base_url}) as rlm:
            result = rlm.completion("x")
    assert result.response == "1" and result.usage_summary.total_input_tokens == 0


def test_no_secret_of_a_url_or_a_header_is_logged_or_shown(tmp_path: Path) -> None:
    with lm_server(lambda request: "FINAL(1)") as server:
        url = server.base_url.replace("//", "//user:hunter2@")
        kwargs = {"model_name": "m", "base_url": url}
        sampling = {"extra_headers": {"Authorization": "Bearer TOPSECRET"}, "temperature": 0.5}
        with RLM(
            backend="openai", backend_kwargs=kwargs, sampling_args=sampling, logger=RLMLogger(tmp_path)
        ) as rlm:
            rlm.completion("x")
        with RLM(backend="openai", backend_kwargs=kwargs) as rlm:
            rlm.completion("x")
        basic = f"Basic {base64.b64encode(b'user:hunter2').decode()}"
        assert server.headers[-1]["authorization"] == basic
    (path,) = tmp_path.glob("*.jsonl")
    text = path.read_text()
    assert "hunter2" not in text and "TOPSECRET" not in text and '"temperature": 0.5' in text
    with (
        RLM(backend="openai", backend_kwargs={**kwargs, "max_retries": 0}) as rlm,
        pytest.raises(ProviderError) as caught,
    ):
        rlm.completion("x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_iterations": "3"}, "max_iterations must be int, not str"),
        ({"logger": "./logs"}, "logger must be RLMLogger or None"),
        ({"observer": 5}, "observer must be"),
        ({"environment_kwargs": [1]}, "environment_kwargs must be"),
        ({"other_backends": "openai"}, "other_backends must be"),
        ({"custom_system_prompt": 5}, "custom_system_prompt must be"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RLM(backend=ScriptedClient([]), **kwargs)


def test_what_else_is_wrong_is_one_line_too() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="contains itself"):
        RLM(backend=ScriptedClient([])).completion(endless)
    with pytest.raises(ConfigError, match="openai knows no foo"):
        kwargs = {"model_name": "m", "base_url": "http://127.0.0.1:9/v1"}
        RLM(backend="openai", backend_kwargs=kwargs, sampling_args={"foo": 1}).completion("x")
    with pytest.raises(TypeError, match="positional"):
        RLM("scripted", {}, "local", None, 0, 1)  # type: ignore


def test_a_log_that_can_not_be_written_is_one_line_and_no_answer_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RLMLogger(tmp_path / "logs")
    (tmp_path / "logs").rmdir()
    with pytest.raises(LogError, match="can't write the log"):
        RLM(backend=ScriptedClient([repl("FINAL(1)")]), logger=logger).completion("x")

    class Full(RLMLogger):
        def start_run(self, run_id: str, metadata: Any, context: Any) -> Any:
            log: Any = super().start_run(run_id, metadata, context)
            log._file.close()
            log._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
            log.turn = lambda iteration: None
            return log

    done = RLM(backend=ScriptedClient([repl("FINAL(1)")]), logger=Full(tmp_path)).completion("x")
    assert done.response == "1" and "No space left" in caplog.text


def test_a_long_temporary_folder_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert RLM(backend=ScriptedClient([repl("FINAL(1)")])).completion("x").response == "1"


def test_a_forked_child_of_the_host_leaves_its_parents_sandboxes_alone() -> None:
    program = textwrap.dedent(
        """
        import os, sys, threading
        from rlm_core import RLM, ScriptedClient

        asked, forked = threading.Event(), threading.Event()

        def think(request):
            if len(request.messages) == 2:
                return "```repl\\nx = 1\\n```"
            asked.set()
            forked.wait()
            return "```repl\\nFINAL(x + 1)\\n```"

        run = threading.Thread(target=lambda: print(RLM(backend=ScriptedClient(think)).completion("c").response))
        run.start()
        asked.wait()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)  # runs the exit handlers that the child has inherited
        os.waitpid(pid, 0)
        forked.set()
        run.join()
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """A closed terminal, Ctrl-C, Ctrl-\\ and `timeout` signal the group and not one process."""
    asked = tmp_path / "asked"
    with lm_server(lambda request: repl(f"open({str(asked)!r}, 'w').close()\nwhile True: pass")) as server:
        command = [
            str(Path(sys.executable).parent / "rlm"),
            "run",
            "q",
            "--model",
            "m",
            "--base-url",
            server.base_url,
        ]
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        host = subprocess.Popen(command, start_new_session=True, env=env, stderr=subprocess.PIPE, text=True)
        deadline = asyncio.run(_appears(asked))
        below = descendants(host.pid)
        assert deadline and len(below) >= 4
        os.killpg(host.pid, number)
        errors = host.communicate(timeout=30)[1]
        assert asyncio.run(_all_gone(below)), below
    assert not list(tmp_path.glob("rlm-*"))
    if number == signal.SIGINT:
        assert host.returncode == 130 and "Traceback" not in errors


async def _appears(path: Path) -> bool:
    return await _until(path.exists)


async def _all_gone(pids: dict[int, str]) -> bool:
    return await _until(lambda: all(gone(pid) for pid in pids))


async def _until(condition: Any) -> bool:
    """The kernel tells of other people's processes and files by being asked."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return True
