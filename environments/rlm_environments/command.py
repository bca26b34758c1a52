"""A sandbox that a command line reaches: `ssh`, `podman exec -i`, `kubectl exec -i` and their like."""

import asyncio
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

from rlm_core import limits
from rlm_core.environment import track, untrack
from rlm_core.errors import SandboxLost
from rlm_core.janitor import REMOVE, Janitor
from rlm_environments.byte_stream import ByteStreamSandbox


class CommandSandbox(ByteStreamSandbox):
    """The agent's stdin and stdout are those of a process on this machine."""

    def __init__(self, lease: float) -> None:
        super().__init__(Janitor.hire(*REMOVE).new_folder(), lease)
        self._process: asyncio.SubprocessTransport | None = None
        self.exited = asyncio.Event()
        """The process has exited, and all that it wrote has come."""
        track(self)

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """Arguments of the process that runs a shell script over there."""

    async def run(self, script: str, data: bytes = b"") -> str:
        """Run a script to its end, with these bytes as its stdin; what it wrote.

        Raises:
            SandboxLost: it failed; the last line of what it said.
        """
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.command(script), stdin=pipe, stdout=pipe, stderr=pipe
        )
        try:
            output, errors = await process.communicate(data)
        finally:
            if process.returncode is None:  # nobody waits for it any more
                process.kill()
        if process.returncode:
            lines = errors.decode("utf-8", "replace").splitlines()  # the last one, after its warnings
            raise SandboxLost(lines[-1] if lines else f"{self.called} ended with {process.returncode}")
        return output.decode()

    async def become_agent(self, script: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Run the script that becomes the agent, and configure it; what the agent says of itself.

        Raises:
            SandboxLost: it did not serve.
        """
        loop = asyncio.get_running_loop()
        self._process, _ = await loop.subprocess_exec(lambda: _Wire(self), *self.command(script))
        return await self.configure(self._stdin(), config)

    async def stop(self) -> None:
        await self.close_link()
        if self._process is not None:
            self._stdin().close()  # the agent ends
            try:
                await asyncio.wait_for(self.exited.wait(), limits.CLOSE_SECONDS)
            except TimeoutError:
                self._process.kill()
            self._process.close()
        untrack(self)

    def kill(self) -> None:
        self.link.remove_folder()
        if self._process is not None and self._process.get_returncode() is None:
            self._process.kill()  # which closes the agent's stdin

    def _stdin(self) -> asyncio.WriteTransport:
        assert self._process is not None
        return cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))


class _Wire(asyncio.SubprocessProtocol):
    """What the process brings and takes."""

    def __init__(self, sandbox: CommandSandbox) -> None:
        self._sandbox = sandbox

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self._sandbox.on_stdout if fd == 1 else self._sandbox.on_stderr)(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sandbox.exited.set()
        self._sandbox.has_ended("")

    def pause_writing(self) -> None:
        self._sandbox.link.set_stream_full(True)

    def resume_writing(self) -> None:
        self._sandbox.link.set_stream_full(False)
