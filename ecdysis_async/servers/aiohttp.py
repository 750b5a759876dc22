"""aiohttp: its runner, whose sockets, signals and end are those of the ``Ecdysis``.

Nobody takes note of a request until this generation leaves. Then one pass over aiohttp's protocols finds those that are
under way, and note is taken of the ones that begin later. The seams for that, and for moving connections, are in
``_protocols/aiohttp.py``; others are ``AppRunner`` with its ``server.pre_shutdown`` and ``cleanup``, the sites, and of
``WebSocketResponse`` ``send_frame``, ``_waiting``, ``_writer``, ``closed`` and ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from aiohttp import WSMsgType, web

from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.asyncio_servers import noting_servers
from ecdysis_async._accepting.data_plane import active
from ecdysis_async._config.options import Options
from ecdysis_async._connections.connection import current_connection, describe_request
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async._service.exclusive import in_application
from ecdysis_async.errors import StartupError
from ecdysis_async.servers._common.forwarded import Trusted
from ecdysis_async.servers._common.goodbye import ANSWER_SECONDS, RESTARTING, STEP_SECONDS, Goodbye
from ecdysis_async.servers._common.listening import describe, is_access_logged, make_ssl_context, open_sockets
from ecdysis_async.servers._protocols.aiohttp import (
    find_connection,
    find_request,
    has_next_request,
    make_movable,
    missing_seams,
    stays,
)
from ecdysis_async.servers._protocols.frames import follow_frames
from ecdysis_async.settings import StrPath

from ._common import server_options

__all__ = ["DRAINING", "read_options", "run", "serve"]

# The options that `ecdysis run` sets itself, and parameters that are no options.
OURS = frozenset({"manager", "loop", "access_log", "access_log_class"})

DRAINING = web.AppKey("ecdysis.draining", anyio.Event)
"""The key of the event that this generation leaves, in the application; sub-applications look in ``config_dict``."""

log = logging.getLogger("ecdysis_async")

REASON = b"the service restarts"

# How long a handler may do something else before its client's answer is read here, seconds.
HANDLER_SECONDS = 0.5


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
    all_socks = [*socks] if sock is None else [sock, *socks]
    name = describe("aiohttp", all_socks, path, None if port is None else f"{host or '*'}:{port}")
    make_sites = functools.partial(
        _make_sites, host=host, port=port, path=path, socks=all_socks, ssl_context=ssl_context, backlog=backlog
    )
    await _serve(ecdysis, app, name, make_sites, trusted=None, transfer=transfer, options=options)


async def _serve(
    ecdysis: Ecdysis,
    app: web.Application,
    name: str,
    make_sites: Callable[[web.AppRunner], Iterator[web.BaseSite]],
    *,
    trusted: Trusted | None,
    transfer: bool,
    options: dict[str, Any],
) -> None:
    # The drain waits for requests, and has cancelled the rest by the time of the clean-up: nothing is left to wait for.
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0, **options)
    clients = _Clients(ecdysis, runner, app)
    app[DRAINING] = ecdysis.draining
    try:
        with active().readiness.expect(name) as startup:
            with in_application():
                await runner.setup()
            clients.attend(trusted)
            with noting_servers() as made:
                for site in make_sites(runner):
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


def read_options(options: Options) -> dict[str, Any]:
    """Return the options of the server itself.

    Raises:
        OptionError: there is no such option, or its value is of another type.
    """
    wanted = server_options.of_function(web.RequestHandler.__init__)
    return server_options.read("aiohttp", wanted, options.server_options, OURS)


async def run(ecdysis: Ecdysis, app: web.Application, options: Options) -> None:
    """Serve an application as the options say.

    Raises:
        StartupError: it cannot be served so.
    """
    if options.root_path:
        raise StartupError("root_path is for ASGI: nest an aiohttp application instead (web.Application.add_subapp)")
    given = read_options(options)
    if not is_access_logged(options, "aiohttp.access"):
        given["access_log"] = None
    socks = await open_sockets(options)
    await _serve(
        ecdysis,
        app,
        describe("aiohttp", socks),
        functools.partial(_make_sites, socks=socks, ssl_context=make_ssl_context(options), backlog=options.backlog),
        trusted=Trusted(options.forwarded_allow_ips) if options.proxy_headers else None,
        transfer=options.transfer,
        options=given,
    )


def _believe(request: web.Request, trusted: Trusted) -> web.Request:
    """Return a request with the scheme and the client that a trusted proxy names, as ``forwarded.Forwarded`` does."""
    if request.remote and request.remote not in trusted:
        return request
    said: dict[str, Any] = {}
    scheme = request.headers.get("X-Forwarded-Proto", "").strip()
    if scheme in ("http", "https"):
        said["scheme"] = scheme
    if (host := trusted.find_client(request.headers.get("X-Forwarded-For", ""))) is not None:
        said["remote"] = host
    return request.clone(**said) if said else request


@dataclass(slots=True)
class _Noted:
    """A request under way.

    Attributes:
        request: see above.
        since: when it was noted, by CLOCK_MONOTONIC.
        protocol: of a request that had begun before, when nobody took note of it: it tells whether it has it still.
    """

    request: web.BaseRequest
    since: float
    protocol: web.RequestHandler | None = None

    def is_over(self) -> bool:
        return self.protocol is not None and find_request(self.protocol) is not self.request

    def describe(self) -> str:
        path = self.request.rel_url.raw_path
        return describe_request(self.request.method, path, self.since, is_older=self.protocol is not None)


class _Clients:
    """The clients of the server: what they are told, and when their connections end.

    Args:
        ecdysis: says when this generation leaves.
        runner: of the server, not yet set up.
        app: what it serves, not yet frozen.
    """

    def __init__(self, ecdysis: Ecdysis, runner: web.AppRunner, app: web.Application) -> None:
        self.goodbye = Goodbye(ecdysis, self._close_idle)
        self._app = app
        self._runner = runner
        self._tracker = active().tracker
        # Each connection that has made a request since note is taken; and the request that it has now.
        self._requests: dict[ServerConnection, _Noted | None] = {}
        self._handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
        missing = missing_seams(app)
        self._shows_requests = not missing
        if missing:
            log.warning(
                "this aiohttp, or this application, has no %s: note is taken of each request, which costs some time",
                ", ".join(missing),
            )
            app.on_response_prepare.append(self._prepare)

    def attend(self, trusted: Trusted | None) -> None:
        """Stand between the server, which was set up, and the application.

        Args:
            trusted: the proxies that are believed; None where none is.
        """
        server = self._server
        self._tracker.counters.append(lambda: server.requests_count)
        self._handle = server.request_handler
        make_request: Callable[..., Any] = server.request_factory
        if self._shows_requests:
            self._tracker.on_leave.append(self._find_requests)
            make_request = functools.partial(self._app._make_request, _cls=self._make_request_class())  # noqa: SLF001 - aiohttp's
        else:
            server.request_handler = self._note_request
        server.request_factory = make_request if trusted is None else _believing(make_request, trusted)

    @property
    def _server(self) -> web.Server:
        assert self._runner.server is not None
        return self._runner.server

    def _make_request_class(self) -> type[web.Request]:
        note_response = self._note_response

        class Telling(web.Request):
            """A request that tells of its response."""

            def _prepare_hook(self, response: web.StreamResponse) -> Awaitable[None]:  # type: ignore[override]
                # A plain function: each response comes through here.
                note_response(self, response)
                return super()._prepare_hook(response)

        return Telling

    async def _note_request(self, request: web.BaseRequest) -> web.StreamResponse:
        """Take note of a connection's request, and of the connection's task, which lives as long as the connection."""
        connection = current_connection.get()
        if not isinstance(connection, ServerConnection):
            return await self._handle(request)
        self._begin(connection, request.task, _Noted(request, time.monotonic()))
        try:
            return await self._handle(request)
        finally:
            if connection in self._requests:
                self._requests[connection] = None

    def _begin(self, connection: ServerConnection, task: asyncio.Task[None], noted: _Noted) -> None:
        if connection not in self._requests:
            connection.busy(task)
            connection.describe_requests = self._describe_requests
            task.add_done_callback(functools.partial(self._forget, connection))
        self._requests[connection] = noted

    def _find_requests(self) -> None:
        """Find what is going on, in the turn in which this generation leaves, and take note of what begins later."""
        server = self._server
        server.request_handler = self._note_request
        for protocol in server.connections:
            # Each has the handler that the server had when it was made.
            protocol._request_handler = self._note_request  # noqa: SLF001 - aiohttp's
            request = find_request(protocol)
            if request is None:
                continue
            noted, connection = _Noted(request, time.monotonic(), protocol), find_connection(protocol)
            if connection is None or connection.is_over():
                # Its client has gone; what it does may matter.
                self._tracker.follow(request.task, f"{noted.describe()}, whose client has gone")
            else:
                self._begin(connection, request.task, noted)

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        self._note_response(request, response)

    def _note_response(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say goodbye once this generation leaves, and take note of WebSockets."""
        if isinstance(response, web.WebSocketResponse):
            dismiss = functools.partial(_dismiss, response, self.goodbye.late)
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
        for protocol in self._server.connections:
            if (connection := find_connection(protocol)) is not None:
                connection.mark_silent(is_silent=find_request(protocol) is None)
        # Ends the tasks of idle connections at once, and the tasks of the others after their response.
        self._server.pre_shutdown()

    def _describe_requests(self, connection: ServerConnection) -> list[str]:
        noted = self._requests.get(connection)
        return [] if noted is None or noted.is_over() else [noted.describe()]

    def _forget(self, connection: ServerConnection, task: asyncio.Task[None]) -> None:
        del self._requests[connection]
        connection.idle()
        if self.goodbye.ecdysis.draining.is_set():
            # aiohttp leaves an idle connection open whose task was ended, and would never answer on it.
            connection.close()


def _believing(make_request: Callable[..., Any], trusted: Trusted) -> Callable[..., Any]:
    """Return what makes requests that know what trusted proxies say of them."""

    def make(message: Any, *others: Any) -> Any:
        request = make_request(message, *others)
        headers = message.headers
        # A peer that sends no such header is not looked up: each request comes through here.
        if "X-Forwarded-For" in headers or "X-Forwarded-Proto" in headers:
            return _believe(request, trusted)
        return request

    return make


async def _say_nothing(code: int = 0, message: bytes | str = b"") -> None:
    """Close without a frame: it was sent already."""


async def _dismiss(websocket: web.WebSocketResponse, late: anyio.Event) -> None:
    """Close a WebSocket, and let its client answer: a socket that is closed with something unread resets.

    aiohttp's ``close`` does not wait for the answer while the handler receives. So that is waited for here, and the
    handler is given what the client sends before it has heard. Shortly before the deadline it is not waited for any
    longer: the handler of a client that is gone ends by itself then, and would be cancelled at the deadline.
    """
    with contextlib.suppress(ConnectionError):  # the client was faster
        await websocket.send_frame(struct.pack("!H", RESTARTING) + REASON, WSMsgType.CLOSE)
    # Browsers take any frame behind the goodbye, and a second goodbye, for a broken connection (1006). So whatever the
    # handler sends from now on is refused, as after aiohttp's own close, and its end sends nothing more.
    writer = websocket._writer  # noqa: SLF001 - aiohttp's
    if writer is not None:
        writer._closing = True  # noqa: SLF001 - aiohttp's
        writer.close = _say_nothing  # type: ignore[method-assign]
    busy_until = anyio.current_time() + HANDLER_SECONDS
    with anyio.move_on_after(ANSWER_SECONDS):
        while not websocket.closed:
            is_receiving = websocket._waiting  # noqa: SLF001 - aiohttp's
            if anyio.current_time() >= busy_until and (late.is_set() or not is_receiving):
                break
            await anyio.sleep(STEP_SECONDS)
    # Reads the answer where the handler does not, and ends the WebSocket if none came.
    await websocket.close(code=RESTARTING, message=REASON)


def _make_sites(
    runner: web.AppRunner,
    *,
    host: str | None = None,
    port: int | None = None,
    path: StrPath | None = None,
    socks: Sequence[socket.socket] = (),
    **options: Any,
) -> Iterator[web.BaseSite]:
    for sock in socks:
        yield web.SockSite(runner, sock, **options)
    if path is not None:
        yield web.UnixSite(runner, path, **options)
    if host is not None or port is not None or (not socks and path is None):
        yield web.TCPSite(runner, host, port, **options)
