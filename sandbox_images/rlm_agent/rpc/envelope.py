"""gRPC over a byte stream that may be cut, lose bytes or damage them: the envelope, without any I/O.

Part of the wire contract, and the same at both ends. Providers carry a process's stdin and stdout, and
some of them lose output while they re-attach; raw HTTP/2 does not survive that.

A frame is, big-endian:

    magic "RLM1" · kind u8 · stream u16 · number u64 · size u32 · crc32 u32 · payload (at most 64 KiB)

OPEN, DATA and CLOSE frames are numbered, kept until the other end has acknowledged them, and taken in order.
The others carry in `number` what the sender expects next, which acknowledges all before it:

    HELLO, WELCOME   payload: the link's id. Send again from that number. A HELLO is answered by a WELCOME.
    BEAT             payload: the number of the sender's next frame. Shows life, and a loss at the end.
    TAKEN            no payload; told to a host that another one has taken the sandbox from.

An OPEN without a payload is a connection to the agent's server, whose bytes the DATA frames carry; one with a
payload is a stream of messages (messages.py).

The CRC-32 (zlib's) is over all but the magic and itself. It begins with the sandbox's token for HELLO and
WELCOME, and with the link's id for all others, so that a frame of another link is damage, and so is the
greeting of a host that mistakes this sandbox for another. No cell and no LM knows either of them: what looks
like a frame in a text of theirs, and is come upon after a loss, is damage, too. What is damaged or out of
order is dropped and asked for again.
"""

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

MAGIC = b"RLM1"
HEADER = struct.Struct("!4sBHQII")
_CHECKED = struct.Struct("!BHQI")
_NUMBER = struct.Struct("!Q")
LINK_ID_BYTES = 16
MAX_PAYLOAD = 64 << 10
WINDOW = 4 << 20
"""Bytes on their way without an acknowledgement; the sender is held back beyond it."""
ACK_BYTES = WINDOW // 8
"""Received bytes after which a BEAT is due, whatever the time."""
MAX_DAMAGED = 1_000
"""Frames in the life of a link: each costs a checksum of up to 64 KiB, and its sender only a few bytes."""
MAX_IDLE = 100_000
"""Frames that bring nothing and acknowledge nothing, or are for nobody, and places without a frame, between
two regular beats: each takes this end some 10 µs."""
MAX_CONTROL = 8
"""Control frames that wait for the stream to take them; more would repeat these."""


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    BEAT = 3
    TAKEN = 4
    OPEN = 16
    DATA = 17
    CLOSE = 18


FIRST_NUMBERED = Kind.OPEN
"""And all above it."""
KINDS = {int(kind): kind for kind in Kind}


class EnvelopeError(Exception):
    """The other end breaks the protocol on purpose; the link is over."""


class TakenOver(EnvelopeError):
    """Another host has the agent now."""


class Arrived(NamedTuple):
    """A numbered frame, in its turn."""

    kind: Kind
    stream: int
    payload: bytes


class Restarted:
    """Another host has taken over: everything begins anew."""


class Envelope:
    """One end of a link. Feed it what arrives, write what `take` gives, in the order of the calls."""

    def __init__(self, link_id: bytes | None, token: bytes = b"") -> None:
        """With a link's id this end says HELLO; without one it waits for a HELLO and takes its id."""
        self._says_hello = link_id is not None
        self._greeting_seed = zlib.crc32(token)
        self.is_welcome = False
        """Whether the other end has answered a HELLO."""
        self._reset(link_id)
        self._pending = bytearray()
        self._past: set[bytes] = set()
        self._idle = 0
        self._waiting = False
        """Whether no frame has come to its end since the last beat."""
        self.held = False
        """What arrives can't be handed on at the moment, so it must not be acknowledged."""

    def _reset(self, link_id: bytes | None) -> None:
        self.link_id = link_id
        self._seed = zlib.crc32(link_id or b"")
        self._control: list[bytes] = []
        self._unacknowledged: dict[int, bytes] = {}
        self._unacknowledged_bytes = 0
        self._next = 0
        self._cursor = 0
        """Number of the frame that is to be written next; goes back for what was lost."""
        self._expected = 0
        self._acknowledged = 0
        self._received_bytes = 0
        self._asked = False
        self._damaged = 0

    # -- out

    @property
    def full(self) -> bool:
        """Whether the sender must wait for acknowledgements."""
        return self._unacknowledged_bytes >= WINDOW

    def send(self, kind: Kind, stream: int, payload: bytes | memoryview = b"") -> None:
        """Queue a numbered frame. Payloads are at most MAX_PAYLOAD bytes."""
        frame = _frame(kind, stream, self._next, payload, self._seed)
        self._unacknowledged[self._next] = frame
        self._unacknowledged_bytes += len(frame)
        self._next += 1

    def hello(self) -> None:
        """Begin, or go on over a new byte stream: what was on the old one may be lost."""
        if self.link_id is None:
            return  # the other end says it
        self._pending.clear()
        self._control.clear()
        self._say(Kind.HELLO, self.link_id)

    def beat(self) -> None:
        """Acknowledge and show life; due regularly. Gives up a frame whose rest did not come meanwhile."""
        if self._pending and self._waiting:
            self._skip()
        self._waiting = True
        if self.link_id is not None:
            self._say(Kind.BEAT, _NUMBER.pack(self._cursor))

    def regular_beat(self) -> None:
        """A beat that time has brought, and not what arrived."""
        self._idle = 0
        self.beat()

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to write."""
        return self._cursor < self._next or bool(self._control)

    def take(self, size: int) -> bytes:
        """The bytes to be written next, about `size` of them; empty when there is nothing to write."""
        chunks, self._control = self._control, []
        total = sum(map(len, chunks))
        while self._cursor < self._next and total < size:
            frame = self._unacknowledged[self._cursor]
            chunks.append(frame)
            total += len(frame)
            self._cursor += 1
        return b"".join(chunks)

    def _say(self, kind: Kind, payload: bytes) -> None:
        if not self.held:
            self._acknowledged, self._received_bytes = self._expected, 0
        if len(self._control) < MAX_CONTROL:
            self._control.append(_frame(kind, 0, self._acknowledged, payload, self._seed_for(kind)))

    def _say_taken(self, link_id: bytes) -> None:
        """To the host of this link, which is not ours any more."""
        if len(self._control) < MAX_CONTROL:
            self._control.append(_frame(Kind.TAKEN, 0, 0, b"", zlib.crc32(link_id)))

    # -- in

    def feed(self, data: bytes | memoryview) -> list[Arrived | Restarted | TakenOver]:
        """Take what arrived; gives the numbered frames that are in order now.

        Raises:
            EnvelopeError: more was sent than the window allows, or what was acknowledged is asked for again.
        """
        events: list[Arrived | Restarted | TakenOver] = []
        self._pending += data
        for kind, stream, number, payload in self._frames():
            if kind >= FIRST_NUMBERED:
                if number == self._expected:
                    self._expected += 1
                    self._asked = False
                    self._received_bytes += len(payload) + HEADER.size
                    if self._received_bytes > 2 * WINDOW:
                        raise EnvelopeError("more bytes on their way than the window allows")
                    events.append(Arrived(kind, stream, payload))
                    if kind is Kind.DATA and not payload:
                        self.count_idle()
                elif number > self._expected:
                    self._ask()
            elif kind is Kind.TAKEN and self._says_hello:
                return [*events, TakenOver()]
            else:
                left = len(self._unacknowledged)
                if self._take_control(kind, number, payload):
                    events = [Restarted()]
                if len(self._unacknowledged) == left:
                    self.count_idle()
        if not self.held and self._received_bytes >= ACK_BYTES:
            self.beat()
        return events

    def _frames(self) -> Iterator[tuple[Kind, int, int, bytes]]:
        """Whole frames; what is damaged is skipped, and asked for again."""
        pending, start = self._pending, 0
        try:
            while len(pending) - start >= HEADER.size:
                magic, kind, stream, number, size, crc = HEADER.unpack_from(pending, start)
                end = start + HEADER.size + size
                if magic == MAGIC and size <= MAX_PAYLOAD and kind in KINDS:
                    if len(pending) < end:
                        break
                    payload = bytes(pending[start + HEADER.size : end])
                    if crc == _crc(kind, stream, number, payload, self._seed_for(kind)):
                        start = end
                        self._waiting = False
                        yield KINDS[kind], stream, number, payload
                        continue
                    self._damaged += 1
                    if self._damaged > MAX_DAMAGED:
                        raise EnvelopeError("more damaged frames than a stream has by accident")
                self.count_idle()
                start = _next_magic(pending, start + 1)
                self._ask()
        finally:
            del pending[:start]

    def count_idle(self) -> None:
        """One more frame for nothing. Raises EnvelopeError when there are too many."""
        self._idle += 1
        if self._idle > MAX_IDLE:
            raise EnvelopeError("more frames without anything in them than a stream needs")

    def _skip(self) -> None:
        """The rest of this frame is lost: what came after it was taken for it."""
        del self._pending[: _next_magic(self._pending, 1)]
        self._ask()

    def _seed_for(self, kind: int) -> int:
        return self._greeting_seed if kind in (Kind.HELLO, Kind.WELCOME) else self._seed

    def _take_control(self, kind: Kind, number: int, payload: bytes) -> bool:
        """Whether the link has begun anew."""
        if kind is Kind.BEAT:
            self._acknowledge(number)
            if len(payload) == _NUMBER.size and _NUMBER.unpack(payload)[0] > self._expected:
                self._asked = False
                self._ask()
            return False
        if kind is Kind.TAKEN:
            return False
        restarted = payload != self.link_id
        if restarted:
            if self._says_hello or kind is not Kind.HELLO or len(payload) != LINK_ID_BYTES:
                return False
            if payload in self._past:
                self._say_taken(payload)
                return False
            last = self.link_id
            self._reset(payload)
            if last is not None:
                self._past.add(last)
                self._say_taken(last)
        if self._acknowledge(number):
            self._cursor = number
        if kind is Kind.HELLO:
            self._say(Kind.WELCOME, payload)
        else:
            self.is_welcome = True
        return restarted

    def _acknowledge(self, number: int) -> bool:
        """Forget what has arrived there; False for what was said long ago and came late."""
        first = self._next - len(self._unacknowledged)
        if number > self._next:
            raise EnvelopeError("a number that can't be: this link has lost its state")
        if number < first:
            return False
        for done in range(first, number):
            self._unacknowledged_bytes -= len(self._unacknowledged.pop(done))
        self._cursor = max(self._cursor, number)
        return True

    def _ask(self) -> None:
        """Ask once for what is missing; the next BEAT of the other end shows whether it came."""
        if self.link_id is not None and not self._asked:
            self._asked = True
            self._say(Kind.HELLO, self.link_id)


def _next_magic(data: bytearray, start: int) -> int:
    """Where a frame may begin; the end may be half a magic."""
    found = data.find(MAGIC, start)
    return found if found >= 0 else max(start, len(data) - len(MAGIC) + 1)


def _crc(kind: int, stream: int, number: int, payload: bytes | memoryview, seed: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, stream, number, len(payload)), seed))


def _frame(kind: Kind, stream: int, number: int, payload: bytes | memoryview, seed: int) -> bytes:
    crc = _crc(kind, stream, number, payload, seed)
    return HEADER.pack(MAGIC, kind, stream, number, len(payload), crc) + payload
