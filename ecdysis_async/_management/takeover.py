"""The newcomer's side of a takeover: a process that no generation has started asks one for its sockets.

The answer on the control socket carries one end of a channel. From there on the newcomer is a successor like any other.
What the running service does about it is in ``control_server.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import time
from typing import Any

from ecdysis_async._system.descriptors import read_credentials
from ecdysis_async.errors import TakeoverFailed

__all__ = ["FormerService", "ask_for_channel"]

# How long the running service may take to answer, seconds.
ANSWER_SECONDS = 15.0
MAX_ANSWER_BYTES = 64 * 1024

# The connections of a dying process end a moment before its pidfd is readable, milliseconds.
DEATH_GRACE_MILLISECONDS = 1000


class FormerService:
    """Watches the process that listens on a control socket, from before it is asked for anything.

    Args:
        path: the control socket.

    Raises:
        TakeoverFailed: nobody listens there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_SECONDS)
            _connect(sock, path)
            credentials = read_credentials(sock)
        self.pid = credentials.pid
        self._is_supervised = _is_supervised(self.pid)
        self._pidfd = -1
        # Processes of another namespace have no pid here; such a service is asked, and cannot be watched.
        if self.pid > 0 and credentials.uid in (0, os.geteuid()):
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(self.pid)

    def has_died(self) -> bool:
        """Say whether the process was ended by force, so that nobody but this process is there to follow it.

        One that was stopped has taken its control socket away. One that systemd watches is started again by systemd.
        """
        if self._pidfd < 0 or self._is_supervised or not os.path.exists(self._path):
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(DEATH_GRACE_MILLISECONDS))

    def close(self) -> None:
        """Watch no more."""
        if self._pidfd >= 0:
            os.close(self._pidfd)


def _is_supervised(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(each.startswith(b"NOTIFY_SOCKET=") for each in file.read().split(b"\0"))
    except OSError:
        return False


def _connect(sock: socket.socket, path: str) -> None:
    try:
        sock.connect(path)
    except OSError as error:
        raise TakeoverFailed(
            f"there is no service to take over: {path}: {error.strerror or error}. Start this one without "
            "takeover, or name the control socket of the running one"
        ) from error


def ask_for_channel(path: str, *, anchor: int | None = None) -> socket.socket:
    """Ask the service with a control socket to hand over; return the channel to it. It blocks: call it in a thread.

    Args:
        path: the control socket.
        anchor: for a whole anchor, the format in which this process reads its state (``_anchor/takeover.py``).

    Raises:
        TakeoverFailed: nobody is there, or the service refuses; nothing has changed then.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_SECONDS)
        _connect(sock, path)
        if (uid := read_credentials(sock).uid) not in (0, os.geteuid()):
            raise TakeoverFailed(
                f"what listens on {path} belongs to uid {uid}: this process takes over from root and from its own "
                f"user, uid {os.geteuid()}, only, whose word it can believe"
            )
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            # The service may refuse before it has read anything. What it has said is there to be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(json.dumps({"command": "takeover", "anchor": anchor}).encode() + b"\n")
            return _receive(sock, path, deadline)
        except TimeoutError as error:
            raise TakeoverFailed(
                f"the service at {path} has not answered within {ANSWER_SECONDS:g} seconds: it hangs, or is stopped"
            ) from error
        except OSError as error:
            raise TakeoverFailed(f"the service at {path} has left without an answer: {error}") from error


def _receive(sock: socket.socket, path: str, deadline: float) -> socket.socket:
    line = b""
    channel = -1
    try:
        while not line.endswith(b"\n"):
            # One deadline for all of it, however slowly it comes.
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            sock.settimeout(left)
            # The descriptor comes with the first byte of the line it belongs to.
            data, descriptors, _, _ = socket.recv_fds(sock, MAX_ANSWER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            for descriptor in descriptors:
                if channel >= 0:
                    os.close(channel)
                channel = descriptor
            if not data or len(line) > MAX_ANSWER_BYTES:
                raise TakeoverFailed(f"the service at {path} has left without an answer; its log says why")
            line += data
        match _read(line):
            case {"event": "accepted"} if channel >= 0 and stat.S_ISSOCK(os.fstat(channel).st_mode):
                taken, channel = channel, -1
                return socket.socket(fileno=taken)
            case {"event": "failed" | "error", "message": str(message)}:
                raise TakeoverFailed(f"the service at {path} does not hand over: {message}")
            case _:
                raise TakeoverFailed(f"whoever listens on {path} is no service of this library")
    finally:
        if channel >= 0:
            os.close(channel)


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (RecursionError, ValueError):
        return None
