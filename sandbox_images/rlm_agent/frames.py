"""Length-prefixed frames between agent, supervisor and worker. Standard library only.

A frame is a kind (1 byte), two big-endian lengths (4 bytes each), a JSON object and a body of raw
bytes: ids and numbers go into the object, text of any size into the body.

Calls and supervision use byte streams. The link to a worker uses packets, because a worker can be killed
in the middle of a frame: the next process starts with a packet that says so, and both ends stay in step.
"""

import json
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from rlm_agent import limits

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_decode, _len = json.JSONDecoder().raw_decode, len  # bound now, for the worker: see worker/bound.py
PREFIX = struct.Struct("!BII")


class Kind(IntEnum):
    # agent → worker
    EXECUTE = 1
    CONTEXT = 2
    LIST = 3
    READ = 4
    FORK = 5
    FILE = 6
    BIND = 7
    # worker → agent
    READY = 10
    RESULT = 11
    FORKED = 12
    # cell → agent, and back
    CALL = 20
    REPLY = 21
    # agent → supervisor, and back
    SPAWN = 30
    ADOPT = 31
    SIGNAL = 32
    RESUME = 33
    END = 34
    PROBE = 35
    NAME = 36
    DONE = 37


_KINDS = {int(kind): kind for kind in Kind}


class FrameError(Exception):
    """The other end sent something that is not a frame, or one over its limit."""


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    header: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""

    def encode(self) -> bytes:
        header = _encode(self.header).encode("utf-8", "surrogatepass")
        return PREFIX.pack(self.kind, _len(header), _len(self.body)) + header + self.body


def parse_prefix(prefix: bytes, max_header: int = limits.MAX_FRAME_HEADER) -> tuple[Kind, int, int]:
    """Kind, header length and body length, each checked against its limit.

    Raises:
        FrameError: unknown kind, or a length over the limit.
    """
    number, header_size, body_size = PREFIX.unpack(prefix)
    kind = _KINDS.get(number)
    if kind is None:
        raise FrameError(f"unknown frame kind {number}")
    if header_size > max_header or body_size > limits.MAX_FRAME_BODY:
        raise FrameError(f"frame of {header_size} + {body_size} bytes is over the limit")
    return kind, header_size, body_size


def parse(kind: Kind, header: bytes, body: bytes) -> Frame:
    """Raises FrameError when the header is not a JSON object."""
    try:
        text = header.decode("utf-8", "surrogatepass") or "{}"
        fields, end = _decode(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"malformed frame header: {type(error).__name__}") from None
    if not isinstance(fields, dict) or end != _len(text):
        raise FrameError("frame header is not an object")
    return Frame(kind, fields, body)


class FrameBuffer:
    """Bytes in, frames out; never holds more than one frame of the largest size."""

    def __init__(self, max_header: int = limits.MAX_FRAME_HEADER) -> None:
        self._pending = bytearray()
        self._max_header = max_header

    def __len__(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return _len(self._pending)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that are complete now.

        Raises:
            FrameError: the bytes are no frame; the connection must be closed.
        """
        self._pending += data
        frames: list[Frame] = []
        start = 0
        while _len(self._pending) - start >= PREFIX.size:
            prefix = bytes(self._pending[start : start + PREFIX.size])
            kind, header_size, body_size = parse_prefix(prefix, self._max_header)
            header_start = start + PREFIX.size
            body_start = header_start + header_size
            end = body_start + body_size
            if _len(self._pending) < end:
                break
            frames.append(
                parse(
                    kind, bytes(self._pending[header_start:body_start]), bytes(self._pending[body_start:end])
                )
            )
            start = end
        del self._pending[:start]
        return frames


PACKET_BYTES = 64 << 10
FIRST, MORE = b"\x00", b"\x01"


def packets(data: bytes) -> list[bytes]:
    """An encoded frame as packets for a SOCK_SEQPACKET socket."""
    starts = range(0, _len(data), PACKET_BYTES)
    return [(MORE if start else FIRST) + data[start : start + PACKET_BYTES] for start in starts]


class PacketBuffer:
    """Packets in, frames out; a frame whose sender died half-way is dropped."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._kind, self._header_size, self._size = Kind.EXECUTE, 0, 0

    def feed(self, packet: bytes) -> Frame | None:
        """The frame that this packet completes, if any.

        Raises:
            FrameError: not a frame, or one over its limit.
        """
        if packet[:1] == FIRST:
            self._pending.clear()
            if _len(packet) <= PREFIX.size:
                raise FrameError("a packet is too short for a frame")
            self._kind, self._header_size, body_size = parse_prefix(packet[1 : 1 + PREFIX.size])
            self._size = PREFIX.size + self._header_size + body_size
        elif not self._pending:
            return None  # the rest of a frame that was meant for a process that has died
        self._pending += memoryview(packet)[1:]
        if _len(self._pending) < self._size:
            return None
        data = bytes(self._pending)
        self._pending.clear()
        if _len(data) != self._size:
            raise FrameError("packets and frame lengths disagree")
        body_start = PREFIX.size + self._header_size
        return parse(self._kind, data[PREFIX.size : body_start], data[body_start:])
