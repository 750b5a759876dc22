"""The workers of an anchor and the slots they work in: data, and what can be told from it.

Nothing here does I/O or reads a clock. The anchor notes what it hears and when, and asks here what follows from that.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._management.ledger import Closed
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process
from ecdysis_async.errors import RestartError
from ecdysis_async.report import DrainCount, RestartReport, State

from .metrics_files import MetricsFile

__all__ = [
    "HandoffStatus",
    "ReplaceReason",
    "Slot",
    "SlotActivity",
    "Worker",
    "WorkerPool",
    "backoff_seconds",
]

# A crashed worker that had served for so long is replaced at once. Otherwise its slot waits, twice as long each time.
HEALTHY_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 30.0


class SlotActivity(enum.Enum):
    """What is being done about a slot."""

    NONE = "none"
    FILLING = "filling"  # a worker is being started where there is none
    REPLACING = "replacing"  # its worker makes its own successor
    RETIRING = "retiring"  # its worker leaves, and the slot with it


@dataclass(frozen=True, slots=True)
class HandoffStatus:
    """What a worker has said last of the restart that it carries out.

    Attributes:
        state: where its side of the handoff stands; None before the first state is known.
        is_over: whether the handoff has ended.
        report: what the worker's report says so far.
        error: why the handoff has failed.
    """

    state: PredecessorState | None
    is_over: bool
    report: RestartReport | None
    error: RestartError | None


@dataclass(slots=True, eq=False)
class Worker:
    """One process that serves, as its anchor knows it.

    Attributes:
        generation: the roll-out that it came with.
        process: the process that was spawned.
        link: the anchor's end of the socket between the two.
        born: when it was spawned, on the anchor's clock.
        starter: the worker that asked for it, and that it follows.
        pid: what it calls its pid. This differs from ``process.pid`` where a wrapper was spawned.
        state: where it says that it stands.
        is_done_accepting: whether it says that it accepts no more, and has answered everyone who queued.
        connections: how many connections it has, and jobs.
        jobs: how many of those are jobs of the application's own, without a connection.
        release: what it runs, in words; empty where it has not told.
        serving: what it still serves while it drains, in a few words each.
        requests: how many requests it has served, or connections where its server counts no requests.
        rss: how many bytes of it are resident; None where it cannot tell.
        closed: how its connections have ended, as far as it has said so.
        drain: what has become of its connections since it has begun to leave, as far as it has said so.
        cut_requests: what it has cut at the deadline, in a few words each.
        request_limit: after how many requests it is replaced.
        silence: for how many seconds it has said nothing. Seconds in which the anchor did not listen do not count.
        leaving: for how many seconds it has been leaving, counted like the silence.
        heard: how many messages have come from it.
        heard_at: when the last one came, on the anchor's clock.
        is_bypassed: whether the anchor starts its successor, because it does not answer.
        ends_at: when its drain ends at the latest, on the anchor's clock; None before it drains.
        handoff: what it has said of its restart.
        served_since: when it began to serve; NaN before that.
        successor_generation: the generation that its successor is to be.
        successor_restart: the id of the restart that its successor is started for.
        trace: the trace context in which it has asked for its successor, if it has told one.
        reopened: the number of the last request to open log files anew that it has answered, and how many files it had.
        is_told_to_leave: whether it was told to stop, so that its end is no crash.
        is_hung: whether it was ended by force, because its loop did not turn.
        metrics_file: what its prometheus_client writes to.
        left_unasked: whether it leaves of its own accord, and no worker has taken its place.
        exclusive: what it says that it holds, or waits for, that one process holds at a time: the name, whether it is
            held, and since when, on the anchor's clock.
        environment: the variables that it was started with.
        launch: what starts the same release again, wherever links lead by then; None where it is not known.
        exit_status: how it ended; None while it lives.
    """

    generation: int
    process: Process
    link: WorkerLink
    born: float
    starter: Worker | None = None
    pid: int = 0
    state: State = State.STARTING
    is_done_accepting: bool = False
    connections: int = 0
    jobs: int = 0
    release: str = ""
    serving: list[str] = field(default_factory=list)
    requests: int = 0
    rss: int | None = None
    closed: Mapping[Closed, int] = field(default_factory=dict)
    drain: DrainCount = field(default_factory=DrainCount)
    cut_requests: list[str] = field(default_factory=list)
    request_limit: float = math.inf
    silence: float = 0.0
    leaving: float = 0.0
    heard: int = 0
    heard_at: float = math.nan
    is_bypassed: bool = False
    ends_at: float | None = None
    handoff: HandoffStatus | None = None
    successor_generation: int = 0
    successor_restart: str = ""
    trace: str | None = None
    served_since: float = math.nan
    is_told_to_leave: bool = False
    is_hung: bool = False
    metrics_file: MetricsFile | None = None
    left_unasked: bool = False
    reopened: tuple[int, int] = (0, 0)
    exclusive: list[tuple[str, bool, float]] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    launch: Launch | None = None
    exit_status: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.exit_status is None

    @property
    def serves(self) -> bool:
        """Whether it accepts."""
        return self.is_alive and self.state is State.SERVING

    def silent_seconds(self, now: float) -> float:
        """Return for how long it has said nothing."""
        return 0.0 if math.isnan(self.heard_at) else now - self.heard_at

    @property
    def is_superseded(self) -> bool:
        """Whether another worker has its place without a handoff, so that it can never take it again."""
        return self.is_bypassed and self.is_told_to_leave

    @property
    def is_leaving(self) -> bool:
        """Whether it will never accept again."""
        return self.state in (State.DRAINING, State.ENDED)

    @property
    def is_to_end(self) -> bool:
        """Whether it has to be gone once its drain is over, whether or not it has said that it leaves."""
        is_followed = self.handoff is not None and self.handoff.is_over and self.handoff.error is None
        return self.is_leaving or self.is_told_to_leave or is_followed

    @property
    def has_ended_handoff(self) -> bool:
        """Whether nothing more will come of its restart: the handoff is over, or the worker is dead."""
        return not self.is_alive or (self.handoff is not None and self.handoff.is_over)

    def find_replace_reason(self, max_rss: int | None) -> ReplaceReason | None:
        """Say which limit it has reached, so that another worker is to take its place.

        Args:
            max_rss: how many bytes may be resident.
        """
        if not self.serves:
            return None
        if self.requests >= self.request_limit:
            return ReplaceReason.REQUESTS
        if max_rss is not None and self.rss is not None and self.rss > max_rss:
            return ReplaceReason.MEMORY
        return None


@dataclass(slots=True, eq=False)
class Slot:
    """Where one worker follows another.

    Attributes:
        index: its number, from 0 on.
        workers: those alive, the oldest first.
        activity: what is being done about it.
        bypassed: the worker that does not answer, in whose place another one is being started.
        failures: how often in a row its worker has ended before it had served for long.
        retry_at: when a worker may be started here again, on the anchor's clock.
    """

    index: int
    workers: list[Worker] = field(default_factory=list)
    activity: SlotActivity = SlotActivity.NONE
    bypassed: Worker | None = None
    failures: int = 0
    retry_at: float = 0.0

    @property
    def serving_worker(self) -> Worker | None:
        """The worker that accepts, if there is one."""
        return next((worker for worker in reversed(self.workers) if worker.serves), None)

    @property
    def is_vacant(self) -> bool:
        """Whether no worker here serves, is about to, or can again."""
        return all(worker.is_leaving for worker in self.workers)

    def note_end(self, worker: Worker, now: float) -> None:
        """Take a dead worker out; where it should have lived on, say when the next one may be started."""
        self.workers.remove(worker)
        is_orderly = worker.is_told_to_leave or worker.left_unasked or worker.state is State.DRAINING
        # A worker that never served has failed to start. Its starter counts that.
        if is_orderly or math.isnan(worker.served_since):
            return
        if self.is_vacant:
            self.note_crash(now, now - worker.served_since)

    def note_leaving(self, worker: Worker, now: float) -> None:
        """Take note that a worker drains; where it should have served on, say when the next one may be started."""
        is_followed = worker.handoff is not None and worker.handoff.is_over and worker.handoff.error is None
        if worker.is_told_to_leave or math.isnan(worker.served_since) or is_followed or not self.is_vacant:
            return
        worker.left_unasked = True
        self.note_crash(now, now - worker.served_since)

    def note_crash(self, now: float, served_seconds: float = 0.0) -> None:
        """Take note that a worker is to be started again, and when."""
        self.failures = 0 if served_seconds >= HEALTHY_SECONDS else self.failures + 1
        self.retry_at = now + backoff_seconds(self.failures)


class ReplaceReason(enum.Enum):
    """Why a worker is to be replaced."""

    REQUESTS = "it has served {requests:,} requests (--max-requests)"
    MEMORY = "it has {megabytes:,.0f} MB resident (--max-rss)"


@dataclass(slots=True)
class WorkerPool:
    """All slots of a service, and through them all workers.

    Attributes:
        target: how many slots there shall be.
        slots: the slots there are, by their numbers.
    """

    target: int
    slots: list[Slot] = field(default_factory=list)

    def __iter__(self) -> Iterator[Worker]:
        return (worker for slot in self.slots for worker in slot.workers)

    @property
    def serving(self) -> int:
        """How many slots are served."""
        return sum(slot.serving_worker is not None for slot in self.slots)

    @property
    def connections(self) -> int:
        """How many connections all workers have together."""
        return sum(worker.connections for worker in self)

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that a serving worker was started with, which stands for all; without one, the anchor's own."""
        worker = next((worker for worker in self if worker.serves), None)
        return worker.environment if worker is not None else os.environ

    def enlarge(self) -> Slot:
        """Add a slot."""
        slot = Slot(self.slots[-1].index + 1 if self.slots else 0)
        self.slots.append(slot)
        return slot


def backoff_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    if not failures:
        return 0.0
    return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
