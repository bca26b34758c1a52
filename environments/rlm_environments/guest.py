"""How the agent is put into a machine of a provider, and started there as root: the same for all of them.

The container engine has an image and a profile for this (containers/); a provider's machine is its own
boundary, and what is done here is for what runs inside of it.
"""

import math
from typing import Any

from rlm_core.environment import SandboxSpec
from rlm_environments import posture

PIDS = 512
PROXY_PORT = 3128
RUN_FOLDER = "/run/rlm"
AGENT_USER = 64_000
"""As in rlm_agent/users.py."""
ENVIRONMENT: dict[str, str] = {
    "PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin",
    "VIRTUAL_ENV": "/opt/venv",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "USER": "sandbox",
    "GRPC_VERBOSITY": "ERROR",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def setup(bundle: str) -> list[str]:
    """Shell commands that unpack the bundle at this path, once."""
    return [
        f"python3 -m tarfile -e {bundle} /",
        f"rm -f {bundle}",
        f"mkdir -p {RUN_FOLDER}",
        f"chown {AGENT_USER}:{AGENT_USER} {RUN_FOLDER}",
        f"chmod 0711 {RUN_FOLDER}",
        "chmod 1777 /tmp",
        # Cells are users without rights, and no program may give them any.
        "find / -xdev -perm /6000 -type f -exec chmod a-s {} + 2>/dev/null || true",
    ]


AGENT = "/opt/rlm/bin/agent"
BECOME = """\
import os, sys
_, program, lease, hidden = sys.argv
kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
os.execve(program, [program, lease], kept)
"""


def command(lease: float, hidden: str) -> list[str]:
    """Arguments of a process that becomes the agent, without the variables whose names begin with `hidden`:
    what a provider tells its machines is not for cells."""
    return ["python3", "-I", "-c", BECOME, AGENT, str(math.ceil(lease)), hidden]


def config(spec: SandboxSpec, port: int = 0) -> dict[str, Any]:
    """The agent's, but for what the link adds; `port` is for a tunnel of the provider."""
    return {
        "folder": f"{RUN_FOLDER}/agent",
        "incoming": "/tmp/.incoming",
        "calls": f"{RUN_FOLDER}/calls",
        "work": "/tmp",
        "port": port,
        "probe_outside": spec.network != "full",
        "proxy_port": PROXY_PORT if spec.allowlist is not None else 0,
        "start_ahead": True,
        "lifetime": spec.lifetime or 0.0,
        "processes": spec.pids or PIDS,
        "process_memory": 0,
    }


def expected(spec: SandboxSpec) -> posture.Expected:
    """What a sandbox is to find when it looks around; the limits of its machine are outside of it."""
    sockets = "internet" if spec.network == "full" else "proxy" if spec.allowlist else "unix"
    return posture.Expected(None, spec.network == "full", sockets, own_network=True, own_kernel=True)
