"""The data plane of asyncio and uvloop: servers that accept between commit and pause only, and track what they accept.

To accept is left to the loop's own server, on a duplicate of the registered socket; to pause is to close that server:
an accept loop of one's own costs uvloop half as much CPU again per connection. Nothing here decides when to accept,
and nothing stands between a transport and its protocol while data flows.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import errno
import functools
import os
import socket
import ssl as tls
import sys
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from ecdysis_async._connections.connection import Connection, Verdict, current_connection
from ecdysis_async._connections.parcel import ConnectionResumer, Refused, Release, Transferable, TransferRecord
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import BACKLOG, Entry, Until
from ecdysis_async._system.descriptors import EXHAUSTED
from ecdysis_async.errors import DrainInterrupt

from .data_plane import DataPlane
from .gate import Acceptor, GateState

__all__ = [
    "GatedServer",
    "ServerConnection",
    "TransferStrategy",
    "create_server",
    "create_unix_server",
    "start_server",
    "start_unix_server",
]

T = TypeVar("T")

ProtocolFactory = Callable[[], asyncio.BaseProtocol]
ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
Resume = Callable[[Any], asyncio.BaseProtocol]
ResumeStream = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Any], Awaitable[None] | None]

# What `asyncio.start_server` lets a StreamReader hold, in bytes.
STREAM_LIMIT = 2**16

# How many connections asyncio accepts in one turn of its loop: the number it takes by default. The length of the
# kernel's queue, which asyncio takes from the same argument, would be a stall.
ACCEPTS_PER_TURN = 100

# How often it is looked whether asyncio watches a socket again that it has left alone for want of descriptors, seconds.
EXHAUSTED_POLL_SECONDS = 0.02


async def create_server(
    plane: DataPlane,
    protocol_factory: ProtocolFactory,
    host: str | Iterable[str] | None = None,
    port: int | str | None = None,
    *,
    name: str | None = None,
    until: Until | str = Until.DRAIN,
    family: int = socket.AF_UNSPEC,
    flags: int = socket.AI_PASSIVE,
    sock: socket.socket | None = None,
    backlog: int = BACKLOG,
    ssl: tls.SSLContext | None = None,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
    keep_alive: bool | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    resume: Resume | TransferStrategy | None = None,
) -> GatedServer:
    """Serve a protocol on TCP, as ``loop.create_server`` does, on sockets that are inherited or created.

    Names are resolved first, and each address gets a socket of its own.

    Args:
        plane: what the sockets are registered with.
        protocol_factory: called for each connection.
        host: an address, a name, or several; None or "" is every interface.
        port: 0 lets the kernel choose, once for all generations.
        name: what the sockets are inherited by.
        until: whether it ends with the drain of a stop, or serves to the exit.
        family: of the addresses that names are resolved to.
        flags: for that.
        sock: a socket to use instead of host and port; it is registered, unless it is already. One that has a port
            of the kernel's choice needs a name to be inherited by.
        backlog: how many connections may wait to be accepted.
        ssl: serve TLS.
        reuse_address: ignored: what a successor shall inherit always has SO_REUSEADDR.
        reuse_port: allow several listeners on one address.
        keep_alive: set SO_KEEPALIVE on what is accepted.
        ssl_handshake_timeout: seconds.
        ssl_shutdown_timeout: seconds.
        start_serving: False leaves the beginning to ``start_serving`` of the server, and to the gate.
        resume: called with the state that a :class:`Transferable` protocol of the predecessor's has released, returns
            the protocol that goes on with its connection.

    Raises:
        OSError: an address cannot be bound; none of them is then.
        ValueError: the arguments contradict each other.

    Cancelled, it leaves no socket behind.
    """
    tls_options = _tls_options(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    loop = asyncio.get_running_loop()
    if sock is not None:
        if host is not None or port is not None:
            raise ValueError("host/port and sock can not be specified at the same time")
        entries = [_register(plane, sock, name, until)]
    elif host is None and port is None:
        raise ValueError("Neither host/port nor sock were specified")
    else:
        addresses = await _resolve(loop, host, port, family, flags)
        entries = _listen_tcp(plane, addresses, name, until, backlog, reuse_port=bool(reuse_port))
    if keep_alive:
        for entry in entries:
            entry.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server = GatedServer(plane, protocol_factory, entries, sock, tls_options, _moves_of(resume))
    return await _serve(server, start_serving=start_serving)


async def create_unix_server(
    plane: DataPlane,
    protocol_factory: ProtocolFactory,
    path: str | bytes | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    until: Until | str = Until.DRAIN,
    sock: socket.socket | None = None,
    backlog: int = BACKLOG,
    ssl: tls.SSLContext | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
    cleanup_socket: bool = True,
    resume: Resume | TransferStrategy | None = None,
) -> GatedServer:
    """Serve a protocol on a Unix socket, as ``loop.create_unix_server`` does; see :func:`create_server`.

    ``cleanup_socket`` is ignored: the path outlives the generations and is removed at a full stop, by its owner.
    """
    tls_options = _tls_options(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
    if sock is not None:
        if path is not None:
            raise ValueError("path and sock can not be specified at the same time")
        if sock.family != socket.AF_UNIX:
            raise ValueError(f"A UNIX Domain Stream Socket was expected, got {sock!r}")
        entry = _register(plane, sock, name, until)
    elif path is None:
        raise ValueError("path was not specified, and no sock specified")
    else:
        entry = plane.registry.obtain(Unix(os.fsdecode(path)), name=name, until=until, backlog=backlog)
    server = GatedServer(plane, protocol_factory, [entry], sock, tls_options, _moves_of(resume))
    return await _serve(server, start_serving=start_serving)


async def start_server(
    plane: DataPlane,
    client_connected_cb: ClientConnected,
    host: str | Iterable[str] | None = None,
    port: int | str | None = None,
    *,
    limit: int = STREAM_LIMIT,
    resume: ResumeStream | None = None,
    **options: Any,
) -> GatedServer:
    """Call back with a reader and a writer for each connection, as ``asyncio.start_server`` does.

    A coroutine that is called so may use ``until_draining``, is waited for by the drain, and is cancelled at its
    deadline.

    Args:
        plane: what the sockets are registered with.
        client_connected_cb: a plain function or a coroutine function.
        host: see :func:`create_server`.
        port: see there.
        limit: how much the reader may hold, in bytes.
        resume: called with a reader, a writer and the state that the predecessor's handler gave to ``transfer``.
        options: those of :func:`create_server`.
    """
    moves = _StreamTransfer(resume, limit) if resume is not None else None
    return await create_server(plane, _stream_factory(client_connected_cb, limit), host, port, resume=moves, **options)


async def start_unix_server(
    plane: DataPlane,
    client_connected_cb: ClientConnected,
    path: str | bytes | os.PathLike[str] | None = None,
    *,
    limit: int = STREAM_LIMIT,
    resume: ResumeStream | None = None,
    **options: Any,
) -> GatedServer:
    """Call back with a reader and a writer for each connection on a Unix socket; see :func:`start_server`."""
    moves = _StreamTransfer(resume, limit) if resume is not None else None
    return await create_unix_server(plane, _stream_factory(client_connected_cb, limit), path, resume=moves, **options)


class TransferStrategy(abc.ABC):
    """How the connections of one server move: what a protocol gives away, and what goes on with it."""

    @abc.abstractmethod
    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        """Return what travels of a connection that is not being read now, or None if it is at no safe point.

        Args:
            connection: nothing is in its write buffer, and it is no TLS.
            protocol: the one that its transport has at this moment.
        """

    def keep(self, connection: ServerConnection, protocol: Any) -> None:  # noqa: B027 - most have nothing to do
        """Go on with a connection that was packed: it stays here."""

    @abc.abstractmethod
    def resume(self, release: Release) -> asyncio.BaseProtocol:
        """Make the protocol that goes on with a connection.

        Raises:
            Refused: it cannot be served here.
        """


class GatedServer(asyncio.AbstractServer):
    """A server that accepts while the gate stands open.

    ``start_serving`` and ``serve_forever`` do not pass the gate. ``wait_closed`` waits for the accepting to end, not
    for the connections: those are the drain's. It differs from asyncio's own in that, as uvloop's does.
    """

    def __init__(
        self,
        plane: DataPlane,
        protocol_factory: ProtocolFactory,
        entries: Iterable[Entry],
        given: socket.socket | None,
        tls_options: dict[str, Any],
        moves: TransferStrategy | None = None,
    ) -> None:
        # The next four are for adapters of other people's servers to set, the last one before it accepts.
        # Without effect where TLS is served: what a session is made of is in user space, and stays in this process.
        self.moves = moves
        # Called with the protocol of a connection that the drain is about to close as idle; True where it is on its way
        # out by itself, and has until the deadline.
        self.say_goodbye: Callable[[Any], bool] | None = None
        # Called when a peer has sent all it will, once the protocol has heard of it.
        self.on_hang_up: Callable[[ServerConnection], None] | None = None
        self.protocol_factory = protocol_factory
        self.is_secure = bool(tls_options)
        self._plane = plane
        self._loop = asyncio.get_running_loop()
        self._acceptors = [_ServerAcceptor(self, entry, tls_options) for entry in entries]
        # What the application passed, where that is a duplicate of what was registered: ours to close, as asyncio does.
        self._given = given
        self._is_started = False
        self._is_closed = False
        self._closed = asyncio.Event()
        self._forever: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        names = ", ".join(acceptor.entry.name for acceptor in self._acceptors)
        return f"<{type(self).__name__} {names}>"

    @property
    def plane(self) -> DataPlane:
        """What its sockets are registered with."""
        return self._plane

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The registered sockets; empty once the server is closed."""
        if self._is_closed:
            return ()
        return tuple(TransportSocket(acceptor.entry.sock) for acceptor in self._acceptors)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def is_serving(self) -> bool:
        """Say whether it accepts at this moment."""
        return any(acceptor.is_open for acceptor in self._acceptors)

    async def start_serving(self) -> None:
        """Accept as soon as the gate lets it; harmless if that was said before."""
        if not self._is_started:
            self._is_started = True
            for acceptor in self._acceptors:
                # It may be closed while the one before is opened.
                if not self._is_closed:
                    await self._plane.gate.add(acceptor)

    async def serve_forever(self) -> None:
        """Wait until the server is closed. Cancellation closes it."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._is_closed:
            raise RuntimeError(f"server {self!r} is closed")
        await self.start_serving()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stop accepting and close the sockets; connections go on. What is accepted already is still served."""
        if self._is_closed:
            return
        self._is_closed = True
        for acceptor in self._acceptors:
            acceptor.stop()
            withdraw(self._plane, acceptor)
        if self._given is not None and all(self._given is not acceptor.entry.sock for acceptor in self._acceptors):
            self._given.close()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()
        self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and everything it accepted is attached to its protocol."""
        await self._closed.wait()
        for acceptor in self._acceptors:
            await acceptor.wait_stopped()

    def close_clients(self) -> None:
        """Close the transport of every connection that this server accepted."""
        for transport in self._transports():
            transport.close()

    def abort_clients(self) -> None:
        """Abort the transport of every connection that this server accepted."""
        for transport in self._transports():
            transport.abort()

    def _transports(self) -> list[asyncio.WriteTransport]:
        return [
            connection.transport
            for connection in self._plane.tracker.connections()
            if isinstance(connection, ServerConnection)
            and connection.server is self
            and connection.transport is not None
        ]


class ServerConnection(Connection):
    """A connection from the call of the protocol factory to its end, and to the end of its handler, if that is known.

    Attributes:
        server: which accepted it.
        transport: None until the protocol is told of it: before that there is the attaching, and a TLS handshake.
        handler: the task of a stream's callback, as long as it runs.

    Args:
        server: see above.
        entry: what it was accepted from.
        sock: what was accepted, where the loop tells; until there is a transport, only this can be asked.
    """

    __slots__ = (
        "__weakref__",
        "_idle_task",
        "_is_lost",
        "_is_paused",
        "_is_woken",
        "_name",
        "_sock",
        "_tracker",
        "handler",
        "is_at_eof",
        "server",
        "transport",
    )

    def __init__(self, server: GatedServer, entry: Entry, sock: socket.socket | None) -> None:
        super().__init__(entry.until)
        self.server = server
        self._name = entry.name
        self._sock = sock
        self._tracker = server.plane.tracker
        self.transport: asyncio.WriteTransport | None = None
        self.handler: asyncio.Task[None] | None = None
        self._is_lost = False
        # Whether it is packed, and was read before.
        self._is_paused = False
        # Whether the peer has said that it sends no more.
        self.is_at_eof = False
        # Who waits at a safe point without a scope, and whether it was cancelled for that.
        self._idle_task: asyncio.Task[Any] | None = None
        self._is_woken = False

    async def at_safe_point(self, awaitable: Awaitable[T]) -> T:
        # Without a cancel scope, which costs as much as half of a small request: each one comes through here.
        task = asyncio.current_task()
        if self.interrupted or self.invited or self._idle_task is not None or task is None:
            return await super().at_safe_point(awaitable)
        self._idle_task = task
        requests = task.cancelling()
        try:
            return await awaitable
        except asyncio.CancelledError:
            # asyncio makes one error of two requests in one turn: the other one, somebody else's, must not be lost.
            if not self._is_woken or task.cancelling() > requests + 1:
                raise
        finally:
            self._idle_task = None
            if self._is_woken:
                self._is_woken = False
                task.uncancel()
        raise self._leave_safe_point()

    @property
    def movable(self) -> bool:
        return self.server.moves is not None and not self.server.is_secure and not self._is_lost

    def fileno(self) -> int:
        assert self.transport is not None
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def pack(self) -> TransferRecord | None:
        transport: Any = self.transport
        moves = self.server.moves
        if moves is None or self.server.is_secure or transport is None or transport.is_closing():
            return None
        if transport.get_write_buffer_size():
            return None
        doorway = transport.get_protocol()
        if isinstance(doorway, _TrackedProtocol) and doorway.is_owing:
            return None
        # Also effective for a read that the loop has queued in this very turn.
        # After its end nothing is read; to resume that would have asyncio find the end, and tell of it, once more.
        is_reading = transport.is_reading() and not self.is_at_eof
        transport.pause_reading()
        release = None
        try:
            release = moves.pack(self, protocol_of(transport))
        finally:
            if release is None and is_reading:
                transport.resume_reading()
        if release is None:
            return None
        self._is_paused = is_reading
        if self.offer is not None:
            self.offer.verdict = Verdict.SENT
        return TransferRecord(self._name, self.since, release)

    def keep(self) -> None:
        assert self.transport is not None
        moves, transport = self.server.moves, self.transport
        if moves is not None and not transport.is_closing():
            moves.keep(self, protocol_of(transport))
            if self._is_paused:
                transport.resume_reading()  # type: ignore[attr-defined]
        if self.offer is not None:
            self.offer.decide(Verdict.STAYS)

    def let_go(self) -> None:
        assert self.transport is not None
        self.transport.abort()
        if self.offer is not None:
            self.offer.decide(Verdict.MOVED)

    def invite(self) -> None:
        super().invite()
        self._wake()

    def interrupt(self) -> None:
        """Wake the handler at its safe point. What has neither is closed, and still sends what it has written."""
        is_known = bool(self._idle_scopes) or self._idle_task is not None or self.handler is not None
        super().interrupt()
        self._wake()
        if not is_known and self.transport is not None and not self.transport.is_closing():
            is_silent = self.transport.get_write_buffer_size() == 0
            if self.server.say_goodbye is None or not self.server.say_goodbye(protocol_of(self.transport)):
                self.silent = is_silent
                self.transport.close()

    def cancel(self) -> None:
        if self.handler is not None:
            self.handler.cancel()
        else:
            self._close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self._sock is not None:
            # ENOTCONN: the peer has reset it already. EBADF: it is closed already.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def is_over(self) -> bool:
        return self.handler is None and (self._is_lost or self._is_lost_unheard())

    def lose(self) -> None:
        """Take note that there is no transport any more, or will never be one; harmless if that is known."""
        if not self._is_lost:
            self._is_lost = True
            if self.handler is None:
                self._tracker.close(self)

    def lose_soon(self) -> None:
        """Do that in a turn of the loop: the garbage is collected in any thread, and in the middle of anything."""
        # The loop is closed: nobody counts any more.
        with contextlib.suppress(RuntimeError):
            self.server.get_loop().call_soon_threadsafe(self.lose)

    def handle(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run the handler of a stream in a task of its own."""
        self.handler = self.server.get_loop().create_task(coroutine)
        self.handler.add_done_callback(self._on_handled)

    def _wake(self) -> None:
        """Cancel who waits at a safe point without a scope, unless what it waits for has come."""
        if self._idle_task is None or self._is_woken:
            return
        # As anyio does: a task that is cancelled between the event and its turn would lose what it waited for.
        waiter: asyncio.Future[Any] | None = self._idle_task._fut_waiter  # type: ignore[attr-defined]  # noqa: SLF001
        if waiter is not None and waiter.done():
            # It may go on to wait for something else.
            self.server.get_loop().call_soon(self._wake)
            return
        self._is_woken = True
        self._idle_task.cancel()

    def _on_handled(self, handler: asyncio.Task[None]) -> None:
        assert self.transport is not None
        self.handler = None
        error = None if handler.cancelled() else handler.exception()
        if error is not None and not isinstance(error, DrainInterrupt):
            handler.get_loop().call_exception_handler(
                {
                    "message": "Unhandled exception in client_connected_cb",
                    "exception": error,
                    "transport": self.transport,
                }
            )
        # Without an error, a handler may return and leave the connection to others. Not while the drain waits for it.
        if handler.cancelled() or error is not None or self._tracker.draining.is_set():
            self._close()
        if self.is_over():
            self._tracker.close(self)

    def _close(self) -> None:
        # Once only: asyncio's TLS transport, closed twice, forgets its connection and cannot be aborted any more.
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _is_lost_unheard(self) -> bool:
        """Ask the transport: a protocol that was replaced (set_protocol, start_tls) is not told of the loss."""
        if self.transport is None:
            return self._sock is not None and self._sock.fileno() == -1
        if not self.transport.is_closing():
            return False
        # The socket is closed after the last byte, under a TLS transport too, which then has none any more; nor has a
        # transport of uvloop whose socket nobody had asked for before.
        try:
            sock = self.transport.get_extra_info("socket")
        except AttributeError:
            # The application has closed asyncio's TLS transport twice. That one's protocol hears of the loss.
            return False
        return sock is None or bool(sock.fileno() == -1)


class _TrackedProtocol(asyncio.BaseProtocol):
    """The protocol, as its transport sees it: the beginning and the end of the connection pass through here.

    A class of the application's need not be changed for that, whatever it is made of, and data goes to its own bound
    methods. ``transport.set_protocol`` takes this out of the way.
    """

    __slots__ = ("_connection", "_unread", "protocol")

    protocol: Any
    _connection: ServerConnection
    # What the predecessor had received and not dealt with.
    _unread: bytes

    def connection_made(self, transport: Any) -> None:
        self._connection.transport = transport
        # In a copy, because the connections of a server of uvloop share one context.
        contextvars.copy_context().run(self._connect, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self.protocol.connection_lost(exc)
        finally:
            self._connection.lose()

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()

    def eof_received(self) -> bool | None:
        self._deliver()
        connection = self._connection
        connection.is_at_eof = True
        is_kept: bool | None = self.protocol.eof_received()
        if connection.server.on_hang_up is not None:
            connection.server.on_hang_up(connection)
        return is_kept

    def __del__(self) -> None:
        # A TLS handshake that fails reaches no protocol (DESIGN.md, trap 20), nor does a connection that ends before
        # it is attached: the loop just lets go of it. Before Python 3.13 asyncio does so only when the garbage is
        # collected, and the socket tells it earlier.
        if self._connection.transport is None:
            self._connection.lose_soon()

    def _connect(self, transport: Any) -> None:
        current_connection.set(self._connection)
        self.protocol.connection_made(transport)
        if self._unread:
            # Not now: uvloop begins to read when this has returned, also where the protocol has said that it has more
            # than enough.
            self._connection.server.get_loop().call_soon(self._deliver)

    @property
    def is_owing(self) -> bool:
        """Whether the protocol has not got yet what the predecessor had received."""
        return bool(self._unread)

    def _deliver(self) -> None:
        """Give the protocol what the predecessor had received: before anything that is read here."""
        if not self._unread:
            return
        data, self._unread = self._unread, b""
        self._open()
        transport: Any = self._connection.transport
        if transport.is_closing():
            return
        # Both loops remember the methods of a protocol; and the application may have set another one.
        if transport.get_protocol() is self:
            transport.set_protocol(self)
        try:
            self._feed(data)
        except BaseException:
            # As where data that was just read is too much for a protocol.
            transport.abort()
            raise

    @abc.abstractmethod
    def _open(self) -> None:
        """Let what is read here go to the protocol's own methods."""

    @abc.abstractmethod
    def _feed(self, data: bytes) -> None: ...


class _StreamDoorway(_TrackedProtocol, asyncio.Protocol):
    __slots__ = ("data_received",)

    def __init__(self, connection: ServerConnection, protocol: asyncio.Protocol, unread: bytes = b"") -> None:
        self._connection = connection
        self._unread = unread
        self.protocol = protocol
        self.data_received = self._receive_first if unread else protocol.data_received  # type: ignore[method-assign]

    def _open(self) -> None:
        self.data_received = self.protocol.data_received  # type: ignore[method-assign]

    def _receive_first(self, data: bytes) -> None:
        self._deliver()
        self.protocol.data_received(data)

    def _feed(self, data: bytes) -> None:
        self.protocol.data_received(data)


class _BufferedDoorway(_TrackedProtocol, asyncio.BufferedProtocol):
    __slots__ = ("buffer_updated", "get_buffer")

    def __init__(self, connection: ServerConnection, protocol: asyncio.BufferedProtocol, unread: bytes = b"") -> None:
        self._connection = connection
        self._unread = unread
        self.protocol = protocol
        self.buffer_updated = protocol.buffer_updated  # type: ignore[method-assign]
        self.get_buffer = self._get_first_buffer if unread else protocol.get_buffer  # type: ignore[method-assign]

    def _open(self) -> None:
        self.get_buffer = self.protocol.get_buffer  # type: ignore[method-assign]

    def _get_first_buffer(self, sizehint: int) -> Any:
        self._deliver()
        return self.protocol.get_buffer(sizehint)

    def _feed(self, data: bytes) -> None:
        while data:
            buffer = memoryview(self.protocol.get_buffer(len(data))).cast("B")
            count = min(len(buffer), len(data))
            if not count:
                raise RuntimeError("get_buffer() returned an empty buffer")
            buffer[:count] = data[:count]
            self.buffer_updated(count)
            data = data[count:]


class _ServerAcceptor(Acceptor, ConnectionResumer):
    """One socket of a server: behind it, while the gate stands open, a server of the loop's own on a duplicate."""

    def __init__(self, server: GatedServer, entry: Entry, tls_options: dict[str, Any]) -> None:
        self.entry = entry
        self.resumer = self
        self.server = server
        self._loop = server.get_loop()
        self._is_asyncio = isinstance(self._loop, asyncio.SelectorEventLoop)
        # Protocols run in the context of whoever asked for the server, also when somebody else opens the gate.
        self._context = contextvars.copy_context()
        # In use as long as there is an inner server; between two of those, kept for the next one.
        self._duplicate: _Duplicate | None = None
        self._inner: asyncio.AbstractServer | None = None
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._is_ended = False
        self._options = tls_options
        if entry.sock.family == socket.AF_UNIX and sys.version_info >= (3, 13):
            # Else its close removes the path (DESIGN.md, trap 4).
            self._options = {**tls_options, "cleanup_socket": False}

    @property
    def is_open(self) -> bool:
        """Whether it accepts."""
        return self._inner is not None

    async def open(self) -> None:
        try:
            await self._loop.create_task(self._open(), context=self._context)
        except BaseException:
            # Cancelled in the turn in which it is done, it would accept, and the gate would not know.
            self.stop()
            raise

    async def pause(self) -> None:
        if self.is_open:
            self.stop()
            await self.wait_stopped()
            # What is attached by now, its protocol knows after another turn.
            await asyncio.sleep(0)

    async def end(self) -> None:
        self.stop()
        self._is_ended = True
        if self._stopped.is_set() and self._duplicate is not None:
            self._duplicate.close()

    def stop(self) -> None:
        """Accept no more, from this moment on; harmless if it did not."""
        if self._inner is not None:
            assert self._duplicate is not None
            inner, self._inner = self._inner, None
            self._stopped.clear()
            self._duplicate.retire()
            self._let_go(inner)

    async def wait_stopped(self) -> None:
        """Wait until everything that was accepted is attached to its protocol."""
        await self._stopped.wait()

    async def _open(self) -> None:
        # The application may have closed the server in the turn before.
        if self._is_ended:
            return
        # Two of the loop's own methods, because each refuses the other one's sockets on one of the loops.
        method = "create_unix_server" if self.entry.sock.family == socket.AF_UNIX else "create_server"
        backlog = ACCEPTS_PER_TURN if self._is_asyncio else self.entry.backlog
        # Nobody else's while the loop makes a server of it.
        duplicate, self._duplicate = self._duplicate or _Duplicate(self.entry.sock), None
        try:
            inner = await original(self._loop, method)(
                functools.partial(self._admit, duplicate.accepted),
                sock=duplicate,
                backlog=backlog,
                start_serving=False,
                **self._options,
            )
        except BaseException:
            duplicate.close()
            raise
        # The application may have closed the server meanwhile, too.
        if self._is_ended:
            inner.close()
            return
        self._duplicate, self._inner = duplicate, inner
        await inner.start_serving()

    def _let_go(self, inner: asyncio.AbstractServer) -> None:
        assert self._duplicate is not None
        if not self._is_asyncio:
            # uvloop attaches in the callback that accepts, and its listeners are no readers.
            self._close(inner)
        elif self._loop.remove_reader(self._duplicate.fileno()):
            # What asyncio accepts it attaches in a task of its own, to which a server that was closed meanwhile means a
            # reset (3.11) or a client that hangs for ever (3.12, 3.13; DESIGN.md, trap 1). All such tasks stand before
            # this callback in the loop's queue.
            self._loop.call_soon(self._close, inner)
        else:
            # It is out of descriptors and waits for a second, to watch the socket again even if that is closed by then
            # (trap 5): ValueError, the descriptor is -1.
            self._loop.call_later(EXHAUSTED_POLL_SECONDS, self._let_go, inner)

    def _close(self, inner: asyncio.AbstractServer) -> None:
        inner.close()
        self._duplicate = None
        if not self._is_ended:
            # The descriptor that has become free this moment: to accept again must not fail for want of one. Only
            # another thread may have been faster; then `open` asks again.
            with contextlib.suppress(OSError):
                self._duplicate = _Duplicate(self.entry.sock)
        self._stopped.set()

    def _admit(self, accepted: deque[socket.socket]) -> asyncio.BaseProtocol:
        """Track a connection, and make its protocol."""
        connection = ServerConnection(self.server, self.entry, accepted.popleft() if accepted else None)
        self.server.plane.tracker.open(connection)
        try:
            return _doorway(connection, self.server.protocol_factory())
        except BaseException:
            connection.lose()
            raise

    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        if self.server.moves is None or self.server.is_secure:
            raise Refused("this server cannot resume connections")
        protocol = self._context.copy().run(self.server.moves.resume, parcel.release)
        return functools.partial(self._resume, protocol, parcel)

    async def _resume(self, protocol: asyncio.BaseProtocol, parcel: TransferRecord, sock: socket.socket) -> None:
        """Attach a connection of the predecessor's to the protocol that goes on with it."""
        connection = ServerConnection(self.server, self.entry, sock)
        connection.since = parcel.since
        self.server.plane.tracker.open(connection)
        doorway = _doorway(connection, protocol, parcel.release.unread)
        attach = self._loop.connect_accepted_socket(lambda: doorway, sock)
        try:
            await self._loop.create_task(attach, context=self._context)
        except BaseException:
            sock.close()
            connection.lose()
            raise


class _Duplicate(socket.socket):
    """A duplicate of a listening socket, for asyncio to accept on; to uvloop it is a descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        # Family, type and protocol come from the kernel, so that asyncio finds TCP and sets TCP_NODELAY on what it
        # accepts (DESIGN.md, trap 19).
        super().__init__(fileno=os.dup(sock.fileno()))
        # What asyncio has accepted and asks a protocol for next, in this order. uvloop keeps its sockets to itself.
        self.accepted: deque[socket.socket] = deque()
        self._is_retired = False
        self._is_exhausted = False

    def retire(self) -> None:
        """Accept nothing any more, also if asyncio comes back to it after a shortage of descriptors."""
        self._is_retired = True

    def accept(self) -> tuple[socket.socket, Any]:
        # Where it is out of descriptors, asyncio logs that and stops to watch for a second; yet in the same turn it
        # asks again, up to its backlog, and would log and wait each time.
        if self._is_retired or self._is_exhausted:
            self._is_exhausted = False
            raise BlockingIOError(errno.EAGAIN, "nothing is accepted now")
        try:
            sock, address = super().accept()
        except OSError as error:
            self._is_exhausted = error.errno in EXHAUSTED
            raise
        self.accepted.append(sock)
        return sock, address

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens, with the backlog that was asked for, and asyncio would set one of its own."""


def _doorway(connection: ServerConnection, protocol: Any, unread: bytes = b"") -> asyncio.BaseProtocol:
    kind = _BufferedDoorway if isinstance(protocol, asyncio.BufferedProtocol) else _StreamDoorway
    return kind(connection, protocol, unread)


def protocol_of(transport: Any) -> Any:
    """Return the protocol that a transport has at this moment, as the application knows it."""
    protocol = transport.get_protocol()
    return protocol.protocol if isinstance(protocol, _TrackedProtocol) else protocol


def original(loop: asyncio.AbstractEventLoop, method: str) -> Callable[..., Any]:
    """Return a loop's own method: of a gated loop the one it covers, which does not lead back here."""
    own: Callable[..., Any] = getattr(loop, f"ungated_{method}", None) or getattr(loop, method)
    return own


def registered(plane: DataPlane, sock: socket.socket) -> Entry | None:
    """Find the entry of a socket, or of a duplicate of it: servers that are given a descriptor make one."""
    wanted = os.fstat(sock.fileno())
    for entry in plane.registry.entries:
        if os.path.samestat(os.fstat(entry.sock.fileno()), wanted):
            return entry
    return None


def withdraw(plane: DataPlane, acceptor: Acceptor) -> None:
    """Close the socket of an acceptor that has stopped, because the application wants no more of it."""
    # Once the generation is leaving, sockets are the supervisor's: a path may have to be removed.
    is_leaving = plane.gate.state is GateState.ENDED or plane.tracker.draining.is_set()
    # A transport's close, and a server's, cannot wait. This does not: there is nothing to pause.
    with contextlib.suppress(StopIteration):
        plane.gate.remove(acceptor).send(None)
    if not is_leaving:
        plane.registry.release(acceptor.entry)


def numeric(address: tuple[Any, ...]) -> tuple[str, int]:
    """Return host and port of a resolved address, with the scope of a link-local one."""
    host, port, *more = address
    # IPv6: flow information, and the number of the interface or 0.
    return (f"{host}%{more[1]}" if more and more[1] else host), port


def _register(plane: DataPlane, sock: socket.socket, name: str | None, until: Until | str) -> Entry:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A Stream Socket was expected, got {sock!r}")
    return registered(plane, sock) or plane.registry.adopt(sock, name=name or default_name(sock), until=until)


def default_name(sock: socket.socket) -> str:
    """Name a socket by what it is bound to."""
    kind = "udp" if sock.type == socket.SOCK_DGRAM else "tcp"
    match sock.getsockname():
        case [host, port, *_]:
            return f"{kind}:[{host}]:{port}" if ":" in host else f"{kind}:{host}:{port}"
        case bytes(abstract):
            return f"unix:@{os.fsdecode(abstract[1:])}"
        case path:
            return f"unix:{path}"


async def _resolve(
    loop: asyncio.AbstractEventLoop, host: str | Iterable[str] | None, port: int | str | None, family: int, flags: int
) -> list[tuple[str, int]]:
    """Return numeric addresses, each once."""
    hosts = [host or None] if host is None or isinstance(host, str) else list(host)
    found = await asyncio.gather(
        *(loop.getaddrinfo(each, port, family=family, type=socket.SOCK_STREAM, flags=flags) for each in hosts)
    )
    return list(dict.fromkeys(numeric(address) for infos in found for *_, address in infos))


def _listen_tcp(
    plane: DataPlane,
    addresses: list[tuple[str, int]],
    name: str | None,
    until: Until | str,
    backlog: int,
    *,
    reuse_port: bool,
) -> list[Entry]:
    """Register a socket for each address, or for none."""
    entries: list[Entry] = []
    missing: OSError | None = None
    try:
        for host, port in addresses:
            try:
                entry = plane.registry.obtain(
                    Internet(host, port, reuse_port=reuse_port), name=name, until=until, backlog=backlog
                )
                entries.append(entry)
            except OSError as error:
                # A name may stand for an address, or a family, that this machine does not have: asyncio passes over
                # those too.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if not entries:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no address was found to bind to")
    except BaseException:
        for entry in entries:
            plane.registry.release(entry)
        raise
    return entries


async def _serve(server: GatedServer, *, start_serving: bool) -> GatedServer:
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:
            server.close()
            raise
    return server


def _stream_factory(client_connected_cb: ClientConnected, limit: int) -> ProtocolFactory:
    loop = asyncio.get_running_loop()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = current_connection.get()
        assert isinstance(connection, ServerConnection)
        handling = client_connected_cb(reader, writer)
        if asyncio.iscoroutine(handling):
            connection.handle(handling)

    def make() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=limit, loop=loop), connected, loop=loop)

    return make


def _moves_of(resume: Resume | TransferStrategy | None) -> TransferStrategy | None:
    return resume if resume is None or isinstance(resume, TransferStrategy) else _ProtocolTransfer(resume)


class _ProtocolTransfer(TransferStrategy):
    """Protocols of the application's own: :class:`Transferable`."""

    def __init__(self, resume: Resume) -> None:
        self._resume = resume

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        return protocol.release_connection() if isinstance(protocol, Transferable) else None

    def keep(self, connection: ServerConnection, protocol: Any) -> None:
        protocol.keep_connection()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        return self._resume(release.state)


class _StreamTransfer(TransferStrategy):
    """Streams, whose handlers offer them: ``Ecdysis.transfer``."""

    def __init__(self, resume: ResumeStream, limit: int) -> None:
        self._resume = resume
        self._limit = limit

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if connection.offer is None or connection.offer.verdict is not Verdict.OPEN:
            if connection.handler is not None:
                connection.invite()
            return None
        # Not after start_tls, or set_protocol.
        reader: Any = getattr(protocol, "_stream_reader", None)
        if reader is None or reader.exception() is not None:
            return None
        return Release(connection.offer.state, bytes(reader._buffer))  # noqa: SLF001

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        def resume(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None] | None:
            return self._resume(reader, writer, release.state)

        return _stream_factory(resume, self._limit)()


def _tls_options(
    context: tls.SSLContext | None, handshake_timeout: float | None, shutdown_timeout: float | None
) -> dict[str, Any]:
    """Check now what the loop would refuse at the commit."""
    if context is None:
        if handshake_timeout is not None:
            raise ValueError("ssl_handshake_timeout is only meaningful with ssl")
        if shutdown_timeout is not None:
            raise ValueError("ssl_shutdown_timeout is only meaningful with ssl")
        return {}
    if not isinstance(context, tls.SSLContext):
        raise TypeError("ssl argument must be an SSLContext or None")
    return {"ssl": context, "ssl_handshake_timeout": handshake_timeout, "ssl_shutdown_timeout": shutdown_timeout}
