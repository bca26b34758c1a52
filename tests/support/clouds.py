"""What is tried of every provider's environment, beside the conformance suite."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.lm_server import lm_server

DOCS = Path(__file__).resolve().parents[2] / "docs" / "environments.md"


def what_the_doctor_says_of(name: str) -> None:
    """It looks there, and tells that it started nothing."""
    rlm = str(Path(sys.executable).parent / "rlm")
    done = subprocess.run([rlm, "doctor", "--json"], capture_output=True, text=True, timeout=100)
    report = {each["name"]: each for each in json.loads(done.stdout)["environments"]}[name]
    assert report["works"] and "costs money" in report["notes"][0], report


def run_the_snippet_of(heading: str, folder: Path) -> None:
    """The program below this heading of docs/environments.md, with a scripted LM."""
    (folder / "war_and_peace.txt").write_text("Pierre. " * 1000)
    section = DOCS.read_text().partition(f"## {heading}\n")[2]
    snippet = section.partition("```python\n")[2].partition("```")[0]
    with lm_server(lambda request: "```repl\nimport six; FINAL('Pierre')\n```") as server:
        env = {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "not a key"}
        command = [sys.executable, "-c", snippet]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "Pierre\n", done.stderr


async def ends_at_ctrl_c(name: str, requests: list[str], stage: str, folder: Path) -> None:
    """Ctrl-C as soon as a run's start has come to a request: it ends, in its own time."""
    requests.clear()
    rlm = str(Path(sys.executable).parent / "rlm")
    command = [rlm, "demo", "--env", name, "-o", "memory=1GiB", "--log-dir", str(folder)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with asyncio.timeout(60):
        while not any(stage in each for each in requests):  # noqa: ASYNC110 - the service is in another thread
            await asyncio.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode == 130, errors.decode()
    assert "Traceback" not in errors.decode()


def reaped_by_command(name: str, sandbox_id: str) -> None:
    """`rlm sandbox` finds a sandbox that another process has started, and ends it."""
    rlm = str(Path(sys.executable).parent / "rlm")

    def run(*arguments: str) -> str:
        done = subprocess.run([rlm, "sandbox", *arguments], capture_output=True, text=True, timeout=60)
        return done.stdout

    assert f"{sandbox_id} " in run("ls") and name in run("ls")
    assert run("rm", sandbox_id).strip() == sandbox_id
    assert sandbox_id not in run("ls")
