"""The envelope of byte streams: whatever a stream loses, cuts, repeats or damages, nothing is lost or twice."""

import asyncio
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlm_agent.rpc.envelope import (
    HEADER,
    LINK_ID_BYTES,
    MAGIC,
    MAX_IDLE,
    MAX_PAYLOAD,
    WINDOW,
    Arrived,
    Envelope,
    EnvelopeError,
    Kind,
    Restarted,
    TakenOver,
)
from rlm_agent.rpc.tunnel import Tunnel

from tests.support.pipe import Pipe

LINK = b"0123456789abcdef"
HEADER_CHECKED = struct.Struct("!BHQI")
"""Of a header what its checksum is over."""


def pair() -> tuple[Envelope, Envelope]:
    host, agent = Envelope(LINK), Envelope(None)
    host.hello()
    assert isinstance(agent.feed(host.take(1))[0], Restarted)
    host.feed(agent.take(1))
    return host, agent


def payloads(events: Sequence[Arrived | Restarted | TakenOver]) -> list[bytes]:
    return [event.payload for event in events if isinstance(event, Arrived)]


def settle(one: Envelope, other: Envelope, into_one: list[bytes], into_other: list[bytes]) -> None:
    """Beats go back and forth over a stream that is whole again, as the timers of both ends see to."""
    for _ in range(50):
        into_other += payloads(other.feed(one.take(1 << 20)))
        into_one += payloads(one.feed(other.take(1 << 20)))
        one.beat()
        other.beat()


damage = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "repeat", "junk"]),
        st.floats(0, 1),
        st.floats(0, 0.3),
        st.binary(max_size=40),
    ),
    max_size=3,
)


def damaged(data: bytes, how: list[tuple[str, float, float, bytes]]) -> bytes:
    for what, where, length, junk in how:
        start = int(where * len(data))
        end = min(len(data), start + 1 + int(length * len(data)))
        if what == "cut":
            data = data[:start] + data[end:]
        elif what == "flip" and data:
            changed = bytearray(data)
            changed[min(start, len(data) - 1)] ^= 0x40
            data = bytes(changed)
        elif what == "repeat":
            data = data[:end] + data[start:]
        else:
            data = data[:start] + junk + data[start:]
    return data


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.binary(max_size=300), st.binary(max_size=300), damage, damage, st.booleans()),
        max_size=25,
    )
)
def test_all_arrives_once_and_in_order_whatever_the_stream_does(
    rounds: list[
        tuple[
            bytes, bytes, list[tuple[str, float, float, bytes]], list[tuple[str, float, float, bytes]], bool
        ]
    ],
) -> None:
    host, agent = pair()
    down: list[bytes] = []
    up: list[bytes] = []
    for to_agent, to_host, harm_down, harm_up, reconnect in rounds:
        host.send(Kind.DATA, 1, to_agent)
        agent.send(Kind.DATA, 1, to_host)
        if reconnect:
            host.hello()
        down += payloads(agent.feed(damaged(host.take(1 << 20), harm_down)))
        up += payloads(host.feed(damaged(agent.take(1 << 20), harm_up)))
    settle(host, agent, up, down)
    assert down == [each[0] for each in rounds]
    assert up == [each[1] for each in rounds]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_frames_that_come_in_pieces_are_put_together(sizes: list[int]) -> None:
    host, agent = pair()
    sent = [os.urandom(size) for size in sizes]
    for each in sent:
        host.send(Kind.DATA, 7, each)
    stream = host.take(1 << 20)
    arrived: list[bytes] = []
    for start in range(0, len(stream), 13):
        arrived += payloads(agent.feed(stream[start : start + 13]))
    assert arrived == sent


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_of_a_stranger_do_harm(chunks: list[bytes]) -> None:
    host, agent = pair()
    for chunk in chunks:
        assert agent.feed(chunk) == []
        assert len(agent.take(1 << 20)) < 1000  # it asks, and does not shout
    host.send(Kind.DATA, 1, b"after")
    arrived: list[bytes] = []
    settle(host, agent, [], arrived)
    assert arrived == [b"after"]


def test_a_sender_is_held_back_until_what_it_sent_is_acknowledged() -> None:
    host, agent = pair()
    agent.held = True
    while not host.full:
        host.send(Kind.DATA, 1, bytes(MAX_PAYLOAD))
    agent.feed(host.take(2 * WINDOW))
    agent.beat()
    host.feed(agent.take(1))
    assert host.full
    agent.held = False
    agent.beat()
    host.feed(agent.take(1))
    assert not host.full


def test_more_than_the_window_is_the_end_of_the_link() -> None:
    host, agent = pair()
    agent.held = True
    with pytest.raises(EnvelopeError):
        for _ in range(3 * WINDOW // MAX_PAYLOAD):
            host.send(Kind.DATA, 1, bytes(MAX_PAYLOAD))
            agent.feed(host.take(1 << 20))


def test_asking_again_and_again_costs_the_other_end_no_memory() -> None:
    host, agent = pair()
    for _ in range(30):
        agent.send(Kind.DATA, 1, bytes(MAX_PAYLOAD))
    for _ in range(1000):
        host.hello()
        agent.feed(host.take(1))
    assert len(agent.take(1 << 20)) < (1 << 20) + 2 * MAX_PAYLOAD


def test_a_number_that_can_not_be_is_the_end_of_the_link() -> None:
    _, agent = pair()
    liar = Envelope(LINK)
    liar._expected = liar._acknowledged = 1000
    liar.hello()
    with pytest.raises(EnvelopeError):
        agent.feed(liar.take(1))


def test_what_was_said_long_ago_and_comes_late_is_nothing() -> None:
    host, agent = pair()
    agent.beat()
    host.hello()
    late = agent.take(1) + b""
    late_down = host.take(1)
    for number in range(5):
        host.send(Kind.DATA, 1, b"%d" % number)
        agent.send(Kind.DATA, 1, b"%d" % number)
    up: list[bytes] = []
    down: list[bytes] = []
    settle(host, agent, up, down)
    assert payloads(host.feed(late)) == payloads(agent.feed(late_down)) == []
    settle(host, agent, up, down)
    assert up == down == [b"0", b"1", b"2", b"3", b"4"]


def test_another_host_begins_anew_and_frames_of_the_old_one_are_nothing() -> None:
    old, agent = pair()
    old.send(Kind.DATA, 1, b"old")
    late = old.take(1 << 20)
    new = Envelope(b"f" * LINK_ID_BYTES)
    new.hello()
    assert isinstance(agent.feed(new.take(1))[0], Restarted)
    assert agent.feed(late) == []
    new.feed(agent.take(1 << 20))
    new.send(Kind.DATA, 1, b"new")
    arrived: list[bytes] = []
    settle(new, agent, [], arrived)
    assert arrived == [b"new"]


def test_a_host_that_was_taken_over_can_not_come_back() -> None:
    old, agent = pair()
    for _ in range(3):
        agent.send(Kind.DATA, 1, b"x")
        old.feed(agent.take(1 << 20))
    new = Envelope(b"f" * LINK_ID_BYTES)
    new.hello()
    agent.feed(new.take(1))
    new.feed(agent.take(1 << 20))
    old.hello()
    assert agent.feed(old.take(1)) == []
    new.send(Kind.DATA, 1, b"still here")
    arrived: list[bytes] = []
    settle(new, agent, [], arrived)
    assert arrived == [b"still here"]


def taken_over() -> tuple[Envelope, Envelope, bytes]:
    """The host that was taken over, the agent, and what that says then."""
    old, agent = pair()
    new = Envelope(b"f" * LINK_ID_BYTES)
    new.hello()
    agent.send(Kind.DATA, 1, b"the last for the old one")
    said = agent.take(1 << 20)
    agent.feed(new.take(1))
    said += agent.take(1 << 20)
    assert new.feed(said) == []  # nothing of it means the new host, which goes on
    new.send(Kind.DATA, 1, b"new")
    assert payloads(agent.feed(new.take(1 << 20))) == [b"new"]
    return old, agent, said


def test_a_host_is_told_that_it_was_taken_over_after_all_that_came_before() -> None:
    old, _, said = taken_over()
    arrived, taken = old.feed(said)
    assert payloads([arrived]) == [b"the last for the old one"]
    assert isinstance(taken, TakenOver)


def test_a_host_that_comes_back_too_late_is_told() -> None:
    old, agent, _ = taken_over()
    old.hello()
    agent.feed(old.take(1))
    assert any(isinstance(event, TakenOver) for event in old.feed(agent.take(1 << 20)))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(Kind)), st.integers(0, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_a_frame_within_a_text_is_none_when_a_loss_lays_it_open(
    kind: Kind, number: int, seed: int, of_the_hosts: bool
) -> None:
    forged = HEADER.pack(MAGIC, kind, 1, number, LINK_ID_BYTES, seed) + b"x" * LINK_ID_BYTES
    host, agent = Envelope(LINK, b"id"), Envelope(None, b"id")
    host.hello()
    agent.feed(host.take(1))
    host.feed(agent.take(1))
    sender, receiver = (host, agent) if of_the_hosts else (agent, host)
    unseeded = zlib.crc32(
        b"x" * LINK_ID_BYTES, zlib.crc32(HEADER_CHECKED.pack(kind, 1, number, LINK_ID_BYTES))
    )
    for text in (forged, HEADER.pack(MAGIC, kind, 1, number, LINK_ID_BYTES, unseeded) + b"x" * LINK_ID_BYTES):
        sender.send(Kind.DATA, 1, text)
        assert receiver.feed(sender.take(1 << 20)[HEADER.size :]) == []
    assert receiver.link_id == LINK
    arrived: list[bytes] = []
    settle(sender, receiver, [], arrived)
    assert len(arrived) == 2


async def test_silence_is_told_at_both_ends() -> None:
    told = asyncio.Event()
    host = Tunnel(Envelope(LINK), on_silence=told.set)
    host.connected(Pipe(lambda data: None))
    host.keep(0.04)
    async with asyncio.timeout(5):
        await told.wait()
    host.close()


def test_a_header_is_what_the_contract_says() -> None:
    assert HEADER.size == 23


async def test_a_tunnel_carries_connections_over_streams_that_break(tmp_path: Path) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    loop = asyncio.get_running_loop()
    server = await asyncio.start_unix_server(shout, str(tmp_path / "server"))
    host = Tunnel(Envelope(LINK))
    agent = Tunnel(
        Envelope(None), dial=lambda end: loop.create_unix_connection(end, str(tmp_path / "server"))
    )
    relay = await loop.create_unix_server(host.accept, str(tmp_path / "relay"))
    down, up = Pipe(agent.feed), Pipe(host.feed)
    agent.connected(up)
    host.connected(down)
    for tunnel in (host, agent):
        tunnel.keep(0.08)
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay"))
    sent = os.urandom(2 << 20).hex().encode()
    got = bytearray()

    async def read() -> None:
        while len(got) < len(sent):
            got.extend(await reader.read(1 << 16))

    async with asyncio.timeout(30):
        reading = asyncio.create_task(read())
        for start in range(0, len(sent), 1 << 18):
            writer.write(sent[start : start + (1 << 18)])
            await writer.drain()
            down.cut = up.cut = not down.cut
            if not down.cut:
                host.connected(down)
        down.cut = up.cut = False
        host.connected(down)
        await reading
    assert bytes(got) == sent.upper()
    assert down.lost_bytes or up.lost_bytes
    writer.close()
    await writer.wait_closed()
    for tunnel in (host, agent):
        tunnel.close()
        await tunnel.closed()
    relay.close()
    server.close()


def test_a_stream_of_damaged_frames_is_given_up() -> None:
    envelope = Envelope(b"x" * LINK_ID_BYTES)
    damaged = HEADER.pack(MAGIC, Kind.DATA, 1, 0, 0, 12345)
    with pytest.raises(EnvelopeError, match="damaged"):
        for _ in range(20):
            envelope.feed(damaged * 100)


@pytest.mark.parametrize("what", ["beats", "magic"])
def test_a_stream_of_frames_without_anything_in_them_is_given_up(what: str) -> None:
    host, agent = pair()
    agent.beat()
    one = agent.take(1) if what == "beats" else HEADER.pack(MAGIC, Kind.DATA, 0, 0, MAX_PAYLOAD + 1, 0)
    for _ in range(3):
        host.feed(one * (MAX_IDLE - 10))
        host.regular_beat()
    with pytest.raises(EnvelopeError, match="without anything in them"):
        host.feed(one * (MAX_IDLE + 10))


def test_empty_data_brings_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_agent.rpc.envelope.MAX_IDLE", 10)
    host, agent = pair()
    for payload, times in ((b"x", 100), (b"", 10)):
        host.regular_beat()
        for _ in range(times):
            agent.send(Kind.DATA, 1, payload)
        host.feed(agent.take(10_000))
    agent.send(Kind.DATA, 1)
    with pytest.raises(EnvelopeError, match="without anything in them"):
        host.feed(agent.take(1))


def test_acknowledgements_are_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm_agent.rpc.envelope.MAX_IDLE", 10)
    host, agent = pair()
    for _ in range(30):
        host.send(Kind.DATA, 1, b"x")
        agent.feed(host.take(1))
        agent.beat()
        host.feed(agent.take(1))
