"""The one accept loop of anyio and trio: gated, cancellable at every moment, and without a loss.

A :class:`GatedSocket` waits until its socket is readable, and then takes from it without waiting: only the wait can be
cancelled, and there is no await between taking a connection and tracking it. What a connection is wrapped in, and
which task serves it, is the business of the modules above.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import sys
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from ecdysis_async._connections.connection import Connection, Verdict, current_connection
from ecdysis_async._connections.parcel import ConnectionResumer, Refused, Release, TransferRecord
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.entry import Entry, Kind, Until
from ecdysis_async._system.descriptors import EXHAUSTED
from ecdysis_async.errors import DrainInterrupt, EcdysisError

from .data_plane import DataPlane, active
from .gate import Acceptor, GateState

__all__ = [
    "AcceptedConnection",
    "AcceptingEnded",
    "GatedSocket",
    "SocketAcceptor",
    "StreamResumer",
    "accept_connection",
    "confining_cancellation",
    "handling",
    "largest_datagram",
    "require_streams",
]

T = TypeVar("T")

logger = logging.getLogger("ecdysis_async")

# The connection that was to be accepted is broken; the next one may be fine. accept(2), "Error handling": Linux passes
# pending network errors on, and they are to be treated like EAGAIN.
BROKEN_CONNECTION = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,  # the firewall said no
        errno.EPROTO,
        errno.ETIMEDOUT,
    }
)

# Nothing tells when there is a descriptor, or memory, for one more connection again: how long it is waited, seconds.
EXHAUSTED_PAUSE_SECONDS = 0.1

# The largest datagram, in bytes: lengths in IP have 16 bits; for Unix sockets asyncio's limit.
MAX_DATAGRAM = 2**16
MAX_UNIX_DATAGRAM = 2**18


class AcceptingEnded(EcdysisError, anyio.ClosedResourceError):
    """Nothing more will come from this socket in this generation; what waits in its queue is the successor's."""


class AcceptedConnection(Connection):
    """A connection that was accepted from a socket, and the scope of the handler that serves it."""

    # Weak, because a stream that its owner drops without closing it shall end as it would without us.
    __slots__ = ("_name", "_sock", "is_resumable", "scope", "stream")

    def __init__(self, sock: socket.socket, until: Until, name: str = "", *, is_resumable: bool = False) -> None:
        super().__init__(until)
        self._sock = weakref.ref(sock)
        self._name = name
        self.scope: anyio.CancelScope | None = None
        # What the handler was given, and whether a successor has somebody to go on with it.
        self.stream: Any = None
        self.is_resumable = is_resumable

    def cancel(self) -> None:
        """Cancel the handler; where it is none that we started, its stream has to end instead."""
        if self.scope is None:
            self.abort()
        else:
            self.scope.cancel()

    def abort(self) -> None:
        """Make every read and write on the stream end; its owner closes it. What was sent before still arrives."""
        sock = self._sock()
        if sock is not None:
            # ENOTCONN: the peer has reset it already. EBADF: it is closed already.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def movable(self) -> bool:
        return self.is_resumable and self.scope is not None and self.stream is not None

    def fileno(self) -> int:
        sock = self._sock()
        return -1 if sock is None else sock.fileno()

    def pack(self) -> TransferRecord | None:
        if not self.movable or self.is_over():
            return None
        if self.offer is None or self.offer.verdict is not Verdict.OPEN:
            # Only the handler knows when nothing is half read.
            self.invite()
            return None
        unread = b""
        # anyio's on asyncio; all other streams read nothing that was not asked for.
        transport = getattr(self.stream, "_transport", None)
        if transport is not None:
            if transport.is_closing() or transport.get_write_buffer_size():
                return None
            # Until the handler receives again.
            transport.pause_reading()
            unread = b"".join(self.stream._protocol.read_queue)  # noqa: SLF001 - there is no other way to it
        self.offer.verdict = Verdict.SENT
        return TransferRecord(self._name, self.since, Release(self.offer.state, unread))

    def keep(self) -> None:
        if self.offer is not None:
            self.offer.decide(Verdict.STAYS)

    def let_go(self) -> None:
        transport, sock = getattr(self.stream, "_transport", None), self._sock()
        # Without a word to the peer: anyio's aclose() would tell it the end (shutdown), in all copies.
        if transport is not None:
            transport.abort()
        elif sock is not None and sock.fileno() != -1:
            anyio.notify_closing(sock)
            sock.close()
        if self.offer is not None:
            self.offer.decide(Verdict.MOVED)

    def is_over(self) -> bool:
        """Say whether the socket was closed: the one end of a connection whose handler is not ours."""
        sock = self._sock()
        return sock is None or sock.fileno() == -1


class GatedSocket(Acceptor):
    """A registered socket that is read only while the gate stands open.

    Several tasks may take from it; they take turns.

    Args:
        sock: a socket that the supervisor returned, or its entry.
        plane: default: the one of this process.

    Raises:
        LookupError: there is no ``Ecdysis`` in this process.
        ValueError: the socket is not registered.
    """

    def __init__(self, sock: socket.socket | Entry, *, plane: DataPlane | None = None) -> None:
        self.plane = plane or active()
        entry = sock if isinstance(sock, Entry) else self.plane.registry.find(sock)
        if entry is None:
            raise ValueError(
                f"{sock!r} is not registered: build it by ecdysis.listen_tcp() and the like, or pass it to "
                "ecdysis.adopt(), and use the socket that it returns"
            )
        self.entry = entry
        self._added = False
        self._state = GateState.CLOSED
        self._changed = anyio.Event()
        # Held by the one task that waits: two cannot wait for one descriptor (BusyResourceError).
        self._turn = anyio.Lock(fast_acquire=True)
        self._is_exhausted = False

    async def take(self, operation: Callable[[socket.socket], T]) -> T:
        """Wait until the gate is open and the socket readable, and return what ``operation`` takes from it.

        ``operation`` may not wait; it raises BlockingIOError where there is nothing, and is then called again.

        Raises:
            AcceptingEnded: nothing more will come.
            OSError: the operation failed for another reason than a shortage of descriptors or memory.

        Cancellation loses nothing.
        """
        async with self._turn:
            if not self._added:
                self._added = True
                await self.plane.gate.add(self)
            # So that a queue that never gets empty does not stop the loop. Every await stands before the operation:
            # with one after it, a cancellation would lose what was taken (DESIGN.md, trap 18).
            await anyio.lowlevel.checkpoint()
            while True:
                if self._state is GateState.ENDED:
                    raise AcceptingEnded(
                        f"{self.entry.name} is closed, or this generation is leaving: nothing will come"
                    )
                if self._state is GateState.CLOSED:
                    await self._changed.wait()
                    continue
                try:
                    return operation(self.entry.sock)
                except BlockingIOError:
                    self._is_exhausted = False
                    # Raised where a pause wakes us. Should the socket be closed, then the operation itself fails next.
                    with contextlib.suppress(anyio.ClosedResourceError):
                        await anyio.wait_readable(self.entry.sock)
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    self._report_exhaustion(error)
                    await anyio.sleep(EXHAUSTED_PAUSE_SECONDS)

    async def open(self) -> None:
        """Take from the socket from now on."""
        self._change(GateState.OPEN)

    async def pause(self) -> None:
        """Take nothing more. There is nothing to wait for: what was taken is tracked already."""
        self._change(GateState.CLOSED)
        # Wakes who waits, and makes the loop forget the descriptor. If it watched on after the registry has closed it,
        # epoll would go on reporting the open file, which the successor shares, under a number that may be reused.
        anyio.notify_closing(self.entry.sock)

    async def end(self) -> None:
        """Let everyone who waits know that nothing more will come."""
        self._change(GateState.ENDED)

    async def aclose(self) -> None:
        """Close the socket, because the application wants no more of it; harmless once the generation is leaving."""
        if self._state is not GateState.ENDED:
            await self.plane.gate.remove(self)
            self._change(GateState.ENDED)
            # Once the generation is leaving, sockets are the supervisor's: a path may have to be removed.
            is_leaving = self.plane.tracker.draining.is_set()
            if not is_leaving and self.plane.registry.find(self.entry.sock) is self.entry:
                self.plane.registry.release(self.entry)

    def _change(self, state: GateState) -> None:
        self._state = state
        self._changed.set()
        self._changed = anyio.Event()

    def _report_exhaustion(self, error: OSError) -> None:
        """Say it once until the queue was empty again: every connection that waits would fill the log with it."""
        if not self._is_exhausted:
            self._is_exhausted = True
            logger.error(
                "cannot take from %s: %s (with %d connections open); clients wait in its queue until some have ended. "
                "Raise the limit of open files: ulimit -n, or LimitNOFILE= in the unit",
                self.entry.name,
                error.strerror,
                len(self.plane.tracker),
            )


class StreamResumer(ConnectionResumer):
    """Resumes streams of the predecessor's, each in a task of its own.

    Args:
        acceptor: of the socket that they were accepted from.
        task_group: where the handlers run.
        handle: a handler's whole task; called with the socket, the connection, and what was released.
    """

    def __init__(
        self,
        acceptor: SocketAcceptor,
        task_group: TaskGroup,
        handle: Callable[[socket.socket, AcceptedConnection, Release], Coroutine[Any, Any, None]],
    ) -> None:
        self._acceptor = acceptor
        self._task_group = task_group
        self._handle = handle

    def prepare(self, parcel: TransferRecord) -> Callable[[socket.socket], Awaitable[None]]:
        if parcel.release.unread and not _buffers():
            raise Refused("streams have no buffer for what was received already, on this event loop")

        async def begin(sock: socket.socket) -> None:
            entry = self._acceptor.entry
            connection = AcceptedConnection(sock, entry.until, entry.name, is_resumable=True)
            connection.since = parcel.since
            self._acceptor.plane.tracker.open(connection)
            self._task_group.start_soon(self._handle, sock, connection, parcel.release)

        return begin


def _buffers() -> bool:
    """Say whether asyncio or uvloop runs, where anyio's streams read ahead."""
    trio = sys.modules.get("trio")
    return trio is None or not trio.lowlevel.in_trio_run()


class SocketAcceptor(GatedSocket):
    """A listener's accept: each connection is tracked from the moment it leaves the kernel's queue."""

    # Whether connections that it accepts can go on in a successor.
    is_resumable = False

    async def accept(self) -> tuple[socket.socket, AcceptedConnection]:
        """Wait for a connection; return its socket, non-blocking, and what stands for it in the tracker.

        Raises:
            AcceptingEnded: nothing more will come.

        Cancellation loses no connection.
        """
        return await self.take(self._accept)

    def _accept(self, listener: socket.socket) -> tuple[socket.socket, AcceptedConnection]:
        sock = accept_connection(listener)
        connection = AcceptedConnection(sock, self.entry.until, self.entry.name, is_resumable=self.is_resumable)
        self.plane.tracker.open(connection)
        if self.entry.kind is Kind.TCP:
            # Whatever wraps the socket does it only if the protocol number is right (DESIGN.md, trap 19).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock, connection


def accept_connection(listener: socket.socket) -> socket.socket:
    """Return the next connection that waits, non-blocking; those that broke while they waited are nobody's.

    Raises:
        OSError: there is none (BlockingIOError), or no room for one.
    """
    while True:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno not in BROKEN_CONNECTION:
                raise
        else:
            sock.setblocking(False)
            return sock


def require_streams(acceptor: SocketAcceptor) -> None:
    """Refuse a socket whose connections are no streams.

    Raises:
        TypeError: it is one.
    """
    entry = acceptor.entry
    if entry.sock.type == socket.SOCK_DGRAM:
        raise TypeError(f"{entry.name} has no connections: receive from it by DatagramListener(sock)")
    if entry.sock.type != socket.SOCK_STREAM:
        raise TypeError(f"the connections of {entry.name} are no streams: accept them by SocketAcceptor(sock).accept()")


def largest_datagram(entry: Entry) -> int:
    """Return how much to read at once, in bytes, so that no datagram is truncated."""
    return MAX_DATAGRAM if entry.kind is Kind.UDP else MAX_UNIX_DATAGRAM


@contextlib.contextmanager
def confining_cancellation() -> Iterator[None]:
    """Let a task that was cancelled by itself end alone; every task of the plane's task group runs under this.

    On asyncio a task may be cancelled by anybody, and so it seems when it awaits one that was; anyio takes that for the
    cancellation of the whole task group, and the service would end. The same is no error to asyncio's own streams.
    """
    cancelled = anyio.get_cancelled_exc_class()
    try:
        yield
    except cancelled:
        # It is minus infinity where a scope around this is cancelled; on trio there is no other cancellation.
        if anyio.current_effective_deadline() == -math.inf:
            raise


@contextlib.contextmanager
def handling(connection: AcceptedConnection, tracker: Tracker) -> Iterator[None]:
    """Run a handler in its own task: under its own cancel scope, counted to its end.

    Its exceptions are logged and go no further: they would end the connections of everybody else.
    """
    current_connection.set(connection)
    try:
        with confining_cancellation(), anyio.CancelScope() as connection.scope:
            yield
    except Exception as error:
        unexpected: Exception | None = error
        if isinstance(error, ExceptionGroup):
            _, unexpected = error.split(DrainInterrupt)
        elif isinstance(error, DrainInterrupt):
            unexpected = None
        if unexpected is not None:
            logger.exception("the handler of a connection failed; the connection is closed", exc_info=unexpected)
    finally:
        tracker.close(connection)
