"""The first process of a container: `python -I -m rlm_agent.container LEASE`.

It is the supervisor, root with SETUID, SETGID and KILL. It forks the agent, which becomes a user of its own
and loads gRPC; sessions are then forks of a process that has neither gRPC nor the token.
"""

import os
import signal
import socket
import sys
from typing import NoReturn

from rlm_agent import users
from rlm_agent.supervisor import Supervisor
from rlm_agent.worker import process
from rlm_agent.worker.link import Link

START_SECONDS = 10


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
    users.become(users.AGENT_USER)
    process.die_with_parent()
    # A host that was killed before it said anything will never say it.
    signal.alarm(max(START_SECONDS, int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    from rlm_agent.__main__ import run

    run(supervisor)
    sys.exit()


if __name__ == "__main__":
    main()
