"""Processes whose parent has ended become children of the test, which waits for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Make this process their parent for a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    for switch in (1, 0):
        assert libc.prctl(PR_SET_CHILD_SUBREAPER, switch, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
        if switch:
            yield
