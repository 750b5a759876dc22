"""Connections of asyncio's and uvloop's servers: how each is tracked, ended and moved, and what it needs of its server.

A protocol in front of the application's own sees the beginning and the end of each connection; nothing stands between a
transport and its protocol while data flows. When to accept is decided elsewhere, and so is what a server is.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import functools
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ecdysis_async._connections.connection import Verdict, current_connection, describe_peer
from ecdysis_async._connections.parcel import Release, TransferRecord
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.entry import Entry
from ecdysis_async.errors import DrainInterrupt

from .safe_points import TaskSafePoints

__all__ = [
    "ProtocolFactory",
    "ServerConnection",
    "ServerHooks",
    "TransferStrategy",
    "connection_of",
    "protocol_of",
    "track_protocol",
]

ProtocolFactory = Callable[[], asyncio.BaseProtocol]

# How much is read into a buffer of this module's own where the loop does not say how much there may be, bytes.
FIRST_BYTES = 64 * 1024


class TransferStrategy(abc.ABC):
    """How the connections of one server move: what a protocol gives away, and what goes on with it.

    Attributes:
        moves_between_requests: whether a connection can move that has had a response.
    """

    moves_between_requests: bool = True

    @abc.abstractmethod
    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        """Return what travels of a connection that is not being read now, or None if it is at no safe point.

        Args:
            connection: nothing is in its write buffer, and it has no TLS.
            protocol: the protocol that its transport has at this moment.
        """

    def keep(self, connection: ServerConnection, protocol: Any) -> None:  # noqa: B027 - most strategies have nothing to do
        """Go on with a connection that was packed: it stays here."""

    def let_go(self, connection: ServerConnection, protocol: Any) -> None:  # noqa: B027 - most strategies have nothing to do
        """Take note that a connection has moved: its protocol is told of the end next."""

    @abc.abstractmethod
    def resume(self, release: Release) -> asyncio.BaseProtocol:
        """Make the protocol that goes on with a connection.

        Raises:
            Refused: it cannot be served here.
        """


@dataclass(slots=True, eq=False)
class ServerHooks:
    """What a connection and an acceptor need of their server, and what the adapter of another server may change of it.

    Attributes:
        loop: where its protocols run.
        tracker: what its connections are counted by.
        protocol_factory: called for each connection.
        is_secure: whether it serves TLS. The state of a TLS session is in user space: such connections never move.
        transfer: how its connections move to a successor; None where they do not.
        say_goodbye: called with the protocol of a connection that the drain is about to close as idle. It returns True
            where the connection is on its way out by itself, and has until the deadline.
        on_hang_up: called when a peer has sent all it will, once the protocol has heard of it.
        keeps_context: whether protocols handle their data in a context that knows their connection. Loops call
            ``data_received`` in a context that is older than the connection, or that of whoever resumes reading.
    """

    loop: asyncio.AbstractEventLoop
    tracker: Tracker
    protocol_factory: ProtocolFactory
    is_secure: bool = False
    transfer: TransferStrategy | None = None
    say_goodbye: Callable[[Any], bool] | None = None
    on_hang_up: Callable[[ServerConnection], None] | None = None
    keeps_context: bool = False

    @property
    def strategy(self) -> TransferStrategy | None:
        """How its connections move, if they can at all."""
        return None if self.is_secure else self.transfer

    def adapt(
        self,
        *,
        protocol_factory: ProtocolFactory | None = None,
        transfer: TransferStrategy | None = None,
        say_goodbye: Callable[[Any], bool] | None = None,
        on_hang_up: Callable[[ServerConnection], None] | None = None,
        keeps_context: bool | None = None,
    ) -> None:
        """Set what an adapter changes; what it leaves out stays as it is. See the attributes.

        A protocol factory and ``keeps_context`` hold for connections to come, all else also for those that are open.
        """
        self.protocol_factory = protocol_factory or self.protocol_factory
        self.transfer = transfer or self.transfer
        self.say_goodbye = say_goodbye or self.say_goodbye
        self.on_hang_up = on_hang_up or self.on_hang_up
        self.keeps_context = self.keeps_context if keeps_context is None else keeps_context


class ServerConnection(TaskSafePoints):
    """A connection from the call of the protocol factory to its end, and to the end of its handler, if that is known.

    Attributes:
        hooks: of the server that accepted it.
        transport: None until the protocol is told of it: before that there is the attaching, and a TLS handshake.
        handler: the task that serves it at this moment, where that is known.
        is_at_eof: whether the peer has said that it sends no more.

    Args:
        hooks: see above.
        entry: what it was accepted from.
        sock: what was accepted, where the loop tells; until there is a transport, only this can be asked.
    """

    transport: asyncio.WriteTransport | None = None
    handler: asyncio.Task[Any] | None = None
    is_at_eof: bool = False
    is_lost: bool = False
    # Whether it is packed, and was read before.
    _is_paused: bool = False

    def __init__(self, hooks: ServerHooks, entry: Entry, sock: socket.socket | None) -> None:
        # The base class' beginning is written out: each connection would pay for the call.
        self.until = entry.until
        self.since = time.monotonic()
        self.hooks = hooks
        self._entry = entry
        self._sock = sock

    # What serves it

    def busy(self, task: asyncio.Task[Any] | None) -> None:
        """Take note that a task serves it: the drain waits for that, and cancels it at the deadline."""
        self.handler = task

    def idle(self) -> None:
        """Take note that no task serves it any more; it is closed in the tracker if its transport has gone already."""
        self.handler = None
        self._close_if_over()

    def handle(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run the handler of a stream in a task of its own."""
        self.busy(self.hooks.loop.create_task(coroutine))
        assert self.handler is not None
        self.handler.add_done_callback(self._on_handled)

    def note_safe_point(self) -> None:
        """Say that it can be packed now: it may move at once, if there is a successor."""
        self.hooks.tracker.note_safe_point(self)

    def close(self) -> None:
        """Close its transport, once what was written is sent; harmless if it is closing already."""
        # Once only: asyncio's TLS transport, closed twice, forgets its connection and cannot be aborted any more.
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    @property
    def movable(self) -> bool:
        return self.hooks.strategy is not None and not self.is_lost

    @property
    def will_move(self) -> bool:
        """Whether it moves to a successor as soon as its present request is answered."""
        strategy = self.hooks.strategy
        is_offered = self.hooks.tracker.moves and not self.refused and not self.is_lost
        return is_offered and strategy is not None and strategy.moves_between_requests

    def overhear(self, feed: Callable[[bytes], object]) -> None:
        """Have ``feed`` called with all bytes that are received from now on, before the protocol gets them."""
        if self.transport is None or self.transport.is_closing():
            return
        protocol: Any = self.transport.get_protocol()
        receive = protocol.data_received

        def hear(data: bytes) -> None:
            feed(data)
            receive(data)

        protocol.data_received = hear
        # Set once more, because both loops keep the method.
        self.transport.set_protocol(protocol)

    def fileno(self) -> int:
        assert self.transport is not None
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def pack(self) -> TransferRecord | None:
        transport: Any = self.transport
        strategy = self.hooks.strategy
        if strategy is None or transport is None or transport.is_closing():
            return None
        if transport.get_write_buffer_size():
            return None
        protocol = transport.get_protocol()
        if isinstance(protocol, _TrackedProtocol) and protocol.owes_unread:
            return None
        # After the end of what the peer sends, nothing is read. To resume reading then would have asyncio find the end,
        # and tell of it, once more.
        is_reading = transport.is_reading() and not self.is_at_eof
        # Takes effect also for a read that the loop has queued in this very turn.
        transport.pause_reading()
        release = None
        try:
            release = strategy.pack(self, protocol_of(transport))
        finally:
            if release is None and is_reading:
                transport.resume_reading()
        if release is None:
            return None
        self._is_paused = is_reading
        if self.offer is not None:
            self.offer.verdict = Verdict.SENT
        return TransferRecord(self._entry.name, self.since, release)

    def keep(self) -> None:
        assert self.transport is not None
        strategy, transport = self.hooks.transfer, self.transport
        if strategy is not None and not transport.is_closing():
            strategy.keep(self, protocol_of(transport))
            if self._is_paused:
                transport.resume_reading()  # type: ignore[attr-defined]
        if self.offer is not None:
            self.offer.decide(Verdict.STAYS)

    def let_go(self) -> None:
        assert self.transport is not None
        if self.hooks.strategy is not None:
            self.hooks.strategy.let_go(self, protocol_of(self.transport))
        self.transport.abort()
        if self.offer is not None:
            self.offer.decide(Verdict.MOVED)

    def interrupt(self) -> None:
        """Wake the handler at its safe point. A connection without a handler is closed once its last bytes are sent."""
        is_known = self.is_at_safe_point or self.handler is not None
        super().interrupt()
        if not is_known and self.transport is not None and not self.transport.is_closing():
            is_silent = self.transport.get_write_buffer_size() == 0
            say_goodbye = self.hooks.say_goodbye
            if say_goodbye is None or not say_goodbye(protocol_of(self.transport)):
                self.silent = is_silent
                self.transport.close()

    def cancel(self) -> None:
        if self.handler is not None:
            self.handler.cancel()
        else:
            self.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self._sock is not None:
            # ENOTCONN: the peer has reset it already. EBADF: it is closed already.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def what(self) -> str:
        try:
            sock = self.transport.get_extra_info("socket") if self.transport is not None else self._sock
        except AttributeError:
            # The application has closed asyncio's TLS transport twice: it has forgotten its socket.
            sock = None
        return f"a connection to {self._entry.name} from {describe_peer(sock)}"

    def is_over(self) -> bool:
        return self.handler is None and (self.is_lost or self._is_lost_unheard())

    def lose(self) -> None:
        """Take note that there is no transport any more, or will never be one; harmless if that is known."""
        if not self.is_lost:
            self.is_lost = True
            if self.handler is None:
                self.hooks.tracker.close(self)

    def _lose_if_unattached(self) -> None:
        if self.transport is None:
            self.lose()

    def lose_soon(self) -> None:
        """Call ``lose`` in a turn of the loop: garbage is collected in any thread, and in the middle of anything."""
        # RuntimeError: the loop is closed, and nothing is counted any more.
        with contextlib.suppress(RuntimeError):
            self.hooks.loop.call_soon_threadsafe(self.lose)

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
        # Without an error, a handler may return and leave its connection to other tasks, until the drain begins.
        if handler.cancelled() or error is not None or self.hooks.tracker.draining.is_set():
            self.close()
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self.is_over():
            self.hooks.tracker.close(self)

    def _is_lost_unheard(self) -> bool:
        """Ask the transport: a protocol that was replaced (set_protocol, start_tls) is not told of the loss."""
        if self.transport is None:
            if self._sock is not None:
                return self._sock.fileno() == -1
            if not self.hooks.is_secure:
                # uvloop attaches what it has accepted in its next turn, if it can.
                self.hooks.loop.call_soon(self.hooks.loop.call_soon, self._lose_if_unattached)
            return False
        if not self.transport.is_closing():
            return False
        # The socket is closed after the last byte, under a TLS transport too. Then a TLS transport has no socket any
        # more, and neither has a transport of uvloop that was never asked for it before.
        try:
            sock = self.transport.get_extra_info("socket")
        except AttributeError:
            # The application has closed asyncio's TLS transport twice. Its protocol hears of the loss.
            return False
        return sock is None or bool(sock.fileno() == -1)


class _TrackedProtocol(asyncio.BaseProtocol):
    """Stands in front of the application's protocol, to see the beginning and the end of the connection.

    The application's class is left as it is, and data goes straight to its bound methods. ``transport.set_protocol``
    takes this protocol out of the way.
    """

    # The bytes that the predecessor had received and not dealt with.
    _unread: bytes = b""
    # Until it is attached, what tells that it never will be; None where the connection tells that by itself.
    unheard: _Unheard | None = None

    connection: ServerConnection
    protocol: Any
    # Knows the connection. It is a copy, because the connections of a server of uvloop share one context.
    _context: contextvars.Context

    @property
    def owes_unread(self) -> bool:
        """Whether the protocol has not got yet what the predecessor had received."""
        return bool(self._unread)

    def connection_made(self, transport: Any) -> None:
        self.connection.transport = transport
        if self.unheard is not None:
            self.unheard = None
        self._context.run(self.protocol.connection_made, transport)
        if self._unread:
            # In the next turn: uvloop begins to read when this has returned, even where the protocol has paused reading
            # because it has more than enough.
            self.connection.hooks.loop.call_soon(self._deliver)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self.protocol.connection_lost(exc)
        finally:
            connection = self.connection
            connection.is_lost = True
            if connection.handler is None:
                connection.hooks.tracker.close(connection)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()

    def eof_received(self) -> bool | None:
        if self._unread:
            self._deliver()
        connection = self.connection
        connection.is_at_eof = True
        is_kept: bool | None = self.protocol.eof_received()
        if connection.hooks.on_hang_up is not None:
            connection.hooks.on_hang_up(connection)
        return is_kept

    def _deliver(self) -> None:
        """Give the protocol what the predecessor had received: before anything that is read here."""
        if not self._unread:
            return
        data, self._unread = self._unread, b""
        self._open()
        transport: Any = self.connection.transport
        if transport.is_closing():
            return
        # Both loops remember the methods of a protocol. The application may have set another protocol by now.
        if transport.get_protocol() is self:
            transport.set_protocol(self)
        try:
            self._context.run(self._feed, data)
        except BaseException:
            # The loops do the same where a protocol fails over data that was just read.
            transport.abort()
            raise

    @abc.abstractmethod
    def give_first(self, unread: bytes) -> None:
        """Give the protocol these bytes before all that is read here."""

    @abc.abstractmethod
    def _open(self) -> None:
        """Let what is read here go to the protocol's own methods."""

    @abc.abstractmethod
    def _feed(self, data: bytes) -> None: ...


class _TrackedStreamProtocol(_TrackedProtocol, asyncio.Protocol):
    def __init__(self, connection: ServerConnection, protocol: asyncio.Protocol) -> None:
        self.connection = connection
        self.protocol = protocol
        self._context = context = contextvars.copy_context()
        context.run(current_connection.set, connection)
        # Set here, because uvloop asks for it before it tells of the connection; as `_open` does, without a call of it.
        receive: Any = protocol.data_received
        if connection.hooks.keeps_context:
            receive = functools.partial(context.run, receive)
        self.data_received = receive  # type: ignore[method-assign]

    def give_first(self, unread: bytes) -> None:
        self._unread = unread
        self.data_received = self._receive_first  # type: ignore[method-assign]

    def _open(self) -> None:
        receive: Any = self.protocol.data_received
        if self.connection.hooks.keeps_context:
            # All of it is in C: each read goes through here.
            receive = functools.partial(self._context.run, receive)
        self.data_received = receive  # type: ignore[method-assign]

    def _receive_first(self, data: bytes) -> None:
        # In one call: a protocol that has enough with the first part would get the second one behind its pause.
        self._unread += data
        self._deliver()

    def _feed(self, data: bytes) -> None:
        self.protocol.data_received(data)


class _TrackedBufferedProtocol(_TrackedProtocol, asyncio.BufferedProtocol):
    # What is read here before the protocol has got what is unread.
    _first: bytearray

    def __init__(self, connection: ServerConnection, protocol: asyncio.BufferedProtocol) -> None:
        self.connection = connection
        self.protocol = protocol
        self._context = contextvars.copy_context()
        self._context.run(current_connection.set, connection)
        self._open()

    def give_first(self, unread: bytes) -> None:
        self._unread = unread
        self.buffer_updated = self._receive_first  # type: ignore[assignment]
        self.get_buffer = self._get_first_buffer  # type: ignore[method-assign]

    def _open(self) -> None:
        self.buffer_updated = self.protocol.buffer_updated  # type: ignore[method-assign]
        self.get_buffer = self.protocol.get_buffer  # type: ignore[method-assign]

    def _get_first_buffer(self, sizehint: int) -> Any:
        self._first = bytearray(max(sizehint, FIRST_BYTES))
        return self._first

    def _receive_first(self, count: int) -> None:
        self._unread += self._first[:count]
        del self._first
        self._deliver()

    def _feed(self, data: bytes) -> None:
        while data:
            buffer = memoryview(self.protocol.get_buffer(len(data))).cast("B")
            count = min(len(buffer), len(data))
            if not count:
                raise RuntimeError("get_buffer() returned an empty buffer")
            buffer[:count] = data[:count]
            self.buffer_updated(count)
            data = data[count:]


def track_protocol(connection: ServerConnection, protocol: Any, unread: bytes = b"") -> asyncio.BaseProtocol:
    """Return what stands in front of a protocol, for the loop to attach.

    Args:
        connection: what the protocol serves.
        protocol: the application's.
        unread: given to the protocol before all that is read here.
    """
    front: _TrackedProtocol
    if isinstance(protocol, asyncio.BufferedProtocol):
        front = _TrackedBufferedProtocol(connection, protocol)
    else:
        front = _TrackedStreamProtocol(connection, protocol)
    if unread:
        front.give_first(unread)
    if connection.hooks.is_secure:
        front.unheard = _Unheard(connection)
    return front


class _Unheard:
    """Held by what the loop was given to attach, until it is attached: tells the tracker if that never happens.

    A TLS handshake that fails reaches no protocol: the loop just lets go of it.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    def __del__(self) -> None:
        if self._connection.transport is None:
            self._connection.lose_soon()


def connection_of(transport: Any) -> ServerConnection | None:
    """Return what a transport belongs to; None if it has ended, or has another protocol than it was given."""
    protocol = transport.get_protocol()
    return protocol.connection if isinstance(protocol, _TrackedProtocol) else None


def protocol_of(transport: Any) -> Any:
    """Return the protocol that a transport has at this moment, as the application knows it."""
    protocol = transport.get_protocol()
    return protocol.protocol if isinstance(protocol, _TrackedProtocol) else protocol
