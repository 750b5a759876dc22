"""The connections of the library websockets on their way to a successor.

Seams, as seen in websockets 17, all of ``ServerConnection``: ``handshake``, ``send``, ``ping``, ``pong``, ``close``,
``transport``, ``protocol``, ``response``, ``send_in_progress``, ``recv_messages`` with ``get_in_progress``, ``frames``
and ``paused``; and that the server's factory of protocols makes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.extensions.base import Extension
from websockets.protocol import State

from ecdysis_async._accepting.asyncio_servers import GatedServer, TransferStrategy
from ecdysis_async._accepting.asyncio_servers import ServerConnection as Tracked
from ecdysis_async._connections.parcel import Refused, Release

from .http import WEBSOCKET, SelfMoving
from .websocket import MovingWebSocket, Transfer

__all__ = ["WebSocketTransfer", "movable", "transfer_of"]


def transfer_of(websocket: ServerConnection) -> Transfer:
    """Return where a handler offers the state of its connection; without effect where it can never move."""
    transfer = getattr(websocket, "ecdysis_transfer", None)
    return transfer if isinstance(transfer, Transfer) else Transfer()


class WebSocketTransfer(TransferStrategy):
    """Connections between two messages."""

    def __init__(self, server: GatedServer) -> None:
        self._make = server.protocol_factory

    def pack(self, connection: Tracked, protocol: Any) -> Release | None:
        return protocol.release() if isinstance(protocol, SelfMoving) else None

    def keep(self, connection: Tracked, protocol: Any) -> None:
        if isinstance(protocol, SelfMoving):
            protocol.keep()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind != WEBSOCKET:
            raise Refused(f"this server does not go on with connections of the kind {release.kind!r}")
        websocket: Any = self._make()
        websocket.resume(release)
        return websocket  # type: ignore[no-any-return]


def movable(kind: type[ServerConnection]) -> type[ServerConnection]:
    """Return a connection that moves while its handler waits for a message, and has offered a state."""

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
