"""uvicorn: its server, whose sockets, signals and end are those of the ``Ecdysis``.

Seams, as seen in uvicorn 0.54: ``Config.load``, ``.loaded_app`` and ``.http_protocol_class``; of ``Server`` the methods
``startup``, ``on_tick``, ``main_loop``, ``shutdown`` and ``capture_signals``, and ``should_exit``.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import uvicorn

from ecdysis_async.supervisor import Ecdysis

from .asgi import Application
from .departure import Departure

__all__ = ["serve"]


async def serve(ecdysis: Ecdysis, config: uvicorn.Config) -> None:
    """Serve an ASGI application until this generation shall leave and its requests are answered.

    It announces readiness itself, after the application's start-up. Applications find the event that this generation
    leaves as ``scope["state"]["ecdysis.draining"]``: streams should end then. WebSockets are closed with 1012, one
    after the other until the deadline.

    Args:
        ecdysis: entered, on a gated loop (``ecdysis_async.run``).
        config: uvicorn's own; what it says of loops, signals, workers and reloading is not used.

    Raises:
        RuntimeError: the loop is not gated, or the application said no more than that its start-up failed.
        Exception: whatever the application's start-up raised.
        OSError: an address cannot be bound.

    Cancelling it ends the server at once.
    """
    departure = Departure(ecdysis)
    try:
        if not config.loaded:
            config.load()
    except SystemExit as error:
        # uvicorn leaves the process where an import fails.
        raise error.__context__ or error from None
    application = Application(config.loaded_app, departure)
    config.loaded_app = application
    config.http_protocol_class = _keep_context(config.http_protocol_class)
    await _Server(config, departure, application).serve()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, departure: Departure, application: Application) -> None:
        super().__init__(config)
        self._departure = departure
        self._application = application

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # They are the Ecdysis'.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit as error:
            raise self._application.failure or error.__context__ or error from None
        # Makes the headers of the first responses, which may be asked for before the main loop's first turn.
        await self.on_tick(0)
        await self._departure.ecdysis.ready()

    async def main_loop(self) -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._exit_when_left)
            await super().main_loop()
            if not self._departure.ecdysis.draining.is_set():
                # Its own reasons: limit_max_requests, or `should_exit` set by the application.
                self._departure.ecdysis.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with self._departure.ending() as begin:
            begin()
            await super().shutdown(sockets)

    async def _exit_when_left(self) -> None:
        await self._departure.see_off()
        self.should_exit = True


def _keep_context(protocol_class: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
    """Let what a protocol does with its data, such as a request's task, know its connection (``current_connection``).

    Loops call ``data_received`` in a context that is older than the connection.
    """

    class InContext(protocol_class):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            self.__context = contextvars.copy_context()
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            self.__context.run(super().data_received, data)

    return InContext
