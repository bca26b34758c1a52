"""The connection to a container engine, and its errors in one line each."""

import atexit
import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import docker
import docker.errors
import requests.exceptions
from docker.context import ContextAPI
from docker.utils import kwargs_from_env

from rlm_core.errors import EngineError, PolicyNotEnforceable
from rlm_core.text import one_line, printable, told

TIMEOUT_SECONDS = 60
LABEL = "rlm"
"""On everything that we make in an engine."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says of itself."""

    version: str
    architecture: str
    cpus: int
    memory: int
    """Bytes."""
    runtimes: tuple[str, ...]
    security: tuple[str, ...]
    warnings: tuple[str, ...]


_engines: dict[tuple[int, str], "Engine"] = {}
_connecting = threading.Lock()


class Engine:
    """One for the whole process. Blocking, as the SDK is: call it from a thread."""

    @classmethod
    def connect(cls) -> "Engine":
        """Raises EngineError when no engine answers."""
        key = (os.getpid(), f"{os.environ.get('DOCKER_HOST')} {os.environ.get('DOCKER_CONTEXT')}")
        with _connecting:
            if key not in _engines:
                _engines[key] = cls()
                atexit.register(_engines[key].api.close)
            return _engines[key]

    def __init__(self) -> None:
        """Raises EngineError when no engine answers."""
        kwargs: dict[str, Any] = {}
        if os.environ.get("DOCKER_HOST"):
            kwargs = dict(kwargs_from_env())
        else:
            kwargs = _of_context(os.environ.get("DOCKER_CONTEXT"))
        self.address = str(kwargs.get("base_url") or "unix:///var/run/docker.sock")
        with self.errors():
            self.api = docker.APIClient(version="auto", timeout=TIMEOUT_SECONDS, **kwargs)

    @property
    def is_local(self) -> bool:
        """Whether its containers may see this machine's files; an engine in a VM may not, all the same."""
        return self.address.startswith("unix:")

    @cached_property
    def info(self) -> EngineInfo:
        with self.errors():
            raw: dict[str, Any] = self.api.info()
        security = tuple(str(option).removeprefix("name=") for option in raw.get("SecurityOptions") or ())
        return EngineInfo(
            version=told(str(raw.get("ServerVersion"))),
            architecture=str(raw.get("Architecture")),
            cpus=int(raw.get("NCPU") or 1),
            memory=int(raw.get("MemTotal") or 0),
            runtimes=tuple(sorted(raw.get("Runtimes") or ())),
            security=security,
            warnings=tuple(told(str(warning)) for warning in raw.get("Warnings") or ()),
        )

    def notes(self) -> list[str]:
        """Versions, and what is known to be wrong with them."""
        with self.errors():
            parts: list[dict[str, Any]] = self.api.version().get("Components") or []
        versions = {str(part.get("Name")): told(str(part.get("Version"))) for part in parts}
        found = [f"engine {self.info.version} at {self.address}; runtimes: {', '.join(self.info.runtimes)}"]
        runc = versions.get("runc", "")
        if runc and not _is_mended(runc):
            found.append(
                f"warning: runc {runc} has known ways out of a container (CVE-2025-31133, -52565, -52881): "
                "1.2.8, 1.3.3 or newer has not, and runtime='runsc' (gVisor) does without runc"
            )
        with self.errors():
            if self.api.info().get("CgroupVersion") == "1":
                found.append(
                    "a network (hosts, or full) is refused here, but for runtime='runsc': what sockets hold "
                    "is not counted by control groups of version 1"
                )
        return found + [f"warning: {warning}" for warning in self.info.warnings]

    def check(self, runtime: str | None) -> None:
        """Raises PolicyNotEnforceable where this engine can't hold the profile."""
        info = self.info
        if runtime is not None and runtime not in info.runtimes:
            raise PolicyNotEnforceable(
                f"the engine at {self.address} has no runtime {runtime!r}; it has: {', '.join(info.runtimes)}"
            )
        if not any(option.startswith("seccomp") for option in info.security):
            raise PolicyNotEnforceable(
                f"the engine at {self.address} has no seccomp: system calls can't be limited"
            )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raises EngineError in the place of what the SDK raises."""
        try:
            if self.is_local:
                _try_socket(self.address.removeprefix("unix://"))
            yield
        except docker.errors.DockerException as error:
            raise EngineError(_explain(said_by(error), self.address)) from None
        except (requests.exceptions.RequestException, OSError) as error:
            raise EngineError(_explain(repr(error), self.address)) from None


def said_by(error: Exception) -> str:
    """What the engine says, without the words of HTTP around it."""
    return str(getattr(error, "explanation", "") or error)


def _of_context(name: str | None) -> dict[str, Any]:
    """Where the named context of the command line's configuration is, or the current one."""
    try:
        context = ContextAPI.get_context(name) if name else ContextAPI.get_current_context()
    except (ValueError, OSError, docker.errors.DockerException) as error:
        raise EngineError(f"docker's configuration can't be read: {one_line(str(error), 300)}") from None
    if context is None and name:
        raise EngineError(f"DOCKER_CONTEXT={name!r}: there is no such context; see: docker context ls")
    if context is None or context.Name == "default":
        return {}
    return {"base_url": context.Host, "tls": context.TLSConfig or False}


def _is_mended(runc: str) -> bool:
    version = tuple(int(part) for part in re.findall(r"\d+", runc)[:3])
    return version >= (1, 3, 3) or (1, 2, 8) <= version < (1, 3)


def _try_socket(path: str) -> None:
    """Raises OSError that says why not; the SDK's says less, and leaves its socket open."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_SECONDS)
        sock.connect(path)


NO_PERMISSION = (
    "no permission to use the engine at {address}: join the group 'docker', or use a rootless engine"
)
NO_ENGINE = "no container engine at {address}: install and start Docker, or set DOCKER_HOST"
DISK_FULL = "the disk of the engine at {address} is full: free some, e.g. with docker system prune"
REMEDIES = (
    ("PermissionError", NO_PERMISSION),
    ("FileNotFoundError", NO_ENGINE),
    ("ConnectionRefusedError", NO_ENGINE),
    ("Connection refused", NO_ENGINE),
    ("no space left on device", DISK_FULL),
    ("Install paramiko", "an engine behind SSH needs paramiko: pip install 'docker[ssh]'"),
    ("Read timed out", "the engine at {address} did not answer within {timeout} s"),
    ("No such image", "the image is not there any more: build it again with rlm image build"),
)


def _explain(text: str, address: str) -> str:
    for sign, remedy in REMEDIES:
        if sign.lower() in text.lower():
            return remedy.format(address=address, timeout=TIMEOUT_SECONDS)
    return f"the engine at {address} refused: {one_line(printable(text), 500)}"
