"""The warm pool: ready sandboxes, each used once."""

import asyncio
import os
import time

import pytest

from rlm_core import RLM, ConfigError, SandboxPool, ScriptedClient
from rlm_core.environment import Sandbox
from rlm_core.errors import RLMError
from rlm_core.portal import portal
from rlm_core.session import Session
from tests.conftest import echo
from tests.support.machine import missing


async def filled(pool: SandboxPool, size: int) -> None:
    async with asyncio.timeout(30):
        while pool.ready < size:
            await pool.filled()
            await asyncio.sleep(0)


def scripted(runs: int = 1) -> ScriptedClient:
    return ScriptedClient(["```repl\nimport os; FINAL(os.getcwd())\n```"] * runs)


def test_runs_take_one_each_and_never_the_same() -> None:
    with SandboxPool("local", 2) as pool:
        portal().run(filled(pool, 2))
        with RLM(backend=scripted(3), pool=pool) as rlm:
            answers = [rlm.completion("x").response for _ in range(3)]
        assert len(set(answers)) == 3
        portal().run(filled(pool, 2))
    assert pool.ready == 0


def test_a_claim_of_a_ready_one_starts_nothing_first() -> None:
    async def claim(pool: SandboxPool) -> tuple[Sandbox, int]:
        sandbox = await pool.start()
        return sandbox, pool.ready

    with SandboxPool("local", 2) as pool:
        portal().run(filled(pool, 2))
        sandbox, left = portal().run(claim(pool))
        assert left == 1
        portal().run(filled(pool, 2))
        portal().run(sandbox.stop())


WORKER_BEGAN = """
import os
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
print(int(fields[19]) / os.sysconf("SC_CLK_TCK"))
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("docker", "bubblewrap")]
)
def test_the_process_of_the_first_cell_is_older_than_the_claim(name: str) -> None:
    async def claim(pool: SandboxPool) -> tuple[float, str]:
        filled_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        while time.clock_gettime(time.CLOCK_BOOTTIME) < filled_at + 2 / os.sysconf("SC_CLK_TCK"):
            pass  # the kernel tells the age of a process in ticks
        sandbox = await pool.start()
        async with Session(sandbox, pool.spec, echo) as session:
            began = (await session.execute(WORKER_BEGAN)).stdout
        await sandbox.stop()
        return filled_at, began

    with SandboxPool(name, 1) as pool:
        portal().run(filled(pool, 1))
        filled_at, began = portal().run(claim(pool))
    assert float(began) <= filled_at


def test_one_that_has_died_meanwhile_is_not_given() -> None:
    async def claim_after_a_death(pool: SandboxPool) -> str:
        dead = pool._ready[0]
        dead.kill()
        await dead.epitaph(20)
        sandbox = await pool.start()
        await sandbox.stop()
        return "another" if sandbox is not dead else "the dead one"

    with SandboxPool("local", 1) as pool:
        portal().run(filled(pool, 1))
        assert portal().run(claim_after_a_death(pool)) == "another"


def test_closing_while_it_fills_leaves_nothing() -> None:
    with SandboxPool("local", 3) as pool:
        pass
    assert pool.ready == 0
    with pytest.raises(ConfigError, match="closed"):
        RLM(backend=scripted(), pool=pool).completion("x")


@pytest.mark.parametrize("size", [0, -1, 65, 1.5])
def test_a_wrong_size_is_named(size: int) -> None:
    with pytest.raises(ConfigError, match="size must be"):
        SandboxPool("local", size)


def test_a_pool_has_its_own_policy() -> None:
    pool = SandboxPool("local")
    with pytest.raises(ConfigError, match="give the policy to the pool"):
        RLM(pool=pool, environment_kwargs={"memory": "1GiB"})


@pytest.mark.needs("docker")
def test_a_pool_that_can_not_fill_says_why_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not missing("docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with SandboxPool("docker", 2) as pool, pytest.raises(RLMError, match="no container engine"):
        RLM(backend=scripted(), pool=pool).completion("x")


@pytest.mark.needs("docker")
def test_a_pool_of_containers() -> None:
    with SandboxPool("docker", 1, {"memory": "512MiB"}) as pool:
        portal().run(filled(pool, 1))
        with RLM(backend=scripted(), pool=pool) as rlm:
            assert rlm.completion("x").response.startswith("/tmp/")
