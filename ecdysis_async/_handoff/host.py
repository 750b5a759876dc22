"""What a predecessor asks of the process that it hands over.

That is a generation, which accepts, or an anchor, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry

__all__ = ["AcceptingHost", "Host"]


class Host(Protocol):
    """The process that a predecessor's side of a restart runs in."""

    @property
    def registry(self) -> Registry:
        """The sockets that the successor inherits."""

    @property
    def connections(self) -> int:
        """How many connections are open, all of which may be passed on."""

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        """Accept no more, but from the sockets to spare, which nobody else listens on."""

    async def resume(self) -> None:
        """Accept again.

        Raises:
            OSError: that is not possible now, and may be tried again.
        """

    def hurry(self) -> None:
        """Let the deadline of the drain be now."""


class AcceptingHost:
    """A generation that accepts through a data plane.

    Args:
        plane: its sockets, its gate and its connections.
    """

    def __init__(self, plane: DataPlane) -> None:
        self.registry = plane.registry
        self._gate = plane.gate
        self._tracker = plane.tracker

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._tracker)

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        """Accept no more, but from the sockets to spare."""
        await self._gate.pause(spare=spare)

    async def resume(self) -> None:
        """Accept again; an ``OSError`` says that it is not possible now."""
        await self._gate.open()

    def hurry(self) -> None:
        """Let the deadline of the drain be now."""
        self._tracker.hurry()
