"""Many calls to an LM that takes its time: beside the bare async client, over real HTTP."""

import asyncio
import time

from benchmarks.bare import bare_client
from benchmarks.lm_server import lm_server
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, BrokerConfig, Models
from rlm_core.clients import make_client
from rlm_core.environment import make_environment
from rlm_core.session import Session

ROUNDS = 3


async def _bare(base_url: str, number: int, at_once: int) -> float:
    places = asyncio.Semaphore(at_once)
    seconds = []
    async with bare_client(base_url) as call:

        async def one() -> None:
            async with places:
                await call()

        for _ in range(ROUNDS):
            begun = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(number)))
            seconds.append(time.perf_counter() - begun)
    return min(seconds)


async def _ours(base_url: str, number: int, at_once: int) -> float:
    client = make_client("openai", {"model_name": "m", "base_url": base_url, "api_key": "k"})
    broker, account = Broker(Models([client]), BrokerConfig(max_concurrent_calls=at_once)), Account()
    environment = make_environment("local", {})
    sandbox = await environment.start()
    seconds = []
    try:
        async with Session(sandbox, environment.spec, lambda call: broker.handle(call, account)) as session:
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                result = await session.execute(
                    f"r = llm_query_batched(['x'] * {number})\nprint(sum(each.ok for each in r))"
                )
                seconds.append(time.perf_counter() - begun)
                assert result.stdout == f"{number}\n", result
    finally:
        await sandbox.stop()
        await client.aclose()
    return min(seconds)


def figures() -> dict[str, float]:
    """Seconds: 1,000 calls of 100 ms, 100 at once, and 8 calls of a second."""
    with lm_server(0.1) as base_url:
        bare = asyncio.run(_bare(base_url, 1_000, 100))
        ours = asyncio.run(_ours(base_url, 1_000, 100))
    with lm_server(1.0) as base_url:
        eight = asyncio.run(_ours(base_url, 8, 100))
    return {"bare_1000_s": bare, "ours_1000_s": ours, "ratio": ours / bare, "eight_calls_s": eight}
