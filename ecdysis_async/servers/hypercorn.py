"""hypercorn on asyncio and uvloop, whose sockets, signals and end are those of the ``Ecdysis``.

Seams, as seen in hypercorn 0.18: ``hypercorn.asyncio.serve`` with its ``shutdown_trigger``, which is called once the
server listens, and ``Config.create_sockets``. On trio it cannot be handed over: it accepts by trio's own
``serve_listeners``, which cannot be paused and taken up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import hypercorn.asyncio
from hypercorn.config import Config, Sockets

from ecdysis_async.asyncio_servers import numeric
from ecdysis_async.supervisor import Ecdysis

from .asgi import Application
from .departure import Departure

__all__ = ["serve"]

# Where a bind names no port: hypercorn's own.
PORT = 8000


async def serve(ecdysis: Ecdysis, app: Callable[[Any, Any, Any], Awaitable[Any]], config: Config) -> None:
    """Serve an ASGI application until this generation shall leave and its requests are answered.

    It announces readiness itself, after the application's start-up. Applications find the event that this generation
    leaves as ``scope["state"]["ecdysis.draining"]``: streams should end then. WebSockets are closed with 1012, one
    after the other until the deadline.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``).
        app: of ASGI 3.
        config: hypercorn's own; what it says of loops, signals, workers and max_requests is not used.

    Raises:
        RuntimeError: the loop is not gated, or the application said no more than that its start-up failed.
        ValueError: QUIC was asked for: its one socket carries all connections, and cannot be paused.
        Exception: whatever the application's start-up raised.
        OSError: an address cannot be bound.

    Cancelling it ends the server at once.
    """
    departure = Departure(ecdysis)
    if config.quic_bind:
        raise ValueError("QUIC connections cannot be handed over: leave quic_bind out")
    application = Application(app, departure)
    secure, insecure = (config.bind, config.insecure_bind) if config.ssl_enabled else ([], config.bind)
    with contextlib.ExitStack() as duplicates, departure.ending() as begin_shutdown:
        sockets = Sockets(
            [duplicates.enter_context(await _listen(ecdysis, config, bind)) for bind in secure],
            [duplicates.enter_context(await _listen(ecdysis, config, bind)) for bind in insecure],
            quic_sockets=[],
        )

        async def leave() -> None:
            await ecdysis.ready()
            await departure.see_off()
            begin_shutdown()

        try:
            await hypercorn.asyncio.serve(cast("Any", application), _Config(config, sockets), shutdown_trigger=leave)
        except Exception:
            if application.failure is not None:
                raise application.failure from None
            raise


class _Config(Config):
    """The given one, but for the sockets: hypercorn would bind some of its own."""

    def __init__(self, given: Config, sockets: Sockets) -> None:
        super().__init__()
        vars(self).update(vars(given))
        # It would shut the server down, and the Ecdysis would not know.
        self.max_requests = None
        self._sockets = sockets

    def create_sockets(self) -> Sockets:
        return self._sockets


async def _listen(ecdysis: Ecdysis, config: Config, bind: str) -> socket.socket:
    """Return a duplicate, for hypercorn to own, of a registered socket."""
    return socket.socket(fileno=os.dup(await _register(ecdysis, config, bind)))


async def _register(ecdysis: Ecdysis, config: Config, bind: str) -> int:
    if bind.startswith("fd://"):
        return int(bind.removeprefix("fd://"))
    if bind.startswith("unix:"):
        path = bind.removeprefix("unix:")
        mode = None if config.umask is None else 0o777 & ~config.umask
        sock = ecdysis.listen_unix(path, backlog=config.backlog, mode=mode)
        if config.user is not None and config.group is not None:
            os.chown(path, config.user, config.group)
        return sock.fileno()
    # As hypercorn reads it.
    bind = bind.replace("[", "").replace("]", "")
    try:
        host, text = bind.rsplit(":", 1)
        port = int(text)
    except ValueError:
        host, port = bind, PORT
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    (*_, address), *_ = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return ecdysis.listen_tcp(*numeric(address), backlog=config.backlog).fileno()
