"""One client of the control socket: who it is, its one request, and what it is sent. Each message is a line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

import anyio

from ecdysis_async._system.descriptors import read_credentials

__all__ = ["ClientGone", "ControlConnection"]

MAX_REQUEST_BYTES = 64 * 1024

# How much of what a client calls itself stands in the log.
MAX_NAME = 200

# How long a client may take to read one answer, seconds.
ANSWER_SECONDS = 5.0

# socket(7), since Linux 6.5; the module socket does not have it.
SO_PEERPIDFD = 77


class ClientGone(Exception):
    """A client has left, or does not read. It will hear nothing more, and that is no fault of the service."""


class ControlConnection:
    """One connection, each of its messages a line of JSON.

    Attributes:
        sock: the connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def identify(self) -> tuple[int, int]:
        """Return the process that connected, and a new pidfd of it.

        Raises:
            ClientGone: it has ended. ValueError: it cannot be watched from here.
        """
        pid = read_credentials(self.sock).pid
        if pid == 0:
            raise ValueError("it is in another pid namespace (another container)")
        with contextlib.suppress(OSError):  # Linux before 6.5, or a peer that was reaped
            return pid, self.sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise ClientGone from error
        # The client was there after its number was looked up, so no other process has got the number.
        if self.has_left():
            os.close(pidfd)
            raise ClientGone("it has ended")
        return pid, pidfd

    def describe(self, by: object) -> str:
        """Say in words who asks: what the client says of itself, and the process that the kernel has seen.

        Args:
            by: what the client says.
        """
        name = by[:MAX_NAME] if isinstance(by, str) and by.isprintable() else "a command"
        credentials = read_credentials(self.sock)
        return f"{name} (pid {credentials.pid}, uid {credentials.uid})"

    def has_left(self) -> bool:
        """Say whether the client has closed its end, or said something more than its request."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_with(self, passed: socket.socket, event: str, **facts: Any) -> None:
        """Send the first message, for which there is room, and a duplicate of a socket with it.

        Raises:
            ClientGone: it has left.
        """
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
        try:
            socket.send_fds(self.sock, [line], [passed.fileno()])
        except OSError as error:
            raise ClientGone from error

    async def receive(self) -> Any:
        """Wait for its request: a line, or what it has said before the end of its stream.

        Raises:
            ValueError: it is no JSON, or too long. ClientGone: it has left without one.
        """
        line = bytearray()
        while b"\n" not in line:
            if len(line) > MAX_REQUEST_BYTES:
                raise ValueError(f"it is longer than {MAX_REQUEST_BYTES} bytes")
            try:
                data = self.sock.recv(MAX_REQUEST_BYTES)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
                continue
            except OSError as error:
                raise ClientGone from error
            if not data and not line:
                raise ClientGone("it left without a request")
            if not data:
                break
            line += data
        try:
            return json.loads(line.partition(b"\n")[0])
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    async def send(self, event: str, **facts: Any) -> None:
        """Send a message.

        Raises:
            ClientGone: it has left, or it does not read.

        Cancelled, half of it may be sent: nothing can follow.
        """
        rest = memoryview(json.dumps({"event": event, **facts}).encode() + b"\n")
        try:
            with anyio.fail_after(ANSWER_SECONDS):
                while rest:
                    try:
                        rest = rest[self.sock.send(rest) :]
                    except BlockingIOError:
                        await anyio.wait_writable(self.sock)
        except OSError as error:
            raise ClientGone from error
