"""Workers that do not answer: they are replaced without their help, and ended at a deadline.

A restart is the usual remedy for a loop that is blocked. The worker would have to make its successor, and cannot. The
anchor has the sockets, and so it starts the successor as it fills an empty slot.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import FromAnchor, error_to_json
from ecdysis_async._management.changes import Changes
from ecdysis_async.errors import RestartError

from .pool import HandoffStatus, Slot, Worker
from .state import AnchorState, Begin, Fill, wait_until

__all__ = ["LINGER_SECONDS", "Bypass", "HungWorkers", "abort", "wait_for_answer"]

# How long a worker may say nothing while something is asked of it, until it is done without, seconds. A beat comes each
# second. A handler that blocks the loop for less than that only delays the restart.
NO_ANSWER_SECONDS = 5.0
# How much of that is counted at a time, seconds: where this process itself had no turn, no worker was silent.
TICK_SECONDS = 0.5

# What a worker that hangs gets to leave its traceback (faulthandler), before it is killed, seconds.
ABORT_SECONDS = 1.0

# How long a worker that leaves may take besides its drain and its exit_timeout, seconds.
LINGER_SECONDS = 6.0

Bypass: TypeAlias = Callable[[Slot, Worker, int], Awaitable[RestartError | None]]
"""Starts a worker of a generation in the place of one that does not answer; returns once it serves, or why not."""


async def wait_for_answer(changes: Changes, worker: Worker, is_so: Callable[[], bool]) -> bool:
    """Wait until something is so, for as long as a worker says anything; return whether it is.

    Args:
        changes: after which it is looked again.
        worker: the worker that has to do something about it.
        is_so: says whether it is so.
    """
    silence, heard = 0.0, worker.heard
    while silence < NO_ANSWER_SECONDS:
        with anyio.move_on_after(TICK_SECONDS):
            await wait_until(changes, is_so)
            return True
        silence = silence + TICK_SECONDS if worker.heard == heard else 0.0
        heard = worker.heard
    return is_so()


async def abort(worker: Worker) -> None:
    """End a worker that hangs by force."""
    worker.process.send_signal(signal.SIGABRT)
    with anyio.move_on_after(ABORT_SECONDS):
        await worker.process.wait()
    worker.process.send_signal(signal.SIGKILL)


class HungWorkers:
    """What is done about workers that do not answer.

    Args:
        state: what the anchor knows.
        log: the anchor's log.
        begin: runs something beside everything else.
        fill: starts a worker in a slot; where the slot has a worker to bypass, that is told to leave before the commit.
    """

    def __init__(self, state: AnchorState, log: GenerationLog, *, begin: Begin, fill: Fill) -> None:
        self._state = state
        self.log = log
        self._begin = begin
        self._fill = fill

    async def bypass(self, slot: Slot, old: Worker, generation: int) -> RestartError | None:
        """Let a worker that hangs be followed by one that the anchor starts; return once that serves, or why not.

        Until the new one is about to accept, nothing changes for the hung one: should it wake up, it serves on.
        """
        successor = next((each for each in slot.workers if each.starter is old), None)
        if successor is not None and successor.serves:
            # The worker has handed its place over, and hangs since then. It is paused.
            return None
        silence = old.silent_seconds(anyio.current_time())
        what = f"worker {slot.index} (pid {old.pid}) did not answer for {silence:.0f} s"
        self.log.warning("%s: its successor is started without it", what)
        # Its order to make a successor is still on its way to it. This comes behind, and takes it back.
        error = RestartError(f"{what}, and the anchor starts its successor")
        old.link.tell(FromAnchor.REVERT, {"error": error_to_json(error)})
        old.is_bypassed = True
        slot.bypassed = old
        try:
            # A stop of the service calls it off (AnchorState.fillings).
            with anyio.CancelScope(shield=True):
                if successor is not None:
                    await successor.process.end(0)
                filled = await self._fill(slot, generation)
        finally:
            slot.bypassed = None
        if filled.error is not None:
            old.is_bypassed = old.is_told_to_leave
            return filled.error
        filled.report.unanswered.append(f"{what}, and was replaced without a handoff")
        old.handoff = HandoffStatus(PredecessorState.SETTLED, is_over=True, report=filled.report, error=None)
        self.expect_end(old)
        return None

    def expect_end(self, worker: Worker) -> None:
        """See that a replaced worker ends, though it does not answer."""
        self._begin(self._end, worker)

    async def _end(self, worker: Worker) -> None:
        settings = self._state.config.settings
        heard = worker.heard
        limits = [settings.drain_timeout, settings.drain_timeout + settings.exit_timeout + LINGER_SECONDS]
        for limit in limits:
            with anyio.move_on_after(limit):
                await wait_until(self._state.changes, lambda: not worker.is_alive)
                return
            # One that has woken up ends itself within its own limits.
            if worker.heard == heard:
                break
        self.log.error("worker pid %d was replaced, and does not answer: it is ended by force", worker.pid)
        await abort(worker)
