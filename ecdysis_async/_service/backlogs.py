"""Who waits in the kernel's queues when this generation stops accepting: answered here, where nobody else will.

Whether that is so the supervisor knows; and it holds the gate meanwhile (``Generation.gate_lock``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Acceptor
from ecdysis_async._handoff.generation import Generation
from ecdysis_async._management.descriptor_store import DescriptorStore
from ecdysis_async._sockets.registry import Entry, Until

__all__ = ["Backlogs"]

# How long a queue that nobody inherited is answered before its socket closes all the same, seconds.
FLUSH_SECONDS = 5.0
FLUSH_POLL_SECONDS = 0.001


class Backlogs:
    """The queues of one generation's sockets.

    Args:
        generation: this one.
        plane: its sockets, its gate and its connections.
        store: where systemd may keep its sockets.
    """

    def __init__(self, generation: Generation, plane: DataPlane, store: DescriptorStore) -> None:
        self._generation = generation
        self._store = store
        self._plane = plane
        self._gate = plane.gate

    async def answer(self) -> None:
        """Answer everyone who waits, because no generation comes after this one."""
        acceptors = [each for each in self._gate.acceptors if each.entry.until is Until.DRAIN and each.entry.has_queue]
        for acceptor in acceptors:
            self._refuse_newcomers(acceptor.entry)
        await self.empty(acceptors)
        if self._is_nobody_elses:
            for acceptor in acceptors:
                acceptor.entry.stop_listening()

    async def finish(self, unclaimed: Iterable[Entry]) -> None:
        """Answer everyone who waits on what the successor did not claim, and close it: nobody else can.

        Whoever comes only now, to one of several sockets of a port (SO_REUSEPORT), finds another one when it asks again
        (DESIGN.md, trap 11).
        """
        registry = self._plane.registry
        for entry in unclaimed:
            # Unless the application was faster, and has closed its server.
            if entry not in registry.entries:
                continue
            self._refuse_newcomers(entry)
            acceptors = [acceptor for acceptor in self._gate.acceptors if acceptor.entry is entry]
            await self.empty(acceptors)
            for acceptor in acceptors:
                await self._gate.remove(acceptor)
            registry.release(entry, unlink=True)

    async def empty(self, acceptors: Collection[Acceptor]) -> None:
        """Accept whatever waits, and then no more; after a while, or in a hurry, though somebody waits."""
        deadline = anyio.current_time() + min(FLUSH_SECONDS, self._generation.settings.drain_timeout)
        tracker = self._plane.tracker

        def is_time() -> bool:
            return anyio.current_time() < deadline and not tracker.is_hurried

        while True:
            is_open = self._gate.open_acceptors
            while is_time() and any(each in is_open and each.entry.is_waited_for() for each in acceptors):  # noqa: ASYNC110
                # The kernel's queue has no event for "empty".
                await anyio.sleep(FLUSH_POLL_SECONDS)
            for acceptor in acceptors:
                await self._gate.pause_one(acceptor)
            # One may come between the last look and the pause: then once more.
            waiting = [each for each in acceptors if each in self._gate.acceptors and each.entry.is_waited_for()]
            if not waiting or not is_time():
                return
            try:
                for acceptor in waiting:
                    await self._gate.open_one(acceptor)
            except OSError:
                self._generation.log.exception("those who wait to be accepted cannot be answered")
                return

    def _refuse_newcomers(self, entry: Entry) -> None:
        if self._is_nobody_elses:
            entry.refuse_newcomers()

    @property
    def _is_nobody_elses(self) -> bool:
        # Else they are the others', or the next start's: where there are other workers, or systemd keeps the sockets.
        return not (self._generation.shares_sockets or self._store.is_there)
