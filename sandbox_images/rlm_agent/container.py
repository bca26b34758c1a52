"""The first process of a container: `python -I -m rlm_agent.container LEASE`.

It is the supervisor, root with SETUID, SETGID and KILL. It forks the agent, which becomes a user of its own
and loads gRPC; sessions are then forks of a process that has neither gRPC nor the token.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from rlm_agent import users
from rlm_agent.folders import CONTEXT_FOLDER
from rlm_agent.supervisor import Supervisor
from rlm_agent.worker import process
from rlm_agent.worker.link import Link

START_SECONDS = 10
NO_GROUP = 65_534
"""Of files whose group this user namespace has not got."""


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.adopt_orphans()
    ours, agents = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _be_the_agent(agents)
    agents.close()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # they are the agent's
        os.dup2(null, fd)
    Supervisor(Link(ours), users.Users()).run()


def _be_the_agent(supervisor: socket.socket) -> NoReturn:
    users.become(users.AGENT_USER, _group_of_contexts())
    process.die_with_parent()
    # A host that was killed before it said anything will never say it.
    signal.alarm(max(START_SECONDS, int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    from rlm_agent.__main__ import run

    run(supervisor)
    sys.exit()


def _group_of_contexts() -> list[int]:
    """The host's user's, whose files sessions must not open: gVisor shows them what the agent has open."""
    try:
        group = Path(CONTEXT_FOLDER).stat().st_gid
    except FileNotFoundError:  # contexts are streamed
        return []
    return [] if group == NO_GROUP else [group]


if __name__ == "__main__":
    main()
