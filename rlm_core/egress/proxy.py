"""One connection that code in a sandbox has made to the proxy: RFC 9110 CONNECT, and TLS within it.

Only TLS goes through, and only to the name that was asked for: the server name in the first message has to be
it. The name is looked up here, once, and the address that was looked at is the one that is connected to.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address

import h11

from rlm_core.egress.allowlist import Allowlist, Target, is_public
from rlm_core.tasks import finish_first

HEAD_BYTES = 8 << 10
HELLO_BYTES = 16 << 10
"""Of the first TLS message; RFC 8446 allows one record of this size."""
HEAD_SECONDS = 10.0
CONNECT_SECONDS = 10.0
CHUNK = 64 << 10

Resolve = Callable[[str, int], Awaitable[list[str]]]
Send = Callable[[bytes], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Denied(Exception):
    """Why a connection does not go through, in one line."""


@dataclass(frozen=True, slots=True)
class Proxy:
    allowlist: Allowlist
    on_denied: Callable[[str], None]
    resolve: Resolve
    connect: Callable[[str, int], Awaitable[Streams]] = asyncio.open_connection

    async def serve(self, received: AsyncIterator[bytes], send: Send) -> None:
        """Serve one connection to its end: `received` are its bytes, which end when the code closes it."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                target = await _asked_for(connection, received)
                addresses = await self._addresses(target)
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await self._connect(addresses, target.port)
        except (Denied, TimeoutError, OSError, ValueError) as error:
            await self._refuse(connection, send, error)
            return
        try:
            await send(connection.send(h11.Response(status_code=200, headers=[])) or b"")
            async with asyncio.timeout(HEAD_SECONDS):
                first = await _hello(target, connection.trailing_data[0], received)
            writer.write(first)
            await _relay(received, send, reader, writer)
        except (Denied, TimeoutError) as error:
            self.on_denied(str(error) or f"{target.host}: no TLS within {HEAD_SECONDS:g} s")
        except OSError:
            pass  # the server has closed it, and so do we
        finally:
            writer.transport.abort()

    async def _addresses(self, target: Target) -> list[str]:
        """Raises Denied."""
        if not self.allowlist.allows(target):
            raise Denied(f"{target.host}:{target.port} is not in the allowlist")
        if target.address is not None:
            return [target.host]
        found = await self.resolve(target.host, target.port)
        for each in found:
            if not is_public(ip_address(each)):
                raise Denied(f"{target.host} is at {each}, which is not a public address")
        return found

    async def _connect(self, addresses: list[str], port: int) -> Streams:
        """Raises OSError: of the last address that was tried."""
        error = OSError("the name has no address")
        for address in addresses:
            try:
                return await self.connect(address, port)
            except OSError as failed:
                error = OSError(failed.strerror or "can't be reached")
        raise error

    async def _refuse(self, connection: h11.Connection, send: Send, error: Exception) -> None:
        """Say why, where the protocol still allows an answer."""
        status = 403 if isinstance(error, Denied) else 502
        why = str(error) or type(error).__name__
        if isinstance(error, Denied):
            self.on_denied(why)
        if connection.our_state is h11.SEND_RESPONSE or connection.our_state is h11.IDLE:
            body = f"{why}\n".encode("ascii", "replace")
            headers = [("content-length", str(len(body))), ("connection", "close")]
            answer = connection.send(h11.Response(status_code=status, headers=headers)) or b""
            await send(answer + (connection.send(h11.Data(data=body)) or b""))


async def _asked_for(connection: h11.Connection, received: AsyncIterator[bytes]) -> Target:
    """Raises Denied for anything but a CONNECT to a host."""
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await anext(received, b""))
    except h11.RemoteProtocolError as error:
        raise Denied(f"not a request to a proxy: {error}") from None
    if not isinstance(event, h11.Request):
        raise Denied("not a request to a proxy")
    if event.method != b"CONNECT":
        raise Denied("only https is let through")
    try:
        return Target.parse(event.target.decode("ascii"))
    except ValueError as error:
        raise Denied(str(error)) from None


async def _hello(target: Target, first: bytes, received: AsyncIterator[bytes]) -> bytes:
    """Take the first TLS message, and look whom it is for.

    Raises:
        Denied: it is not TLS, or for another name.
    """
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def on_name(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> int:
        names.append(name)
        return ssl.ALERT_DESCRIPTION_ACCESS_DENIED  # we only look; the handshake is the server's

    context.sni_callback = on_name
    incoming = ssl.MemoryBIO()
    looking = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    data = bytearray()
    while not names:
        data += first
        incoming.write(first)
        try:
            looking.do_handshake()
        except ssl.SSLWantReadError:
            first = await anext(received, b"")
            if not first or len(data) + len(first) > HELLO_BYTES:
                raise Denied(f"{target.host}: the connection does not begin with TLS") from None
        except ssl.SSLError:
            if not names:
                raise Denied(f"{target.host}: the connection is not TLS") from None
    if names[0] != (target.host if target.address is None else None):
        raise Denied(f"{target.host}: the TLS connection is for {names[0]!r:.100}")
    return bytes(data)


async def _relay(
    received: AsyncIterator[bytes], send: Send, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Until either end closes."""

    async def up() -> None:
        async for data in received:
            writer.write(data)
            await writer.drain()

    async def down() -> None:
        while data := await reader.read(CHUNK):
            await send(data)

    ways = [asyncio.ensure_future(way) for way in (up(), down())]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await finish_first(asyncio.wait(ways))
    for way in ways:
        if not way.cancelled():
            with contextlib.suppress(OSError):
                way.result()


async def look_up(host: str, port: int) -> list[str]:
    """The system's own resolver.

    Raises:
        OSError: the name has no address.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"{host}: {error.strerror}") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))
