"""A roll-out: the workers of an anchor are replaced one after the other, and all of it becomes final, or none of it.

Each worker hands its slot over to its successor by the handoff that a service without workers has too. It stays on
probation, able to take its place again. Once the last slot has been served by the new code for a while, all settle. A
failure in between takes every slot back.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import fields

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.predecessor import make_restart_id
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async._handoff.verdict import describe_drain, describe_verdict
from ecdysis_async._ipc.worker_link import FromAnchor, error_to_json
from ecdysis_async._management.changes import Changes
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.trace_context import trace_contexts
from ecdysis_async.errors import RestartError, RestartWhileDraining, RolledBack, SuccessorFailed
from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport

from .hanging import Bypass, HungWorkers, wait_for_answer
from .pool import HandoffStatus, Slot, SlotActivity, Worker
from .sockets import HeldSockets
from .state import AnchorState, Fill, Life, RollOut, RollOutStage, Turn, TurnState, wait_until

__all__ = ["RollOutRunner", "add_up", "call_off", "end_probation", "make_roll_out", "replace", "settle", "sum_up"]

# What a worker may take over its handoff besides its successor's start, seconds; its own limits are below that.
HANDOFF_SECONDS = 60.0
# How long a worker may take to settle, or to take its place again, seconds.
ANSWER_SECONDS = 30.0


def make_roll_out(generation: int, asked_by: str, *, is_told: bool, before: RollOut | None) -> RollOut:
    """Return a roll-out that nothing has happened in yet."""
    report = RestartReport(
        id=make_restart_id(),
        generation=generation,
        # The anchor's pid is the service's, before and after.
        predecessor_pid=os.getpid(),
        successor_pid=os.getpid(),
        started_at=time.time(),
        asked_by=asked_by,
    )
    return RollOut(generation, report, is_told=is_told, before=before)


def call_off(roll_out: RollOut, state: AnchorState) -> None:
    """Undo a roll-out in which no new worker was told to accept yet; later it goes on."""
    if state.config.one_at_a_time and _let_leave_all(roll_out) and not state.fillings:
        # No new worker is there yet: the former release is started anew once its workers have left.
        roll_out.called_off = RestartError("the restart was called off")
        state.changes.announce()
        return
    current = roll_out.current
    is_early = all(turn.state is TurnState.PENDING for turn in roll_out.turns if turn is not current)
    if roll_out.is_over or not is_early or (current is not None and current.is_committed):
        return
    # Where the worker hangs, or there is none, the anchor itself has started the new one.
    filling = state.fillings.get(current.slot) if current is not None else None
    if filling is not None and filling.state not in (PredecessorState.SPAWNING, PredecessorState.INITIALISING):
        # The worker that hangs is told to leave by now.
        return
    roll_out.called_off = RestartError("the restart was called off")
    if filling is not None:
        filling.post(PredecessorEvent.CANCELLED, roll_out.called_off)
    elif current is not None and current.old is not None:
        _revert(current.old, roll_out.called_off)
    state.changes.announce()


def _let_leave_all(roll_out: RollOut) -> bool:
    """Say whether all workers of the former release were told to leave, and none has a follower."""
    return not roll_out.is_over and all(turn.state is TurnState.UNDER_WAY for turn in roll_out.turns)


def end_probation(roll_out: RollOut, changes: Changes) -> None:
    """Let the probation of a roll-out end now, or as soon as it has begun."""
    roll_out.is_hurried = True
    changes.announce()


async def replace(
    state: AnchorState,
    sockets: HeldSockets,
    slot: Slot,
    old: Worker,
    generation: int,
    restart: str,
    bypass: Bypass,
) -> RestartError | None:
    """Let a worker be followed by one of another generation; return once that serves, on probation, or why not.

    Where the worker does not answer, its successor is not on probation: nobody could take the place again.
    """
    try:
        begin_replacing(sockets, slot, old, generation, restart)
    except RestartError as failure:
        return failure
    error: RestartError | None = None

    def is_decided() -> bool:
        nonlocal error
        handoff = old.handoff
        if handoff is not None and handoff.error is not None:
            error = handoff.error
            return handoff.is_over
        if old.is_alive:
            return handoff is not None and handoff.state is PredecessorState.PROBATION
        # The old worker was killed in the middle. Its successor goes on without it, if it can (guarantee G6).
        if slot.serving_worker is not None:
            return True
        if slot.workers:
            return False
        error = SuccessorFailed(f"worker {slot.index} (pid {old.pid}) died while it was being replaced")
        return True

    with anyio.move_on_after(state.config.settings.ready_timeout + HANDOFF_SECONDS) as scope:
        is_answered = await wait_for_answer(state.changes, old, is_decided)
    if scope.cancelled_caught:
        error = RestartError(
            f"worker {slot.index} (pid {old.pid}) does not answer: is it stopped (SIGSTOP, a debugger)? "
            "Continue or kill it, and try again"
        )
        # Should the worker go on after all, it shall not begin the handoff.
        _revert(old, error)
    elif not is_answered:
        return await bypass(slot, old, generation)
    return error


def begin_replacing(sockets: HeldSockets, slot: Slot, old: Worker, generation: int, restart: str) -> None:
    """Tell a worker to make its successor.

    Raises:
        RestartError: there is no room for the descriptors that it needs for that.
    """
    old.handoff = None
    old.successor_generation, old.successor_restart = generation, restart
    try:
        descriptions, descriptors = sockets.share()
    except OSError as error:
        raise RestartError(f"worker {slot.index} cannot be given its sockets: {error}") from error
    _note_order(restart, FromAnchor.RESTART, old)
    order = {"generation": generation, "restart": restart, "sockets": descriptions}
    if (trace := trace_contexts.find(restart)) is not None:
        order["trace"] = trace
    old.link.tell(FromAnchor.RESTART, order, descriptors)


def _note_order(restart: str, message: FromAnchor, old: Worker) -> None:
    history.note(Note.SENT, restart=restart, side="anchor", message=message.value, peer=old.pid)


def settle(old: Worker) -> None:
    """Tell a worker that its successor is there to stay."""
    _note_order(old.successor_restart, FromAnchor.SETTLE, old)
    old.link.tell(FromAnchor.SETTLE, {})


def _revert(old: Worker, error: RestartError) -> None:
    """Tell a worker to take the place of its successor again."""
    _note_order(old.successor_restart, FromAnchor.REVERT, old)
    old.link.tell(FromAnchor.REVERT, {"error": error_to_json(error)})


class RollOutRunner:
    """What carries a roll-out out.

    Args:
        roll_out: the roll-out, which it notes everything in.
        state: what the anchor knows.
        sockets: what the workers share.
        log: the anchor's log.
        fill: starts a worker in a slot that has none.
        hung_workers: what is done about workers that do not answer.
        prepare: called when the roll-out begins, now that no other one is under way.
        conclude: called when it is over, before anybody else hears of that.
    """

    def __init__(
        self,
        roll_out: RollOut,
        state: AnchorState,
        sockets: HeldSockets,
        log: GenerationLog,
        *,
        fill: Fill,
        hung_workers: HungWorkers,
        prepare: Callable[[RollOut], None],
        conclude: Callable[[RollOut], None],
    ) -> None:
        self._roll_out = roll_out
        self._state = state
        # Whether a release serves where the new one fails.
        self._has_former = True
        self._sockets = sockets
        self.log = log.of(roll_out.report.id)
        self._fill = fill
        self._hung_workers = hung_workers
        self._prepare = prepare
        self._conclude = conclude

    async def run(self) -> None:
        """Carry it out, to its very end: until the old workers have drained. Never raises what went wrong."""
        roll_out = self._roll_out
        try:
            try:
                await self._begin()
                error = await self._replace_all() or await self._watch_probation()
                if self._state.is_stopping:
                    what = "was stopped while it restarted" if self._state.has_served else "has ended before it served"
                    self._fail(RestartWhileDraining(f"the service {what}: its log says why"), Outcome.STOPPED)
                elif error is not None:
                    await self._undo(error)
                else:
                    await self._settle()
            except Exception as error:
                # A defect of this library, or a machine in distress, may cost the roll-out, but never the service.
                self.log.exception("the restart broke down")
                await self._undo_after(RestartError(f"the roll-out broke down in the anchor: {error!r}"))
            roll_out.stage = RollOutStage.OVER
            # The consequences are drawn before anybody hears of the end: what is said and done next may stand on them.
            try:
                self._conclude(roll_out)
            except Exception:
                self.log.exception("the restart is over, and not all that follows from it done")
            self._note_outcome()
        finally:
            roll_out.stage = RollOutStage.OVER
            self._state.changes.announce()
        if roll_out.report.outcome is Outcome.SETTLED:
            await wait_until(self._state.changes, self._is_drained)
            self._state.ledger.note_drain(roll_out.report)
            report = {**roll_out.report.to_json(), "workers": [each.id for each in roll_out.report.workers]}
            history.note(Note.DRAINED, restart=roll_out.report.id, side="anchor", report=report)
            self.log.info("%s", describe_drain(roll_out.report, "the former workers have"))
        roll_out.stage = RollOutStage.DRAINED
        self._state.changes.announce()

    # The way there

    async def _begin(self) -> None:
        roll_out = self._roll_out
        await wait_until(self._state.changes, lambda: self._state.life is not Life.STARTING)
        if (before := roll_out.before) is not None:
            await wait_until(self._state.changes, lambda: before.is_over)
            roll_out.before = None
        if self._state.is_stopping:
            return
        self._prepare(roll_out)
        # Empty slots come first: nobody serves there meanwhile.
        roll_out.turns = [Turn(slot) for slot in sorted(self._state.pool.slots, key=lambda slot: not slot.is_vacant)]
        history.write_from_now_on()
        history.note(
            Note.ROLL_OUT,
            restart=roll_out.report.id,
            generation=roll_out.generation,
            begun=roll_out.report.started_at,
            caller=roll_out.caller,
            workers=len(roll_out.turns),
        )
        self.log.info(
            "the restart begins, asked for by %s: from generation %d to generation %d, %s",
            roll_out.report.asked_by,
            self._state.generation,
            roll_out.generation,
            f"{len(roll_out.turns)} workers one after the other" if len(roll_out.turns) > 1 else "1 worker",
        )

    async def _replace_all(self) -> RestartError | None:
        for turn in self._roll_out.turns:
            await self._wait_until(lambda turn=turn: turn.slot.activity is SlotActivity.NONE)  # type: ignore[misc]
            if self._state.is_stopping or (error := self._find_failure()) is not None:
                break
            if turn.slot not in self._state.pool.slots:
                turn.state = TurnState.SETTLED
                continue
            turn.state = TurnState.UNDER_WAY
            turn.old = turn.slot.serving_worker
            turn.slot.activity = SlotActivity.REPLACING
            self._note_turn(turn)
            try:
                error = await self._replace(turn)
            finally:
                turn.slot.activity = SlotActivity.NONE
                self._sum_up()
            turn.state = TurnState.SERVED if error is None else TurnState.FAILED
            self._note_turn(turn)
            if error is not None:
                return error
        return self._find_failure()

    def _note_turn(self, turn: Turn) -> None:
        history.note(
            Note.TURN,
            restart=self._roll_out.report.id,
            slot=turn.slot.index,
            state=turn.state.value,
            old=turn.old.pid if turn.old is not None else None,
            handoff=turn.report.id if turn.report is not None else None,
        )

    def _note_outcome(self) -> None:
        report, error = self._roll_out.report, self._roll_out.error
        history.note(
            Note.OUTCOME,
            restart=report.id,
            side="anchor",
            report={**report.to_json(), "workers": [each.id for each in report.workers]},
            why=str(error.args[0]) if error is not None else None,
            phase=error.phase if error is not None else None,
            stderr=error.stderr if error is not None else "",
        )

    async def _replace(self, turn: Turn) -> RestartError | None:
        old, generation = turn.old, self._roll_out.generation
        if old is not None:
            error = await self._unless_stopped(
                lambda: replace(
                    self._state, self._sockets, turn.slot, old, generation, self._roll_out.report.id, self._bypass
                )
            )
            is_unwanted = self._state.is_stopping or self._roll_out.called_off is not None
            if old.is_alive or not turn.slot.is_vacant or is_unwanted:
                return error
            # The old worker was killed too early for its successor to go on alone. That says nothing of the new code.
            turn.old = None
        filled = await self._fill(turn.slot, generation)
        turn.report = filled.report
        return filled.error

    async def _bypass(self, slot: Slot, old: Worker, generation: int) -> RestartError | None:
        # It may have been called off while it was waited for an answer.
        return self._roll_out.called_off or await self._hung_workers.bypass(slot, old, generation)

    async def _unless_stopped(self, what: Callable[[], Awaitable[RestartError | None]]) -> RestartError | None:
        error: RestartError | None = None

        async def run() -> None:
            nonlocal error
            error = await what()
            task_group.cancel_scope.cancel()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(run)
            await wait_until(self._state.changes, lambda: self._sum_up() or self._state.is_stopping)
            task_group.cancel_scope.cancel()
        return error

    async def _watch_probation(self) -> RestartError | None:
        """See that every slot goes on being served for a while."""
        if self._state.is_stopping:
            return None
        roll_out, probation = self._roll_out, self._state.config.settings.probation
        roll_out.report.outcome = Outcome.SERVING
        roll_out.stage = RollOutStage.PROBATION
        history.note(Note.STATE, restart=roll_out.report.id, side="anchor", state="probation")
        begun = anyio.current_time()
        roll_out.probation_ends = begun + probation
        self._state.changes.announce()
        with anyio.move_on_after(probation):
            await self._wait_until(lambda: roll_out.is_hurried)
        roll_out.report.phases[Phase.PROBATION] = min(probation, anyio.current_time() - begun)
        return self._find_failure()

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so, or the roll-out has failed, or is not wanted any more."""
        await wait_until(
            self._state.changes,
            lambda: self._sum_up() or self._state.is_stopping or self._find_failure() is not None or is_so(),
        )

    def _find_failure(self) -> RestartError | None:
        """Return why the roll-out cannot go on: of a slot that was replaced, and is not served any more."""
        if self._roll_out.called_off is not None:
            return self._roll_out.called_off
        for turn in self._roll_out.turns:
            if turn.state is not TurnState.SERVED:
                continue
            if turn.old is not None and turn.old.is_alive and not turn.old.is_superseded:
                if (handoff := turn.old.handoff) is not None and handoff.error is not None:
                    return handoff.error
            elif turn.slot.is_vacant:
                return RolledBack(f"worker {turn.slot.index} died after it had begun to serve", phase=Phase.PROBATION)
        return None

    # The end

    async def _settle(self) -> None:
        roll_out = self._roll_out
        self.log.debug("settling all workers")
        async with anyio.create_task_group() as task_group:
            for turn in roll_out.turns:
                if turn.old is not None and not turn.old.is_superseded:
                    task_group.start_soon(self._settle_one, turn.old)
        for turn in roll_out.turns:
            if turn.old is not None and turn.old.serves:
                # Its successor died in this very moment. The other slots cannot be undone any more, so that this one
                # follows with the next roll-out.
                self.log.error("worker %d still runs the former generation", turn.slot.index)
                turn.state = TurnState.REVERTED
            else:
                turn.state = TurnState.SETTLED
            self._note_turn(turn)
        roll_out.report.outcome = Outcome.SETTLED
        self._sum_up()
        self._tell_end()

    async def _settle_one(self, old: Worker) -> None:
        settle(old)
        with anyio.move_on_after(ANSWER_SECONDS):
            await wait_for_answer(self._state.changes, old, lambda: self._sum_up() or old.has_ended_handoff)
        if not old.has_ended_handoff:
            # It has paused, and finds the message when its loop turns again.
            self.log.error("worker pid %d was replaced, and does not answer", old.pid)
            self._hung_workers.expect_end(old)

    async def _undo(self, error: RestartError) -> None:
        """Let the old workers serve again, wherever they live."""
        turns = self._roll_out.turns
        served = [turn for turn in turns if turn.state is TurnState.SERVED]
        failed = [turn for turn in turns if turn.state is TurnState.FAILED]
        if served:
            where = f"worker {failed[0].slot.index}: " if failed else ""
            was, error = (
                error,
                RolledBack(
                    f"{where}{error.args[0]}; all {len(turns)} workers go on with the former code",
                    phase=error.phase,
                    stderr=error.stderr,
                ),
            )
            error.__cause__ = was
        reverting = [
            turn.old for turn in served if turn.old is not None and turn.old.is_alive and not turn.old.is_superseded
        ]
        for old in reverting:
            _revert(old, error)
        with anyio.move_on_after(ANSWER_SECONDS):
            await wait_until(
                self._state.changes,
                lambda: self._sum_up() or self._state.is_stopping or all(each.has_ended_handoff for each in reverting),
            )
        for turn in served:
            if turn.old is not None and turn.old.is_alive and not turn.old.is_superseded:
                turn.state = TurnState.REVERTED
            else:
                turn.state = TurnState.KEPT
                why = "does not answer" if turn.old is not None and turn.old.is_alive else "has died"
                self.log.warning("worker %d goes on with the new code: its old process %s", turn.slot.index, why)
            self._note_turn(turn)
        is_rolled_back = isinstance(error, RolledBack)
        self._fail(error, Outcome.ROLLED_BACK if is_rolled_back else Outcome.FAILED)

    async def _undo_after(self, error: RestartError) -> None:
        """Undo what can be undone, whatever it was that broke down."""
        try:
            if (turn := self._roll_out.current) is not None:
                turn.state = TurnState.FAILED
                if turn.old is not None and turn.old.is_alive:
                    _revert(turn.old, error)
            await self._undo(error)
        except Exception:
            self.log.exception("the restart could not be undone")
            self._fail(error, Outcome.FAILED)

    def _fail(self, error: RestartError, outcome: Outcome) -> None:
        roll_out = self._roll_out
        roll_out.error = error
        roll_out.report.error = str(error)
        roll_out.report.outcome = outcome
        self._sum_up()
        self._tell_end()

    def _tell_end(self) -> None:
        report, error = self._roll_out.report, self._roll_out.error
        has_failed = report.outcome in (Outcome.FAILED, Outcome.ROLLED_BACK)
        self.log.log(
            logging.ERROR if has_failed else logging.INFO,
            "the restart %s",
            describe_verdict(report, error, self._roll_out.generation - 1 if self._has_former else None),
        )

    def _is_drained(self) -> bool:
        self._sum_up()
        return not any(turn.old is not None and turn.old.is_alive for turn in self._roll_out.turns)

    def _sum_up(self) -> bool:
        """Bring the report up to date; False, so that it can stand in a condition that is waited for."""
        turns = self._roll_out.turns
        for turn in turns:
            handoff: HandoffStatus | None = turn.old.handoff if turn.old is not None else None
            if handoff is not None and handoff.report is not None:
                turn.report = handoff.report
        report = self._roll_out.report
        sum_up(report, [turn.report for turn in turns if turn.report is not None])
        if any(turn.old is not None and turn.old.is_alive for turn in turns):
            # Some have drained, and others have not: how long it takes, and what becomes of all, is known at its end.
            report.phases.pop(Phase.DRAIN, None)
        return False


def sum_up(report: RestartReport, workers: Iterable[RestartReport]) -> None:
    """Put the restarts of all workers into the report of the roll-out."""
    report.workers = list(workers)
    for phase in (Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT):
        durations = [each.phases[phase] for each in report.workers if phase in each.phases]
        if durations:
            # The workers go through these phases one after the other.
            report.phases[phase] = sum(durations)
    drains = [each.phases[Phase.DRAIN] for each in report.workers if Phase.DRAIN in each.phases]
    if drains:
        # The workers drain at the same time.
        report.phases[Phase.DRAIN] = max(drains)
    report.accept_gap = max((each.accept_gap for each in report.workers if each.accept_gap is not None), default=None)
    for names in ("inherited", "created", "unclaimed"):
        setattr(report, names, list(dict.fromkeys(name for each in report.workers for name in getattr(each, names))))
    report.release = next((each.release for each in reversed(report.workers) if each.release), "")
    report.unanswered = [what for each in report.workers for what in each.unanswered]
    report.cut_requests = [request for each in report.workers for request in each.cut_requests]
    report.hurried = [what for each in report.workers for what in each.hurried]
    report.lost = sum(each.lost for each in report.workers)
    report.drain = add_up(each.drain for each in report.workers)


def add_up(counts: Iterable[DrainCount]) -> DrainCount:
    """Return the sum of counts."""
    counts = list(counts)
    return DrainCount(**{each.name: sum(getattr(count, each.name) for count in counts) for each in fields(DrainCount)})
