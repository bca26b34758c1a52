"""The agent: `python -I -m rlm_agent`, or forked by container.py.

Its configuration is one line on stdin (config.py). It answers with one JSON line on stdout when it serves,
and ends when stdin ends, its lease or lifetime runs out, or its supervisor has gone.
"""

import asyncio
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import sys

import grpc.aio

from rlm_agent import limits
from rlm_agent.build import agent_build
from rlm_agent.config import AgentConfig, read_config
from rlm_agent.direct import Direct
from rlm_agent.folders import Folders
from rlm_agent.guard import Guard
from rlm_agent.rpc.v1 import agent_pb2_grpc as rpc
from rlm_agent.server import AgentService
from rlm_agent.stdio import Stdio
from rlm_agent.supervision import Supervision
from rlm_agent.worker import process

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
    # Hosts look after a connection that has to cross the internet.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


async def serve(config: AgentConfig, supervisor: socket.socket | None) -> None:
    supervision = Supervision(supervisor) if supervisor else Supervision.launch(config)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every caller in a cell is a file of ours
    folders = Folders.make(config)
    service = AgentService(supervision, folders, config)
    server = grpc.aio.server(interceptors=[Guard(config.token)], options=SERVER_OPTIONS)
    rpc.add_AgentServiceServicer_to_server(service, server)
    address = folders.private / "agent.sock"
    server.add_insecure_port(f"unix:{address}")
    if config.port:
        server.add_insecure_port(f"0.0.0.0:{config.port}")
    await service.open_egress()
    await server.start()
    looks = supervisor is not None or bool(config.supervisor)
    posture = await supervision.probe(outside=config.probe_outside) if looks else None
    stdio = (
        Stdio(address, Direct(service.new_host, config.token).serve, config.token, config.lease)
        if config.stdio
        else None
    )
    shortcut = stdio is not None and await stdio.take_shortcut(config.shortcut)
    hello = {"agent_build": agent_build(), "nonce": config.nonce, "posture": posture, "shortcut": shortcut}
    if config.start_ahead:
        service.start_ahead()
    print(json.dumps({**hello, "shared": folders.shared_note()}), flush=True)
    if stdio is not None:
        await stdio.open()
    why = await _told_to_end(supervision, stdio, config.lifetime)
    if why:
        print(why, file=sys.stderr, flush=True)  # before the end of our supervisor, which may be ours too
    if stdio is not None:
        stdio.close()
    await server.stop(grace=0)
    await service.close()
    supervision.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    process.end_below(os.getpid())  # nothing, unless a cell has killed the supervisor
    shutil.rmtree(folders.private, ignore_errors=True)
    if why:
        sys.exit(1)


async def _told_to_end(supervision: Supervision, stdio: Stdio | None, lifetime: float) -> str:
    """Wait for a reason to end; in words, where the host has to be told."""
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    reasons = [supervision.gone.wait(), terminated.wait(), stdio.ended.wait() if stdio else _stdin_ended()]
    waiting = [asyncio.ensure_future(reason) for reason in reasons]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=lifetime or None)
    for task in waiting:
        task.cancel()
    if supervision.gone.is_set():
        return "the supervisor of the sandbox has ended"
    return "" if done else f"the sandbox's lifetime of {lifetime:g} s is over"


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


def run(supervisor: socket.socket | None = None) -> None:
    """Be the agent; with a supervisor that is there already, or with one of its own."""
    config = read_config()
    _tie_to(config.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.adopt_orphans()
    asyncio.run(serve(config, supervisor))


if __name__ == "__main__":
    run()
