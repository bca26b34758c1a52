"""The part of Modal's service that keeps files and builds images, and finds things by their names."""

import asyncio
import hashlib
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from modal_proto import api_pb2

from tests.fakes.machines import Machines
from tests.fakes.modal import mirror
from tests.fakes.modal.boxes import State
from tests.fakes.modal.mirror import NotFetched, put_pip, with_packages

api: Any = api_pb2
HOW = tuple(each.read_bytes() for each in (Path(__file__), Path(mirror.__file__)))
"""What is built depends on, too."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Of an image, as it was asked for."""

    commands: tuple[str, ...]
    files: tuple[str, ...]


class Images(State):
    """`store` is where large files are put, by HTTP."""

    def __init__(self, machines: Machines) -> None:
        super().__init__(machines)
        self.store = ""
        self.layers: list[Layer] = []
        self._apps: dict[str, str] = {}
        self._mounts: dict[str, list[Any]] = {}
        self._files: dict[str, bytes] = {}
        self._building = asyncio.Lock()

    async def put(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._files[request.match_info["name"]] = data
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def AppGetOrCreate(self, request: Any, context: Any) -> Any:
        create = request.object_creation_type == api.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
        if request.app_name not in self._apps:
            if not create:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"App '{request.app_name}' not found")
            self._apps[request.app_name] = f"ap-{secrets.token_hex(8)}"
        app_id = self._apps[request.app_name]
        return api.AppGetOrCreateResponse(
            app_id=app_id, handle_metadata=api.AppHandleMetadata(app_id=app_id, description=request.app_name)
        )

    async def SecretGetOrCreate(self, request: Any, context: Any) -> Any:
        if request.deployment_name != "known":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Secret '{request.deployment_name}' not found")
        return api.SecretGetOrCreateResponse(secret_id="st-known")

    async def VolumeGetOrCreate(self, request: Any, context: Any) -> Any:
        if request.deployment_name != "known":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Volume '{request.deployment_name}' not found")
        return api.VolumeGetOrCreateResponse(volume_id="vo-known", version=api.VOLUME_FS_VERSION_V2)

    async def BlobCreate(self, request: Any, context: Any) -> Any:
        name = f"bl-{secrets.token_hex(8)}"
        urls = api.UploadUrlList(items=[f"{self.store}/{name}"])
        return api.BlobCreateResponse(blob_ids=[name], upload_urls=urls)

    async def MountBatchedCheckExistence(self, request: Any, context: Any) -> Any:
        missing = [each for each in request.sha256_hex_hashes if each not in self._files]
        return api.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: Any, context: Any) -> Any:
        sent = request.WhichOneof("data_oneof")
        if sent is not None:  # else it only asks whether the file is here
            data = self._files.pop(request.data_blob_id) if sent == "data_blob_id" else request.data
            assert hashlib.sha256(data).hexdigest() == request.sha256_hex
            self._files[request.sha256_hex] = data
        return api.MountPutFileResponse(exists=request.sha256_hex in self._files)

    async def MountGetOrCreate(self, request: Any, context: Any) -> Any:
        mount_id = f"mo-{secrets.token_hex(8)}"
        self._mounts[mount_id] = list(request.files)
        return api.MountGetOrCreateResponse(mount_id=mount_id)

    async def ImageGetOrCreate(self, request: Any, context: Any) -> Any:
        image = request.image
        files = self._mounts.get(image.context_mount_id, [])
        layer = (
            tuple((each.docker_tag, each.image_id) for each in image.base_images),
            tuple(image.dockerfile_commands),
            tuple((each.filename, each.sha256_hex, each.mode) for each in files),
        )
        self.layers.append(Layer(tuple(image.dockerfile_commands), tuple(each.filename for each in files)))
        image_id = f"im-{hashlib.sha256(repr((HOW, self.machines.base(), layer)).encode()).hexdigest()[:22]}"
        async with self._building:
            error = await self._build(image_id, image, files)
        success, failure = api.GenericResult.GENERIC_STATUS_SUCCESS, api.GenericResult.GENERIC_STATUS_FAILURE
        result = api.GenericResult(status=failure if error else success, exception=error)
        return api.ImageGetOrCreateResponse(image_id=image_id, result=result)

    async def ImageFromId(self, request: Any, context: Any) -> Any:
        if request.image_id not in self.images:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Image {request.image_id} not found")
        return api.ImageFromIdResponse(image_id=request.image_id)

    async def _build(self, image_id: str, image: Any, files: list[Any]) -> str:
        """Make a layer, once; what went wrong."""
        tag = f"rlm-fake-modal:{image_id.removeprefix('im-')}"
        if await self.machines.has_image(tag):
            self.images[image_id] = tag
            return ""
        lines = list(image.dockerfile_commands)
        if not image.base_images:
            version = lines[0].partition("python:")[2].partition("-")[0].split(".")
            name = ".".join(version[:2])
            lines = [
                f"FROM {self.machines.base()}",
                f"RUN python3 -c 'import sys; assert sys.version_info[:2] == ({version[0]}, {version[1]})'",
                f"RUN mkdir -p /usr/local/bin && ln -sf /usr/bin/python3 /usr/local/bin/python{name}",
                "COPY . /",
            ]
        for base in image.base_images:
            lines[0] = lines[0].replace(f"FROM {base.docker_tag}", f"FROM {self.images[base.image_id]}")
        with tempfile.TemporaryDirectory() as folder:
            for each in files:
                assert ".." not in Path(each.filename).parts
                path = Path(folder) / each.filename.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._files[each.sha256_hex])
                path.chmod(each.mode or 0o644)
            if not image.base_images:
                put_pip(Path(folder))
            try:
                lines = await with_packages(lines, Path(folder))
            except NotFetched as why:
                return str(why)
            error = await self.machines.build(tag, lines, Path(folder))
        if not error:
            self.images[image_id] = tag
        return error
