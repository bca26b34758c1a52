"""What gVisor needs of a sandbox's memory, whoever runs it."""

GVISOR_MEMORY = 512 << 20
"""Its own memory counts as the sandbox's."""
SPACE = 128 << 20
"""Of a process's address space, for programs and what is only mapped."""


def process_space(memory: int) -> int:
    """Bytes of address space that each process may have: gVisor holds no limit of a process's data, and a
    control group ends all of its sandbox, not the one process that takes too much."""
    return memory + SPACE
