"""Contexts and files on their way into a session."""

import asyncio
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core import limits
from rlm_core.context import Encoded

CONTEXT_MODE = 0o640
"""Of a shared file: an agent in a container is another user, and there the only one but root in its group."""


async def context_parts(
    header: pb.ContextHeader, encoded: Encoded | None
) -> AsyncIterator[pb.PutContextRequest]:
    yield pb.PutContextRequest(header=header)
    if encoded is not None:
        for chunk in encoded.chunks():
            yield pb.PutContextRequest(chunk=chunk)


async def file_parts(header: pb.FileHeader, file: io.BufferedReader) -> AsyncIterator[pb.PutFileRequest]:
    yield pb.PutFileRequest(header=header)
    while chunk := await asyncio.to_thread(file.read, limits.CHUNK):
        yield pb.PutFileRequest(chunk=chunk)


def write_new(path: Path, encoded: Encoded) -> None:
    """Readable for the agent; the folder around it is the host's alone."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        os.fchmod(file.fileno(), CONTEXT_MODE)
        for chunk in encoded.chunks():
            _write_all(file, chunk)


def _write_all(file: io.RawIOBase, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) or 0 :]
