"""How much memory this process uses."""

from __future__ import annotations

import contextlib
import functools
import os

__all__ = ["resident_bytes"]


@functools.cache
def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int | None:
    """Return how much memory this process has resident, shared pages included (proc_pid_statm(5)); None if unknown."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _page_size()
    return None
