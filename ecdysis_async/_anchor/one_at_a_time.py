"""A roll-out in which the former release leaves before the new one starts: `ecdysis run --one-at-a-time`.

It is for what two generations cannot have at a time, and cannot pass on either: an embedded database that is opened at
the start, a port that a library binds. Clients wait meanwhile in the queues of the sockets, which the anchor holds.
Nobody is on probation who could take the place again. Where the new release fails, the former one is started anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import anyio

from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._management.status import describe_load
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.process import require_program
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError, RolledBack
from ecdysis_async.report import Outcome, Phase

from .pool import Slot, SlotActivity, Worker
from .rollout import RollOutRunner, add_up
from .state import AnchorState, Fill, Filled, Turn, TurnState, wait_until

__all__ = ["OneAtATimeRunner", "replace_after_end"]


async def replace_after_end(state: AnchorState, slot: Slot, worker: Worker, fill: Fill) -> RestartError | None:
    """Let a worker end, and start another one of the same generation then; return why none serves."""
    _let_leave(worker)
    await wait_until(state.changes, lambda: not worker.is_alive or state.is_stopping)
    return (await fill(slot, state.generation)).error if not state.is_stopping else None


def _let_leave(worker: Worker) -> None:
    worker.is_told_to_leave = True
    worker.link.tell(FromAnchor.STOP, {})


class OneAtATimeRunner(RollOutRunner):
    """What carries such a roll-out out.

    All workers leave, and then all start, so that none serves beside one of the other release.
    """

    # What the former workers were run by; None before they were told to leave.
    _former: Launch | None = None
    _has_ended_former = False
    # The workers of the former release, which tell the anchor what becomes of their connections, and how long that
    # took, seconds.
    _leaving: Sequence[Worker] = ()
    _drain_seconds: float | None = None
    # Since when clients wait: no worker accepts, until the first one is filled in.
    _waiting_since: float | None = None

    async def _replace_all(self) -> RestartError | None:
        state, turns = self._state, self._roll_out.turns
        await self._wait_until(lambda: all(turn.slot.activity is SlotActivity.NONE for turn in turns))
        if self._is_unwanted():
            return self._roll_out.called_off
        try:
            await run_in_thread(functools.partial(_require_launch, state))
        except RestartError as error:
            # Nothing has changed yet.
            return error
        old = list(state.pool)
        self._former = next((each.launch for each in reversed(old) if each.serves), state.former_release)
        self._has_ended_former, self._leaving = True, old
        begun = anyio.current_time()
        for turn in turns:
            turn.state, turn.old = TurnState.UNDER_WAY, turn.slot.serving_worker
            turn.slot.activity = SlotActivity.REPLACING
        try:
            await self._end(old)
            self._drain_seconds = anyio.current_time() - begun
            if self._is_unwanted():
                return self._roll_out.called_off
            state.former_release = None
            return await self._fill_all(self._roll_out.generation)
        finally:
            for turn in turns:
                turn.slot.activity = SlotActivity.NONE
            self._sum_up()

    def _sum_up(self) -> bool:
        super()._sum_up()
        report = self._roll_out.report
        if self._drain_seconds is not None:
            report.phases[Phase.DRAIN] = self._drain_seconds
        report.drain = add_up(worker.drain for worker in self._leaving)
        report.cut_requests = [each for worker in self._leaving for each in worker.cut_requests]
        return False

    def _is_unwanted(self) -> bool:
        return self._state.is_stopping or self._roll_out.called_off is not None

    async def _end(self, workers: Sequence[Worker]) -> None:
        """Let workers leave, and wait until they have; those that do not end in time are killed elsewhere."""
        if not workers:
            return
        jobs = sum(worker.jobs for worker in workers)
        self.log.info(
            "%s first (--one-at-a-time), with %s; new clients wait",
            "1 worker leaves" if len(workers) == 1 else f"{len(workers)} workers leave",
            describe_load(sum(worker.connections for worker in workers) - jobs, jobs),
        )
        self._waiting_since = anyio.current_time()
        for worker in workers:
            _let_leave(worker)
        await wait_until(
            self._state.changes,
            lambda: self._sum_up() or self._state.is_stopping or not any(worker.is_alive for worker in workers),
        )

    async def _fill_all(self, generation: int) -> RestartError | None:
        """Start a worker in each slot: one alone, which may show that none can, then the others."""
        turns = [turn for turn in self._roll_out.turns if turn.slot in self._state.pool.slots]
        if turns and (error := await self._fill_one(turns[0], generation)) is not None:
            return error
        if turns and turns[0].report is not None and self._waiting_since is not None:
            # The anchor, which has handed over to it, has paused for a moment, and clients have waited all the time.
            turns[0].report.accept_gap = anyio.current_time() - self._waiting_since
            self._waiting_since = None
        errors: list[RestartError | None] = []

        async def fill(turn: Turn) -> None:
            errors.append(await self._fill_one(turn, generation))

        async with anyio.create_task_group() as task_group:
            for turn in turns[1:]:
                task_group.start_soon(fill, turn)
        return next((error for error in errors if error is not None), self._find_failure())

    async def _fill_one(self, turn: Turn, generation: int) -> RestartError | None:
        if self._state.is_stopping:
            return None
        filled: Filled = await self._fill(turn.slot, generation)
        turn.report, turn.old = filled.report, None
        turn.state = TurnState.FAILED if filled.error is not None else TurnState.SERVED
        return filled.error

    async def _undo(self, error: RestartError) -> None:
        """Start the former release anew, from where it was."""
        if not self._has_ended_former:
            await super()._undo(error)
            return
        state, turns = self._state, self._roll_out.turns
        has_served = error.phase == Phase.PROBATION
        # What starts from now on is wanted.
        called_off, self._roll_out.called_off = self._roll_out.called_off, None
        for turn in turns:
            turn.state, turn.slot.activity = TurnState.FAILED, SlotActivity.REPLACING
        try:
            await self._end(list(state.pool))
            state.former_release = self._former
            failure = await self._fill_all(state.generation)
        finally:
            self._roll_out.called_off = called_off
            for turn in turns:
                turn.slot.activity = SlotActivity.NONE
        if failure is None:
            what = "the former release was started again, and serves"
            for turn in turns:
                turn.state = TurnState.REVERTED
        else:
            # The next attempts are with what is there now: that is what somebody mends.
            state.former_release = None
            self._has_former = False
            what = (
                f"and the former release does not start again either, so nobody serves: {failure.args[0]}. Clients "
                "wait, and the service tries again by itself"
            )
        kind = RolledBack if has_served else type(error)
        outcome = Outcome.ROLLED_BACK if has_served else Outcome.FAILED
        told = kind(f"{error.args[0]}; {what}", phase=error.phase, stderr=error.stderr)
        told.__cause__ = error
        self._fail(told, outcome)


def _require_launch(state: AnchorState) -> None:
    """See that there is something to be started.

    Raises:
        RestartError: there is not; the text says what is missing.
    """
    settings = state.config.settings
    launch, _ = describe_launch(settings.command, settings.environment, settings.env_file, is_bound_to_directory=True)
    require_program(launch)
