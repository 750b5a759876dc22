"""Locks that one process of a service holds at a time, arbitrated by the kernel.

All processes of a service, of all workers and generations, have the same nameless file open. Each name has a place in
that file, and a record lock (fcntl(2)) on that place belongs to one process. The kernel gives it back when the process
ends, however it ends, so that there is nothing to be cleaned up, and no messenger whose death would matter. Unlike the
locks of flock(2), record locks are not inherited by forked children.

A process loses all of its record locks when it closes any descriptor of the file. So it has one descriptor, and never a
duplicate.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from .claims import take_lock_file
from .shared_memory import make_memory

__all__ = ["LockFile"]

# The places of two names are so far apart. One holds what is said of the holder.
PLACE_BYTES = 4096
# How many places there are, in bits: as many as a file may have without its size being too large.
PLACE_BITS = 40


class LockFile:
    """The file of a service's locks. Owns the descriptor.

    A name is any text. Locks belong to this process: a second call for a name that this process holds succeeds.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def make(cls) -> LockFile:
        """Return the file of a new service.

        Raises:
            OSError: there is no memory, or no descriptor, to be had.
        """
        return cls(make_memory("ecdysis-locks"))

    @classmethod
    def inherit(cls) -> LockFile | None:
        """Return the file that the process was passed that has started this one; None where it was passed none."""
        descriptor = take_lock_file()
        return cls(descriptor) if descriptor is not None else None

    @classmethod
    def open_of(cls, place: Sequence[int]) -> LockFile | None:
        """Return the file of another process of this service; None where it is gone, or may not be opened.

        Args:
            place: what that process has described; empty where it has none.
        """
        try:
            pid, number, device, inode = map(int, place)
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return None
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) != (device, inode) or not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            return None
        return cls(descriptor)

    def describe(self) -> list[int]:
        """Return where another process finds this file: for :meth:`open_of`."""
        found = os.fstat(self._descriptor)
        return [os.getpid(), self._descriptor, found.st_dev, found.st_ino]

    def fileno(self) -> int:
        """Return the descriptor, to be passed to a child; -1 once it is closed."""
        return self._descriptor

    def try_lock(self, name: str) -> bool:
        """Take the lock of a name, if no other process has it."""
        import fcntl

        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _find_place(name))
        except (BlockingIOError, PermissionError):  # EAGAIN, EACCES: fcntl(2) allows both
            return False
        return True

    def lock(self, name: str) -> None:
        """Take the lock of a name. It blocks for as long as another process has it: call it in a thread.

        Raises:
            OSError: the kernel takes the waiting for a deadlock (EDEADLK), or has no room for more locks. It does not
                know that tasks of one process wait independently.
        """
        # Imported where it is used, because there are platforms without it, on which nothing is restarted.
        import fcntl

        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, _find_place(name))

    def unlock(self, name: str) -> None:
        """Give the lock of a name back; harmless if this process does not have it, or the file is closed."""
        import fcntl

        if self._descriptor >= 0:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _find_place(name))

    def write(self, name: str, holder: Mapping[str, Any]) -> None:
        """Say something about the holder of a name, for those who wait; where that is not possible, nothing is said."""
        text = json.dumps(holder).encode()[: PLACE_BYTES - 1]
        try:
            os.pwrite(self._descriptor, text + b"\0", _find_place(name))
        # The limit of the size of files (RLIMIT_FSIZE), or no memory: the lock holds all the same.
        except OSError:
            return

    def read(self, name: str) -> dict[str, Any]:
        """Return what the holder of a name has said last of itself; nothing where it has not."""
        try:
            text = os.pread(self._descriptor, PLACE_BYTES, _find_place(name)).partition(b"\0")[0]
            holder = json.loads(text) if text else {}
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def close(self) -> None:
        """Close the file, and with it give all locks back; harmless if done already."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _find_place(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - PLACE_BITS)) * PLACE_BYTES
