"""systemd's end of the notification socket, for the tests of this wing."""

from __future__ import annotations

import os
import socket

import anyio


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.setblocking(False)
        self.barriers: list[int] = []

    async def hear(self) -> list[str]:
        """Wait for a message; return its lines. A barrier is kept until it is lifted."""
        await anyio.wait_readable(self.sock)
        message, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 4)
        self.barriers += descriptors
        return message.decode().split("\n")

    async def hear_until(self, line: str) -> list[str]:
        """Wait for a line that begins so; return all lines until then."""
        heard = await self.hear()
        while not heard[-1].startswith(line):
            heard += await self.hear()
        return heard

    def lift(self) -> None:
        """Answer the barriers."""
        while self.barriers:
            os.close(self.barriers.pop())

    def close(self) -> None:
        self.lift()
        self.sock.close()
