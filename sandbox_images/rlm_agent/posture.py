"""What a process of a session is able to do here: found out by trying, for the host to compare with what it
asked. Standard library only; runs in a short-lived process of its own, and changes nothing.

Attempts give "ok" or the name of the error. The host's half is rlm_environments/posture.py.
"""

import contextlib
import ctypes
import errno
import json
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlm_agent.worker.link import leave

MAX_BYTES = 64 << 10
CLONE_NEWUSER = 0x10000000
SYSCALLS = {
    "x86_64": {"io_uring_setup": 425, "userfaultfd": 323, "ptrace": 101, "bpf": 321, "keyctl": 250},
    "aarch64": {"io_uring_setup": 425, "userfaultfd": 282, "ptrace": 117, "bpf": 280, "keyctl": 219},
}
PTRACE_ATTACH = 16
ARGUMENTS = {"ptrace": (PTRACE_ATTACH, 0, 0, 0)}
"""To nobody: where it is allowed it finds no process. Zeros would be TRACEME, which works."""
UNSHARE = {"x86_64": 272, "aarch64": 97}
FAMILIES = {"inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "alg": 38, "vsock": 40}
NOT_WRITABLE = ("/", "/proc/sys/kernel/core_pattern", "/sys", "/dev")
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
PROCESS_LIMITS = ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max")
SOCKET_LIMIT = "/sys/fs/cgroup/memory/memory.kmem.tcp.limit_in_bytes"
"""Version 1 of control groups counts what internet sockets hold here, and only with a limit."""
UNLIMITED = 1 << 60
OUTSIDE = (("1.1.1.1", 443), ("8.8.8.8", 53), ("2606:4700:4700::1111", 443))
"""Public resolvers of names, which answer everybody. Their packets get lost where there is no way out."""
OUTSIDE_SECONDS = 1.0
STATUS = ("CapInh", "CapPrm", "CapEff", "Seccomp", "Uid")
PR_GET_NO_NEW_PRIVS = 39


def report(writer: int, *, outside: bool) -> None:
    """Write what there is to a pipe, and end this process."""
    try:
        found = {**look(), "reached": reached(OUTSIDE) if outside else None}
        os.write(writer, json.dumps(found).encode()[:MAX_BYTES])
    finally:
        leave(0)


def receive(reader: int, seconds: float) -> dict[str, Any]:
    """Read a report to its end; empty when none came in time."""
    data = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while len(data) <= MAX_BYTES and select.select([pipe], [], [], seconds)[0]:
            chunk = pipe.read(MAX_BYTES)
            if not chunk:
                break
            data += chunk
    with contextlib.suppress(ValueError):
        return dict(json.loads(data))
    return {}


def look() -> dict[str, Any]:
    return {
        "status": _status(),
        "sockets": {
            **{name: _attempt(_open_socket, number) for name, number in FAMILIES.items()},
            "inet_datagram": _attempt(socket.socket, FAMILIES["inet"], socket.SOCK_DGRAM),
        },
        "syscalls": _syscalls(),
        "writable": [path for path in NOT_WRITABLE if os.access(path, os.W_OK)],
        "root_file": _attempt(_make_file, "/.rlm-probe"),
        "interfaces": sorted(_interfaces()),
        "devices": sorted(each.name for each in Path("/dev").iterdir()),
        "memory": _number(MEMORY_LIMITS),
        "pids": _number(PROCESS_LIMITS),
        "sockets_uncounted": (_number((SOCKET_LIMIT,)) or 0) > UNLIMITED,
        "environment": sorted(os.environ),
        "hostname": socket.gethostname(),
        "set_user_id": _set_user_id_files(),
    }


def reached(addresses: tuple[tuple[str, int], ...], seconds: float = OUTSIDE_SECONDS) -> list[str]:
    """Which of these numeric addresses take a TCP connection, tried all at once."""
    found: list[str] = []
    waiting: dict[socket.socket, str] = {}
    for host, port in addresses:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            sock.setblocking(False)
            waiting[sock] = host
            sock.connect_ex((host, port))
    deadline = time.monotonic() + seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for sock in select.select([], list(waiting), [], left)[1]:
            host = waiting.pop(sock)
            with sock, contextlib.suppress(OSError):
                sock.getpeername()
                found.append(host)
    for sock in waiting:
        sock.close()
    return found


def _attempt(action: Callable[..., object], *arguments: Any) -> str:
    try:
        action(*arguments)
        return "ok"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


def _make_file(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def _open_socket(family: int) -> None:
    kind = socket.SOCK_SEQPACKET if family == FAMILIES["alg"] else socket.SOCK_STREAM
    kind = socket.SOCK_RAW if family in (FAMILIES["netlink"], FAMILIES["packet"]) else kind
    socket.socket(family, kind).close()


def _syscalls() -> dict[str, str]:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: int) -> None:
        if libc.syscall(number, *arguments) < 0:
            raise OSError(ctypes.get_errno(), "")

    numbers = SYSCALLS.get(os.uname().machine, {})
    found = {
        name: _attempt(call, number, *ARGUMENTS.get(name, (0, 0, 0, 0))) for name, number in numbers.items()
    }
    return {**found, "unshare_user": _attempt(call, UNSHARE[os.uname().machine], CLONE_NEWUSER)}


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {name: fields[name].strip() for name in STATUS if name in fields}
    # gVisor does not say this one in its file.
    return {**told, "NoNewPrivs": str(ctypes.CDLL(None).prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))}


def _interfaces() -> list[str]:
    with contextlib.suppress(OSError):
        rows = Path("/proc/net/dev").read_text().splitlines()[2:]
        return [row.partition(":")[0].strip() for row in rows]
    return []


def _number(paths: tuple[str, ...]) -> int | None:
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None


def _set_user_id_files() -> list[str]:
    """The usual places: the image is built without any."""
    found: list[str] = []
    for folder in ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin"):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            if os.statvfs(folder).f_flag & os.ST_NOSUID:
                continue  # the kernel takes no notice of them there
            found += [each.path for each in entries if each.stat(follow_symlinks=False).st_mode & 0o6000]
    return found[:20]
