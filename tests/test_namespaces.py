"""No process of a session makes namespaces, even where no engine's filter holds it; everything else goes on."""

import struct
import subprocess
import sys

import pytest
from rlm_agent import namespaces

PROGRAM = """
import ctypes, errno, os
from rlm_agent import namespaces
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
namespaces.forbid()
numbers = namespaces.NUMBERS[os.uname().machine]
def call(*arguments):
    result = libc.syscall(*arguments)
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""
SIGCHLD = 17
X32 = 0x40000000


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        ("numbers.unshare, 0x10000000", "EPERM"),
        ("numbers.unshare, 0", "EPERM"),
        *((f"numbers.clone, {SIGCHLD | 1 << bit}, 0, 0, 0, 0", "EPERM") for bit in (17, *range(25, 31))),
        ("numbers.setns, 0, 0", "EPERM"),
        ("numbers.clone3, 0, 0", "ENOSYS"),
        (f"numbers.unshare | {X32}, 0x10000000", "EPERM"),
        ("numbers.clone, 0x10000, 0, 0, 0, 0", "EINVAL"),  # CLONE_THREAD alone: not ours to refuse
    ],
)
def test_calls(call: str, outcome: str) -> None:
    assert run(f"print(call({call}))") == outcome


def test_it_holds_for_what_is_started_and_harms_nothing() -> None:
    code = """
import subprocess, sys, threading
from multiprocessing import get_context
for method in ("fork", "spawn"):
    with get_context(method).Pool(1) as pool: assert pool.map(abs, [-3]) == [3]
thread = threading.Thread(target=lambda: None); thread.start(); thread.join()
print(subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True).stderr)
"""
    assert "Operation not permitted" in run("if __name__ == '__main__':\n" + code.replace("\n", "\n  "))


@pytest.mark.parametrize("machine", namespaces.NUMBERS)
def test_a_filter_ends_on_every_way(machine: str) -> None:
    code = namespaces.program(namespaces.NUMBERS[machine])
    lines = [struct.unpack_from("HBBI", code, at) for at in range(0, len(code), 8)]
    assert [line[0] for line in lines[-3:]] == [namespaces.RETURN] * 3
    for at, (kind, if_true, if_false, _) in enumerate(lines[:-3]):
        assert at + 1 + max(if_true, if_false) < len(lines) and kind != namespaces.RETURN


def test_a_machine_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "NUMBERS", {})
    with pytest.raises(OSError, match="can't be forbidden on a machine of kind"):
        namespaces.forbid()
