"""The hosts of `network=[…]`: how they are written, which addresses they may have, and the name in a TLS hello."""

import contextlib
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_core.egress.allowlist import Allowlist, Target, is_public
from rlm_core.egress.hello import NotTLS, server_name
from rlm_core.environment import make_environment, parse_spec
from rlm_core.errors import ConfigError, PolicyNotEnforceable
from tests.support.tls import hello

PUBLIC = "93.184.215.14"
NAMES = ("good.example", "a.b.example:8443")
ALLOWED = Allowlist.parse([*NAMES, "*.wild.example"])


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
        listed = (target.host, target.port) in {("good.example", 443), ("a.b.example", 8443)}
        wild = target.host.endswith(".wild.example") and target.port == 443
        assert ALLOWED.allows(target) is (listed or wild)


@given(st.from_regex(r"[a-z]{1,9}(\.[a-z]{1,9}){1,3}", fullmatch=True), st.data())
def test_the_name_in_a_hello_is_found_however_it_is_cut(name: str, data: st.DataObject) -> None:
    whole = hello(name)
    assert server_name(whole) == name
    assert {server_name(whole[:size]) for size in range(len(whole))} == {None}
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
