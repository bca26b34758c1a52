"""Sessions of one container against each other and against their supervisor."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from rlm_core.environment import Sandbox, SandboxSpec, make_environment
from rlm_core.errors import SandboxLost
from rlm_core.session import Session
from tests.conftest import echo

SMALL: dict[str, Any] = {"memory": "512MiB", "pids": 100, "interrupt_grace": 0.3, "disk": "64MiB"}
ENVIRONMENTS = [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("docker", "bubblewrap")]


@pytest_asyncio.fixture(params=ENVIRONMENTS)
async def shared(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Sandbox, SandboxSpec]]:
    kwargs = {**SMALL, "disk": SMALL["disk"]}
    environment = make_environment(request.param, kwargs)
    sandbox = await environment.start()
    yield sandbox, environment.spec
    await sandbox.stop()


LAST_ACTS = {
    "a folder deeper than any stack": "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nos.kill(os.getsid(0), 9)",
    "a folder that nobody may enter": "import os\nos.makedirs('a/b'); open('a/b/c', 'w'); os.chmod('a/b', 0); os.chmod('a', 0)\nos.kill(os.getsid(0), 9)",
    "its own folder shut": "import os\nopen('x', 'w').write('x' * 10_000)\nos.chmod('.', 0)",
    "links out of the folder": "import os\nos.symlink('/', 'root'); os.symlink('..', 'up'); os.link('/proc/self/exe', 'x') if False else None\nos.kill(os.getsid(0), 9)",
    "a stopped root with children": "import os, signal\nos.kill(os.getsid(0), signal.SIGSTOP)\nfor _ in range(60):\n    if os.fork() == 0: os.setpgid(0, 0); signal.pause()",
    "everything of its own killed": "import os\nos.kill(-1, 9)",
}


@pytest.mark.parametrize("act", LAST_ACTS)
async def test_how_a_session_ends_is_its_own_affair(shared: tuple[Sandbox, SandboxSpec], act: str) -> None:
    sandbox, spec = shared
    async with Session(sandbox, spec, echo) as victim:
        await victim.execute("kept = 42")
        attacker = Session(sandbox, spec, echo)
        await attacker.open()
        with contextlib.suppress(SandboxLost):
            await attacker.execute(LAST_ACTS[act], timeout=5)
        async with asyncio.timeout(10):
            await attacker.aclose()
        async with Session(sandbox, spec, echo) as fresh:
            assert (await fresh.execute("print(1)")).stdout == "1\n"
        assert (await victim.execute("print(kept, llm_query('on'))")).stdout == "42 echo on\n"


LEAVE = """
import os
for folder in ("/tmp", "/dev/shm"):
    for number in range(300): open(f"{folder}/left-{number}", "w").write("x")
    os.makedirs(f"{folder}/deep/" + "d/" * 200)
    os.mkdir(f"{folder}/left-shut"); open(f"{folder}/left-shut/x", "w").write("x"); os.chmod(f"{folder}/left-shut", 0)
os.chmod(".", 0)
"""
COUNT = "import os\nprint(sum(name.startswith(('left', 'deep')) for folder in ('/tmp', '/dev/shm') for name in os.listdir(folder)))"


async def test_what_a_session_leaves_goes_with_it(shared: tuple[Sandbox, SandboxSpec]) -> None:
    sandbox, spec = shared
    async with Session(sandbox, spec, echo) as first:
        result = await first.execute(LEAVE)
        assert result.status == "ok", result.stderr
    async with Session(sandbox, spec, echo) as second, asyncio.timeout(10):
        while (await second.execute(COUNT)).stdout != "0\n":
            pass  # removed in the background
