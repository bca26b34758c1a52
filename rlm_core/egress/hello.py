"""Whom the first message of a TLS connection is for: RFC 8446 §4.1.2 (ClientHello), RFC 6066 §3 (its name).

Read here and not by OpenSSL, which says what it can't read on stderr.
"""

import struct

RECORD = struct.Struct("!BHH")
HANDSHAKE, CLIENT_HELLO = 22, 1
MAX_RECORD = 16 << 10
MAX_RECORDS = 16
"""That one ClientHello comes in."""
SERVER_NAME, HOST_NAME = 0, 0


class NotTLS(ValueError):
    """The bytes are no ClientHello, or one that is not to be trusted."""


def server_name(data: bytes) -> str | None:
    """The name in a ClientHello, in lower case; empty when it has none, None when more has to come.

    Raises:
        NotTLS: it is no ClientHello, or has more than one name.
    """
    message = bytearray()
    start = records = 0
    while len(data) - start >= RECORD.size:
        kind, version, size = RECORD.unpack_from(data, start)
        if kind != HANDSHAKE or version >> 8 != 3 or not 0 < size <= MAX_RECORD:
            raise NotTLS("no TLS handshake")
        message += data[start + RECORD.size : start + RECORD.size + size]
        start += RECORD.size + size
        records += 1
        if message[:1] not in (b"", bytes([CLIENT_HELLO])) or records > MAX_RECORDS:
            raise NotTLS("no ClientHello, or one in too many records")
        if len(message) >= 4 and len(message) - 4 >= int.from_bytes(message[1:4]):
            return _name_of(_Reader(bytes(message[4 : 4 + int.from_bytes(message[1:4])])))
    if data[:1] not in (b"", bytes([HANDSHAKE])):
        raise NotTLS("no TLS handshake")
    return None


def _name_of(hello: "_Reader") -> str:
    hello.take(2 + 32)  # version and random
    for length in (1, 2, 1):  # session id, cipher suites, compression methods
        hello.vector(length)
    if hello.at_end:
        return ""
    extensions = _Reader(hello.vector(2))
    names: list[bytes] = []
    while not extensions.at_end:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == SERVER_NAME:
            entries = _Reader(_Reader(content).vector(2))
            while not entries.at_end:
                if entries.number(1) != HOST_NAME:
                    raise NotTLS("a server name of an unknown kind")
                names.append(entries.vector(2))
    if len(names) > 1:
        raise NotTLS("more than one server name")
    try:
        return names[0].decode("ascii").lower().removesuffix(".") if names else ""
    except UnicodeDecodeError:
        raise NotTLS("a server name that is not ASCII") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._start = 0

    @property
    def at_end(self) -> bool:
        return self._start == len(self._data)

    def take(self, size: int) -> bytes:
        """Raises NotTLS when there is less."""
        taken = self._data[self._start : self._start + size]
        if len(taken) != size:
            raise NotTLS("a ClientHello that ends too early")
        self._start += size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, length: int) -> bytes:
        """What follows a length of so many bytes."""
        return self.take(self.number(length))
