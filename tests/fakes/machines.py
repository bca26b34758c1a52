"""The machines of a provider that we play: containers of the engine, or processes where there is none."""

import asyncio
import ctypes
import os
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rlm_environments.containers.base import debian_reference

CLONE_NEWNET = 0x40000000


class Machines(Protocol):
    """None of them has a network."""

    def base(self) -> str:
        """The image with a Python that takes the place of every public one."""
        ...

    async def has_image(self, tag: str) -> bool: ...

    async def build(self, tag: str, lines: Sequence[str], folder: Path) -> str:
        """Make an image from commands of a Dockerfile and the files it copies; what went wrong."""
        ...

    async def start(
        self,
        image: str,
        command: Sequence[str],
        *,
        cpus: float,
        memory: int,
        env: Mapping[str, str],
        tmp: int = 0,
    ) -> str:
        """Start one with this first process, and so many bytes of memory and of files in /tmp; its id."""
        ...

    async def run(
        self, machine: str, command: Sequence[str], env: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        """Start a process in it, as root."""
        ...

    async def dial(self, machine: str, port: int) -> socket.socket:
        """A connection to a port on its loopback."""
        ...

    async def keep(self, machine: str, tag: str) -> None:
        """Keep its files as an image."""
        ...

    async def remove(self, machine: str) -> None: ...

    async def close(self) -> None:
        """Remove the images that were kept; those that were built serve the next time, too."""


class Containers:
    def __init__(self, name: str, runtime: str = "runc") -> None:
        self.label = f"rlm-fake={name}-{secrets.token_hex(6)}"
        self._runtime = runtime
        self._kept: list[str] = []

    def base(self) -> str:
        return debian_reference()

    async def has_image(self, tag: str) -> bool:
        return (await _docker("image", "inspect", tag))[0] == 0

    async def build(self, tag: str, lines: Sequence[str], folder: Path) -> str:
        (folder / "Dockerfile").write_text("\n".join(lines))
        command = ["build", "--quiet", "--force-rm", "--tag", tag, str(folder)]
        code, output, error = await _docker(*command)
        return f"{output}{error}" if code else ""

    async def start(
        self,
        image: str,
        command: Sequence[str],
        *,
        cpus: float,
        memory: int,
        env: Mapping[str, str],
        tmp: int = 0,
    ) -> str:
        options = ["--detach", "--rm", "--label", self.label, "--network", "none", "--hostname", "box"]
        options += ["--runtime", self._runtime, "--cpus", f"{min(cpus, 2):g}", "--memory", str(memory)]
        options += [part for name, value in env.items() for part in ("--env", f"{name}={value}")]
        options += ["--tmpfs", f"/tmp:exec,size={tmp}"] if tmp else []
        code, output, error = await _docker("run", *options, image, *command)
        assert code == 0, error
        return output.strip()

    async def run(
        self, machine: str, command: Sequence[str], env: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        variables = [f"--env={name}={value}" for name, value in env.items()]
        return await asyncio.create_subprocess_exec(
            "docker", "exec", "-i", *variables, machine, *command, stdin=pipe, stdout=pipe, stderr=pipe
        )

    async def dial(self, machine: str, port: int) -> socket.socket:
        code, output, error = await _docker("inspect", "--format", "{{.State.Pid}}", machine)
        if code:
            raise ConnectionRefusedError(error)
        return await asyncio.to_thread(dial_inside, int(output), port)

    async def keep(self, machine: str, tag: str) -> None:
        code, _, error = await _docker("commit", machine, tag)
        assert code == 0, error
        self._kept.append(tag)

    async def remove(self, machine: str) -> None:
        await _docker("rm", "--force", machine)

    async def close(self) -> None:
        for tag in self._kept:
            await _docker("image", "rm", tag)


async def _docker(*arguments: str) -> tuple[int, str, str]:
    """Run the engine's command; its exit code, output and errors."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("docker", *arguments, stdout=pipe, stderr=pipe)
    output, error = await process.communicate()
    return process.returncode or 0, output.decode(), error.decode()


def dial_inside(pid: int, port: int) -> socket.socket:
    """A connection to the loopback of a process's network namespace, which may have nothing else.

    From a thread of its own, which enters the namespace and never leaves it.
    """
    result: list[socket.socket | OSError] = []

    def dial() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with Path(f"/proc/{pid}/ns/net").open() as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            result.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=dial)
    thread.start()
    thread.join()
    found = result[0]
    if isinstance(found, OSError):
        raise found
    found.setblocking(False)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found
