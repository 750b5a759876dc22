"""The data plane of native trio: a listener behind the gate that implements trio's own interface.

No other module of this wing imports trio, and none imports this one: they find it where the application has imported
it. When to accept is decided at the gate.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import trio
from anyio.abc import TaskGroup

from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Release
from ecdysis_async._sockets.entry import Entry

from .data_plane import DataPlane
from .gated_socket import AcceptedConnection, AcceptingEnded, SocketAcceptor, handling, require_streams

__all__ = ["TrioAcceptingEnded", "TrioListener", "service_of"]

Handler = Callable[[Any], Awaitable[object]]
Resume = Callable[[Any, Any], Awaitable[object]]
Service = Callable[[Handler, TaskGroup], Coroutine[Any, Any, None]]


class TrioAcceptingEnded(AcceptingEnded, trio.ClosedResourceError):
    """An :class:`AcceptingEnded` that is one of trio's errors, too."""


class TrioListener(trio.abc.Listener[trio.SocketStream]):
    """A registered TCP or Unix listener as a ``trio.abc.Listener``.

    Args:
        sock: a socket that the ``Ecdysis`` returned, or its entry.
        plane: by default the active one of this process.

    Raises:
        LookupError: there is no ``Ecdysis`` in this process.
        ValueError: the socket is not registered.
        TypeError: the socket is no stream socket.
    """

    def __init__(self, sock: socket.socket | Entry, *, plane: DataPlane | None = None) -> None:
        self.acceptor = SocketAcceptor(sock, plane=plane)
        require_streams(self.acceptor)

    async def accept(self) -> trio.SocketStream:
        """Wait for a connection and return its stream, tracked until it is closed.

        From then on ``until_draining`` in the calling task, and in tasks that it starts, is about this connection.

        Raises:
            TrioAcceptingEnded: nothing more will come; a ``trio.ClosedResourceError``.

        Cancellation loses no connection.
        """
        try:
            sock, connection = await self.acceptor.accept()
        except AcceptingEnded as ended:
            raise TrioAcceptingEnded(*ended.args) from None
        current_connection.set(connection)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def aclose(self) -> None:
        """Close the socket: the application wants no more connections. Harmless once the generation is leaving."""
        await self.acceptor.aclose()


def service_of(listener: object, resume: Resume | None = None) -> Service | None:
    """Return what serves the connections of a listener until accepting ends; None if it is no gated listener."""
    inner = listener.transport_listener if isinstance(listener, trio.SSLListener) else listener
    if not isinstance(inner, TrioListener):
        return None
    if listener is not inner:
        # The state of a TLS session is in user space: its connections cannot move.
        resume = None
    return functools.partial(_serve, cast(trio.abc.Listener[Any], listener), inner.acceptor, resume)


async def _serve(
    listener: trio.abc.Listener[Any],
    acceptor: SocketAcceptor,
    resume: Resume | None,
    handler: Handler,
    task_group: TaskGroup,
) -> None:
    if resume is not None:
        acceptor.resume_by(task_group, functools.partial(_resume, resume, acceptor))
    while True:
        try:
            stream = await listener.accept()
        except TrioAcceptingEnded:
            return
        # The accept of this very task made its connection the current one, whatever wraps the stream by now.
        connection = current_connection.get()
        assert isinstance(connection, AcceptedConnection)
        task_group.start_soon(_handle, handler, stream, connection, acceptor)


async def _handle(
    handler: Handler, stream: trio.abc.AsyncResource, connection: AcceptedConnection, acceptor: SocketAcceptor
) -> None:
    with handling(connection, acceptor.plane.tracker):
        connection.stream = stream
        try:
            await handler(stream)
        finally:
            # Closed forcefully, as by trio.serve_listeners: the handler's `async with stream` says the goodbye of TLS.
            # A forceful close costs 40 microseconds even if nothing is left to close, so it is asked first.
            if not connection.is_over():
                await trio.aclose_forcefully(stream)


async def _resume(
    resume: Resume, acceptor: SocketAcceptor, sock: socket.socket, connection: AcceptedConnection, release: Release
) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await resume(stream, release.state)

    await _handle(handler, trio.SocketStream(trio.socket.from_stdlib_socket(sock)), connection, acceptor)
