"""The plane: what every data plane needs of the supervisor, and where to find it in this process.

The supervisor activates the one plane of the process; listeners and gated loops ask for it. Nothing here accepts,
waits, or decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.registry import Registry

from .gate import Gate

__all__ = ["DataPlane", "activate", "active", "deactivate"]


@dataclass(frozen=True, slots=True, eq=False)
class DataPlane:
    """The sockets of one generation, the gate before them, and the connections behind it.

    Attributes:
        registry: the sockets.
        gate: what opens and pauses them.
        tracker: what was accepted from them.
        task_group: where handlers run that outlive the accepting; it lives to the end of the ``Ecdysis`` block.
            Without one, handlers live as long as whoever serves them.
    """

    registry: Registry
    gate: Gate
    tracker: Tracker
    task_group: TaskGroup | None = None


# With the event loop that it belongs to: gate and tracker must not be used from another one.
_active: tuple[DataPlane, EventLoopToken] | None = None


def activate(plane: DataPlane) -> None:
    """Make a plane the one of this process, for those who run on this event loop.

    Raises:
        RuntimeError: there is one already.
    """
    global _active
    if _active is not None:
        raise RuntimeError("this process has an Ecdysis already: enter one at a time, and share it (current())")
    _active = plane, current_token()


def deactivate() -> None:
    """Leave this process without a plane; harmless if it has none."""
    global _active
    _active = None


def active() -> DataPlane:
    """Return the plane of this process.

    Raises:
        LookupError: there is none now, or none on this event loop.
    """
    if _active is None:
        raise LookupError("no Ecdysis runs in this process: do this inside `async with Ecdysis() as ecdysis:`")
    plane, home = _active
    try:
        is_home = current_token() == home
    except anyio.NoEventLoopError:
        is_home = False
    if not is_home:
        raise LookupError("the Ecdysis of this process runs on another event loop: do this there")
    return plane
