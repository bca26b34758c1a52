"""Where attacks are tried: one sandbox per environment, a victim beside every attacker, and a bare process."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from rlm_core.cell import CellResult
from rlm_core.environment import Environment, Sandbox, SandboxSpec, make_environment
from rlm_core.errors import SandboxLost
from rlm_core.portal import portal
from rlm_core.session import Session
from tests.attacks.case import PRELUDE, Case
from tests.attacks.resources import DISK, MEMORY, PROCESSES
from tests.conftest import echo

CONTROL_SECONDS = 60
COMMON: dict[str, Any] = {"memory": MEMORY, "interrupt_grace": 0.3, "cell_timeout": 20}
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", COMMON),
    "bubblewrap": ("bubblewrap", {**COMMON, "pids": PROCESSES, "disk": DISK}),
    "docker": ("docker", {**COMMON, "pids": PROCESSES, "disk": DISK, "cpus": 1}),
    "runsc": ("docker", {**COMMON, "pids": PROCESSES, "disk": DISK, "cpus": 1, "runtime": "runsc"}),
}


@dataclass(frozen=True, slots=True)
class Shot:
    """How an attack went: how its cell ended ("lost" with its session), and the word it printed."""

    status: str
    outcome: str
    stderr: str


def of_result(result: CellResult) -> Shot:
    found = [line for line in result.stdout.splitlines() if line.startswith("OUTCOME ")]
    return Shot(result.status, found[-1].split()[1] if found else "", result.stderr)


def unsandboxed(code: str) -> Shot:
    """The control: the same attack in a process that nothing holds."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + code], capture_output=True, text=True, timeout=CONTROL_SECONDS
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
    return Shot(str(done.returncode), found[-1].split()[1] if found else "", done.stderr[-500:])


class Arena:
    def __init__(self, name: str) -> None:
        environment, kwargs = SPECS[name]
        self.environment: Environment = make_environment(environment, kwargs)
        self.spec: SandboxSpec = self.environment.spec
        self._sandbox: Sandbox = portal().run(self.environment.start())
        self._victim = portal().run(self._open())
        told = portal().run(
            self._victim.execute("import os\nkept = 42\nprint(os.environ['RLM_SESSION_SOCKET'])")
        )
        self.words = {"{victim}": self._victim.id, "{victim_socket}": told.stdout.strip()}
        """What an attacker knows of the victim, although nobody tells it in truth."""

    def attack(self, case: Case, code: str) -> Shot:
        return portal().run(self._attack(case, code))

    async def _attack(self, case: Case, code: str) -> Shot:
        attacker = await self._open()
        try:
            await attacker.execute(PRELUDE + "kept = 7")
            async with self._a_context_that_waits() if case.context_waits else contextlib.nullcontext():
                shot = of_result(await attacker.execute(code, timeout=case.timeout))
            await self._look_after(attacker, case, shot)
        except SandboxLost as lost:
            shot = Shot("lost", "", str(lost))
        finally:
            await attacker.aclose()
        return shot

    async def _look_after(self, attacker: Session, case: Case, shot: Shot) -> None:
        """The session itself goes on, with its variables, unless the case may end it."""
        if not case.session_may_end:
            after = await attacker.execute("print(kept)", timeout=20)
            assert after.stdout == "7\n", (shot, after)

    def others_are_well(self) -> bool:
        """The session that was there still has its variables, and a new one opens."""
        return portal().run(self._others_are_well())

    async def _others_are_well(self) -> bool:
        kept = await self._victim.execute("print(kept, llm_query('on'))", timeout=20)
        async with Session(self._sandbox, self.spec, echo) as fresh:
            new = await fresh.execute("print('new')", timeout=20)
        return (kept.stdout, new.stdout) == ("42 echo on\n", "new\n")

    def close(self) -> None:
        portal().run(self._victim.aclose())
        portal().run(self._sandbox.stop())

    @contextlib.asynccontextmanager
    async def _a_context_that_waits(self) -> AsyncIterator[None]:
        other = await self._open()
        cell = asyncio.ensure_future(other.execute("import signal; signal.pause()"))
        context = asyncio.ensure_future(other.put_context("of another session"))
        yield
        await other.aclose()
        await asyncio.gather(cell, context, return_exceptions=True)

    async def _open(self) -> Session:
        session = Session(self._sandbox, self.spec, echo)
        await session.open()
        return session
