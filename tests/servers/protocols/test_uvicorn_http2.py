"""uvicorn's HTTP/2: two goodbyes, and what is refused behind the second one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import h2.config
import h2.connection
import h2.events
import zttp

from ecdysis_async.servers._protocols.uvicorn_http2 import _Http2Connection, is_http_2

HEADERS = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "localhost")]


class Transport:
    """Holds what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def take(self) -> bytes:
        data, self.written = self.written, b""
        return data


async def test_the_last_stream_is_named_answered_and_no_other_is_begun() -> None:
    conn, transport = zttp.Connection(zttp.SERVER, protocol=zttp.HTTP2), Transport()
    protocol: Any = SimpleNamespace(conn=conn, transport=transport, cycles={}, handle_request=None)
    connection = _Http2Connection(protocol)
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    client.send_headers(1, HEADERS, end_stream=True)
    conn.initiate_connection()
    conn.receive_data(client.data_to_send())
    while conn.next_event() is not zttp.NEED_DATA:
        pass
    transport.write(conn.data_to_send())
    await connection.refuse()
    (goodbye,) = [
        each for each in client.receive_data(transport.take()) if isinstance(each, h2.events.ConnectionTerminated)
    ]
    assert (goodbye.last_stream_id, goodbye.error_code) == (1, 0)

    protocol.handle_request(SimpleNamespace(stream_id=1))
    assert conn.data_to_send() == bytes([0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7])
    await connection.close()
    assert connection.is_over
    await connection.announce()
    assert transport.take() == b""


def test_a_protocol_of_http_2_knows_its_cycles() -> None:
    assert is_http_2(SimpleNamespace(cycles={}))
    assert not is_http_2(SimpleNamespace(cycle=None))
