"""The command as a person uses it: a process of its own, its output and its exit code."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lm_server import lm_server

RLM = [str(Path(sys.executable).parent / "rlm")]
ANSWER = "```repl\nFINAL(f'{len(context)} {type(context).__name__}')\n```"


def rlm(*args: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RLM, *args],
        input=stdin,
        capture_output=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8", **env},
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_run_asks_a_server_about_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1234)
    with lm_server(lambda request: ANSWER) as server:
        done = rlm(
            "run",
            "how long?",
            "--context",
            str(tmp_path / "a.txt"),
            "--model",
            "m",
            "--base-url",
            server.base_url,
        )
    assert (done.returncode, done.stdout) == (0, "1234 str\n"), done.stderr
    assert "no security boundary" in done.stderr
    assert "Question: how long?" in server.requests[0]["messages"][1]["content"]


def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    with lm_server(lambda request: ANSWER) as server:
        done = rlm(
            "run", "q", "-c", "-", "--model", "m", "--base-url", server.base_url, "--json", "--log-dir", str(tmp_path / "logs"),
            stdin="é\r\n".encode(),
        )  # fmt: skip
    result = json.loads(done.stdout)
    assert set(result) == {"response", "status", "usage", "execution_time", "iterations", "run_id", "log"}
    assert result["response"] == "3 str" and result["status"] == "answered" and result["iterations"] == 1
    assert Path(result["log"]).exists() and result["run_id"] in result["log"]


def test_folders_and_several_sources(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "two.txt").write_text("2")
    with lm_server(lambda request: "```repl\nFINAL(context)\n```") as server:
        options = ["--model", "m", "--base-url", server.base_url]
        folder = rlm("run", "q", "-c", str(tmp_path), *options)
        several = rlm("run", "q", "-c", f"{tmp_path}/one.txt", "-c", "-", *options, stdin=b"\xff")
    assert folder.stdout == "{'one.txt': '1', 'two.txt': '2'}\n"
    assert several.stdout == f"{{'{tmp_path}/one.txt': '1', '-': b'\\xff'}}\n"


def test_verbose_shows_the_turns_on_stderr() -> None:
    with lm_server(lambda request: ANSWER) as server:
        done = rlm("run", "q", "--model", "m", "--base-url", server.base_url, "--verbose")
    assert done.stdout == "0 str\n" and "turn 1 of 30" in done.stderr and "FINAL(" in done.stderr


def test_a_limit_is_exit_code_1_with_the_best_effort() -> None:
    with lm_server(lambda request: "thinking") as server:
        args = ["run", "q", "--model", "m", "--base-url", server.base_url, "--max-iterations", "2", "--json"]
        done = rlm(*args)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "max_iterations"
    assert "no answer within 2 turns" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            ["--context", "/no/such/file", "--model", "m", "--base-url", "http://127.0.0.1:9"],
            2,
            "No such file",
        ),
        (
            ["--backend", "opnai"],
            2,
            "unknown backend 'opnai'; did you mean 'openai'? known: anthropic, azure_openai",
        ),
        (["--env", "dokker", "--model", "m"], 2, "unknown environment 'dokker'"),
        (["--model", "m"], 2, "set OPENAI_API_KEY"),
        ([], 2, "pass --model NAME"),
        (["--model", "m", "--base-url", "http://127.0.0.1:9/v1"], 1, "can't reach http://127.0.0.1:9/v1"),
        (["--max-iterations", "many"], 2, "--max-iterations"),
        (["--max-depth", "-5", "--model", "m"], 2, "max_depth must be at least 0"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(args: list[str], code: int, message: str) -> None:
    done = rlm("run", "q", *args)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_refused_key_is_one_line() -> None:
    with lm_server(lambda request: (401, {"error": {"message": "Incorrect API key"}})) as server:
        done = rlm("run", "q", "--model", "m", "--base-url", server.base_url, "--json")
    assert done.returncode == 1 and "wants an API key, and none was sent" in done.stderr
    assert json.loads(done.stdout)["status"] == "failed"


def test_a_run_that_failed_says_what_it_used(tmp_path: Path) -> None:
    replies: Iterator[Any] = iter(
        ["```repl\nx = 1\n```", (401, {"error": {"message": "The key has expired"}})]
    )
    with lm_server(lambda request: next(replies)) as server:
        log = ["--log-dir", str(tmp_path)]
        done = rlm("run", "q", "--model", "m", "--base-url", server.base_url, "--json", *log)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["status"] == "failed" and "wants an API key" in told["error"]
    assert told["usage"]["total_cost"] == 0.25 and told["iterations"] == 2
    assert json.loads(Path(told["log"]).read_text().splitlines()[-1])["status"] == "failed"


def test_a_run_that_is_interrupted_says_what_it_used() -> None:
    asked, over = threading.Event(), threading.Event()

    def reply(request: dict[str, Any]) -> str:
        if len(request["messages"]) > 2:
            asked.set()
            over.wait(30)
        return "```repl\nx = 1\n```"

    with lm_server(reply) as server:
        command = [*RLM, "run", "q", "--model", "m", "--base-url", server.base_url, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert asked.wait(30)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
        over.set()
    told = json.loads(output)
    assert process.returncode == 130 and b"nothing is left running" in errors
    assert told["error"] == "interrupted" and told["usage"]["total_cost"] == 0.25


def test_the_demo_does_the_main_job(tmp_path: Path) -> None:
    done = rlm("demo", "--log-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "4,304,250 characters" in done.stdout
        and "Right: the same as computed from the whole text" in done.stdout
    )
    assert "turn 4 of 30" in done.stdout and "rlm run" in done.stdout
    (log,) = tmp_path.glob("*.jsonl")
    iterations = [json.loads(line) for line in log.read_text().splitlines()][1:-1]
    assert len(iterations[1]["code_blocks"][0]["result"]["rlm_calls"]) > 60


def test_the_demo_takes_another_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Then came Anna and met Boris, but Anna left Boris for Carl.\n" * 10_000)
    done = rlm("demo", "--text", str(path), "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 0 and "Right:" in done.stdout, done.stdout + done.stderr
    assert rlm("demo", "--text", "/no/such/file").returncode == 2


def test_the_demo_notices_a_wrong_answer(tmp_path: Path) -> None:
    """The check can fail: with a truth that is not that of the text, it does."""
    from rlm_core.demo import task

    text = "was Anna there, and Boris too. " * 10
    assert task.truth(text) != task.truth(text + "of Boris")


def test_doctor_tells_what_works_and_shows_no_key() -> None:
    secret = "sk-doctor-must-not-show"
    done = rlm("doctor", "--json", OPENAI_API_KEY=secret)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0 and secret not in done.stdout + done.stderr
    assert report["keys"]["OPENAI_API_KEY"] is True and report["keys"]["ANTHROPIC_API_KEY"] is False
    (local,) = [each for each in report["environments"] if each["name"] == "local"]
    assert local["works"] and not local["isolated"] and "network" in local["cannot_enforce"]
    text = rlm("doctor").stdout
    assert "huge pages" in text and "local" in text and "no security boundary" in text


def test_doctor_examines_one_environment_with_a_policy() -> None:
    looked = rlm("doctor", "local", "-o", "memory=1GiB", "--json")
    assert [each["name"] for each in json.loads(looked.stdout)["environments"]] == ["local"]
    refused = rlm("doctor", "local", "-o", "network=none", "--json")
    (local,) = json.loads(refused.stdout)["environments"]
    assert refused.returncode == 1 and not local["works"] and "network" in local["problem"]
    assert rlm("doctor", "-o", "memory=1GiB").returncode == 2


def test_version_and_help() -> None:
    assert rlm("--version").stdout == "rlm-sandbox 0.1.0\n"
    assert "run" in rlm("--help").stdout
    assert rlm("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("memory", "it takes name=value"),
        ("memroy=1", "memroy"),
        ("cpus=none", "cpus"),
        ("cpus=1", "can't enforce cpus"),
    ],
)
def test_a_wrong_option_of_the_policy_is_one_line(option: str, message: str) -> None:
    done = rlm("run", "q", "--model", "m", "--base-url", "http://127.0.0.1:9/v1", "-o", option)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_options_of_the_policy_are_held(tmp_path: Path) -> None:
    with lm_server(
        lambda request: "```repl\nimport resource; FINAL(resource.getrlimit(resource.RLIMIT_DATA)[0])\n```"
    ) as server:
        done = rlm(
            "run", "q", "--model", "m", "--base-url", server.base_url, "-o", "memory=1GiB", OPENAI_API_KEY="k"
        )
    assert done.stdout == f"{1 << 30}\n", done.stderr


def test_a_key_and_prices_for_a_server_of_ones_own(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[m]\ninput = 1\noutput = 2\n")
    with lm_server(lambda request: "FINAL(1)") as server:
        own = ["run", "q", "--model", "m", "--base-url", server.base_url]
        given = rlm(
            *own, "--max-budget", "1", "--prices", str(prices), "--api-key-env", "MINE", MINE="sk-mine"
        )
        unset = rlm(*own, "--api-key-env", "NOT_THERE")
        priceless = rlm(*own, "--max-budget", "1")
    assert (given.returncode, given.stdout) == (0, "1\n"), given.stderr
    assert server.headers[0]["authorization"] == "Bearer sk-mine"
    assert unset.returncode == 2 and "the variable NOT_THERE is not set" in unset.stderr
    assert priceless.returncode == 2 and "--prices" in priceless.stderr
