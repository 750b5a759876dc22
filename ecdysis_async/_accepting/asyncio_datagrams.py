"""The data plane of asyncio and uvloop for datagrams: a transport that reads between commit and pause only.

The transport is our own, because uvloop's cannot stop reading. Datagrams that it does not read stay in the kernel's
queue, for the generation that reads next. Sending is never gated, so that the old generation's last replies get out.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Entry, Kind, Until

from .asyncio_acceptors import ungated
from .asyncio_servers import default_name, numeric
from .data_plane import DataPlane
from .gate import Acceptor
from .gated_socket import confining_cancellation, largest_datagram

__all__ = ["DatagramEndpoint", "create_datagram_endpoint", "is_service"]

P = TypeVar("P", bound=asyncio.DatagramProtocol)

# How many datagrams are read in one turn of the loop: enough to spare the loop's own cost for most of them, too few to
# be noticed by the connections next to it.
READS_PER_TURN = 32

# How much may wait to be sent until the protocol is told to pause, in bytes, and the divisor of that at which it may
# resume: the defaults of asyncio.
HIGH_WATER = 2**16
LOW_WATER_DIVISOR = 4

# A Unix datagram socket is writable also where the receiver's queue is full (unix_dgram_poll looks at the peer of
# connected sockets only), so there is nothing to watch: it is tried again after this many seconds.
FULL_QUEUE_PAUSE_SECONDS = 0.005

# How many bytes the head of a datagram in the queue counts for, as in asyncio: empty datagrams would be free.
HEADER_BYTES = 8


async def create_datagram_endpoint(
    plane: DataPlane,
    protocol_factory: Callable[[], P],
    local_addr: tuple[str, int] | str | None = None,
    remote_addr: tuple[str, int] | str | None = None,
    *,
    name: str | None = None,
    until: Until | str = Until.DRAIN,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
    sock: socket.socket | None = None,
) -> tuple[asyncio.DatagramTransport, P]:
    """Serve a protocol on a datagram socket, as ``loop.create_datagram_endpoint`` does, inherited or created.

    Reading begins at the commit and pauses with the accepting. An endpoint without a local address, or with a remote
    one, is a client's: there is nothing to inherit, and the loop makes it.

    Args:
        plane: what the socket is registered with.
        protocol_factory: called once.
        local_addr: host and port, or a path with ``family=AF_UNIX``. The first address of a name is taken.
        remote_addr: see above.
        name: the name that the socket is inherited by.
        until: whether it ends with the drain of a stop, or serves to the exit.
        family: of the address that a name is resolved to.
        proto: of the address that a name is resolved to.
        flags: of the resolving of a name.
        reuse_port: allow several sockets on one address.
        allow_broadcast: set SO_BROADCAST.
        sock: a socket to use instead, bound to an address; it is registered, unless it is already.

    Raises:
        OSError: the address cannot be bound.
        ValueError: the arguments contradict each other.
    """
    loop = asyncio.get_running_loop()
    if sock is not None:
        if sock.type != socket.SOCK_DGRAM:
            raise ValueError(f"A datagram socket was expected, got {sock!r}")
        if local_addr or remote_addr or family or proto or flags or reuse_port or allow_broadcast:
            raise ValueError("socket modifier keyword arguments can not be used when sock is specified.")
        entry = plane.find_entry(sock) or plane.registry.adopt(sock, name=name or default_name(sock), until=until)
    elif remote_addr is not None or local_addr is None:
        options: dict[str, Any] = {"family": family, "proto": proto, "flags": flags}
        options |= {"reuse_port": reuse_port, "allow_broadcast": allow_broadcast}
        connect = ungated(loop, "create_datagram_endpoint")
        created: tuple[asyncio.DatagramTransport, P]
        created = await connect(protocol_factory, local_addr, remote_addr, **options)
        return created
    elif family == socket.AF_UNIX:
        if not isinstance(local_addr, str):
            raise TypeError("string is expected")
        entry = plane.registry.obtain(Unix(local_addr, Kind.UNIX_DATAGRAM), name=name, until=until)
    else:
        if not isinstance(local_addr, tuple):
            raise TypeError("2-tuple is expected")
        found = await loop.getaddrinfo(*local_addr, family=family, type=socket.SOCK_DGRAM, proto=proto, flags=flags)
        host, port = numeric(found[0][4])
        entry = plane.registry.obtain(
            Internet(host, port, is_datagram=True, reuse_port=bool(reuse_port)), name=name, until=until
        )
    if allow_broadcast:
        entry.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    endpoint = None
    try:
        protocol = protocol_factory()
        endpoint = DatagramEndpoint(plane, entry, protocol)
        protocol.connection_made(endpoint)
        await plane.gate.add(endpoint)
        if plane.task_group is not None:
            plane.task_group.start_soon(endpoint.close_at_the_end)
    except BaseException:
        if endpoint is not None:
            endpoint.abort()
        elif entry in plane.registry.entries:
            plane.registry.release(entry)
        raise
    return endpoint, protocol


def is_service(plane: DataPlane, local_addr: object, remote_addr: object, sock: socket.socket | None) -> bool:
    """Say whether an endpoint that some library asks its loop for serves, or is a client of others.

    Clients (of a name server, of statsd) use no port, or one of the kernel's choice, and have to read at once. Unix
    sockets of clients and of services look alike: the service's have to be registered.
    """
    if sock is not None:
        return plane.find_entry(sock) is not None
    return remote_addr is None and isinstance(local_addr, tuple) and local_addr[1] not in (0, None, "0", "")


class DatagramEndpoint(asyncio.DatagramTransport, Acceptor):
    """A datagram transport on a duplicate of a registered socket, for asyncio and uvloop alike."""

    def __init__(self, plane: DataPlane, entry: Entry, protocol: asyncio.DatagramProtocol) -> None:
        self.entry = entry
        self._plane = plane
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        # The protocol is called in the context of the code that made it, whichever task opens the gate.
        self._context = contextvars.copy_context()
        self._max_datagram = largest_datagram(entry)
        self._sock = socket.socket(fileno=os.dup(entry.sock.fileno()))
        sockname = self._sock.getsockname()
        super().__init__({"socket": TransportSocket(self._sock), "sockname": sockname, "peername": None})
        self._is_reading = False
        self._is_closing = False
        self._lost = asyncio.Event()
        self._is_writing_paused = False
        self._queue: deque[tuple[bytes, Any]] = deque()
        self._queue_size = 0
        self.set_write_buffer_limits()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.entry.name}>"

    # The acceptor

    async def open(self) -> None:
        if not self._is_closing:
            self._is_reading = True
            self._context.run(self._loop.add_reader, self._sock.fileno(), self._read)

    async def pause(self) -> None:
        # Each datagram goes to the protocol in the turn in which it is read: there is nothing to wait for.
        self._stop_reading()

    async def end(self) -> None:
        self._stop_reading()

    async def close_at_the_end(self) -> None:
        """Close at the end of the ``Ecdysis`` block, if the application has not; last replies go out until then."""
        try:
            with confining_cancellation():
                await self._lost.wait()
        finally:
            # The registered socket is left to the `Ecdysis`, which knows whether a path has to be removed.
            self._is_closing = True
            self._stop_reading()
            self._loop.call_soon(self._lose)

    # The transport

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send a datagram, or queue it while the kernel has no room; errors go to ``error_received``."""
        if self._is_closing:
            return
        if not self._queue:
            try:
                self._send(data, addr)
            except BlockingIOError:
                self._flush_later()
            except OSError as error:
                self._protocol.error_received(error)
                return
            else:
                return
        # A copy, because the application may go on using its buffer.
        self._queue.append((bytes(data), addr))
        self._queue_size += len(data) + HEADER_BYTES
        if self._queue_size > self._high_water and not self._is_writing_paused:
            self._is_writing_paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """Stop reading and close the socket once the queue is sent."""
        if not self._is_closing:
            self._leave()
            if not self._queue:
                self._loop.call_soon(self._lose)

    def abort(self) -> None:
        """Close the socket and drop the queue."""
        self._queue.clear()
        self._queue_size = 0
        self.close()
        self._loop.call_soon(self._lose)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.DatagramProtocol)
        self._protocol = protocol

    def get_write_buffer_size(self) -> int:
        """Return how much waits to be sent, in bytes."""
        return self._queue_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and the high limit, in bytes."""
        return self._low_water, self._high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Say at how many bytes the protocol is told to pause, and at how many it may resume."""
        if high is None:
            high = HIGH_WATER if low is None else LOW_WATER_DIVISOR * low
        if low is None:
            low = high // LOW_WATER_DIVISOR
        if not 0 <= low <= high:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low_water, self._high_water = low, high

    def _read(self) -> None:
        for _ in range(READS_PER_TURN):
            # The protocol may close this between two datagrams.
            if not self._is_reading:
                return
            try:
                data, address = self._sock.recvfrom(self._max_datagram)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._protocol.error_received(error)
            else:
                self._protocol.datagram_received(data, address)

    def _send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if address is None:
            self._sock.send(data)
        else:
            self._sock.sendto(data, address)

    def _flush(self) -> None:
        if self._sock.fileno() == -1:
            # A timer has come to it, behind an abort.
            return
        while self._queue:
            data, address = self._queue.popleft()
            self._queue_size -= len(data) + HEADER_BYTES
            try:
                self._send(data, address)
            except BlockingIOError:
                self._queue.appendleft((data, address))
                self._queue_size += len(data) + HEADER_BYTES
                break
            except OSError as error:
                self._protocol.error_received(error)
        if self._is_writing_paused and self._queue_size <= self._low_water:
            self._is_writing_paused = False
            self._protocol.resume_writing()
        if self._queue:
            self._flush_later()
            return
        # A socket has room nearly always: watched on, it would keep the loop from ever coming to rest.
        self._loop.remove_writer(self._sock.fileno())
        if self._is_closing:
            self._loop.call_soon(self._lose)

    def _flush_later(self) -> None:
        if self.entry.kind is Kind.UDP:
            self._context.run(self._loop.add_writer, self._sock.fileno(), self._flush)
        else:
            self._context.run(self._loop.call_later, FULL_QUEUE_PAUSE_SECONDS, self._flush)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _leave(self) -> None:
        """Take the socket out of the gate, and out of the registry unless the generation is leaving."""
        self._is_closing = True
        self._stop_reading()
        self._plane.withdraw(self)

    def _lose(self) -> None:
        if self._sock.fileno() == -1:
            return
        self._loop.remove_writer(self._sock.fileno())
        try:
            self._protocol.connection_lost(None)
        finally:
            self._sock.close()
            self._lost.set()
