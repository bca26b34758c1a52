"""Our figures for the local environment: seconds and bytes."""

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rlm_agent.worker import process

from benchmarks.bare import bare_client
from rlm_core import RLM, RLMLogger, ScriptedClient
from rlm_core.broker.account import Account
from rlm_core.broker.broker import Broker, Models
from rlm_core.broker.call import Call
from rlm_core.clients import LMClient, LMRequest, LMResponse, make_client
from rlm_core.environment import Sandbox, make_environment
from rlm_core.session import Session

Work = Callable[[], Awaitable[Any]]
THINKING_SECONDS = 0.005
"""Between two cells an LM thinks, in which the next checkpoint is made; no LM is as fast as this."""
FORK = """
import os, time
def fork_ms():
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0: os._exit(0)
    seconds = time.perf_counter() - start
    os.waitpid(pid, 0)
    return seconds * 1000
print(sorted(fork_ms() for _ in range(9))[4])
"""


async def median_of(work: Work, times: int, pause: float = 0.0) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - start)
        await asyncio.sleep(pause)
    return statistics.median(seconds)


async def _no_calls(call: Call) -> Any:
    raise AssertionError(call)


class TimedClient(LMClient):
    """A client that notes how long each call took it, so that what we add can be told from it."""

    def __init__(self, client: LMClient) -> None:
        self.model_name = client.model_name
        self.seconds: list[float] = []
        self._client = client

    async def complete(self, request: LMRequest) -> LMResponse:
        start = time.perf_counter()
        try:
            return await self._client.complete(request)
        finally:
            self.seconds.append(time.perf_counter() - start)


async def cells(sandbox: Sandbox) -> dict[str, float]:
    found: dict[str, float] = {}
    spec = make_environment("local", {}).spec
    for megabytes in (1, 100, 1000):
        text = "x" * (megabytes * 1_000_000)
        async with Session(sandbox, spec, _no_calls) as session:
            found[f"context_{megabytes}_mb_s"] = await _load_seconds(session, text)
            noop = lambda session=session: session.execute("pass")  # noqa: E731
            found[f"noop_{megabytes}_mb_s"] = await median_of(noop, 200, THINKING_SECONDS)
            found[f"noop_back_to_back_{megabytes}_mb_s"] = await median_of(noop, 200)
            if megabytes == 1000:
                found["checkpoint_1_gb_s"] = float((await session.execute(FORK)).stdout) / 1000
    shared, sandbox.shared_folder = sandbox.shared_folder, None
    async with Session(sandbox, spec, _no_calls) as session:
        found["context_100_mb_streamed_s"] = await _load_seconds(session, "x" * 100_000_000)
    sandbox.shared_folder = shared
    return found


async def _load_seconds(session: Session, text: str) -> float:
    return await median_of(lambda: session.put_context(text), 1 if len(text) > 1e8 else 3)


async def recovery(sandbox: Sandbox) -> dict[str, float]:
    """From the kill of a cell to the end of the next one."""
    spec = make_environment("local", {}).spec
    async with Session(sandbox, spec, _no_calls) as session:
        await session.execute("import os; x = 1")

        async def kill_and_go_on() -> None:
            await session.execute("os.kill(os.getpid(), 9)")
            assert (await session.execute("x")).stdout == "1\n"

        return {"kill_to_usable_s": await median_of(kill_and_go_on, 50)}


async def queries(sandbox: Sandbox, base_url: str) -> dict[str, float]:
    """What a call costs beyond our client's own time, one by one; and 200 at once, beside the bare client."""
    # A client each: the time of a call grows with the connections that its client has open.
    async with bare_client(base_url) as call:

        async def gathered() -> None:
            await asyncio.gather(*(call() for _ in range(200)))

        await gathered()
        bare_batch = await median_of(gathered, 5)
    client = make_client("openai", {"model_name": "m", "base_url": base_url, "api_key": "k"})
    timed = TimedClient(client)
    broker = Broker(Models([timed]))
    spec = make_environment("local", {}).spec
    account = Account()
    async with Session(sandbox, spec, lambda call: broker.handle(call, account)) as session:
        await session.execute("import time, statistics; llm_query('x')")
        code = (
            "seconds = []\nfor _ in range(100):\n  t = time.perf_counter(); llm_query('x')\n"
            "  seconds.append(time.perf_counter() - t)\nprint(statistics.median(seconds))"
        )
        timed.seconds.clear()
        one = float((await session.execute(code)).stdout)
        own = statistics.median(timed.seconds)

        async def batched() -> None:
            await session.execute("r = llm_query_batched(['x'] * 200)")

        await batched()
        batch = await median_of(batched, 5)
    await client.aclose()
    found = {"query_s": one - own, "batch_200_s": batch, "lm_query_s": own, "bare_batch_200_s": bare_batch}
    return {**found, "batch_ratio": batch / bare_batch}


async def start() -> dict[str, float]:
    async def once() -> None:
        environment = make_environment("local", {})
        sandbox = await environment.start()
        async with Session(sandbox, environment.spec, _no_calls) as session:
            await session.execute("pass")
            seconds.append(time.perf_counter() - begun)
        await sandbox.stop()

    seconds: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        await once()
    return {"start_s": statistics.median(seconds)}


async def sessions(sandbox: Sandbox) -> dict[str, float]:
    """Own memory of an idle session, and the time to its first cell, in an agent that runs."""
    spec = make_environment("local", {}).spec
    agent: int = sandbox.pid  # type: ignore[attr-defined]
    first = Session(sandbox, spec, _no_calls)
    await first.open()
    before = _private_bytes(agent)
    opened, seconds = [first], []
    for _ in range(10):
        begun = time.perf_counter()
        session = Session(sandbox, spec, _no_calls)
        await session.open()
        await session.execute("pass")
        seconds.append(time.perf_counter() - begun)
        opened.append(session)
    memory = (_private_bytes(agent) - before) / 10
    for session in opened:
        await session.aclose()
    return {"session_bytes": memory, "further_session_s": statistics.median(seconds)}


def _private_bytes(pid: int) -> int:
    """Pages of a process and all below it that no other process shares."""
    total = 0
    for each in [pid, *process.descendants(pid)]:
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # an old checkpoint that has just gone
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_"):
                    total += int(line.split()[1]) * 1024
    return total


async def log() -> dict[str, float]:
    """Bytes on disk after five turns over a context of 5 MB."""
    with tempfile.TemporaryDirectory() as folder:
        lm = ScriptedClient(["```repl\nx = context[:10]\n```"] * 4 + ["```repl\nFINAL(1)\n```"])
        rlm = RLM(backend=lm, logger=RLMLogger(folder))
        await rlm.acompletion("x" * 5_000_000, root_prompt="q")
        files = [Path(path, name) for path, _, names in os.walk(folder) for name in names]
        return {"log_bytes": sum(file.stat().st_size for file in files)}


async def measure(base_url: str) -> dict[str, float]:
    sandbox = await make_environment("local", {}).start()
    try:
        found = await queries(sandbox, base_url)
        found |= await recovery(sandbox)
        found |= await sessions(sandbox)
        found |= await cells(sandbox)
    finally:
        await sandbox.stop()
    return found | await start() | await log()
