"""Our figures for the cloud environments: the providers' real SDKs, and services of ours on loopback."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator

from benchmarks.ours import queries
from rlm_core.broker.call import Answer, Call
from rlm_core.environment import Environment, make_environment
from rlm_core.session import Session
from rlm_core.types import TokenUsage
from tests.fakes.prime import KEY, FakePrime

CONTEXT_BYTES = 50_000_000


@contextlib.contextmanager
def prime() -> Iterator[Environment]:
    with FakePrime() as service, tempfile.TemporaryDirectory() as home:
        os.environ.update(PRIME_API_BASE_URL=service.url, PRIME_API_KEY=KEY, PRIME_TEAM_ID="", HOME=home)
        yield make_environment("prime", {"memory": "1GiB", "lease": 3.0})


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


def figures(base_url: str) -> dict[str, float]:
    with prime() as environment:
        return asyncio.run(measure(environment, base_url))
