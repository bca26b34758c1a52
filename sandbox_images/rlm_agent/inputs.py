"""What the host puts into a session: contexts, files and names, each once however often it is asked."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlm_agent import limits
from rlm_agent.errors import Invalid
from rlm_agent.frames import Frame, Kind
from rlm_agent.result import Death, describe_death


class Perform(Protocol):
    async def __call__(self, frame: Frame, timeout: float, *, fds: Sequence[int] = ()) -> Frame | Death:
        """Give the worker a frame, and wait for its result or its death."""
        ...


class Inputs:
    def __init__(self, perform: Perform) -> None:
        self._perform = perform
        self._contexts: dict[int, asyncio.Task[None]] = {}
        self._files: dict[str, bytes] = {}
        self._bound = ""
        """Id of the last request for names."""

    @property
    def contexts(self) -> int:
        return len(self._contexts)

    async def put_context(self, index: int, kind: str, path: Path) -> None:
        """Bind a context from a file; repeating an index waits for the first and changes nothing.

        Raises:
            Invalid: the worker could not load it.
        """
        task = self._contexts.get(index)
        if task is None:
            task = self._contexts[index] = asyncio.create_task(self._put_context(index, kind, path))
        try:
            await asyncio.shield(task)
        except Exception:
            self._contexts.pop(index, None)
            raise

    async def put_file(self, name: str, path: Path) -> None:
        """Raises Invalid when the worker could not write it. The same file again is the same request."""
        with path.open("rb") as file:
            digest = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
            if self._files.get(name) == digest.digest():
                return
            header = {"cell": f"file {name}", "path": name}
            ended = await self._perform(Frame(Kind.FILE, header), 0, fds=[file.fileno()])
        _check_loaded(ended, "file")
        self._files[name] = digest.digest()

    async def bind(self, request_id: str, bindings: list[list[str]]) -> None:
        """Give names of the REPL a value: name, kind (of the wire's Binding) and text of each. Repeating the
        last request changes nothing.

        Raises:
            Invalid: the worker could not do it.
        """
        if request_id == self._bound:
            return
        header = {"cell": f"bind {request_id[: limits.MAX_ID_CHARS]}"}
        body = json.dumps(bindings, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(body) > limits.MAX_FRAME_BODY:
            raise Invalid(f"names and their values take at most {limits.MAX_FRAME_BODY:,} bytes at once")
        ended = await self._perform(Frame(Kind.BIND, header, body), limits.LOOK_SECONDS)
        _check_loaded(ended, "names")
        self._bound = request_id

    async def _put_context(self, index: int, kind: str, path: Path) -> None:
        header = {"cell": f"context_{index}", "index": index, "kind": kind}
        with path.open("rb") as file:  # opened here: the worker's user may not
            ended = await self._perform(Frame(Kind.CONTEXT, header), 0, fds=[file.fileno()])
        _check_loaded(ended, "context")


def _check_loaded(ended: Frame | Death, what: str) -> None:
    if isinstance(ended, Death):
        raise Invalid(f"loading the {what} killed the worker: {describe_death(ended)}")
    if ended.header.get("status") != "ok":
        error = ended.header.get("error") or {}
        raise Invalid(f"the worker could not load the {what}: {error.get('type')}: {error.get('message')}")
