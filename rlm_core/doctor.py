"""What this machine can do, found out by trying."""

import asyncio
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from rlm_core.environment import GROUP, HELD_EVERYWHERE, Environment, SandboxSpec, make_environment
from rlm_core.errors import RLMError, in_one_line
from rlm_core.portal import portal
from rlm_core.session import Session

PACKAGES = ("rlm-sandbox", "grpcio", "protobuf", "openai", "docker", "modal", "prime-sandboxes")
KEYS = (
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "GEMINI_API_KEY",
    "OPENROUTER_API_KEY",
    "MODAL_TOKEN_ID",
    "PRIME_API_KEY",
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMOKE_CELL = """
import os
before = 1
try: import numpy  # some builds of gVisor die of it
except ImportError: pass
"""
CLOUD_SECONDS = 20.0
CRASH_CELL = "before = 2\nos._exit(7)\n"


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
    name: str
    works: bool
    isolated: bool
    summary: str
    enforces: list[str] = field(default_factory=list)
    cannot_enforce: list[str] = field(default_factory=list)
    problem: str | None = None
    agent_build: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    python: str
    platform: str
    packages: dict[str, str | None]
    keys: dict[str, bool]
    """Whether each is set; never its value."""
    engine: str | None
    """Version of the Docker engine that answers, if one does."""
    fork: bool
    huge_pages: str
    environments: list[EnvironmentReport]

    @property
    def healthy(self) -> bool:
        return any(each.works for each in self.environments)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def examine(environment: str | None = None, policy: Mapping[str, Any] | None = None) -> Report:
    """Looks, and runs a cell in every environment that is installed, or in the one named, with its policy."""
    names = [environment] if environment else [point.name for point in entry_points(group=GROUP)]
    return Report(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        keys={name: bool(os.environ.get(name)) for name in KEYS},
        engine=_engine(),
        fork=hasattr(os, "fork"),
        huge_pages=_huge_pages(),
        environments=[_try_environment(name, policy or {}) for name in names],
    )


def _try_environment(name: str, policy: Mapping[str, Any]) -> EnvironmentReport:
    try:
        environment = make_environment(name, policy)
    except RLMError as error:
        return EnvironmentReport(name, False, False, "not installed", problem=str(error))
    capabilities = type(environment).capabilities
    problem: str | None = None
    build: str | None = None
    notes: list[str] = []
    try:
        notes = portal().run(environment.notes())
        if capabilities.costs_money:
            running = portal().run(asyncio.wait_for(environment.running(), CLOUD_SECONDS))
            notes = [*notes, f"{len(running)} sandboxes run there; none was started, because it costs money"]
        else:
            build = portal().run(_smoke(environment))
    except TimeoutError:
        problem = f"its service did not answer within {CLOUD_SECONDS:g} s"
    except Exception as error:  # noqa: BLE001 - a third party's, which must not hide the others
        problem = in_one_line(error)
    return EnvironmentReport(
        name=name,
        works=problem is None,
        isolated=capabilities.isolated,
        summary=capabilities.summary,
        enforces=sorted(capabilities.enforces | HELD_EVERYWHERE),
        cannot_enforce=sorted(set(SandboxSpec.model_fields) - capabilities.enforces - HELD_EVERYWHERE),
        problem=problem,
        agent_build=build,
        notes=notes,
    )


async def _smoke(environment: Environment) -> str:
    """Run a cell, kill one, and see that nothing is lost."""

    async def no_calls(call: object) -> object:
        raise AssertionError(call)

    sandbox = await environment.start()
    try:
        async with Session(sandbox, environment.spec, no_calls) as session:  # type: ignore[arg-type]
            await session.execute(SMOKE_CELL)
            crashed = await session.execute(CRASH_CELL)
            after = await session.execute("print(before)")
            if not crashed.rolled_back or after.stdout != "1\n":
                raise RLMError("a cell that died was not rolled back")
            return session.agent_build
    finally:
        await sandbox.stop()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _engine() -> str | None:
    client = shutil.which("docker")
    if client is None:
        return None
    command = [client, "version", "--format", "{{.Server.Version}}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _huge_pages() -> str:
    try:
        return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "not available: checkpoints of large heaps are slower"
