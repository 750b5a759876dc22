"""The data plane of anyio, on all of its backends: listeners and datagram sockets behind the gate, and ``serve``.

The listeners implement anyio's own interfaces, so that ``TLSListener`` and the like work on them. When to accept is
decided at the gate.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, cast

import anyio
import anyio.lowlevel
from anyio.abc import Listener, SocketAttribute, SocketStream, TaskGroup, UNIXSocketStream, UnreliableObjectStream
from anyio.streams.tls import TLSListener

from ecdysis_async._connections.parcel import Release
from ecdysis_async._sockets.entry import Entry, Kind

from .data_plane import DataPlane, active
from .gated_socket import (
    AcceptedConnection,
    AcceptingEnded,
    GatedSocket,
    SocketAcceptor,
    handling,
    largest_datagram,
    require_streams,
)

__all__ = ["AnyioListener", "DatagramListener", "serve"]

Handler = Callable[[Any], Awaitable[object]]
Service = Callable[[Handler, TaskGroup], Coroutine[Any, Any, None]]

# A Unix datagram socket is writable also where the receiver's queue is full (unix_dgram_poll looks at the peer of
# connected sockets only), so no event can be waited for: sending is tried again after this many seconds.
FULL_QUEUE_PAUSE_SECONDS = 0.005


class AnyioListener(Listener[SocketStream]):
    """A registered TCP or Unix listener as an ``anyio.abc.Listener``.

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

    async def serve(
        self,
        handler: Callable[[SocketStream], Any],
        task_group: TaskGroup | None = None,
        *,
        resume: Callable[[SocketStream, Any], Any] | None = None,
    ) -> None:
        """Start the handler in a task of its own for each connection; return when accepting ends.

        The stream is closed when its handler returns. An exception of a handler is logged and closes its connection
        only.

        Args:
            handler: called with the stream.
            task_group: where handlers run. Without one, they are waited for as well.
            resume: called with the stream and the state that the predecessor's handler gave to ``transfer``.

        Cancellation loses no connection; without a task group it cancels the handlers too.
        """
        async with contextlib.AsyncExitStack() as stack:
            if task_group is None:
                task_group = await stack.enter_async_context(anyio.create_task_group())
            if resume is not None:
                self.acceptor.resume_by(task_group, functools.partial(self._resume, resume))
            while True:
                try:
                    sock, connection = await self.acceptor.accept()
                except AcceptingEnded:
                    return
                task_group.start_soon(self._handle, handler, sock, connection)

    async def aclose(self) -> None:
        """Close the socket: the application wants no more connections. Harmless once the generation is leaving."""
        await self.acceptor.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The attributes of ``SocketAttribute`` that a listener has."""
        return attributes_of(self.acceptor.entry.sock)

    async def _handle(
        self, handler: Callable[[SocketStream], Any], sock: socket.socket, connection: AcceptedConnection
    ) -> None:
        with handling(connection, self.acceptor.plane.tracker):
            stream = await wrap(sock)
            if stream is not None:
                connection.stream = stream
                async with stream:
                    await handler(stream)

    async def _resume(
        self,
        resume: Callable[[SocketStream, Any], Any],
        sock: socket.socket,
        connection: AcceptedConnection,
        release: Release,
    ) -> None:
        async def handler(stream: SocketStream) -> None:
            if release.unread:
                protocol = stream._protocol  # type: ignore[attr-defined]  # noqa: SLF001 - anyio's
                protocol.read_queue.appendleft(release.unread)
                protocol.read_event.set()
            await resume(stream, release.state)

        await self._handle(handler, sock, connection)


class DatagramListener(UnreliableObjectStream[tuple[bytes, Any]]):
    """A registered UDP or Unix datagram socket, with the interface of ``anyio.abc.UDPSocket``.

    It receives only while the gate stands open, and sends at any time: a generation that drains still answers what it
    has received. Iterating over it ends when receiving is over for good. Addresses are as the kernel gives them: host
    and port, or a path.

    Args:
        sock: a socket that the ``Ecdysis`` returned, or its entry.
        plane: by default the active one of this process.

    Raises:
        LookupError: there is no ``Ecdysis`` in this process.
        ValueError: the socket is not registered.
        TypeError: it is no datagram socket.
    """

    def __init__(self, sock: socket.socket | Entry, *, plane: DataPlane | None = None) -> None:
        self._gated = GatedSocket(sock, plane=plane)
        self._sending = anyio.Lock(fast_acquire=True)
        entry = self._gated.entry
        if entry.sock.type != socket.SOCK_DGRAM:
            raise TypeError(f"{entry.name} is no datagram socket: serve connections by ecdysis.serve(handler, sock)")
        self._largest = largest_datagram(entry)

    async def receive(self) -> tuple[bytes, Any]:
        """Wait for a datagram and return it with its sender's address.

        Raises:
            EndOfStream: nothing more will come; the queue belongs to the successor.
            ClosedResourceError: the application has closed it.

        Cancellation, and a pause of the generation, lose no datagram.
        """
        try:
            return await self._gated.take(self._receive)
        except AcceptingEnded:
            if self._is_closed():
                raise anyio.ClosedResourceError from None
            raise anyio.EndOfStream from None

    async def send(self, item: tuple[bytes, Any]) -> None:
        """Send a datagram to an address.

        Raises:
            ClosedResourceError: the socket is closed.
            OSError: the kernel refused this datagram: it is too long, or nothing listens. Others may still go out.
            ValueError: the host is a name; to resolve it would block.

        Cancelled, it was not sent.
        """
        data, address = item
        sock = self._gated.entry.sock
        if self._gated.entry.kind is Kind.UDP:
            _require_number(sock.family, address[0])
        async with self._sending:
            await anyio.lowlevel.checkpoint()
            while True:
                if self._is_closed():
                    raise anyio.ClosedResourceError
                try:
                    sock.sendto(data, address)
                except BlockingIOError:
                    if self._gated.entry.kind is Kind.UDP:
                        # A pause wakes every task that waits for this descriptor, and closes nothing.
                        with contextlib.suppress(anyio.ClosedResourceError):
                            await anyio.wait_writable(sock)
                    else:
                        await anyio.sleep(FULL_QUEUE_PAUSE_SECONDS)
                else:
                    return

    async def sendto(self, data: bytes, host: str | bytes, port: int | None = None) -> None:
        """Send a datagram to host and port, or to a path; see :meth:`send`."""
        await self.send((data, host if port is None else (host, port)))

    async def aclose(self) -> None:
        """Close the socket: the application wants no more of it. Harmless once the generation is leaving."""
        await self._gated.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The attributes of ``SocketAttribute`` that an unconnected socket has."""
        return attributes_of(self._gated.entry.sock)

    def _receive(self, sock: socket.socket) -> tuple[bytes, Any]:
        data, address = sock.recvfrom(self._largest)
        # The flow and scope numbers of IPv6 are left out, as in anyio; the host has the scope in it.
        return data, address[:2] if isinstance(address, tuple) else address

    def _is_closed(self) -> bool:
        return self._gated.entry.sock.fileno() == -1


async def serve(
    handler: Handler,
    *listeners: object,
    resume: Callable[[Any, Any], Awaitable[object]] | None = None,
    plane: DataPlane | None = None,
) -> None:
    """Serve connections of registered listeners; see ``Ecdysis.serve``.

    Each handler has its own cancel scope, which the drain's deadline cancels, and runs in the plane's task group. So
    this returns when accepting ends, and the handlers go on. A plane without a task group has them waited for here.

    Args:
        handler: called with each stream, in a task of its own.
        listeners: sockets that the ``Ecdysis`` returned, for anyio's streams; :class:`AnyioListener`,
            ``TrioListener``, and the TLS listeners of anyio and trio around these.
        resume: called with a stream of the predecessor, and the state that its handler gave to ``transfer``; without
            effect for TLS.
        plane: by default the active one of this process.

    Raises:
        TypeError: a listener is of another kind.
        ValueError: a socket is not registered.

    Cancellation ends the accepting only, and loses no connection.
    """
    plane = plane or active()
    if not listeners:
        raise TypeError("nothing to serve: pass the sockets of ecdysis.listen_tcp() and the like")
    services: list[Service] = []
    async with contextlib.AsyncExitStack() as stack:
        for listener in listeners:
            if isinstance(listener, socket.socket | Entry):
                ours = AnyioListener(listener, plane=plane)
                # No other call knows the acceptor. Left behind, it would stay at the gate for ever.
                stack.push_async_callback(plane.gate.remove, ours.acceptor)
                services.append(_service_of(ours, resume))
            else:
                services.append(_service_of(listener, resume))
        task_group = plane.task_group
        if task_group is None:
            task_group = await stack.enter_async_context(anyio.create_task_group())
        async with anyio.create_task_group() as accepting:
            for service in services:
                accepting.start_soon(service, handler, task_group)


async def wrap(sock: socket.socket) -> SocketStream | None:
    """Make a stream of an accepted socket, which it takes over; return None if the peer has left already."""
    try:
        if sock.family == socket.AF_UNIX:
            return await UNIXSocketStream.from_socket(sock)
        return await SocketStream.from_socket(sock)
    except ValueError:
        # The connection was reset before: it has no peer any more, and anyio refuses it.
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise


def attributes_of(sock: socket.socket) -> Mapping[Any, Callable[[], Any]]:
    """Return anyio's typed attributes of a socket that has no peer."""
    attributes: dict[Any, Callable[[], Any]] = {
        SocketAttribute.family: lambda: sock.family,
        SocketAttribute.local_address: lambda: _local_address(sock),
        SocketAttribute.raw_socket: lambda: sock,
    }
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        attributes[SocketAttribute.local_port] = lambda: sock.getsockname()[1]
    return attributes


def _service_of(listener: object, resume: Callable[[Any, Any], Awaitable[object]] | None) -> Service:
    """Return what serves the connections of a listener until accepting ends."""
    inner = listener.listener if isinstance(listener, TLSListener) else listener
    if isinstance(listener, AnyioListener):
        return functools.partial(listener.serve, resume=resume)
    if isinstance(inner, AnyioListener):
        return cast(Listener[Any], listener).serve
    # A program that has made a TrioListener has imported its module; other programs do not need trio.
    trio_streams = sys.modules.get(f"{__package__}.trio_streams")
    service: Service | None = trio_streams.service_of(listener, resume) if trio_streams is not None else None
    if service is not None:
        return service
    raise TypeError(
        f"cannot serve {listener!r}: its accepting cannot be paused. Pass a socket of ecdysis.listen_tcp() and the "
        "like, an AnyioListener(sock) or TrioListener(sock), or a TLSListener or trio.SSLListener around one of these"
    )


def _local_address(sock: socket.socket) -> Any:
    address = sock.getsockname()
    return address[:2] if isinstance(address, tuple) else address


def _require_number(family: int, host: str) -> None:
    try:
        socket.inet_pton(family, host.partition("%")[0])
    except OSError:
        raise ValueError(f"{host!r} is no numeric address: resolve it first (anyio.getaddrinfo)") from None
