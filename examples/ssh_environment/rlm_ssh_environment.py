"""`environment="ssh"`: the agent on another machine, over the stdin and stdout of `ssh`.

An example of an environment from outside the package; docs/guides/write-an-environment.md goes through it.
It is no security boundary but the other machine's account. That machine needs Python 3.11 or newer.
"""

import asyncio
import contextlib
import shlex
from typing import Any, ClassVar, cast

from rlm_environments import bundle
from rlm_environments.byte_stream import ByteStreamSandbox, nothing_left_of

from rlm_core import limits
from rlm_core.environment import Capabilities, Environment, SandboxSpec, track, untrack
from rlm_core.errors import SandboxLost
from rlm_core.transport.unix import private_folder

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
        track(sandbox)
        async with nothing_left_of(sandbox), asyncio.timeout(limits.START_SECONDS):
            await sandbox.begin()
            await sandbox.channel.channel_ready()
        return sandbox


class SshSandbox(ByteStreamSandbox):
    called = "the agent over ssh"

    def __init__(self, spec: SshSpec) -> None:
        super().__init__(private_folder(), LEASE_SECONDS)
        self._spec = spec
        self._folder = ""
        self._process: asyncio.SubprocessTransport | None = None
        self._exited = asyncio.Event()

    async def begin(self) -> None:
        """Bring the agent there, and start it: from now on its stdin and stdout are the link."""
        python = bundle.Python.parse(await self._run(f"python3 -I -c {shlex.quote(bundle.LOOK)}"))
        if python is None or python.version < (3, 11):
            raise SandboxLost(f"no python3 of 3.11 or newer on {self._spec.host}")
        packed = await asyncio.to_thread(bundle.tarball, python, ())
        folder = self._folder = (await self._run("mktemp -d")).strip()
        await self._run(f"cat > {folder}/b.tgz && python3 -m tarfile -e {folder}/b.tgz {folder}", packed)
        environment = ENVIRONMENT.format(path=f"{folder}/opt/rlm/agent")
        agent = f"{environment} python3 -I -c {shlex.quote(AGENT)}"
        command = f"cd {folder} && mkdir calls work && {agent}; rm -rf {folder}"
        process, _ = await asyncio.get_running_loop().subprocess_exec(lambda: Wire(self), *self._ssh(command))
        self._process = process
        config: dict[str, Any] = {
            "folder": f"{folder}/agent",
            "calls": f"{folder}/calls",
            "work": f"{folder}/work",
        }
        stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))
        await self.configure(stdin, {**config, "lifetime": self._spec.lifetime or 0.0})

    def _ssh(self, command: str) -> list[str]:
        return ["ssh", "-T", "-o", "BatchMode=yes", *self._spec.ssh_options, "--", self._spec.host, command]

    async def _run(self, command: str, data: bytes = b"") -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._ssh(command), stdin=pipe, stdout=pipe, stderr=pipe
        )
        try:
            output, errors = await process.communicate(data)
        finally:
            if process.returncode is None:  # nobody waits for it any more
                process.kill()
        if process.returncode:
            lines = errors.decode("utf-8", "replace").splitlines()  # the last one, after its warnings
            raise SandboxLost(lines[-1] if lines else f"ssh ended with {process.returncode}")
        return output.decode()

    async def stop(self) -> None:
        await self.close_link()
        if self._process is not None:
            cast(
                asyncio.WriteTransport, self._process.get_pipe_transport(0)
            ).close()  # the agent cleans up and ends
            try:
                await asyncio.wait_for(self._exited.wait(), limits.CLOSE_SECONDS)
            except TimeoutError:
                self._process.kill()
            self._process.close()
        elif self._folder:  # no agent was started, which would remove it
            with contextlib.suppress(SandboxLost):
                await self._run(f"rm -rf {self._folder}")
        untrack(self)

    def kill(self) -> None:
        self.link.remove_folder()
        if self._process is not None and self._process.get_returncode() is None:
            self._process.kill()  # which closes the agent's stdin


class Wire(asyncio.SubprocessProtocol):
    """What the ssh process brings and takes."""

    def __init__(self, sandbox: SshSandbox) -> None:
        self._sandbox = sandbox

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self._sandbox.on_stdout if fd == 1 else self._sandbox.on_stderr)(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has exited, and all that it wrote has come."""
        self._sandbox._exited.set()
        self._sandbox.has_ended("")

    def pause_writing(self) -> None:
        self._sandbox.link.set_stream_full(True)

    def resume_writing(self) -> None:
        self._sandbox.link.set_stream_full(False)
