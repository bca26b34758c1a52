"""What a sandbox found when it looked around, compared with what was asked of the engine.

A policy that is not checked is not there: an engine without control groups, or with a runtime that does
less than it says, starts a container all the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlm_core.errors import PolicyNotEnforceable
from rlm_core.text import told

NO_CAPABILITIES = {"0000000000000000"}
FILTERED = "2"
"""Seccomp's mode in /proc/self/status."""
DEVICES = frozenset({"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm"})
STREAM_DEVICES = frozenset({"stderr", "stdin", "stdout", "tty", "urandom", "zero"})
REFUSED = ("EPERM", "ENOSYS", "EACCES", "EAFNOSUPPORT", "EINVAL", "ESOCKTNOSUPPORT", "EPROTONOSUPPORT")
LOOKED_AT = frozenset(
    [
        "status",
        "sockets",
        "syscalls",
        "writable",
        "root_file",
        "interfaces",
        "devices",
        "memory",
        "pids",
        "hostname",
        "set_user_id",
    ]
)
INTERNET = {"proxy": ("inet",), "internet": ("inet", "inet6", "inet_datagram")}
"""Families that a cell may make sockets of, by what was asked for."""
MEMORY_SLACK = 1 << 20
"""Control groups count in pages."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What was asked for."""

    hostname: str | None
    """None where it is the sandbox's own, and tells nothing of ours."""
    network: bool = False
    sockets: str = "unix"
    """As in containers/seccomp.py."""
    own_network: bool = False
    """The sandbox is a machine with an interface, whatever may be reached through it."""
    own_kernel: bool = False
    """The sandbox has a kernel of its own (gVisor), whose limits are outside."""
    memory: int | None = None
    """Bytes, of a control group; None where there is none."""
    pids: int | None = None


def check(greeting: Mapping[str, Any], asked: Expected) -> None:
    """Raises PolicyNotEnforceable that names what is not as it was asked."""
    found = greeting.get("posture")
    try:
        if isinstance(found, Mapping) and found.keys() >= LOOKED_AT:
            problems = list(_problems(found, asked))
        else:
            problems = ["it could not look"]
    except (TypeError, ValueError, IndexError):
        problems = ["what it says makes no sense"]
    if problems:
        raise PolicyNotEnforceable(
            f"the sandbox is not what was asked, so nothing was run in it: {told('; '.join(problems))}"
        )


def _problems(found: Mapping[str, Any], asked: Expected) -> Iterator[str]:
    status = _mapping(found, "status")
    yield from _privileges(found, status)
    if found.get("root_file") not in ("EROFS", "EACCES"):
        yield f"the root file system can be written to ({found.get('root_file')})"
    if found.get("writable"):
        yield f"a cell may write to {found.get('writable')}"
    if asked.hostname is not None and found.get("hostname") != asked.hostname:
        yield "the host's name is visible"
    if not asked.network and asked.own_network and found.get("reached") != []:
        yield f"there is a network, hosts that were reached: {found.get('reached')}"
    if not asked.network and not asked.own_network and set(_list(found, "interfaces")) - {"lo"}:
        yield f"there is a network: {found.get('interfaces')}"
    if not asked.own_kernel:
        yield from _kernel_problems(found, status, asked)


def _privileges(found: Mapping[str, Any], status: Mapping[str, Any]) -> Iterator[str]:
    """What a cell has, or may get."""
    for name in ("CapInh", "CapPrm", "CapEff"):
        if status.get(name) not in NO_CAPABILITIES:
            yield f"a cell has capabilities ({name} {status.get(name)})"
    if str(status.get("Uid", "0")).split()[0] == "0":
        yield "a cell is root"
    if found.get("set_user_id"):
        yield f"the image has set-user-id files: {found.get('set_user_id')}"
    if status.get("NoNewPrivs") != "1":
        yield "a program may get new privileges"
    if (outcome := _mapping(found, "syscalls").get("unshare_user")) not in REFUSED:
        yield f"a cell may make namespaces of its own ({outcome})"


def _kernel_problems(found: Mapping[str, Any], status: Mapping[str, Any], asked: Expected) -> Iterator[str]:
    """What the host's own kernel has to hold; gVisor is a kernel of its own, and its limits are outside."""
    if extra := set(_list(found, "devices")) - DEVICES - STREAM_DEVICES:
        yield f"there are devices: {sorted(extra)}"
    if status.get("Seccomp") != FILTERED:
        yield "system calls are not filtered (the engine has no seccomp?)"
    if not (_mapping(found, "syscalls") and _mapping(found, "sockets")):
        yield "system calls and sockets were not tried"
    for name, outcome in _mapping(found, "syscalls").items():
        if outcome not in REFUSED:
            yield f"system call {name} is not refused ({outcome})"
    internet = INTERNET.get(asked.sockets, ())
    for name, outcome in _mapping(found, "sockets").items():
        if outcome not in REFUSED and name not in internet:
            yield f"sockets of family {name} can be made"
    if asked.sockets != "unix" and found.get("sockets_uncounted"):
        yield (
            "what its sockets hold is not counted as its memory (control groups of version 1): "
            "with a network, use an engine with version 2, or runtime='runsc'"
        )
    for name, limit, slack in (("memory", asked.memory, MEMORY_SLACK), ("pids", asked.pids, 0)):
        has = found.get(name)
        if limit is not None and (type(has) is not int or not 0 < has <= limit + slack):
            yield f"{name} is limited to {has}, not to {limit} (are there no control groups?)"


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(found: Mapping[str, Any], name: str) -> list[str]:
    value = found.get(name)
    return [str(each) for each in value] if isinstance(value, list) else ["?"]
