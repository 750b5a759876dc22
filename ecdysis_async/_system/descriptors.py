"""The descriptors 0, 1 and 2, which a daemon may have closed before it started this process."""

from __future__ import annotations

import contextlib
import os

__all__ = ["occupy_standard_descriptors"]

STDERR = 2


def occupy_standard_descriptors() -> None:
    """Let those that are closed lead to nothing: call it before a loop, or anything else, opens descriptors.

    The kernel gives the lowest number that is free. A pipe of the loop's own that became number 2 would be handed to
    successors as the stderr of the service, and each of their log lines be read from it as a signal's number.
    """
    with contextlib.suppress(OSError):  # none can be had, or there is no such device
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
