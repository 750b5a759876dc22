"""The one accept loop of anyio and trio: gated, cancellable at every moment, and without a loss.

A :class:`GatedSocket` waits until its socket is readable, and then takes from it without waiting. Only the wait can be
cancelled, and there is no await between taking a connection and tracking it. ``anyio_streams.py`` and
``trio_streams.py`` wrap what was accepted, and start the tasks that serve it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
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

from ecdysis_async._connections.connection import Connection, Verdict, current_connection, describe_peer
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

# The largest datagram, in bytes: lengths in IP have 16 bits; Unix sockets have asyncio's limit.
MAX_DATAGRAM = 2**16
MAX_UNIX_DATAGRAM = 2**18


class AcceptingEnded(EcdysisError, anyio.ClosedResourceError):
    """Nothing more will come from this socket in this generation; its queue belongs to the successor."""


class AcceptedConnection(Connection):
    """A connection that was accepted from a socket, and the scope of the handler that serves it.

    Attributes:
        scope: of the handler; None where the application's own task serves it.
        stream: what the handler was given.
        is_resumable: whether a successor has a handler that goes on with it.
    """

    # The socket is referred to weakly: a stream that its owner drops without closing it ends as it would without us.
    def __init__(self, sock: socket.socket, until: Until, name: str = "", *, is_resumable: bool = False) -> None:
        super().__init__(until)
        self._sock = weakref.ref(sock)
        self._name = name
        self.scope: anyio.CancelScope | None = None
        self.stream: Any = None
        self.is_resumable = is_resumable

    def cancel(self) -> None:
        """Cancel the handler; the stream of an application's own task ends instead."""
        if self.scope is None:
            self.abort()
        else:
            self.scope.cancel()

    def abort(self) -> None:
        """Make every read and write on the stream end; its owner closes it. Sent bytes still arrive."""
        sock = self._sock()
        if sock is not None:
            # ENOTCONN: the peer has reset it already. EBADF: it is closed already.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def what(self) -> str:
        return f"a connection to {self._name} from {describe_peer(self._sock())}"

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
            # The handler has to offer it: only it knows when nothing is half read.
            self.invite()
            return None
        unread = b""
        # anyio's stream on asyncio reads ahead. All other streams read only what was asked for.
        transport = getattr(self.stream, "_transport", None)  # anyio's
        if transport is not None:
            if transport.is_closing() or transport.get_write_buffer_size():
                return None
            # Reading goes on when the handler receives again.
            transport.pause_reading()
            unread = b"".join(self.stream._protocol.read_queue)  # noqa: SLF001 - anyio's
        self.offer.verdict = Verdict.SENT
        return TransferRecord(self._name, self.since, Release(self.offer.state, unread))

    def keep(self) -> None:
        if self.offer is not None:
            self.offer.decide(Verdict.STAYS)

    def let_go(self) -> None:
        transport, sock = getattr(self.stream, "_transport", None), self._sock()  # anyio's
        # Closed without a word to the peer: anyio's aclose() would end the connection in all copies (shutdown).
        if transport is not None:
            transport.abort()
        elif sock is not None and sock.fileno() != -1:
            anyio.notify_closing(sock)
            sock.close()
        if self.offer is not None:
            self.offer.decide(Verdict.MOVED)

    def is_over(self) -> bool:
        """Say whether the socket was closed: the only sign of an end that an application's own task gives."""
        sock = self._sock()
        return sock is None or sock.fileno() == -1


class GatedSocket(Acceptor):
    """Takes from a registered socket, only while the gate stands open.

    Several tasks may take from it; they take turns.

    Args:
        sock: a socket that the ``Ecdysis`` returned, or its entry.
        plane: by default the active one of this process.

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
        # Held by the task that waits: two cannot wait for one descriptor (BusyResourceError).
        self._turn = anyio.Lock(fast_acquire=True)
        self._is_exhausted = False

    async def take(self, operation: Callable[[socket.socket], T]) -> T:
        """Wait until the gate is open and the socket readable, and return what ``operation`` takes from it.

        ``operation`` may not wait. It raises BlockingIOError where there is nothing to take, and is called again later.

        Raises:
            AcceptingEnded: nothing more will come.
            OSError: the operation failed for another reason than a shortage of descriptors or memory.

        Cancellation loses nothing.
        """
        async with self._turn:
            if not self._added:
                self._added = True
                await self.plane.gate.add(self)
            # Lets the loop turn even if the queue never gets empty. Every await stands before the operation: with an
            # await behind it, a cancellation would lose what was taken.
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
                    # ClosedResourceError: a pause wakes this task. If the socket is closed, the operation fails next.
                    with contextlib.suppress(anyio.ClosedResourceError):
                        await anyio.wait_readable(self.entry.sock)
                except OSError as error:
                    if error.errno == errno.EINVAL and self.entry.has_queue and not self.entry.is_listening():
                        # Another worker has shut it down, since their anchor is dead. This one will hear of it next.
                        await self._changed.wait()
                        continue
                    if error.errno not in EXHAUSTED:
                        raise
                    self._report_exhaustion(error)
                    await anyio.sleep(EXHAUSTED_PAUSE_SECONDS)

    async def open(self) -> None:
        """Take from the socket from now on."""
        self._change(GateState.OPEN)

    async def pause(self) -> None:
        """Take nothing more. There is nothing to wait for: everything that was taken is tracked already."""
        self._change(GateState.CLOSED)
        # Wakes the task that waits, and makes the loop forget the descriptor. If the loop watched on after the registry
        # has closed it, epoll would go on reporting the open file, which the successor shares, under a number that may
        # be reused.
        anyio.notify_closing(self.entry.sock)

    async def end(self) -> None:
        """Tell every task that waits that nothing more will come."""
        self._change(GateState.ENDED)

    async def aclose(self) -> None:
        """Close the socket, because the application wants no more of it; harmless once the generation is leaving."""
        if self._state is not GateState.ENDED:
            await self.plane.gate.remove(self)
            self._change(GateState.ENDED)
            # Once the generation is leaving, its sockets belong to the `Ecdysis`: a path may have to be removed.
            is_leaving = self.plane.tracker.draining.is_set()
            if not is_leaving and self.plane.registry.find(self.entry.sock) is self.entry:
                self.plane.registry.release(self.entry)

    def _change(self, state: GateState) -> None:
        self._state = state
        self._changed.set()
        self._changed = anyio.Event()

    def _report_exhaustion(self, error: OSError) -> None:
        """Log the shortage once until the queue was empty again: the waiting connections would fill the log."""
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
    """Resumes streams of the predecessor, each in a task of its own.

    Args:
        acceptor: of the socket that the predecessor has accepted them from.
        task_group: where the handlers run.
        handle: the whole task of a handler; called with the socket, the connection, and what was released.
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
        if parcel.release.unread and not _is_on_asyncio():
            raise Refused("streams have no buffer for what was received already, on this event loop")

        async def begin(sock: socket.socket) -> None:
            entry = self._acceptor.entry
            connection = _connection_class()(sock, entry.until, entry.name, is_resumable=True)
            connection.since = parcel.since
            tracker = self._acceptor.plane.tracker
            tracker.open(connection)
            try:
                self._task_group.start_soon(self._handle, sock, connection, parcel.release)
            except BaseException:
                # The task group has ended: nothing serves the connection.
                sock.close()
                tracker.close(connection)
                raise

        return begin


def _is_on_asyncio() -> bool:
    """Say whether asyncio or uvloop runs, where anyio's streams read ahead."""
    trio = sys.modules.get("trio")
    return trio is None or not trio.lowlevel.in_trio_run()


def _connection_class() -> type[AcceptedConnection]:
    return _find_task_connection() if _is_on_asyncio() else AcceptedConnection


@functools.cache
def _find_task_connection() -> type[AcceptedConnection]:
    # It imports asyncio, which a service on trio does not need.
    from .safe_points import TaskSafePoints

    class TaskAcceptedConnection(TaskSafePoints, AcceptedConnection):
        """A connection that was accepted on asyncio or uvloop."""

    return TaskAcceptedConnection


class SocketAcceptor(GatedSocket):
    """Accepts the connections of a listener: each is tracked from the moment it leaves the kernel's queue.

    Attributes:
        is_resumable: whether the connections that it accepts can go on in a successor.
    """

    is_resumable = False

    def resume_by(
        self,
        task_group: TaskGroup,
        handle: Callable[[socket.socket, AcceptedConnection, Release], Coroutine[Any, Any, None]],
    ) -> None:
        """Let connections of the predecessor go on here, and connections from here in a successor.

        See :class:`StreamResumer` for the arguments.
        """
        self.resumer = StreamResumer(self, task_group, handle)
        self.is_resumable = True

    async def accept(self) -> tuple[socket.socket, AcceptedConnection]:
        """Wait for a connection; return its non-blocking socket, and the connection that the tracker knows.

        Raises:
            AcceptingEnded: nothing more will come.

        Cancellation loses no connection.
        """
        return await self.take(self._accept)

    def _accept(self, listener: socket.socket) -> tuple[socket.socket, AcceptedConnection]:
        sock = accept_connection(listener)
        connection = _connection_class()(sock, self.entry.until, self.entry.name, is_resumable=self.is_resumable)
        self.plane.tracker.open(connection)
        if self.entry.kind is Kind.TCP:
            # Streams set it only if the protocol number is right, which a restored socket lacks. Without it, each
            # keep-alive request would wait for 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock, connection


def accept_connection(listener: socket.socket) -> socket.socket:
    """Return the next waiting connection, non-blocking; connections that broke while they waited are left out.

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
        TypeError: it is such a socket.
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

    On asyncio any code may cancel a task, and awaiting a cancelled task looks the same. anyio takes that for the
    cancellation of the whole task group, and the service would end. asyncio's own streams take it for no error.
    """
    cancelled = anyio.get_cancelled_exc_class()
    try:
        yield
    except cancelled:
        # The deadline is minus infinity if a scope around this is cancelled; trio has no other cancellation.
        if anyio.current_effective_deadline() == -math.inf:
            raise


@contextlib.contextmanager
def handling(connection: AcceptedConnection, tracker: Tracker) -> Iterator[None]:
    """Run a handler in its own task: under its own cancel scope, counted to its end.

    Its exceptions are logged and go no further: they would end all other connections.
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
