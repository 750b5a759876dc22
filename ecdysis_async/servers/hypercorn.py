"""hypercorn on asyncio, uvloop and trio, whose sockets, signals and end are those of the ``Ecdysis``.

The rest is in ``_hypercorn_asyncio.py`` and ``_hypercorn_trio.py``.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from hypercorn.config import Config

from ecdysis_async._accepting.data_plane import active
from ecdysis_async._config.options import Options
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async._sockets.addresses import parse_address
from ecdysis_async._sockets.registry import listen
from ecdysis_async.servers._common.forwarded import Forwarded
from ecdysis_async.servers._common.goodbye import is_on_trio
from ecdysis_async.servers._common.listening import (
    CERT_REQS,
    describe,
    is_access_logged,
    make_ssl_context,
    open_sockets,
)

from ._common import server_options

__all__ = ["read_options", "run", "serve"]

# The logger of one line for each request.
ACCESS = "hypercorn.access"

# The port of a bind that names none: hypercorn's default.
PORT = 8000

# The options that `ecdysis run` sets itself, or that the Ecdysis replaces.
OURS = frozenset(
    {
        "accesslog",
        "application_path",
        "backlog",
        "bind",
        "ca_certs",
        "cert_reqs",
        "certfile",
        "ciphers",
        "daemon",
        "debug",
        "errorlog",
        "graceful_timeout",
        "group",
        "insecure_bind",
        "keyfile",
        "keyfile_password",
        "log",
        "logconfig",
        "logconfig_dict",
        "loglevel",
        "max_requests",
        "max_requests_jitter",
        "pid_path",
        "quic_bind",
        "root_path",
        "ssl_enabled",
        "umask",
        "use_reloader",
        "user",
        "verify_mode",
        "worker_class",
        "workers",
    }
)


async def serve(
    ecdysis: Ecdysis,
    app: Callable[[Any, Any, Any], Awaitable[Any]],
    config: Config,
    socks: Sequence[socket.socket] = (),
    *,
    transfer: bool = True,
) -> None:
    """Serve an ASGI application until this generation shall leave and its requests are answered.

    It announces readiness itself, once the application's start-up is over, and where several servers are started side
    by side, with the last of them. Applications find the event that this generation leaves as
    ``scope["state"]["ecdysis.draining"]``: streams should end then. WebSockets are closed with 1012, one after the
    other until the deadline.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``) or on trio.
        app: an application of ASGI 3.
        config: hypercorn's own; what it says of loops, signals, workers and max_requests is not used.
        socks: sockets of the ``Ecdysis``, in place of the binds of ``config``.
        transfer: on asyncio and uvloop, let connections that were never read from move to the successor of a restart.
            Connections that have had a response cannot: hypercorn keeps what it has read of the next request in the
            local variables of its tasks.

    Raises:
        RuntimeError: the loop is not gated, or the application said no more than that its start-up failed.
        ValueError: QUIC was asked for: its one socket carries all connections, and cannot be paused.
        Exception: whatever the application's start-up raised.
        OSError: an address cannot be bound.

    Cancelling it ends the server at once.
    """
    if config.quic_bind:
        raise ValueError("QUIC connections cannot be handed over: leave quic_bind out")
    config = _copy(config)
    with active().readiness.expect(describe("hypercorn", socks, *config.bind)) as startup:
        if socks:
            secure, insecure = (list(socks), []) if config.ssl_enabled else ([], list(socks))
        else:
            binds, insecure_binds = (config.bind, config.insecure_bind) if config.ssl_enabled else ([], config.bind)
            secure = [await _register(ecdysis, config, bind) for bind in binds]
            insecure = [await _register(ecdysis, config, bind) for bind in insecure_binds]
        if is_on_trio():
            from ._hypercorn_trio import serve as serve_on_trio

            await serve_on_trio(ecdysis, app, config, secure, insecure, startup)
        else:
            from ._hypercorn_asyncio import serve as serve_on_asyncio

            await serve_on_asyncio(ecdysis, app, config, secure, insecure, startup, transfer=transfer)


def read_options(options: Options) -> dict[str, Any]:
    """Return the options of the server itself.

    Raises:
        OptionError: there is no such option, or its value is of another type.
    """
    return server_options.read("hypercorn", server_options.of_attributes(Config), options.server_options, OURS)


async def run(ecdysis: Ecdysis, app: Any, options: Options) -> None:
    """Serve an ASGI application as the options say.

    Raises:
        StartupError: it cannot be served so.
    """
    # hypercorn makes a TLS context of its own, and says less where that fails.
    make_ssl_context(options)
    config = Config()
    # hypercorn logs where everything else logs.
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = logging.getLogger(ACCESS) if is_access_logged(options, ACCESS) else None
    config.backlog = options.backlog
    config.root_path = options.root_path
    config.certfile = options.certfile
    config.keyfile = options.keyfile or options.certfile
    config.keyfile_password = options.keyfile_password
    config.ca_certs = options.ca_certs
    config.verify_mode = CERT_REQS[options.cert_reqs]
    if options.ciphers is not None:
        config.ciphers = options.ciphers
    for name, value in read_options(options).items():
        setattr(config, name, value)
    if options.proxy_headers:
        app = Forwarded(app, options.forwarded_allow_ips)
    await serve(ecdysis, app, config, await open_sockets(options), transfer=options.transfer)


def _copy(given: Config) -> Config:
    config = Config()
    vars(config).update(vars(given))
    # Reaching it would shut the server down without the Ecdysis' knowledge.
    config.max_requests = None
    return config


async def _register(ecdysis: Ecdysis, config: Config, bind: str) -> socket.socket:
    if bind.startswith("fd://"):
        return listen(active().registry, parse_address(bind))[0].sock
    if bind.startswith("unix:"):
        path = bind.removeprefix("unix:")
        mode = None if config.umask is None else 0o777 & ~config.umask
        sock = ecdysis.listen_unix(path, backlog=config.backlog, mode=mode)
        if config.user is not None and config.group is not None:
            os.chown(path, config.user, config.group)
        return sock
    # Read as hypercorn reads it.
    bind = bind.replace("[", "").replace("]", "")
    try:
        host, text = bind.rsplit(":", 1)
        port = int(text)
    except ValueError:
        host, port = bind, PORT
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    (*_, address), *_ = await anyio.getaddrinfo(
        host or None, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return ecdysis.listen_tcp(str(address[0]), address[1], backlog=config.backlog)
