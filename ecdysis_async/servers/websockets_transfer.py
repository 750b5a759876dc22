"""The connections of the library websockets on their way to a successor.

Seams, as seen in websockets 17, all of ``ServerConnection``: ``handshake``, ``send``, ``ping``, ``pong``, ``close``,
``transport``, ``protocol``, ``response``, ``send_in_progress``, ``recv_messages`` with ``get_in_progress``, ``frames``
and ``paused``; and that the server's factory of protocols makes them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from ecdysis_async.asyncio_servers import GatedServer, Moves
from ecdysis_async.asyncio_servers import ServerConnection as Tracked
from ecdysis_async.parcel import Refused, Release

from .moving import WEBSOCKET, SelfMoving
from .websocket_moving import GOODBYE, Inbound, Luggage, Muted, Transfer, negotiated

__all__ = ["WebSocketMoves", "movable", "transfer_of"]


def transfer_of(websocket: ServerConnection) -> Transfer:
    """Return where a handler offers the state of its connection; without effect where it can never move."""
    transfer = getattr(websocket, "ecdysis_transfer", None)
    return transfer if isinstance(transfer, Transfer) else Transfer()


class WebSocketMoves(Moves):
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

    class Movable(SelfMoving, kind):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.ecdysis_transfer = Transfer()
            # What it has brought along, until its handshake is replayed.
            self._luggage: Luggage | None = None
            # Set when it is known whether it moves; None while it is not on its way.
            self._verdict: asyncio.Event | None = None
            self._request_bytes = b""
            self._inbound = Inbound()
            self._is_followed = False
            # What the client sends while the handshake is replayed.
            self._unread: list[bytes] = []

        def resume(self, release: Release) -> None:
            self._luggage = Luggage.unpack(release)
            self.ecdysis_transfer = Transfer(self._luggage.state)

        def release(self) -> Release | None:
            messages = self.recv_messages
            if not messages.get_in_progress or len(messages.frames) or not self._inbound.is_between_messages:
                return None
            if self.protocol.state is not State.OPEN or self.send_in_progress is not None:
                return None
            # One that is half taken over looks as if it was idle.
            if self._luggage is not None or self._verdict is not None or not self.ecdysis_transfer.is_offered:
                return None
            settled, state = negotiated(self.response), self.ecdysis_transfer.state()
            luggage = Luggage(self._request_bytes, settled, self._inbound.window, state)
            self._verdict = asyncio.Event()
            return luggage.release()

        def keep(self) -> None:
            verdict, self._verdict = self._verdict, None
            if verdict is not None:
                verdict.set()

        # What websockets and the loop call

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self._luggage is not None:
                self.transport: Any = Muted(transport, self._give_up)
                self._request_bytes = self._luggage.request
                super().data_received(self._request_bytes)

        def data_received(self, data: bytes) -> None:
            if self._luggage is not None:
                # uvloop reads as soon as a connection is made, whatever it was told before.
                self._unread.append(data)
                self._real_transport.pause_reading()
                return
            if self.protocol.state is State.CONNECTING:
                self._request_bytes += data
            else:
                self._follow()
                self._inbound.feed(data)
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            self._unmute()
            self.keep()
            super().connection_lost(exc)

        async def handshake(self, *arguments: Any, **options: Any) -> None:
            await super().handshake(*arguments, **options)
            if self._luggage is not None:
                self._go_on(self._luggage)

        async def send(self, *arguments: Any, **options: Any) -> None:
            # What is sent after the successor has begun would be in its way.
            await self._wait_for_verdict()
            await super().send(*arguments, **options)

        async def ping(self, *arguments: Any, **options: Any) -> Any:
            await self._wait_for_verdict()
            return await super().ping(*arguments, **options)

        async def pong(self, *arguments: Any, **options: Any) -> None:
            await self._wait_for_verdict()
            await super().pong(*arguments, **options)

        async def close(self, *arguments: Any, **options: Any) -> None:
            await self._wait_for_verdict()
            await super().close(*arguments, **options)

        # How it is done

        async def _wait_for_verdict(self) -> None:
            if self._verdict is not None:
                await self._verdict.wait()

        def _follow(self) -> None:
            if not self._is_followed:
                self._is_followed = True
                self._inbound.follow(self.protocol.extensions)

        @property
        def _real_transport(self) -> Any:
            return self.transport.real if isinstance(self.transport, Muted) else self.transport

        def _unmute(self) -> None:
            self._luggage = None
            self.transport = self._real_transport

        def _go_on(self, luggage: Luggage) -> None:
            """Let the client be heard: the handshake is as it was before."""
            if negotiated(self.response) != luggage.settled:
                self.logger.warning("a WebSocket of the predecessor's is accepted otherwise here: it has to come back")
                self._give_up()
                return
            self._is_followed = True
            self._inbound.restore(self.protocol.extensions, luggage.window)
            self._unmute()
            unread, self._unread = self._unread, []
            for data in unread:
                self.data_received(data)
            if unread and not self.recv_messages.paused and not self.transport.is_closing():
                self.transport.resume_reading()

        def _give_up(self) -> None:
            if self._luggage is not None:
                self._unmute()
                self.transport.write(GOODBYE)
                self.transport.close()

    return Movable
