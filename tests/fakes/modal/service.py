"""Modal's service, as far as its SDK speaks to it, on loopback: the control plane, the command router of a
sandbox, the store for files, and tunnels. Its sandboxes are machines (tests/fakes/machines.py), without a
network; a tunnel ends TLS and reaches into one.

The protocol is that of modal 1.6.4, whose wheel has the messages and the servicers' base classes. Images are
built from the Dockerfile commands that the SDK sends, but for the base, which can't be pulled:
ours, of Debian's packages, takes its place.
"""

import asyncio
import contextlib
import secrets
import ssl
import threading
from typing import Any

import grpc
import grpc.aio
import trustme
from aiohttp import web
from google.protobuf.any_pb2 import Any as AnyMessage
from modal_proto import api_pb2, api_pb2_grpc, task_command_router_pb2_grpc

from tests.fakes.machines import Containers, Machines
from tests.fakes.modal.access import Check, jwt
from tests.fakes.modal.boxes import CHUNK, Box
from tests.fakes.modal.images import Images
from tests.fakes.modal.router import Router

api: Any = api_pb2
SECOND = 0.2
"""A second of the service's clock, for lifetimes and idle times; ours are longer."""
GRPC_STATUS = "grpc-status-details-bin"


class FakeModal(Images, Router):
    """Runs in a thread of its own. `url` is for MODAL_SERVER_URL, `authority` for gRPC's roots."""

    def __init__(self, machines: Machines | None = None) -> None:
        super().__init__(machines or Containers("modal"))
        self.url = ""
        self.create_seconds = 0.0
        self._making: list[asyncio.Future[Box]] = []
        self.throttle_next: list[float] = []
        """Seconds that the next requests to make a sandbox are told to wait."""
        self.refuse_next: list[tuple[grpc.StatusCode, str]] = []
        self.authority = trustme.CA()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    def __enter__(self) -> "FakeModal":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    # -- faults

    def drop_streams(self) -> None:
        """Break every stream of output; the SDK reads on where it was."""

        self._loop.call_soon_threadsafe(self.break_streams)

    def drop_tunnels(self) -> None:
        """Break every connection through a tunnel."""

        def drop() -> None:
            for writer in {each for box in self.boxes.values() for each in box.connections}:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(drop)

    def expire_tokens(self) -> None:
        """The command router refuses the tokens that were given so far."""
        self.tokens.clear()

    def terminate(self, box_id: str, status: int = api.GenericResult.GENERIC_STATUS_TERMINATED) -> None:
        """End a sandbox as the service does, whatever runs in it."""
        asyncio.run_coroutine_threadsafe(self._end(self.boxes[box_id], status), self._loop).result(20)

    # -- the service

    def __getattr__(self, name: str) -> Any:
        """Every request of the protocol that is not here is refused by its name."""
        if not name[0].isupper():
            raise AttributeError(name)

        async def refuse(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, name)

        return refuse

    async def _main(self) -> None:
        server: Any = grpc.aio.server(
            interceptors=[Check(self)],
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        every: Any = self
        api_pb2_grpc.add_ModalClientServicer_to_server(every, server)
        task_command_router_pb2_grpc.add_TaskCommandRouterServicer_to_server(every, server)
        self.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        store = web.Application(client_max_size=1 << 30)
        store.router.add_put("/{name}", self.put)
        runner = web.AppRunner(store, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.store = f"http://127.0.0.1:{runner.addresses[0][1]}"
        await server.start()
        clock = asyncio.ensure_future(self._watch_time())
        self._ready.set()
        await self._stop.wait()
        clock.cancel()
        status = api.GenericResult.GENERIC_STATUS_TERMINATED
        await asyncio.gather(*(self._end(box, status) for box in self.boxes.values()))
        await server.stop(1.0)
        await runner.cleanup()
        await self.machines.close()

    async def _watch_time(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            now = self._loop.time()
            for box in [each for each in self.boxes.values() if each.runs and each.machine]:
                if box.is_used:
                    box.active = now
                idle = box.definition.idle_timeout_secs
                too_old = now - box.created > box.definition.timeout_secs * SECOND
                if too_old or (idle and now - box.active > idle * SECOND):
                    await self._end(box, api.GenericResult.GENERIC_STATUS_TIMEOUT)

    async def _end(self, box: Box, status: int) -> None:
        if not box.runs:
            return
        box.result = api.GenericResult(status=status)
        box.ended.set()
        for server in box.tunnels.values():
            server.close()
        for writer in list(box.connections):
            writer.transport.abort()
        if box.machine:
            await self.machines.remove(box.machine)
        for process in box.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.child.kill()

    # -- apps, files and images

    async def EnvironmentGetOrCreate(self, request: Any, context: Any) -> Any:
        settings = api.EnvironmentSettings(image_builder_version="2025.06")
        return api.EnvironmentGetOrCreateResponse(
            environment_id="en-1", metadata=api.EnvironmentMetadata(name="main", settings=settings)
        )

    async def AuthTokenGet(self, request: Any, context: Any) -> Any:
        return api.AuthTokenGetResponse(token=jwt())

    # -- sandboxes

    async def SandboxCreateV2(self, request: Any, context: Any) -> Any:
        # Not of the form of the first version's ids, by which the SDK tells where to ask.
        box = await self._made(f"sb-{secrets.token_hex(16)}", request, context)
        return api.SandboxCreateV2Response(
            sandbox_id=box.id,
            task_id=box.task_id,
            tunnels=_tunnels(box),
            command_router_access=self._access(),
        )

    async def SandboxCreate(self, request: Any, context: Any) -> Any:
        """The first version, which the SDK takes for GPUs."""
        box = await self._made(f"sb-{secrets.token_hex(11)}", request, context)
        return api.SandboxCreateResponse(sandbox_id=box.id)

    async def _made(self, name: str, request: Any, context: Any) -> Box:
        if self.throttle_next:
            await self._throttle(context, self.throttle_next.pop(0))
        if self.refuse_next:
            await context.abort(*self.refuse_next.pop(0))
        making = asyncio.ensure_future(self._make(name, request))
        self._making.append(making)
        return await asyncio.shield(making)  # it is made, also when nobody waits for it any more

    async def _make(self, name: str, request: Any) -> Box:
        tags = {each.tag_name: each.tag_value for each in request.tags}
        task_id = f"ta-{secrets.token_hex(8)}V"
        box = Box(name, task_id, request.definition, tags, self._loop.time(), request.app_id)
        box.secret_sources = list(getattr(request, "secret_sources", ()))
        if any(each.secret_id == "st-known" for each in box.secret_sources):
            box.variables["KNOWN_SECRET"] = "42"
        await asyncio.sleep(self.create_seconds)
        self.boxes[name] = box
        await self._boot(box)
        for each in box.definition.open_ports.ports:
            box.tunnels[each.port] = await self._open_tunnel(box, each.port)
        if not box.runs:  # ended meanwhile
            for server in box.tunnels.values():
                server.close()
        return box

    async def _throttle(self, context: Any, seconds: float) -> None:
        detail = AnyMessage()
        detail.Pack(api.RPCRetryPolicy(retry_after_secs=seconds))
        code = int(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        status = api.RPCStatus(code=code, message="slow down", details=[detail])
        context.set_trailing_metadata(((GRPC_STATUS, status.SerializeToString()),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down")

    async def _boot(self, box: Box) -> None:
        resources = box.definition.resources
        box.machine = await self.machines.start(
            self.images[box.definition.image_id],
            box.definition.entrypoint_args,
            cpus=resources.milli_cpu_max / 1000,
            memory=resources.memory_mb_max << 20,
            env={"MODAL_TASK_ID": "ta-1", **box.variables},
        )
        box.active = self._loop.time()
        if not box.runs:  # meanwhile
            await self.machines.remove(box.machine)

    async def _open_tunnel(self, box: Box, port: int) -> asyncio.Server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("localhost").configure_cert(context)
        context.set_alpn_protocols(["h2"])

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            box.connections.add(writer)
            try:
                inside = await asyncio.open_connection(sock=await self.machines.dial(box.machine, port))
                await asyncio.gather(_pump(reader, inside[1]), _pump(inside[0], writer))
            except OSError:
                writer.transport.abort()
            finally:
                box.connections.discard(writer)

        return await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)

    def _access(self) -> Any:
        token = jwt()
        self.tokens.add(token)
        return api.CommandRouterAccess(jwt=token, url=self.url)

    async def SandboxGetTaskIdV2(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context)
        return api.SandboxGetTaskIdResponse(task_id=box.task_id)

    async def TaskGetCommandRouterAccess(self, request: Any, context: Any) -> Any:
        access = self._access()
        return api.TaskGetCommandRouterAccessResponse(jwt=access.jwt, url=access.url)

    async def SandboxGetCommandRouterAccess(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context) if request.sandbox_id else None
        if box is not None and not box.runs:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the sandbox has ended")
        access = self._access()
        return api.SandboxGetCommandRouterAccessResponse(jwt=access.jwt, url=access.url)

    async def SandboxGetTunnels(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context)
        success = api.GenericResult(status=api.GenericResult.GENERIC_STATUS_SUCCESS)
        return api.SandboxGetTunnelsResponse(result=success, tunnels=_tunnels(box))

    async def SandboxWaitV2(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(box.ended.wait(), request.timeout)
        metadata = api.SandboxHandleMetadata(app_id=box.app_id)
        return api.SandboxWaitResponse(result=box.result, metadata=metadata)

    async def SandboxTerminateV2(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context)
        existing = box.result
        await self._end(box, api.GenericResult.GENERIC_STATUS_TERMINATED)
        return api.SandboxTerminateResponse(existing_result=existing)

    async def SandboxListV2(self, request: Any, context: Any) -> Any:
        wanted = {each.tag_name: each.tag_value for each in request.tags}.items()
        before = request.before_timestamp or float("inf")
        found = [box for box in self.boxes.values() if box.runs and wanted <= box.tags.items()]
        found = [box for box in found if box.app_id == request.app_id and box.created < before]
        newest = sorted(found, key=lambda box: -box.created)[:2]  # a page is small here
        return api.SandboxListResponse(
            sandboxes=[
                api.SandboxInfo(id=box.id, created_at=box.created, app_id=box.app_id) for box in newest
            ]
        )

    async def SandboxTagsGetV2(self, request: Any, context: Any) -> Any:
        box = await self._box(request.sandbox_id, context)
        tags = [api.SandboxTag(tag_name=name, tag_value=value) for name, value in box.tags.items()]
        return api.SandboxTagsGetResponse(tags=tags)

    SandboxGetTaskId = SandboxGetTaskIdV2
    SandboxWait = SandboxWaitV2
    SandboxTerminate = SandboxTerminateV2
    SandboxTagsGet = SandboxTagsGetV2

    async def _box(self, box_id: str, context: Any) -> Box:
        box = self.boxes.get(box_id)
        if box is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "Sandbox not found")
        assert box is not None
        return box


def _tunnels(box: Box) -> list[Any]:
    ports = {port: server.sockets[0].getsockname()[1] for port, server in box.tunnels.items()}
    return [api.TunnelData(host="localhost", port=ours, container_port=port) for port, ours in ports.items()]


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()
    finally:
        target.close()
