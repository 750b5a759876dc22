"""uvicorn's WebSockets on their way to a successor: those of its sans-I/O implementation.

Seams, as seen in uvicorn 0.54, all of ``WebSocketsSansIOProtocol``: ``handle_connect``, ``send``, ``receive``,
``start_keepalive``, ``stop_keepalive``, and ``transport``, ``conn``, ``response``, ``scope``, ``queue``, ``frames``,
``read_paused``, ``handshake_initiated``, ``handshake_complete``, ``close_sent``, ``disconnected``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from ecdysis_async.parcel import Release

from .moving import SelfMoving
from .websocket_moving import GOODBYE, TRANSFER, Inbound, Luggage, Muted, Transfer, negotiated

__all__ = ["MovableWebSocket", "movable"]


def movable(protocol_class: type[asyncio.Protocol] | None) -> type[asyncio.Protocol] | None:
    """Return a protocol of WebSockets that can move, where that is known how; else the given one."""
    if protocol_class is None or not issubclass(protocol_class, WebSocketsSansIOProtocol):
        return protocol_class
    if protocol_class is WebSocketsSansIOProtocol:
        return MovableWebSocket

    class Movable(MovableWebSocket, protocol_class):  # type: ignore[misc, valid-type]
        pass

    return Movable


class MovableWebSocket(SelfMoving, WebSocketsSansIOProtocol):
    """A WebSocket that moves while its application waits for a message, and has offered a state."""

    # What it has brought along, until its application has accepted it again.
    _luggage: Luggage | None = None
    # Set when it is known whether it moves; None while it is not on its way.
    _verdict: asyncio.Event | None = None
    _is_waiting = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._transfer = Transfer()
        self._request = b""
        self._inbound = Inbound()
        # What the client sends while the handshake is replayed.
        self._unread: list[bytes] = []

    def resume(self, release: Release) -> None:
        """Go on with a WebSocket of the predecessor's, as soon as there is a transport.

        Raises:
            Refused: it is none that this release knows.
        """
        self._luggage = Luggage.unpack(release)
        self._transfer = Transfer(self._luggage.state)

    def release(self) -> Release | None:
        """Give it away between two messages: nothing of the next one has come, and the last one was dealt with."""
        if not self._is_waiting or not self.queue.empty() or self.frames or not self._inbound.is_between_messages:
            return None
        if self.conn.state is not State.OPEN or not self.handshake_complete or self.close_sent or self.disconnected:
            return None
        # One that is half taken over looks as if it was idle.
        if self._luggage is not None or self._verdict is not None or not self._transfer.is_offered:
            return None
        luggage = Luggage(self._request, negotiated(self.response), self._inbound.window, self._transfer.state())
        self._verdict = asyncio.Event()
        self.stop_keepalive()
        return luggage.release()

    def keep(self) -> None:
        """Go on: it has not moved."""
        self._decide()
        self.start_keepalive()

    # What uvicorn and the loop call

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._luggage is not None:
            self.transport = Muted(transport, self._give_up)  # type: ignore[assignment]
            self._request = self._luggage.request
            super().data_received(self._request)

    def data_received(self, data: bytes) -> None:
        if self._luggage is not None:
            # uvloop reads as soon as a connection is made, whatever it was told before.
            self._unread.append(data)
            self._real_transport.pause_reading()
            return
        if self.handshake_initiated:
            self._inbound.feed(data)
        else:
            self._request += data
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._luggage is not None:
            self._unmute()
        self._decide()
        super().connection_lost(exc)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code != 101:  # noqa: PLR2004 - HTTP's "Switching Protocols"
            return
        self.scope["state"][TRANSFER] = self._transfer
        if self._luggage is None:
            self._inbound.follow(self.conn.extensions)
        else:
            self._inbound.restore(self.conn.extensions, self._luggage.window)

    async def send(self, message: Any) -> None:
        # What is sent after the successor has begun would be in its way.
        if self._verdict is not None:
            await self._verdict.wait()
        await super().send(message)
        if self._luggage is not None and self.handshake_complete:
            self._go_on(self._luggage)

    async def receive(self) -> Any:
        self._is_waiting = True
        try:
            return await super().receive()
        finally:
            self._is_waiting = False

    # How it is resumed

    @property
    def _real_transport(self) -> Any:
        return self.transport.real if isinstance(self.transport, Muted) else self.transport

    def _unmute(self) -> None:
        self._luggage = None
        self.transport = self._real_transport

    def _go_on(self, luggage: Luggage) -> None:
        """Let the client be heard: the application has accepted it as the one before did."""
        if negotiated(self.response) != luggage.settled:
            self.logger.warning("a WebSocket of the predecessor's is accepted otherwise here: it has to come back")
            self._give_up()
            return
        self._unmute()
        unread, self._unread = self._unread, []
        for data in unread:
            self.data_received(data)
        # Unless what was read has to be dealt with first.
        if unread and not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _give_up(self) -> None:
        """Close a WebSocket that was taken over, and that the application will not have, or not so."""
        if self._luggage is not None:
            self._unmute()
            self.stop_keepalive()
            self.close_sent = self.disconnected = True
            self.transport.write(GOODBYE)
            self.transport.close()

    def _decide(self) -> None:
        if self._verdict is not None:
            self._verdict.set()
            self._verdict = None
