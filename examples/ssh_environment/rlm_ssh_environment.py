"""`environment="ssh"`: the agent on another machine, over the stdin and stdout of `ssh`.

An example of an environment from outside the package; docs/guides/write-an-environment.md goes through it.
It is no security boundary but the other machine's account. That machine needs Python 3.11 or newer.
"""

import asyncio
import contextlib
import shlex
from typing import ClassVar, cast

from rlm_environments import bundle
from rlm_environments.byte_stream import nothing_left_of
from rlm_environments.command import CommandSandbox

from rlm_core import limits
from rlm_core.environment import Capabilities, Environment, SandboxSpec
from rlm_core.errors import SandboxLost

LEASE_SECONDS = 60.0
PATHS = "import os, sys; sys.path[:0] = [os.path.abspath(f'opt/rlm/{name}') for name in ('agent', 'lib')]"
AGENT = f"{PATHS}; from rlm_agent.__main__ import run; run()"
ENVIRONMENT = (
    "env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=. LANG=C.UTF-8 GRPC_VERBOSITY=ERROR PYTHONPATH={path}"
)
"""For programs that cells start; the agent itself takes no notice of PYTHONPATH."""


class SshSpec(SandboxSpec):
    """The policy, and what only this environment has."""

    host: str
    """As `ssh` takes it: a name of your configuration, or user@host."""
    ssh_options: tuple[str, ...] = ()


class SshEnvironment(Environment):
    name: ClassVar[str] = "ssh"
    spec_type: ClassVar[type[SandboxSpec]] = SshSpec
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=False,
        enforces=frozenset(
            {"memory", "cell_timeout", "interrupt_grace", "output_bytes", "env", "files", "lifetime"}
        ),
        summary="another machine's account, over SSH; no boundary within it",
    )

    async def start(self) -> "SshSandbox":
        sandbox = SshSandbox(cast(SshSpec, self.spec))
        async with nothing_left_of(sandbox), asyncio.timeout(limits.START_SECONDS):
            await sandbox.begin()
            await sandbox.channel.channel_ready()
        return sandbox


class SshSandbox(CommandSandbox):
    called = "the agent over ssh"

    def __init__(self, spec: SshSpec) -> None:
        super().__init__(LEASE_SECONDS)
        self._spec = spec
        self._folder = ""

    def command(self, script: str) -> list[str]:
        return ["ssh", "-T", "-o", "BatchMode=yes", *self._spec.ssh_options, "--", self._spec.host, script]

    async def begin(self) -> None:
        """Bring the agent there, and start it: from then on its stdin and stdout are the link."""
        python = bundle.Python.parse(await self.run(f"python3 -I -c {shlex.quote(bundle.LOOK)}"))
        if python is None or python.version < (3, 11):
            raise SandboxLost(f"no python3 of 3.11 or newer on {self._spec.host}")
        packed = await asyncio.to_thread(bundle.tarball, python, ())
        folder = self._folder = (await self.run("mktemp -d")).strip()
        await self.run(f"cat > {folder}/b.tgz && python3 -m tarfile -e {folder}/b.tgz {folder}", packed)
        environment = ENVIRONMENT.format(path=f"{folder}/opt/rlm/agent")
        agent = f"cd {folder} && mkdir work && {environment} python3 -I -c {shlex.quote(AGENT)}"
        folders = {"folder": f"{folder}/agent", "calls": f"{folder}/calls", "work": f"{folder}/work"}
        config = {**folders, "lifetime": self._spec.lifetime or 0.0}
        await self.become_agent(f"{agent}; rm -rf {folder}", config)

    async def stop(self) -> None:
        await super().stop()
        if self._folder and not self.exited.is_set():  # no agent was started, which would remove it
            with contextlib.suppress(SandboxLost):
                await self.run(f"rm -rf {self._folder}")
