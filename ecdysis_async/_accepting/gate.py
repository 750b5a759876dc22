"""The gate: every acceptor of this generation opens, pauses and ends together, at the word of its ``Ecdysis``.

A data plane puts one :class:`Acceptor` per registered socket behind the gate and never decides by itself when to
accept. So one place guarantees that at most one generation accepts. Nothing here knows a loop.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import anyio

from ecdysis_async._connections.parcel import ConnectionResumer
from ecdysis_async._sockets.entry import Entry

__all__ = ["Acceptor", "Gate", "GateState"]


class GateState(enum.Enum):
    """Whether this generation may take connections from its sockets."""

    CLOSED = "closed"  # before the commit, or paused: new connections wait in the kernel's queue
    OPEN = "open"  # between commit and pause
    ENDED = "ended"  # accepting is over in this process for good


class Acceptor(abc.ABC):
    """Takes connections, or datagrams, from one registered socket.

    ``open`` and ``pause`` alternate, beginning with ``open``. ``end`` comes last, once, after a ``pause`` or before the
    first ``open``. There is one exception: the application may close its server while that is being opened. Then
    ``end`` comes during ``open``, which has to leave nothing open.
    """

    entry: Entry
    # What resumes connections that the predecessor has accepted from this socket; None where nothing can.
    resumer: ConnectionResumer | None = None

    @abc.abstractmethod
    async def open(self) -> None:
        """Begin to accept. The entry's socket is listening already."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop accepting; return once everything that user space has accepted is attached to its handler.

        Its caller shields it from cancellation: it has to finish.
        """

    @abc.abstractmethod
    async def end(self) -> None:
        """Accepting is over for good: let go of duplicates, and wake the tasks that wait for a next connection."""


class Gate:
    """All acceptors of one generation."""

    def __init__(self) -> None:
        self.state = GateState.CLOSED
        self._is_forbidden = False
        self._acceptors: list[Acceptor] = []
        self._open: set[Acceptor] = set()
        # The acceptors whose `open` runs at this moment, in any task. A pause waits for them: an acceptor that it
        # overlooked would go on accepting next to the successor.
        self._opening: dict[Acceptor, anyio.Event] = {}

    @property
    def acceptors(self) -> tuple[Acceptor, ...]:
        """The acceptors that were added and not ended, in the order they came."""
        return tuple(self._acceptors)

    @property
    def open_acceptors(self) -> AbstractSet[Acceptor]:
        """The acceptors that accept at this moment."""
        return self._open

    def find_resumer(self, name: str) -> ConnectionResumer | None:
        """Return what resumes connections of the listener of a name; None where there is no such thing."""
        found = (each.resumer for each in self._acceptors if each.entry.name == name and each.resumer is not None)
        return next(found, None)

    async def add(self, acceptor: Acceptor) -> None:
        """Put an acceptor behind the gate; it is opened at once where the gate stands open.

        Where accepting is over already, it is ended at once.
        """
        if self.state is GateState.ENDED:
            await acceptor.end()
            return
        self._acceptors.append(acceptor)
        if self.state is GateState.OPEN:
            await self.open_one(acceptor)

    async def remove(self, acceptor: Acceptor) -> None:
        """Take out one acceptor, because the application closed its server."""
        if acceptor in self._acceptors:
            self._acceptors.remove(acceptor)
            # An acceptor that is being opened is not waited for: the close of a server cannot wait.
            await self._pause_open(acceptor)
            await acceptor.end()

    async def open(self) -> None:
        """Begin to accept on every socket, for the first time or after a pause; open acceptors stay as they are.

        Accepting that is over for good stays over.
        """
        if self.state is GateState.ENDED or self._is_forbidden:
            return
        self.state = GateState.OPEN
        for acceptor in self.acceptors:
            # The gate may have been paused while the acceptor before was opened.
            if self.state is GateState.OPEN:
                await self.open_one(acceptor)

    async def pause(self, *, spare: Callable[[Entry], bool] | None = None) -> None:
        """Stop accepting, except on the entries that ``spare`` names, which stay open and can be paused later."""
        if self.state is GateState.OPEN:
            self.state = GateState.CLOSED
        for acceptor in self.acceptors:
            await self._wait_opened(acceptor)
            if spare is None or not spare(acceptor.entry):
                await self._pause_open(acceptor)

    def forbid(self) -> None:
        """Let :meth:`open` do nothing any more, for good; what is open stays so until :meth:`end`."""
        self._is_forbidden = True

    async def end(self, *, spare: Callable[[Entry], bool] | None = None) -> None:
        """Pause, and let go of every acceptor that ``spare`` does not name; of all of them at the last call."""
        await self.pause(spare=spare)
        self.state = GateState.ENDED
        for acceptor in self.acceptors:
            if acceptor not in self._open:
                self._acceptors.remove(acceptor)
                await acceptor.end()

    async def open_one(self, acceptor: Acceptor) -> None:
        """Begin to accept on one socket, unless it is accepted on already."""
        await self._wait_opened(acceptor)
        # The application may have removed this acceptor, and closed its socket, while others were opened.
        if acceptor not in self._acceptors or acceptor in self._open:
            return
        opened = self._opening[acceptor] = anyio.Event()
        try:
            acceptor.entry.start_listening()
            await acceptor.open()
            if acceptor in self._acceptors:
                self._open.add(acceptor)
        finally:
            del self._opening[acceptor]
            opened.set()

    async def pause_one(self, acceptor: Acceptor) -> None:
        """Stop accepting on one socket."""
        await self._wait_opened(acceptor)
        await self._pause_open(acceptor)

    async def _wait_opened(self, acceptor: Acceptor) -> None:
        while acceptor in self._opening:
            await self._opening[acceptor].wait()

    async def _pause_open(self, acceptor: Acceptor) -> None:
        if acceptor in self._open:
            await acceptor.pause()
            self._open.discard(acceptor)
