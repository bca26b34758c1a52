"""Lists of messages as variables of the REPL."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rlm_agent.rpc.v1 import agent_pb2 as pb

from rlm_core.session import Session
from rlm_core.text import shorten

MAX_MESSAGE_CHARS = 100_000
"""Of one message; head and tail are kept."""
GROUP_BYTES = 1 << 20
"""Sent at once."""


async def extend(session: Session, name: str, messages: Sequence[dict[str, Any]]) -> None:
    """Add messages to a list that there is."""
    for group in _groups(messages):
        await session.bind([pb.Binding(name=name, items=group)])


async def bind(session: Session, names: Sequence[str], messages: Sequence[dict[str, Any]]) -> None:
    """Make a new list of each of the names."""
    for name in names:
        await session.bind([pb.Binding(name=name, value=b"[]")])
        await extend(session, name, messages)


def _groups(messages: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    group: list[bytes] = []
    size = 0
    for message in messages:
        cut = {**message, "content": shorten(str(message["content"]), MAX_MESSAGE_CHARS)}
        text = json.dumps(cut, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if group and size + len(text) > GROUP_BYTES:
            yield b"[" + b",".join(group) + b"]"
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield b"[" + b",".join(group) + b"]"
