"""Our figures for the isolated environments: seconds and bytes, on one engine and image."""

import asyncio
import statistics
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rlm_environments.containers import image
from rlm_environments.containers.engine import Engine

from benchmarks.ours import THINKING_SECONDS, _no_calls, median_of, queries
from rlm_core.environment import Environment, Sandbox, make_environment
from rlm_core.pool import SandboxPool
from rlm_core.session import Session

ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "docker": ("docker", {}),
    "runsc": ("docker", {"runtime": "runsc"}),
    "bubblewrap": ("bubblewrap", {}),
}
ROUNDS = 7
PEER_PACKAGES = ("dill", "requests")
PEER_IMAGE = "rlm-benchmark-peer:current"


@asynccontextmanager
async def running(environment: Environment) -> AsyncIterator[Sandbox]:
    sandbox = await environment.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


async def measure(name: str, base_url: str) -> dict[str, float]:
    environment = make_environment(*ENVIRONMENTS[name])
    async with running(environment) as sandbox:  # builds the image, where it is not there
        found = await queries(sandbox, base_url)
        if name != "docker":  # where they are measured beside the peer's
            found |= await noops(environment, sandbox)
        found["context_100_mb_s"] = await context_in(environment, sandbox)
        sandbox.shared_folder = None
        found["context_100_mb_streamed_s"] = await context_in(environment, sandbox)
        if name != "bubblewrap":
            found["sandbox_bytes"] = await asyncio.to_thread(memory, sandbox)
    found["start_s"] = await starts(environment)
    return found | await claims(name)


async def noops(environment: Environment, sandbox: Sandbox) -> dict[str, float]:
    found: dict[str, float] = {}
    for megabytes in (1, 10, 100):
        text = "x" * (megabytes * 1_000_000)
        async with Session(sandbox, environment.spec, _no_calls) as session:
            await session.put_context(text)
            noop = lambda session=session: session.execute("pass")  # noqa: E731
            found[f"noop_{megabytes}_mb_s"] = await median_of(noop, 100, THINKING_SECONDS)
    return found


async def context_in(environment: Environment, sandbox: Sandbox) -> float:
    """Until the variable is bound. The median of several, as of all figures here: memory that the machine has
    not used before takes it three times as long."""
    seconds: list[float] = []
    text = "x" * 100_000_000
    for _ in range(ROUNDS):
        async with Session(sandbox, environment.spec, _no_calls) as session:
            begun = time.perf_counter()
            await session.put_context(text)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


async def starts(environment: Environment) -> float:
    seconds: list[float] = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        async with running(environment) as sandbox, Session(sandbox, environment.spec, _no_calls) as session:
            await session.execute("pass")
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


async def claims(name: str) -> dict[str, float]:
    """From a claim of a warm sandbox to the end of its first cell."""
    seconds: list[float] = []
    pool = SandboxPool(*_pool_arguments(name))
    for _ in range(ROUNDS):
        await pool._open()
        await pool.filled()
        begun = time.perf_counter()
        sandbox = await pool.start()
        async with Session(sandbox, pool.spec, _no_calls) as session:
            await session.execute("pass")
            seconds.append(time.perf_counter() - begun)
        await sandbox.stop()
    await pool._close()
    return {"claim_s": statistics.median(seconds)}


def _pool_arguments(name: str) -> tuple[str, int, dict[str, Any]]:
    environment, kwargs = ENVIRONMENTS[name]
    return environment, 1, kwargs


def memory(sandbox: Sandbox) -> float:
    """What the control group of a sandbox with one idle session holds."""
    handle: str = sandbox.container  # type: ignore[attr-defined]
    stats: Any = Engine.connect().api.stats(handle, stream=False)
    return float(stats["memory_stats"]["usage"])


def bare_run() -> float:
    """`docker run … true` on the same image."""
    tag = image.find(Engine.connect(), None, ())
    assert tag is not None
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "true", tag]
    seconds: list[float] = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def peer_image() -> str:
    """The same image with what rlms needs in it, without our entry point."""
    engine = Engine.connect()
    tag = image.build(engine, image.recipe(None, PEER_PACKAGES, image.usual_base(engine)), print)
    dockerfile = f"FROM {tag}\nENTRYPOINT []\n"
    command = ["docker", "build", "--quiet", "--tag", PEER_IMAGE, "-"]
    subprocess.run(command, input=dockerfile, text=True, check=True, capture_output=True)
    return PEER_IMAGE
