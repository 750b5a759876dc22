"""Descriptors that are kept for the moment in which none is left, and a restart is the remedy."""

from __future__ import annotations

import os

from .descriptors import close_all

__all__ = ["Reserve"]

# What a predecessor opens for a handoff: a channel and a pipe, what it sends, the pidfds and counters of its successor,
# a way for its connections, the command's own, and some to spare.
RESERVED = 20


class Reserve:
    """Descriptors that lead nowhere, and are closed where others are needed.

    Clients, or a leak in the application, may use up all that this process may have. Nothing could be opened then to
    start a successor, which would begin with a clean table.

    Once they are given up, the application may take them as well. So that is done right before the restart opens what
    it needs.

    Args:
        size: how many.
    """

    def __init__(self, size: int = RESERVED) -> None:
        self._size = size
        self._descriptors: list[int] = []

    def fill(self) -> None:
        """Keep as many descriptors as can be had, up to the size."""
        try:
            while len(self._descriptors) < self._size:
                self._descriptors.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            # None is left, or there is no such device: what there is has to do.
            return

    def give_up(self) -> None:
        """Let others have them; harmless if done already."""
        close_all(self._descriptors)
        self._descriptors.clear()
