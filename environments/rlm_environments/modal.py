"""`environment="modal"`: a sandbox of Modal (gVisor), on the `modal` SDK, in your account.

The agent is a process in the sandbox (`Sandbox.exec`), and its stdin and stdout carry its configuration and
the signs of life of both sides. What it is asked goes one of two ways, `transport`:

- "h2" (default): through a tunnel of Modal to a port of the sandbox. gRPC on its own, the fastest way. Its
  address is public, with a name that can't be guessed: Modal ends TLS, and the agent answers only to this
  sandbox's token, which cells don't have. They can reach the port too, and so waste their own agent's time.
  The sandbox reaches nobody (`outbound_cidr_allowlist=[]`).
- "stdio": over the same stdin and stdout. Slower, but then there is no port, and the sandbox has no network
  of any kind (`block_network=True`, with which Modal allows no ports).

Needs MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, or `modal token new`.
"""

import asyncio
import contextlib
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import grpc.aio
import modal
import modal.exception
from grpclib.exceptions import StreamTerminatedError
from pydantic import Field

from rlm_core import limits
from rlm_core.environment import (
    Capabilities,
    Environment,
    Listed,
    RunningSandbox,
    SandboxSpec,
    track,
    untrack,
)
from rlm_core.errors import ConfigError, EngineError, RLMError, SandboxLost
from rlm_core.janitor import REMOVE, Janitor
from rlm_core.text import one_line, printable
from rlm_core.transport.tls import tls_channel
from rlm_environments import bundle, guest, posture
from rlm_environments.byte_stream import nothing_left_of
from rlm_environments.gvisor import GVISOR_MEMORY, process_space
from rlm_environments.stdin import StdinTransport

log = logging.getLogger("rlm_environments.modal")

PORT = 50_051
MEMORY = 4 << 30
CPUS = 2.0
MACHINE = "x86_64"
DAY = 24 * 3600
"""Seconds; the longest that Modal gives."""
SPARE_SECONDS = 600
"""That Modal lets it live beyond the lifetime that the agent keeps."""
LEASE_SECONDS = 60.0
CREATE_SECONDS = 1_800.0
"""The first use of an image builds it, which takes a minute or more; and Modal may ask to wait."""
UNKNOWN_SECONDS = 5.0
"""For a request to make a sandbox that nobody wants any more, so that it can be ended."""
SEARCHES, SEARCH_SECONDS = 5, 1.0
"""For what such a request has made, when it was not answered; seconds in between."""
TERMINATE_SECONDS = 40.0
LEAST_IDLE_SECONDS = 10
"""Between its start and that of the agent a sandbox is idle, too."""
APP = "rlm-sandbox"
"""That all sandboxes belong to; made when there is none."""
READY_SECONDS = 60
STOP_SECONDS = 5.0
REQUIREMENTS, FETCHED = "/opt/rlm/requirements.txt", "/.rlm-fetched"
"""In the builder."""
SYSTEM = tuple(
    map(
        PurePosixPath,
        (
            "/bin",
            "/dev",
            "/etc",
            "/lib",
            "/lib32",
            "/lib64",
            "/libx32",
            "/opt",
            "/proc",
            "/root",
            "/run",
            "/sbin",
            "/sys",
            "/tmp",
            "/usr",
            "/var",
        ),
    )
)
"""No volume is mounted above, at or below these."""
ERROR_CHARS = 300
"""Of what Modal says; of a build's, the end."""
TAG, TAG_ID, TAG_LEASE, TAG_CREATED = "rlm", "rlm-sandbox", "rlm-lease", "rlm-created"


class ModalSpec(SandboxSpec):
    """What only Modal has, beside the policy."""

    transport: Literal["h2", "stdio"] = "h2"
    """How the agent is reached; the module says what each means."""
    gpu: str | None = None
    region: Listed | None = None
    idle_timeout: float | None = Field(default=None, ge=10)
    """Seconds after which Modal ends a sandbox whose agent has ended; while that runs, it is never idle."""
    tags: Mapping[str, str] = Field(default_factory=dict)
    secrets: Listed = ()
    """Names of secrets of your account. Their variables are what cells find in their environment."""
    volumes: Mapping[str, str] = Field(default_factory=dict)
    """Names of volumes by the path where they are mounted, for reading only."""
    inbound_cidr_allowlist: Listed | None = Field(default=None, min_length=1)
    """Networks from which the tunnel may be reached, such as your own; None is any. (An empty list would be
    the same to Modal, and is refused.)"""


class ModalEnvironment(Environment):
    name: ClassVar[str] = "modal"
    spec_type: ClassVar[type[SandboxSpec]] = ModalSpec
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=True,
        enforces=frozenset(SandboxSpec.model_fields) - {"runtime", "disk", "pids"},
        summary="a sandbox of your account at Modal",
        lists=True,
        costs_money=True,
        snapshots=True,
    )
    _spec: ModalSpec

    async def start(self) -> "ModalSandbox":
        sandbox = ModalSandbox(self._spec)
        async with nothing_left_of(sandbox):
            async with asyncio.timeout(CREATE_SECONDS):
                with _errors():
                    arguments = _arguments(self._spec, sandbox.id)
                await sandbox.create(arguments)
            async with asyncio.timeout(limits.START_SECONDS + READY_SECONDS):
                posture.check(await sandbox.begin(), guest.expected(self._spec))
                await sandbox.connect()
                sandbox.open_gate(self._spec.allowlist)
        return sandbox

    async def running(self) -> list[RunningSandbox]:
        boxes = await _listed({TAG: "sandbox"})
        found = await asyncio.gather(*(_running(box) for box in boxes))
        return [each for each in found if each is not None]

    async def remove(self, sandbox_id: str) -> None:
        for box in await _listed({TAG_ID: sandbox_id}):
            await _ended(box)


class ModalSandbox(guest.GuestSandbox):
    called = "the sandbox at Modal"

    def __init__(self, spec: ModalSpec) -> None:
        super().__init__(Janitor.hire(*REMOVE).new_folder(), spec.lease or LEASE_SECONDS)
        self._spec = spec
        self._box: modal.Sandbox | None = None
        self._creating: asyncio.Task[modal.Sandbox] | None = None
        self._tunnel: tuple[str, int] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def create(self, arguments: Mapping[str, Any]) -> None:
        """Have it made. Once asked for, its id is waited for: it costs money."""
        app = await _asked(modal.App.lookup.aio(APP, create_if_missing=True))
        track(self)  # now that there is a client, which would be closed before us at exit
        with tempfile.TemporaryDirectory(prefix="rlm-agent-") as folder, _errors():
            image = await _image(self._spec, Path(folder)).build.aio(app)
        # Its first process has no variables, which everybody in it may be able to read.
        wait = ("env", "-i", "sleep", str(2 * DAY))
        create = modal.Sandbox.create.aio(*wait, app=app, image=image, **arguments)
        self._creating = asyncio.ensure_future(_asked(create))
        self._box = await asyncio.shield(self._creating)

    async def begin(self) -> dict[str, Any]:
        """Start the agent, which is in the image."""
        assert self._box is not None
        command = guest.command(self.lease, hidden="MODAL_")
        process = await _asked(self._box.exec.aio(*command, text=False, env={**guest.ENVIRONMENT}))

        async def send(data: bytes) -> None:
            process.stdin.write(data)
            await process.stdin.drain.aio()

        self.stdin = StdinTransport(send, self.link.set_stream_full, self.has_ended)
        self.follow(process.stdout, process.stderr, _explain)
        return await self.configure(self.stdin, _config(self._spec))

    async def connect(self) -> None:
        """Reach the agent, and what it listens on."""
        assert self._box is not None
        if self._spec.transport == "h2":
            await _asked(self._box.wait_until_ready.aio(timeout=READY_SECONDS))
            tunnels = await _asked(self._box.tunnels.aio())
            self._tunnel = tunnels[PORT].tls_socket
            await self.channel.close()
            self.channel = self.dial()
        await self.channel.channel_ready()

    def dial(self, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
        return tls_channel(*self._tunnel, options) if self._tunnel else super().dial(options)

    async def snapshot(self) -> str:
        """Keep its files as an image of Modal, for 30 days; gives its id, which `image` takes. Of cells, what
        they have in /tmp while their session is open.

        Raises:
            EngineError: Modal could not.
        """
        assert self._box is not None
        return str((await _asked(self._box.snapshot_filesystem.aio())).object_id)

    def on_silence(self) -> None:
        super().on_silence()
        if self._tunnel is not None:  # which may still work; without the other way nothing would end it
            self._ending = asyncio.ensure_future(self.stop())

    async def end(self) -> None:
        try:
            await self.close_link()
            await self.channel.close()
        finally:
            await self._terminate()
            if self.following:  # they end with the sandbox; the SDK complains of one that is left half read
                await asyncio.wait(self.following, timeout=STOP_SECONDS)
                for task in self.following:
                    task.cancel()

    async def _terminate(self) -> None:
        if self._creating is None:
            untrack(self)
            return
        try:
            async with asyncio.timeout(TERMINATE_SECONDS):
                for box in await self._boxes():
                    await _ended(box)
            untrack(self)
        except (RLMError, TimeoutError) as error:
            why = str(error) or f"no answer within {TERMINATE_SECONDS:g} s"
            log.warning("sandbox %s at Modal is not ended, and ends with its lease: %s", self.id, why)

    async def _boxes(self) -> list[modal.Sandbox]:
        """By its tag where its id never came: it may have been made all the same, also a little later."""
        assert self._creating is not None
        done, _ = await asyncio.wait([self._creating], timeout=UNKNOWN_SECONDS)
        if box := self._box_made():
            return [box]
        self._creating.cancel()
        found = await _listed({TAG_ID: self.id})
        if found or done:
            return found
        for _ in range(SEARCHES):
            await asyncio.sleep(SEARCH_SECONDS)
            if found := await _listed({TAG_ID: self.id}):
                return found
        log.warning(
            "Modal had not answered a request for sandbox %s when it was given up; if it is made all the "
            "same, it ends when it is idle",
            self.id,
        )
        return []

    def _box_made(self) -> modal.Sandbox | None:
        task = self._creating
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    def kill(self) -> None:
        """When the interpreter exits."""
        self.link.remove_folder()
        if box := self._box_made():
            box.terminate()


def _image(spec: ModalSpec, folder: Path) -> modal.Image:
    """A base, and layers upon it that Modal builds and keeps by what is in them: the agent's libraries,
    packages for cells, and the agent, whose files are laid out in `folder` for it. All of it is where it is
    in every environment.

    Its Python is the same version as ours, as always with Modal.
    """
    version = sys.version_info[:2]
    name = f"{version[0]}.{version[1]}"
    python = bundle.Python(version, f"/usr/local/bin/python{name}", MACHINE)
    if spec.image is None or spec.image == "minimal":
        base = modal.Image.debian_slim(python_version=name)
    elif spec.image.startswith("im-"):
        base = modal.Image.from_id(spec.image)
    else:
        base = modal.Image.from_registry(spec.image, add_python=name).entrypoint([])
    # What a command of the build is, no folder of the image decides in which cells may have written.
    base = base.env({"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"})
    # A snapshot has the Python of whoever made it, and what is kept in it is for users with other numbers.
    look = f"{python.executable} -I -c 'import sys; assert sys.version_info[:2] == {version}'"
    programs = f"/{bundle.VENV}/bin"
    links = [f"ln -sf {python.executable} {programs}/{each}" for each in ("python", "python3")]
    # Nobody but root may write to what root and other cells run.
    rights = f"chmod -R u=rwX,go=rX /{bundle.VENV} /opt/rlm && chmod 755 {guest.AGENT} && chmod -R a+rX /tmp"
    finish = f"{python.executable} -I -S /opt/rlm/finish.py"
    bundle.lay_out_agent(folder, python)
    requirements = bundle.image_file("requirements.txt")
    image = base.run_commands(look).dockerfile_commands(
        f"COPY {requirements.name} {REQUIREMENTS}",
        f"RUN {_install(python, bundle.LIBRARIES, '--require-hashes', '-r', REQUIREMENTS)}",
        context_dir=requirements.parent,
    )
    if spec.packages:
        image = image.run_commands(_install(python, bundle.site(python), *sorted(spec.packages)))
    return image.add_local_dir(folder, "/", copy=True).run_commands(
        f"mkdir -p {programs}", *links, rights, finish, *guest.SETUP
    )


def _install(python: bundle.Python, folder: str, *wanted: str) -> str:
    """A shell command: by this Python's own pip, whatever another image's `python` is, and into a new folder
    first, because pip would take away what a snapshot has in this one already."""
    options = ("--no-cache-dir", "--target", FETCHED, *bundle.WHEELS)
    pip = shlex.join([python.executable, "-I", "-m", "pip", "install", *options, *wanted])
    return f"{pip} && mkdir -p /{folder} && cp -a {FETCHED}/. /{folder} && rm -rf {FETCHED}"


def _arguments(spec: ModalSpec, sandbox_id: str) -> dict[str, Any]:
    """Of Sandbox.create. Raises ConfigError for what Modal does not take."""
    if ours := [name for name in spec.tags if name.startswith(TAG)]:
        raise ConfigError(f"tags: those that begin with {TAG!r} are ours: {', '.join(ours)}")
    if spec.image in ("data", "debian"):
        raise ConfigError(f"image={spec.image!r} is of container engines: name a public image, and packages")
    if spec.lifetime is not None and spec.lifetime > DAY - SPARE_SECONDS:
        raise ConfigError(f"lifetime={spec.lifetime:g}: at most {DAY - SPARE_SECONDS} s at Modal")
    if spec.transport == "stdio" and spec.inbound_cidr_allowlist is not None:
        raise ConfigError("inbound_cidr_allowlist is of the tunnel, and transport='stdio' has none")
    if spec.transport == "stdio" and spec.network == "full":
        raise ConfigError("transport='stdio' is for a sandbox without a network: not with network='full'")
    if over := [path for path in spec.volumes if _is_ours(PurePosixPath(path))]:
        raise ConfigError(f"volumes: {', '.join(over)} is the system's or ours: mount below /mnt or /data")
    lease = spec.lease or LEASE_SECONDS
    memory = math.ceil((spec.memory or MEMORY) / (1 << 20))
    whole = memory + (GVISOR_MEMORY >> 20)
    cpus = spec.cpus or CPUS
    arguments: dict[str, Any] = {
        # What is asked for is the limit as well, but for what gVisor takes.
        "cpu": (cpus, cpus),
        "memory": (memory, whole),
        "gpu": spec.gpu,
        "region": spec.region,
        # The agent keeps the exact lifetime; Modal's own is for an agent that does not.
        "timeout": math.ceil(spec.lifetime or DAY - SPARE_SECONDS) + SPARE_SECONDS,
        # An agent without a host ends when its lease is over, and what then is idle costs money no longer.
        "idle_timeout": math.ceil(spec.idle_timeout or max(lease, LEAST_IDLE_SECONDS)),
        "tags": {
            TAG: "sandbox",
            TAG_ID: sandbox_id,
            TAG_LEASE: f"{lease:g}",
            TAG_CREATED: str(int(time.time())),
            **spec.tags,
        },
        "secrets": [modal.Secret.from_name(name) for name in spec.secrets],
        "volumes": {
            path: modal.Volume.from_name(name).with_mount_options(read_only=True)
            for path, name in spec.volumes.items()
        },
    }
    if spec.transport == "stdio":
        return {**arguments, "block_network": True}
    if spec.network != "full":  # hosts that are listed are reached through the agent
        arguments["outbound_cidr_allowlist"] = []
    if spec.inbound_cidr_allowlist is not None:
        arguments["inbound_cidr_allowlist"] = list(spec.inbound_cidr_allowlist)
    return {**arguments, "h2_ports": [PORT], "readiness_probe": modal.Probe.with_tcp(PORT)}


def _is_ours(path: PurePosixPath) -> bool:
    """Whether what is mounted there could be run by root, or hide what is."""
    related = any(path == each or path in each.parents or each in path.parents for each in SYSTEM)
    return (
        related or ".." in path.parts or path.root != "/"
    )  # two slashes are kept, and are a root of their own


async def _listed(tags: dict[str, str]) -> list[modal.Sandbox]:
    """Those that run; none when there is no App of ours yet."""
    try:
        found = await _asked(modal.App.lookup.aio(APP))
    except NoSuchThing:
        return []

    async def every() -> list[modal.Sandbox]:
        return [box async for box in modal.Sandbox.list.aio(app_id=found.app_id, tags=tags)]

    return list(await _asked(every()))


async def _ended(box: modal.Sandbox) -> None:
    with contextlib.suppress(NoSuchThing, SandboxLost):  # it is gone
        await _asked(box.terminate.aio())


async def _running(box: modal.Sandbox) -> RunningSandbox | None:
    """None for one that has gone since it was listed."""
    try:
        tags: dict[str, str] = await _asked(box.get_tags.aio())
    except NoSuchThing:
        return None
    return RunningSandbox(
        id=tags.get(TAG_ID, ""),
        handle=box.object_id,
        created=int(tags.get(TAG_CREATED, "0")),
        state="running",
        lease=float(tags.get(TAG_LEASE, "0")),
    )


def _config(spec: ModalSpec) -> dict[str, Any]:
    # A GPU's driver reserves far more address space than it uses.
    space = 0 if spec.gpu else process_space(int(spec.memory or MEMORY))
    return guest.config(spec, port=PORT if spec.transport == "h2" else 0, process_space=space)


class NoSuchThing(EngineError):
    """What was asked for by its name or id is not there."""


async def _asked(request: Awaitable[Any]) -> Any:
    with _errors():
        return await request


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Raises our errors in the place of the SDK's."""
    try:
        yield
    except modal.exception.AuthError as error:
        raise ConfigError(_explain(error)) from None
    except modal.exception.NotFoundError as error:
        raise NoSuchThing(_explain(error)) from None
    except (modal.exception.SandboxTerminatedError, modal.exception.SandboxTimeoutError) as error:
        raise SandboxLost(_explain(error)) from None
    except (modal.exception.Error, StreamTerminatedError, OSError) as error:
        raise EngineError(_explain(error)) from None


def _explain(error: Exception) -> str:
    if isinstance(error, modal.exception.ImageBuildError):
        end = " ".join(printable(str(error)).split())[-ERROR_CHARS:]
        logs = f"modal image logs {error.image_id}"
        return f"Modal could not build the image: {end}{'' if logs in end else f' (all of it: {logs})'}"
    line = one_line(printable(str(error) or type(error).__name__), ERROR_CHARS)
    if isinstance(error, modal.exception.AuthError):
        why = "there is no token" if "Token missing" in line else f"the token is refused ({line})"
        return f"Modal: {why}: set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, or run: modal token new"
    if isinstance(error, (modal.exception.ConnectionError, ConnectionError, TimeoutError)):
        return f"Modal can't be reached: {line}"
    if isinstance(error, OSError):
        return line  # of this machine
    if isinstance(error, modal.exception.ResourceExhaustedError):
        return f"Modal: the account's limit is reached: wait, or start fewer at once ({line})"
    return f"Modal refused: {line}"
