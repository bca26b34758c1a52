"""`environment="docker"`: untrusted code in a container that has no network and nothing to steal.

The engine may be local, remote or rootless: all that is needed of it is a container's stdin and stdout
(containers/stream.py), and a local one can be gone past (containers/shortcut.py). The profile is in
containers/profile.py; what the sandbox finds when it looks around is compared with it before anything runs.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import docker.errors
from rlm_agent.folders import CONTEXT_FOLDER, NOTE, SHORTCUT

from rlm_core import limits
from rlm_core.environment import (
    Capabilities,
    Environment,
    RunningSandbox,
    SandboxSpec,
    track,
    untrack,
)
from rlm_core.errors import EngineError, PolicyNotEnforceable, RLMError, SandboxLost
from rlm_core.janitor import Janitor
from rlm_core.tasks import finish_first
from rlm_core.uploads import CONTEXT_MODE
from rlm_environments import posture
from rlm_environments.byte_stream import ByteStreamSandbox, nothing_left_of
from rlm_environments.containers import image, profile
from rlm_environments.containers.engine import LABEL, Engine
from rlm_environments.containers.progress import steps
from rlm_environments.containers.shortcut import Shortcut
from rlm_environments.containers.stream import STDOUT, AttachedStream, plain_socket

log = logging.getLogger("rlm_environments.docker")
T = TypeVar("T")

LEASE_SECONDS = 60.0
REAP = "rlm_environments.containers.reap"
SOON_NANOSECONDS = 2_000_000_000
BAD_REQUEST = 400
CONFLICT = 409
"""Of the engine's API: the removal of a container is already in progress."""
_building = threading.Lock()


class DockerEnvironment(Environment):
    name: ClassVar[str] = "docker"
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=True,
        enforces=frozenset(SandboxSpec.model_fields),
        summary="a container without network, capabilities or a writable mount",
        lists=True,
        attaches=True,
    )

    async def start(self) -> "DockerSandbox":
        engine = await self._connect()
        tag = await asyncio.to_thread(self._ensure_image, engine)
        asked = await asyncio.to_thread(profile.Profile.of, self.spec, engine)
        sandbox = DockerSandbox(engine, asked, self.spec)
        async with nothing_left_of(sandbox), asyncio.timeout(limits.START_SECONDS):
            await sandbox.create(tag)
            posture.check(await sandbox.begin(), asked.expected())
            await sandbox.channel.channel_ready()  # connected, so that a warm one is warm
            sandbox.open_gate(asked.allowlist)
        return sandbox

    async def notes(self) -> list[str]:
        return await asyncio.to_thread(lambda: Engine.connect().notes())

    async def attach(self, sandbox_id: str, token: str) -> "DockerSandbox":
        """Take over a sandbox whose host has gone, or that another process has started."""
        engine = await self._connect()
        asked = await asyncio.to_thread(profile.Profile.of, self.spec, engine)
        sandbox = DockerSandbox(engine, asked, self.spec, sandbox_id=sandbox_id, token=token)
        try:
            await sandbox.take_over()
            sandbox.open_gate(asked.allowlist)
            return sandbox
        except BaseException:
            await finish_first(sandbox.let_go())
            raise

    async def running(self) -> list[RunningSandbox]:
        engine = await self._connect()
        return await asyncio.to_thread(_running, engine)

    async def remove(self, sandbox_id: str) -> None:
        engine = await self._connect()
        for each in await asyncio.to_thread(_running, engine):
            if each.id == sandbox_id:
                await asyncio.to_thread(_remove, engine, each.handle)

    async def _connect(self) -> Engine:
        engine = await asyncio.to_thread(Engine.connect)
        await asyncio.to_thread(engine.check, self.spec.runtime)
        return engine

    def _ensure_image(self, engine: Engine) -> str:
        """Build on first use; a second start of this process waits for the first one's build."""
        packages = self.spec.packages or ()
        tag = image.find(engine, self.spec.image, packages)
        if tag is not None:
            return tag
        with _building:
            tag = image.find(engine, self.spec.image, packages)
            if tag is None:
                what = image.recipe(self.spec.image, packages, image.usual_base(engine))
                with steps() as say:
                    tag = image.build(engine, what, say)
            return tag


class DockerSandbox(ByteStreamSandbox):
    called = "the container"

    def __init__(
        self,
        engine: Engine,
        asked: profile.Profile,
        spec: SandboxSpec,
        *,
        sandbox_id: str = "",
        token: str = "",
    ) -> None:
        janitor = Janitor.hire(sys.executable, "-I", "-m", REAP)
        lease = spec.lease or LEASE_SECONDS
        super().__init__(janitor.new_folder(), lease, sandbox_id=sandbox_id, token=token)
        self.container = ""
        self._engine = engine
        self._asked = asked
        self._spec = spec
        self._host = janitor.folder.name
        self._stream: AttachedStream | None = None
        self._shortcut = Shortcut(self.on_stdout, self.link.set_stream_full, self._on_shortcut_lost)
        self._stopping = False
        self._reattaching: asyncio.Task[None] | None = None

    async def create(self, tag: str) -> None:
        """Create the container, attach, and start it."""
        context = await asyncio.to_thread(self._make_context_folder) if self._engine.is_local else None
        with contextlib.suppress(OSError):  # all goes over stdio, then
            if context is not None:
                self._shortcut.listen(context / SHORTCUT)
        track(self)
        self.container = await self._in_thread(lambda: self._create(tag, context))
        await self._attach()
        await self._in_thread(lambda: self._engine.api.start(self.container))

    def _labels(self) -> dict[str, str]:
        return {
            LABEL: "sandbox",
            "rlm.session": self.id,
            "rlm.lease": f"{self.lease:g}",
            "rlm.host": self._host,
            "rlm.network": _network(self._spec),
        }

    def _create(self, tag: str, context: Path | None) -> str:
        create: Any = self._engine.api.create_container_from_config
        body = profile.container(
            self._asked, self._engine, image=tag, labels=self._labels(), lease=self.lease, context=context
        )
        try:
            made = create(body, name=f"rlm-{self.id}")
        except docker.errors.APIError as error:
            if error.status_code != BAD_REQUEST or context is None or "mount" not in str(error).lower():
                raise
            # It can't see our folder: an engine of another user, or with a file system of its own.
            log.info("contexts are streamed to the container: %s", error)
            return self._create(tag, None)
        return str(made["Id"])

    def _make_context_folder(self) -> Path:
        """The only mount: read-only for the container, and below a folder that only we can enter."""
        folder = self.link.folder / "context"
        folder.mkdir(mode=0o755)
        folder.chmod(0o711)  # whatever the umask
        (folder / NOTE).write_text(self.id)
        (folder / NOTE).chmod(CONTEXT_MODE)
        return folder

    async def begin(self) -> dict[str, Any]:
        """Configure the agent; what it says of itself and found out."""
        assert self._stream is not None
        config = {
            "folder": f"{profile.RUN_FOLDER}/agent",
            "incoming": "/tmp/.incoming",
            "calls": "/tmp/.calls",
            "work": "/tmp",
            "shared": CONTEXT_FOLDER,
            "shortcut": f"{CONTEXT_FOLDER}/{SHORTCUT}",
            "proxy_port": profile.PROXY_PORT if self._asked.allowlist is not None else 0,
            "start_ahead": True,
            "lifetime": self._spec.lifetime or 0.0,
            "processes": self._asked.pids,
            "process_memory": 0,
            "process_space": self._asked.process_space,
        }
        greeting = await self.configure(self._stream.transport, config)
        if greeting.get("shared") == self.id:
            self.shared_folder = self.link.folder / "context"
        return greeting

    async def stream_after(self, greeting: Mapping[str, Any]) -> asyncio.WriteTransport | None:
        shortcut = await self._shortcut.connection(is_made=greeting.get("shortcut") is True)
        return shortcut or (self._stream.transport if self._stream is not None else None)

    async def take_over(self) -> None:
        found = {each.id: each for each in await asyncio.to_thread(_running, self._engine)}
        if self.id not in found:
            raise SandboxLost(f"no sandbox {self.id} runs in the engine at {self._engine.address}")
        self.container = found[self.id].handle
        await asyncio.to_thread(self._check_network)
        self.link.lease = found[self.id].lease
        await self._attach()
        assert self._stream is not None
        await self.link.resume(self._stream.transport)
        try:
            async with asyncio.timeout(limits.WELCOME_SECONDS):
                await self.link.welcomed()
        except TimeoutError:
            raise SandboxLost(f"the agent of sandbox {self.id} does not answer; is this its token?") from None

    def _check_network(self) -> None:
        """Raises PolicyNotEnforceable: whoever takes it over can't change which hosts it may reach."""
        with self._engine.errors():
            labels = self._engine.api.inspect_container(self.container)["Config"]["Labels"]
        has, asked = labels.get("rlm.network"), _network(self._spec)
        if has != asked:
            raise PolicyNotEnforceable(f"sandbox {self.id} was started with network={has}, not {asked}")

    async def stop(self) -> None:
        await self.let_go()
        with contextlib.suppress(EngineError):  # the container ends by itself when its lease is over
            await asyncio.to_thread(self._remove)
        untrack(self)

    async def let_go(self) -> None:
        """Leave the container to itself, and to its lease."""
        self._stopping = True
        if self._reattaching is not None:
            self._reattaching.cancel()
        await self.close_link()
        self._shortcut.close()
        if self._stream is not None:
            self._stream.transport.abort()
            await self._stream.closed.wait()

    def kill(self) -> None:
        self._stopping = True
        self.link.remove_folder()
        with contextlib.suppress(RLMError):
            self._remove()

    def _remove(self) -> None:
        """Not one that another host has now, by the word of the agent; no cell can put it into its mouth."""
        if not self.link.is_taken:
            _remove(self._engine, self.container or f"rlm-{self.id}")

    # -- the byte stream

    async def _attach(self) -> None:
        params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        made: list[socket.socket] = []

        def attach() -> None:
            made.append(plain_socket(self._engine.api.attach_socket(self.container, params=params)))

        stream = AttachedStream(self._on_output, self.link.set_stream_full, self._on_lost)
        try:
            await self._in_thread(attach)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: stream, made[0])
        except BaseException:
            for sock in made:
                sock.close()
            raise
        self._stream = stream

    def _on_output(self, kind: int, data: memoryview) -> None:
        (self.on_stdout if kind == STDOUT else self.on_stderr)(data)

    def on_silence(self) -> None:
        """Nothing has come for a lease, although the agent shows life: try another connection."""
        if self._stream is not None and not self.ended.is_set():
            self._stream.transport.abort()

    def _on_shortcut_lost(self) -> None:
        """Go on over stdio, or hear there that the container has ended, and why."""
        if self._stream is not None and not self._stream.closed.is_set() and not self._stopping:
            self.link.move(self._stream.transport)

    def _on_lost(self) -> None:
        """The attach connection has ended, and with it the container or only the connection."""
        self._shortcut.close()
        self.link.disconnected(self._how_it_ended())
        if not self._stopping and self._reattaching is None:
            self._reattaching = asyncio.ensure_future(self._reattach())

    async def _reattach(self) -> None:
        try:
            async with asyncio.timeout(limits.REATTACH_SECONDS):
                delay = 0.05
                while not self.ended.is_set() and await asyncio.to_thread(self._is_running):
                    with contextlib.suppress(EngineError):
                        await self._attach()
                        if not await asyncio.to_thread(self._is_running):
                            break  # the stream of a container that ended before is silent for ever
                        assert self._stream is not None
                        await self.link.resume(self._stream.transport)
                        if not self._stream.closed.is_set():  # else it broke again meanwhile
                            self._reattaching = None
                            return
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 2.0)
            self.has_ended(await asyncio.to_thread(_cause, self._engine, self.container))
        except (TimeoutError, EngineError) as error:
            self.has_ended(str(error) or "the engine does not answer")

    def has_ended(self, why: str) -> None:
        self._stopping = True
        super().has_ended(why)
        if self._stream is not None:
            self._stream.transport.abort()

    def _is_running(self) -> bool:
        """Raises EngineError when the engine can't tell."""
        with self._engine.errors():
            found = self._engine.api.containers(filters={"id": self.container})
        return any(each.get("State") == "running" for each in found)

    async def _in_thread(self, action: Callable[[], T]) -> T:
        """Ask the engine; what was begun is waited for, so that a container can't come up unseen."""

        def asked() -> T:
            with self._engine.errors():
                return action()

        return await finish_first(asyncio.to_thread(asked))


def _network(spec: SandboxSpec) -> str:
    network = spec.network or "none"
    return network if isinstance(network, str) else ",".join(network)


def _running(engine: Engine) -> list[RunningSandbox]:
    with engine.errors():
        found = engine.api.containers(all=True, filters={"label": f"{LABEL}=sandbox"})
    return [
        RunningSandbox(
            id=str(each["Labels"].get("rlm.session")),
            handle=str(each["Id"]),
            created=int(each.get("Created") or 0),
            state=str(each.get("Status") or ""),
            lease=float(each["Labels"].get("rlm.lease") or 0),
        )
        for each in found
    ]


def _cause(engine: Engine, container: str) -> str:
    """Why a container has ended, as far as the engine's events tell."""
    times: dict[str, int] = {}
    filters = {"container": container, "event": ["oom", "kill", "die"]}
    with engine.errors():
        for event in engine.api.events(since=1, until=int(time.time()) + 1, filters=filters, decode=True):
            times[str(event.get("status"))] = int(event.get("timeNano") or 0)
            if "die" in times:
                break
    if times.get("oom", 0) > times.get("die", 0) - SOON_NANOSECONDS > 0:
        return "it ran out of memory, and the kernel ended its agent; set memory to more"
    return "it was ended from outside" if "kill" in times else ""


def _remove(engine: Engine, container: str) -> None:
    """Quiet for one that is gone, or going."""
    with engine.errors():
        try:
            engine.api.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            pass
        except docker.errors.APIError as error:
            if error.status_code != CONFLICT:
                raise
