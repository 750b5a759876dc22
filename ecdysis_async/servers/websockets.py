"""websockets: its servers, whose sockets and end are those of the ``Ecdysis``.

Seams, as seen in websockets 17: ``websockets.asyncio.server.serve``, which asks the loop for a server, with ``sock``
and ``create_connection``; ``Server.close`` and its ``close_task``; ``ServerConnection.close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed

from ecdysis_async._accepting.asyncio_connections import ServerConnection as Tracked
from ecdysis_async._accepting.asyncio_servers import GatedServer
from ecdysis_async._accepting.data_plane import active
from ecdysis_async._config.options import Options
from ecdysis_async._connections.connection import current_connection, describe_request
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.servers._common.goodbye import RESTARTING, Goodbye
from ecdysis_async.servers._common.listening import describe, make_ssl_context, open_sockets
from ecdysis_async.servers._protocols.frames import follow_frames
from ecdysis_async.servers._protocols.websockets import WebSocketTransfer, movable, transfer_of

from ._common import server_options

__all__ = ["read_options", "run", "serve", "transfer_of"]

Handler = Callable[[ServerConnection], Awaitable[None]]

# The options that `ecdysis run` sets itself.
OURS = frozenset({"handler", "host", "port", "sock", "ssl", "logger", "create_connection", "kwargs"})


async def serve(
    ecdysis: Ecdysis,
    handler: Handler,
    host: str | Sequence[str] | None = None,
    port: int | None = None,
    *,
    socks: Sequence[socket.socket] = (),
    transfer: bool = True,
    **options: Any,
) -> None:
    """Serve WebSockets until this generation shall leave and its connections have ended.

    It announces readiness itself, and where several servers are started side by side, with the last of them. Once this
    generation leaves, connections are closed with 1012, one after the other until the deadline; a handler may end its
    own before that, at ``ecdysis.draining``.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``).
        handler: called with each connection.
        host: an address, a name, several of them, or None for all.
        port: a port, or 0 for one that the kernel chooses.
        socks: sockets of the ``Ecdysis``, in place of host and port.
        transfer: let connections whose handlers offer a state by :func:`transfer_of` move to the successor of a
            restart, with their clients none the wiser; others are closed with 1012.
        options: the options of ``websockets.asyncio.server.serve``, such as ``ssl`` and ``ping_interval``.

    Raises:
        RuntimeError: the loop is not gated.
        OSError: an address cannot be bound.

    Cancelling it closes all connections at once.
    """
    goodbye = Goodbye(ecdysis)
    handle = functools.partial(_handle, goodbye, handler)
    kind = options.get("create_connection") or ServerConnection
    options["create_connection"] = _accepted(movable(kind) if transfer else kind)
    places: list[dict[str, Any]] = [{"sock": sock} for sock in socks] or [{"host": host, "port": port}]
    async with contextlib.AsyncExitStack() as stack:
        with active().readiness.expect(describe("websockets", socks, f"{host or '*'}:{port}")) as startup:
            for place in places:
                await stack.enter_async_context(_serving(handle, goodbye, place | options, transfer=transfer))
            await startup.ready()
            await ecdysis.ready()
        await goodbye.wait_for_last_connection()


def read_options(options: Options) -> dict[str, Any]:
    """Return the options of the server itself.

    Raises:
        OptionError: there is no such option, or its value is of another type.
    """
    wanted = server_options.of_function(serve_websockets)
    return server_options.read("websockets", wanted, options.server_options, OURS)


async def run(ecdysis: Ecdysis, handler: Handler, options: Options) -> None:
    """Serve a handler as the options say."""
    given = read_options(options)
    sockets = await open_sockets(options)
    await serve(ecdysis, handler, socks=sockets, transfer=options.transfer, ssl=make_ssl_context(options), **given)


@contextlib.asynccontextmanager
async def _serving(handle: Any, goodbye: Goodbye, options: dict[str, Any], *, transfer: bool) -> AsyncIterator[None]:
    server = await serve_websockets(handle, **options)
    if transfer and isinstance(server.server, GatedServer):
        server.server.adapt(transfer=WebSocketTransfer(server.server.protocol_factory))
    try:
        yield
    finally:
        with goodbye.ending() as begin:
            begin()
            server.close(code=RESTARTING)
            await server.wait_closed()


async def _handle(goodbye: Goodbye, handler: Handler, websocket: ServerConnection) -> None:
    is_dismissed = False

    async def dismiss() -> None:
        nonlocal is_dismissed
        is_dismissed = True
        await websocket.close(RESTARTING, "the service restarts")

    connection = current_connection.get()
    if isinstance(connection, Tracked):
        connection.busy(asyncio.current_task())
        connection.describe_requests = functools.partial(_describe, websocket, time.monotonic())
    if isinstance(connection, Tracked):
        goodbye.add_websocket(dismiss, follow_frames(connection))
    else:
        goodbye.add_websocket(dismiss)
    try:
        await handler(websocket)
    except ConnectionClosed:
        # The connection was closed from here, or has moved to the successor: the log needs no traceback for each.
        if not is_dismissed and not (connection is not None and connection.moved):
            raise
    finally:
        goodbye.discard_websocket(dismiss)
        if isinstance(connection, Tracked):
            connection.idle()


def _describe(websocket: ServerConnection, since: float, connection: Tracked) -> list[str]:
    path = websocket.request.path if websocket.request is not None else ""
    return [describe_request("WebSocket", path, since)]


def _accepted(kind: type[ServerConnection]) -> type[ServerConnection]:
    """Let WebSockets open during a pause that were accepted before it: websockets would answer 503."""

    class Accepted(kind):  # type: ignore[misc, valid-type]
        def __init__(self, protocol: Any, server: Server, **options: Any) -> None:
            super().__init__(protocol, _Unpaused(server), **options)

    return Accepted


class _Unpaused:
    """A server that says that it is serving until it is closed, even while it does not accept."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def is_serving(self) -> bool:
        return self._server.close_task is None
