"""How the agent is put into a machine of a provider, and started there as root: the same for all of them.

The container engine has an image and a profile for this (containers/); a provider's machine is its own
boundary, and what is done here is for what runs inside of it.
"""

import asyncio
import contextlib
import math
from abc import abstractmethod
from collections.abc import AsyncIterable, Callable
from typing import Any

from rlm_core.environment import SandboxSpec
from rlm_core.tasks import finish_first
from rlm_environments import posture
from rlm_environments.byte_stream import ByteStreamSandbox
from rlm_environments.stdin import StdinTransport

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


def unpack(bundle: str) -> list[str]:
    """Shell commands that lay out the bundle at this path, once."""
    rights = "python3 -I -S /opt/rlm/finish.py rights"
    return [f"python3 -I -m tarfile -e {bundle} /", f"rm -f {bundle}", rights, *SETUP]


SETUP = (
    f"mkdir -p {RUN_FOLDER}",
    f"chown {AGENT_USER}:{AGENT_USER} {RUN_FOLDER}",
    f"chmod 0700 {RUN_FOLDER}",
    "chmod 1777 /tmp",
)
"""Shell commands for a machine in which everything of the bundle is."""
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
    # Without `site`: it would run what packages for cells have for it (.pth files), as root.
    return ["python3", "-I", "-S", "-c", BECOME, AGENT, str(math.ceil(lease)), hidden]


def config(
    spec: SandboxSpec, *, port: int = 0, process_memory: int = 0, process_space: int = 0
) -> dict[str, Any]:
    """The agent's, but for what the link adds; `port` is for a tunnel of the provider. A process has a limit
    of its data, or of its address space, where a kernel ends anybody when the machine's memory is gone.
    """
    return {
        "folder": f"{RUN_FOLDER}/agent",
        "incoming": "/tmp/.incoming",
        "calls": "/tmp/.calls",
        "work": "/tmp",
        "port": port,
        "probe_outside": spec.network != "full",
        "proxy_port": PROXY_PORT if spec.allowlist is not None else 0,
        "start_ahead": True,
        "lifetime": spec.lifetime or 0.0,
        "processes": spec.pids or PIDS,
        "process_memory": process_memory,
        "process_space": process_space,
    }


def expected(spec: SandboxSpec) -> posture.Expected:
    """What a sandbox is to find when it looks around; the limits of its machine are outside of it."""
    return posture.Expected(None, network=spec.network == "full", own_network=True, own_kernel=True)


class GuestSandbox(ByteStreamSandbox):
    """One whose agent is a process that the provider's SDK runs, and that is ended once, whoever asks."""

    stdin: StdinTransport | None = None
    _stopping: asyncio.Task[None] | None = None
    following: tuple[asyncio.Task[None], ...] = ()

    def follow(
        self, stdout: AsyncIterable[bytes], stderr: AsyncIterable[bytes], explain: Callable[[Exception], str]
    ) -> None:
        """Take what the process writes, until it ends; `explain` says an error of the SDK in one line."""

        async def read_errors() -> None:
            with contextlib.suppress(Exception):  # told by the other
                async for data in stderr:
                    self.on_stderr(data)

        async def read() -> None:
            why = ""
            try:
                async for data in stdout:
                    self.on_stdout(data)
            except Exception as error:  # noqa: BLE001 - whatever the SDK raises, there is no way to it any more
                why = explain(error)
            self.has_ended(why)

        self.following = (asyncio.ensure_future(read()), asyncio.ensure_future(read_errors()))

    async def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self.end())
        await finish_first(_of(self._stopping))

    @abstractmethod
    async def end(self) -> None:
        """Close the link and end the machine; never raises."""

    async def close_link(self) -> None:
        await super().close_link()
        if self.stdin is not None:
            self.stdin.abort()


async def _of(task: asyncio.Task[None]) -> None:
    await task
