"""The sandbox's own system call filter, from the table in seccomp.toml."""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

ERRNO_MISSING = 38
"""ENOSYS."""
AF_INET, AF_INET6, SOCK_STREAM, SOCK_TYPES = 2, 10, 1, 0xF
Sockets = Literal["unix", "proxy", "internet"]
"""Which can be made, unix ones always: `proxy` adds TCP over IPv4, for a proxy on the own loopback."""
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


@cache
def table() -> dict[str, Any]:
    return tomllib.loads(files("rlm_environments.containers").joinpath("seccomp.toml").read_text())


def allowed() -> list[str]:
    """Calls that are allowed whatever their arguments."""
    return sorted({name for names in table()["allow"].values() for name in names.split()})


def missing() -> list[str]:
    return sorted(table()["missing"]["calls"].split())


@dataclass(frozen=True, slots=True)
class Condition:
    """That an argument of a call has a value, of these bits when there is a mask."""

    argument: int
    value: int
    mask: int | None = None


def conditions(sockets: Sockets) -> list[tuple[str, tuple[Condition, ...]]]:
    """Calls that are allowed when their arguments are like this."""
    found: list[tuple[str, tuple[Condition, ...]]] = []
    for rule in table()["allow_when"]:
        found += [
            (name, (Condition(rule["argument"], rule["equals"], rule.get("masked")),))
            for name in rule["calls"]
        ]
    if sockets == "proxy":
        found.append(("socket", (Condition(0, AF_INET), Condition(1, SOCK_STREAM, SOCK_TYPES))))
    if sockets == "internet":
        found += [("socket", (Condition(0, family),)) for family in (AF_INET, AF_INET6)]
    return found


def engine_profile(architecture: str, sockets: Sockets) -> str:
    """The filter as the JSON that container engines take."""
    rules: list[dict[str, Any]] = [
        {"names": allowed(), "action": "SCMP_ACT_ALLOW"},
        {"names": missing(), "action": "SCMP_ACT_ERRNO", "errnoRet": ERRNO_MISSING},
    ]
    rules += [
        {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [_argument(each) for each in all_of]}
        for name, all_of in conditions(sockets)
    ]
    return json.dumps(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": [ARCHITECTURES[architecture]],
            "syscalls": rules,
        }
    )


def _argument(condition: Condition) -> dict[str, Any]:
    if condition.mask is None:
        return {"index": condition.argument, "value": condition.value, "op": "SCMP_CMP_EQ"}
    return {
        "index": condition.argument,
        "value": condition.mask,
        "valueTwo": condition.value,
        "op": "SCMP_CMP_MASKED_EQ",
    }
