"""Each field of the policy holds, or the environment refuses it by its name."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import NotApplicable, Refused, check, ensure, expect
from rlm_core.environment import HELD_EVERYWHERE, SandboxSpec
from rlm_core.errors import PolicyNotEnforceable, SandboxLost

Holds = Callable[[Arena, Any], Awaitable[None]]
FIELDS: dict[str, tuple[Any, Holds]] = {}
"""A value of each field of SandboxSpec, and what shows that it holds."""
OUTSIDE = """
import socket
def outcome(address):
    try:
        socket.create_connection(address, 3).close()
        return "connected"
    except OSError as error:
        return type(error).__name__
print(*map(outcome, {addresses}))
try: print(socket.getaddrinfo("example.com", 443))
except OSError as error: print(type(error).__name__)
"""
NOBODY = [("192.0.2.1", 53), ("2001:db8::1", 53)]
"""Addresses of no host (RFC 5737, RFC 3849): where there is a network, the attempt times out."""
SOMEBODY = [("1.1.1.1", 443), ("8.8.8.8", 53), ("169.254.169.254", 80)]
"""For a provider's machine, whose network is there and leads nowhere: packets get lost on their way. The last
one is where clouds tell machines their secrets."""
FETCH = """
import urllib.request
def fetch(port):
    try: urllib.request.urlopen(f"https://127.0.0.1:{port}", timeout=10)
    except OSError as error: print(port, error)
"""
BUSY = """
import os, time
end = time.monotonic() + 2
readers = []
for _ in range(4):
    reader, writer = os.pipe()
    if os.fork() == 0:
        began = time.process_time()
        while time.monotonic() < end: pass
        os.write(writer, b"%f" % (time.process_time() - began))
        os._exit(0)
    readers.append(reader)
print(sum(float(os.read(reader, 50)) for reader in readers) / 2)
"""
PROCESSES = """
import os, signal, time
made = []
try:
    for _ in range(200):
        pid = os.fork()
        if pid == 0: time.sleep(60); os._exit(0)
        made.append(pid)
except OSError: pass
for pid in made: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
print(len(made))
"""
FILL = """
import os, tempfile
try:
    with open(os.path.join(tempfile.gettempdir(), 'fill'), 'wb') as file:
        for _ in range(300): file.write(bytes(1 << 20)); file.flush()
    print('filled')
except OSError as e: print(e.errno)
"""


def field(name: str, value: Any) -> Callable[[Holds], Holds]:
    def register(holds: Holds) -> Holds:
        FIELDS[name] = (value, holds)
        return holds

    return register


def _add(name: str) -> None:
    async def run(arena: Arena) -> None:
        value, holds = FIELDS[name]
        if name not in type(arena.environment).capabilities.enforces | HELD_EVERYWHERE:
            try:
                arena.make(**{name: value})
            except PolicyNotEnforceable as error:
                ensure(name in str(error), f"the refusal does not name the field: {error}")
                raise Refused(f"refused by its name: `{name}`") from None
            ensure(False, f"{name} is not enforced, and not refused either")
        await holds(arena, value)

    run.__doc__ = f"`{name}` holds, or is refused by its name."
    check(f"policy.{name}")(run)


@field("network", "none")
async def network(arena: Arena, value: Any) -> None:
    async with arena.fresh(network=value) as (_, session):
        is_cloud = type(arena.environment).capabilities.costs_money
        code = OUTSIDE.replace("{addresses}", repr(SOMEBODY if is_cloud else NOBODY))
        said = (await session.execute(code, timeout=50)).stdout.split()
        ensure(said and said[-1] == "gaierror", f"names are looked up: {said}")
        lost = "connected" if is_cloud else "TimeoutError"
        ensure(lost not in said and "connected" not in said, f"the outside can be reached: {said}")


@check("policy.network_list")
async def network_list(arena: Arena) -> None:
    """Hosts in a list, and no others, are reached by https; or the list is refused by its name."""
    async with _listening() as (listed, seen), _listening() as (other, seen_by_other):
        try:
            async with arena.fresh(network=[f"127.0.0.1:{listed}"]) as (_, session):
                await session.execute(f"{FETCH}\nfetch({listed})")
                ensure(seen, "a host that is in the list was not reached")
                denied = await session.execute(f"fetch({other})")
                ensure(not seen_by_other, "a host that is not in the list was reached")
                ensure("403" in denied.stdout, f"the denial is not told: {denied.stdout}")
        except PolicyNotEnforceable as error:
            ensure("network" in str(error), f"the refusal does not name the field: {error}")


@asynccontextmanager
async def _listening() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on the host's loopback: its port, and what each connection to it began with."""
    seen: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(100))
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], seen


@field("cpus", 1.0)
async def cpus(arena: Arena, value: Any) -> None:
    async with arena.fresh(cpus=value) as (_, session):
        result = await session.execute(BUSY)
        ensure(float(result.stdout) < 1.3, f"{float(result.stdout):.2f} processors were used, of one")


@field("memory", "512MiB")
async def memory(arena: Arena, value: Any) -> None:
    async with arena.fresh(memory=value) as (_, session):
        result = await session.execute("b = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): b[i] = 1")
        ensure(result.status != "ok", "a cell took twice the memory that it may")
        expect((await session.execute("print(1)")).stdout, "1\n")


@field("pids", 64)
async def pids(arena: Arena, value: Any) -> None:
    async with arena.fresh(pids=value) as (_, session):
        ensure(
            int((await session.execute(PROCESSES)).stdout) <= value, "more processes were made than allowed"
        )


@field("disk", "64MiB")
async def disk(arena: Arena, value: Any) -> None:
    async with arena.fresh(disk=value) as (_, session):
        ensure(
            "filled" not in (await session.execute(FILL)).stdout, "300 MB were written to a disk of 64 MiB"
        )
        expect((await session.execute("print(1)")).stdout, "1\n")


@field("lifetime", 5.0)
async def lifetime(arena: Arena, value: Any) -> None:
    async with arena.fresh(lifetime=value) as (_, session):
        began = time.monotonic()
        try:
            await session.execute("import time; time.sleep(60)")
        except SandboxLost as error:
            ensure(time.monotonic() - began < 40, "it lived far longer")
            ensure("lifetime" in str(error), f"the reason is not told: {error}")
        else:
            ensure(False, "it outlived its lifetime")


@field("cell_timeout", 0.5)
async def cell_timeout(arena: Arena, value: Any) -> None:
    async with arena.fresh(cell_timeout=value) as (_, session):
        expect((await session.execute("while True: pass")).status, "timeout")


@field("interrupt_grace", 0.3)
async def interrupt_grace(arena: Arena, value: Any) -> None:
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    async with arena.fresh(interrupt_grace=value) as (_, session):
        expect((await session.execute(code, timeout=0.3)).status, "rolled_back")


@field("output_bytes", 1000)
async def output_bytes(arena: Arena, value: Any) -> None:
    async with arena.fresh(output_bytes=value) as (_, session):
        result = await session.execute("print('x' * 100_000)")
        ensure(
            len(result.stdout) < 4_000 and result.stdout_bytes == 100_001,
            "more was kept, or the size is wrong",
        )


@field("env", {"RLM_CHECK": "a b=c"})
async def env(arena: Arena, value: Any) -> None:
    async with arena.fresh(env=value) as (_, session):
        expect((await session.execute("import os; print(os.environ['RLM_CHECK'])")).stdout, "a b=c\n")


@field("files", {"data/table.csv": Path(__file__)})
async def files(arena: Arena, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        path.write_bytes(bytes(range(256)) * 1000)
        async with arena.fresh(files={"data/table.csv": path}) as (_, session):
            result = await session.execute(
                "d = open('data/table.csv', 'rb').read()\nd == bytes(range(256)) * 1000"
            )
            expect(result.stdout, "True\n")


@field("image", "minimal")
async def image(arena: Arena, value: Any) -> None:
    async with arena.fresh(image=value) as (_, session):
        expect((await session.execute("print(1)")).stdout, "1\n")


@field("packages", ("six==1.16.0",))
async def packages(arena: Arena, value: Any) -> None:
    async with arena.fresh(packages=value) as (_, session):
        expect((await session.execute("import six; print(six.__version__)")).stdout, "1.16.0\n")


@field("runtime", "no-such-runtime")
async def runtime(arena: Arena, value: Any) -> None:
    try:
        sandbox = await arena.make(runtime=value).start()
    except PolicyNotEnforceable as error:
        ensure(value in str(error), "the error does not name the runtime")
    else:
        await sandbox.stop()
        ensure(False, "a runtime that is not there was ignored")


@field("lease", 3.0)
async def lease(arena: Arena, value: Any) -> None:
    if not type(arena.environment).capabilities.lists:
        raise NotApplicable("a sandbox ends with its host")
    async with arena.fresh(lease=value) as (_, session):
        await asyncio.sleep(2 * value)  # its host is there, so it lives on
        expect((await session.execute("print(1)")).stdout, "1\n")


for _name in SandboxSpec.model_fields:
    if _name in FIELDS:
        _add(_name)
