"""How a slot that nobody serves gets a worker: the anchor is the predecessor in that worker's handoff."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import anyio

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorEvent
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.process import Spawner
from ecdysis_async.report import State

from .pool import Slot, SlotActivity
from .state import AnchorState, Filled, wait_until

__all__ = ["Filler"]


class _AnchorHost:
    """The predecessor's process where an anchor starts a worker: it accepts nothing itself.

    Clients wait in the queues of its sockets until the worker accepts.
    """

    connections = 0

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        """Do nothing: an anchor accepts nothing that it could stop to accept."""

    async def resume(self) -> None:
        """Do nothing: an anchor has nothing to accept again."""

    def hurry(self) -> None:
        """Do nothing: an anchor has no connection that drains."""


class Filler:
    """What starts workers in slots that nobody serves.

    Args:
        state: what the anchor knows.
        registry: the sockets that workers inherit.
        log: the anchor's log.
        make_spawner: returns what starts a process of a generation in a slot.
    """

    def __init__(
        self,
        state: AnchorState,
        registry: Registry,
        log: GenerationLog,
        make_spawner: Callable[[Slot, int], Spawner],
    ) -> None:
        self._state = state
        self._host = _AnchorHost(registry)
        self.log = log
        self._make_spawner = make_spawner

    async def fill(self, slot: Slot, generation: int) -> Filled:
        """Start a worker where there is none; return once it serves, or has failed."""
        state = self._state
        slot.activity = SlotActivity.FILLING
        before = set(slot.workers)
        try:
            # The anchor could not serve in the worker's place, so there is nothing to keep a probation for.
            settings = dataclasses.replace(state.config.settings, probation=0, pid_file=None)
            handoff = PredecessorSide(
                Generation(generation - 1, settings, self._host, self.log),
                lambda handoff: state.changes.announce(),
                spawner=self._make_spawner(slot, generation),
                number=generation,
                title=f"worker {slot.index}",
            )
            state.fillings[slot] = handoff
            if state.is_stopping:
                handoff.post(PredecessorEvent.STOP)
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(handoff.run)
                await handoff.over.wait()
                if handoff.error is None:
                    # The handoff would go on to the worker's death, which is learnt elsewhere.
                    task_group.cancel_scope.cancel()
            # What the worker says on its link takes a way of its own: that it lives, and then that it serves. A service
            # must not say that it serves while its status says that one of its workers does not yet.
            coming = {State.STARTING} if handoff.error is not None else {State.STARTING, State.WAITING}
            # The limit is for a worker that blocks its loop just then, and says nothing.
            with anyio.move_on_after(state.config.settings.ready_timeout):
                await wait_until(
                    state.changes, lambda: all(worker.state not in coming for worker in set(slot.workers) - before)
                )
        finally:
            del state.fillings[slot]
            slot.activity = SlotActivity.NONE
            state.changes.announce()
        return Filled(handoff.report, handoff.error)
