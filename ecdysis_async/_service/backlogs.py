"""Those who wait in the kernel's queues when a generation stops accepting: answered here, where nobody else will be.

Whether that is so, ``leaving.py`` knows; it also holds the gate meanwhile (``Generation.gate_lock``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Acceptor
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._sockets.entry import Entry, Until

__all__ = ["Backlogs"]

# How long a queue that nobody inherited is answered before its socket closes all the same, seconds.
FLUSH_SECONDS = 5.0
FLUSH_POLL_SECONDS = 0.001


class Backlogs:
    """The queues of one generation's sockets.

    Args:
        plane: its sockets, its gate and its connections.
        log: of this generation.
        limit: how long those who wait are answered at the most, seconds.
        is_shared: whether somebody else holds the sockets open: other workers, or systemd for the next start. Then the
            sockets go on listening, and newcomers are left to the others.
        kinds: which listeners end now.
    """

    def __init__(
        self,
        plane: DataPlane,
        log: GenerationLog,
        limit: float,
        *,
        is_shared: bool,
        kinds: Collection[Until] = (Until.DRAIN,),
    ) -> None:
        self._plane = plane
        self._gate = plane.gate
        self._log = log
        self._limit = min(FLUSH_SECONDS, limit)
        self._is_shared = is_shared
        self._kinds = kinds

    async def answer(self) -> None:
        """Answer everyone who waits, because no generation comes after this one."""
        acceptors = [each for each in self._gate.acceptors if each.entry.until in self._kinds and each.entry.has_queue]
        for acceptor in acceptors:
            self._refuse_newcomers(acceptor.entry)
        await self.empty(acceptors)
        if not self._is_shared:
            for acceptor in acceptors:
                acceptor.entry.stop_listening()

    async def finish(self, unclaimed: Iterable[Entry]) -> None:
        """Answer everyone who waits on what the successor did not claim, and close it: nobody else can.

        A client that comes later, to one of several sockets of a port (SO_REUSEPORT), finds another one when it asks
        again.
        """
        registry = self._plane.registry
        for entry in unclaimed:
            # The application may have been faster, and have closed its server.
            if entry not in registry.entries:
                continue
            self._refuse_newcomers(entry)
            acceptors = [acceptor for acceptor in self._gate.acceptors if acceptor.entry is entry]
            await self.empty(acceptors)
            for acceptor in acceptors:
                await self._gate.remove(acceptor)
            registry.release(entry, unlink=True)

    async def empty(self, acceptors: Collection[Acceptor]) -> None:
        """Accept all who wait, and then no more. After a while, or in a hurry, it ends though somebody waits."""
        deadline = anyio.current_time() + self._limit
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
            # A client may come between the last look and the pause: then once more.
            waiting = [each for each in acceptors if each in self._gate.acceptors and each.entry.is_waited_for()]
            if not waiting or not is_time():
                return
            try:
                for acceptor in waiting:
                    await self._gate.open_one(acceptor)
            except OSError:
                self._log.exception("those who wait to be accepted cannot be answered")
                return

    def _refuse_newcomers(self, entry: Entry) -> None:
        if not self._is_shared:
            entry.refuse_newcomers()
