"""Something that changes again and again, and those who wait for the next change."""

from __future__ import annotations

import anyio

__all__ = ["Changes"]


class Changes:
    """Something that changes again and again."""

    def __init__(self) -> None:
        self._next = anyio.Event()

    def announce(self) -> None:
        """Wake those who wait for the next change."""
        self._next.set()
        self._next = anyio.Event()

    def next(self) -> anyio.Event:
        """Return what will be set at the next change; ask before looking, and no change is missed."""
        return self._next
