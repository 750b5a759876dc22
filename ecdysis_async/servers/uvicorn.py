"""uvicorn: its server, whose sockets, signals and end are those of the ``Ecdysis``.

Seams, as seen in uvicorn 0.54: ``Config.load``, ``.loaded_app`` and ``.http_protocol_class``; of ``Server`` the methods
``startup``, ``on_tick``, ``main_loop``, ``shutdown`` and ``capture_signals``, ``should_exit``, ``server_state`` and
``lifespan`` with its ``state``; of a WebSocket's ``close_timer``. For HTTP/2 see ``_protocols/uvicorn_http2.py``.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
import uvicorn

from ecdysis_async._accepting.asyncio_servers import GatedServer
from ecdysis_async._accepting.data_plane import active
from ecdysis_async._accepting.readiness import Startup
from ecdysis_async._config.options import Options
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.servers._common.asgi import Application
from ecdysis_async.servers._common.goodbye import Goodbye, make_state
from ecdysis_async.servers._common.listening import (
    CERT_REQS,
    describe,
    is_access_logged,
    make_ssl_context,
    open_sockets,
)
from ecdysis_async.servers._protocols.uvicorn import (
    UvicornRequests,
    choose_transfer,
    expects_more,
    follow_switch,
    make_websockets_movable,
    may_switch,
)
from ecdysis_async.servers._protocols.uvicorn_http2 import follow_http_2, is_http_2

from ._common import server_options

__all__ = ["read_options", "run", "serve"]

# The options that `ecdysis run` sets itself, or that the Ecdysis replaces.
OURS = frozenset(
    {
        "app",
        "host",
        "port",
        "uds",
        "fd",
        "loop",
        "env_file",
        "log_config",
        "log_level",
        "access_log",
        "reload",
        "reload_dirs",
        "reload_delay",
        "reload_includes",
        "reload_excludes",
        "workers",
        "proxy_headers",
        "forwarded_allow_ips",
        "root_path",
        "limit_max_requests",
        "limit_max_requests_jitter",
        "backlog",
        "timeout_graceful_shutdown",
        "timeout_worker_healthcheck",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_keyfile_password",
        "ssl_cert_reqs",
        "ssl_ca_certs",
        "ssl_ciphers",
        "factory",
    }
)


async def serve(
    ecdysis: Ecdysis, config: uvicorn.Config, socks: Sequence[socket.socket] = (), *, transfer: bool = True
) -> None:
    """Serve an ASGI application until this generation shall leave and its requests are answered.

    It announces readiness itself, once the application's start-up is over, and where several servers are started side
    by side, with the last of them. Applications find the event that this generation leaves as
    ``scope["state"]["ecdysis.draining"]``: streams should end then. WebSockets are closed with 1012, one after the
    other until the deadline.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``).
        config: uvicorn's own; what it says of loops, signals, workers and reloading is not used.
        socks: sockets of the ``Ecdysis``, in place of the host and port, path or descriptor of ``config``.
        transfer: let connections that are idle move to the successor of a restart, with their clients none the wiser.
            A WebSocket of ``ws="websockets-sansio"`` does so between two messages, if its application offers a state by
            ``scope["state"]["ecdysis.transfer"].offer(state)``; others are closed with 1012.

    Raises:
        RuntimeError: the loop is not gated, or the application said no more than that its start-up failed.
        Exception: whatever the application's start-up raised.
        OSError: an address cannot be bound.

    Cancelling it ends the server at once.
    """
    goodbye = Goodbye(ecdysis)
    try:
        if not config.loaded:
            config.load()
    except SystemExit as error:
        # uvicorn leaves the process where an import fails.
        raise error.__context__ or error from None
    application = Application(config.loaded_app, goodbye, expects_more)
    config.loaded_app = application
    config.http_protocol_class = follow_switch(config.http_protocol_class)
    if transfer:
        config.ws_protocol_class = make_websockets_movable(config.ws_protocol_class)
    where = config.uds or (f"{config.host}:{config.port}" if config.fd is None else f"fd://{config.fd}")
    with active().readiness.expect(describe("uvicorn", socks, where)) as startup:
        await _Server(config, goodbye, application, startup, transfer=transfer).serve(list(socks) or None)


# What uvicorn says at INFO at each start and each end of a process, whose verdict stands in this library's lines.
_STEPS = {
    "Started server process [%d]",
    "Waiting for application startup.",
    "ASGI 'lifespan' protocol appears unsupported.",
    "Application startup complete.",
    "Shutting down",
    "Waiting for connections to close. (CTRL+C to force quit)",
    "Waiting for background tasks to complete. (CTRL+C to force quit)",
    "Waiting for application shutdown.",
    "Application shutdown complete.",
    "Finished server process [%d]",
}


def read_options(options: Options) -> dict[str, Any]:
    """Return the options of the server itself.

    Raises:
        OptionError: there is no such option, or its value is of another type.
    """
    wanted = server_options.of_function(uvicorn.Config.__init__)
    return server_options.read("uvicorn", wanted, options.server_options, OURS)


async def run(ecdysis: Ecdysis, app: Any, options: Options) -> None:
    """Serve an ASGI application as the options say.

    Raises:
        StartupError: it cannot be served so.
    """
    # uvicorn makes a TLS context of its own, and says less where that fails.
    make_ssl_context(options)
    given = read_options(options)
    if options.forwarded_allow_ips is not None:
        given["forwarded_allow_ips"] = options.forwarded_allow_ips
    if options.ciphers is not None:
        given["ssl_ciphers"] = options.ciphers
    config = uvicorn.Config(
        app,
        workers=1,
        log_config=None,
        access_log=is_access_logged(options, "uvicorn.access"),
        proxy_headers=options.proxy_headers,
        root_path=options.root_path,
        backlog=options.backlog,
        ssl_certfile=options.certfile,
        ssl_keyfile=options.keyfile,
        ssl_keyfile_password=options.keyfile_password,
        ssl_cert_reqs=CERT_REQS[options.cert_reqs],
        ssl_ca_certs=options.ca_certs,
        **given,
    )
    logging.getLogger("uvicorn.error").addFilter(_tell_no_step)
    await serve(ecdysis, config, await open_sockets(options), transfer=options.transfer)


def _tell_no_step(record: logging.LogRecord) -> bool:
    """Let a log be without uvicorn's own steps, unless it has steps: with many workers nothing else could be read."""
    return record.msg not in _STEPS or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, goodbye: Goodbye, application: Application, startup: Startup, *, transfer: bool
    ) -> None:
        super().__init__(config)
        self._startup = startup
        self._transfers = transfer
        self._goodbye = goodbye
        self._application = application
        if may_switch(config.http_protocol_class):
            follow_http_2(goodbye, self.server_state)
        else:
            application.rest(UvicornRequests(self.server_state))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are the Ecdysis'.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Each request gets a copy of this, with a lifespan and without.
        self.lifespan.state.update(make_state(self._goodbye.ecdysis))
        try:
            await super().startup(sockets)
        except SystemExit as error:
            raise self._application.failure or error.__context__ or error from None
        for server in self.servers:
            if isinstance(server, GatedServer):
                transfer = choose_transfer(server.protocol_factory, self.config.http_protocol_class)
                server.adapt(
                    say_goodbye=_say_goodbye, transfer=transfer if self._transfers else None, keeps_context=True
                )
        # Makes the headers of the first responses: requests may come before the main loop's first turn.
        await self.on_tick(0)
        await self._startup.ready()
        await self._goodbye.ecdysis.ready()

    async def main_loop(self) -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._exit_when_left)
            await super().main_loop()
            if not self._goodbye.ecdysis.draining.is_set():
                # uvicorn has reasons of its own: limit_max_requests, or an application that sets `should_exit`.
                self._goodbye.ecdysis.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with self._goodbye.ending() as begin:
            begin()
            # Called without the sockets, which it would close: they are the Ecdysis'.
            await super().shutdown()

    async def _exit_when_left(self) -> None:
        await self._goodbye.wait_for_last_connection()
        self.should_exit = True


def _say_goodbye(protocol: Any) -> bool:
    """Say goodbye to a connection that is about to be closed; return whether it ends by itself."""
    if getattr(protocol, "close_timer", None) is not None:
        # A WebSocket whose client has yet to answer the close; uvicorn's application has heard of it. Bytes that the
        # client has sent before would meet a closed socket, which resets: the client would never see why.
        return True
    cycle = getattr(protocol, "cycle", None)
    if cycle is not None and not cycle.response_complete:
        # A request that nobody took note of, because the server does not show it any more. uvicorn closes behind it.
        protocol.shutdown()
        return True
    # Connections of HTTP/2 have a goodbye of their own.
    return is_http_2(protocol)
