"""What an environment tells the agent that it starts: one line of JSON on stdin."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

FILTER = "{filter}"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Unknown keys are an error: host and agent must be of one build."""

    token: str
    """Bearer token that every call must carry."""
    folder: str
    """Private to the agent, and removed when it ends; it listens there on `agent.sock`."""
    calls: str
    """Where the sockets are that cells call out on, as they see it: a folder that the supervisor may make."""
    work: str
    """Where sessions have their working folders, as they see it."""
    incoming: str = ""
    """Where contexts are streamed to; in `folder` when it is not given."""
    shared: str | None = None
    """Where the host leaves contexts."""
    nonce: str = ""
    """Said back when the agent serves: the answer belongs to this launch."""
    parent: int | None = None
    """Pid of the host, to go with it."""
    stdio: bool = False
    """The host comes by stdin and stdout (or the shortcut), not by dialling the socket."""
    shortcut: str = ""
    """Unix socket of a host on the same machine, to use instead of stdin and stdout; empty: there is none."""
    port: int = 0
    """gRPC also comes in here, from a provider's tunnel; 0: there is none."""
    probe_outside: bool = False
    """Try whether hosts of the internet can be reached, before anything runs."""
    lease: float = 0.0
    """Seconds without a sign of life of the host after which the agent ends; 0: stdin tells alone."""
    lifetime: float = 0.0
    """Seconds after which the agent ends in any case; 0: never."""
    processes: int = 0
    """Processes and threads that one session's user may have; 0: no limit of ours."""
    process_memory: int | None = None
    """Bytes that each process may have, 0 for no limit of ours; None: what the session's host asks for."""
    process_space: int = 0
    """Bytes of address space that each process may have; 0: no limit."""
    proxy_port: int = 0
    """On the sandbox's own loopback, for what may leave it; 0: nothing may."""
    start_ahead: bool = False
    """Start the processes of the first session before it is opened."""
    supervisor: tuple[str, ...] = ()
    """Command that starts the supervisor, its socket's fd appended; empty: the usual one."""
    supervisor_filter: str = ""
    """A file with a compiled system call filter; its fd takes the place of FILTER in the command."""


def read_config() -> AgentConfig:
    """Ends the process when there is none."""
    line = _first_line()
    signal.alarm(0)
    try:
        fields: dict[str, Any] = json.loads(line)
        return AgentConfig(**{**fields, "supervisor": tuple(fields.get("supervisor", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        sys.exit(f"the host's configuration is not for this agent: {error}")


def _first_line() -> bytes:
    """Unbuffered: what follows belongs to the event loop."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("the host has ended")
        line += byte
    return bytes(line)
