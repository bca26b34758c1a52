"""`environment="local"`: the agent as a child process of the host, with your own interpreter and libraries.

A process of its own but **no security boundary**: a cell runs as you, with your files and your network.
It is for trusted texts and models, for tests, and for machines without an engine. What it does hold: the
cell's environment is emptied (no key is in it), it has a working folder of its own, memory can be limited
per process, and everything it started ends with it.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from rlm_core import limits
from rlm_core.environment import Capabilities, Environment, Sandbox, track, untrack
from rlm_core.errors import SandboxLost
from rlm_core.janitor import REMOVE, Janitor
from rlm_core.tasks import finish_first
from rlm_core.text import one_line, printable
from rlm_core.transport.unix import unix_channel

log = logging.getLogger("rlm_environments.local")

LOG_BYTES = 8 << 10
"""Kept from the end of the agent's stderr, to say why it ended."""


class LocalEnvironment(Environment):
    name: ClassVar[str] = "local"
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=False,
        enforces=frozenset({"memory", "cell_timeout", "interrupt_grace", "output_bytes", "env", "files"}),
        summary="a process of its own with your libraries; no security boundary",
    )

    async def start(self) -> "LocalSandbox":
        await asyncio.to_thread(self._announce)
        folder = Janitor.hire(*REMOVE).new_folder()
        sandbox: LocalSandbox | None = None
        try:
            for name in ("home", "shared", "work"):
                (folder / name).mkdir()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "rlm_agent",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=folder,
                # Ctrl-C and a closed terminal are for the host, which then ends the sandbox.
                start_new_session=True,
                env=_environment(folder / "home"),
            )
            sandbox = LocalSandbox(folder, process)
            track(sandbox)
            async with asyncio.timeout(limits.START_SECONDS):
                self._check(await sandbox.begin(self._config(folder)))
            return sandbox
        except BaseException as error:
            epitaph = ""
            if sandbox is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                await finish_first(sandbox.stop())
                epitaph = await sandbox.epitaph()
            if isinstance(error, (OSError, TimeoutError, SandboxLost)):
                raise SandboxLost(f"the agent did not start: {epitaph or error}") from None
            raise

    def _announce(self) -> None:
        _say_once()

    def _config(self, folder: Path) -> dict[str, Any]:
        """What the agent is told, beside its token."""
        return {
            "folder": str(folder),
            "calls": str(folder / "calls"),
            "work": str(folder / "work"),
            "shared": str(folder / "shared"),
            "parent": os.getpid(),
        }

    def _check(self, greeting: Mapping[str, Any]) -> None:
        """Whether what the agent says of itself is what was asked."""


class LocalSandbox(Sandbox):
    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.id = folder.name
        self.token = secrets.token_urlsafe(32)
        self.channel = unix_channel(folder / "agent.sock")
        self.shared_folder = folder / "shared"
        self._folder = folder
        self._process = process
        self._log = bytearray()
        self._log_reader = asyncio.create_task(self._read_log())

    @property
    def pid(self) -> int:
        """Of the agent."""
        return self._process.pid

    async def begin(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Configure the agent and wait until it serves; what it says of itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**config, "token": self.token}).encode() + b"\n")
        await self._process.stdin.drain()
        try:
            line = await self._process.stdout.readline()
            if line:
                return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):  # no JSON, or more than a line has
            raise SandboxLost("what was started is not our agent") from None
        raise SandboxLost("the agent ended at once")

    async def stop(self) -> None:
        untrack(self)
        await self.channel.close()
        if self._process.stdin is not None:
            self._process.stdin.close()  # the agent ends its sessions, removes its folder and goes
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self._signal(number)
            try:
                async with asyncio.timeout(limits.CLOSE_SECONDS / 2):
                    await self._process.wait()
                    break
            except TimeoutError:
                continue
        await asyncio.wait([self._log_reader], timeout=1)
        self._log_reader.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGTERM: the agent's supervisor ends all of its processes and then itself."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def epitaph(self, wait: float = 0.0) -> str:
        if self._process.returncode is None and wait:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), wait)
        if self._process.returncode is None:
            return ""
        last = printable(self._log.decode("utf-8", "replace")).strip().splitlines()[-1:]
        why = f": {one_line(last[0], 300)}" if last else ""
        return f"the agent has ended with code {self._process.returncode}{why}"

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(LOG_BYTES):
            self._log = (self._log + data)[-LOG_BYTES:]


@cache
def _say_once() -> None:
    """Python shows a warning on stderr where the program has not set up logging."""
    log.warning("environment 'local' is a process of its own but no security boundary: cells run as you")


def _environment(home: Path) -> dict[str, str]:
    """All that the agent inherits: an allow-list, so that no key of yours is in it by accident."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "GRPC_VERBOSITY": "ERROR",
    }
