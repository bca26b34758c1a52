"""Which hosts may be reached. Names never mean an address that is not public; an address may be listed."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

HTTPS_PORT = 443
MAX_PORT = 65_535
MAX_CHARS = 300
"""Of a host and its port; a name has 253 at most (RFC 1035 §2.3.4)."""
PARTS = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[1-9][0-9]{0,4}))?")
NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.)+[a-z0-9-]*[a-z][a-z0-9-]*")
"""The last label is no number: what ends in one is an IPv4 address (WHATWG URL)."""
WILDCARD = "*."
UNICAST = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is routed on the internet (RFC 4291 §2.4); IPv4 addresses in other ranges are not."""
SPECIAL = (
    ipaddress.IPv6Network("3fff::/20"),  # documentation, RFC 9637
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments, RFC 6890; clouds use some of it
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's platform
)
"""Beyond what Python's ipaddress knows of."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Target:
    """A host, by name or address, and a port."""

    host: str
    """In lower case, without a dot at the end; an IP address in its usual form."""
    port: int

    @property
    def address(self) -> Address | None:
        """None for a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Of `host`, `host:port` or `[IPv6]:port`.

        Raises:
            ValueError: it is none of them.
        """
        if len(text) > MAX_CHARS:
            raise ValueError(f"{text[:50]!r}… is too long for a host")
        parts = PARTS.fullmatch(text.lower()) if text.isascii() else None
        port = HTTPS_PORT if parts is None else int(parts["port"] or HTTPS_PORT)
        if parts is None or port > MAX_PORT:
            raise ValueError(f"{text!r} is no host")
        host = (parts["ipv6"] or parts["host"]).removesuffix(".")
        try:
            return cls(str(ipaddress.ip_address(host)), port)
        except ValueError:
            if parts["ipv6"] or not NAME.fullmatch(host):
                raise ValueError(f"{text!r} is no host") from None
        return cls(host, port)


@dataclass(frozen=True, slots=True)
class Allowlist:
    entries: tuple[Target, ...]

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "Allowlist":
        """Of hosts such as `pypi.org`, `*.example.com` (not itself), `example.com:8443` or an IP address.

        Raises:
            ValueError: names the entry that is none.
        """
        return cls(tuple(_entry(text) for text in entries))

    def allows(self, target: Target) -> bool:
        return any(_matches(entry, target) for entry in self.entries)


def _entry(text: str) -> Target:
    """Raises ValueError."""
    if not text.startswith(WILDCARD):
        return Target.parse(text)
    below = Target.parse(text.removeprefix(WILDCARD))
    if below.address is not None:
        raise ValueError(f"{text!r} is no host")
    return Target(WILDCARD + below.host, below.port)


def _matches(entry: Target, target: Target) -> bool:
    if entry.port != target.port:
        return False
    if entry.host.startswith(WILDCARD):
        return target.address is None and target.host.endswith(entry.host[1:])
    return entry.host == target.host


def is_public(address: Address) -> bool:
    """Whether it is on the public internet; an address that holds another one is what that one is."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None:
            return is_public(inner)
        if address not in UNICAST:
            return False
    special = any(address in network for network in SPECIAL if network.version == address.version)
    return address.is_global and not address.is_multicast and not special
