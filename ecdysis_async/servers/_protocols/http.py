"""How the connections of other people's servers move to a successor, as far as their structure lets them.

Between two requests a connection of HTTP/1.1 is like one that was just accepted: nothing of it is in user space but
what a server shows, or hides. Whoever has read no byte yet moves with every server: the kernel says so.
"""

from __future__ import annotations

import abc
import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Collection, Iterator
from typing import Any, Final

from ecdysis_async._accepting.asyncio_servers import GatedServer, ServerConnection, TransferStrategy
from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Acceptor
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Refused, Release

__all__ = ["IDLE", "WEBSOCKET", "SelfMoving", "UnreadOnly", "let_fresh_ones_move", "servers_but", "will_move"]

IDLE: Final = "http/1.1"
"""The kind of what moves between two requests; any server of HTTP/1.1 goes on with it."""

WEBSOCKET: Final = "websocket"
"""The kind of what moves between two messages of a WebSocket."""

# struct tcp_info of linux/tcp.h: how many bytes were received, in the order and with the alignment of this machine.
TCP_INFO_BYTES = 136
BYTES_RECEIVED = 128


class SelfMoving(abc.ABC):
    """A protocol that knows itself whether it can move."""

    @abc.abstractmethod
    def release(self) -> Release | None:
        """Give the connection away, or return None where that is impossible at this moment."""

    @abc.abstractmethod
    def keep(self) -> None:
        """Go on with a connection that was given away, and not taken."""


class UnreadOnly(TransferStrategy):
    """Connections that nobody has read from."""

    # Whether it also moves connections that have had a response.
    keeps_alive = False

    def __init__(self, server: GatedServer) -> None:
        self._make = server.protocol_factory

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        return Release(kind=IDLE) if _is_unread(connection.fileno()) else None

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind != IDLE:
            raise Refused(f"this server does not go on with connections of the kind {release.kind!r}")
        return self._make()


def servers_but(plane: DataPlane, others: Collection[Acceptor]) -> Iterator[GatedServer]:
    """Return all servers but the other ones, each once for every socket."""
    for acceptor in plane.gate.acceptors:
        server = getattr(acceptor, "server", None)
        if acceptor not in others and isinstance(server, GatedServer):
            yield server


def let_fresh_ones_move(plane: DataPlane, others: Collection[Acceptor]) -> None:
    """Let connections move, as long as nobody has read from them, of all servers but the other ones."""
    for server in servers_but(plane, others):
        server.moves = UnreadOnly(server)


def will_move() -> bool:
    """Say whether the connection of the running request moves to a successor when it is answered.

    Then there is nothing to say goodbye for.
    """
    connection = current_connection.get()
    if not isinstance(connection, ServerConnection) or connection.refused or not connection.server.plane.tracker.moves:
        return False
    moves = connection.server.moves
    return connection.movable and (not isinstance(moves, UnreadOnly) or moves.keeps_alive)


def _is_unread(descriptor: int) -> bool:
    """Say whether no byte of a TCP connection was read yet; a peer that has sent its end counts as read."""
    with socket.socket(fileno=descriptor) as sock:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:
            # A Unix socket: the kernel does not count.
            return False
        finally:
            sock.detach()
    if len(info) < TCP_INFO_BYTES:
        return False
    (received,) = struct.unpack_from("@Q", info, BYTES_RECEIVED)
    (waiting,) = struct.unpack("@i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return bool(received == waiting)
