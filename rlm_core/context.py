"""The user's context: what may be one, its exact bytes, and a first look at it for the prompt.

A `str` travels as UTF-8 with "surrogatepass", `bytes` as they are, anything else as JSON in which the
types that JSON has not got are tagged. The sandbox's half is `rlm_agent/worker/context.py`.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_core.errors import ConfigError
from rlm_core.limits import CHUNK, MAX_CONTEXT

TAG = "__rlm__"
HEAD_CHARS = 600
TAIL_CHARS = 300
LISTED_ITEMS = 8


@dataclass(frozen=True, slots=True)
class Encoded:
    """A context on its way: never a second copy of it in memory."""

    kind: str
    """text, bytes or json."""
    content: str | bytes

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, at most CHUNK at a time."""
        if isinstance(self.content, bytes):
            for start in range(0, len(self.content), CHUNK):
                yield self.content[start : start + CHUNK]
            return
        characters = CHUNK if self.content.isascii() else CHUNK // 4
        for start in range(0, len(self.content), characters):
            yield self.content[start : start + characters].encode("utf-8", "surrogatepass")

    @property
    def size(self) -> int:
        """In bytes."""
        if isinstance(self.content, bytes) or self.content.isascii():
            return len(self.content)
        return sum(len(chunk) for chunk in self.chunks())


def encode(value: Any) -> Encoded:
    """A context in the form in which it travels.

    Raises:
        ConfigError: a type that can't be sent; names it and where it is.
    """
    if isinstance(value, str):
        return Encoded("text", value)
    if isinstance(value, bytes):
        return Encoded("bytes", value)
    try:
        text = json.dumps(_tagged(value, "context"), ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise ConfigError("the context is nested too deeply, or contains itself") from None
    return Encoded("json", text)


def _tagged(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: _tagged(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [[_tagged_key(key, where), _tagged(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {TAG: ["dict", pairs]}
    if isinstance(value, list):
        return [_tagged(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {TAG: ["tuple", [_tagged(item, f"{where}[{index}]") for index, item in enumerate(value)]]}
    if isinstance(value, bytes):
        return {TAG: ["bytes", base64.b64encode(value).decode()]}
    raise ConfigError(
        f"{where} is a {type(value).__name__}; a context is made of str, bytes, int, float, bool, None, "
        "list, tuple and dict: convert it first"
    )


def _tagged_key(key: Any, where: str) -> Any:
    if key is None or type(key) in (str, int, float, bool):
        return key
    raise ConfigError(
        f"{where} has a key of type {type(key).__name__}; keys are str, int, float, bool or None"
    )


def read_path(path: Path) -> str | bytes | dict[str, str | bytes]:
    """A file as text (as bytes when it is not UTF-8); a folder as a dict from relative path to file, without
    what is hidden: there are keys, and the history of repositories.

    Raises:
        ConfigError: it does not exist, can't be read, or is larger than a context may be.
    """
    try:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if not _is_hidden(file, path) and file.is_file())
        size = sum(file.stat().st_size for file in files)
        if size > MAX_CONTEXT:
            raise ConfigError(
                f"the context {str(path)!r} has {len(files):,} files with {size:,} bytes; at most "
                f"{MAX_CONTEXT:,}: name less of it"
            )
        if files != [path]:
            return {file.relative_to(path).as_posix(): _read_file(file) for file in files}
        return _read_file(path)
    except OSError as error:
        raise ConfigError(f"can't read the context {str(path)!r}: {error.strerror or error}") from None


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: Path) -> str | bytes:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def describe(value: Any) -> str:
    """Type, size, head and tail: what the root LM sees before it writes any code."""
    if isinstance(value, (str, bytes)):
        unit = "characters" if isinstance(value, str) else "bytes"
        facts = f"`context` is a {type(value).__name__} of {len(value):,} {unit}."
        return f"{facts}\n{_ends(value)}"
    if isinstance(value, Mapping):
        facts = f"`context` is a dict with {len(value):,} keys."
        items: Sequence[tuple[Any, Any]] = [
            item for item, _ in zip(value.items(), range(LISTED_ITEMS), strict=False)
        ]
    elif isinstance(value, Sequence):
        facts = f"`context` is a {type(value).__name__} of {len(value):,} items."
        items = list(enumerate(value[:LISTED_ITEMS]))
    else:
        return f"`context` is a {type(value).__name__}: {value!r}"
    lines = [f"context[{key!r}]: {_summary(item)}" for key, item in items]
    if len(value) > LISTED_ITEMS:
        lines.append(f"… and {len(value) - LISTED_ITEMS:,} more")
    return "\n".join([facts, *lines])


def _ends(value: str | bytes) -> str:
    if len(value) <= HEAD_CHARS + TAIL_CHARS:
        return f"All of it:\n{_fenced(value)}"
    return (
        f"Its first {HEAD_CHARS}:\n{_fenced(value[:HEAD_CHARS])}\n"
        f"Its last {TAIL_CHARS}:\n{_fenced(value[-TAIL_CHARS:])}"
    )


def _fenced(value: str | bytes) -> str:
    text = value.encode("utf-8", "replace").decode() if isinstance(value, str) else repr(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _summary(value: Any) -> str:
    if isinstance(value, (str, bytes)):
        start = repr(value[:80])
        return f"{type(value).__name__} of {len(value):,}, starts {start}" if len(value) > 80 else start
    if isinstance(value, (dict, list, tuple)):
        return f"{type(value).__name__} with {len(value):,} items, {repr(value)[:120]}"
    return repr(value)[:120]
