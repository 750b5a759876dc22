"""File descriptors: sent and received over a Unix socket, closed, and the three that every process is given.

What is sent with them, and what it means, the callers know. Each descriptor that was received belongs to the caller.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "EXHAUSTED",
    "MAX_PER_MESSAGE",
    "Credentials",
    "DescriptorWriter",
    "Received",
    "close_all",
    "describe_place",
    "duplicate_all",
    "find_pid",
    "occupy_standard_descriptors",
    "open_place",
    "read_credentials",
    "receive_with_descriptors",
    "send_with_descriptors",
]

# SCM_MAX_FD of Linux (unix(7)): sendmsg fails with EINVAL beyond it, and so nothing received has more.
MAX_PER_MESSAGE = 253

# No descriptor, or no memory for one, is to be had now: the process or the machine is at a limit.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

STDERR = 2

# struct ucred of unix(7).
_CREDENTIALS = struct.Struct("@iII")


class Credentials(NamedTuple):
    """The process at the other end of a Unix socket, as the kernel saw it when the two were connected.

    Attributes:
        pid: its process id; 0 where it is in another pid namespace.
        uid: its effective user.
        gid: its effective group.
    """

    pid: int
    uid: int
    gid: int


class Received(NamedTuple):
    """What one call has received.

    Attributes:
        data: the bytes; none at the end of the stream.
        descriptors: what came with them; they are the caller's, and close-on-exec.
        lost_descriptors: whether the kernel has dropped descriptors (MSG_CTRUNC), most likely at RLIMIT_NOFILE. Those
            that came are the first ones.
        is_cut: whether the message was longer than what was asked for, and its rest is lost (MSG_TRUNC).
    """

    data: bytes
    descriptors: list[int]
    lost_descriptors: bool
    is_cut: bool


class DescriptorWriter:
    """Writes a message with any number of descriptors to a stream socket, in as many parts as these need.

    The kernel attaches at most ``MAX_PER_MESSAGE`` of them to one byte. So each batch goes with one byte, and the last
    batch with all bytes that are left. The message needs as many bytes as there are batches.
    """

    def __init__(self, data: bytes, descriptors: Sequence[int]) -> None:
        self._view = memoryview(data)
        self._batches = [
            descriptors[start : start + MAX_PER_MESSAGE] for start in range(0, len(descriptors), MAX_PER_MESSAGE)
        ]

    @property
    def is_done(self) -> bool:
        """Whether everything was written."""
        return not self._view

    def write(self, sock: socket.socket) -> None:
        """Write what the socket takes in one call.

        Raises:
            OSError: nothing was written, and it may be tried again.
        """
        chunk = self._view[:1] if len(self._batches) > 1 else self._view
        sent = send_with_descriptors(sock, chunk, self._batches[0] if self._batches else ())
        # What was written carried its whole batch: the kernel attaches it to the first byte.
        self._view = self._view[sent:]
        self._batches = self._batches[1:]


def send_with_descriptors(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
    """Send bytes, and duplicates of descriptors with the first byte; return how many bytes were sent.

    Raises:
        OSError: nothing was sent. ETOOMANYREFS: too many descriptors of this user are in flight (unix(7)).
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive_with_descriptors(sock: socket.socket, size: int, limit: int = MAX_PER_MESSAGE) -> Received:
    """Receive at most so many bytes, and what descriptors come with them.

    Linux merges messages of a stream into one read, but stops after one that carries descriptors
    (unix_stream_read_generic). So there is room for all that can come, and they may belong to the last of several
    messages.

    Raises:
        BlockingIOError: nothing is there; or the kernel has no memory now, and what is there can be had later.
        OSError: nothing was received.
    """
    room = socket.CMSG_SPACE(limit * array.array("i").itemsize)
    try:
        data, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        # recvmsg(2): ENOMEM. Nothing was taken off the queue.
        if error.errno in (errno.ENOMEM, errno.ENOBUFS):
            raise BlockingIOError(errno.EAGAIN, "the kernel has no memory to receive now") from error
        raise
    descriptors = array.array("i")
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # A truncated message may end within a descriptor.
            descriptors.frombytes(rights[: len(rights) - len(rights) % descriptors.itemsize])
    return Received(data, descriptors.tolist(), bool(flags & socket.MSG_CTRUNC), is_cut=bool(flags & socket.MSG_TRUNC))


def read_credentials(sock: socket.socket) -> Credentials:
    """Return who is at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    return Credentials(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def find_pid(pidfd: int) -> int | None:
    """Return the number of the process that a pidfd stands for; None if it is dead and reaped, or in another namespace.

    Raises:
        ValueError: the descriptor is no pidfd.
    """
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "Pid" not in fields:
        raise ValueError("this descriptor is no pidfd")
    pid = int(fields["Pid"])
    return pid if pid > 0 else None


def describe_place(descriptor: int) -> list[int]:
    """Return where another process of the same user finds what is open here: for :func:`open_place`."""
    found = os.fstat(descriptor)
    return [os.getpid(), descriptor, found.st_dev, found.st_ino]


def open_place(place: Sequence[int], flags: int) -> int | None:
    """Return a descriptor of the file that another process has open; None where it is gone, or may not be opened.

    Args:
        place: what that process has described; empty where it has none.
        flags: as of open(2).
    """
    try:
        pid, number, device, inode = map(int, place)
        descriptor = os.open(f"/proc/{pid}/fd/{number}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, TypeError, ValueError):
        return None
    found = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) != (device, inode) or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        return None
    return descriptor


def duplicate_all(descriptors: Iterable[int]) -> list[int]:
    """Return duplicates of descriptors, which are the caller's.

    Raises:
        OSError: there is no room for all of them, and none was made.
    """
    with contextlib.ExitStack() as made:
        duplicates = []
        for descriptor in descriptors:
            duplicates.append(os.dup(descriptor))
            made.callback(os.close, duplicates[-1])
        made.pop_all()
    return duplicates


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def occupy_standard_descriptors() -> None:
    """Let those of 0, 1 and 2 that are closed lead to nothing: call it before anything else opens descriptors.

    A daemon may have closed them before it started this process, and the kernel gives the lowest number that is free. A
    pipe of the loop's own that became number 2 would be handed to successors as the stderr of the service. Each of
    their log lines would then be read from it as a signal's number.
    """
    with contextlib.suppress(OSError):  # none can be had, or there is no such device
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
