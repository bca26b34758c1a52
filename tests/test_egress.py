"""The proxy of `network=[…]`: what is let through, and every way round it that we know of (N09)."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from rlm_core.egress.allowlist import Allowlist
from rlm_core.egress.proxy import HEAD_BYTES, Proxy, Streams
from tests.support.tls import ANSWER, connect_to, ended, hello, https_server, serving, twice

RECORD = b"\x16\x03\x01\x40\x00"
"""The head of a TLS record of a handshake, of the largest size."""
PUBLIC = "93.184.215.14"
NAMES = {
    "good.example": [PUBLIC],
    "sub.wild.example": [PUBLIC],
    "metadata.example": ["169.254.169.254"],
    "half.example": [PUBLIC, "10.0.0.1"],
    "six.example": ["64:ff9b::a9fe:a9fe"],
    "many.example": [f"93.184.{n}.1" for n in range(200)],
}
ALLOWED = Allowlist.parse([*(name for name in NAMES if "wild" not in name), "*.wild.example", "gone.example"])


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


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
        (connect_to("a." + 3_000 * "a" + "!"), "is too long for a host"),
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
        (
            b"".join(b"\x16\x03\x01\x00\x01" + bytes([byte]) for byte in hello("good.example")[5:]),
            "in too many records",
        ),
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


async def test_few_addresses_of_a_name_are_tried(proxy: Running) -> None:
    proxy._server = 1
    assert (await sent(proxy, connect_to("many.example:443"))).startswith(b"HTTP/1.1 502")
    assert [host for host, _ in proxy.dialled] == NAMES["many.example"][:8]


async def test_a_hello_that_comes_byte_by_byte_is_not_read_for_ever(proxy: Running) -> None:
    reads = 0

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        return connect_to("good.example:443") if reads == 1 else RECORD if reads == 2 else b"\x01"

    async def send(data: bytes) -> None:
        assert data.startswith(b"HTTP/1.1 200")

    await Proxy(ALLOWED, proxy.denied.append, resolve, proxy.connect).serve(read, send)
    assert reads < 100 and "does not begin with TLS" in proxy.denied[0]
