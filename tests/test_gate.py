"""The way out of a sandbox, end to end: agent, gate and proxy, in a process and in containers."""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from rlm_environments.containers.engine import Engine
from rlm_environments.local import LocalEnvironment

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.gate import Dial, Gate
from rlm_core.egress.proxy import Streams
from rlm_core.environment import Sandbox, make_environment, parse_spec
from rlm_core.errors import PolicyNotEnforceable
from rlm_core.session import Session
from rlm_core.transport.unix import unix_channel
from tests.conftest import echo
from tests.support.relay import Relay
from tests.support.tls import ANSWER, answer, connect_to, ended, hello, https_server, serving


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class WithProxy(LocalEnvironment):
    """An agent in a process, with a proxy port as one in a container has it."""

    port = 0

    def _config(self, folder: Path) -> dict[str, Any]:
        return {**super()._config(folder), "proxy_port": self.port}


@contextlib.asynccontextmanager
async def gate_to(server: int) -> AsyncIterator[tuple[Sandbox, Gate, int]]:
    """A real agent, the gate in front of it, and the port of its proxy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        WithProxy.port = free.getsockname()[1]
    sandbox = await WithProxy(parse_spec({})).start()
    gate = Gate(dial_of(sandbox), sandbox.token, Allowlist.parse([f"127.0.0.1:{server}"]))
    yield sandbox, gate, WithProxy.port
    await gate.aclose()
    await sandbox.stop()


def dial_of(sandbox: Sandbox) -> Dial:
    assert sandbox.shared_folder is not None
    return partial(unix_channel, sandbox.shared_folder.parent / "agent.sock")


async def tunnel(proxy: int, server: int) -> Streams:
    """A connection that is open to the server; its first message looks like TLS to an address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
    writer.write(connect_to(f"127.0.0.1:{server}"))
    try:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    except BaseException:
        await ended(writer)
        raise
    writer.write(hello(None))
    return reader, writer


LARGE = 5_000_000


async def test_what_a_server_sent_before_it_closed_arrives_whole() -> None:
    async def send_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(hello(None)))
        writer.write(bytes(LARGE))

    async with serving(send_much) as server, gate_to(server) as (_, _gate, proxy):
        for _ in range(5):
            reader, writer = await tunnel(proxy, server)
            assert len(await reader.read(-1)) == LARGE
            await ended(writer)


async def test_what_code_sent_before_it_closed_arrives_whole() -> None:
    received: asyncio.Queue[int] = asyncio.Queue()

    async def take_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.put_nowait(len(await reader.read(-1)))

    async with serving(take_all) as server, gate_to(server) as (_, _gate, proxy):
        for _ in range(5):
            _, writer = await tunnel(proxy, server)
            writer.write(bytes(LARGE))
            await ended(writer)
            async with asyncio.timeout(20):
                assert await received.get() == LARGE + len(hello(None))


async def test_the_way_out_is_there_again_after_a_broken_connection_to_the_agent() -> None:
    async with serving(answer) as server, gate_to(server) as (sandbox, first, proxy), Relay(sandbox) as relay:
        await first.aclose()
        gate = Gate(dial_of(sandbox), sandbox.token, Allowlist.parse([f"127.0.0.1:{server}"]))
        for _ in range(3):
            reader, writer = await tunnel(proxy, server)
            writer.write(b"\r\n\r\n")
            assert await reader.read(-1) == ANSWER
            await ended(writer)
            relay.cut()
        await gate.aclose()


async def test_connections_that_a_cell_resets_do_not_close_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlm_core.egress.gate.MAX_BROKEN", 3)
    async with serving(answer) as server, gate_to(server) as (_, gate, proxy):
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", proxy)) as sock:
                sock.sendall(connect_to(f"127.0.0.1:{server}"))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while not await fetched(proxy, server):  # noqa: ASYNC110 - until those before it are taken
                await asyncio.sleep(0.05)
        assert not gate._accepting.done()


async def fetched(proxy: int, server: int) -> bool:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        reader, writer = await tunnel(proxy, server)
        writer.write(b"\r\n\r\n")
        try:
            return await reader.read(-1) == ANSWER
        finally:
            await ended(writer)
    return False


async def test_a_slow_look_up_keeps_its_place_when_nobody_waits_for_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    answers = asyncio.Event()

    async def slow(host: str, port: int) -> list[str]:
        begun.append(host)
        await answers.wait()
        return []

    monkeypatch.setattr("rlm_core.egress.gate.look_up", slow)
    async with gate_to(1) as (_, gate, _proxy):
        for host in "abcd":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await gate._look_up(host, 443)
        assert begun == ["a", "b"]
        answers.set()
        async with asyncio.timeout(10):
            assert await gate._look_up("e", 443) == []


async def test_closing_the_gate_closes_what_is_open() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with serving(hold) as server, gate_to(server) as (_, gate, proxy):
        reader, writer = await tunnel(proxy, server)
        await gate.aclose()
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read(-1) == b""
        await ended(writer)


FETCH = """
import ssl, urllib.request, urllib.error, socket
def fetch(url):
    try:
        return urllib.request.urlopen(url, context=ssl._create_unverified_context(), timeout=10).read()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
"""
AROUND = """
import os
def attempt(action):
    try:
        action()
        return "ok"
    except OSError as error:
        return type(error).__name__
def dial(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(3)
        sock.connect(address)
print([attempt(lambda: dial(2, ("127.0.0.1", {port}))), attempt(lambda: dial(2, ("172.17.0.1", {port}))),
       attempt(lambda: dial(2, ("169.254.169.254", 80))), attempt(lambda: dial(10, ("fd00:ec2::254", 80))),
       attempt(lambda: socket.socket(2, 2).sendto(b"x", ("8.8.8.8", 53))),
       attempt(lambda: socket.getaddrinfo("example.com", 443)),
       attempt(lambda: socket.socket(2, socket.SOCK_RAW, 1)), attempt(lambda: socket.socket(17, 3)),
       attempt(lambda: socket.socket(40, 1))])
"""


@pytest.mark.needs("docker")
async def test_a_kernel_that_does_not_count_what_sockets_hold_is_refused() -> None:
    """Version 1 of control groups: a cell of 256 MiB held 900 MB of the host's memory in TCP buffers."""
    uncounted = Engine.connect().api.info()["CgroupVersion"] == "1"
    environment = make_environment("docker", {"network": ["127.0.0.1:1"], "memory": "512MiB"})
    with pytest.raises(PolicyNotEnforceable, match="version 2") if uncounted else contextlib.nullcontext():
        await (await environment.start()).stop()


@pytest.mark.needs("runsc")
async def test_in_a_container_the_listed_host_is_reached_and_nothing_else(
    authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    """On gVisor, for which the version of control groups does not matter."""
    caplog.set_level(logging.WARNING, "rlm_core.egress")
    async with https_server(authority, "127.0.0.1") as port, https_server(authority, "127.0.0.1") as other:
        kwargs = {"network": [f"127.0.0.1:{port}"], "memory": "512MiB", "runtime": "runsc"}
        environment = make_environment("docker", kwargs)
        sandbox = await environment.start()
        try:
            async with Session(sandbox, environment.spec, echo) as session:
                code = f"{FETCH}\nprint(fetch('https://127.0.0.1:{port}'))\nprint(fetch('https://127.0.0.1:{port}'))"
                assert (await session.execute(code)).stdout == "b'hello'\nb'hello'\n"
                result = await session.execute(
                    "print(ssl.create_default_context().cert_store_stats()['x509'])"
                )
                assert int(result.stdout) > 50  # what public servers are known by
                result = await session.execute(f"print(fetch('https://127.0.0.1:{other}'))")
                assert f"403 127.0.0.1:{other} is not in the allowlist" in result.stdout
                assert f"127.0.0.1:{other} is not in the allowlist" in caplog.text
                around = eval((await session.execute(AROUND.format(port=port))).stdout)
                assert "ok" not in around, around
                flood = f"socks = [socket.create_connection(('127.0.0.1', 3128)) for _ in range(300)]\nprint(fetch('https://127.0.0.1:{port}'))"
                await session.execute(flood)
                await session.execute(
                    f"for s in socks: s.close()\nwhile fetch('https://127.0.0.1:{port}') != b'hello': pass"
                )
                assert (await session.execute("print(llm_query('x'))")).stdout == "echo x\n"
        finally:
            await sandbox.stop()
