"""hypercorn on trio: its own protocols, over listeners that can pause.

``hypercorn.trio.serve`` accepts by trio's ``serve_listeners``, which cannot be paused and taken up again. So this
module does the same on listeners of the ``Ecdysis``. Seams, as seen in hypercorn 0.18: ``Lifespan``, ``WorkerContext``,
``TCPServer``, and ``wrap_app``.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from ecdysis_async._accepting.gated_socket import AcceptedConnection
from ecdysis_async._accepting.readiness import Startup
from ecdysis_async._accepting.trio_streams import TrioListener
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.servers._common.asgi import Application
from ecdysis_async.servers._common.goodbye import STEP_SECONDS, Goodbye
from ecdysis_async.servers._common.http2 import Http2Goodbyes
from ecdysis_async.servers._protocols.frames import FrameFollower
from ecdysis_async.servers._protocols.hypercorn import HypercornConnections, http_2_of, make_server_class

__all__ = ["serve"]


class _Stream:
    """A stream that ends its connection as soon as the client hangs up.

    Between two requests, hypercorn would keep the stream, and its descriptor, for ``keep_alive_timeout``.
    """

    def __init__(
        self,
        stream: Any,
        context: WorkerContext,
        connection: AcceptedConnection,
        inbound: Mapping[AcceptedConnection, FrameFollower],
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._inbound = inbound
        self._context = context

    def __getattr__(self, name: str) -> Any:
        # An attribute that is missing here is missing there: by that hypercorn tells TLS.
        return getattr(self._stream, name)

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        try:
            data: bytes | bytearray = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            await self._context.terminated.set()
            raise
        if not data:
            await self._context.terminated.set()
        elif (follower := self._inbound.get(self._connection)) is not None:
            follower.feed(data)
        return data


async def serve(
    ecdysis: Ecdysis,
    app: Callable[[Any, Any, Any], Awaitable[Any]],
    config: Config,
    secure: Iterable[socket.socket],
    insecure: Iterable[socket.socket],
    startup: Startup,
) -> None:
    """Serve an ASGI application on trio; see ``hypercorn.serve``.

    Args:
        ecdysis: entered.
        app: an application of ASGI 3.
        config: hypercorn's own.
        secure: sockets of the ``Ecdysis``, to serve TLS on.
        insecure: sockets of the ``Ecdysis``, to serve without TLS on.
        startup: told when this server could serve.
    """
    connections, make_server = HypercornConnections(), make_server_class(TCPServer)

    async def end_them() -> None:
        # Idle connections end at once, the others after their response.
        for server in connections.known.values():
            # A connection in its TLS handshake has no protocol yet. Those of HTTP/2 have a goodbye of their own.
            if hasattr(server, "protocol") and http_2_of(server) is None:
                await server.context.terminated.set()

    async def end_idle() -> None:
        await goodbye.late.wait()
        for connection in connections.known:
            connection.mark_silent(is_silent=not application.is_busy(connection))
        while True:
            await end_them()
            await trio.sleep(STEP_SECONDS)

    goodbye = Goodbye(ecdysis)
    goodbye.accompany(end_idle)
    Http2Goodbyes(goodbye, connections.find_http_2)
    application = Application(app, goodbye, connections.has_next_request)
    wrapped = wrap_app(cast("Any", application), config.wsgi_max_body_size, "asgi")
    state: dict[str, Any] = {}
    lifespan = Lifespan(wrapped, config, state)
    ssl_context = config.create_ssl_context()
    listeners: list[Any] = [TrioListener(sock) for sock in insecure]
    if ssl_context is not None:
        listeners += [trio.SSLListener(TrioListener(sock), ssl_context, https_compatible=True) for sock in secure]

    async def handle(stream: Any) -> None:
        # One context for each connection.
        context = WorkerContext(None)
        connection = current_connection.get()
        assert isinstance(connection, AcceptedConnection)
        whole: Any = _Stream(stream, context, connection, application.inbound)
        server = make_server(wrapped, config, context, ConnectionState(state.copy()), whole)
        server.on_request = functools.partial(connections.mend_http_2, connection)
        try:
            with connections.holding(connection, server):
                await server
        finally:
            application.inbound.pop(connection, None)

    try:
        async with trio.open_nursery() as nursery:
            with goodbye.ending() as begin_shutdown:
                await nursery.start(lifespan.handle_lifespan)
                await lifespan.wait_for_startup()
                if application.failure is not None:
                    # Raised here: the end of the lifespan wakes this task before its exception cancels it. Readiness
                    # must not be announced then.
                    raise application.failure
                nursery.start_soon(ecdysis.serve, handle, *listeners)
                await startup.ready()
                await ecdysis.ready()
                await goodbye.wait_for_last_connection()
                begin_shutdown()
                await end_them()
                await lifespan.wait_for_shutdown()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if application.failure is not None:
            raise application.failure from None
        # Raises what was raised, without the group that trio puts around it.
        raise group.exceptions[0] if len(group.exceptions) == 1 else group from None
