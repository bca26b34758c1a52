"""Sandboxes come, are found, and go, and nothing of them stays."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from rlm_core.conformance.arena import Arena, echo
from rlm_core.conformance.check import NotApplicable, check, ensure, expect
from rlm_core.environment import Environment
from rlm_core.errors import ConfigError, RLMError, SandboxLost
from rlm_core.session import Session

GONE_SECONDS = 150.0
LEASE = 3.0
HOST = """
import asyncio, json, os, sys
from rlm_core.environment import make_environment
async def main():
    sandbox = await make_environment(sys.argv[1], json.loads(sys.argv[2])).start()
    print(sandbox.id, flush=True)
    os._exit(9)
asyncio.run(main())
"""


async def _listed(environment: Environment) -> set[str]:
    return {each.id for each in await environment.running()}


async def _until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while not await holds():
        ensure(time.monotonic() < deadline, f"{what} within {GONE_SECONDS:g} s")
        await asyncio.sleep(0.2)


def _needs_listing(arena: Arena) -> None:
    if not type(arena.environment).capabilities.lists:
        raise NotApplicable("sandboxes end with their host, and are not listed")


@check("lifecycle.several")
async def several(arena: Arena) -> None:
    """Two sandboxes run at once and know nothing of each other; one that stops leaves the other alone."""
    async with arena.fresh() as (one, in_one):
        async with arena.fresh() as (two, in_two):
            ensure(one.id != two.id, "two sandboxes have one id")
            await in_two.execute("x = 2")
            await in_one.execute("x = 1")
            expect((await in_two.execute("print(x)")).stdout, "2\n")
        expect((await in_one.execute("print(x)")).stdout, "1\n")


@check("lifecycle.stop")
async def stop(arena: Arena) -> None:
    """Stopping twice is fine; a session of a stopped sandbox is lost, in one line."""
    async with arena.fresh() as (sandbox, session):
        await session.execute("x = 1")
        await sandbox.stop()
        await sandbox.stop()
        try:
            await session.execute("x")
        except SandboxLost as error:
            ensure("\n" not in str(error), "the error has more than one line")
        else:
            ensure(False, "a cell ran in a stopped sandbox")


@check("lifecycle.reconnect")
async def reconnect(arena: Arena) -> None:
    """A cell goes on when the host's stream breaks under it: nothing is lost and no call is made twice."""
    asked: list[str] = []
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def count(call: object) -> object:
        asked.append("x")
        arrived.set()
        await gate.wait()
        return await echo(call)  # type: ignore[arg-type]

    async with arena.session(count) as session:  # type: ignore[arg-type]
        cell = asyncio.ensure_future(session.execute("r = llm_query('a')\nprint(r)"))
        async with asyncio.timeout(GONE_SECONDS):
            await arrived.wait()
            session.break_connection()
            gate.set()
            expect((await cell).stdout, "echo a\n")
        expect(len(asked), 1, "how often the LM was asked")


@check("lifecycle.attach")
async def attach(arena: Arena) -> None:
    """Another host takes over a sandbox, by its id and token, with the variables of its session."""
    if not type(arena.environment).capabilities.attaches:
        raise NotApplicable("a sandbox ends with its host")
    environment = arena.make()
    sandbox = await environment.start()
    taken = sandbox
    try:
        first = Session(sandbox, environment.spec, echo)
        await first.open()
        await first.execute("kept = 42")
        other = arena.make()
        taken = await other.attach(sandbox.id, sandbox.token)
        again = Session(taken, other.spec, echo, session_id=first.id)
        await again.open()
        expect((await again.execute("print(kept)")).stdout, "42\n")
        await again.aclose()
    finally:
        await taken.stop()
        await sandbox.stop()


@check("lifecycle.listing")
async def listing(arena: Arena) -> None:
    """A running sandbox is listed; one that was removed, or has stopped, is not."""
    _needs_listing(arena)
    environment = arena.make()
    one, two = await asyncio.gather(environment.start(), environment.start())
    try:
        ensure({one.id, two.id} <= await _listed(arena.make()), "a running sandbox is not listed")
        await arena.make().remove(one.id)
        await arena.make().remove(one.id)
        await two.stop()

        async def gone() -> bool:
            return not {one.id, two.id} & await _listed(arena.make())

        await _until(gone, "what has ended is still listed")
    finally:
        await asyncio.gather(one.stop(), two.stop())


@check("lifecycle.orphan")
async def orphan(arena: Arena) -> None:
    """A sandbox whose host was killed ends when its lease is over."""
    _needs_listing(arena)
    kwargs = json.dumps({**arena.kwargs, "lease": LEASE}, default=str)
    host = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST, arena.name, kwargs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await host.communicate()
    sandbox_id = output.decode().strip()
    ensure(sandbox_id, f"the host did not start a sandbox: {errors.decode()[-300:]}")

    async def gone() -> bool:
        return sandbox_id not in await _listed(arena.environment)

    await _until(gone, "the sandbox of a killed host is still there")


@check("lifecycle.cancelled_start")
async def cancelled_start(arena: Arena) -> None:
    """A start that is cancelled at any moment leaves nothing."""
    _needs_listing(arena)
    before = await _listed(arena.environment)
    began = time.monotonic()
    sandbox = await arena.make().start()
    seconds = time.monotonic() - began
    await sandbox.stop()
    for part in range(8):
        start = asyncio.ensure_future(arena.make().start())
        await asyncio.wait([start], timeout=seconds * part / 7)
        start.cancel()
        await asyncio.wait([start])
        if not start.cancelled():
            await start.result().stop()  # it was ready before; an error of its own is a failure

    async def gone() -> bool:
        return await _listed(arena.environment) <= before

    await _until(gone, "a cancelled start has left a sandbox")


@check("lifecycle.snapshot")
async def snapshot(arena: Arena) -> None:
    """The files of a sandbox can be kept as an image for others, or that is refused in one line."""
    keeps = type(arena.environment).capabilities.snapshots
    async with arena.fresh() as (sandbox, session):
        await session.execute("with open('/tmp/kept', 'w') as file: file.write('42')")
        try:
            image = await sandbox.snapshot()
        except ConfigError as error:
            ensure(not keeps and "\n" not in str(error), f"a snapshot was refused: {error}")
            return
    ensure(keeps, "the environment says that it keeps no snapshots")
    async with arena.fresh(image=image) as (_, session):
        expect((await session.execute("print(open('/tmp/kept').read())")).stdout, "42\n")


@check("lifecycle.unknown")
async def unknown(arena: Arena) -> None:
    """Attaching to what is not there is one clear line; removing it is quiet."""
    try:
        sandbox = await arena.make().attach("no-such-sandbox", "token")
    except RLMError as error:
        ensure("\n" not in str(error), "the error has more than one line")
    else:
        await sandbox.stop()
        ensure(False, "it attached to a sandbox that is not there")
    try:
        await arena.make().remove("no-such-sandbox")
    except ConfigError:
        ensure(not type(arena.environment).capabilities.lists, "removing what is gone is an error")
