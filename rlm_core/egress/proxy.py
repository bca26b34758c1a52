"""One connection that code in a sandbox has made to the proxy: RFC 9110 CONNECT, and TLS within it.

Only TLS goes through, and only to the name that was asked for: the server name in the first message has to be
it. The name is looked up here, once, and the address that was looked at is the one that is connected to.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address

import h11

from rlm_core.egress.allowlist import Allowlist, Target, is_public
from rlm_core.egress.hello import NotTLS, server_name
from rlm_core.tasks import finish_first

HEAD_BYTES = 8 << 10
HELLO_BYTES = 64 << 10
"""Of the first TLS message, which some clients send in several records."""
HELLO_READS = 64
"""Each of them looks at all that has come."""
MAX_ADDRESSES = 8
"""Of a name, that are tried."""
HEAD_SECONDS = 10.0
CONNECT_SECONDS = 5.0
"""For each address of a name."""
CLOSE_SECONDS = 60.0
"""For what a server has not read yet when the code in the sandbox has closed its end."""
IDLE_SECONDS = 300.0
CHUNK = 64 << 10
LOOKUPS = 4
"""At once, in threads of their own: slow ones must hold up nothing else of the host."""

Read = Callable[[], Awaitable[bytes]]
"""The next bytes; empty at the end."""
Send = Callable[[bytes], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Denied(Exception):
    """Why a connection does not go through, in one line."""


async def look_up(host: str, port: int) -> list[str]:
    """The system's own resolver.

    Raises:
        OSError: the name has no address.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(
            _lookups(), lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"{host}: {getattr(error, 'strerror', None) or 'not a name'}") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


@cache
def _lookups() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(LOOKUPS, thread_name_prefix="rlm-lookup")


@dataclass(frozen=True, slots=True)
class Proxy:
    allowlist: Allowlist
    on_denied: Callable[[str], None]
    resolve: Callable[[str, int], Awaitable[list[str]]] = look_up
    connect: Callable[[str, int], Awaitable[Streams]] = asyncio.open_connection

    async def serve(self, read: Read, send: Send) -> None:
        """Serve one connection to its end."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        try:
            target = await self._target(connection, read)
            if target is None:
                return
            reader, writer = await self._open(target)
        except (Denied, OSError) as error:
            await self._refuse(connection, send, error)
            return
        try:
            await send(connection.send(h11.Response(status_code=200, headers=[])) or b"")
            writer.write(await _hello(target, connection.trailing_data[0], read))
            await _relay(read, send, reader, writer)
            writer.close()
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await writer.wait_closed()
        except Denied as error:
            self.on_denied(str(error))
        except OSError:
            pass  # the server has closed it, and so do we
        finally:
            writer.transport.abort()  # nothing is left to be written, or nobody to write it to

    async def _target(self, connection: h11.Connection, read: Read) -> Target | None:
        """What is asked for; None when the connection ends before it asks."""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                return await _asked_for(connection, read)
        except TimeoutError:
            raise Denied(f"no whole request within {HEAD_SECONDS:g} s") from None

    async def _open(self, target: Target) -> Streams:
        """Raises Denied, or OSError when it can't be reached."""
        if not self.allowlist.allows(target):
            raise Denied(f"{target.host}:{target.port} is not in the allowlist")
        if target.address is not None:
            return await self._connect([target.host], target.port)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                found = await self.resolve(target.host, target.port)
        except TimeoutError:
            raise OSError(f"{target.host} was not looked up within {HEAD_SECONDS:g} s") from None
        public = [each for each in found if is_public(ip_address(each))]
        if found and not public:
            raise Denied(f"{target.host} is at {found[0]}, which is not a public address")
        return await self._connect(public[:MAX_ADDRESSES], target.port)

    async def _connect(self, addresses: list[str], port: int) -> Streams:
        """Raises OSError: of the last address that was tried."""
        error = OSError("the name has no address")
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await self.connect(address, port)
            except TimeoutError:
                error = OSError(f"no connection within {CONNECT_SECONDS:g} s")
            except OSError as failed:
                error = OSError(failed.strerror or "can't be reached")
        raise error

    async def _refuse(self, connection: h11.Connection, send: Send, error: Exception) -> None:
        """Say why in the status line, which HTTP clients show, where the protocol still allows an answer."""
        if isinstance(error, Denied):
            self.on_denied(str(error))
        if connection.our_state in (h11.SEND_RESPONSE, h11.IDLE):
            response = h11.Response(
                status_code=403 if isinstance(error, Denied) else 502,
                headers=[("content-length", "0"), ("connection", "close")],
                reason=str(error).encode("ascii", "backslashreplace")[:500],
            )
            await send(connection.send(response) or b"")


async def _asked_for(connection: h11.Connection, read: Read) -> Target | None:
    """Raises Denied for anything but a CONNECT to a host."""
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await read())
    except h11.RemoteProtocolError as error:
        raise Denied(f"not a request to a proxy: {error}") from None
    if isinstance(event, h11.ConnectionClosed):
        return None
    if not isinstance(event, h11.Request) or event.method != b"CONNECT":
        raise Denied("only https is let through")
    try:
        return Target.parse(event.target.decode("ascii"))
    except ValueError as error:
        raise Denied(str(error)) from None


async def _hello(target: Target, data: bytes, read: Read) -> bytes:
    """Take the first TLS message, and look whom it is for.

    Raises:
        Denied: it is not TLS, or for another name.
    """
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            reads = 0
            while (name := server_name(data)) is None:
                more = await read()
                reads += 1
                if not more or len(data) > HELLO_BYTES or reads > HELLO_READS:
                    raise Denied(f"{target.host}: the connection does not begin with TLS")
                data += more
    except NotTLS as error:
        raise Denied(f"{target.host}: {error}") from None
    except TimeoutError:
        raise Denied(f"{target.host}: no TLS within {HEAD_SECONDS:g} s") from None
    if name != (target.host if target.address is None else ""):
        raise Denied(f"{target.host}: the TLS connection is for {name!r:.100}")
    return data


async def _relay(read: Read, send: Send, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either end closes, or nothing comes for a while.

    Raises:
        OSError: the server has broken the connection.
    """

    loop = asyncio.get_running_loop()

    async def up() -> None:
        while data := await read():
            limit.reschedule(loop.time() + IDLE_SECONDS)
            writer.write(data)
            await writer.drain()

    async def down() -> None:
        while data := await reader.read(CHUNK):
            limit.reschedule(loop.time() + IDLE_SECONDS)
            await send(data)

    ways: list[asyncio.Future[None]] = [asyncio.ensure_future(way) for way in (up(), down())]
    ended: set[asyncio.Future[None]] = set()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS) as limit:
                ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await finish_first(asyncio.wait(ways))
    for way in ended:
        way.result()
