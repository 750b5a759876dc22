"""How many connections wait in the kernel to be accepted: what tells that nobody accepts fast enough."""

from __future__ import annotations

import socket
import struct
import sys

__all__ = ["measure_backlog"]

# Where `tcpi_unacked` stands in `struct tcp_info` (linux/tcp.h): eight bytes, and four numbers of 32 bits, before it.
# Of a listening socket it holds how many connections wait (tcp_get_info in net/ipv4/tcp.c).
_UNACKED = struct.Struct("@24xI")


def measure_backlog(sock: socket.socket) -> int | None:
    """Return how many connections wait on a listening TCP socket; None where that cannot be told.

    Unix sockets have no such number but by netlink, which asks for a kernel module of its own.
    """
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    if sock.type != socket.SOCK_STREAM:
        return None
    try:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        return int(_UNACKED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED.size))[0])
    except (OSError, struct.error):
        return None
