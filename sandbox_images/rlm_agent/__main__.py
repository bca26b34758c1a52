"""The agent: started by an environment as `python -I -m rlm_agent`, configured by one line on stdin.

The line is a JSON object: `token` (bearer token that every call must carry), `folder` (private to this
agent, removed when it ends; it listens there on `agent.sock`), `shared` (folder in which the host leaves
contexts, or null), `parent` (pid of the host, or null). It answers with one JSON line on stdout when it
serves, and ends when stdin ends.
"""

import asyncio
import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import grpc.aio

from rlm_agent import limits
from rlm_agent.build import agent_build
from rlm_agent.guard import Guard
from rlm_agent.rpc.v1 import agent_pb2_grpc as rpc
from rlm_agent.server import AgentService, Folders
from rlm_agent.supervision import Supervision
from rlm_agent.worker import process

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
]


async def serve(config: dict[str, Any]) -> None:
    supervision = Supervision()
    folder = Path(config["folder"])
    folders = Folders(folder / "sessions", Path(config["shared"]) if config.get("shared") else None)
    service = AgentService(supervision, folders)
    server = grpc.aio.server(interceptors=[Guard(config["token"])], options=SERVER_OPTIONS)
    rpc.add_AgentServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{folder / 'agent.sock'}")
    await server.start()
    print(json.dumps({"agent_build": agent_build()}), flush=True)
    await _told_to_end(supervision)
    await server.stop(grace=0)
    await service.close()
    supervision.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    process.end_below(os.getpid())  # nothing, unless a cell has killed the supervisor
    shutil.rmtree(folder, ignore_errors=True)
    if supervision.gone.is_set():
        sys.exit("the supervisor of the sandbox has ended")


async def _told_to_end(supervision: Supervision) -> None:
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    reasons = [_stdin_ended(), supervision.gone.wait(), terminated.wait()]
    waiting = [asyncio.ensure_future(reason) for reason in reasons]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _stdin_ended() -> None:
    """The host holds the other end for as long as it lives."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while await reader.read(1 << 16):
        pass


def _tie_to(parent: int | None) -> None:
    """Go when the host goes, and keep the token out of sight of other processes of this user."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if parent is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        sys.exit("the host has ended")


def main() -> None:
    config = json.loads(_first_line())
    _tie_to(config.get("parent"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.adopt_orphans()
    asyncio.run(serve(config))


def _first_line() -> bytes:
    """Unbuffered: what follows belongs to the event loop."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("the host has ended")
        line += byte
    return bytes(line)


if __name__ == "__main__":
    main()
