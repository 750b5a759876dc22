"""Memory that has a descriptor, which other processes can be given."""

from __future__ import annotations

import errno
import os

__all__ = ["make_memory"]


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
