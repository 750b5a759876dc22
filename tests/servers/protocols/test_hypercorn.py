"""hypercorn's HTTP/2: what is refused above the last stream, and who sends to nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import h2.config
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from hypercorn.protocol.h2 import BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper

from ecdysis_async._connections.connection import Connection
from ecdysis_async.servers._protocols import hypercorn
from ecdysis_async.servers._protocols.hypercorn import HypercornConnections, http_2_of, release_streams

HEADERS = [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "localhost")]


def make_server(**attributes: Any) -> Any:
    protocol = H2Protocol.__new__(H2Protocol)
    vars(protocol).update(attributes)
    return SimpleNamespace(protocol=SimpleNamespace(protocol=protocol))


def test_a_stream_above_the_last_one_is_refused_and_one_below_goes_on() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    client.initiate_connection()
    server.initiate_connection()
    client.send_headers(1, HEADERS)
    server.receive_data(client.data_to_send())
    client.receive_data(server.data_to_send())

    hypercorn._refuse_above(server.highest_inbound_stream_id, server)
    client.send_headers(3, HEADERS)
    client.send_data(3, b"never read", end_stream=True)
    client.send_data(1, b"read", end_stream=True)
    events = server.receive_data(client.data_to_send())
    kinds = [type(event) for event in events if getattr(event, "stream_id", None)]
    assert kinds == [h2.events.DataReceived, h2.events.StreamEnded]
    (reset,) = [each for each in client.receive_data(server.data_to_send()) if isinstance(each, h2.events.StreamReset)]
    assert (reset.stream_id, reset.error_code) == (3, ErrorCodes.REFUSED_STREAM)


@pytest.mark.backends("trio")
async def test_who_sends_to_a_client_that_has_gone_waits_for_nothing() -> None:
    buffer = StreamBuffer(EventWrapper)
    await buffer.push(b"unsent")
    await release_streams(make_server(stream_buffers={1: buffer}))
    with anyio.fail_after(10):
        await buffer.drain()
    with pytest.raises(BufferCompleteError):
        await buffer.push(b"more")


def test_a_connection_of_http_2_is_found_once_it_is_one() -> None:
    connections = HypercornConnections()
    connection = Connection()
    server = SimpleNamespace()
    with connections.holding(connection, server):
        assert connections.find_http_2() == []
        assert not connections.has_next_request(connection)
        server.protocol = make_server(closed=False).protocol
        assert http_2_of(server) is server.protocol.protocol
        (found,) = connections.find_http_2()
        assert connections.find_http_2() == [found]
    assert connections.find_http_2() == []
