"""The sockets and servers that a service asks its ``Ecdysis`` for: what it calls before it is ready.

Each is the predecessor's where it has one, and is created where it has not; nothing accepts before the commit. Here is
what stands before the registry of the sockets and the data planes of the loops.
"""

from __future__ import annotations

import abc
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import BACKLOG, Kind, Until
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.settings import StrPath

if TYPE_CHECKING:
    import asyncio

__all__ = ["Listeners"]


class Listeners(abc.ABC):
    """What an ``Ecdysis`` offers to an application that wants to serve."""

    @property
    @abc.abstractmethod
    def _plane(self) -> DataPlane:
        """What its sockets are registered with.

        Raises:
            RuntimeError: there is none yet: a socket asked for before the block would be created, and never inherited.
        """

    def _announcement(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        """Return what sees to it that readiness is announced while the running task serves; None: it was announced."""
        return None

    @property
    def _sockets(self) -> Registry:
        return self._plane.registry

    # Sockets

    def listen_tcp(
        self,
        host: str | None,
        port: int,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        reuse_port: bool = False,
    ) -> socket.socket:
        """Return a TCP socket for connections: the predecessor's, or a new one that will listen at commit.

        Args:
            host: an address; names are not looked up here.
            port: 0 for one that the kernel chooses; a successor inherits it all the same.
            name: what it is inherited by; the address that was asked for, where it is None.
            until: ``"exit"`` for a listener that serves to the end of a stop (health, metrics).
            backlog: how many connections may wait in the kernel's queue.
            reuse_port: set SO_REUSEPORT.

        Raises:
            ValueError: the host is no address. OSError: the address cannot be bound.
        """
        entry = self._sockets.obtain(
            Internet(host, port, reuse_port=reuse_port), name=name, until=until, backlog=backlog
        )
        return entry.sock

    def listen_unix(
        self,
        path: StrPath,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        mode: int | None = None,
    ) -> socket.socket:
        """Return a Unix stream socket for connections, as :meth:`listen_tcp`; ``@name`` is an abstract address."""
        return self._sockets.obtain(Unix(os.fspath(path), mode=mode), name=name, until=until, backlog=backlog).sock

    def listen_fd(self, name: str | int, *, until: Until | str = Until.DRAIN) -> socket.socket:
        """Return a socket that systemd has passed (socket activation), wherever it listens.

        Where the address, or the name, is known as well, ``listen_tcp`` and all others find it too, and need not care
        whether systemd passed it.

        Args:
            name: FileDescriptorName= of the socket unit, or the number of the descriptor, from 3 on. Where several have
                one name, each call returns the next one of them.
            until: as for :meth:`listen_tcp`.

        Raises:
            LookupError: there is none, or it is claimed already.
        """
        return self._sockets.claim(name, until=until).sock

    def listen_seqpacket(
        self,
        path: StrPath,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        backlog: int = BACKLOG,
        mode: int | None = None,
    ) -> socket.socket:
        """Return a Unix socket for connections that keep the boundaries of messages, as :meth:`listen_unix`."""
        return self._sockets.obtain(
            Unix(os.fspath(path), Kind.SEQPACKET, mode=mode), name=name, until=until, backlog=backlog
        ).sock

    def bind_udp(
        self,
        host: str | None,
        port: int,
        *,
        name: str | None = None,
        until: Until | str = Until.DRAIN,
        reuse_port: bool = False,
    ) -> socket.socket:
        """Return a UDP socket, as :meth:`listen_tcp`; it is read between commit and pause only."""
        return self._sockets.obtain(
            Internet(host, port, is_datagram=True, reuse_port=reuse_port), name=name, until=until
        ).sock

    def bind_unix_datagram(
        self, path: StrPath, *, name: str | None = None, until: Until | str = Until.DRAIN, mode: int | None = None
    ) -> socket.socket:
        """Return a Unix datagram socket, as :meth:`listen_unix`."""
        return self._sockets.obtain(Unix(os.fspath(path), Kind.UNIX_DATAGRAM, mode=mode), name=name, until=until).sock

    def adopt(
        self,
        sock: socket.socket | Callable[[], socket.socket],
        *,
        name: str,
        until: Until | str = Until.DRAIN,
    ) -> socket.socket:
        """Register a socket that the application makes; return the one to use.

        That is the predecessor's where it has one of this name.

        Args:
            sock: a function that makes the socket, and is called only where the predecessor has none of this name. An
                address can be bound once: where it is fixed, a successor that binds it before it asks fails. Or a
                socket, which is closed where the predecessor has one of this name.
            name: what it is inherited by.
            until: as for :meth:`listen_tcp`.

        Raises:
            ValueError: the socket is registered already.
            OSError, or anything else: what the function raises.
        """
        return self._sockets.adopt(sock, name=name, until=until).sock

    # asyncio and uvloop

    async def start_server(
        self,
        client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
        host: str | Sequence[str] | None = None,
        port: int | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Start a streams server, as :func:`asyncio.start_server`; it accepts from the commit on.

        ``start_serving`` and ``serve_forever`` of the server do not pass the gate.

        Args:
            client_connected_cb: called with a reader and a writer for each connection.
            host: an address, a name, several of them, or None for all.
            port: a port, or 0 for one that the kernel chooses.
            options: those of :func:`asyncio.start_server`, ``ssl`` among them; ``name`` and ``until`` as for
                :meth:`listen_tcp`; and ``resume``, called in a successor as ``client_connected_cb`` is, with the state
                that a handler gave to :meth:`transfer` as a third argument.

        Raises:
            OSError: an address cannot be bound. RuntimeError: the loop is not asyncio's; use :meth:`serve` there.
        """
        _require_asyncio()
        from ecdysis_async._accepting.asyncio_servers import start_server

        return await start_server(self._plane, client_connected_cb, host, port, **options)

    async def start_unix_server(
        self,
        client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
        path: StrPath | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Start a streams server on a Unix socket, as :func:`asyncio.start_unix_server`. See :meth:`start_server`."""
        _require_asyncio()
        from ecdysis_async._accepting.asyncio_servers import start_unix_server

        return await start_unix_server(self._plane, client_connected_cb, path, **options)

    async def create_server(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: str | Sequence[str] | None = None,
        port: int | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Start a server of protocols, as asyncio's ``loop.create_server``. See :meth:`start_server`.

        Connections move to a successor where the protocols are ``ecdysis_async.transfer.Transferable``, and ``resume``
        makes one of the state that another has released.
        """
        _require_asyncio()
        from ecdysis_async._accepting.asyncio_servers import create_server

        return await create_server(self._plane, protocol_factory, host, port, **options)

    async def create_unix_server(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], path: StrPath | None = None, **options: Any
    ) -> asyncio.AbstractServer:
        """Start a server of protocols on a Unix socket, as ``loop.create_unix_server``. See :meth:`start_server`."""
        _require_asyncio()
        from ecdysis_async._accepting.asyncio_servers import create_unix_server

        return await create_unix_server(self._plane, protocol_factory, path, **options)

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], asyncio.DatagramProtocol],
        local_addr: tuple[str, int] | str | None = None,
        **options: Any,
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        """Open a datagram endpoint, as ``loop.create_datagram_endpoint``; it reads from the commit to the pause.

        What arrives in between waits in the kernel's queue for the successor. Sending is possible all the time.
        """
        _require_asyncio()
        from ecdysis_async._accepting.asyncio_datagrams import create_datagram_endpoint

        return await create_datagram_endpoint(self._plane, protocol_factory, local_addr, **options)

    # anyio and trio

    async def serve(
        self,
        handler: Callable[[Any], Awaitable[object]],
        *listeners: Any,
        resume: Callable[[Any, Any], Awaitable[object]] | None = None,
    ) -> None:
        """Accept connections by anyio, or by trio, and handle each in a task of its own; return when accepting ends.

        Each handler has a cancel scope under the drain's deadline, and runs to its end after this has returned.

        Awaited in the task that has entered the block, it announces readiness by itself, because that task cannot do so
        any more: after a turn of the loop, and with the last of the servers that are being started elsewhere. In
        another task it leaves that to the program (:meth:`ready`, :meth:`serve_forever`), and warns after a second.

        Args:
            handler: called with the stream of each connection.
            listeners: sockets of this ``Ecdysis`` (their streams are anyio's), or listeners made of them.
            resume: called in a successor with a stream that has moved, and the state that its handler gave to
                :meth:`transfer`.

        Raises:
            TypeError: something that is not a listener of ours.
            OSError, TimeoutError: readiness cannot be announced; see :meth:`serve_forever`.

        Cancelling it stops accepting; handlers that have begun go on.
        """
        from ecdysis_async._accepting.anyio_streams import serve

        announce = self._announcement()
        if announce is None:
            await serve(handler, *listeners, resume=resume)
            return
        try:
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(announce)
                await serve(handler, *listeners, resume=resume)
                task_group.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # What one of the two has raised, without the group around it.
            raise group.exceptions[0] if len(group.exceptions) == 1 else group from None


def _require_asyncio() -> None:
    """Check that asyncio or uvloop runs, whose data plane programs on trio never load.

    Raises:
        RuntimeError: it does not.
    """
    try:
        sys.modules["asyncio"].get_running_loop()
    except (KeyError, RuntimeError):
        raise RuntimeError(
            "this is for asyncio and uvloop: on trio pass a socket of listen_tcp() and the like to serve()"
        ) from None
