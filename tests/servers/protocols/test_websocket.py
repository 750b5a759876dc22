"""What a WebSocket takes along: what its compression refers to, and what its application has offered."""

from __future__ import annotations

import random
import zlib

import pytest

pytest.importorskip("websockets")

from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from ecdysis_async._connections.parcel import Refused, Release
from ecdysis_async.servers._common.transfer import Transfer
from ecdysis_async.servers._protocols.websocket import WebSocketState, WindowFollower


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_a_fresh_decompressor_goes_on_where_another_one_ended(bits: int) -> None:
    """Again and again; the client's compressor is one and the same, and refers as far back as it may."""
    client = zlib.compressobj(wbits=-bits)
    words = random.Random(2)
    vocabulary = [bytes(words.choices(range(256), k=40)) for _ in range(60)]
    inbound, server = WindowFollower(), PerMessageDeflate(False, False, bits, 12)
    inbound.follow([server])
    for number in range(60):
        text = b"".join(words.choices(vocabulary, k=words.choice((0, 1, 30, 1500))))
        data = client.compress(text) + client.flush(zlib.Z_SYNC_FLUSH)
        assert server.decode(Frame(Opcode.BINARY, data[:-4], rsv1=True)).data == text
        # One that is not compressed leaves no trace.
        server.decode(Frame(Opcode.TEXT, b"plain"))
        if number % 3 == 0:
            window = inbound.window
            assert len(window) <= 1 << bits
            inbound, server = WindowFollower(), PerMessageDeflate(False, False, bits, 12)
            inbound.restore([server], window)


def test_without_a_context_there_is_nothing_to_remember() -> None:
    inbound, server = WindowFollower(), PerMessageDeflate(True, False, 12, 12)
    inbound.follow([server])
    data = zlib.compressobj(wbits=-12)
    server.decode(Frame(Opcode.TEXT, (data.compress(b"text") + data.flush(zlib.Z_SYNC_FLUSH))[:-4], rsv1=True))
    assert inbound.window == b""


def test_luggage_arrives_as_it_was_packed() -> None:
    luggage = WebSocketState(
        b"GET / HTTP/1.1\r\nX: \xe9\r\n\r\n", [["permessage-deflate"], []], bytes(range(256)), {"count": 1}
    )
    assert WebSocketState.unpack(luggage.release()) == luggage


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        ["request", [[], []], "", 1][:3],
        ["request", [[]], "", 1],
        ["no latin-1: \u20ac", [[], []], "", 1],
        ["request", [[], []], "A", 1],
    ],
)
def test_what_is_no_luggage_is_refused(state: object) -> None:
    with pytest.raises(Refused):
        WebSocketState.unpack(Release(state))


def test_an_offer() -> None:
    transfer = Transfer(7)
    assert (transfer.inherited, transfer.is_offered) == (7, False)
    transfer.offer(0)
    assert (transfer.is_offered, transfer.state()) == (True, 0)
    transfer.offer(lambda: {"count": 1})
    assert transfer.state() == {"count": 1}
    transfer.offer(object())
    with pytest.raises(TypeError):
        transfer.state()
    transfer.offer(float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        transfer.state()
    transfer.offer(None)
    assert not transfer.is_offered
