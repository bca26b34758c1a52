"""Where the agent and its sessions keep their files."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from rlm_agent.config import AgentConfig

CONTEXT_FOLDER = "/context"
"""Where a container has the folder that it shares with its host."""
NOTE = "nonce"
"""A file in the shared folder: an agent that can say what is in it really shares the folder with the host."""
NOTE_BYTES = 64
SHORTCUT = "shortcut"
"""A unix socket in the shared folder, where the host waits for the agent, and for nobody after it."""


@dataclass(frozen=True, slots=True)
class Places:
    """As a session sees them: its working folder, which its first process makes, and the socket it calls."""

    cwd: Path
    socket: Path


@dataclass(frozen=True, slots=True)
class Folders:
    private: Path
    """The agent's own."""
    incoming: Path
    """Contexts that are being streamed in; the agent's own too."""
    calls: Path
    """Sockets of sessions: a path as sessions see it, which the supervisor makes."""
    work: Path
    """Where each session's own user makes its working folder: a path as sessions see it."""
    shared: Path | None
    """Where the host leaves contexts."""

    @classmethod
    def make(cls, config: AgentConfig) -> "Folders":
        private, calls, work = Path(config.folder), Path(config.calls), Path(config.work)
        incoming = Path(config.incoming or private / "incoming")
        for folder in (private, incoming):
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(PermissionError):  # made for us by the environment
                folder.chmod(0o700)
        return cls(private, incoming, calls, work, Path(config.shared) if config.shared else None)

    def shared_note(self) -> str:
        with contextlib.suppress(OSError):
            if self.shared is not None:
                with (self.shared / NOTE).open("rb") as file:
                    return file.read(NOTE_BYTES).decode("ascii", "replace")
        return ""
