"""What is left of a host that was killed: nothing, at whatever line of the hiring of its janitor."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

KILLED_AT = """
import os, signal, sys
from rlm_core.janitor import Janitor
code, left = Janitor.__init__.__code__, int(sys.argv[1])
def trace(frame, event, _):
    global left
    if frame.f_code is not code:
        return None
    left -= event == "line"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
Janitor.hire("rm", "-rf")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("line", range(14))
async def test_a_host_that_is_killed_as_it_hires_leaves_no_folder(tmp_path: Path, line: int) -> None:
    await killed(tmp_path, KILLED_AT, str(line))


SANDBOXES = {
    "a command": """
from rlm_environments.command import CommandSandbox
class Shell(CommandSandbox):
    def command(self, script): return ["sh", "-c", script]
make = lambda: Shell(30.0)
""",
    "modal": """
from rlm_environments.modal import ModalSandbox, ModalSpec
make = lambda: ModalSandbox(ModalSpec())
""",
    "prime": """
from rlm_environments.prime import PrimeSandbox, PrimeSpec
make = lambda: PrimeSandbox(None, PrimeSpec())
""",
}
KILLED_BESIDE = """
import asyncio, os, signal, tempfile
async def host():
    sandbox = make()
    assert os.listdir(tempfile.gettempdir())
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(host())
"""


@pytest.mark.parametrize("sandbox", SANDBOXES)
async def test_a_host_that_is_killed_beside_a_sandbox_leaves_no_folder(tmp_path: Path, sandbox: str) -> None:
    await killed(tmp_path, SANDBOXES[sandbox] + KILLED_BESIDE)


async def killed(tmp_path: Path, *arguments: str) -> None:
    """Run a host that kills itself, and wait until nothing is left of it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    host = await asyncio.create_subprocess_exec(sys.executable, "-c", *arguments, env=environment)
    assert await host.wait() == -signal.SIGKILL
    async with asyncio.timeout(10):
        while os.listdir(tmp_path):  # noqa: ASYNC110, PTH208 - nobody tells
            await asyncio.sleep(0.01)
