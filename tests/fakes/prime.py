"""Prime Intellect's service, as far as its SDK speaks to it, on loopback: REST for sandboxes, Connect RPC for
processes. Its "virtual machines" are those of tests/fakes/machines.py, without a network.

The protocol is that of prime-sandboxes 0.5.1, whose wheel has the messages. As with the real one, output of a
process that comes while its stream is broken is lost. A minute is shorter here.
"""

import asyncio
import contextlib
import datetime
import json
import secrets
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prime_sandboxes._proto.command_session import command_session_pb2

from tests.fakes.machines import Containers, Machines

pb: Any = command_session_pb2
MINUTE = 4.0
"""Seconds."""
KEY = "pk-test"
END_OF_STREAM = 2
RPC = "/gateway/{user}/{job}/command_session.CommandSession"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Process:
    """One command session: a process whose output goes to the stream that is attached, or nowhere."""

    process: asyncio.subprocess.Process
    attached: "asyncio.Queue[Any] | None" = None
    exit_code: int | None = None
    inputs: set[str] = field(default_factory=set)
    pump: "asyncio.Future[None] | None" = None

    def tell(self, **event: Any) -> None:
        if self.attached is not None:
            self.attached.put_nowait(pb.CommandSessionEvent(**event))


@dataclass
class Machine:
    id: str
    request: dict[str, Any]
    container: str = ""
    status: str = "PENDING"
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    processes: dict[str, Process] = field(default_factory=dict)
    created: float = 0.0
    active: float = 0.0
    """When there was the last input or output."""

    def to_json(self) -> dict[str, Any]:
        asked, now = self.request, datetime.datetime.now(datetime.UTC).isoformat()
        return {
            "id": self.id,
            "name": asked["name"],
            "dockerImage": asked["docker_image"],
            "cpuCores": asked["cpu_cores"],
            "memoryGB": asked["memory_gb"],
            "diskSizeGB": asked["disk_size_gb"],
            "diskMountPath": "/",
            "gpuCount": asked["gpu_count"],
            "status": self.status,
            "timeoutMinutes": asked["timeout_minutes"],
            "labels": asked["labels"],
            "createdAt": now,
            "updatedAt": now,
        }


class FakePrime:
    """Runs in a thread of its own. `url` is for PRIME_API_BASE_URL."""

    def __init__(self, machines: Machines | None = None) -> None:
        self.url = ""
        self.boxes = machines or Containers("prime")
        self.machines: dict[str, Machine] = {}
        self.by_idempotency_key: dict[str, str] = {}
        self.requests: list[str] = []
        self.create_seconds = 0.0
        self.minute = MINUTE
        self.refuse_next: list[int] = []
        """Statuses with which the next requests to make a sandbox are refused."""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._booting: list[asyncio.Future[None]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    def __enter__(self) -> "FakePrime":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    # -- faults

    def drop_streams(self) -> None:
        """Break every stream of output; what is written before the SDK is back is lost."""
        self._loop.call_soon_threadsafe(self._drop_streams)

    def _drop_streams(self) -> None:
        for machine in self.machines.values():
            for process in machine.processes.values():
                if process.attached is not None:
                    process.attached.put_nowait(None)
                    process.attached = None

    def expire_tokens(self) -> None:
        """The gateway refuses the tokens that it gave so far."""
        for machine in self.machines.values():
            machine.token = secrets.token_hex(8)

    def terminate(self, machine_id: str, status: str = "TERMINATED") -> None:
        """End a sandbox as the service does, whatever runs in it."""
        ending = asyncio.run_coroutine_threadsafe(self._end(self.machines[machine_id], status), self._loop)
        ending.result(20)

    # -- the service

    async def _main(self) -> None:
        app = web.Application(
            middlewares=[self._check], client_max_size=1 << 30, handler_args={"handler_cancellation": True}
        )
        api, rpc = "/api/v1/sandbox", RPC
        app.router.add_post(api, self._create)
        app.router.add_get(api, self._list)
        app.router.add_post(f"{api}/status:batchGet", self._statuses)
        app.router.add_get(api + "/{id}", self._get)
        app.router.add_delete(api + "/{id}", self._delete)
        app.router.add_post(api + "/{id}/auth", self._auth)
        app.router.add_get(api + "/{id}/error-context", self._error_context)
        app.router.add_post("/gateway/{user}/{job}/upload", self._upload)
        app.router.add_post(f"{rpc}/Start", self._start)
        app.router.add_post(f"{rpc}/Connect", self._connect)
        app.router.add_post(f"{rpc}/SendInput", self._input)
        app.router.add_post(f"{rpc}/SendSignal", self._signal)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        clock = asyncio.ensure_future(self._watch_time())
        self._ready.set()
        await self._stop.wait()
        clock.cancel()
        await asyncio.gather(*(self._end(machine, "TERMINATED") for machine in self.machines.values()))
        await runner.cleanup()
        await self.boxes.close()

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if request.path.startswith("/api/"):
            if key != KEY:
                return web.json_response({"detail": "unauthorized"}, status=401)
        else:
            machine = self.machines.get(request.match_info["job"])
            if machine is None or machine.status != "RUNNING":
                return web.json_response({"error": "sandbox_not_found"}, status=502)
            if key != machine.token:
                return web.json_response({"error": "token expired"}, status=401)
        return await handler(request)

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if self.refuse_next:
            status = self.refuse_next.pop(0)
            return web.json_response({"detail": f"refused with {status}"}, status=status)
        assert asked["vm"] is True and "network_access" not in asked
        known = self.by_idempotency_key.get(asked["idempotency_key"])
        if known is None:
            machine = Machine(f"sbx{secrets.token_hex(6)}", asked, created=self._loop.time())
            self.machines[machine.id] = machine
            self.by_idempotency_key[asked["idempotency_key"]] = known = machine.id
            self._booting.append(asyncio.ensure_future(self._boot(machine)))
        await asyncio.sleep(self.create_seconds)
        return web.json_response(self.machines[known].to_json())

    async def _boot(self, machine: Machine) -> None:
        asked = machine.request
        machine.container = await self.boxes.start(
            self.boxes.base(),
            ["sleep", "infinity"],
            cpus=asked["cpu_cores"],
            memory=int(asked["memory_gb"] * 2**30),
            env={"PRIME_SANDBOX": machine.id},
            tmp=int(asked["disk_size_gb"] * 2**30),
        )
        if machine.status == "TERMINATED":  # meanwhile
            await self.boxes.remove(machine.container)
            return
        machine.status, machine.active = "RUNNING", self._loop.time()

    async def _end(self, machine: Machine, status: str) -> None:
        machine.status = status
        if machine.container:
            await self.boxes.remove(machine.container)
        for process in machine.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.process.kill()
            if process.attached is not None:
                process.attached.put_nowait(None)

    async def _watch_time(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            now = self._loop.time()
            for machine in [each for each in self.machines.values() if each.status == "RUNNING"]:
                idle = machine.request.get("idle_timeout_minutes")
                too_old = now - machine.created > machine.request["timeout_minutes"] * self.minute
                if too_old or (idle and now - machine.active > idle * self.minute):
                    await self._end(machine, "TIMEOUT")

    async def _list(self, request: web.Request) -> web.Response:
        wanted = set(request.query.getall("labels", []))
        found = [each for each in self.machines.values() if wanted <= set(each.request["labels"])]
        if request.query.get("is_active") or request.query.get("exclude_terminated"):
            found = [each for each in found if each.status in ("PENDING", "RUNNING")]
        page = {"total": len(found), "page": 1, "perPage": 50, "hasNext": False}
        return web.json_response({"sandboxes": [each.to_json() for each in found], **page})

    async def _statuses(self, request: web.Request) -> web.Response:
        ids = (await request.json())["sandbox_ids"]
        statuses = [{"sandbox_id": each, "status": self.machines[each].status} for each in ids]
        return web.json_response({"statuses": statuses, "errors": []})

    def _machine(self, request: web.Request) -> Machine:
        machine = self.machines.get(request.match_info["id"])
        if machine is None:
            raise web.HTTPNotFound(text=json.dumps({"detail": "not found"}), content_type="application/json")
        return machine

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(self._machine(request).to_json())

    async def _delete(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        if machine.status in ("PENDING", "RUNNING"):
            await self._end(machine, "TERMINATED")
        return web.json_response({"ok": True})

    async def _auth(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        answer = {"gateway_url": f"{self.url}/gateway", "user_ns": "user", "job_id": machine.id}
        return web.json_response({**answer, "token": machine.token, "expires_at": until.isoformat()})

    async def _error_context(self, request: web.Request) -> web.Response:
        return web.json_response({"status": self._machine(request).status})

    # -- the gateway

    async def _upload(self, request: web.Request) -> web.Response:
        machine = self.machines[request.match_info["job"]]
        part = await (await request.multipart()).next()
        assert part is not None
        data = bytes(await part.read())  # type: ignore[union-attr]
        path = request.query["path"]
        writer = await self.boxes.run(machine.container, ["sh", "-c", f"cat > '{path}'"], {})
        await writer.communicate(data)
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return web.json_response({"success": True, "path": path, "size": len(data), "timestamp": now})

    async def _start(self, request: web.Request) -> web.StreamResponse:
        machine = self.machines[request.match_info["job"]]
        asked = pb.StartRequest.FromString((await request.read())[5:])
        name = asked.session_uuid or secrets.token_hex(16)
        process = machine.processes.get(name)
        if process is None:
            assert asked.command.cmd == "/bin/bash"
            arguments = ["sh", *asked.command.args]
            child = await self.boxes.run(machine.container, arguments, asked.command.envs)
            process = machine.processes[name] = Process(child)
        return await self._stream(request, machine, process, pb.StartResponse)

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        machine = self.machines[request.match_info["job"]]
        asked = pb.ConnectRequest.FromString((await request.read())[5:])
        return await self._stream(
            request, machine, machine.processes[asked.session.session_uuid], pb.ConnectResponse
        )

    async def _stream(
        self, request: web.Request, machine: Machine, process: Process, kind: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/connect+proto"})
        await response.prepare(request)
        attached: asyncio.Queue[Any] = asyncio.Queue()
        process.attached = attached
        process.tell(start=pb.CommandSessionEvent.StartEvent(pid=process.process.pid))
        process.pump = process.pump or asyncio.ensure_future(self._pump(machine, process))
        if process.exit_code is not None:
            process.tell(end=pb.CommandSessionEvent.EndEvent(exit_code=process.exit_code))
        while (event := await attached.get()) is not None:
            data = kind(event=event).SerializeToString()
            await response.write(struct.pack("!BI", 0, len(data)) + data)
            if event.WhichOneof("event") == "end":
                await response.write(struct.pack("!BI", END_OF_STREAM, 2) + b"{}")
                return response
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _pump(self, machine: Machine, process: Process) -> None:
        async def copy(stream: asyncio.StreamReader, name: str) -> None:
            while data := await stream.read(32 << 10):
                machine.active = self._loop.time()
                process.tell(data=pb.CommandSessionEvent.DataEvent(**{name: data}))

        child = process.process
        assert child.stdout is not None and child.stderr is not None
        await asyncio.gather(copy(child.stdout, "stdout"), copy(child.stderr, "stderr"))
        process.exit_code = await child.wait()
        process.tell(end=pb.CommandSessionEvent.EndEvent(exit_code=process.exit_code))

    async def _input(self, request: web.Request) -> web.Response:
        machine = self.machines[request.match_info["job"]]
        asked = pb.SendInputRequest.FromString(await request.read())
        process = machine.processes[asked.session.session_uuid]
        machine.active = self._loop.time()
        if asked.input_uuid not in process.inputs:
            process.inputs.add(asked.input_uuid)
            assert process.process.stdin is not None
            with contextlib.suppress(ConnectionError):
                process.process.stdin.write(asked.input.stdin)
                await process.process.stdin.drain()
        return web.Response(body=b"", content_type="application/proto")

    async def _signal(self, request: web.Request) -> web.Response:
        machine = self.machines[request.match_info["job"]]
        asked = pb.SendSignalRequest.FromString(await request.read())
        with contextlib.suppress(ProcessLookupError):
            machine.processes[asked.session.session_uuid].process.send_signal(asked.signal)
        return web.Response(body=b"", content_type="application/proto")
