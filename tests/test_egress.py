"""`network=[…]`: what is let through, and N09 of the catalogue: every way round that we know of."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from rlm_environments.containers.engine import Engine
from rlm_environments.local import LocalEnvironment

from rlm_core.egress.allowlist import Allowlist, Target, is_public
from rlm_core.egress.gate import Gate
from rlm_core.egress.hello import NotTLS, server_name
from rlm_core.egress.proxy import HEAD_BYTES, Proxy, Streams
from rlm_core.environment import Sandbox, make_environment, parse_spec
from rlm_core.errors import ConfigError, PolicyNotEnforceable
from rlm_core.session import Session
from tests.conftest import echo
from tests.support.relay import Relay

RECORD = b"\x16\x03\x01\x40\x00"
"""The head of a TLS record of a handshake, of the largest size."""
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PUBLIC = "93.184.215.14"
NAMES = {
    "good.example": [PUBLIC],
    "sub.wild.example": [PUBLIC],
    "metadata.example": ["169.254.169.254"],
    "half.example": [PUBLIC, "10.0.0.1"],
    "six.example": ["64:ff9b::a9fe:a9fe"],
}
ALLOWED = Allowlist.parse([*(name for name in NAMES if "wild" not in name), "*.wild.example", "gone.example"])
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()


async def ended(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(handle: Handler, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server on loopback, whose connections are closed before its end."""
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(cast("asyncio.Task[None]", asyncio.current_task()))
        await handle(reader, writer)
        await ended(writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]
    if running:
        await asyncio.wait(running, timeout=20)


@contextlib.asynccontextmanager
async def https_server(authority: trustme.CA, *names: str) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    async with serving(answer, context) as port:
        yield port


async def resolve(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError(f"{host}: no such name")
    return NAMES[host]


class Running:
    """A proxy on loopback, which connects to a server of the test whatever the public address."""

    def __init__(self, server: int) -> None:
        self.denied: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.port = 0
        self._server = server

    async def connect(self, host: str, port: int) -> Streams:
        self.dialled.append((host, port))
        return await asyncio.open_connection("127.0.0.1", self._server)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def read() -> bytes:
            with contextlib.suppress(ConnectionError):
                return await reader.read(1000)
            return b""

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        await Proxy(ALLOWED, self.denied.append, resolve, self.connect).serve(read, send)


@pytest.fixture
async def proxy(authority: trustme.CA) -> AsyncIterator[Running]:
    async with https_server(authority, "good.example", "sub.wild.example") as port:
        running = Running(port)
        async with serving(running.serve) as running.port:
            yield running


async def sent(proxy: Running, *parts: bytes) -> bytes:
    """All that comes back for these bytes, when the answer to each is waited for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    found = b""
    async with asyncio.timeout(20):
        for part in parts:
            writer.write(part)
            if part is not parts[-1]:
                found += await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            found += await reader.read()
    await ended(writer)
    return found


def connect_to(target: str) -> bytes:
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()


def hello(name: str | None) -> bytes:
    """The first message of a TLS client."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def twice(first: bytes, name: str) -> bytes:
    """The same message with a second server name after its last extension."""
    entry = b"\0" + len(name).to_bytes(2) + name.encode()
    content = len(entry).to_bytes(2) + entry
    more = b"\0\0" + len(content).to_bytes(2) + content
    record = bytearray(first + more)
    at = 5 + 4 + 2 + 32
    at += 1 + record[at]
    at += 2 + int.from_bytes(record[at : at + 2])
    at += 1 + record[at]
    for place, size in ((3, 2), (6, 3), (at, 2)):
        record[place : place + size] = (int.from_bytes(record[place : place + size]) + len(more)).to_bytes(
            size
        )
    return bytes(record)


async def fetched(proxy: Running, target: str, name: str, authority: trustme.CA) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(connect_to(target))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    await writer.start_tls(context, server_hostname=name)
    writer.write(b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n")
    async with asyncio.timeout(20):
        found = await reader.read()
    await ended(writer)
    return found


@pytest.mark.parametrize("target", ["good.example:443", "GOOD.example.:443", "sub.wild.example:443"])
async def test_a_host_of_the_list_is_reached_at_the_address_that_was_looked_up(
    proxy: Running, authority: trustme.CA, target: str
) -> None:
    name = target.lower().removesuffix(":443").removesuffix(".")
    assert await fetched(proxy, target, name, authority) == ANSWER
    assert proxy.dialled == [(PUBLIC, 443)] and not proxy.denied


async def test_only_the_public_addresses_of_a_name_are_dialled(proxy: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(connect_to("half.example:443") + hello("HALF.example"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.read(1) == RECORD[:1]
    await ended(writer)
    assert proxy.dialled == [(PUBLIC, 443)] and not proxy.denied


@pytest.mark.parametrize(
    ("request_bytes", "why"),
    [
        (connect_to("evil.example:443"), "evil.example:443 is not in the allowlist"),
        (connect_to("good.example:80"), "good.example:80 is not in"),
        (connect_to("good.example:22"), "good.example:22 is not in"),
        (connect_to("sub.good.example:443"), "sub.good.example:443 is not in"),
        (connect_to("wild.example:443"), "wild.example:443 is not in"),
        (connect_to("notwild.example:443"), "not in"),
        (connect_to("good.example:443@evil.example:443"), "is no host"),
        (connect_to("evil.example#good.example:443"), "is no host"),
        (connect_to("evil.example/good.example:443"), "is no host"),
        (connect_to("good.example%2eevil.example:443"), "is no host"),
        (connect_to("good.example\t.evil.example:443"), "not a request"),
        (connect_to("169.254.169.254:443"), "169.254.169.254:443 is not in"),
        (connect_to("2852039166:443"), "is no host"),
        (connect_to("0xa9fea9fe:443"), "is no host"),
        (connect_to("0251.0376.0251.0376:443"), "is no host"),
        (connect_to("127.1:443"), "is no host"),
        (connect_to("0x7f.1:443"), "is no host"),
        (connect_to("[::1]x:443"), "is no host"),
        (connect_to("[v1.evil.example]:443"), "is no host"),
        (connect_to("*.wild.example:443"), "is no host"),
        (connect_to("good.example:0"), "is no host"),
        (connect_to("good.example:0443"), "is no host"),
        (connect_to("[fe80::1%eth0]:443"), "is no host"),
        (connect_to("[::ffff:169.254.169.254]:443"), "is not in"),
        (connect_to("[fd00:ec2::254]:443"), "is not in"),
        (connect_to("localhost:443"), "is no host"),
        (connect_to("metadata.example:443"), "169.254.169.254, which is not a public address"),
        (connect_to("six.example:443"), "64:ff9b::a9fe:a9fe, which is not a public address"),
        (b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", "only https"),
        (b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "only https"),
        (b"CONNECT good.example:443 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "not a request"),
        (b"HEAD http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", "only https"),
        (b"CONNECT good.example:99999 HTTP/1.1\r\nHost: a\r\n\r\n", "is no host"),
        (b"\x05\x01\x00\r\n\r\n", "not a request"),
        (b"CONNECT good.example:443 HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES, "not a request"),
    ],
)
async def test_what_is_not_in_the_list_is_denied_and_never_dialled(
    proxy: Running, request_bytes: bytes, why: str
) -> None:
    found = await sent(proxy, request_bytes)
    assert found.startswith(b"HTTP/1.1 403 ") or "not a request" in why, found
    assert proxy.dialled == []
    assert any(why in each for each in proxy.denied) or why.encode() in found, (proxy.denied, found)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (hello("evil.example"), "the TLS connection is for 'evil.example'"),
        (hello("sub.good.example"), "is for 'sub.good.example'"),
        (hello(None), "is for ''"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no TLS handshake"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "no TLS handshake"),
        (connect_to("evil.example:443"), "no TLS handshake"),
        (
            RECORD + b"\x01\xff\xff\xff" + bytes(16_380) + 5 * (RECORD + bytes(16_384)),
            "does not begin with TLS",
        ),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "no ClientHello"),
        (hello("good.example").replace(b"good.example", b"good.ex\xe4mple"), "not ASCII"),
        (twice(hello("good.example"), "evil.example"), "more than one server name"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_tunnel_is_tls_and_for_the_name_that_was_asked_for(
    proxy: Running, first: bytes, why: str, at_once: bool
) -> None:
    parts = (connect_to("good.example:443"), first)
    await sent(proxy, *([b"".join(parts)] if at_once else parts))
    assert any(why in each for each in proxy.denied), proxy.denied


async def test_a_name_without_an_address_and_a_server_that_is_not_there_are_told(proxy: Running) -> None:
    assert (await sent(proxy, connect_to("gone.example:443"))).startswith(b"HTTP/1.1 502")
    proxy._server = 1
    assert (await sent(proxy, connect_to("good.example:443"))).startswith(b"HTTP/1.1 502")
    assert not proxy.denied


@given(
    st.text(max_size=60)
    | st.tuples(st.sampled_from(list(NAMES)), st.text(max_size=9), st.integers(0, 9)).map(
        lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
    )
)
def test_any_text_is_a_listed_name_or_denied(text: str) -> None:
    """Also names of the list with something put into them."""
    with contextlib.suppress(ValueError):
        target = Target.parse(text)
        listed = target.host in {*NAMES, "gone.example"} or target.host.endswith(".wild.example")
        assert ALLOWED.allows(target) is (listed and target.port == 443)


@given(st.from_regex(r"[a-z]{1,9}(\.[a-z]{1,9}){1,3}", fullmatch=True), st.data())
def test_the_name_in_a_hello_is_found_however_it_is_cut(name: str, data: st.DataObject) -> None:
    whole = hello(name)
    assert server_name(whole) == name
    assert server_name(whole[: data.draw(st.integers(0, len(whole) - 1))]) is None
    body, cut = whole[5:], data.draw(st.integers(1, len(whole) - 6))
    parts = (body[:cut], body[cut:])
    assert server_name(b"".join(whole[:3] + len(part).to_bytes(2) + part for part in parts)) == name


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_damaged_hello_is_refused_or_waited_for(damage: bytes, place: int) -> None:
    whole = bytearray(hello("good.example"))
    whole[place : place + len(damage)] = damage
    with contextlib.suppress(NotTLS):
        assert server_name(bytes(whole)) is None or isinstance(server_name(bytes(whole)), str)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "2001:0:7f00:1::",
        "fec0::1",
        "::169.254.169.254",
        "3fff::1",
        "5f00::1",
        "192.0.0.192",
        "168.63.129.16",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::6810:84e5", f"::ffff:{PUBLIC}"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "wrong",
    [
        "nonne",
        "https://pypi.org",
        "a.b:c",
        "*.*.org",
        "",
        "a b.org",
        "127.1",
        "*.0.0.1",
        "-.-",
        "a.org:0",
        "ex\u212aample.com",
        "[::1]x:443",
        7,
        [7],
        True,
    ],
)
def test_a_wrong_entry_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"network.*none, full, or hosts such as pypi.org"):
        parse_spec({"network": wrong})


def test_hosts_are_a_list_or_separated_by_commas() -> None:
    assert parse_spec({"network": "pypi.org, *.example.com:8443"}).network == (
        "pypi.org",
        "*.example.com:8443",
    )
    assert parse_spec({"network": ["pypi.org"]}).network == ("pypi.org",)
    assert parse_spec({"network": []}).network == "none"


@pytest.mark.needs("bubblewrap")
def test_bubblewrap_can_not_enforce_it() -> None:
    with pytest.raises(PolicyNotEnforceable, match="network"):
        make_environment("bubblewrap", {"network": ["pypi.org"]})


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
    gate = Gate(address(sandbox), sandbox.token, Allowlist.parse([f"127.0.0.1:{server}"]))
    yield sandbox, gate, WithProxy.port
    await gate.aclose()
    await sandbox.stop()


def address(sandbox: Sandbox) -> Path:
    assert sandbox.shared_folder is not None
    return sandbox.shared_folder.parent / "agent.sock"


async def tunnel(proxy: int, server: int) -> Streams:
    """A connection that is open to the server; its first message looks like TLS to an address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
    writer.write(connect_to(f"127.0.0.1:{server}"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
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
        gate = Gate(address(sandbox), sandbox.token, Allowlist.parse([f"127.0.0.1:{server}"]))
        for _ in range(3):
            reader, writer = await tunnel(proxy, server)
            writer.write(b"\r\n\r\n")
            assert await reader.read(-1) == ANSWER
            await ended(writer)
            relay.cut()
        await gate.aclose()


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
