"""Locks that one process of a service holds at a time, arbitrated by the kernel.

All processes of a service, of all workers and generations, have the same file open. Each name has a place in
that file, and a record lock (fcntl(2)) on that place belongs to one process. The kernel gives it back when the process
ends, however it ends, so that there is nothing to be cleaned up, and no messenger whose death would matter. Unlike the
locks of flock(2), record locks are not inherited by forked children.

A process loses all of its record locks when it closes any descriptor of the file. So it has one descriptor, and never a
duplicate.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from .claims import take_lock_file
from .descriptors import describe_place, open_place
from .shared_memory import make_memory

__all__ = ["LockFile"]

# How many bits a place in a file has: offsets are signed (off_t of 64 bits).
PLACE_BITS = 62
# What is said of a holder stands in one of so many places of so many bytes. Two names may have the same one.
RECORDS = 4096
RECORD_BYTES = 256

SUFFIX = ".exclusive"


class LockFile:
    """The file of a service's locks. Owns the descriptor.

    A name is any text. Locks belong to this process: a second call for a name that this process holds succeeds.

    Attributes:
        is_new: whether this process has made the file: a service that does not come up takes it away again.
    """

    def __init__(self, descriptor: int, *, is_new: bool = False) -> None:
        self._descriptor = descriptor
        self.is_new = is_new

    @classmethod
    def make(cls, control_path: str | None = None) -> LockFile:
        """Return the file of a new service.

        Beside its control socket it has a name. There a service that is started anew finds it that was killed, and of
        which processes may be left that still hold something. Elsewhere, and where the directory is not to be written,
        it is memory.

        Args:
            control_path: of the control socket; None where there is none.

        Raises:
            OSError: there is no memory, or no descriptor, to be had.
        """
        if control_path is not None:
            path, flags = control_path + SUFFIX, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            with contextlib.suppress(OSError):
                return cls(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), is_new=True)
            with contextlib.suppress(OSError):
                descriptor = os.open(path, flags)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return cls(descriptor)
                os.close(descriptor)
        return cls(make_memory("ecdysis-locks"))

    def remove(self, control_path: str | None) -> None:
        """Remove the name of the file at the end of its service; harmless if it has none, or another file has it."""
        if control_path is not None and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._descriptor), os.lstat(control_path + SUFFIX)):
                    os.unlink(control_path + SUFFIX)

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
        descriptor = open_place(place, os.O_RDWR)
        return None if descriptor is None else cls(descriptor)

    def describe(self) -> list[int]:
        """Return where another process finds this file: for :meth:`open_of`."""
        return describe_place(self._descriptor)

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

        if self._descriptor < 0:
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _find_place(name))
        except OSError as error:
            # Another thread has closed the file in this moment, and with that the kernel has taken all locks back.
            if error.errno != errno.EBADF:
                raise

    def write(self, name: str, holder: Mapping[str, Any]) -> None:
        """Say something about the holder of a name, for those who wait; where that is not possible, nothing is said."""
        text = json.dumps({**holder, "place": _find_place(name)}).encode()[: RECORD_BYTES - 1]
        try:
            os.pwrite(self._descriptor, text + b"\0", _find_record(name))
        # The limit of the size of files (RLIMIT_FSIZE), or no memory: the lock holds all the same.
        except OSError:
            return

    def read(self, name: str) -> dict[str, Any]:
        """Return what the holder of a name has said last of itself; nothing where it has not."""
        try:
            holder = json.loads(os.pread(self._descriptor, RECORD_BYTES, _find_record(name)).partition(b"\0")[0])
            return dict(holder) if holder.pop("place") == _find_place(name) else {}
        # Nothing is said, or it is cut short, or of another name.
        except (AttributeError, KeyError, OSError, TypeError, ValueError):
            return {}

    def close(self) -> None:
        """Close the file, and with it give all locks back; harmless if done already."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _find_place(name: str) -> int:
    # Imported here, because the commands have no need of it.
    import hashlib

    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - PLACE_BITS)


def _find_record(name: str) -> int:
    return _find_place(name) % RECORDS * RECORD_BYTES
