"""How connections of the library websockets move to a successor.

Seams, as seen in websockets 17, all of ``ServerConnection``: ``handshake``, ``send``, ``ping``, ``pong``, ``close``,
``transport``, ``protocol``, ``response``, ``send_in_progress``, ``recv_messages`` with ``get_in_progress``, ``frames``
and ``paused``; and the server's factory of protocols, which makes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.extensions.base import Extension
from websockets.protocol import State

from ecdysis_async._accepting.asyncio_connections import ProtocolFactory, TransferStrategy
from ecdysis_async._accepting.asyncio_connections import ServerConnection as Tracked
from ecdysis_async._connections.parcel import Refused, Release, Transferable
from ecdysis_async.servers._common.transfer import Transfer

from .http import WEBSOCKET
from .websocket import MovingWebSocket

__all__ = ["WebSocketTransfer", "movable", "transfer_of"]


def transfer_of(websocket: ServerConnection) -> Transfer:
    """Return where a handler offers the state of its connection; an offer has no effect if it can never move."""
    transfer = getattr(websocket, "ecdysis_transfer", None)
    return transfer if isinstance(transfer, Transfer) else Transfer()


class WebSocketTransfer(TransferStrategy):
    """Moves connections between two messages.

    Args:
        protocol_factory: makes the protocol that goes on with a connection.
    """

    def __init__(self, protocol_factory: ProtocolFactory) -> None:
        self._make = protocol_factory

    def pack(self, connection: Tracked, protocol: Any) -> Release | None:
        return protocol.release_connection() if isinstance(protocol, Transferable) else None

    def keep(self, connection: Tracked, protocol: Any) -> None:
        if isinstance(protocol, Transferable):
            protocol.keep_connection()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind != WEBSOCKET:
            raise Refused(f"this server does not go on with connections of the kind {release.kind!r}")
        websocket: Any = self._make()
        websocket.resume(release)
        return websocket  # type: ignore[no-any-return]


def movable(kind: type[ServerConnection]) -> type[ServerConnection]:
    """Return a class of connections that move while their handler waits for a message, and has offered a state."""

    class Movable(MovingWebSocket, kind):  # type: ignore[misc, valid-type]
        @property
        def _is_opening(self) -> bool:
            return self.protocol.state is State.CONNECTING

        @property
        def _is_idle(self) -> bool:
            messages = self.recv_messages
            is_waiting = messages.get_in_progress and not len(messages.frames)
            return self.protocol.state is State.OPEN and is_waiting and self.send_in_progress is None

        @property
        def _is_read_paused(self) -> bool:
            return self.recv_messages.paused  # type: ignore[no-any-return]

        @property
        def _extensions(self) -> Sequence[Extension]:
            return self.protocol.extensions  # type: ignore[no-any-return]

        # What websockets calls

        async def handshake(self, *arguments: Any, **options: Any) -> None:
            await super().handshake(*arguments, **options)
            self._go_on()

        async def send(self, *arguments: Any, **options: Any) -> None:
            await self.wait_for_verdict()
            await super().send(*arguments, **options)

        async def ping(self, *arguments: Any, **options: Any) -> Any:
            await self.wait_for_verdict()
            return await super().ping(*arguments, **options)

        async def pong(self, *arguments: Any, **options: Any) -> None:
            await self.wait_for_verdict()
            await super().pong(*arguments, **options)

        async def close(self, *arguments: Any, **options: Any) -> None:
            await self.wait_for_verdict()
            await super().close(*arguments, **options)

    return Movable
