"""The sandbox's own system call filter, from the table in seccomp.toml."""

import json
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

ERRNO_MISSING = 38
"""ENOSYS."""
NETWORK_FAMILIES = (2, 10)
"""AF_INET and AF_INET6."""
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


@cache
def table() -> dict[str, Any]:
    return tomllib.loads(files("rlm_environments.containers").joinpath("seccomp.toml").read_text())


def allowed() -> list[str]:
    """Calls that are allowed whatever their arguments."""
    return sorted({name for names in table()["allow"].values() for name in names.split()})


def missing() -> list[str]:
    return sorted(table()["missing"]["calls"].split())


def conditions(*, network: bool) -> list[tuple[str, int, int | None, int]]:
    """Calls that are allowed when an argument has a value: name, argument, mask or None, value."""
    found: list[tuple[str, int, int | None, int]] = []
    for rule in table()["allow_when"]:
        values = [rule["equals"]]
        if network and rule.get("unless_network"):
            values += NETWORK_FAMILIES
        found += [
            (name, rule["argument"], rule.get("masked"), value) for name in rule["calls"] for value in values
        ]
    return found


def engine_profile(architecture: str, *, network: bool) -> str:
    """The filter as the JSON that container engines take."""
    rules: list[dict[str, Any]] = [
        {"names": allowed(), "action": "SCMP_ACT_ALLOW"},
        {"names": missing(), "action": "SCMP_ACT_ERRNO", "errnoRet": ERRNO_MISSING},
    ]
    for name, index, mask, value in conditions(network=network):
        argument = {"index": index, "value": value, "op": "SCMP_CMP_EQ"}
        if mask is not None:
            argument = {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
        rules.append({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]})
    return json.dumps(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": [ARCHITECTURES[architecture]],
            "syscalls": rules,
        }
    )
