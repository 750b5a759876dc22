"""Keeping the workers of an anchor: as many as there shall be, sound ones, and none that has grown too much."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio

from ecdysis_async._ipc.worker_link import FromAnchor

from .config import AnchorConfig
from .pool import ReplaceReason, Slot, SlotActivity, Worker, WorkerState
from .rollout import Foreman, RollOut, replace, wait_until
from .upgrade import Upgrade

__all__ = ["Kept", "Reconciler"]

# How long to wait where the workers could not be looked after, seconds.
RETRY_SECONDS = 1.0

# How often a worker tells of itself in the time that systemd's watchdog has; and for which share of it, and how many
# seconds at the most, all of them may be silent until it is left unfed. Where this process had no turn for a while, a
# sound one seems to have been silent for three beats.
BEATS_PER_WATCHDOG = 8
SILENT_SHARE = 0.75
SILENT_SECONDS = 15.0

# What a worker that hangs gets to leave its traceback (faulthandler), before it is killed, seconds.
ABORT_SECONDS = 1.0

# How often systemd is told how things are, seconds.
STATUS_SECONDS = 5.0


class Kept(Foreman, Protocol):
    """What keeping asks of the anchor, besides what a roll-out does.

    Attributes:
        plan: what it is to run.
        generation: what its workers are.
        roll_out: the last one, which keeps the workers itself.
        is_stopping: whether it was told to stop.
        renewal: how it is followed, by itself or another one.
    """

    plan: AnchorConfig
    generation: int
    roll_out: RollOut | None
    is_stopping: bool
    renewal: Upgrade

    def begin(self, function: Callable[..., Coroutine[Any, Any, object]], *arguments: object) -> None:
        """Run something beside all else, whose defects cost that, and never the service."""

    def tell_status(self) -> None:
        """Tell systemd how things are."""


class Reconciler:
    """What keeps the workers of an anchor.

    Args:
        anchor: whose.
        watchdog: within how many seconds systemd wants to hear of a sound service, if it does.

    Attributes:
        beat_seconds: how often a worker has to tell of itself.
    """

    def __init__(self, anchor: Kept, watchdog: float | None = None) -> None:
        self._anchor = anchor
        self._watchdog = watchdog
        self.beat_seconds = anchor.plan.beat_seconds
        if watchdog is not None:
            self.beat_seconds = min(self.beat_seconds, watchdog / BEATS_PER_WATCHDOG)

    async def manage(self) -> None:
        """See that there are as many workers as there shall be, and none that should be replaced."""
        while not self._anchor.is_stopping:
            change = self._anchor.changes.next()
            try:
                pause = self._reconcile()
            except Exception:
                self._anchor.log.exception("the workers could not be looked after; trying on")
                pause = RETRY_SECONDS
            with anyio.move_on_after(pause):
                await change.wait()

    def _reconcile(self) -> float:
        """Begin what has to be done; return after how many seconds there is more to do."""
        if (
            self._anchor.is_stopping
            or self._anchor.renewal.is_under_way
            or (self._anchor.roll_out is not None and not self._anchor.roll_out.over.is_set())
        ):
            return math.inf
        crew, now = self._anchor.crew, anyio.current_time()
        while len(crew.slots) < crew.target:
            crew.enlarge()
        staying = [slot for slot in crew.slots if slot.activity is not SlotActivity.RETIRING]
        for slot in staying[crew.target :]:
            if slot.activity is SlotActivity.NONE:
                slot.activity = SlotActivity.RETIRING
                self._anchor.begin(self._retire, slot)
        pause = math.inf
        for slot in staying[: crew.target]:
            if slot.activity is SlotActivity.NONE and slot.is_vacant:
                if slot.retry_at <= now:
                    slot.activity = SlotActivity.FILLING
                    self._anchor.begin(self._refill, slot)
                else:
                    pause = min(pause, slot.retry_at - now)
        if not any(slot.activity is SlotActivity.REPLACING for slot in staying):
            for slot in staying[: crew.target]:
                worker = slot.serving_worker
                if slot.activity is SlotActivity.NONE and worker is not None and self.why_recycle(worker) is not None:
                    if slot.retry_at <= now:
                        slot.activity = SlotActivity.REPLACING
                        self._anchor.begin(self._recycle, slot, worker)
                        break
                    pause = min(pause, slot.retry_at - now)
        return pause

    async def _refill(self, slot: Slot) -> None:
        handover = await self._anchor.fill(slot, self._anchor.generation)
        if handover.error is not None and not self._anchor.is_stopping:
            slot.note_crash(anyio.current_time())
            self._anchor.log.error(
                "worker %d does not start (again in %.1f s): %s",
                slot.index,
                max(0.0, slot.retry_at - anyio.current_time()),
                handover.error.args[0],
            )
            self._anchor.changes.announce()

    async def _retire(self, slot: Slot) -> None:
        """Let a slot go with its worker."""
        self._anchor.log.info("worker %d retires", slot.index)
        for worker in slot.workers:
            worker.is_told_to_leave = True
            worker.line.tell(FromAnchor.STOP, {})
        await wait_until(self._anchor.changes, lambda: not slot.workers)
        self._anchor.crew.slots.remove(slot)
        self._anchor.changes.announce()

    async def _recycle(self, slot: Slot, worker: Worker) -> None:
        """Replace one worker by another one of the same generation, as in a roll-out."""
        why = self.why_recycle(worker)
        assert why is not None
        self._anchor.log.info(
            "worker %d (pid %d) is replaced: %s",
            slot.index,
            worker.pid,
            why.value.format(requests=worker.requests, megabytes=(worker.rss or 0) / 1e6),
        )
        try:
            error = await replace(self._anchor, slot, worker, self._anchor.generation)
            if error is None and worker.is_alive:
                with anyio.move_on_after(self._anchor.plan.settings.probation):
                    await wait_until(
                        self._anchor.changes, lambda: worker.handoff is not None and worker.handoff.is_over
                    )
                self._anchor.settle(worker)
                await wait_until(
                    self._anchor.changes,
                    lambda: not worker.is_alive or (worker.handoff is not None and worker.handoff.is_over),
                )
                error = worker.handoff.error if worker.handoff is not None else None
        finally:
            slot.activity = SlotActivity.NONE
        if error is not None and not self._anchor.is_stopping:
            slot.note_crash(anyio.current_time())
            self._anchor.log.error("worker %d could not be replaced, and goes on: %s", slot.index, error)
        self._anchor.changes.announce()

    def why_recycle(self, worker: Worker) -> ReplaceReason | None:
        """Say what a worker that serves has reached the limit of, so that another is to take its place."""
        if not worker.serves:
            return None
        if worker.requests >= worker.request_limit:
            return ReplaceReason.REQUESTS
        if self._anchor.plan.max_rss is not None and worker.rss is not None and worker.rss > self._anchor.plan.max_rss:
            return ReplaceReason.MEMORY
        return None

    async def watch(self) -> None:
        """Find the workers whose loop does not turn; tell systemd how things are."""
        hang = self._anchor.plan.hang_timeout
        tick = STATUS_SECONDS if hang is None and self._watchdog is None else self.beat_seconds
        looked = anyio.current_time()
        while True:
            await anyio.sleep(tick)
            # Not more than twice a tick at a time: where this process itself had no turn, nobody was silent.
            elapsed, looked = min(anyio.current_time() - looked, 2 * tick), anyio.current_time()
            for worker in tuple(self._anchor.crew):
                # One that is starting may block for as long as ready_timeout allows.
                if worker.state in (WorkerState.SERVING, WorkerState.PAUSED, WorkerState.DRAINING):
                    worker.silence += elapsed
                    if hang is not None and worker.silence > hang:
                        worker.silence = -math.inf
                        self._anchor.begin(self._end_hanging, worker)
            self._anchor.tell_status()

    def has_sound_worker(self) -> bool:
        """Say whether a worker's loop turns, if there is one: what systemd's watchdog asks, while this loop turns.

        Where it was said how long a loop may stand still, a worker that hangs is replaced, and the service is not
        started anew for it.
        """
        if self._watchdog is None or self._anchor.plan.hang_timeout is not None:
            return True
        limit = min(self._watchdog * SILENT_SHARE, SILENT_SECONDS)
        bound = [worker for worker in self._anchor.crew if worker.state in (WorkerState.SERVING, WorkerState.PAUSED)]
        return not bound or any(worker.silence < limit for worker in bound)

    async def _end_hanging(self, worker: Worker) -> None:
        self._anchor.log.error(
            "worker pid %d hangs: its loop has not turned for %g seconds (--hang-timeout); it is ended",
            worker.pid,
            self._anchor.plan.hang_timeout,
        )
        worker.process.send_signal(signal.SIGABRT)
        with anyio.move_on_after(ABORT_SECONDS):
            await worker.process.wait()
        worker.process.send_signal(signal.SIGKILL)
