"""Which hosts may be reached. Names never mean an address that is not public; an address may be listed."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

HTTPS_PORT = 443
NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)+")
NAT64 = ipaddress.IPv6Network("64:ff9b::/32")
"""RFC 6052 and RFC 8215: IPv4 addresses within IPv6 ones."""

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
        parts = urlsplit(f"//{text}")
        if parts.netloc != text or "@" in text or not parts.hostname:
            raise ValueError(f"{text!r} is no host")
        host = parts.hostname.removesuffix(".")
        try:
            host = str(ipaddress.ip_address(host))
        except ValueError:
            if not NAME.fullmatch(host):
                raise ValueError(f"{text!r} is no host") from None
        return cls(host, HTTPS_PORT if parts.port is None else parts.port)


@dataclass(frozen=True, slots=True)
class Allowlist:
    entries: tuple[Target, ...]

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "Allowlist":
        """Of hosts such as `pypi.org`, `*.example.com` (not itself), `example.com:8443` or an IP address.

        Raises:
            ValueError: names the entry that is none.
        """
        return cls(tuple(Target.parse(entry) for entry in entries))

    def allows(self, target: Target) -> bool:
        return any(_matches(entry, target) for entry in self.entries)


def _matches(entry: Target, target: Target) -> bool:
    if entry.port != target.port:
        return False
    if entry.host.startswith("*."):
        return target.address is None and target.host.endswith(entry.host[1:])
    return entry.host == target.host


def is_public(address: Address) -> bool:
    """Whether it is on the public internet; an address that holds another one is what that one is."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None:
            return is_public(inner)
        if address in NAT64:
            return False
    return address.is_global and not address.is_multicast
