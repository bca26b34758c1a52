"""Our figures for the cloud environments: the providers' real SDKs, and services of ours on loopback."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.ours import queries
from rlm_core.broker.call import Answer, Call
from rlm_core.environment import Environment, make_environment
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.fakes.modal.access import TOKEN
from tests.fakes.modal.service import FakeModal
from tests.fakes.prime import KEY, FakePrime

CONTEXT_BYTES = 50_000_000


SMALL = {"memory": "1GiB", "lease": 3.0}


@contextlib.contextmanager
def prime() -> Iterator[dict[str, Environment]]:
    with FakePrime() as service, tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        os.environ.update(PRIME_API_BASE_URL=service.url, PRIME_API_KEY=KEY, PRIME_TEAM_ID="", HOME=home)
        yield {"prime": make_environment("prime", SMALL)}


@contextlib.contextmanager
def modal() -> Iterator[dict[str, Environment]]:
    with FakeModal() as service, tempfile.TemporaryDirectory() as folder:
        roots = Path(folder) / "roots.pem"
        service.authority.cert_pem.write_to_path(str(roots))
        os.environ.update(MODAL_SERVER_URL=service.url, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(roots))
        os.environ.update(MODAL_TOKEN_ID=TOKEN[0], MODAL_TOKEN_SECRET=TOKEN[1], MODAL_CONFIG_PATH=os.devnull)
        yield {
            f"modal, {transport}": make_environment("modal", {**SMALL, "transport": transport})
            for transport in ("h2", "stdio")
        }


async def _one_second(call: Call) -> Answer:
    await asyncio.sleep(1)
    return Answer("ok", "m", TokenUsage())


async def measure(environment: Environment, base_url: str) -> dict[str, float]:
    begun = time.perf_counter()
    sandbox = await environment.start()
    found = {"start_s": time.perf_counter() - begun}
    try:
        found |= await queries(sandbox, base_url)
        async with Session(sandbox, environment.spec, _one_second) as session:
            begun = time.perf_counter()
            await session.execute("r = llm_query_batched(['x'] * 8)")
            found["eight_calls_s"] = time.perf_counter() - begun
            begun = time.perf_counter()
            await session.put_context("x" * CONTEXT_BYTES)
            found["context_50_mb_s"] = time.perf_counter() - begun
    finally:
        await sandbox.stop()
    return found


def figures(base_url: str) -> dict[str, dict[str, float]]:
    """By environment; each starts one sandbox before, whose image is built and kept."""

    async def all_of(environments: dict[str, Environment]) -> dict[str, dict[str, float]]:
        found = {}
        for name, environment in environments.items():
            await (await environment.start()).stop()
            found[name] = await measure(environment, base_url)
        return found

    with modal() as of_modal:
        found = asyncio.run(all_of(of_modal))
    with prime() as of_prime:
        return {**found, **asyncio.run(all_of(of_prime))}
