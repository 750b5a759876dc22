"""hypercorn on asyncio and uvloop: its own protocols and lifespan, on servers of the gated loop.

``hypercorn.asyncio.serve`` does not show its connections, and ends those of HTTP/2 without telling their clients. So
this module does the same, and knows each connection. Seams, as seen in hypercorn 0.18: ``Lifespan``, ``StatsdLogger``,
``WorkerContext``, ``TCPServer``, and ``wrap_app``. See ``_protocols/hypercorn.py`` for others.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import anyio
from hypercorn.asyncio.lifespan import Lifespan
from hypercorn.asyncio.statsd import StatsdLogger
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from ecdysis_async._accepting.asyncio_connections import ServerConnection, protocol_of
from ecdysis_async._accepting.asyncio_servers import GatedServer
from ecdysis_async._accepting.readiness import Startup
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.servers._common.asgi import Application
from ecdysis_async.servers._common.goodbye import Goodbye
from ecdysis_async.servers._common.http2 import Http2Goodbyes
from ecdysis_async.servers._protocols.http import UnreadOnly
from ecdysis_async.servers._protocols.hypercorn import HypercornConnections, http_2_of, make_server_class

__all__ = ["serve"]

# How long connections may take to end that are cancelled, seconds.
CANCEL_SECONDS = 1.0


async def serve(
    ecdysis: Ecdysis,
    app: Callable[[Any, Any, Any], Awaitable[Any]],
    config: Config,
    secure: Iterable[socket.socket],
    insecure: Iterable[socket.socket],
    startup: Startup,
    *,
    transfer: bool,
) -> None:
    """Serve an ASGI application on asyncio or uvloop; see ``hypercorn.serve``.

    Args:
        ecdysis: entered.
        app: an application of ASGI 3.
        config: hypercorn's own.
        secure: sockets of the ``Ecdysis``, to serve TLS on.
        insecure: sockets of the ``Ecdysis``, to serve without TLS on.
        startup: told when this server could serve.
        transfer: whether connections that were never read from move to a successor.
    """
    loop = asyncio.get_running_loop()
    goodbye = Goodbye(ecdysis)
    connections, make_server = HypercornConnections(), make_server_class(TCPServer)
    application = Application(app, goodbye, connections.has_next_request)
    Http2Goodbyes(goodbye, connections.find_http_2)
    wrapped = wrap_app(cast("Any", application), config.wsgi_max_body_size, "asgi")
    context = WorkerContext(None)
    state: dict[str, Any] = {}
    config.set_statsd_logger_class(StatsdLogger)
    lifespan = Lifespan(wrapped, config, loop, state)
    # The task of each connection, and what serves the connection of each protocol.
    tasks: set[asyncio.Task[Any]] = set()
    served: dict[asyncio.BaseProtocol, TCPServer] = {}
    servers: list[asyncio.AbstractServer] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task, connection, protocol = asyncio.current_task(), current_connection.get(), protocol_of(writer.transport)
        assert task is not None
        assert isinstance(connection, ServerConnection)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        server = make_server(wrapped, loop, config, context, ConnectionState(state), reader, writer)
        served[protocol] = server
        server.on_request = functools.partial(connections.mend_http_2, connection)
        try:
            with connections.holding(connection, server):
                await server
        finally:
            del served[protocol]

    def say_goodbye(protocol: Any) -> bool:
        # Connections of HTTP/2 have a goodbye of their own.
        return http_2_of(served.get(protocol)) is not None

    async def listen(sock: socket.socket, **tls: Any) -> None:
        server = await asyncio.start_server(handle, backlog=config.backlog, sock=sock, **tls)
        assert isinstance(server, GatedServer)
        servers.append(server)
        # hypercorn would keep the connection of who has hung up for `keep_alive_timeout`.
        server.adapt(on_hang_up=application.close_after_answer, say_goodbye=say_goodbye)
        if transfer:
            server.adapt(transfer=UnreadOnly(server.protocol_factory))

    with goodbye.ending() as begin_shutdown:
        lifespan_task = loop.create_task(lifespan.handle_lifespan())
        try:
            await _start(lifespan, lifespan_task, application)
            tls = {"ssl": config.create_ssl_context(), "ssl_handshake_timeout": config.ssl_handshake_timeout}
            for sock in secure:
                await listen(sock, **tls)
            for sock in insecure:
                await listen(sock)
            await startup.ready()
            await ecdysis.ready()
            await goodbye.wait_for_last_connection()
            begin_shutdown()
            await context.terminated.set()
            if tasks:
                await asyncio.wait(tasks, timeout=config.graceful_timeout)
            await lifespan.wait_for_shutdown()
            lifespan_task.cancel()
            await asyncio.wait({lifespan_task})
            if not lifespan_task.cancelled():
                # Raises what the application's shutdown has raised.
                lifespan_task.result()
        finally:
            for server in servers:
                server.close()
            with anyio.CancelScope(shield=True):
                await _cancel({*tasks, lifespan_task})


async def _start(lifespan: Lifespan, task: asyncio.Task[None], application: Application) -> None:
    """Wait until the application's start-up is over.

    Raises:
        Exception: whatever it raised.
    """
    try:
        await lifespan.wait_for_startup()
        if task.done():
            task.result()
    except Exception as error:  # noqa: BLE001 - raised
        raise application.failure or error from None
    if application.failure is not None:
        raise application.failure


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait for them shortly; what they raise was heard elsewhere."""
    for task in tasks:
        task.cancel()
    done, _ = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
    for task in done:
        if not task.cancelled():
            task.exception()
