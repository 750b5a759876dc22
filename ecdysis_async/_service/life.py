"""Where one generation stands: data that its block, its restarts, its leaving and its management share."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.generation import Generation
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import SuccessorState
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._management.management import Management
from ecdysis_async._system.reserve import Reserve
from ecdysis_async.report import Outcome, RestartReport, State

from .counting import Counting
from .exclusive import Exclusives

__all__ = ["Life", "Stop"]


class Stop(enum.Enum):
    """Whether a generation was told to stop before it began to leave."""

    NOT_ASKED = enum.auto()
    ASKED = enum.auto()  # by the application
    PARTIAL = enum.auto()  # the same, and the application itself tells the service manager
    TOLD = enum.auto()  # from outside, by a signal or a command: the process is to end as well


@dataclass(slots=True, eq=False)
class Life:
    """One generation of a service, from its first socket to its end.

    Attributes:
        generation: what its handoffs are told.
        plane: its sockets, its gate and its connections.
        task_group: where its tasks run, to the end of the block.
        body: the body of the block; cancelled where this generation is not to serve any more.
        counting: what is counted of the service.
        management: who speaks for the service.
        state: where it stands.
        stop: whether it was told to stop. It is remembered, because a restart that is over in the same moment does not
            hear of it any more.
        is_superseded: whether another process accepts in its place, which it has not started.
        stop_signals: how many signals have told it so.
        inheritance: the handoff that it came from, if it did.
        handover: the last restart that was asked for.
        last_report: what has become of that, or else of the restart that it came from.
        phase_begun: since when the restart is in its state, on the loop's clock.
        drain_deadline: until when the drain may last, on the loop's clock, once it has begun.
        reserve: descriptors for a restart where no other is left.
        leaving: set when this generation will never accept again.
        finished: set when it accepts no more, and the application may close its servers.
        drained: set when its connections have ended.
        settled: set when it is final: the handoff that it came from has settled, or it came from none, and serves.
        exclusives: what it holds that only one process of the service may.
        handed_over: set when the last restart is over on this side, and its successor has ended or is to be left alone.
    """

    generation: Generation
    plane: DataPlane
    task_group: TaskGroup
    body: anyio.CancelScope
    counting: Counting = field(init=False)
    management: Management = field(init=False)
    state: State = State.STARTING
    stop: Stop = Stop.NOT_ASKED
    is_superseded: bool = False
    stop_signals: int = 0
    inheritance: SuccessorSide | None = None
    handover: PredecessorSide | None = None
    last_report: RestartReport | None = None
    phase_begun: float = 0.0
    drain_deadline: float | None = None
    reserve: Reserve = field(default_factory=Reserve)
    leaving: anyio.Event = field(default_factory=anyio.Event)
    finished: anyio.Event = field(default_factory=anyio.Event)
    drained: anyio.Event = field(default_factory=anyio.Event)
    settled: anyio.Event = field(default_factory=anyio.Event)
    exclusives: Exclusives | None = None
    handed_over: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self.counting = Counting(self.plane.tracker)

    @property
    def has_begun(self) -> bool:
        """Whether it has ever accepted, or was told to."""
        return self.state not in (State.STARTING, State.WAITING)

    @property
    def is_leaving(self) -> bool:
        """Whether it will never accept again."""
        return self.state in (State.DRAINING, State.ENDED)

    @property
    def is_accepting(self) -> bool:
        """Whether it accepts, or may do so again."""
        return self.state in (State.SERVING, State.PAUSED)

    @property
    def is_aborted(self) -> bool:
        """Whether the restart that it came from has failed, so that it is not to serve."""
        return self.inheritance is not None and self.inheritance.state is SuccessorState.ABORTED

    @property
    def is_process_to_end(self) -> bool:
        """Whether the whole process is to end with this generation, and not just its block."""
        is_stopped = self.inheritance is not None and self.inheritance.state in (
            SuccessorState.STOPPED,
            SuccessorState.RETURNED,
        )
        return self.has_successor or self.management.owns_process or self.stop is Stop.TOLD or is_stopped

    @property
    def ends_in(self) -> float | None:
        """Within how many seconds its drain ends; None while none is under way."""
        return max(0.0, self.drain_deadline - anyio.current_time()) if self.drain_deadline is not None else None

    @property
    def has_successor(self) -> bool:
        """Whether a successor goes on with what this generation leaves."""
        return self.handover is not None and self.handover.report.outcome is Outcome.SETTLED

    @property
    def older_generations(self) -> list[Ancestor]:
        """The older generations that are still there: they drain."""
        older = [*self.generation.lineage.ancestors]
        predecessor = self.inheritance.predecessor if self.inheritance is not None else None
        if (
            self.inheritance is not None
            and self.inheritance.state is SuccessorState.STOPPED
            and predecessor is not None
        ):
            # It was not listened to: it has stopped together with this one.
            older.append(predecessor)
        return [each for each in older if not each.peer.is_dead()]

    def note_change(self) -> None:
        """Note that a restart is in another state, and tell those who look on."""
        self.phase_begun = anyio.current_time()
        self.management.changed()
