"""`environment="bubblewrap"`: isolation without a daemon, on Linux.

The agent stays outside, and only the supervisor and the workers go in: into namespaces of their own, with no
network, a read-only view of the programs they need, and the same system call filter as a container. What it
has not got are control groups: memory is limited per process, and CPU time not at all.

As root, each session is a user of its own, as in a container; otherwise all are the user who started them,
in a user namespace.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from rlm_core.environment import Capabilities, SandboxSpec
from rlm_core.errors import ConfigError, PolicyNotEnforceable
from rlm_environments import posture
from rlm_environments.bundle import agent_folder
from rlm_environments.containers import seccomp
from rlm_environments.local import LocalEnvironment

try:
    import pyseccomp
except RuntimeError:
    raise ConfigError("environment 'bubblewrap' needs libseccomp: apt-get install libseccomp2") from None

DISK = 512 << 20
PIDS = 512
MEMORY = 4 << 30
SHARED_MEMORY = 64 << 20
HOSTNAME = "sandbox"
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types")
TRY_SECONDS = 10
AS_A_USER = ("--unshare-all", "--unshare-user")
"""The first one tries user namespaces only, and without them no further ones can be forbidden."""


class BubblewrapEnvironment(LocalEnvironment):
    name: ClassVar[str] = "bubblewrap"
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=True,
        enforces=frozenset(
            {
                "cell_timeout",
                "disk",
                "env",
                "files",
                "interrupt_grace",
                "lifetime",
                "memory",
                "network",
                "output_bytes",
                "pids",
            }
        ),
        summary="namespaces without a daemon, with your libraries; memory is limited per process",
    )

    def __init__(self, spec: SandboxSpec) -> None:
        super().__init__(spec)
        if spec.network not in (None, "none"):
            raise PolicyNotEnforceable(
                f"environment 'bubblewrap' can't enforce network={spec.network!r}, only 'none'; "
                "use environment='docker'"
            )
        self._spec = spec.model_copy(update={"memory": spec.memory or MEMORY})

    def _announce(self) -> None:
        """Raises PolicyNotEnforceable where this machine does not let bubblewrap work."""
        _check_machine()

    def _config(self, folder: Path) -> dict[str, Any]:
        compiled = folder / "filter.bpf"
        with compiled.open("wb") as file:
            seccomp_filter().export_bpf(file)
        return {
            **super()._config(folder),
            "work": "/tmp",
            "calls": "/tmp/.calls",
            "lifetime": self.spec.lifetime or 0.0,
            "processes": self.spec.pids or PIDS,
            "process_memory": self._spec.memory,
            "start_ahead": True,
            "supervisor": [
                *_command(self.spec.disk or DISK),
                sys.executable,
                "-I",
                "-m",
                "rlm_agent.supervisor",
                *(["--users"] if os.geteuid() == 0 else []),
            ],
            "supervisor_filter": str(compiled),
        }

    def _check(self, greeting: Mapping[str, Any]) -> None:
        posture.check(greeting, posture.Expected(HOSTNAME))


def _command(disk: int) -> list[str]:
    """bwrap's arguments, in the order in which the mounts are made."""
    command = [_program(), "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", HOSTNAME]
    if os.geteuid() == 0:
        # The supervisor gives each session a user of its own; no other process of the sandbox is root.
        command += [
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ]
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    else:
        command += [*AS_A_USER, "--disable-userns"]
    for path in map(Path, SYSTEM):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"]
    command += ["--dev", "/dev", "--perms", "1777", "--size", str(SHARED_MEMORY), "--tmpfs", "/dev/shm"]
    # No terminals: those of all sandboxes are counted together, and their memory in none.
    command += ["--perms", "0555", "--size", "4096", "--tmpfs", "/dev/pts", "--remount-ro", "/dev/pts"]
    command += ["--remount-ro", "/dev", "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]
    for shown in map(Path, (*SYSTEM_FILES, *_python())):
        if shown.exists() and not shown.is_relative_to("/usr"):
            for parent in reversed(shown.parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", str(shown), str(shown)]
    command += ["--remount-ro", "/", "--chdir", "/"]
    command += [
        "--setenv",
        "PATH",
        f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "--setenv",
        "HOME",
        "/tmp",
    ]
    return [*command, "--seccomp", "{filter}", "--"]


def _python() -> list[str]:
    """Where this interpreter, its libraries and the agent are."""
    return sorted({sys.base_prefix, sys.prefix, str(agent_folder().parent)})


def seccomp_filter() -> pyseccomp.SyscallFilter:
    """The table of containers/seccomp.toml, compiled; what this libseccomp does not know is refused."""
    compiled = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for names, action in (
        (seccomp.allowed(), pyseccomp.ALLOW),
        (seccomp.missing(), pyseccomp.ERRNO(errno.ENOSYS)),
    ):
        for name in names:
            if _is_known(name):
                compiled.add_rule(action, name)
    for name, all_of in seccomp.conditions("unix"):
        compiled.add_rule(pyseccomp.ALLOW, name, *map(_argument, all_of))
    return compiled


def _argument(condition: seccomp.Condition) -> pyseccomp.Arg:
    if condition.mask is None:
        return pyseccomp.Arg(condition.argument, pyseccomp.EQ, condition.value)
    return pyseccomp.Arg(condition.argument, pyseccomp.MASKED_EQ, condition.mask, condition.value)


def _is_known(name: str) -> bool:
    """libseccomp gives numbers below zero to what this architecture has not got."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)) >= 0
    except (OSError, ValueError):
        return False


def _program() -> str:
    program = shutil.which("bwrap")
    if program is None:
        raise ConfigError("environment 'bubblewrap' needs the program bwrap: apt-get install bubblewrap")
    return program


@cache
def _check_machine() -> None:
    """Try it once: user namespaces may be forbidden here."""
    isolated = ["--unshare-net", "--unshare-pid"] if os.geteuid() == 0 else [*AS_A_USER, "--disable-userns"]
    command = [_program(), *isolated, "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_SECONDS)
    if done.returncode:
        raise PolicyNotEnforceable(
            f"environment 'bubblewrap' can't work on this machine: {done.stderr.strip()[-300:]}; "
            "user namespaces may be switched off (sysctl kernel.unprivileged_userns_clone, "
            "user.max_user_namespaces, or AppArmor's apparmor_restrict_unprivileged_userns)"
        )
