"""aiohttp: its runner, whose sockets, signals and end are those of the ``Ecdysis``.

Seams, as seen in aiohttp 3.14: ``AppRunner`` with its ``server.pre_shutdown`` and ``cleanup``, the sites, a middleware,
the signal ``on_response_prepare``, ``Request.task``, and of ``WebSocketResponse`` ``send_frame``, ``_writer``,
``closed`` and ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler, Middleware

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import noting_servers
from ecdysis_async._accepting.data_plane import active
from ecdysis_async._config.options import Options
from ecdysis_async._connections.connection import current_connection, describe_request
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.errors import StartupError
from ecdysis_async.servers._common.forwarded import Trusted
from ecdysis_async.servers._common.goodbye import RESTARTING, STEP_SECONDS, Goodbye
from ecdysis_async.servers._common.listening import describe, is_access_logged, make_ssl_context, open_sockets
from ecdysis_async.servers._protocols.aiohttp import has_next_request, make_movable, stays
from ecdysis_async.servers._protocols.frames import follow_frames
from ecdysis_async.settings import StrPath

from ._common import server_options

__all__ = ["DRAINING", "run", "serve"]

# The options that `ecdysis run` sets itself, and parameters that are no options.
OURS = frozenset({"manager", "loop", "access_log", "access_log_class"})

DRAINING = web.AppKey("ecdysis.draining", anyio.Event)
"""The key of the event that this generation leaves, in the application; sub-applications look in ``config_dict``."""

REASON = b"the service restarts"

# How long a client may take to answer before its WebSocket is closed without an answer, seconds.
ANSWER_SECONDS = 0.5


async def serve(
    ecdysis: Ecdysis,
    app: web.Application,
    *,
    host: str | None = None,
    port: int | None = None,
    path: StrPath | None = None,
    sock: socket.socket | None = None,
    socks: Sequence[socket.socket] = (),
    ssl_context: ssl.SSLContext | None = None,
    backlog: int = 1024,
    transfer: bool = True,
    **options: Any,
) -> None:
    """Serve an application until this generation shall leave and its requests are answered.

    It announces readiness itself, once the application's start-up is over, and where several servers are started side
    by side, with the last of them. Applications find the event that this generation leaves as ``app[DRAINING]``:
    streams should end then. WebSockets are closed with 1012, one after the other until the deadline.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``).
        app: not yet frozen.
        host: an address or a name; None is every interface.
        port: by default 8080, or 8443 with TLS, if neither path nor sock are given.
        path: the path of a Unix socket.
        sock: a socket of the ``Ecdysis``, or a socket to be registered.
        socks: more such sockets.
        ssl_context: serve TLS.
        backlog: how many connections may wait to be accepted.
        transfer: let connections that are idle move to the successor of a restart, with their clients none the wiser.
            After a request with a body, most cannot before the next one: aiohttp's parser does not show whether it has
            read half a request.
        options: the options of ``aiohttp.web.AppRunner``, such as ``access_log`` and ``keepalive_timeout``.

    Raises:
        RuntimeError: the loop is not gated, or the application is frozen.
        Exception: whatever the application's start-up raised.
        OSError: an address cannot be bound.

    Cancelling it ends the server at once.
    """
    # The drain waits for requests, and has cancelled the rest by the time of the clean-up: nothing is left to wait for.
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0, **options)
    clients = _Clients(ecdysis, runner)
    all_socks = [*socks] if sock is None else [sock, *socks]
    app[DRAINING] = ecdysis.draining
    app.middlewares.insert(0, clients.note_request)
    app.on_response_prepare.append(clients.note_response)
    name = describe("aiohttp", all_socks, path, None if port is None else f"{host or '*'}:{port}")
    try:
        with active().readiness.expect(name) as startup:
            await runner.setup()
            with noting_servers() as made:
                for site in _make_sites(runner, host, port, path, all_socks, ssl_context=ssl_context, backlog=backlog):
                    await site.start()
            if transfer:
                for server in made:
                    make_movable(server)
            await startup.ready()
            await ecdysis.ready()
        await clients.goodbye.wait_for_last_connection()
    finally:
        with clients.goodbye.ending() as begin:
            begin()
            await runner.cleanup()


async def run(ecdysis: Ecdysis, app: web.Application, options: Options) -> None:
    """Serve an application as the options say.

    Raises:
        StartupError: it cannot be served so.
    """
    if options.root_path:
        raise StartupError("root_path is for ASGI: nest an aiohttp application instead (web.Application.add_subapp)")
    wanted = server_options.of_function(web.RequestHandler.__init__)
    given = server_options.read("aiohttp", wanted, options.server_options, OURS)
    if not is_access_logged(options, "aiohttp.access"):
        given["access_log"] = None
    if options.proxy_headers:
        app.middlewares.insert(0, _believe(Trusted(options.forwarded_allow_ips)))
    socks = await open_sockets(options)
    await serve(
        ecdysis,
        app,
        socks=socks,
        ssl_context=make_ssl_context(options),
        backlog=options.backlog,
        transfer=options.transfer,
        **given,
    )


def _believe(trusted: Trusted) -> Middleware:
    @web.middleware
    async def believe(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Take scheme and client from what a trusted proxy says, as ``forwarded.Forwarded`` does."""
        headers = request.headers
        if "X-Forwarded-For" not in headers and "X-Forwarded-Proto" not in headers:
            # A peer that sends no such header is not looked up: each request comes through here.
            return await handler(request)
        if request.remote is None or not request.remote or request.remote in trusted:
            said: dict[str, Any] = {}
            scheme = headers.get("X-Forwarded-Proto", "").strip()
            if scheme in ("http", "https"):
                said["scheme"] = scheme
            if (host := trusted.find_client(headers.get("X-Forwarded-For", ""))) is not None:
                said["remote"] = host
            if said:
                request = request.clone(**said)
        return await handler(request)

    return believe


class _Clients:
    """The clients of the server: what they are told, and when their connections end."""

    def __init__(self, ecdysis: Ecdysis, runner: web.AppRunner) -> None:
        self.goodbye = Goodbye(ecdysis, self._close_idle)
        self._runner = runner
        self._tracker = active().tracker
        self._count = 0
        self._tracker.counters.append(lambda: self._count)
        # Each connection that has made a request; and the request that it has now, with the time of its beginning.
        self._requests: dict[ServerConnection, tuple[web.Request, float] | None] = {}

    @web.middleware
    async def note_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Take note of a connection's request, and of the connection's task, which lives as long as the connection."""
        self._count += 1
        connection = current_connection.get()
        if not isinstance(connection, ServerConnection):
            return await handler(request)
        if connection not in self._requests:
            connection.busy(request.task)
            connection.describe_requests = self._describe_requests
            request.task.add_done_callback(functools.partial(self._forget, connection))
        self._requests[connection] = request, time.monotonic()
        try:
            return await handler(request)
        finally:
            if connection in self._requests:
                self._requests[connection] = None

    async def note_response(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say goodbye once this generation leaves, and take note of WebSockets."""
        if isinstance(response, web.WebSocketResponse):
            dismiss = functools.partial(_dismiss, response)
            connection = current_connection.get()
            if isinstance(connection, ServerConnection):
                self.goodbye.add_websocket(dismiss, follow_frames(connection))
            else:
                self.goodbye.add_websocket(dismiss)
            request.task.add_done_callback(lambda _: self.goodbye.discard_websocket(dismiss))
        elif self.goodbye.ecdysis.draining.is_set() and stays(request):
            if has_next_request(request) and not self.goodbye.late.is_set():
                # What the client has sent behind this request is answered, too.
                return
            response.force_close()
            if request.version.major == 1:
                response.headers["Connection"] = "close"

    def _close_idle(self) -> None:
        for connection, request in self._requests.items():
            connection.mark_silent(is_silent=request is None)
        # Ends the tasks of idle connections at once, and the tasks of the others after their response.
        assert self._runner.server is not None
        self._runner.server.pre_shutdown()

    def _describe_requests(self, connection: ServerConnection) -> list[str]:
        found = self._requests.get(connection)
        return [] if found is None else [describe_request(found[0].method, found[0].rel_url.raw_path, found[1])]

    def _forget(self, connection: ServerConnection, task: asyncio.Task[None]) -> None:
        del self._requests[connection]
        connection.idle()
        if self.goodbye.ecdysis.draining.is_set():
            # aiohttp leaves an idle connection open whose task was ended, and would never answer on it.
            connection.close()


async def _say_nothing(code: int = 0, message: bytes | str = b"") -> None:
    """Close without a frame: it was sent already."""


async def _dismiss(websocket: web.WebSocketResponse) -> None:
    """Close a WebSocket, and let its client answer: a socket that is closed with something unread resets.

    aiohttp's ``close`` does not wait for the answer while the handler receives.
    """
    with contextlib.suppress(ConnectionError):  # the client was faster
        await websocket.send_frame(struct.pack("!H", RESTARTING) + REASON, WSMsgType.CLOSE)
    # Browsers take any frame behind the goodbye, and a second goodbye, for a broken connection (1006). So whatever the
    # handler sends from now on is refused, as after aiohttp's own close, and its end sends nothing more.
    writer = websocket._writer  # noqa: SLF001 - aiohttp's
    if writer is not None:
        writer._closing = True  # noqa: SLF001 - aiohttp's
        writer.close = _say_nothing  # type: ignore[method-assign]
    with anyio.move_on_after(ANSWER_SECONDS):
        while not websocket.closed:  # noqa: ASYNC110 - aiohttp tells only the handler
            await anyio.sleep(STEP_SECONDS)
    # Reads the answer where the handler does not, and ends the WebSocket if none came.
    await websocket.close(code=RESTARTING, message=REASON)


def _make_sites(
    runner: web.AppRunner,
    host: str | None,
    port: int | None,
    path: StrPath | None,
    socks: Sequence[socket.socket],
    **options: Any,
) -> Iterator[web.BaseSite]:
    for sock in socks:
        yield web.SockSite(runner, sock, **options)
    if path is not None:
        yield web.UnixSite(runner, path, **options)
    if host is not None or port is not None or (not socks and path is None):
        yield web.TCPSite(runner, host, port, **options)
