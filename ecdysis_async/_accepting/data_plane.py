"""The data plane of a generation: its sockets, the gate before them, its connections, and where to find all that.

The ``Ecdysis`` of the process activates its data plane; listeners and gated loops ask for it. Nothing here accepts,
waits, or decides anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry

from .gate import Acceptor, Gate, GateState
from .readiness import Readiness

__all__ = ["DataPlane", "activate", "active", "deactivate"]


@dataclass(frozen=True, slots=True, eq=False)
class DataPlane:
    """The sockets of one generation, the gate before them, and the connections behind it.

    Attributes:
        registry: the sockets.
        gate: what opens and pauses them.
        tracker: what was accepted from them.
        task_group: where handlers run that outlive the accepting; it lives to the end of the ``Ecdysis`` block.
            Without one, handlers live as long as the call that serves them.
        readiness: which of its servers are still getting ready.
    """

    registry: Registry
    gate: Gate
    tracker: Tracker
    task_group: TaskGroup | None = None
    readiness: Readiness = field(default_factory=Readiness)

    def find_entry(self, sock: socket.socket) -> Entry | None:
        """Find the entry of a socket, or of a duplicate of it: servers that are given a descriptor make one."""
        wanted = os.fstat(sock.fileno())
        for entry in self.registry.entries:
            if os.path.samestat(os.fstat(entry.sock.fileno()), wanted):
                return entry
        return None

    def withdraw(self, acceptor: Acceptor) -> None:
        """Close the socket of an acceptor that has stopped, because the application wants no more of it.

        Once the generation is leaving, its sockets belong to the ``Ecdysis``: a path may have to be removed.
        """
        is_leaving = self.gate.state is GateState.ENDED or self.tracker.draining.is_set()
        # The close of a transport, or of a server, cannot wait. This call does not wait: there is nothing to pause.
        with contextlib.suppress(StopIteration):
            self.gate.remove(acceptor).send(None)
        if not is_leaving:
            self.registry.release(acceptor.entry)


# The plane, and the event loop that it belongs to: gate and tracker must not be used from another loop.
_active: tuple[DataPlane, EventLoopToken] | None = None


def activate(plane: DataPlane) -> None:
    """Make a plane the plane of this process, for the code that runs on this event loop.

    Raises:
        RuntimeError: there is a plane already.
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
        LookupError: there is no plane now, or none on this event loop.
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
