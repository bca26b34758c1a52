"""`environment="prime"`: sandboxes of Prime Intellect, which are virtual machines of your account there.

The agent is a process of the machine's root, and its stdin and stdout are the way to it (`open_process` of
the SDK): nothing is exposed, and the machine has no network unless the policy says so. The SDK loses output
while it connects again; the envelope of our stream asks for it once more (rlm_agent/rpc/envelope.py).

Needs PRIME_API_KEY, or `prime login`.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import shlex
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, ClassVar

from prime_sandboxes import (
    APIError,
    AsyncSandboxClient,
    CreateSandboxRequest,
    PaymentRequiredError,
    UnauthorizedError,
)
from prime_sandboxes import Sandbox as PrimeBox
from prime_sandboxes.exceptions import SandboxNotRunningError
from prime_sandboxes.process import AsyncSandboxProcess
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
from rlm_core.tasks import finish_first
from rlm_core.text import one_line, printable
from rlm_environments import bundle, guest, posture
from rlm_environments.byte_stream import nothing_left_of
from rlm_environments.stdin import StdinTransport

log = logging.getLogger("rlm_environments.prime")

IMAGE = "python:3.12-slim"
MEMORY = 4 << 30
PROCESS_SHARE = 0.75
"""Of the machine's memory that one process may have: when all is gone, its kernel ends whom it likes."""
CPUS = 2.0
DISK = 8 << 30
GIB = 1 << 30
LIFETIME_MINUTES = 24 * 60
"""The longest that Prime gives."""
START_MINUTES = 30
LEASE_SECONDS = 60.0
CREATE_SECONDS = 1_800.0
"""The first use of an image builds a machine's image, which takes minutes."""
COMMAND_SECONDS = 120
LABEL = "rlm"
LABEL_OF_ONE = "rlm-sandbox-"
BUNDLE = "/tmp/.rlm-bundle.tar.gz"


class PrimeSpec(SandboxSpec):
    """What only Prime has, beside the policy."""

    region: str | None = None
    gpu_type: str | None = None
    gpu_count: int = Field(default=0, ge=0)
    idle_timeout: float | None = Field(default=None, ge=60)
    """Seconds without a process's output or input after which Prime ends the sandbox."""
    labels: Listed = ()
    """Of your own, beside ours."""


class PrimeEnvironment(Environment):
    name: ClassVar[str] = "prime"
    spec_type: ClassVar[type[SandboxSpec]] = PrimeSpec
    capabilities: ClassVar[Capabilities] = Capabilities(
        isolated=True,
        enforces=frozenset(SandboxSpec.model_fields) - {"runtime"},
        summary="a virtual machine of your account at Prime Intellect",
        lists=True,
        costs_money=True,
    )
    _spec: PrimeSpec

    async def start(self) -> "PrimeSandbox":
        sandbox = PrimeSandbox(_client(), self._spec)
        async with nothing_left_of(sandbox):
            async with asyncio.timeout(CREATE_SECONDS):
                await sandbox.create(_request(self._spec, sandbox.id))
            async with asyncio.timeout(limits.START_SECONDS + COMMAND_SECONDS + bundle.PIP_SECONDS):
                posture.check(await sandbox.begin(), guest.expected(self._spec))
                await sandbox.channel.channel_ready()
                sandbox.open_gate(self._spec.allowlist)
        return sandbox

    async def running(self) -> list[RunningSandbox]:
        async with _closing(_client()) as client:
            return [_running(box) for box in await _all(client, [LABEL])]

    async def remove(self, sandbox_id: str) -> None:
        async with _closing(_client()) as client:
            for box in await _all(client, [LABEL_OF_ONE + sandbox_id]):
                await _asked(client.delete(box.id))


class PrimeSandbox(guest.GuestSandbox):
    called = "the sandbox at Prime"

    def __init__(self, client: AsyncSandboxClient, spec: PrimeSpec) -> None:
        super().__init__(Janitor.hire(*REMOVE).new_folder(), spec.lease or LEASE_SECONDS)
        self._client = client
        self._spec = spec
        self._box = ""
        self._creating: asyncio.Task[PrimeBox] | None = None
        self._process: AsyncSandboxProcess | None = None

    async def create(self, request: CreateSandboxRequest) -> None:
        """Have it made, and wait until it runs. Once asked for, its id is waited for: it costs money."""
        track(self)
        self._creating = asyncio.ensure_future(_asked(self._client.create(request)))
        self._box = (await finish_first(_of(self._creating))).id
        await _asked(self._client.wait_for_creation(self._box))

    async def begin(self) -> dict[str, Any]:
        """Bring the agent in, and start it."""
        python = await self._look()
        packed = await asyncio.to_thread(bundle.tarball, python, tuple(sorted(self._spec.packages or ())))
        await _asked(self._client.upload_bytes(self._box, BUNDLE, packed, "bundle.tar.gz"))
        await self._run("\n".join(["set -e", *guest.unpack(BUNDLE)]))
        command = f"exec {shlex.join(guest.command(self.lease, hidden='PRIME_'))}"
        process: AsyncSandboxProcess = await _asked(
            self._client.open_process(self._box, command, env=guest.ENVIRONMENT)
        )
        self._process = process
        self.stdin = StdinTransport(process.write_stdin, self.link.set_stream_full, self.has_ended)
        self.follow(process.stdout, process.stderr, _explain)
        memory = int((self._spec.memory or MEMORY) * PROCESS_SHARE)
        return await self.configure(self.stdin, guest.config(self._spec, process_memory=memory))

    async def _look(self) -> bundle.Python:
        """Raises ConfigError: there is no Python that the agent can run on."""
        output = await self._run(f"python3 -I -c '{bundle.LOOK}'")
        python = bundle.Python.parse(output)
        if python is None:
            raise ConfigError(f"image={self._spec.image!r} has no python3 that runs")
        if python.version < (3, 11):
            raise ConfigError(f"image={self._spec.image!r} has a Python before 3.11")
        return python

    async def _run(self, command: str) -> str:
        done = await _asked(self._client.execute_command(self._box, command, timeout=COMMAND_SECONDS))
        if done.exit_code:
            raise SandboxLost(f"a command of the start failed: {one_line(printable(done.stderr), 300)}")
        return str(done.stdout)

    async def end(self) -> None:
        try:
            for task in self.following:
                task.cancel()
            await self.close_link()
        finally:
            await self._delete()
        if self._process is not None:
            self._process._remote_exited = True  # else it would be told to end, which takes seconds
            await self._process.aclose()
        await self._client.aclose()

    async def _delete(self) -> None:
        """By its label where its id never came: it may have been made all the same."""
        if self._creating is None:
            return
        try:
            boxes = [self._box] if self._box else []
            with contextlib.suppress(RLMError):
                boxes = boxes or [(await _of(self._creating)).id]
            boxes = boxes or [box.id for box in await _all(self._client, [LABEL_OF_ONE + self.id])]
            for box in boxes:
                await _asked(self._client.delete(box))
            untrack(self)
        except RLMError as error:
            if self._box:  # else it was most likely never made
                log.warning("sandbox %s at Prime is not deleted, and ends with its lease: %s", self.id, error)

    def kill(self) -> None:
        """When the interpreter exits: with the synchronous client, which needs no event loop."""
        self.link.remove_folder()
        if self._box:
            from prime_sandboxes import APIClient, SandboxClient

            with contextlib.suppress(APIError, RuntimeError):
                SandboxClient(APIClient()).delete(self._box)


def _request(spec: PrimeSpec, sandbox_id: str) -> CreateSandboxRequest:
    """Raises ConfigError for what Prime does not take."""
    if ours := [label for label in spec.labels if label.startswith(LABEL)]:
        raise ConfigError(f"labels: those that begin with {LABEL!r} are ours: {', '.join(ours)}")
    if spec.image in ("data", "debian"):
        raise ConfigError(f"image={spec.image!r} is of container engines: name a public image, and packages")
    if spec.lifetime is not None and spec.lifetime > LIFETIME_MINUTES * 60:
        raise ConfigError(f"lifetime={spec.lifetime:g}: at most {LIFETIME_MINUTES * 60} s at Prime")
    # The agent keeps the exact lifetime; Prime's own is for an agent that does not.
    minutes = math.ceil((spec.lifetime or LIFETIME_MINUTES * 60) / 60)
    minutes = min(minutes + START_MINUTES, LIFETIME_MINUTES)
    # An agent without a host ends when its lease is over, and what then is idle costs money no longer.
    # While its packages are fetched, it has nothing to do.
    least = max(spec.lease or LEASE_SECONDS, bundle.PIP_SECONDS if spec.packages else 0)
    idle = min(math.ceil((spec.idle_timeout or least) / 60), minutes)
    try:
        return CreateSandboxRequest(
            name=f"rlm-{sandbox_id}",
            checkpoint_id=None,
            docker_image=IMAGE if spec.image in (None, "minimal") else spec.image,
            cpu_cores=spec.cpus or CPUS,
            memory_gb=(spec.memory or MEMORY) / GIB,
            disk_size_gb=(spec.disk or DISK) / GIB,
            gpu_type=spec.gpu_type,
            gpu_count=spec.gpu_count or (1 if spec.gpu_type else 0),
            region=spec.region,
            timeout_minutes=minutes,
            idle_timeout_minutes=idle,
            network_allowlist=None if spec.network == "full" else [],
            labels=[
                LABEL,
                LABEL_OF_ONE + sandbox_id,
                f"rlm-lease-{spec.lease or LEASE_SECONDS:g}",
                *spec.labels,
            ],
            idempotency_key=secrets.token_hex(16),
        )
    except ValueError as error:
        raise ConfigError(f"environment 'prime': {one_line(str(error), 300)}") from None


def _client() -> AsyncSandboxClient:
    """Raises ConfigError without a key."""
    try:
        client = AsyncSandboxClient()
        if not client.client.config.api_key:
            raise ConfigError("environment 'prime' has no key: set PRIME_API_KEY, or run: prime login")
        return client
    except APIError as error:
        raise ConfigError(f"environment 'prime': {one_line(printable(str(error)), 300)}") from None


@contextlib.asynccontextmanager
async def _closing(client: AsyncSandboxClient) -> AsyncIterator[AsyncSandboxClient]:
    try:
        yield client
    finally:
        await client.aclose()


async def _all(client: AsyncSandboxClient, labels: Sequence[str]) -> list[PrimeBox]:
    found: list[PrimeBox] = []
    page = 1
    while True:
        answer = await _asked(client.list(labels=list(labels), page=page, exclude_terminated=True))
        found += answer.sandboxes
        if not answer.has_next:
            return found
        page += 1


def _running(box: PrimeBox) -> RunningSandbox:
    of = {label.rpartition("-")[0]: label.rpartition("-")[2] for label in box.labels}
    return RunningSandbox(
        id=of.get(LABEL_OF_ONE.rstrip("-"), ""),
        handle=box.id,
        created=int(box.created_at.timestamp()),
        state=box.status.lower(),
        lease=float(of.get("rlm-lease", 0)),
    )


async def _of(task: "asyncio.Task[Any]") -> Any:
    return await task


async def _asked(request: Coroutine[Any, Any, Any]) -> Any:
    """Raises our errors in the place of the SDK's."""
    try:
        return await request
    except SandboxNotRunningError as error:
        raise SandboxLost(one_line(printable(str(error)), 300)) from None
    except Exception as error:  # noqa: BLE001 - the SDK lets those of its libraries through
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # which one of them makes an error of its own
            raise asyncio.CancelledError from None
        raise EngineError(_explain(error)) from None


def _explain(error: Exception) -> str:
    line = one_line(printable(str(error) or type(error).__name__), 300)
    if isinstance(error, UnauthorizedError):
        return f"Prime: the key is refused: set PRIME_API_KEY, or run: prime login ({line})"
    if isinstance(error, PaymentRequiredError):
        return f"Prime: the account has no funds ({line})"
    if "ConnectError" in line or "ConnectTimeout" in line:
        return f"Prime can't be reached: {line.rpartition(': ')[2]}"
    if "HTTP 429" in line:
        return f"Prime: too many requests, after several attempts: wait, or start fewer at once ({line})"
    return f"Prime refused: {line}"
