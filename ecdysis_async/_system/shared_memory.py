"""Memory that has a descriptor, which other processes can be given."""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

__all__ = ["LastWord", "make_memory"]

# The place of the newest record, and its length.
_HEAD: Final = struct.Struct("@QQ")
# Where records stand, in turns. What is not written takes no memory.
_PLACES: Final = (1 << 12, 1 << 24)


def make_memory(name: str) -> int:
    """Return a descriptor of new memory, which is the caller's.

    Args:
        name: what /proc shows of it.

    Raises:
        OSError: there is none to be had.
    """
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:
        # A sandbox denies it, or the platform does not have it. A file without a name does as well.
        if isinstance(error, OSError) and error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        # Imported here, because it is for sandboxes alone.
        import tempfile

        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


class LastWord:
    """A record in memory that another process reads when this one is dead, killed in whatever moment.

    Args:
        descriptor: of the memory; it is taken over.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._turns = 0

    @classmethod
    def make(cls) -> LastWord:
        """Return one in new memory.

        Raises:
            OSError: there is none to be had.
        """
        return cls(make_memory("ecdysis-last-word"))

    def write(self, record: bytes) -> None:
        """Put a record in the place of the one before it, which is there until this one is complete.

        Raises:
            OSError: that is not possible; the one before it stands.
        """
        place = _PLACES[self._turns % len(_PLACES)]
        if os.pwrite(self.descriptor, record, place) < len(record):
            raise OSError(errno.ENOSPC, "the record is cut short")
        os.pwrite(self.descriptor, _HEAD.pack(place, len(record)), 0)
        self._turns += 1

    def read(self) -> bytes:
        """Return the newest record; empty where there is none.

        Raises:
            OSError: it cannot be read.
        """
        head = os.pread(self.descriptor, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            return b""
        place, length = _HEAD.unpack(head)
        return os.pread(self.descriptor, length, place)

    def close(self) -> None:
        """Let go of the memory; harmless if done already."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
