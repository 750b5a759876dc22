"""How a slot that nobody serves gets a worker: the anchor is the predecessor in that worker's handoff."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence

import anyio

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide, make_restart_id
from ecdysis_async._handoff.protocol import PredecessorEvent
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.process import Spawner
from ecdysis_async.report import State

from .pool import Slot, SlotActivity, Worker
from .state import AnchorState, Filled, Life, wait_until

__all__ = ["Filler"]

# How long a worker that has woken up may take to accept no more, seconds: a turn or two of its loop.
OBEY_SECONDS = 1.0
# A worker that has said nothing for so long hangs, seconds: a beat comes each second.
HANGS_SECONDS = 3.0


class _AnchorHost:
    """The predecessor's process where an anchor starts a worker: it accepts nothing itself.

    Clients wait in the queues of its sockets until the worker accepts.
    """

    connections = 0

    def __init__(self, registry: Registry, before_commit: Sequence[Callable[[], Awaitable[None]]]) -> None:
        self.registry = registry
        self._before_commit = before_commit

    async def pause(self, spare: Callable[[Entry], bool]) -> None:
        """Accept nothing, as ever; where somebody else in this slot may, let that end."""
        for each in self._before_commit:
            await each()

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
        make_spawner: returns what starts a process of a generation in a slot, for the restart whose id is given.
        before_commit: is awaited before a worker accepts.
    """

    def __init__(
        self,
        state: AnchorState,
        registry: Registry,
        log: GenerationLog,
        make_spawner: Callable[[Slot, int, str], Spawner],
        before_commit: Callable[[], Awaitable[None]],
    ) -> None:
        self._state = state
        self._registry = registry
        self.log = log
        self._make_spawner = make_spawner
        self._before_commit = before_commit

    async def fill(self, slot: Slot, generation: int) -> Filled:
        """Start a worker where there is none, or none that answers; return once it serves, or has failed."""
        state = self._state
        slot.activity = SlotActivity.FILLING
        before = set(slot.workers)
        try:
            # The anchor could not serve in the worker's place, so there is nothing to keep a probation for.
            settings = dataclasses.replace(state.config.settings, probation=0, pid_file=None)
            hung = slot.bypassed
            restart = self._find_restart()
            before_commit = [self._before_commit]
            if hung is not None:
                before_commit.append(functools.partial(self._send_away, hung))
            handoff = PredecessorSide(
                Generation(generation - 1, settings, _AnchorHost(self._registry, before_commit), self.log),
                lambda handoff: state.changes.announce(),
                spawner=self._make_spawner(slot, generation, restart),
                number=generation,
                restart=restart,
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

    def _find_restart(self) -> str:
        """Return the id of the restart that a worker is started for now; it is empty at the first start."""
        state = self._state
        if state.life is Life.STARTING:
            return ""
        return state.roll_out.report.id if state.roll_out is not None and state.is_rolling else make_restart_id()

    async def _send_away(self, hung: Worker) -> None:
        """Tell a worker that does not answer that its place is another one's from now on (G2).

        The order lies on its link before the successor accepts. When its loop turns again, it finds the order in the
        first turn. In that very turn a loop may still accept from the shared queue what it found there beside the
        order. Those clients are answered by it, as all that it has accepted before.
        """
        hung.is_told_to_leave = True
        hung.link.tell(FromAnchor.STOP, {"replaced": True})
        if hung.silent_seconds(anyio.current_time()) < HANGS_SECONDS:
            with anyio.move_on_after(OBEY_SECONDS):
                await wait_until(self._state.changes, lambda: not hung.is_alive or hung.is_done_accepting)
        hung.state = State.DRAINING
