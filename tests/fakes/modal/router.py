"""The part of Modal's service that runs processes in sandboxes: the command router."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from modal_proto import task_command_router_pb2

from tests.fakes.modal.boxes import Box, Process, State

router: Any = task_command_router_pb2


class Router(State):
    async def _running(self, task_id: str, context: Any) -> Box:
        box = next((each for each in self.boxes.values() if each.task_id == task_id), None)
        if box is None or not box.runs:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the task has ended")
        assert box is not None
        return box

    async def TaskExecStart(self, request: Any, context: Any) -> Any:
        box = await self._running(request.task_id, context)
        if request.exec_id not in box.processes:
            variables = dict(request.env)
            for source in request.secret_sources:
                variables |= dict(source.env.contents)
            child = await self.machines.run(box.machine, request.command_args, variables)
            process = box.processes[request.exec_id] = Process(child)
            for fd in (1, 2):
                task = asyncio.ensure_future(process.keep(fd))
                task.add_done_callback(lambda done: done.exception())
        return router.TaskExecStartResponse()

    async def TaskExecStdioRead(self, request: Any, context: Any) -> AsyncIterator[Any]:
        box = await self._running(request.task_id, context)
        process = box.processes[request.exec_id]
        fd = 1 if request.file_descriptor == router.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDOUT else 2
        offset = request.offset
        dropped = asyncio.ensure_future(self.dropped.wait())
        try:
            while True:
                reading = asyncio.ensure_future(process.read(fd, offset))
                await asyncio.wait({reading, dropped}, return_when=asyncio.FIRST_COMPLETED)
                if dropped.done():
                    reading.cancel()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream has broken")
                if not (data := reading.result()):
                    return
                offset += len(data)
                yield router.TaskExecStdioReadResponse(data=data)
        finally:
            dropped.cancel()

    async def TaskExecStdinWrite(self, request: Any, context: Any) -> Any:
        box = await self._running(request.task_id, context)
        process = box.processes[request.exec_id]
        fresh = request.data[process.written - request.offset :]
        process.written += len(fresh)
        assert process.child.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.child.stdin.write(fresh)
            await process.child.stdin.drain()
        return router.TaskExecStdinWriteResponse()

    async def TaskExecWait(self, request: Any, context: Any) -> Any:
        box = await self._running(request.task_id, context)
        return router.TaskExecWaitResponse(code=await box.processes[request.exec_id].child.wait())

    async def SandboxWaitUntilReady(self, request: Any, context: Any) -> Any:
        box = await self._running(request.task_id, context)
        port = box.definition.readiness_probe.tcp_port
        until = time.monotonic() + request.timeout
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                (await self.machines.dial(box.machine, port)).close()
                return router.SandboxWaitUntilReadyTcrResponse(ready_at=time.time())
            await asyncio.sleep(0.05)
        return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "not ready")

    async def TaskSnapshotFilesystem(self, request: Any, context: Any) -> Any:
        box = await self._running(request.task_id, context)
        image_id = f"im-{secrets.token_hex(11)}"
        tag = f"rlm-fake-modal:{image_id.removeprefix('im-')}"
        await self.machines.keep(box.machine, tag)
        self.images[image_id] = tag
        return router.TaskSnapshotFilesystemResponse(image_id=image_id)
