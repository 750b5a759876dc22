"""Which of uvicorn's WebSockets can move: those of the sans-I/O implementation, with what a user has made of it."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ecdysis_async._connections.parcel import Transferable
from ecdysis_async.servers._protocols.uvicorn_websocket import MovableWebSocket, movable


class Custom(WebSocketsSansIOProtocol):
    pass


def test_only_the_sans_io_implementation_moves() -> None:
    assert movable(WebSocketsSansIOProtocol) is MovableWebSocket
    assert movable(asyncio.Protocol) is asyncio.Protocol
    assert movable(None) is None


def test_a_class_of_the_users_own_stays_what_it_is() -> None:
    kind = movable(Custom)
    assert kind is not None
    assert issubclass(kind, Custom)
    assert issubclass(kind, Transferable)
