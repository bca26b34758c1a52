"""What the agent asks the kernel about its processes."""

import os
import subprocess
import sys

from rlm_agent.worker import process

ROUNDS = 3000
RELAY = """
import os, sys
from rlm_agent.worker import process
process.adopt_orphans()
if os.fork():  # like a session's root, it reaps until nobody is left
    try:
        while True:
            os.wait()
    except ChildProcessError:
        sys.exit()
while os.read(0, 1):
    if os.fork():
        os._exit(0)  # our place below the root is the child's now
    os.write(1, b"%d\\n" % os.getpid())
"""


def test_a_process_is_found_below_its_ancestor_while_its_parents_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RELAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as root:
        assert root.stdin is not None and root.stdout is not None
        runner = 0
        for _ in range(ROUNDS):
            root.stdin.write(b".")
            runner = int(root.stdout.readline())
            assert process.is_below(runner, root.pid)
        assert process.is_below(runner, os.getpid())
        assert not process.is_below(runner, runner)
        assert not process.is_below(root.pid, runner)
        root.stdin.close()
    assert not process.is_below(runner, os.getpid())
