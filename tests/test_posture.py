"""A sandbox that is not what was asked for does not start."""

import copy
import dataclasses
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from rlm_agent.posture import reached
from rlm_environments import posture
from rlm_environments.posture import Expected

from rlm_core.errors import PolicyNotEnforceable

ASKED = Expected("sandbox", memory=512 << 20, pids=164)
GOOD: dict[str, Any] = {
    "status": {
        "CapInh": "0000000000000000",
        "CapPrm": "0000000000000000",
        "CapEff": "0000000000000000",
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "Uid": "190053706\t190053706\t190053706\t190053706",
    },
    "sockets": {"inet": "EPERM", "inet6": "EPERM", "netlink": "EPERM", "packet": "EPERM", "alg": "EPERM"},
    "syscalls": {"io_uring_setup": "ENOSYS", "ptrace": "EPERM", "unshare_user": "EPERM"},
    "writable": [],
    "root_file": "EROFS",
    "interfaces": ["lo"],
    "devices": ["null", "zero", "shm"],
    "memory": 512 << 20,
    "pids": 164,
    "environment": ["PATH"],
    "hostname": "sandbox",
    "set_user_id": [],
}
BAD: list[tuple[str, Any, str]] = [
    ("status.CapEff", "00000000a80425fb", "capabilities"),
    ("status.NoNewPrivs", "0", "new privileges"),
    ("status.Seccomp", "0", "not filtered"),
    ("status.Uid", "0\t0\t0\t0", "root"),
    ("sockets.vsock", "ok", "vsock"),
    ("sockets.inet", "ok", "inet"),
    ("syscalls.ptrace", "ok", "ptrace"),
    ("writable", ["/proc/sys/kernel/core_pattern"], "core_pattern"),
    ("root_file", "ok", "root file system"),
    ("interfaces", ["eth0", "lo"], "network"),
    ("devices", ["null", "kvm"], "kvm"),
    ("memory", None, "control groups"),
    ("memory", 1 << 60, "memory is limited"),
    ("pids", None, "pids is limited"),
    ("pids", 100_000, "pids is limited"),
    ("hostname", "build-7", "name"),
    ("set_user_id", ["/usr/bin/su"], "set-user-id"),
    ("status", None, "capabilities"),
    ("devices", 7, "devices"),
    ("syscalls.unshare_user", "ok", "namespaces of its own"),
    ("syscalls", {}, "not tried"),
    ("sockets", [], "not tried"),
    ("memory", True, "memory is limited"),
    ("pids", -1, "pids is limited"),
    ("status.Uid", "", "no sense"),
    ("status.CapEff", [], "no sense"),
]


def test_what_is_as_asked_passes() -> None:
    posture.check({"posture": GOOD}, ASKED)


@pytest.mark.parametrize(("where", "value", "named"), BAD)
def test_what_is_not_as_asked_is_named(where: str, value: Any, named: str) -> None:
    found = copy.deepcopy(GOOD)
    place, _, name = where.partition(".")
    if name:
        found[place][name] = value
    else:
        found[place] = value
    with pytest.raises(PolicyNotEnforceable, match=named):
        posture.check({"posture": found}, ASKED)


@pytest.mark.parametrize(
    "greeting", [{}, {"posture": None}, {"posture": {}}, {"posture": [1]}, {"posture": "fine"}]
)
def test_an_agent_that_did_not_look_is_not_trusted(greeting: dict[str, Any]) -> None:
    with pytest.raises(PolicyNotEnforceable, match="could not look"):
        posture.check(greeting, ASKED)


@pytest.mark.parametrize("name", GOOD)
def test_nothing_may_be_left_out(name: str) -> None:
    found = {key: value for key, value in GOOD.items() if key != name}
    if name == "environment":
        return  # told, not judged
    with pytest.raises(PolicyNotEnforceable):
        posture.check({"posture": found}, ASKED)


def test_an_unsandboxed_process_does_not_pass() -> None:
    """In a process of its own: one that looks around tries what it should not be able to do."""
    program = "import json; from rlm_agent.posture import look; print(json.dumps(look()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    with pytest.raises(PolicyNotEnforceable, match="is not what was asked, so nothing was run in it"):
        posture.check({"posture": json.loads(done.stdout)}, ASKED)


@pytest.mark.parametrize("sockets", ["proxy", "internet"])
def test_memory_that_sockets_hold_uncounted_is_a_problem_where_they_can_be_made(sockets: str) -> None:
    found = {**GOOD, "sockets_uncounted": True}
    posture.check({"posture": found}, ASKED)
    with pytest.raises(PolicyNotEnforceable, match="not counted as its memory"):
        posture.check({"posture": found}, dataclasses.replace(ASKED, sockets=sockets))


def test_a_machine_of_a_provider_may_have_an_interface_and_reach_nobody() -> None:
    asked = Expected(None, own_network=True, own_kernel=True)
    found = {**GOOD, "interfaces": ["eth0", "lo"]}
    posture.check({"posture": {**found, "reached": []}}, asked)
    for whom in (["1.1.1.1"], None, "nobody"):
        with pytest.raises(PolicyNotEnforceable, match="there is a network"):
            posture.check({"posture": {**found, "reached": whom}}, asked)


@pytest.mark.parametrize("outcome", ["ok", None])
def test_namespaces_are_forbidden_on_a_kernel_of_its_own_too(outcome: str | None) -> None:
    asked = dataclasses.replace(ASKED, own_kernel=True)
    posture.check({"posture": {**GOOD, "syscalls": {"ptrace": "ok", "unshare_user": "EPERM"}}}, asked)
    with pytest.raises(PolicyNotEnforceable, match="namespaces of its own"):
        posture.check({"posture": {**GOOD, "syscalls": {"unshare_user": outcome}}}, asked)


def test_whom_a_process_can_reach_is_found_out_by_trying() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as silent:
        silent.bind(("127.0.0.2", 0))  # a port that nobody listens on
        addresses = (server.getsockname(), silent.getsockname(), ("::1", server.getsockname()[1]))
        assert reached(addresses) == ["127.0.0.1"]
