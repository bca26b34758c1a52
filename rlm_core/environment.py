"""What an environment is: a place where an agent can run, and the policy it holds there.

Environments are found through the entry-point group `rlm.environments`; this package imports none.
"""

import atexit
import contextlib
import difflib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

import grpc.aio
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from rlm_agent.rpc.v1.agent_pb2_grpc import AgentServiceStub

from rlm_core import requirements
from rlm_core.egress.allowlist import Allowlist
from rlm_core.errors import ConfigError, MissingExtra, PolicyNotEnforceable, in_one_line
from rlm_core.text import without_surrogates
from rlm_core.transport.stream import GrpcStream, Stream, Take

GROUP = "rlm.environments"
DISTRIBUTION = "rlm-sandbox"
EXIT_SECONDS = 20.0
"""For all sandboxes that are left to be ended when the interpreter exits."""
MAX_ENV = 32 << 10
"""Characters of all names and values."""
HELD_EVERYWHERE = frozenset({"cell_timeout", "interrupt_grace", "output_bytes", "env", "files"})
"""Fields of SandboxSpec that session and agent hold, wherever they run."""
OF_THE_ORIGINAL = frozenset({"daytona", "e2b", "ipython"})
"""Environments of the original library that are not in this one yet."""
TOKEN_KEY = "rlm-token"
"""In the metadata of every call to an agent."""


def _network(value: Any) -> Any:
    """Hosts as text, as a command has them, are separated by commas; no hosts is no network."""
    if value in ("none", "full", None):
        return value
    try:
        entries = tuple(each.strip() for each in (value.split(",") if isinstance(value, str) else value))
        Allowlist.parse(entries)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"none, full, or hosts such as pypi.org or *.example.com:8443 ({error})") from None
    return entries or "none"


def _listed(value: Any) -> Any:
    """One requirement is a list of one."""
    return (value,) if isinstance(value, str) else value


Listed: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Texts; a single one is a list of one."""


def _image(value: str | None) -> str | None:
    if value is not None and (not value or any(each.isspace() for each in value)):
        raise ValueError(f"{value!r} is no name of an image")
    return value


def _env(value: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in value.items():
        if not name or "=" in name or "\0" in name + text:
            raise ValueError(f"{name!r} and its value can't be in an environment")
        if without_surrogates(name + text) != name + text:
            raise ValueError(f"{name!r} or its value is no UTF-8")
    if sum(len(name) + len(text) for name, text in value.items()) > MAX_ENV:
        raise ValueError(f"more than {MAX_ENV:,} characters")
    return value


def _files(value: Mapping[str, Path] | None) -> Mapping[str, Path] | None:
    for name in value or ():
        if without_surrogates(name) != name:
            raise ValueError(f"{name!r} is no UTF-8")
    return value


def _requirements(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if value is None else requirements.checked(value)


class SandboxSpec(BaseModel):
    """The policy of a sandbox, the same for every environment. None is the environment's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Annotated[Literal["none", "full"] | tuple[str, ...] | None, BeforeValidator(_network)] = None
    """`none`, `full`, or the hosts that may be reached by https: `["pypi.org", "*.example.com:8443"]`."""
    cpus: float | None = Field(default=None, gt=0)
    memory: ByteSize | None = Field(default=None, gt=0)
    """Bytes, or text such as "2GiB"; per process in a local environment."""
    pids: int | None = Field(default=None, gt=0)
    disk: ByteSize | None = Field(default=None, gt=0)
    lifetime: float | None = Field(default=None, gt=0)
    """Seconds after which the sandbox ends, whatever it does."""
    cell_timeout: float = Field(default=600.0, gt=0)
    """Seconds that one cell may take, its queries included."""
    interrupt_grace: float = Field(default=2.0, gt=0)
    """Seconds between the interrupt and the kill of a cell whose time is up."""
    output_bytes: ByteSize = Field(default=ByteSize(128 << 10), gt=0, le=1 << 20)
    """Kept from the head of each of a cell's stdout and stderr, and as much from the tail."""
    env: Annotated[Mapping[str, str], AfterValidator(_env)] = Field(default_factory=dict)
    files: Annotated[Mapping[str, Path] | None, AfterValidator(_files)] = None
    """Files of the host, by their path in each session's working folder."""
    image: Annotated[str | None, AfterValidator(_image)] = None
    """`minimal` or `data` (numpy, pandas, scipy), or the base to build on; `debian` needs no registry."""
    packages: Annotated[Listed | None, AfterValidator(_requirements)] = None
    """Requirements such as "numpy==2.4.6", for cells; an index has them."""
    runtime: str | None = None
    """Of the container engine, e.g. "runsc" (gVisor)."""
    lease: float | None = Field(default=None, ge=1)
    """Seconds that a sandbox lives on without a sign of life of its host."""

    @property
    def allowlist(self) -> Allowlist | None:
        """The hosts of `network`, where it has some."""
        return Allowlist.parse(self.network) if isinstance(self.network, tuple) else None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an environment can do. `enforces` names the fields of SandboxSpec that it holds."""

    isolated: bool
    """Whether it is a security boundary."""
    enforces: frozenset[str]
    summary: str
    lists: bool = False
    """Whether sandboxes outlive their host for a lease, so that `running` and `remove` know of them."""
    costs_money: bool = False
    """Whether a sandbox does, so that none is started without being asked for."""
    attaches: bool = False
    """Whether another host can take a sandbox over by its id and token."""
    snapshots: bool = False
    """Whether the files of a sandbox can be kept as an image for others."""


class Sandbox(ABC):
    """A running agent: how to reach it, and how to end it."""

    id: str
    token: str
    """Bearer token that the agent asks for with every call."""
    channel: grpc.aio.Channel
    shared_folder: Path | None = None
    """Where the host can leave a file for the agent to read; None streams instead."""

    def stream(self, take: Take) -> Stream:
        """Open the stream of a session: its cells and its calls."""
        stub: Any = AgentServiceStub(self.channel)
        return GrpcStream(stub.Connect(metadata=((TOKEN_KEY, self.token),)), take)

    @abstractmethod
    async def stop(self) -> None:
        """End the sandbox and everything in it; safe to repeat, never raises for one that is gone."""

    @abstractmethod
    def kill(self) -> None:
        """The same at once and from any thread, when the interpreter exits."""

    @abstractmethod
    async def epitaph(self, wait: float = 0.0) -> str:
        """One line on why the agent has ended; empty while it runs, after `wait` seconds at most."""

    async def snapshot(self) -> str:
        """Keep its files as an image, and give what `image` of another sandbox takes.

        Variables are not files, and are not kept.
        """
        raise ConfigError("the files of this sandbox can't be kept as an image")


class SandboxSource(Protocol):
    """What a run takes its sandbox from: an environment, or a pool of one."""

    @property
    def spec(self) -> SandboxSpec: ...

    async def start(self) -> Sandbox: ...


@dataclass(frozen=True, slots=True)
class RunningSandbox:
    """A sandbox that some host has started and that is still there."""

    id: str
    handle: str
    """What the provider calls it."""
    created: int
    """Seconds since 1970."""
    state: str
    lease: float
    """Seconds it lives on without its host."""


class Environment(ABC):
    """Starts sandboxes of one kind."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    spec_type: ClassVar[type[SandboxSpec]] = SandboxSpec
    """A subclass, where the provider has settings of its own beside the policy."""
    known_failures: ClassVar[Mapping[str, str]] = {}
    """Checks of rlm_core.conformance that this environment does not pass, and why."""

    def __init_subclass__(cls) -> None:
        capabilities = getattr(cls, "capabilities", None)
        if capabilities and (unknown := capabilities.enforces - SandboxSpec.model_fields.keys()):
            raise TypeError(f"{cls.__name__}.capabilities.enforces: no field is named {sorted(unknown)}")

    def __init__(self, spec: SandboxSpec) -> None:
        """Raises PolicyNotEnforceable for a field that is set and that this environment can't hold."""
        enforces = self.capabilities.enforces | HELD_EVERYWHERE
        for field in sorted((spec.model_fields_set & SandboxSpec.model_fields.keys()) - enforces):
            if getattr(spec, field) != SandboxSpec.model_fields[field].get_default(call_default_factory=True):
                raise PolicyNotEnforceable(
                    f"environment {self.name!r} can't enforce {field}={getattr(spec, field)!r}; "
                    f"it enforces: {', '.join(sorted(enforces))}"
                )
        self._spec = spec

    @property
    def spec(self) -> SandboxSpec:
        return self._spec

    @abstractmethod
    async def start(self) -> Sandbox:
        """Start a sandbox with an agent that serves.

        Raises:
            SandboxLost: it did not come up, and why; nothing is left running.
            EngineError: where it would run is not there, or refuses.
            PolicyNotEnforceable: the policy does not hold there; nothing is left running.
        """

    async def notes(self) -> list[str]:
        """What a user should know of where it would run: versions, and what is wrong with them."""
        return []

    async def attach(self, sandbox_id: str, token: str) -> Sandbox:
        """Take over a sandbox whose host has gone."""
        raise ConfigError(f"a sandbox of environment {self.name!r} ends with its host")

    async def running(self) -> list[RunningSandbox]:
        """Those of any host that are still there."""
        return []

    async def remove(self, sandbox_id: str) -> None:
        """End one, whoever has started it; quiet when it is gone."""
        raise ConfigError(f"a sandbox of environment {self.name!r} ends with its host")


def known_environments() -> list[str]:
    return sorted({point.name for point in entry_points(group=GROUP)})


def make_environment(name: str, kwargs: Mapping[str, Any]) -> Environment:
    """Find an environment by name and give it its policy.

    Raises:
        ConfigError: an unknown name or field, with what is known.
        MissingExtra: its SDK is not installed.
    """
    point = next((point for point in entry_points(group=GROUP) if point.name == name), None)
    if point is None:
        close = difflib.get_close_matches(name.lower(), known_environments(), 1)
        hint = f", did you mean {close[0]!r}?" if close else ";"
        if name in OF_THE_ORIGINAL:
            hint = " in this version: it is not there yet;"
        raise ConfigError(f"unknown environment {name!r}{hint} known: {', '.join(known_environments())}")
    kind = _load(point)
    return kind(parse_spec(kwargs, kind.spec_type))


def _load(point: EntryPoint) -> type[Environment]:
    """Raises MissingExtra for one of ours without its SDK, ConfigError for one that is broken."""
    try:
        kind = point.load()
    except Exception as error:  # noqa: BLE001 - whatever a third party's module does when it is imported
        if isinstance(error, ImportError) and point.dist is not None and point.dist.name == DISTRIBUTION:
            raise MissingExtra(f"environment {point.name!r}", point.name) from None
        raise ConfigError(f"environment {point.name!r} can't be loaded: {in_one_line(error)}") from None
    if not (isinstance(kind, type) and issubclass(kind, Environment)):
        raise ConfigError(f"environment {point.name!r}: {point.value} is no subclass of Environment")
    if missing := sorted(kind.__abstractmethods__):
        raise ConfigError(f"environment {point.name!r}: {point.value} has no {', '.join(missing)}")
    return kind


def parse_spec(kwargs: Mapping[str, Any], kind: type[SandboxSpec] = SandboxSpec) -> SandboxSpec:
    """Raises ConfigError that names each wrong field."""
    try:
        return kind(**kwargs)
    except ValidationError as error:
        raise ConfigError("; ".join(_wrong(each, kind) for each in error.errors())) from None


def _wrong(error: ErrorDetails, kind: type[SandboxSpec]) -> str:
    """One wrong field of the policy, in words."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, kind.model_fields, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        known = ", ".join(kind.model_fields)
        return f"environment_kwargs: there is no {name!r}{hint} (known: {known})"
    value = repr(error["input"])[:100]
    said = {
        "float_parsing": f"{value} is not a number; times are in seconds",
        "int_parsing": f"{value} is not a whole number",
        "byte_size": f"{value} is no size: a number of bytes, or text such as '2GiB'",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"environment_kwargs: {name}: {said}"


_running: dict[Sandbox, int] = {}


def track(sandbox: Sandbox) -> None:
    """End this sandbox when the interpreter exits, if nobody has by then."""
    _running[sandbox] = os.getpid()
    # Anew, to come before what SDKs that were loaded meanwhile do then: they close what is needed for it.
    atexit.unregister(_end_all)
    atexit.register(_end_all)


def untrack(sandbox: Sandbox) -> None:
    _running.pop(sandbox, None)


def _end_all() -> None:
    """All at once: a service that does not answer must not keep the others running."""
    # A forked child of the host inherits this list, not what is on it.
    ours = [sandbox for sandbox, owner in _running.items() if owner == os.getpid()]
    threads = [threading.Thread(target=_kill, args=(sandbox,), daemon=True) for sandbox in ours]
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _kill(sandbox: Sandbox) -> None:
    with contextlib.suppress(Exception):
        sandbox.kill()
