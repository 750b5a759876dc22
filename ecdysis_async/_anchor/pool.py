"""The workers of an anchor and the slots they work in: data, and what can be told from it.

No I/O and no clock: the anchor notes what it hears and when, and asks here what follows from it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.process import Process
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport

__all__ = [
    "HandoffStatus",
    "ReplaceReason",
    "Slot",
    "SlotActivity",
    "Worker",
    "WorkerPool",
    "WorkerState",
    "backoff_seconds",
]

# A worker that crashed is replaced at once if it had served for so long; else it waits, twice as long each time.
HEALTHY_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 30.0


class WorkerState(enum.StrEnum):
    """Where a worker says that it stands: the states of its ``Ecdysis`` (see ``State`` in supervisor.py)."""

    STARTING = "starting"
    WAITING = "waiting"
    SERVING = "serving"
    PAUSED = "paused"
    DRAINING = "draining"
    ENDED = "ended"


class SlotActivity(enum.Enum):
    """What is being done about a slot."""

    NONE = "none"
    FILLING = "filling"  # a worker is being started where there is none
    REPLACING = "replacing"  # its worker makes its own successor
    RETIRING = "retiring"  # its worker leaves, and the slot with it


@dataclass(frozen=True, slots=True)
class HandoffStatus:
    """What a worker has said last of the restart that it carries out."""

    state: PredecessorState | None
    is_over: bool
    report: RestartReport | None
    error: RestartError | None


@dataclass(slots=True, eq=False)
class Worker:
    """One process.

    Attributes:
        generation: which roll-out it came with.
        process: as it was spawned.
        line: this end of it.
        born: when, on the anchor's clock.
        starter: the worker that it follows, if that asked for it.
        pid: its own word for it, which is another one where a wrapper was spawned.
        state: its own word.
        is_done_accepting: its own word, too: it accepts no more, and has answered who queued.
        connections, requests, rss: its own words; requests are connections where its server counts none.
        request_limit: after how many requests it is replaced.
        silence: for how many seconds it has said nothing, not counting those in which the anchor did not listen.
        handoff: what it has said of its successor.
        served_since: when it began to serve; NaN before.
        successor_generation: which one its successor is to be.
        reopened: the number of the last request to open its log files anew that it has answered, and how many it did.
        is_told_to_leave: whether it was told to stop, so that its end is no crash.
        has_deserted: whether it leaves of its own accord, and nobody has taken its place.
        environment: what it was started with.
        exit_status: how it ended; None while it lives.
    """

    generation: int
    process: Process
    line: WorkerLink
    born: float
    starter: Worker | None = None
    pid: int = 0
    state: WorkerState = WorkerState.STARTING
    is_done_accepting: bool = False
    connections: int = 0
    requests: int = 0
    rss: int | None = None
    request_limit: float = math.inf
    silence: float = 0.0
    handoff: HandoffStatus | None = None
    successor_generation: int = 0
    served_since: float = math.nan
    is_told_to_leave: bool = False
    left_unasked: bool = False
    reopened: tuple[int, int] = (0, 0)
    environment: Mapping[str, str] = field(default_factory=dict)
    exit_status: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.exit_status is None

    @property
    def serves(self) -> bool:
        """Whether it accepts."""
        return self.is_alive and self.state is WorkerState.SERVING


@dataclass(slots=True, eq=False)
class Slot:
    """Where one worker follows another.

    Attributes:
        index: from 0 on.
        workers: those alive, the oldest first.
        occupation: what is being done about it.
        failures: how often in a row its worker ended before it had served for long.
        retry_at: when a worker may be started here again, on the anchor's clock.
    """

    index: int
    workers: list[Worker] = field(default_factory=list)
    activity: SlotActivity = SlotActivity.NONE
    failures: int = 0
    retry_at: float = 0.0

    @property
    def serving_worker(self) -> Worker | None:
        """The worker that accepts, if there is one."""
        return next((worker for worker in reversed(self.workers) if worker.serves), None)

    @property
    def is_vacant(self) -> bool:
        """Whether nobody serves here, and nobody is about to, or can again."""
        return all(worker.state in (WorkerState.DRAINING, WorkerState.ENDED) for worker in self.workers)

    def note_end(self, worker: Worker, now: float) -> None:
        """Take a dead worker out; where it should have lived on, say when the next one may be started."""
        self.workers.remove(worker)
        # One that never served has failed to start: that counts whoever has started it.
        is_orderly = worker.is_told_to_leave or worker.left_unasked or worker.state is WorkerState.DRAINING
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
    """All slots.

    Attributes:
        target: how many there shall be.
    """

    target: int
    slots: list[Slot] = field(default_factory=list)

    def __iter__(self) -> Iterator[Worker]:
        return (worker for slot in self.slots for worker in slot.workers)

    @property
    def serving(self) -> int:
        """How many slots are served."""
        return sum(slot.serving_worker is not None for slot in self.slots)

    def enlarge(self) -> Slot:
        """Add a slot."""
        slot = Slot(self.slots[-1].index + 1 if self.slots else 0)
        self.slots.append(slot)
        return slot

    def find_slot(self, worker: Worker) -> Slot | None:
        """Return the slot that a worker is in."""
        return next((slot for slot in self.slots if worker in slot.workers), None)


def backoff_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    if not failures:
        return 0.0
    return min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
