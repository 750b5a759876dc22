"""How uvicorn's WebSockets move to a successor: those of its sans-I/O implementation.

Seams, as seen in uvicorn 0.54, all of ``WebSocketsSansIOProtocol``: ``handle_connect``, ``send``, ``receive``,
``start_keepalive``, ``stop_keepalive``, and ``transport``, ``conn``, ``response``, ``scope``, ``queue``, ``frames``,
``read_paused``, ``handshake_initiated``, ``handshake_complete``, ``close_sent``, ``disconnected``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.extensions.base import Extension
from websockets.http11 import Request
from websockets.protocol import State

from ecdysis_async._connections.parcel import Release
from ecdysis_async.servers._common.transfer import TRANSFER

from .websocket import MovingWebSocket

__all__ = ["MovableWebSocket", "movable"]


def movable(protocol_class: type[asyncio.Protocol] | None) -> type[asyncio.Protocol] | None:
    """Return a class of WebSockets that can move, if it is known how; otherwise the given one."""
    if protocol_class is None or not issubclass(protocol_class, WebSocketsSansIOProtocol):
        return protocol_class
    if protocol_class is WebSocketsSansIOProtocol:
        return MovableWebSocket

    class Movable(MovableWebSocket, protocol_class):  # type: ignore[misc, valid-type]
        pass

    return Movable


class MovableWebSocket(MovingWebSocket, WebSocketsSansIOProtocol):
    """A WebSocket of uvicorn's sans-I/O implementation that can move."""

    _is_waiting = False

    @property
    def _is_opening(self) -> bool:
        return not self.handshake_initiated

    @property
    def _is_idle(self) -> bool:
        is_open = self.conn.state is State.OPEN and self.handshake_complete
        is_ending = self.close_sent or self.disconnected
        return is_open and not is_ending and self._is_waiting and self.queue.empty() and not self.frames

    @property
    def _is_read_paused(self) -> bool:
        return self.read_paused

    @property
    def _extensions(self) -> Sequence[Extension]:
        return self.conn.extensions

    def release_connection(self) -> Release | None:
        release = super().release_connection()
        if release is not None:
            self.stop_keepalive()
        return release

    def keep_connection(self) -> None:
        super().keep_connection()
        self.start_keepalive()

    # What uvicorn calls

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:  # noqa: PLR2004 - HTTP's "Switching Protocols"
            self.scope["state"][TRANSFER] = self.ecdysis_transfer

    async def send(self, message: Any) -> None:
        await self.wait_for_verdict()
        await super().send(message)
        if self.handshake_complete:
            self._go_on()

    async def receive(self) -> Any:
        self._is_waiting = True
        try:
            return await super().receive()
        finally:
            self._is_waiting = False

    def _give_up(self) -> None:
        if self._carried is not None:
            self.stop_keepalive()
            self.close_sent = self.disconnected = True
        super()._give_up()
