"""Cleans up behind this process when it is killed by what no process survives, such as SIGKILL.

A shell waits for the end of its stdin, which is in our hands for as long as we live, and then runs one
command. It costs half a megabyte, and nothing happens when we end properly.
"""

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

from rlm_core.transport.unix import free_name

REMOVE = ("rm", "-rf")
SCRIPT = 'read -r _ || exec "$@"'
"""Told to go, it goes; left alone, it cleans up."""


class Janitor:
    """Of one process, with a folder that does not outlive it."""

    _hired: ClassVar[dict[tuple[str, ...], "Janitor"]] = {}
    _hiring = threading.Lock()

    def __init__(self, command: tuple[str, ...]) -> None:
        self.pid = os.getpid()
        self.folder = free_name()
        shell = shutil.which("sh")
        self._waiting: subprocess.Popen[bytes] | None = None
        if shell is not None:
            self._waiting = subprocess.Popen(
                [shell, "-c", SCRIPT, "rlm-janitor", *command, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends our terminal must not end it
            )
        try:
            self.folder.mkdir(mode=0o700)  # now that somebody is there to remove it
        except OSError:
            self._send_away()
            raise
        atexit.register(self._dismiss)

    @classmethod
    def hire(cls, *command: str) -> "Janitor":
        """The one of this process for this command, which gets the folder's path and removes it."""
        with cls._hiring:
            known = cls._hired.get(command)
            if known is None or known.pid != os.getpid():
                known = cls._hired[command] = cls(command)
            return known

    def new_folder(self) -> Path:
        """A folder, 0700 and with a short name, that goes with the process at the latest."""
        return Path(tempfile.mkdtemp(prefix="", dir=self.folder))

    def _dismiss(self) -> None:
        if self.pid != os.getpid():
            return  # a forked child's exit is not ours
        shutil.rmtree(self.folder, ignore_errors=True)
        self._send_away()

    def _send_away(self) -> None:
        """Without cleaning up."""
        if self._waiting is not None and self._waiting.stdin is not None:
            with contextlib.suppress(OSError):
                self._waiting.stdin.write(b"\n")
                self._waiting.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._waiting.wait(1)
