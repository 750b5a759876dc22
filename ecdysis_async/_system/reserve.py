"""Descriptors that are kept for the moment in which none is left, and a restart is the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from .descriptors import close_all

__all__ = ["Reserve"]

# What a predecessor opens for a handoff: a channel and a pipe, what it sends, the pidfds and counters of its successor,
# a way for its connections, the command's own, and some to spare.
RESERVED = 20

T = TypeVar("T")


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
        self._has_lent = False

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
        self._has_lent = False

    def open(self, make: Callable[[], T]) -> T:
        """Open something that is closed again soon, by what is kept here where no other descriptor is left.

        Call :meth:`take_back` once it is closed.

        Args:
            make: opens it.

        Raises:
            OSError: it cannot be opened.
        """
        try:
            return make()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._descriptors:
                raise
        self.give_up()
        self._has_lent = True
        try:
            return make()
        finally:
            self.fill()

    def take_back(self) -> None:
        """Keep again what :meth:`open` has lent, as far as nobody else has taken it; harmless if nothing was lent."""
        if self._has_lent:
            self.fill()
            self._has_lent = len(self._descriptors) < self._size
