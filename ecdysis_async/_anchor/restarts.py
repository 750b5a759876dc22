"""Roll-outs as the anchor has them: begun where that is possible, waited for, and concluded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.controlled import Restart
from ecdysis_async._management.management import LEEWAY_SECONDS
from ecdysis_async.errors import RestartError, RestartInProgress, RestartWhileDraining
from ecdysis_async.report import Outcome, RestartReport

from .hanging import HungWorkers
from .metrics import note_roll_out
from .one_at_a_time import OneAtATimeRunner
from .rollout import RollOutRunner, end_probation, make_roll_out
from .sockets import HeldSockets
from .state import AnchorState, Begin, Fill, Life, RollOut, RollOutStage, TurnState, wait_until

__all__ = ["Restarts", "TellRestart"]

_STAGES = {"serving": RollOutStage.PROBATION, "settled": RollOutStage.OVER, "drained": RollOutStage.DRAINED}


class TellRestart(Protocol):
    """Tells the service manager that a restart begins."""

    def __call__(self, limit: float, *, is_told: bool) -> None:
        """Say how long it may take, in seconds, and whether the service manager may know of it already."""


class Restarts:
    """The restarts of a service with workers, each of which is a roll-out.

    Args:
        state: what the anchor knows.
        sockets: what the anchor holds.
        log: the anchor's log.
        begin: runs something beside everything else.
        fill: starts a worker in a slot that has none.
        hung_workers: what is done about workers that do not answer.
        tell_restart: tells the service manager of a roll-out that begins.
        tell_end: tells the service manager that a roll-out is over, and what serves now.
    """

    def __init__(
        self,
        state: AnchorState,
        sockets: HeldSockets,
        log: GenerationLog,
        *,
        begin: Begin,
        fill: Fill,
        hung_workers: HungWorkers,
        tell_restart: TellRestart,
        tell_end: Callable[[], None],
    ) -> None:
        self.log = log
        self._state = state
        self._sockets = sockets
        self._begin = begin
        self._fill = fill
        self._hung_workers = hung_workers
        self._tell_restart = tell_restart
        self._tell_end = tell_end
        # What a restart waits for that a signal has asked for meanwhile.
        self._follows: str | None = None

    def begin(self, asked_by: str, *, is_told: bool = False) -> RollOut:
        """Begin a roll-out; if another one is on probation, that ends now, and this one waits for it.

        While the service starts, the roll-out waits for the end of the start.

        Args:
            asked_by: who asks for it, in words.
            is_told: whether systemd may know of it already.

        Raises:
            RestartError: that is not possible now.
        """
        state = self._state
        if state.is_leaving:
            raise RestartWhileDraining("the service is being stopped: start it again once it has ended")
        before = state.roll_out if state.is_rolling else None
        if before is not None and before.stage < RollOutStage.PROBATION:
            raise RestartInProgress(f"restart {before.report.id} is in progress; await that one")
        if state.life is Life.UPGRADING:
            raise RestartInProgress("the anchor is being upgraded; try again in a moment")
        if before is not None:
            end_probation(before, state.changes)
        # The number of the roll-out before is its own, also if that roll-out fails in this very moment.
        generation = (state.generation if before is None else before.generation) + 1
        roll_out = state.roll_out = make_roll_out(generation, asked_by, is_told=is_told, before=before)
        state.last_report = roll_out.report
        runner = (OneAtATimeRunner if state.config.one_at_a_time else RollOutRunner)(
            roll_out,
            state,
            self._sockets,
            self.log,
            fill=self._fill,
            hung_workers=self._hung_workers,
            prepare=self._prepare,
            conclude=self._conclude,
        )
        self._begin(runner.run)
        state.changes.announce()
        return roll_out

    async def see_through(self, roll_out: RollOut, until: str) -> RestartReport:
        """Wait until a roll-out is "serving", "settled" or "drained".

        Cancelled, it only stops waiting.

        Raises:
            RestartError: why the roll-out has failed; it is undone then.
        """
        changes = self._state.changes
        await wait_until(changes, lambda: roll_out.stage >= _STAGES[until] or roll_out.error is not None)
        if roll_out.error is not None:
            await wait_until(changes, lambda: roll_out.is_over)
            raise roll_out.error
        return roll_out.report

    def begin_by_signal(self, asked_by: str) -> None:
        """Restart the service because a signal has asked for it; the log tells what becomes of it.

        A signal that comes during a restart is remembered, and another restart follows. However many come meanwhile,
        one restart follows: what they were sent for is there when it begins.
        """
        if self._follows is not None:
            return
        self._follows = busy = self._find_hindrance()
        if busy is not None:
            self.log.info("%s asks for a restart while %s: another restart follows", asked_by, busy)
        self._begin(self._restart_by_signal, asked_by)

    def _find_hindrance(self) -> str | None:
        """Say why no restart can begin now that will be able to begin later."""
        state = self._state
        if state.life is Life.UPGRADING:
            return "the anchor is being upgraded"
        if state.roll_out is not None and state.roll_out.stage < RollOutStage.PROBATION:
            return f"restart {state.roll_out.report.id} is in progress"
        return None

    async def _restart_by_signal(self, asked_by: str) -> None:
        try:
            await wait_until(self._state.changes, lambda: self._state.is_leaving or self._find_hindrance() is None)
            self._follows = None
            self.begin(asked_by)
        except RestartWhileDraining as error:
            self.log.info("%s", error)
            if not self._state.is_stopping:
                # It goes on for a while (--lame-duck), and systemd waits for an answer to its signal.
                self._tell_restart(LEEWAY_SECONDS, is_told=False)
                self._tell_end()
        except RestartError as error:
            self.log.error("the restart that %s asked for is refused: %s", asked_by, error)  # noqa: TRY400 - it says it all

    def begin_by_command(self, asked_by: str) -> Restart:
        """Restart the service because a command has asked for it, which systemd may have run.

        Raises:
            RestartError: that is not possible now.
        """
        roll_out = self.begin(asked_by, is_told=True)
        return Restart(roll_out.report, functools.partial(self.see_through, roll_out))

    def find_report(self, id: str) -> RestartReport | None:
        """Return the report of the last restart, if it has this id."""
        report = self._state.last_report
        return report if report is not None and report.id == id else None

    def _prepare(self, roll_out: RollOut) -> None:
        """Tell systemd that a roll-out begins, now that no other is under way, whose end it was told."""
        settings = self._state.config.settings
        limit = len(self._state.pool.slots) * settings.ready_timeout + settings.probation + LEEWAY_SECONDS
        if self._state.config.one_at_a_time:
            # The former release drains before, and is started again where the new one fails.
            limit += settings.drain_timeout + settings.exit_timeout + 2 * settings.ready_timeout
        self._tell_restart(limit, is_told=roll_out.is_told)
        self._state.entries_before = set(self._sockets.service.entries)

    def _conclude(self, roll_out: RollOut) -> None:
        """Draw the consequences of what a roll-out has come to, and tell systemd."""
        state = self._state
        outcome = roll_out.report.outcome
        note_roll_out(state, roll_out)
        try:
            if outcome is Outcome.SETTLED:
                state.generation = roll_out.generation
                self._sockets.drop_unclaimed([turn.report for turn in roll_out.turns])
            # The new workers of a roll-out that was stopped may serve to the end of the service.
            elif outcome is not Outcome.STOPPED and not any(turn.state is TurnState.KEPT for turn in roll_out.turns):
                self._sockets.drop_newer(state.entries_before)
        finally:
            self._tell_end()
            state.changes.announce()
