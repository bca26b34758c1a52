"""Machines that are processes in namespaces of their own, where there is no container engine. Needs root.

The root of one is the host's own, seen through an overlay that hides all but the system's programs and keeps
what is written. Nothing limits its memory or processors.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlm_agent.worker.process import children

from tests.fakes.machines import dial_inside

SHOWN = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "proc", "sys", "dev"})
PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
HIDDEN_BELOW = ("usr/src", "usr/include", "usr/share")
"""Large, and nothing that runs."""
INIT = """\
import ctypes, fcntl, os, socket, struct, sys
_, layers, upper, work, root, *command = sys.argv
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, target, kind, flags, data=""):
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}")
mount("overlay", root, "overlay", 0, f"lowerdir={layers},upperdir={upper},workdir={work}")
mount("proc", f"{root}/proc", "proc", 0)
mount("/dev", f"{root}/dev", "none", 4096 | 16384)
with socket.socket() as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh", b"lo", 1 | 64))
socket.sethostname("box")
os.chroot(root)
os.chdir("/")
print("up", flush=True)
os.execvp(command[0], command)
"""


@dataclass(frozen=True, slots=True)
class Running:
    process: asyncio.subprocess.Process
    pid: int
    """Of the first process in the namespaces."""
    folder: Path
    env: Mapping[str, str]
    image: str


class Processes:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rlm-machines-", dir="/dev/shm"))
        self._images: dict[str, list[Path]] = {"base": [self._make_base()]}
        self._machines: dict[str, Running] = {}

    @property
    def running(self) -> int:
        return len(self._machines)

    async def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_base(self) -> Path:
        """A layer in which folders hide the host's own."""
        layer = self.folder / "base"
        hidden = [each.name for each in Path("/").iterdir() if each.is_dir() and each.name not in SHOWN]
        for name in (*hidden, *HIDDEN_BELOW):
            (layer / name).mkdir(parents=True)
            os.setxattr(layer / name, "trusted.overlay.opaque", b"y")
        (layer / "tmp").chmod(0o1777)
        return layer

    def base(self) -> str:
        return "base"

    async def has_image(self, tag: str) -> bool:
        return tag in self._images

    async def build(self, tag: str, lines: Sequence[str], folder: Path) -> str:
        image = lines[0].removeprefix("FROM ").strip()
        machine = await self.start(image, ["sleep", "infinity"], cpus=1, memory=0, env={})
        try:
            for line in lines[1:]:
                if line.startswith("COPY . /"):
                    root = Path(f"/proc/{self._machines[machine].pid}/root")
                    shutil.copytree(folder, root, dirs_exist_ok=True)
                    continue
                if line.startswith("RUN "):
                    command = ["sh", "-c", line.removeprefix("RUN ")]
                else:
                    continue  # of no meaning without an engine
                process = await self.run(machine, command, {})
                _, error = await process.communicate()
                if process.returncode:
                    return f"{line}: {error.decode()}"
            await self.keep(machine, tag)
            return ""
        finally:
            await self.remove(machine)

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
        name = secrets.token_hex(8)
        folder = self.folder / name
        for each in ("upper", "work", "root"):
            (folder / each).mkdir(parents=True)
        layers = ":".join(str(each) for each in [*reversed(self._images[image]), Path("/")])
        unshare = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        unshare += ["python3", "-I", "-c", INIT, layers]
        unshare += [str(folder / each) for each in ("upper", "work", "root")]
        process = await asyncio.create_subprocess_exec(
            *unshare, *command, stdout=subprocess.PIPE, env={**PATH, **env}
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        (child,) = children(process.pid)
        self._machines[name] = Running(process, child, folder, env, image)
        return name

    async def run(
        self, machine: str, command: Sequence[str], env: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        inside = self._machines[machine]
        enter = [
            "nsenter",
            "--target",
            str(inside.pid),
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--root",
        ]
        return await asyncio.create_subprocess_exec(
            *[*enter, "--wdns=/", *command],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**PATH, **inside.env, **env},
        )

    async def dial(self, machine: str, port: int) -> socket.socket:
        if machine not in self._machines:
            raise ConnectionRefusedError(machine)
        return await asyncio.to_thread(dial_inside, self._machines[machine].pid, port)

    async def keep(self, machine: str, tag: str) -> None:
        layer = self.folder / f"layer-{secrets.token_hex(8)}"
        running = self._machines[machine]
        upper = running.folder / "upper"
        await asyncio.to_thread(subprocess.run, ["cp", "-a", str(upper), str(layer)], check=True)
        self._images[tag] = [*self._images[running.image], layer]

    async def remove(self, machine: str) -> None:
        running = self._machines.pop(machine, None)
        if running is not None:
            with contextlib.suppress(ProcessLookupError):
                running.process.kill()  # and with it everything in its namespaces
            await running.process.wait()
            shutil.rmtree(running.folder, ignore_errors=True)
