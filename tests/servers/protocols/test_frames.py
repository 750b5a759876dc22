"""Where the frames and the messages of a WebSocket's client end."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("websockets")

from websockets.frames import Frame, Opcode

from ecdysis_async.servers._protocols.frames import FrameFollower

LENGTHS = (0, 1, 125, 126, 127, 65535, 65536, 70000)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_end_of_a_frame_is_known_at_every_cut(length: int, mask: bool) -> None:
    data = Frame(Opcode.BINARY, bytes(length)).serialize(mask=mask)
    for cut in {*range(1, min(len(data), 20)), len(data) // 2, len(data) - 1} - {len(data), 0}:
        inbound = FrameFollower()
        inbound.feed(data[:cut])
        assert not inbound.is_between_frames
        inbound.feed(data[cut:])
        assert inbound.is_between_frames


def test_fragments_are_no_message() -> None:
    inbound = FrameFollower()
    for opcode, fin, is_whole in (
        (Opcode.TEXT, False, False),
        (Opcode.PING, True, False),
        (Opcode.CONT, False, False),
        (Opcode.CONT, True, True),
        (Opcode.PONG, True, True),
    ):
        inbound.feed(Frame(opcode, b"piece", fin).serialize(mask=True))
        assert (inbound.is_between_frames, inbound.is_between_messages) == (True, is_whole)


def test_many_frames_in_any_pieces() -> None:
    frames = b"".join(Frame(Opcode.TEXT, bytes(length)).serialize(mask=True) for length in LENGTHS * 3)
    pieces = random.Random(1)
    inbound = FrameFollower()
    while frames:
        size = pieces.choice((1, 2, 3, 100, 50000))
        inbound.feed(frames[:size])
        frames = frames[size:]
    assert inbound.is_between_frames
