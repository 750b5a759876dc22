"""One socket of an asyncio or uvloop server: accepted on while the gate stands open, and resumed on.

The accepting is left to the loop's own server, on a duplicate of the registered socket; a pause closes that server. An
accept loop of our own costs uvloop half as much CPU again per connection. When to accept is decided at the gate.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import functools
import os
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from ecdysis_async._connections.parcel import ConnectionResumer, Refused, TransferRecord
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.descriptors import EXHAUSTED

from .asyncio_connections import ServerConnection, ServerHooks, track_protocol
from .gate import Acceptor

__all__ = ["ServerAcceptor", "ungated"]

# How many connections asyncio accepts in one turn of its loop: the number it takes by default. asyncio takes the length
# of the kernel's queue from the same argument; that many accepts in one turn would be a stall.
ACCEPTS_PER_TURN = 100

# How often it is looked whether asyncio watches a socket again that it has left alone for want of descriptors, seconds.
EXHAUSTED_POLL_SECONDS = 0.02


class ServerAcceptor(Acceptor, ConnectionResumer):
    """Accepts from one socket, while the gate stands open, by a server of the loop's own on a duplicate of it."""

    def __init__(self, hooks: ServerHooks, entry: Entry, tls_options: dict[str, Any]) -> None:
        self.entry = entry
        self.resumer = self
        self.hooks = hooks
        self._loop = hooks.loop
        self._is_asyncio = isinstance(self._loop, asyncio.SelectorEventLoop)
        # Protocols run in the context of the code that asked for the server, whichever task opens the gate.
        self._context = contextvars.copy_context()
        # In use as long as there is an inner server; between two inner servers, kept for the next one.
        self._duplicate: _DuplicateListener | None = None
        self._inner: asyncio.AbstractServer | None = None
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._is_ended = False
        self._options = tls_options
        if entry.sock.family == socket.AF_UNIX and sys.version_info >= (3, 13):
            # Otherwise its close removes the path, which the successor goes on to listen on.
            self._options = {**tls_options, "cleanup_socket": False}

    @property
    def is_open(self) -> bool:
        """Whether it accepts."""
        return self._inner is not None

    async def open(self) -> None:
        try:
            await self._loop.create_task(self._open(), context=self._context)
        except BaseException:
            # Cancelled in the turn in which it is done, it would accept without the gate's knowledge.
            self.stop()
            raise

    async def pause(self) -> None:
        if self.is_open:
            self.stop()
            await self.wait_stopped()
            # Another turn later, the protocols of all that is attached know of it.
            await asyncio.sleep(0)

    async def end(self) -> None:
        self.stop()
        self._is_ended = True
        if self._stopped.is_set() and self._duplicate is not None:
            self._duplicate.close()

    def stop(self) -> None:
        """Accept no more, from this moment on; harmless if it did not accept."""
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
        # Taken out of the attribute: while the loop makes a server of it, this coroutine owns it.
        duplicate, self._duplicate = self._duplicate or _DuplicateListener(self.entry.sock), None
        try:
            inner = await ungated(self._loop, method)(
                functools.partial(self._admit, duplicate.accepted),
                sock=duplicate,
                backlog=backlog,
                start_serving=False,
                **self._options,
            )
        except BaseException:
            duplicate.close()
            raise
        # The application may have closed the server meanwhile.
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
            # asyncio attaches each accepted connection in a task of its own. If the server is closed before that task
            # runs, the client is reset (3.11) or hangs for ever (3.12, 3.13). All such tasks stand before this callback
            # in the loop's queue.
            self._loop.call_soon(self._close, inner)
        else:
            # asyncio is out of descriptors, and watches the socket again after a second. If the socket were closed by
            # then, that would fail with a ValueError, because its descriptor is -1.
            self._loop.call_later(EXHAUSTED_POLL_SECONDS, self._let_go, inner)

    def _close(self, inner: asyncio.AbstractServer) -> None:
        inner.close()
        self._duplicate = None
        if not self._is_ended:
            # Takes the descriptor that has become free this moment: accepting again must not fail for want of one. If
            # another thread was faster, `open` tries again.
            with contextlib.suppress(OSError):
                self._duplicate = _DuplicateListener(self.entry.sock)
        self._stopped.set()

    def _admit(self, accepted: deque[socket.socket]) -> asyncio.BaseProtocol:
        """Track a connection, and make its protocol."""
        connection = ServerConnection(self.hooks, self.entry, accepted.popleft() if accepted else None)
        self.hooks.tracker.open(connection)
        try:
            return track_protocol(connection, self.hooks.protocol_factory())
        except BaseException:
            connection.lose()
            raise

    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        strategy = self.hooks.strategy
        if strategy is None:
            raise Refused("this server cannot resume connections")
        protocol = self._context.copy().run(strategy.resume, parcel.release)
        return functools.partial(self._resume, protocol, parcel)

    async def _resume(self, protocol: asyncio.BaseProtocol, parcel: TransferRecord, sock: socket.socket) -> None:
        """Attach a connection of the predecessor's to the protocol that goes on with it."""
        connection = ServerConnection(self.hooks, self.entry, sock)
        connection.since = parcel.since
        self.hooks.tracker.open(connection)
        tracked = self._context.run(track_protocol, connection, protocol, parcel.release.unread)
        attach = self._loop.connect_accepted_socket(lambda: tracked, sock)
        try:
            await self._loop.create_task(attach, context=self._context)
        except BaseException:
            sock.close()
            connection.lose()
            raise


class _DuplicateListener(socket.socket):
    """A duplicate of a listening socket, for asyncio to accept on; uvloop takes only its descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        # Family, type and protocol come from the kernel, so that asyncio finds TCP and sets TCP_NODELAY on what it
        # accepts. Without it, each keep-alive request would wait for 40 ms.
        super().__init__(fileno=os.dup(sock.fileno()))
        # The sockets that asyncio has accepted and asks a protocol for next, in this order. uvloop shows none.
        self.accepted: deque[socket.socket] = deque()
        self._is_retired = False
        self._is_exhausted = False

    def retire(self) -> None:
        """Accept nothing any more, even if asyncio comes back to it after a shortage of descriptors."""
        self._is_retired = True

    def accept(self) -> tuple[socket.socket, Any]:
        # Out of descriptors, asyncio logs that and stops watching for a second. Yet it asks again in the same turn, up
        # to its backlog, and would log and wait each time.
        if self._is_retired or self._is_exhausted:
            self._is_exhausted = False
            raise BlockingIOError(errno.EAGAIN, "nothing is accepted now")
        try:
            sock, address = super().accept()
        except OSError as error:
            self._is_exhausted = error.errno in EXHAUSTED
            if error.errno == errno.EINVAL:
                # Another worker has shut the socket down, since their anchor is dead. This one will hear of it next.
                raise BlockingIOError(errno.EAGAIN, "nobody can queue here any more") from error
            raise
        self.accepted.append(sock)
        return sock, address

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens with the backlog that was asked for, and asyncio would set its own."""


def ungated(loop: asyncio.AbstractEventLoop, method: str) -> Callable[..., Any]:
    """Return a loop's own method; of a gated loop, the method behind the gated one, which does not lead back here."""
    own: Callable[..., Any] = getattr(loop, f"ungated_{method}", None) or getattr(loop, method)
    return own
