"""Keeping the workers of an anchor: as many as there shall be, sound ones, and none that has grown too much."""

from __future__ import annotations

import math
import signal

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.predecessor import make_restart_id
from ecdysis_async._handoff.verdict import summarize
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._management.ledger import WorkerRestart
from ecdysis_async.report import State

from .config import AnchorConfig
from .hanging import LINGER_SECONDS, Bypass, abort
from .one_at_a_time import replace_after_end
from .pool import ReplaceReason, Slot, SlotActivity, Worker
from .rollout import replace, settle
from .sockets import HeldSockets
from .state import AnchorState, Begin, Fill, Life, wait_until

__all__ = ["Reconciler", "find_beat_seconds"]

# How often it is looked for workers that have not ended, where nothing asks for more, seconds.
LOOK_SECONDS = 5.0

# How long to wait where the workers could not be looked after, seconds.
RETRY_SECONDS = 1.0

# How often a worker tells of itself in the time that systemd's watchdog has.
BEATS_PER_WATCHDOG = 8
# For which share of that time, and how many seconds at the most, all workers may be silent until the watchdog is left
# unfed. Where this process had no turn for a while, a sound worker seems to have been silent for three beats.
SILENT_SHARE = 0.75
SILENT_SECONDS = 15.0

# What a worker counts as that was replaced because it has reached a limit.
_COUNTED = {ReplaceReason.REQUESTS: WorkerRestart.MAX_REQUESTS, ReplaceReason.MEMORY: WorkerRestart.MAX_RSS}


def find_beat_seconds(config: AnchorConfig, watchdog: float | None) -> float:
    """Return how often a worker has to tell of itself, seconds.

    Args:
        config: what the anchor is to run.
        watchdog: within how many seconds systemd wants to hear of a sound service, if it does.
    """
    if watchdog is None:
        return config.beat_seconds
    return min(config.beat_seconds, watchdog / BEATS_PER_WATCHDOG)


class Reconciler:
    """What keeps the workers of an anchor.

    Args:
        state: what the anchor knows.
        sockets: what the workers share.
        log: the anchor's log.
        begin: runs something beside everything else.
        fill: starts a worker in a slot that has none.
        bypass: starts a worker in the place of one that does not answer.
        watchdog: within how many seconds systemd wants to hear of a sound service, if it does.
    """

    def __init__(
        self,
        state: AnchorState,
        sockets: HeldSockets,
        log: GenerationLog,
        *,
        begin: Begin,
        fill: Fill,
        bypass: Bypass,
        watchdog: float | None = None,
    ) -> None:
        self._state = state
        self._sockets = sockets
        self.log = log
        self._begin = begin
        self._fill = fill
        self._bypass = bypass
        self._watchdog = watchdog

    async def manage(self) -> None:
        """See that there are as many workers as there shall be, and none that should be replaced."""
        while not self._state.is_stopping:
            change = self._state.changes.next()
            try:
                pause = self.reconcile(anyio.current_time())
            except Exception:
                self.log.exception("the workers could not be looked after; trying on")
                pause = RETRY_SECONDS
            with anyio.move_on_after(pause):
                await change.wait()

    def reconcile(self, now: float) -> float:
        """Begin what has to be done; return after how many seconds there is more to do."""
        # A roll-out looks after the workers itself, and nothing may begin that an upgrade would have to wait for.
        if self._state.life in (Life.UPGRADING, Life.STOPPING) or self._state.is_rolling:
            return math.inf
        pool = self._state.pool
        while len(pool.slots) < pool.target:
            pool.enlarge()
        staying = [slot for slot in pool.slots if slot.activity is not SlotActivity.RETIRING]
        for slot in staying[pool.target :]:
            if slot.activity is SlotActivity.NONE:
                slot.activity = SlotActivity.RETIRING
                self._begin(self._retire, slot)
        return min(self._fill_vacant(staying[: pool.target], now), self._replace_one(staying, now))

    def _fill_vacant(self, slots: list[Slot], now: float) -> float:
        """Begin to fill what nobody serves; return after how many seconds there is more to fill."""
        pause = math.inf
        for slot in slots:
            if slot.activity is SlotActivity.NONE and slot.is_vacant:
                if slot.retry_at <= now:
                    slot.activity = SlotActivity.FILLING
                    self._begin(self._refill, slot)
                else:
                    pause = min(pause, slot.retry_at - now)
        return pause

    def _replace_one(self, staying: list[Slot], now: float) -> float:
        """Begin to replace a worker that has reached a limit; return after how many seconds there is one to replace."""
        pause = math.inf
        # One at a time, so that all others serve meanwhile.
        if any(slot.activity is SlotActivity.REPLACING for slot in staying):
            return pause
        for slot in staying[: self._state.pool.target]:
            worker = slot.serving_worker
            if slot.activity is SlotActivity.NONE and worker is not None and self._why_replace(worker) is not None:
                if slot.retry_at <= now:
                    slot.activity = SlotActivity.REPLACING
                    self._begin(self._replace, slot, worker)
                    break
                pause = min(pause, slot.retry_at - now)
        return pause

    def _why_replace(self, worker: Worker) -> ReplaceReason | None:
        return worker.find_replace_reason(self._state.config.max_rss)

    async def _refill(self, slot: Slot) -> None:
        filled = await self._fill(slot, self._state.generation)
        log = self.log.of(filled.report.id)
        if filled.error is None:
            log.info("worker %d is served again, by pid %d", slot.index, filled.report.successor_pid)
        if filled.error is not None and not self._state.is_stopping:
            slot.note_crash(anyio.current_time())
            self._state.ledger.note_worker_restart(WorkerRestart.NOT_STARTED)
            log.error(
                "worker %d does not start (again in %.1f s): %s",
                slot.index,
                max(0.0, slot.retry_at - anyio.current_time()),
                summarize(filled.error),
            )
            self._state.changes.announce()

    async def _retire(self, slot: Slot) -> None:
        """Let a slot go with its worker."""
        self.log.info("worker %d retires", slot.index)
        for worker in slot.workers:
            worker.is_told_to_leave = True
            worker.link.tell(FromAnchor.STOP, {})
        await wait_until(self._state.changes, lambda: not slot.workers)
        self._state.pool.slots.remove(slot)
        self._state.changes.announce()

    async def _replace(self, slot: Slot, worker: Worker) -> None:
        """Replace one worker by another one of the same generation, as in a roll-out."""
        state = self._state
        why = self._why_replace(worker)
        assert why is not None
        log = self.log.of(make_restart_id())
        log.info(
            "worker %d (pid %d) is replaced: %s",
            slot.index,
            worker.pid,
            why.value.format(requests=worker.requests, megabytes=(worker.rss or 0) / 1e6),
        )
        if state.config.one_at_a_time:
            await self._replace_after_end(slot, worker, _COUNTED[why])
            return
        try:
            error = await replace(state, self._sockets, slot, worker, state.generation, log.restart, self._bypass)
            if error is None and worker.is_alive:
                with anyio.move_on_after(state.config.settings.probation):
                    await wait_until(state.changes, lambda: worker.handoff is not None and worker.handoff.is_over)
                settle(worker)
                await wait_until(state.changes, lambda: worker.has_ended_handoff)
                error = worker.handoff.error if worker.handoff is not None else None
        finally:
            slot.activity = SlotActivity.NONE
        if error is None:
            state.ledger.note_worker_restart(_COUNTED[why])
            if (newest := slot.serving_worker) is not None:
                log.info("worker %d is served by pid %d", slot.index, newest.pid)
        elif not state.is_stopping:
            slot.note_crash(anyio.current_time())
            log.error("worker %d could not be replaced, and goes on: %s", slot.index, summarize(error))
        state.changes.announce()

    async def _replace_after_end(self, slot: Slot, worker: Worker, counted: WorkerRestart) -> None:
        try:
            error = await replace_after_end(self._state, slot, worker, self._fill)
        finally:
            slot.activity = SlotActivity.NONE
        if error is None and not self._state.is_stopping:
            self._state.ledger.note_worker_restart(counted)
        elif error is not None and not self._state.is_stopping:
            slot.note_crash(anyio.current_time())
            self.log.error("worker %d has ended, and no other one starts in its place: %s", slot.index, error)
        self._state.changes.announce()

    async def watch(self) -> None:
        """Find the workers that have not ended in time, and, where somebody wants to know, whose loop does not turn."""
        config = self._state.config
        is_fast = config.hang_timeout is not None or self._watchdog is not None
        tick = find_beat_seconds(config, self._watchdog) if is_fast else LOOK_SECONDS
        looked = anyio.current_time()
        while True:
            await anyio.sleep(tick)
            # At most two ticks count at a time: where this process itself had no turn, no worker was silent.
            elapsed, looked = min(anyio.current_time() - looked, 2 * tick), anyio.current_time()
            self.note_silence(elapsed)

    def note_silence(self, elapsed: float) -> None:
        """Take note that so many seconds have passed; begin to end the workers that were silent for too long.

        A worker that leaves ends itself within its limits. Where it cannot, because it is stopped or its interpreter
        stands still, it is killed here a moment later.
        """
        settings = self._state.config.settings
        limit = settings.drain_timeout + settings.exit_timeout + LINGER_SECONDS
        hang = self._state.config.hang_timeout
        for worker in self._find_leaving():
            worker.leaving += elapsed
            if worker.leaving > limit:
                worker.leaving = -math.inf
                self._begin(self._end_lingering, worker, limit)
        for worker in tuple(self._state.pool):
            # A worker that is starting may block for as long as ready_timeout allows; one that has drained, and whose
            # application shuts down, for as long as exit_timeout.
            if worker.state in (State.SERVING, State.PAUSED) or (worker.state is State.DRAINING and worker.connections):
                worker.silence += elapsed
                if hang is not None and worker.silence > hang:
                    worker.silence = -math.inf
                    self._begin(self._end_hanging, worker)

    def _find_leaving(self) -> list[Worker]:
        """Return the workers that are to be gone soon, also those that could not say so any more."""
        leaving = [worker for worker in self._state.pool if worker.is_to_end]
        if not self._state.is_rolling:
            for slot in self._state.pool.slots:
                if slot.activity is SlotActivity.NONE and (newest := slot.serving_worker) is not None:
                    leaving += [each for each in slot.workers if each is not newest and not each.is_to_end]
        return leaving

    async def _end_lingering(self, worker: Worker, limit: float) -> None:
        self.log.error("worker pid %d has not ended %g s after it began to leave: it is killed", worker.pid, limit)
        worker.process.send_signal(signal.SIGKILL)

    def has_sound_worker(self) -> bool:
        """Say whether a worker's loop turns, if there is one: what systemd's watchdog asks, while this loop turns.

        Where a hang timeout is configured, a worker that hangs is replaced. The service is not started anew for it.
        """
        if self._watchdog is None or self._state.config.hang_timeout is not None:
            return True
        limit = min(self._watchdog * SILENT_SHARE, SILENT_SECONDS)
        bound = [worker for worker in self._state.pool if worker.state in (State.SERVING, State.PAUSED)]
        return not bound or any(worker.silence < limit for worker in bound)

    async def _end_hanging(self, worker: Worker) -> None:
        worker.is_hung = True
        self.log.error(
            "worker pid %d hangs: its loop has not turned for %g seconds (--hang-timeout); it is ended",
            worker.pid,
            self._state.config.hang_timeout,
        )
        await abort(worker)
