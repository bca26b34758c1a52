"""The policy of a sandbox, compiled to what a container engine is asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.types import LogConfig, Mount, Ulimit
from rlm_agent.folders import CONTEXT_FOLDER

from rlm_core.egress.allowlist import Allowlist
from rlm_core.environment import SandboxSpec
from rlm_core.errors import ConfigError
from rlm_environments.containers import seccomp
from rlm_environments.containers.engine import Engine
from rlm_environments.gvisor import GVISOR_MEMORY, process_space
from rlm_environments.posture import Expected

AGENT_USER = 64_000
"""The agent's own user in the container, as in rlm_agent/users.py."""
MEMORY = 4 << 30
LEAST_MEMORY = 96 << 20
"""The agent and an idle session take some 60 MiB."""
CPUS = 2.0
PIDS = 512
DISK = 1 << 30
SHARED_MEMORY = 64 << 20
"""/dev/shm, for multiprocessing's semaphores and shared memory."""
PRIVATE_BYTES = 1 << 20
"""The agent's own folder: sockets only."""
RESERVED_PIDS = 64
"""For the supervisor and the agent, beyond what sessions may have."""
GVISOR_PIDS = 512
GVISOR_PIDS_EACH = 16
"""gVisor's own threads count too, and each process in it has some of them. It holds the limit of a session's
user itself."""
INODES_PER_MIB = 256
OPEN_FILES = 4096
HOSTNAME = "sandbox"
PROXY_PORT = 3128
AGENT = ["/opt/rlm/bin/agent"]
RUN_FOLDER = "/run/rlm"


@dataclass(frozen=True, slots=True)
class Profile:
    """What was asked of the engine, for the posture that is found inside to be compared with."""

    memory: int
    cpus: float
    pids: int
    """Of one session; the container has some more."""
    disk: int
    network: bool
    allowlist: Allowlist | None
    runtime: str | None

    @property
    def all_pids(self) -> int:
        all_pids = self.pids + RESERVED_PIDS
        return GVISOR_PIDS + GVISOR_PIDS_EACH * all_pids if self.is_gvisor else all_pids

    @property
    def all_memory(self) -> int:
        return self.memory + (GVISOR_MEMORY if self.is_gvisor else 0)

    @property
    def process_space(self) -> int:
        """Bytes of address space of each process; 0: no limit but the container's."""
        return process_space(self.memory) if self.is_gvisor else 0

    @property
    def is_gvisor(self) -> bool:
        return self.runtime is not None and self.runtime.startswith("runsc")

    @property
    def sockets(self) -> seccomp.Sockets:
        """The proxy of an allowlist is on the sandbox's own loopback, the only interface it has."""
        if self.network:
            return "internet"
        return "unix" if self.allowlist is None else "proxy"

    def expected(self) -> Expected:
        """What the sandbox is to find when it looks around."""
        return Expected(
            HOSTNAME,
            self.network,
            self.sockets,
            own_kernel=self.is_gvisor,
            memory=self.all_memory,
            pids=self.all_pids,
        )

    @classmethod
    def of(cls, spec: SandboxSpec, engine: Engine) -> "Profile":
        """Fill in the defaults.

        Raises:
            ConfigError: what the fields ask for does not fit together, or the machine.
        """
        memory = int(spec.memory or min(MEMORY, engine.info.memory // 2))
        if memory < LEAST_MEMORY:
            raise ConfigError(f"memory={memory:,}: a sandbox needs {LEAST_MEMORY >> 20} MiB at least")
        if memory > engine.info.memory:
            raise ConfigError(f"memory={memory:,}: the engine's machine has {engine.info.memory:,} bytes")
        shared = min(SHARED_MEMORY, memory // 8)
        disk = int(spec.disk or min(DISK, memory // 2 - shared - PRIVATE_BYTES))
        cpus = spec.cpus or min(CPUS, float(engine.info.cpus))
        if cpus > engine.info.cpus:
            raise ConfigError(f"cpus={cpus:g}: the engine's machine has {engine.info.cpus}")
        if disk + shared + PRIVATE_BYTES > memory // 2:
            raise ConfigError(
                f"disk={disk:,} is kept in memory, and files may take half of it at most: "
                f"set memory to {2 * (disk + shared + PRIVATE_BYTES):,} or more"
            )
        return cls(
            memory=memory,
            cpus=cpus,
            pids=spec.pids or PIDS,
            disk=disk,
            network=spec.network == "full",
            allowlist=spec.allowlist,
            runtime=spec.runtime,
        )


def container(
    profile: Profile,
    engine: Engine,
    *,
    image: str,
    labels: dict[str, str],
    lease: float,
    context: Path | None,
) -> dict[str, Any]:
    """The body of the engine's create request."""
    host = engine.api.create_host_config(
        network_mode="bridge" if profile.network else "none",
        read_only=True,
        tmpfs={
            # Sized and inode-capped; together with /dev/shm never more than half of the memory limit, so
            # that files can't take the memory that the kernel would need to end their makers.
            "/tmp": _tmpfs(profile.disk, "exec", "mode=1777"),
            # No terminals: those of all containers are counted together, and their memory in none.
            "/dev/pts": "ro,nosuid,nodev,noexec,size=4k,nr_inodes=2,mode=0555",
            RUN_FOLDER: _tmpfs(
                PRIVATE_BYTES, "noexec", "mode=0700", f"uid={AGENT_USER}", f"gid={AGENT_USER}"
            ),
        },
        shm_size=min(SHARED_MEMORY, profile.memory // 8),
        mounts=[Mount(CONTEXT_FOLDER, str(context), type="bind", read_only=True)] if context else [],
        # For the first process only, which gives every session a user of its own. Any other user loses them.
        cap_drop=["ALL"],
        cap_add=["SETUID", "SETGID", "KILL"],
        security_opt=[
            "no-new-privileges:true",
            f"seccomp={seccomp.engine_profile(engine.info.architecture, profile.sockets)}",
        ],
        pids_limit=profile.all_pids,
        mem_limit=profile.all_memory,
        memswap_limit=profile.all_memory,
        nano_cpus=int(profile.cpus * 1e9),
        ulimits=[
            Ulimit(name="nofile", soft=OPEN_FILES, hard=OPEN_FILES),
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="fsize", soft=profile.disk, hard=profile.disk),
            Ulimit(name="msgqueue", soft=0, hard=0),
        ],
        log_config=LogConfig(type="none"),
        ipc_mode="private",
        cgroupns="private",
        auto_remove=True,
        runtime=profile.runtime,
    )
    return {
        "Image": image,
        "Entrypoint": AGENT,
        "Cmd": [str(math.ceil(lease))],
        "User": "0:0",
        "WorkingDir": "/",
        "Hostname": HOSTNAME,
        "Env": [],
        "Labels": labels,
        "Healthcheck": {"Test": ["NONE"]},  # the base's would run as root, beside the cells
        "OpenStdin": True,
        "StdinOnce": False,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Tty": False,
        "NetworkDisabled": not profile.network,
        "HostConfig": host,
    }


def _tmpfs(size: int, *options: str) -> str:
    inodes = max(4096, (size >> 20) * INODES_PER_MIB)
    return ",".join(("rw", "nosuid", "nodev", f"size={size}", f"nr_inodes={inodes}", *options))
