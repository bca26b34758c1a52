"""Frames and packets: what is sent arrives, and what is no frame is refused, however it is cut up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_agent import limits
from rlm_agent.frames import PREFIX, Frame, FrameBuffer, FrameError, Kind, PacketBuffer, packets

HEADERS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans()))
FRAMES = st.builds(Frame, st.sampled_from(Kind), HEADERS, st.binary(max_size=500))


@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(1, 400), min_size=1))
def test_frames_survive_any_cut(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(frame.encode() for frame in frames)
    buffer, received, position = FrameBuffer(), [], 0
    while position < len(data):
        size = cuts[position % len(cuts)]
        received += buffer.feed(data[position : position + size])
        position += size
    assert received == frames


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waits_and_never_raises_anything_else(data: bytes) -> None:
    buffer = FrameBuffer()
    try:
        buffer.feed(data)
    except FrameError:
        return
    assert len(buffer._pending) <= len(data)


@pytest.mark.parametrize("sizes", [(limits.MAX_FRAME_HEADER + 1, 0), (0, limits.MAX_FRAME_BODY + 1)])
def test_an_oversized_frame_is_refused_by_its_prefix(sizes: tuple[int, int]) -> None:
    with pytest.raises(FrameError, match="over the limit"):
        FrameBuffer().feed(PREFIX.pack(Kind.CALL, *sizes))


@given(st.lists(st.tuples(FRAMES, st.integers(0, 3)), max_size=6), st.integers(0, 200_000))
def test_a_frame_that_breaks_off_does_not_harm_the_next(plan: list[tuple[Frame, int]], extra: int) -> None:
    buffer, received, expected = PacketBuffer(), [], []
    for frame, lost in plan:
        whole = Frame(frame.kind, frame.header, frame.body + b"x" * extra)
        sent = packets(whole.encode())
        kept = sent[: max(0, len(sent) - lost)]
        received += [done for packet in kept if (done := buffer.feed(packet))]
        if len(kept) == len(sent):
            expected.append(whole)
    assert received == expected


@given(st.lists(st.binary(max_size=80), max_size=10))
def test_garbage_packets_are_refused_or_ignored(garbage: list[bytes]) -> None:
    buffer = PacketBuffer()
    for packet in garbage:
        try:
            buffer.feed(packet)
        except FrameError:
            return


def test_a_header_that_is_no_object_is_refused() -> None:
    for header in (b"[]", b"1", b"{", b"[" * 50_000, b"{}x", b"{}{}"):
        with pytest.raises(FrameError):
            FrameBuffer().feed(PREFIX.pack(Kind.CALL, len(header), 0) + header)


def test_a_header_may_be_limited_to_less() -> None:
    frame = Frame(Kind.CALL, {"id": 1, "model": "m" * 100}).encode()
    assert len(FrameBuffer().feed(frame)) == 1
    with pytest.raises(FrameError, match="over the limit"):
        FrameBuffer(max_header=64).feed(frame)
