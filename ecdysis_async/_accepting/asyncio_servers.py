"""Servers of asyncio and uvloop that accept between commit and pause only: what the application, and a loop, call.

Each function takes what its namesake of asyncio takes, on sockets that are inherited or created. When to accept is
decided at the gate; ``asyncio_acceptors.py`` accepts, and ``asyncio_connections.py`` tracks what was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl as tls
from asyncio.trsock import TransportSocket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from ecdysis_async._connections.connection import Verdict, current_connection
from ecdysis_async._connections.parcel import Release, Transferable
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import BACKLOG, Entry, Until

from .asyncio_acceptors import ServerAcceptor
from .asyncio_connections import ProtocolFactory, ServerConnection, ServerHooks, TransferStrategy
from .data_plane import DataPlane

__all__ = [
    "GatedServer",
    "create_server",
    "create_unix_server",
    "default_name",
    "note_no_servers",
    "noting_servers",
    "numeric",
    "start_server",
    "start_unix_server",
]

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
Resume = Callable[[Any], asyncio.BaseProtocol]
ResumeStream = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Any], Awaitable[None] | None]

# What `asyncio.start_server` lets a StreamReader hold, in bytes.
STREAM_LIMIT = 2**16

# Where the servers are noted that the running task makes, and the tasks that it starts.
_noted: ContextVar[list[GatedServer] | None] = ContextVar("ecdysis_noted_servers", default=None)


@contextlib.contextmanager
def noting_servers() -> Iterator[list[GatedServer]]:
    """Yield a list of the servers that are made within, by the running task and by the tasks that it starts.

    An adapter finds by it the servers that another library has asked the loop for, among those of a whole program.
    """
    made: list[GatedServer] = []
    token = _noted.set(made)
    try:
        yield made
    finally:
        _noted.reset(token)


def note_no_servers() -> None:
    """Let servers that the running task makes from now on be noted nowhere: they are the application's own."""
    _noted.set(None)


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
        name: the name that the sockets are inherited by.
        until: whether it ends with the drain of a stop, or serves to the exit.
        family: of the addresses that names are resolved to.
        flags: of the resolving of names.
        sock: a socket to use instead of host and port; it is registered, unless it is already. A socket whose port the
            kernel has chosen needs a name to be inherited by.
        backlog: how many connections may wait to be accepted.
        ssl: serve TLS.
        reuse_address: ignored: what a successor shall inherit always has SO_REUSEADDR.
        reuse_port: allow several listeners on one address.
        keep_alive: set SO_KEEPALIVE on the accepted sockets.
        ssl_handshake_timeout: seconds.
        ssl_shutdown_timeout: seconds.
        start_serving: False leaves the beginning to ``start_serving`` of the server, and to the gate.
        resume: called with the state that a :class:`Transferable` protocol of the predecessor has released; returns the
            protocol that goes on with its connection.

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
    server = GatedServer(plane, protocol_factory, entries, sock, tls_options, _strategy_of(resume))
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
    server = GatedServer(plane, protocol_factory, [entry], sock, tls_options, _strategy_of(resume))
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
    strategy = _StreamTransfer(resume, limit) if resume is not None else None
    return await create_server(
        plane, _stream_factory(client_connected_cb, limit), host, port, resume=strategy, **options
    )


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
    strategy = _StreamTransfer(resume, limit) if resume is not None else None
    return await create_unix_server(
        plane, _stream_factory(client_connected_cb, limit), path, resume=strategy, **options
    )


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
        transfer: TransferStrategy | None = None,
    ) -> None:
        self._plane = plane
        self._hooks = ServerHooks(
            asyncio.get_running_loop(), plane.tracker, protocol_factory, bool(tls_options), transfer
        )
        self._acceptors = [ServerAcceptor(self._hooks, entry, tls_options) for entry in entries]
        # The socket that the application passed. If it is a duplicate of the registered one, the server closes it, as
        # asyncio does.
        self._given = given
        self._is_started = False
        self._is_closed = False
        self._closed = asyncio.Event()
        self._forever: asyncio.Future[None] | None = None
        if (noted := _noted.get()) is not None:
            noted.append(self)

    def __repr__(self) -> str:
        names = ", ".join(acceptor.entry.name for acceptor in self._acceptors)
        return f"<{type(self).__name__} {names}>"

    @property
    def protocol_factory(self) -> ProtocolFactory:
        """What makes a protocol for each connection."""
        return self._hooks.protocol_factory

    def adapt(
        self,
        *,
        protocol_factory: ProtocolFactory | None = None,
        transfer: TransferStrategy | None = None,
        say_goodbye: Callable[[Any], bool] | None = None,
        on_hang_up: Callable[[ServerConnection], None] | None = None,
        keeps_context: bool | None = None,
    ) -> None:
        """Let an adapter change how connections are made, moved and ended; see :class:`ServerHooks`."""
        self._hooks.adapt(
            protocol_factory=protocol_factory,
            transfer=transfer,
            say_goodbye=say_goodbye,
            on_hang_up=on_hang_up,
            keeps_context=keeps_context,
        )

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The registered sockets; empty once the server is closed."""
        if self._is_closed:
            return ()
        return tuple(TransportSocket(acceptor.entry.sock) for acceptor in self._acceptors)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._hooks.loop

    def is_serving(self) -> bool:
        """Say whether it accepts at this moment."""
        return any(acceptor.is_open for acceptor in self._acceptors)

    async def start_serving(self) -> None:
        """Accept as soon as the gate stands open; harmless if it was called before."""
        if not self._is_started:
            self._is_started = True
            for acceptor in self._acceptors:
                # The server may be closed while the acceptor before is opened.
                if not self._is_closed:
                    await self._plane.gate.add(acceptor)

    async def serve_forever(self) -> None:
        """Wait until the server is closed. Cancellation closes it."""
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._is_closed:
            raise RuntimeError(f"server {self!r} is closed")
        await self.start_serving()
        self._forever = self._hooks.loop.create_future()
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
            self._plane.withdraw(acceptor)
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
            and connection.hooks is self._hooks
            and connection.transport is not None
        ]


def numeric(address: tuple[Any, ...]) -> tuple[str, int]:
    """Return host and port of a resolved address, with the scope of a link-local one."""
    host, port, *more = address
    # IPv6: flow information, and the number of the interface or 0.
    return (f"{host}%{more[1]}" if more and more[1] else host), port


def _register(plane: DataPlane, sock: socket.socket, name: str | None, until: Until | str) -> Entry:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"A Stream Socket was expected, got {sock!r}")
    return plane.find_entry(sock) or plane.registry.adopt(sock, name=name or default_name(sock), until=until)


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
    """Resolve names, and return each numeric address once."""
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
                # A name may stand for an address, or a family, that this machine does not have. asyncio passes over
                # such addresses, too.
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


def _strategy_of(resume: Resume | TransferStrategy | None) -> TransferStrategy | None:
    return resume if resume is None or isinstance(resume, TransferStrategy) else _ProtocolTransfer(resume)


class _ProtocolTransfer(TransferStrategy):
    """Moves protocols of the application's own, which are :class:`Transferable`."""

    def __init__(self, resume: Resume) -> None:
        self._resume = resume

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        return protocol.release_connection() if isinstance(protocol, Transferable) else None

    def keep(self, connection: ServerConnection, protocol: Any) -> None:
        protocol.keep_connection()

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        return self._resume(release.state)


class _StreamTransfer(TransferStrategy):
    """Moves streams, whose handlers offer them by ``Ecdysis.transfer``."""

    def __init__(self, resume: ResumeStream, limit: int) -> None:
        self._resume = resume
        self._limit = limit

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        if connection.offer is None or connection.offer.verdict is not Verdict.OPEN:
            if connection.handler is not None:
                connection.invite()
            return None
        # Absent after start_tls or set_protocol.
        reader: Any = getattr(protocol, "_stream_reader", None)  # asyncio's
        if reader is None or reader.exception() is not None:
            return None
        return Release(connection.offer.state, bytes(reader._buffer))  # noqa: SLF001 - asyncio's

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        def resume(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None] | None:
            return self._resume(reader, writer, release.state)

        return _stream_factory(resume, self._limit)()


def _tls_options(
    context: tls.SSLContext | None, handshake_timeout: float | None, shutdown_timeout: float | None
) -> dict[str, Any]:
    """Return the TLS arguments for the loop; check now what the loop would refuse at the commit."""
    if context is None:
        if handshake_timeout is not None:
            raise ValueError("ssl_handshake_timeout is only meaningful with ssl")
        if shutdown_timeout is not None:
            raise ValueError("ssl_shutdown_timeout is only meaningful with ssl")
        return {}
    if not isinstance(context, tls.SSLContext):
        raise TypeError("ssl argument must be an SSLContext or None")
    return {"ssl": context, "ssl_handshake_timeout": handshake_timeout, "ssl_shutdown_timeout": shutdown_timeout}
