"""Whether the kernel has killed for want of memory: the counters of the sandbox's own control group."""

import contextlib
from pathlib import Path

COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


def out_of_memory_kills() -> int:
    """How many there were; 0 where the kernel does not tell."""
    for path in COUNTERS:
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields.get("oom_kill", 0))
    return 0
