"""What is left of a host that was killed while it hired its janitor, at any line of that."""

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
Janitor.hire(["rm", "-rf"])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("line", range(14))
async def test_a_host_that_is_killed_as_it_hires_leaves_no_folder(tmp_path: Path, line: int) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLED_AT, str(line)]
    host = await asyncio.create_subprocess_exec(*command, env=environment)
    assert await host.wait() == -signal.SIGKILL
    async with asyncio.timeout(10):
        while os.listdir(tmp_path):  # noqa: ASYNC110, PTH208 - nobody tells
            await asyncio.sleep(0.01)
