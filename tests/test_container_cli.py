"""The commands about sandboxes and images, and how a command that is told to end leaves no container."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rlm_environments import bundle
from rlm_environments.containers import base
from rlm_environments.containers.engine import Engine
from rlm_environments.containers.progress import steps

from rlm_core import SandboxPool

pytestmark = pytest.mark.needs("docker")
RLM = str(Path(sys.executable).parent / "rlm")


def containers() -> set[str]:
    found = Engine.connect().api.containers(all=True, filters={"label": "rlm=sandbox"})
    return {str(each["Id"]) for each in found}


def wait_for_a_container(before: set[str]) -> set[str]:
    deadline = time.monotonic() + 30
    while not (new := containers() - before) and time.monotonic() < deadline:
        select.select([], [], [], 0.02)
    return new


def test_what_comes_from_outside_is_pinned() -> None:
    assert re.fullmatch(r"python:3\.12-slim@sha256:[0-9a-f]{64}", base.DEFAULT)
    requirements = (bundle.agent_folder() / "image" / "requirements.txt").read_text()
    pins = [line for line in requirements.splitlines() if line and line[0] not in "# "]
    assert pins and all("==" in pin for pin in pins)
    assert requirements.count("--hash=sha256:") >= len(pins)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_told_to_end_leaves_no_container(number: signal.Signals, tmp_path: Path) -> None:
    before = containers()
    demo = subprocess.Popen(
        [RLM, "demo", "--env", "docker", "--log-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert wait_for_a_container(before)
    demo.send_signal(number)
    _, said = demo.communicate(timeout=30)
    assert demo.returncode in (130, 128 + number), said.decode()
    assert b"Traceback" not in said and b"never retrieved" not in said
    assert containers() <= before


def test_a_pool_that_is_closed_at_once_leaves_no_container() -> None:
    before = containers()
    for _ in range(5):
        with SandboxPool("docker", 2):
            select.select([], [], [], 0.03)
    assert containers() <= before


def test_what_runs_is_listed_and_ended() -> None:
    with SandboxPool("docker", 1) as pool:
        from rlm_core.portal import portal

        portal().run(pool.filled())
        (sandbox,) = pool._ready
        listed = subprocess.run(
            [RLM, "sandbox", "ls"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        assert sandbox.id in listed.stdout and "docker" in listed.stdout
        ended = subprocess.run([RLM, "sandbox", "rm", sandbox.id], capture_output=True, text=True)
        assert (ended.stdout, ended.returncode) == (f"{sandbox.id}\n", 0)
        assert portal().run(sandbox.epitaph(20)).startswith("the container has ended")
    wrong = subprocess.run([RLM, "sandbox", "rm", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no sandbox nothing" in wrong.stderr


def test_a_wrong_variant_or_memory_is_one_line() -> None:
    wrong = subprocess.run([RLM, "image", "build", "nonsense"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "rlm: no variant 'nonsense': minimal, or data; for another base use --base\n",
    )


def test_doctor_knows_the_engine() -> None:
    done = subprocess.run([RLM, "doctor", "--json"], capture_output=True, text=True)
    (docker,) = [each for each in json.loads(done.stdout)["environments"] if each["name"] == "docker"]
    assert docker["works"] and docker["isolated"]
    assert docker["notes"][0].startswith("engine ")


STEPS = """
from rlm_environments.containers.progress import steps
with steps() as say:
    say("pulling a base")
    input()
"""


def test_a_terminal_shows_the_step_that_is_under_way_beside_a_spinner() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", STEPS], stdin=theirs, stdout=theirs, stderr=theirs) as waits:
        os.close(theirs)
        shown = b""
        while b"pulling a base" not in shown:
            assert select.select([ours], [], [], 20)[0], shown
            shown += os.read(ours, 1 << 16)
        os.write(ours, b"\n")
        with contextlib.suppress(OSError):  # the end of a terminal
            while os.read(ours, 1 << 16):
                pass
    os.close(ours)
    assert waits.returncode == 0 and b"\x1b[?25l" in shown  # it hides the cursor while it turns


def test_elsewhere_each_step_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with steps() as say:
        say("pulling a base")
    assert [record.getMessage() for record in caplog.records] == ["pulling a base"]
