"""Containers of the engine on this machine, in the place of a provider's machines."""

import asyncio
import ctypes
import os
import socket
import threading
from pathlib import Path

CLONE_NEWNET = 0x40000000


async def docker(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    """Run the engine's command; its exit code, output and errors."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("docker", *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    output, error = await process.communicate(stdin)
    return process.returncode or 0, output.decode(), error.decode()


async def dial_inside(container: str, port: int) -> socket.socket:
    """A connection to a port on the loopback of a container that has no other interface."""
    code, output, error = await docker("inspect", "--format", "{{.State.Pid}}", container)
    if code:
        raise ConnectionRefusedError(error)
    return await asyncio.to_thread(_dial, int(output), port)


def _dial(pid: int, port: int) -> socket.socket:
    """In a thread of its own, which enters the network namespace and never leaves it."""
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
