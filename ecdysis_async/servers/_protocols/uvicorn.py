"""uvicorn's idle connections on their way to a successor: those of h11 and of httptools.

Seams, as seen in uvicorn 0.54: of both protocols ``cycle``, ``flow``, ``scope``, ``timeout_keep_alive_task`` with its
handler, and ``on_response_complete``; ``pipeline`` and ``parser`` of httptools', ``conn`` of h11's. uvicorn's zttp
protocols do not show whether they have read half a request: of those only connections that nobody has read from move.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ecdysis_async._accepting.asyncio_servers import GatedServer, ServerConnection
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Refused, Release

from .http import IDLE, WEBSOCKET, SelfMoving, UnreadOnly

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    HttpToolsProtocol = H11Protocol  # type: ignore[assignment, misc]

__all__ = ["UvicornMoves", "make_movable", "make_websockets_movable", "moves_of"]

# Where uvicorn has the WebSockets that can move.
SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"


def moves_of(server: GatedServer, protocol_class: type[asyncio.Protocol]) -> UnreadOnly:
    """Return how the connections of a server move that makes such protocols."""
    return UvicornMoves(server) if issubclass(protocol_class, H11Protocol | HttpToolsProtocol) else UnreadOnly(server)


class UvicornMoves(UnreadOnly):
    """Connections between two requests, and those before the first one."""

    keeps_alive = True

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if isinstance(protocol, H11Protocol):
            is_idle = _is_idle(protocol) and _has_h11_read_all(protocol)
        elif isinstance(protocol, HttpToolsProtocol):
            is_idle = _is_idle(protocol) and _has_httptools_read_all(protocol)
        elif isinstance(protocol, SelfMoving):
            return protocol.release()
        else:
            # A WebSocket that cannot move by now.
            return None
        if not is_idle:
            return None
        timer = protocol.timeout_keep_alive_task
        if timer is None:
            return Release(kind=IDLE)
        # Left to run, because thousands that are cancelled at once stall asyncio's loop; it finds the transport closed.
        left = max(0.0, timer.when() - protocol.loop.time())
        return Release({"keep_alive": left}, kind=IDLE)

    def keep(self, connection: ServerConnection, protocol: Any) -> None:
        if isinstance(protocol, SelfMoving):
            protocol.keep()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind == WEBSOCKET:
            return self._resume_websocket(release)
        protocol = super().resume(release)
        if isinstance(protocol, H11Protocol | HttpToolsProtocol) and isinstance(release.state, dict):
            left = release.state.get("keep_alive")
            protocol.ecdysis_keep_alive = float(left) if left is not None else None  # type: ignore[union-attr]
        return protocol

    def _resume_websocket(self, release: Release) -> asyncio.BaseProtocol:
        # What a WebSocket is made with, the protocol knows that it comes after.
        http: Any = self._make()
        kind = http.ws_protocol_class
        if kind is None or not issubclass(kind, SelfMoving):
            raise Refused("WebSockets are not served there by the implementation that resumes them (websockets-sansio)")
        websocket: Any = kind(config=http.config, server_state=http.server_state, app_state=http.app_state)
        websocket.resume(release)
        return websocket  # type: ignore[no-any-return]


def make_websockets_movable(protocol_class: Any) -> Any:
    """Return a protocol of WebSockets that can move, where it is known how; else the given one."""
    # Not imported where it is not used: the package websockets need not be there.
    if SANSIO not in sys.modules:
        return protocol_class
    from .uvicorn_websocket import movable

    return movable(protocol_class)


def make_movable(protocol_class: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Let a protocol that can move say when it is idle, and go on with what was left of its time."""
    if not issubclass(protocol_class, H11Protocol | HttpToolsProtocol):
        return protocol_class

    class Movable(protocol_class):  # type: ignore[misc, valid-type]
        # How long a connection that has moved may be idle.
        ecdysis_keep_alive: float | None = None

        def connection_made(self, transport: Any) -> None:
            self._connection = current_connection.get()
            super().connection_made(transport)
            if self.ecdysis_keep_alive is not None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.ecdysis_keep_alive, self.timeout_keep_alive_handler
                )

        def connection_lost(self, exc: Exception | None) -> None:
            if self._connection is not None and self._connection.moved:
                # Not to be cancelled, see above.
                self.timeout_keep_alive_task = None
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if isinstance(self._connection, ServerConnection):
                self._connection.server.plane.tracker.note_safe_point(self._connection)

    return Movable


def _is_idle(protocol: Any) -> bool:
    """Say whether the last request has been answered, and nothing else waits."""
    is_answered = protocol.cycle is None or protocol.cycle.response_complete
    return is_answered and not protocol.flow.read_paused


def _has_h11_read_all(protocol: H11Protocol) -> bool:
    connection = protocol.conn
    return connection.our_state is connection.their_state is h11.IDLE and not connection.trailing_data[0]


def _has_httptools_read_all(protocol: Any) -> bool:
    cycle = protocol.cycle
    if protocol.pipeline:
        return False
    if cycle is None:
        return protocol.scope is None
    # With the first byte of a message comes a new scope.
    return bool(not cycle.more_body and cycle.keep_alive and protocol.scope is cycle.scope)
