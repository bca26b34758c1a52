"""Bubblewrap for a user who is not root, which most users are and tests in a container are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("bubblewrap")
ROOT = Path(__file__).parent.parent
NOBODY = "65534"
CELLS = """
import asyncio
from rlm_core.environment import make_environment
from rlm_core.session import Session
from tests.conftest import echo

async def main():
    environment = make_environment("bubblewrap", {"pids": 50, "interrupt_grace": 0.3})
    sandbox = await environment.start()
    try:
        async with Session(sandbox, environment.spec, echo) as session:
            for code in ("import os, socket\\nprint(os.getuid(), llm_query('on'))", "os._exit(1)", "print(os.getpid() < 100)"):
                result = await session.execute(code)
                print(result.status, result.stdout.strip())
            around = "try: print(os.listdir('/home'))\\nexcept OSError as error: print(type(error).__name__)"
            print((await session.execute(around)).stdout)
    finally:
        await sandbox.stop()

asyncio.run(main())
"""


def as_nobody() -> list[str]:
    """A view of this machine in which that user can read the tests and their Python, and has a /tmp."""
    view = ["bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--bind", "/proc", "/proc"]
    view += ["--perms", "1777", "--tmpfs", "/tmp", "--perms", "0755", "--tmpfs", "/root"]
    for shown in (ROOT, Path(sys.base_prefix), Path(sys.prefix)):
        for parent in reversed(shown.parents[:-1]):
            view += ["--perms", "0755", "--dir", str(parent)]
        view += ["--ro-bind", str(shown), str(shown)]
    return [*view, "--chdir", str(ROOT), "setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests of bubblewrap run as this user")
def test_cells_run_and_are_rolled_back_for_an_ordinary_user() -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*as_nobody(), sys.executable, "-c", CELLS],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    lines = ["ok 65534 echo on", "rolled_back", "ok True", "FileNotFoundError"]
    assert [line.strip() for line in done.stdout.split("\n")][:4] == lines, done.stdout + done.stderr
