"""A roll-out: the workers of an anchor are replaced one after the other, and all of it becomes final, or none of it.

Each worker hands its slot over to its successor by the handoff that a service without workers has too, and stays on
probation, able to take its place again, until the last slot is served by the new code and has been for a while. Only
then all settle. A failure in between takes every slot back.
"""

from __future__ import annotations

import enum
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._management.changes import Changes
from ecdysis_async.errors import RestartError, RestartWhileDraining, RolledBack, SuccessorFailed
from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport

from .pool import HandoffStatus, Slot, SlotActivity, Worker, WorkerPool

__all__ = ["Foreman", "RollOut", "Turn", "TurnState", "replace", "sum_up"]

# What a worker may take over its handoff besides its successor's start, seconds; its own limits are below that.
HANDOFF_SECONDS = 60.0
# How long a worker may take to settle, or to take its place again, seconds.
ANSWER_SECONDS = 30.0


class Foreman(Protocol):
    """What a roll-out asks of the anchor."""

    crew: WorkerPool
    changes: Changes
    log: GenerationLog
    ready_timeout: float

    def prepare(self, roll_out: RollOut) -> None:
        """Tell whom it concerns that a roll-out begins, now that no other is under way."""

    def conclude(self, roll_out: RollOut) -> None:
        """Draw the consequences of what a roll-out has come to, and tell whom it concerns."""

    async def fill(self, slot: Slot, generation: int) -> PredecessorSide:
        """Start a worker where there is none; return once it serves, or has failed."""

    def begin_replacing(self, slot: Slot, worker: Worker, generation: int) -> None:
        """Let a worker make its successor."""

    def settle(self, worker: Worker) -> None:
        """Tell a worker that its successor is there to stay."""

    def revert(self, worker: Worker, error: RestartError) -> None:
        """Tell a worker to take the place of its successor again."""


class TurnState(enum.Enum):
    """Where a slot stands in a roll-out."""

    PENDING = "pending"
    UNDER_WAY = "under way"
    SERVED = "served"  # by the new code; the old worker is on probation with it, if there is one
    FAILED = "failed"  # its old worker serves, if there is one
    REVERTED = "reverted"  # it was served by the new code, and is by the old one again
    KEPT = "kept"  # the same, but the old worker is dead: there is only the new code left
    SETTLED = "settled"


@dataclass(slots=True, eq=False)
class Turn:
    """One slot of a roll-out.

    Attributes:
        slot: which.
        state: where it stands.
        old: the worker to be replaced; None where there was none.
        report: the restart of this slot.
    """

    slot: Slot
    state: TurnState = TurnState.PENDING
    old: Worker | None = None
    report: RestartReport | None = None


async def replace(foreman: Foreman, slot: Slot, old: Worker, generation: int) -> RestartError | None:
    """Let a worker be followed by one of another generation; return once that serves, on probation, or why not."""
    try:
        foreman.begin_replacing(slot, old, generation)
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
        # Killed in the middle: its successor goes on without it, if that can (guarantee G6).
        if slot.serving_worker is not None:
            return True
        if slot.workers:
            return False
        error = SuccessorFailed(f"worker {slot.index} (pid {old.pid}) died while it was being replaced")
        return True

    with anyio.move_on_after(foreman.ready_timeout + HANDOFF_SECONDS) as scope:
        await wait_until(foreman.changes, is_decided)
    if scope.cancelled_caught:
        error = RestartError(
            f"worker {slot.index} (pid {old.pid}) does not answer: is it stopped (SIGSTOP, a debugger)? "
            "Continue or kill it, and try again"
        )
        # Should it go on after all, it shall not begin.
        foreman.revert(old, error)
    return error


async def wait_until(changes: Changes, is_so: Callable[[], bool]) -> None:
    """Wait until something is so, looking again at each change."""
    while True:
        change = changes.next()
        if is_so():
            return
        await change.wait()


class RollOut:
    """One roll-out.

    Args:
        foreman: the anchor.
        generation: what its new workers are.
        probation: how long every slot must be served by the new code before it is final, seconds.
        is_told: systemd may know of it already.
        before: another one that is on probation, or about to settle: it is waited for.

    Attributes:
        generation: what its new workers are.
        report: what stands so far, for all workers together, and for each.
        error: why it failed, once it has.
        turns: its slots, in the order they are replaced; none before it has begun.
        is_told: whether systemd may know of it already.
        before: the one that has to end first; None once it has.
        serving: set when every slot is served by the new code.
        over: set when it is final, or has failed and been undone.
        drained: set when no old worker is left.
    """

    def __init__(
        self, foreman: Foreman, generation: int, probation: float, *, is_told: bool, before: RollOut | None
    ) -> None:
        self.generation = generation
        self.report = RestartReport(
            id=uuid.uuid4().hex[:12],
            generation=generation,
            # Whom everybody outside knows, before and after.
            predecessor_pid=os.getpid(),
            successor_pid=os.getpid(),
            started_at=time.time(),
        )
        self.error: RestartError | None = None
        self.turns: list[Turn] = []
        self.serving = anyio.Event()
        self.over = anyio.Event()
        self.drained = anyio.Event()
        self.probation_ends: float | None = None
        self.is_told = is_told
        self.before = before
        self._foreman = foreman
        self._probation = probation
        self._called_off: RestartError | None = None
        self._stopped = False
        self._is_hurried = False

    @property
    def current(self) -> Turn | None:
        """The slot that is being replaced at this moment."""
        return next((turn for turn in self.turns if turn.state is TurnState.UNDER_WAY), None)

    async def run(self) -> None:
        """Carry it out, to its very end: until the old workers have drained. Never raises what went wrong."""
        try:
            try:
                await self._begin()
                error = await self._replace_all() or await self._watch_probation()
                if self._stopped:
                    self._fail(RestartWhileDraining("the service was stopped while it restarted"), Outcome.STOPPED)
                elif error is not None:
                    await self._undo(error)
                else:
                    await self._settle()
            except Exception as error:
                # A defect of this library, or a machine in distress: it may cost the roll-out, never the service.
                self._foreman.log.exception("restart %s broke down", self.report.id)
                await self._undo_after(RestartError(f"the roll-out broke down in the anchor: {error!r}"))
            self.over.set()
            # Before anybody hears of it: what is said and done next may stand on it.
            try:
                self._foreman.conclude(self)
            except Exception:
                self._foreman.log.exception("restart %s is over, and not all that follows from it done", self.report.id)
        finally:
            self.over.set()
            self._foreman.changes.announce()
        if self.report.outcome is Outcome.SETTLED:
            await wait_until(self._foreman.changes, self._is_drained)
        self.drained.set()
        self._foreman.changes.announce()

    def call_off(self) -> None:
        """Undo it, if no new worker was told to accept yet; later it goes on."""
        current = self.current
        is_early = all(turn.state is TurnState.PENDING for turn in self.turns if turn is not current)
        if self.over.is_set() or not is_early or (current is not None and _is_committed(current)):
            return
        self._called_off = RestartError("the restart was called off")
        if current is not None and current.old is not None:
            self._foreman.revert(current.old, self._called_off)
        self._foreman.changes.announce()

    def end_probation(self) -> None:
        """Let the probation end now, or as soon as it has begun."""
        self._is_hurried = True
        self._foreman.changes.announce()

    def stop(self) -> None:
        """Take note that the service stops: there is nothing left to decide."""
        self._stopped = True
        if self.before is not None:
            self.before.stop()
        self._foreman.changes.announce()

    # The way there

    async def _begin(self) -> None:
        if self.before is not None:
            await self.before.over.wait()
            self.before = None
        if self._stopped:
            return
        self._foreman.prepare(self)
        # Empty slots first: nobody serves there meanwhile.
        self.turns = [Turn(slot) for slot in sorted(self._foreman.crew.slots, key=lambda slot: not slot.is_vacant)]
        self._foreman.log.info(
            "restart %s: rolling generation %d out to %d workers", self.report.id, self.generation, len(self.turns)
        )

    async def _replace_all(self) -> RestartError | None:
        for turn in self.turns:
            await self._wait_until(lambda turn=turn: turn.slot.activity is SlotActivity.NONE)  # type: ignore[misc]
            if self._stopped or (error := self._find_failure()) is not None:
                break
            if turn.slot not in self._foreman.crew.slots:
                turn.state = TurnState.SETTLED
                continue
            turn.state = TurnState.UNDER_WAY
            turn.old = turn.slot.serving_worker
            turn.slot.activity = SlotActivity.REPLACING
            try:
                error = await self._replace(turn)
            finally:
                turn.slot.activity = SlotActivity.NONE
                self._sum_up()
            if error is not None:
                turn.state = TurnState.FAILED
                return error
            turn.state = TurnState.SERVED
        return self._find_failure()

    async def _replace(self, turn: Turn) -> RestartError | None:
        old = turn.old
        if old is not None:
            error = await self._unless_stopped(lambda: replace(self._foreman, turn.slot, old, self.generation))
            if old.is_alive or not turn.slot.is_vacant or self._stopped or self._called_off is not None:
                return error
            # It was killed too early for its successor to go on alone. That says nothing of the new code.
            turn.old = None
        handover = await self._foreman.fill(turn.slot, self.generation)
        turn.report = handover.report
        return handover.error

    async def _unless_stopped(self, what: Callable[[], Awaitable[RestartError | None]]) -> RestartError | None:
        error: RestartError | None = None

        async def run() -> None:
            nonlocal error
            error = await what()
            task_group.cancel_scope.cancel()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(run)
            await wait_until(self._foreman.changes, lambda: self._sum_up() or self._stopped)
            task_group.cancel_scope.cancel()
        return error

    async def _watch_probation(self) -> RestartError | None:
        """See that every slot goes on being served for a while."""
        if self._stopped:
            return None
        self.report.outcome = Outcome.SERVING
        self.serving.set()
        begun = anyio.current_time()
        self.probation_ends = begun + self._probation
        self._foreman.changes.announce()
        with anyio.move_on_after(self._probation):
            await self._wait_until(lambda: self._is_hurried)
        self.report.phases[Phase.PROBATION] = min(self._probation, anyio.current_time() - begun)
        return self._find_failure()

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so, or the roll-out has failed, or is not wanted any more."""
        await wait_until(
            self._foreman.changes,
            lambda: self._sum_up() or self._stopped or self._find_failure() is not None or is_so(),
        )

    def _find_failure(self) -> RestartError | None:
        """Return why the roll-out cannot go on: of a slot that was replaced, and is not served any more."""
        if self._called_off is not None:
            return self._called_off
        for turn in self.turns:
            if turn.state is not TurnState.SERVED:
                continue
            if turn.old is not None and turn.old.is_alive:
                if (handoff := turn.old.handoff) is not None and handoff.error is not None:
                    return handoff.error
            elif turn.slot.is_vacant:
                return RolledBack(f"worker {turn.slot.index} died after it had begun to serve", phase=Phase.PROBATION)
        return None

    # The end

    async def _settle(self) -> None:
        self._foreman.log.info("restart %s: settling all workers", self.report.id)
        olds = [turn.old for turn in self.turns if turn.old is not None]
        for old in olds:
            self._foreman.settle(old)
        with anyio.move_on_after(ANSWER_SECONDS):
            await wait_until(self._foreman.changes, lambda: self._sum_up() or all(map(_has_ended_probation, olds)))
        for turn in self.turns:
            if turn.old is not None and turn.old.serves:
                # Its successor died in the very moment. The others cannot be undone any more: this one follows later.
                self._foreman.log.error("worker %d still runs the former generation", turn.slot.index)
                turn.state = TurnState.REVERTED
            else:
                turn.state = TurnState.SETTLED
        self.report.outcome = Outcome.SETTLED
        self._sum_up()

    async def _undo(self, error: RestartError) -> None:
        """Let the old workers serve again, wherever they live."""
        served = [turn for turn in self.turns if turn.state is TurnState.SERVED]
        failed = [turn for turn in self.turns if turn.state is TurnState.FAILED]
        if served:
            where = f"worker {failed[0].slot.index}: " if failed else ""
            was, error = (
                error,
                RolledBack(
                    f"{where}{error.args[0]}; all {len(self.turns)} workers go on with the former code",
                    phase=error.phase,
                    stderr=error.stderr,
                ),
            )
            error.__cause__ = was
        reverting = [turn.old for turn in served if turn.old is not None and turn.old.is_alive]
        for old in reverting:
            self._foreman.revert(old, error)
        with anyio.move_on_after(ANSWER_SECONDS):
            await wait_until(
                self._foreman.changes,
                lambda: self._sum_up() or self._stopped or all(map(_has_ended_probation, reverting)),
            )
        for turn in served:
            if turn.old is not None and turn.old.is_alive:
                turn.state = TurnState.REVERTED
            else:
                turn.state = TurnState.KEPT
                self._foreman.log.warning(
                    "worker %d goes on with the new code: its old process has died", turn.slot.index
                )
        is_rolled_back = isinstance(error, RolledBack)
        self._fail(error, Outcome.ROLLED_BACK if is_rolled_back else Outcome.FAILED)

    async def _undo_after(self, error: RestartError) -> None:
        """Undo what can be undone, whatever it was that broke down."""
        try:
            if (turn := self.current) is not None:
                turn.state = TurnState.FAILED
                if turn.old is not None and turn.old.is_alive:
                    self._foreman.revert(turn.old, error)
            await self._undo(error)
        except Exception:
            self._foreman.log.exception("restart %s could not be undone", self.report.id)
            self._fail(error, Outcome.FAILED)

    def _fail(self, error: RestartError, outcome: Outcome) -> None:
        self.error = error
        self.report.error = str(error)
        self.report.outcome = outcome
        self._sum_up()
        self._foreman.log.info("restart %s: %s", self.report.id, outcome)

    def _is_drained(self) -> bool:
        self._sum_up()
        return not any(turn.old is not None and turn.old.is_alive for turn in self.turns)

    def _sum_up(self) -> bool:
        for turn in self.turns:
            handoff: HandoffStatus | None = turn.old.handoff if turn.old is not None else None
            if handoff is not None and handoff.report is not None:
                turn.report = handoff.report
        sum_up(self.report, [turn.report for turn in self.turns if turn.report is not None])
        return False


def sum_up(report: RestartReport, workers: Iterable[RestartReport]) -> None:
    """Put the restarts of all workers into the report of the roll-out."""
    report.workers = list(workers)
    for phase in (Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT):
        durations = [each.phases[phase] for each in report.workers if phase in each.phases]
        if durations:
            # One after the other.
            report.phases[phase] = sum(durations)
    drains = [each.phases[Phase.DRAIN] for each in report.workers if Phase.DRAIN in each.phases]
    if drains:
        # All at a time.
        report.phases[Phase.DRAIN] = max(drains)
    report.accept_gap = max((each.accept_gap for each in report.workers if each.accept_gap is not None), default=None)
    for names in ("inherited", "created", "unclaimed"):
        setattr(report, names, list(dict.fromkeys(name for each in report.workers for name in getattr(each, names))))
    report.lost = sum(each.lost for each in report.workers)
    report.drain = DrainCount(
        drained=sum(each.drain.drained for each in report.workers),
        silent=sum(each.drain.silent for each in report.workers),
        transferred=sum(each.drain.transferred for each in report.workers),
        cut=sum(each.drain.cut for each in report.workers),
    )


def _is_committed(turn: Turn) -> bool:
    handoff = turn.old.handoff if turn.old is not None else None
    return handoff is not None and handoff.state in (PredecessorState.COMMITTING, PredecessorState.PROBATION)


def _has_ended_probation(old: Worker) -> bool:
    return not old.is_alive or (old.handoff is not None and old.handoff.is_over)
