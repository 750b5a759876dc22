"""What is seen of uvicorn's protocols: requests under way are found, and idle connections move to a successor.

What is used of uvicorn stands in :data:`SEAMS`. uvicorn's zttp protocols do not show whether they have read half a
request: their connections move only if they were never read from.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from uvicorn.server import ServerState

from ecdysis_async._accepting.asyncio_connections import (
    ProtocolFactory,
    ServerConnection,
    connection_of,
    protocol_of,
)
from ecdysis_async._connections.parcel import Refused, Release, Transferable

from .http import IDLE, WEBSOCKET, UnreadOnly
from .requests import RequestsUnderWay, RequestUnderWay

__all__ = [
    "SEAMS",
    "UvicornRequests",
    "UvicornTransfer",
    "choose_transfer",
    "expects_more",
    "follow_switch",
    "make_websockets_movable",
    "may_switch",
]

SEAMS = {
    "uvicorn.server:ServerState": ("tasks",),
    "uvicorn.protocols.http.h11_impl:H11Protocol": (
        *(
            "conn",
            "cycle",
            "flow",
            "loop",
            "timeout_keep_alive_handler",
            "timeout_keep_alive_task",
            "ws_protocol_class",
        ),
    ),
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol": (
        *("cycle", "flow", "loop", "pipeline", "scope"),
        *("timeout_keep_alive_handler", "timeout_keep_alive_task", "ws_protocol_class"),
    ),
    **{
        f"uvicorn.protocols.http.{module}:RequestResponseCycle": (
            *("default_headers", "keep_alive", "more_body", "response_complete"),
            *("run_asgi", "scope", "transport"),
        )
        for module in ("h11_impl", "httptools_impl")
    },
}
"""What is used of uvicorn's classes, as seen in uvicorn 0.54: attributes, by the module and the name of the class.

Of each request, and of each WebSocket, ``tasks`` has a task that runs ``run_asgi`` of a cycle, or of a WebSocket's
protocol. A response's headers are ``default_headers`` of its cycle and the application's. A protocol that may switch to
HTTP/2 names "h2" in ``alpn_protocols``.
"""

# Where uvicorn has the WebSockets that can move.
SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"


def _h11_protocols() -> tuple[type[Any], ...]:
    return _find_loaded("h11_impl", "H11Protocol")


def _httptools_protocols() -> tuple[type[Any], ...]:
    return _find_loaded("httptools_impl", "HttpToolsProtocol")


def _find_loaded(module: str, name: str) -> tuple[type[Any], ...]:
    """Return a class of uvicorn's; none where uvicorn has not loaded it, so that no protocol can be of it.

    uvicorn loads the one that it serves by. The other one, and its library, would cost each start their import.
    """
    loaded = sys.modules.get(f"uvicorn.protocols.http.{module}")
    return (getattr(loaded, name),) if loaded is not None else ()


def expects_more(connection: Any) -> bool:
    """Say whether the client still sends the request that runs, or uvicorn has read more behind it.

    A close would meet a client in the middle of its sending, which might never see the answer. What zttp's protocol has
    read behind a request is not known.
    """
    protocol: Any = protocol_of(connection.transport)
    cycle = getattr(protocol, "cycle", None)
    if cycle is not None and cycle.more_body:
        return True
    if isinstance(protocol, _h11_protocols()):
        return bool(protocol.conn.trailing_data[0])
    if isinstance(protocol, _httptools_protocols()):
        # With the first byte of a message comes a new scope.
        return bool(protocol.pipeline or protocol.scope is not protocol.cycle.scope)
    return False


def choose_transfer(protocol_factory: ProtocolFactory, protocol_class: type[asyncio.Protocol]) -> UnreadOnly:
    """Return how the connections of a server move that makes protocols of a class."""
    is_known = issubclass(protocol_class, _h11_protocols() + _httptools_protocols())
    return UvicornTransfer(protocol_factory) if is_known else UnreadOnly(protocol_factory)


class UvicornRequests(RequestsUnderWay):
    """The requests of one server of uvicorn's."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def tasks(self) -> Collection[asyncio.Task[None]]:
        return tuple(self._state.tasks)

    def find(self, task: asyncio.Task[None]) -> RequestUnderWay | None:
        coroutine: Any = task.get_coro()
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            # It comes to the application yet.
            return None
        # The method's own object: the cycle, or the protocol of a WebSocket.
        served = coroutine.cr_frame.f_locals["self"]
        if isinstance(served, asyncio.BaseProtocol) or served.scope["http_version"].startswith("2"):
            return None
        return _Cycle(connection_of(served.transport), served)


class _Cycle(RequestUnderWay):
    """A request, with the cycle that uvicorn made for it."""

    def __init__(self, connection: ServerConnection | None, cycle: Any) -> None:
        super().__init__(connection, cycle.scope)
        self._cycle = cycle
        # Asked here: a seam that has gone is to be known as long as all requests can still be written down.
        self._headers: list[tuple[bytes, bytes]] = cycle.default_headers

    def say_goodbye_if(self, is_last: Callable[[], bool]) -> None:
        # A list of its own: all requests of a second share one. To clear `keep_alive` would not do: h11's protocol
        # would close without saying so.
        self._cycle.default_headers = _Headers(self._headers, is_last)


class _Headers(list[tuple[bytes, bytes]]):
    """The headers that a response begins with, and the goodbye, if it is due when they are read or added to."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], is_last: Callable[[], bool]) -> None:
        super().__init__(headers)
        self._is_last = is_last

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        yield from super().__iter__()
        if self._is_last():
            yield b"connection", b"close"

    def __add__(self, others: Any) -> Any:
        return [*self, *others]


class UvicornTransfer(UnreadOnly):
    """Moves connections between two requests, and before the first one, and WebSockets that can move themselves."""

    moves_between_requests = True

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if isinstance(protocol, _h11_protocols()):
            is_idle = _is_idle(protocol) and _has_h11_read_all(protocol)
        elif isinstance(protocol, _httptools_protocols()):
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
        left = max(0.0, timer.when() - protocol.loop.time())
        return Release({"keep_alive": left}, kind=IDLE)

    def keep(self, connection: ServerConnection, protocol: Any) -> None:
        if isinstance(protocol, Transferable):
            protocol.keep_connection()

    def let_go(self, connection: ServerConnection, protocol: Any) -> None:
        if isinstance(protocol, _h11_protocols() + _httptools_protocols()):
            # uvicorn would cancel the timer, and thousands that are cancelled at once stall asyncio's loop. The timer
            # runs on, and finds the transport closed.
            protocol.timeout_keep_alive_task = None

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind == WEBSOCKET:
            return self._resume_websocket(release)
        protocol: Any = super().resume(release)
        if isinstance(release.state, dict) and release.state.get("keep_alive") is not None:
            begin = functools.partial(_go_on_with_keep_alive, protocol, float(release.state["keep_alive"]))
            protocol.connection_made = begin
        return protocol  # type: ignore[no-any-return]

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


def may_switch(protocol_class: type[asyncio.Protocol]) -> bool:
    """Say whether a protocol may leave its connections to another one, which speaks HTTP/2."""
    return "h2" in getattr(protocol_class, "alpn_protocols", ())


def follow_switch(protocol_class: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Return a class whose successors on a connection handle their data in a context that knows the connection, too.

    The task of a request inherits that context (``current_connection``). A class that does not switch is returned as it
    is: its server keeps the context (``ServerHooks.keeps_context``).
    """
    if not may_switch(protocol_class):
        return protocol_class

    class Switching(protocol_class):  # type: ignore[misc, valid-type]
        """A protocol that leaves the connection to another one, once it is known whether that is HTTP/2."""

        def connection_made(self, transport: Any) -> None:
            self._context = contextvars.copy_context()
            super().connection_made(transport)
            self._hand_over(transport)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._hand_over(self.transport)

        def _hand_over(self, transport: Any) -> None:
            protocol = transport.get_protocol()
            # As long as it has the connection itself, what the server made stands in front of it.
            has_switched = protocol is not self and connection_of(transport) is None
            if has_switched and not transport.is_closing():
                protocol.data_received = functools.partial(self._context.run, protocol.data_received)
                # Set once more, because uvloop keeps the method.
                transport.set_protocol(protocol)

    return Switching


def _go_on_with_keep_alive(protocol: Any, seconds: float, transport: asyncio.BaseTransport) -> None:
    """Begin with a connection that may be idle for what was left of that time in the predecessor."""
    del protocol.connection_made
    protocol.connection_made(transport)
    protocol.timeout_keep_alive_task = protocol.loop.call_later(seconds, protocol.timeout_keep_alive_handler)


def _is_idle(protocol: Any) -> bool:
    """Say whether the last request has been answered, and nothing else waits."""
    is_answered = protocol.cycle is None or protocol.cycle.response_complete
    return is_answered and not protocol.flow.read_paused


def _has_h11_read_all(protocol: Any) -> bool:
    import h11  # loaded by uvicorn already, for this protocol

    connection = protocol.conn
    is_idle = connection.our_state is connection.their_state is h11.IDLE
    return is_idle and not connection.trailing_data[0]


def _has_httptools_read_all(protocol: Any) -> bool:
    cycle = protocol.cycle
    if protocol.pipeline:
        return False
    if cycle is None:
        return protocol.scope is None
    # With the first byte of a message comes a new scope.
    return bool(not cycle.more_body and cycle.keep_alive and protocol.scope is cycle.scope)
