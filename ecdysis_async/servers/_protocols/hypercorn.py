"""What is seen and changed of hypercorn's connections: the goodbye of HTTP/2, and streams whose client has gone.

Seams, as seen in hypercorn 0.18: of ``TCPServer`` ``protocol``, ``protocol_send``, ``_read_data`` and
``_initiate_server_close``; ``protocol`` of ``ProtocolWrapper``; of ``H2Protocol`` ``closed``, ``connection``, ``send``,
``stream_buffers``, ``streams`` and ``task_group``; of ``H11Protocol`` ``connection``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived
from h2.events import Event as H2Event
from h2.exceptions import ProtocolError
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol

from ecdysis_async._connections.connection import Connection
from ecdysis_async.servers._common.http2 import ANY_STREAM, Http2Connection, refuse_and_close, write_goaway

__all__ = ["HypercornConnections", "http_2_of", "make_server_class", "release_streams"]


def make_server_class(kind: type[Any]) -> type[Any]:
    """Return a class of hypercorn's servers of one connection that tells of each request.

    Its attribute ``on_request`` is to be set: it is called then.

    Args:
        kind: hypercorn's ``TCPServer``, of any loop.
    """

    class Telling(kind):  # type: ignore[misc]
        on_request: Callable[[], None]

        def protocol_send(self, event: Event) -> Awaitable[None]:
            # A plain function: each event would pay for a coroutine around hypercorn's own.
            if isinstance(event, Updated) and not event.idle:
                self.on_request()
            return super().protocol_send(event)  # type: ignore[no-any-return]

        async def _read_data(self) -> None:
            await super()._read_data()
            await release_streams(self)

    return Telling


def http_2_of(server: Any) -> H2Protocol | None:
    """Return what serves a connection of hypercorn's, if that is HTTP/2 by now.

    Args:
        server: hypercorn's ``TCPServer``, of any loop.
    """
    # A server has no protocol before its TLS handshake is over.
    protocol = getattr(getattr(server, "protocol", None), "protocol", None)
    return protocol if isinstance(protocol, H2Protocol) else None


async def release_streams(server: Any) -> None:
    """Let applications go on that send to a client of HTTP/2 who has gone.

    hypercorn's sending task has ended then, and they would wait for it for ever. Nothing is read any more.
    """
    protocol = http_2_of(server)
    if protocol is not None:
        for buffer in tuple(protocol.stream_buffers.values()):
            await buffer.close()


class HypercornConnections:
    """The connections of one server of hypercorn's, and their goodbyes of HTTP/2."""

    def __init__(self) -> None:
        self._servers: dict[Connection, Any] = {}
        self._http_2: dict[Connection, _Http2Connection] = {}

    @contextlib.contextmanager
    def holding(self, connection: Connection, server: Any) -> Iterator[None]:
        """Know a connection while hypercorn's ``TCPServer`` serves it."""
        self._servers[connection] = server
        try:
            yield
        finally:
            del self._servers[connection]
            self._http_2.pop(connection, None)

    @property
    def known(self) -> dict[Connection, Any]:
        """The connections, and what serves each."""
        return dict(self._servers)

    def find_http_2(self) -> list[Http2Connection]:
        """Return those that speak HTTP/2 by now."""
        for connection, server in self._servers.items():
            if connection not in self._http_2 and (protocol := http_2_of(server)) is not None:
                self._http_2[connection] = _Http2Connection(server, protocol, connection)
        return list(self._http_2.values())

    def mend_http_2(self, connection: Connection) -> None:
        """Keep what happens to one stream from the others of its connection. Call it at each request.

        At ``keep_alive_max_requests`` hypercorn's h2 sends a GOAWAY, and nothing behind it. And hypercorn breaks down
        over what a client sends to a stream that was answered before.
        """
        protocol = http_2_of(self._servers[connection])
        if protocol is None or isinstance(protocol.streams, _Streams):
            return
        protocol.streams = _Streams(protocol.streams)
        self.find_http_2()
        http_2 = self._http_2[connection]

        def leave() -> None:
            if not http_2.is_refused and not http_2.is_over:
                protocol.task_group.spawn(refuse_and_close, http_2)

        protocol.connection.close_connection = leave  # type: ignore[method-assign, assignment]

    def has_next_request(self, connection: Connection) -> bool:
        """Say whether hypercorn has read more of a connection of HTTP/1.1 than the request that runs."""
        server = self._servers.get(connection)
        protocol = getattr(getattr(server, "protocol", None), "protocol", None)
        if not isinstance(protocol, H11Protocol):
            return False
        # On asyncio, a stream reads ahead.
        ahead = getattr(getattr(server, "reader", None), "_buffer", b"")  # asyncio's
        return bool(protocol.connection.trailing_data[0] or ahead)


class _Answered:
    """Stands for a stream that was answered before its request was received: the rest is for nobody."""

    async def handle(self, event: object) -> None:
        pass


class _Streams(dict[int, Any]):
    """The streams of a connection; one that has ended is not in it, and can still be told something."""

    def __missing__(self, stream: int) -> _Answered:
        return _Answered()


class _Http2Connection(Http2Connection):
    def __init__(self, server: Any, protocol: H2Protocol, connection: Connection) -> None:
        self._server = server
        self._protocol = protocol
        self._connection = connection
        self.is_refused = False

    @property
    def is_idle(self) -> bool:
        # A stream is forgotten before the end of its answer is sent.
        return not self._protocol.streams and not self._protocol.stream_buffers

    @property
    def is_over(self) -> bool:
        return self._protocol.closed

    async def announce(self) -> None:
        # hypercorn writes whole frames at a time, so that one more may stand between two. To its own h2, a GOAWAY would
        # be the end of everything.
        if not self.is_refused:
            await self._protocol.send(RawData(write_goaway(ANY_STREAM)))

    async def refuse(self) -> None:
        if self.is_refused:
            return
        self.is_refused = True
        last = self._protocol.connection.highest_inbound_stream_id
        _refuse_above(last, self._protocol.connection)
        self._connection.mark_silent(is_silent=self.is_idle)
        await self._protocol.send(RawData(write_goaway(last)))

    async def close(self) -> None:
        await self._server._initiate_server_close()  # noqa: SLF001 - hypercorn's


def _refuse_above(last: int, connection: H2Connection) -> None:
    """Let hypercorn hear nothing of streams above the last one: their clients may ask again elsewhere."""
    receive = connection.receive_data

    def receive_known(data: bytes) -> list[H2Event]:
        known: list[H2Event] = []
        for event in receive(data):
            stream = getattr(event, "stream_id", None) or 0
            if stream <= last:
                known.append(event)
            elif isinstance(event, RequestReceived):
                # The client may have reset it in the same breath.
                with contextlib.suppress(ProtocolError):
                    connection.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
            elif isinstance(event, DataReceived):
                # Counts against the window of all streams.
                connection.acknowledge_received_data(event.flow_controlled_length, stream)
        return known

    connection.receive_data = receive_known  # type: ignore[method-assign, assignment]
