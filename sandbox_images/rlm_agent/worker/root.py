"""The first process of a session: the parent of all its orphans, so that none is lost and none stays.

It runs no cell. It reaps, and it goes when its last child has gone.
"""

import os
import signal
import socket
from collections.abc import Callable
from typing import NoReturn

from rlm_agent.worker import process
from rlm_agent.worker.link import EXIT_BROKEN, PacketLink, leave


def enter(fds: list[int], cwd: str) -> PacketLink:
    """Make this process the root of a session, from its link, stdout and stderr, in this order."""
    os.setsid()
    control, out, err = fds
    os.dup2(out, 1)
    os.dup2(err, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for fd in (null, out, err):
        os.close(fd)
    os.mkdir(cwd, 0o700)  # not one that somebody has put there
    os.chdir(cwd)
    os.set_inheritable(control, False)
    link = socket.socket(fileno=control)
    link.settimeout(None)  # a cell may have set another default
    return PacketLink(link)


def run(link: PacketLink, serve: Callable[[], NoReturn]) -> NoReturn:
    """Fork the chain and reap until nobody is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A cell that ends all that is its own must not end its session; a worker lets them through again.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    adopts = process.adopt_orphans()
    if os.fork() == 0:
        try:
            serve()
        finally:
            leave(EXIT_BROKEN)
    link.close()
    for fd in (1, 2):
        os.close(fd)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            if adopts:
                leave(0)
            signal.pause()  # where orphans can't be adopted (gVisor), the chain goes on below the supervisor
