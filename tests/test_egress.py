"""`network=[…]`: what is let through, and N09 of the catalogue: every way round that we know of."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address
from typing import Any, cast

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from rlm_core.egress.allowlist import Allowlist, Target, is_public
from rlm_core.egress.proxy import HEAD_BYTES, Proxy, Streams
from rlm_core.environment import make_environment, parse_spec
from rlm_core.errors import ConfigError, PolicyNotEnforceable
from rlm_core.session import Session
from tests.conftest import echo

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
        async def received() -> AsyncIterator[bytes]:
            while data := await reader.read(1000):
                yield data

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        await Proxy(ALLOWED, self.denied.append, resolve, self.connect).serve(received(), send)


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
        (connect_to("0251.0376.0251.0376:443"), "0251.0376.0251.0376:443 is not in"),
        (connect_to("[::ffff:169.254.169.254]:443"), "is not in"),
        (connect_to("[fd00:ec2::254]:443"), "is not in"),
        (connect_to("localhost:443"), "is no host"),
        (connect_to("metadata.example:443"), "169.254.169.254, which is not a public address"),
        (connect_to("half.example:443"), "10.0.0.1, which is not a public address"),
        (connect_to("six.example:443"), "not a public address"),
        (b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n", "only https"),
        (b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "only https"),
        (b"CONNECT good.example:443 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "not a request"),
        (b"CONNECT good.example:99999 HTTP/1.1\r\nHost: a\r\n\r\n", "Port out of range"),
        (b"\x05\x01\x00\r\n\r\n", "not a request"),
        (b"CONNECT good.example:443 HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES, "not a request"),
    ],
)
async def test_what_is_not_in_the_list_is_denied_and_never_dialled(
    proxy: Running, request_bytes: bytes, why: str
) -> None:
    found = await sent(proxy, request_bytes)
    assert found.split()[1:2] in ([b"403"], [b"502"], [b"400"]) or found == b"", found
    assert proxy.dialled == []
    assert any(why in each for each in proxy.denied) or why.encode() in found, (proxy.denied, found)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (hello("evil.example"), "the TLS connection is for 'evil.example'"),
        (hello("sub.good.example"), "is for 'sub.good.example'"),
        (hello(None), "is for None"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not TLS"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "is not TLS"),
        (connect_to("evil.example:443"), "is not TLS"),
        (b"\x16\x03\x01\x40\x00" + b"\x01\x00\x3f\xf0" + b"x" * 20_000, "TLS"),
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


@given(st.text(max_size=60))
def test_any_text_is_a_target_that_is_denied_or_no_target(text: str) -> None:
    with contextlib.suppress(ValueError):
        target = Target.parse(text)
        assert not ALLOWED.allows(target) or target.host in NAMES


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
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::6810:84e5", f"::ffff:{PUBLIC}"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("wrong", ["nonne", "https://pypi.org", "a.b:c", "*.*.org", "", "a b.org", 7, [7]])
def test_a_wrong_entry_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"network.*none, full, or hosts such as pypi.org"):
        parse_spec({"network": wrong})


def test_hosts_are_a_list_or_separated_by_commas() -> None:
    assert parse_spec({"network": "pypi.org,*.example.com:8443"}).network == (
        "pypi.org",
        "*.example.com:8443",
    )
    assert parse_spec({"network": ["pypi.org"]}).network == ("pypi.org",)
    assert parse_spec({"network": []}).network == "none"


@pytest.mark.needs("bubblewrap")
def test_bubblewrap_can_not_enforce_it() -> None:
    with pytest.raises(PolicyNotEnforceable, match="network"):
        make_environment("bubblewrap", {"network": ["pypi.org"]})


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


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(None, marks=pytest.mark.needs("docker")),
        pytest.param("runsc", marks=pytest.mark.needs("runsc")),
    ],
)
async def test_in_a_container_the_listed_host_is_reached_and_nothing_else(
    authority: trustme.CA, runtime: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "rlm_core.egress")
    async with https_server(authority, "127.0.0.1") as port, https_server(authority, "127.0.0.1") as other:
        kwargs = {"network": [f"127.0.0.1:{port}"], "memory": "512MiB", "runtime": runtime}
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
                assert "403" in result.stdout
                assert f"127.0.0.1:{other} is not in the allowlist" in caplog.text
                around = eval((await session.execute(AROUND.format(port=port))).stdout)
                assert "ok" not in around, around
                flood = f"socks = [socket.create_connection(('127.0.0.1', 3128)) for _ in range(300)]\nprint(fetch('https://127.0.0.1:{port}'))"
                await session.execute(flood)
                await session.execute("del socks")
                assert (await session.execute("print(llm_query('x'))")).stdout == "echo x\n"
        finally:
            await sandbox.stop()
