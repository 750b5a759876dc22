"""How connections of other people's HTTP servers move to a successor, as far as their structure lets them.

Between two requests a connection of HTTP/1.1 is like one that was just accepted: nothing of it is in user space but
what a server shows, or hides. A connection that was never read from moves with every server: the kernel tells.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from typing import Any, Final

from ecdysis_async._accepting.asyncio_connections import (
    ProtocolFactory,
    ServerConnection,
    TransferStrategy,
)
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Refused, Release

__all__ = ["IDLE", "WEBSOCKET", "UnreadOnly", "count_unread", "will_move"]

IDLE: Final = "http/1.1"
"""The kind of a connection that moves between two requests; any server of HTTP/1.1 goes on with it."""

WEBSOCKET: Final = "websocket"
"""The kind of a WebSocket that moves between two messages."""

# struct tcp_info of linux/tcp.h: how many bytes were received, in the order and with the alignment of this machine.
TCP_INFO_BYTES = 136
BYTES_RECEIVED = 128


class UnreadOnly(TransferStrategy):
    """Moves connections that were never read from.

    Args:
        protocol_factory: makes the protocol that goes on with a connection.
    """

    moves_between_requests = False

    def __init__(self, protocol_factory: ProtocolFactory) -> None:
        self._make = protocol_factory

    def pack(self, connection: ServerConnection, protocol: Any) -> Release | None:
        return Release(kind=IDLE) if _is_unread(connection.fileno()) else None

    def resume(self, release: Release) -> asyncio.BaseProtocol:
        if release.kind != IDLE:
            raise Refused(f"this server does not go on with connections of the kind {release.kind!r}")
        return self._make()


def will_move() -> bool:
    """Say whether the connection of the running request moves to a successor when it is answered.

    Then there is nothing to say goodbye for.
    """
    connection = current_connection.get()
    return isinstance(connection, ServerConnection) and connection.will_move


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
    return bool(received == count_unread(descriptor))


def count_unread(descriptor: int) -> int:
    """Return how many bytes the kernel has received of a connection, and its server has not read.

    Raises:
        OSError: it is no socket, or is closed.
    """
    (waiting,) = struct.unpack("@i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(waiting)
