"""What is changed in uvicorn's protocols: they know their connection, and idle connections move to a successor.

Seams, as seen in uvicorn 0.54: of H11Protocol and HttpToolsProtocol ``cycle``, ``flow``, ``scope``, ``loop``,
``timeout_keep_alive_task`` with its handler, and ``on_response_complete``; ``pipeline`` and ``parser`` of httptools',
``conn`` of h11's; of a protocol that may switch to HTTP/2 ``alpn_protocols``. uvicorn's zttp protocols do not show
whether they have read half a request: their connections move only if they were never read from.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ecdysis_async._accepting.asyncio_connections import ProtocolFactory, ServerConnection
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Refused, Release, Transferable

from .http import IDLE, WEBSOCKET, UnreadOnly

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    HttpToolsProtocol = H11Protocol  # type: ignore[assignment, misc]

__all__ = ["UvicornTransfer", "choose_transfer", "keep_context", "make_movable", "make_websockets_movable"]

# Where uvicorn has the WebSockets that can move.
SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"


def choose_transfer(protocol_factory: ProtocolFactory, protocol_class: type[asyncio.Protocol]) -> UnreadOnly:
    """Return how the connections of a server move that makes protocols of a class."""
    is_known = issubclass(protocol_class, H11Protocol | HttpToolsProtocol)
    return UvicornTransfer(protocol_factory) if is_known else UnreadOnly(protocol_factory)


class UvicornTransfer(UnreadOnly):
    """Moves connections between two requests, and before the first one, and WebSockets that can move themselves."""

    moves_between_requests = True

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if isinstance(protocol, H11Protocol):
            is_idle = _is_idle(protocol) and _has_h11_read_all(protocol)
        elif isinstance(protocol, HttpToolsProtocol):
            is_idle = _is_idle(protocol) and _has_httptools_read_all(protocol)
        elif isinstance(protocol, Transferable):
            return protocol.release_connection()
        else:
            # A WebSocket that cannot move.
            return None
        if not is_idle:
            return None
        timer = protocol.timeout_keep_alive_task
        if timer is None:
            return Release(kind=IDLE)
        # The timer runs on, because thousands of timers that are cancelled at once stall asyncio's loop. It finds the
        # transport closed.
        left = max(0.0, timer.when() - protocol.loop.time())
        return Release({"keep_alive": left}, kind=IDLE)

    def keep(self, connection: ServerConnection, protocol: Any) -> None:
        if isinstance(protocol, Transferable):
            protocol.keep_connection()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind == WEBSOCKET:
            return self._resume_websocket(release)
        protocol = super().resume(release)
        if isinstance(protocol, _MovableHttp) and isinstance(release.state, dict):
            left = release.state.get("keep_alive")
            protocol.resume_keep_alive(float(left) if left is not None else None)
        return protocol

    def _resume_websocket(self, release: Release) -> asyncio.BaseProtocol:
        # uvicorn makes a WebSocket of what the HTTP protocol before it knows.
        http: Any = self._make()
        kind = http.ws_protocol_class
        if kind is None or not issubclass(kind, Transferable):
            raise Refused("WebSockets are not served there by the implementation that resumes them (websockets-sansio)")
        websocket: Any = kind(config=http.config, server_state=http.server_state, app_state=http.app_state)
        websocket.resume(release)
        return websocket  # type: ignore[no-any-return]


def make_websockets_movable(protocol_class: Any) -> Any:
    """Return a class of WebSockets that can move, if it is known how; otherwise the given one."""
    # Imported only where it is used: the package websockets need not be there.
    if SANSIO not in sys.modules:
        return protocol_class
    from .uvicorn_websocket import movable

    return movable(protocol_class)


def make_movable(protocol_class: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Return a class whose protocols say when they are idle, if they can move; otherwise the given one."""
    if not issubclass(protocol_class, H11Protocol | HttpToolsProtocol):
        return protocol_class

    class Movable(_MovableHttp, protocol_class):  # type: ignore[misc, valid-type]
        pass

    return Movable


def keep_context(protocol_class: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Return a class whose protocols handle their data in a context that knows their connection.

    The task of a request inherits that context (``current_connection``). Loops call ``data_received`` in a context that
    is older than the connection.
    """

    class InContext(protocol_class):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            self._context = contextvars.copy_context()
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            self._context.run(super().data_received, data)

    class Switching(InContext):
        """A protocol that leaves the connection to another one, once it is known whether that is HTTP/2."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._hand_over(transport)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._hand_over(self.transport)

        def _hand_over(self, transport: Any) -> None:
            protocol = transport.get_protocol()
            if protocol is not self and not transport.is_closing():
                protocol.data_received = functools.partial(self._context.run, protocol.data_received)
                # Set once more, because uvloop keeps the method.
                transport.set_protocol(protocol)

    return Switching if "h2" in getattr(protocol_class, "alpn_protocols", ()) else InContext


class _MovableHttp(asyncio.Protocol):
    """Stands before a protocol of HTTP/1.1: tells when it is idle, and goes on with what was left of its idle time."""

    # Of uvicorn's class behind this one.
    loop: asyncio.AbstractEventLoop
    timeout_keep_alive_task: asyncio.TimerHandle | None

    # How long the connection may still be idle, seconds, if it has come from the predecessor so.
    _keep_alive_left: float | None = None
    _connection: object = None

    def resume_keep_alive(self, seconds: float | None) -> None:
        """Let the connection be idle for so long, once it is made."""
        self._keep_alive_left = seconds

    def connection_made(self, transport: Any) -> None:
        self._connection = current_connection.get()
        super().connection_made(transport)
        if self._keep_alive_left is not None:
            handler = self.timeout_keep_alive_handler  # type: ignore[attr-defined]
            self.timeout_keep_alive_task = self.loop.call_later(self._keep_alive_left, handler)

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(self._connection, ServerConnection) and self._connection.moved:
            # uvicorn would cancel the timer: see UvicornTransfer.pack.
            self.timeout_keep_alive_task = None
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if isinstance(self._connection, ServerConnection):
            self._connection.note_safe_point()


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
