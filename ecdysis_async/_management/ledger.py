"""What is counted of a service for as long as it lives: restarts, connections and requests of all its generations.

A process counts its own work from its start. Whoever speaks for the service keeps a `Ledger`, to which the work of each
process is added when it has ended. The ledger is handed on with the service, so that no counter ever falls.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._system.claims import is_worker
from ecdysis_async._system.history import Note, history
from ecdysis_async.errors import (
    ReadyTimeout,
    RestartError,
    RolledBack,
    SpawnFailed,
    StashFailed,
    SuccessorFailed,
)
from ecdysis_async.report import Outcome, Phase, RestartReport

from .exposition import Family, Histogram, Type, counter, gauge

__all__ = [
    "Closed",
    "Ledger",
    "Reason",
    "WorkerRestart",
    "count_closed",
    "describe_restarts",
    "find_reason",
    "read_closed",
]

PHASE_BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1, 5)

# How many restarts are remembered in short.
RECENT = 10


class Reason(enum.StrEnum):
    """Why a restart has not succeeded: few words, which never change, for labels and alerts."""

    NONE = "none"  # it has succeeded
    SPAWN_FAILED = "spawn_failed"
    SUCCESSOR_FAILED = "successor_failed"
    READY_TIMEOUT = "ready_timeout"
    STASH_FAILED = "stash_failed"
    DIED_ON_PROBATION = "died_on_probation"
    CALLED_OFF = "called_off"
    STOPPED = "stopped"
    OTHER = "other"


class Closed(enum.StrEnum):
    """How connections have ended."""

    ENDED = "ended"  # by themselves, while their generation served
    DRAINED = "drained"  # by themselves, while their generation drained
    SILENT = "silent"  # idle at the end of the drain, and closed at a safe point
    TRANSFERRED = "transferred"  # passed on to the successor alive
    CUT = "cut"  # still busy at the deadline
    LOST = "lost"  # with a process that has died, or was killed


class WorkerRestart(enum.StrEnum):
    """Why a worker was started anew, outside of the restarts of the service."""

    CRASHED = "crashed"
    HUNG = "hung"
    LEFT = "left"  # it has ended of its own accord
    NOT_STARTED = "not_started"  # it has failed before it served
    MAX_REQUESTS = "max_requests"
    MAX_RSS = "max_rss"


# Which error stands for which reason; the first one that fits.
_REASONS: tuple[tuple[type[RestartError], Reason], ...] = (
    (SpawnFailed, Reason.SPAWN_FAILED),
    (ReadyTimeout, Reason.READY_TIMEOUT),
    (StashFailed, Reason.STASH_FAILED),
    (SuccessorFailed, Reason.SUCCESSOR_FAILED),
    (RolledBack, Reason.DIED_ON_PROBATION),
)


def find_reason(outcome: Outcome, error: BaseException | None, *, is_called_off: bool = False) -> Reason:
    """Return why a restart has come to an outcome."""
    if outcome is Outcome.SETTLED:
        return Reason.NONE
    if outcome is Outcome.STOPPED:
        return Reason.STOPPED
    if is_called_off:
        return Reason.CALLED_OFF
    # Where slots were taken back because one of them failed, the cause tells why that one did.
    for each in (error.__cause__ if isinstance(error, RolledBack) else None, error):
        for kind, reason in _REASONS:
            if isinstance(each, kind):
                return reason
    return Reason.OTHER


def read_closed(body: object) -> dict[Closed, int]:
    """Return the connections that another process has counted; what this release does not know is left out.

    Raises:
        TypeError, ValueError: these are no counts.
    """
    if not isinstance(body, Mapping):
        raise TypeError("connections are counted by how they ended")
    return {kind: int(body[kind]) for kind in Closed if kind in body}


def count_closed(tracker: Tracker) -> dict[Closed, int]:
    """Return how the connections of this process have ended."""
    count = tracker.count
    return {
        Closed.ENDED: tracker.ended,
        Closed.DRAINED: count.drained,
        Closed.SILENT: count.silent,
        Closed.TRANSFERRED: count.transferred,
        Closed.CUT: count.cut,
    }


@dataclass(slots=True)
class Ledger:
    """What is counted of a service.

    Attributes:
        restarts: how many restarts came to an outcome, and why.
        phases: how long the phases of restarts took.
        gap: how long new connections waited at a restart.
        is_last_successful: whether the last restart has succeeded; None before the first one.
        last_restart_at: when the last restart ended, in seconds since the epoch; None before the first one.
        worker_restarts: how many workers were started anew, by the reason.
        closed: connections of processes that have ended, and of restarts.
        requests: how many requests the ended processes of each slot had served.
        recent: the last restarts in short, the newest one last: what a page shows.
    """

    restarts: dict[tuple[str, str], int] = field(default_factory=dict)
    phases: dict[Phase, Histogram] = field(default_factory=lambda: {phase: Histogram(PHASE_BOUNDS) for phase in Phase})
    gap: Histogram = field(default_factory=lambda: Histogram(GAP_BOUNDS))
    is_last_successful: bool | None = None
    last_restart_at: float | None = None
    worker_restarts: dict[WorkerRestart, int] = field(default_factory=lambda: dict.fromkeys(WorkerRestart, 0))
    closed: dict[Closed, int] = field(default_factory=lambda: dict.fromkeys(Closed, 0))
    requests: dict[int, int] = field(default_factory=dict)
    recent: list[dict[str, Any]] = field(default_factory=list)

    def note_restart(self, report: RestartReport, reason: Reason, at: float) -> None:
        """Count a restart that is over, but for the drain, which goes on.

        Args:
            report: of the restart.
            reason: why it has not succeeded.
            at: the time of day, in seconds since the epoch.
        """
        outcome = str(report.outcome).replace(" ", "_")
        self.restarts[outcome, reason] = self.restarts.get((outcome, reason), 0) + 1
        if report.outcome is not Outcome.STOPPED:
            self.is_last_successful, self.last_restart_at = report.outcome is Outcome.SETTLED, at
        # Each slot has a handoff of its own.
        for each in report.workers or [report]:
            for phase in (Phase.START, Phase.INITIALISE, Phase.PAUSE, Phase.COMMIT):
                if phase in each.phases:
                    self.phases[phase].observe(each.phases[phase])
            if each.accept_gap is not None:
                self.gap.observe(each.accept_gap)
        if Phase.PROBATION in report.phases:
            self.phases[Phase.PROBATION].observe(report.phases[Phase.PROBATION])
        self.recent = [*self.recent, _shorten(report, reason, at)][-RECENT:]
        _write_down(self.recent[-1])
        # With workers, each process that has died is counted by itself.
        if not report.workers:
            self.closed[Closed.LOST] += report.lost

    def note_drain(self, report: RestartReport) -> None:
        """Count the drain of a restart, which has ended."""
        for index, each in enumerate(self.recent):
            if each["id"] == report.id:
                self.recent[index] = {**each, **_shorten(report, each["reason"], each["ended_at"])}
                _write_down(self.recent[index])
        if Phase.DRAIN in report.phases:
            self.phases[Phase.DRAIN].observe(report.phases[Phase.DRAIN])

    def note_worker_restart(self, why: WorkerRestart) -> None:
        """Count a worker that was started anew, outside of the restarts of the service."""
        self.worker_restarts[why] += 1

    def note_end(self, slot: int, requests: int, closed: Mapping[Closed, int]) -> None:
        """Add the work of a process that has ended."""
        self.requests[slot] = self.requests.get(slot, 0) + requests
        for kind, count in closed.items():
            self.closed[kind] += count

    # How it travels

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as an object of JSON."""
        return {
            "restarts": [[outcome, reason, count] for (outcome, reason), count in self.restarts.items()],
            "phases": {phase: histogram.to_json() for phase, histogram in self.phases.items()},
            "gap": self.gap.to_json(),
            "is_last_successful": self.is_last_successful,
            "last_restart_at": self.last_restart_at,
            "worker_restarts": dict(self.worker_restarts),
            "closed": dict(self.closed),
            "requests": [[slot, count] for slot, count in self.requests.items()],
            "recent": self.recent,
        }

    @classmethod
    def from_json(cls, body: object) -> Ledger:
        """Read a ledger that another release may have written; one of a release that had none is empty.

        Raises:
            KeyError, TypeError, ValueError: it is no ledger.
        """
        ledger = cls()
        if body is None:
            return ledger
        if not isinstance(body, Mapping):
            raise TypeError("a ledger is an object")
        ledger.restarts = {(str(outcome), str(reason)): int(count) for outcome, reason, count in body["restarts"]}
        for phase, histogram in ledger.phases.items():
            if phase in body["phases"]:
                histogram.add(body["phases"][phase])
        ledger.gap.add(body["gap"])
        if body["is_last_successful"] is not None:
            ledger.is_last_successful = bool(body["is_last_successful"])
            ledger.last_restart_at = float(body["last_restart_at"])
        for why in WorkerRestart:
            ledger.worker_restarts[why] = int(body["worker_restarts"].get(why, 0))
        ledger.closed.update(read_closed(body["closed"]))
        ledger.recent = [dict(each) for each in body.get("recent", [])]
        ledger.requests = {int(slot): int(count) for slot, count in body["requests"]}
        return ledger


def _write_down(short: Mapping[str, Any]) -> None:
    """Let a service that begins here later know of a restart; a worker has its part only, and its anchor the whole."""
    if not is_worker():
        history.note(Note.COUNTED, short=short)


def _shorten(report: RestartReport, reason: str, at: float) -> dict[str, Any]:
    """Return a restart in short. What a successor has written, and what requests were about, may be private."""
    drain = report.drain
    return {
        "id": report.id,
        "generation": report.generation,
        "started_at": report.started_at,
        "ended_at": at,
        "outcome": str(report.outcome),
        "reason": str(reason),
        "phases": {str(phase): seconds for phase, seconds in report.phases.items()},
        "accept_gap": report.accept_gap,
        "drain": {"drained": drain.drained, "silent": drain.silent, "transferred": drain.transferred, "cut": drain.cut},
        "lost": report.lost,
        "workers": [
            {"generation": each.generation, "phases": {str(phase): value for phase, value in each.phases.items()}}
            for each in report.workers
        ],
    }


def describe_restarts(ledger: Ledger) -> list[Family]:
    """Return the metrics of restarts."""
    restarts = counter("ecdysis_restarts_total", "Restarts of the service that are over, by what they came to.")
    # A counter that is there from the start shows its first rise too.
    for outcome, reason in sorted({("settled", "none"), ("failed", "successor_failed"), *ledger.restarts}):
        restarts.add(ledger.restarts.get((outcome, reason), 0), outcome=outcome, reason=reason)
    families = [restarts]
    if ledger.is_last_successful is not None and ledger.last_restart_at is not None:
        successful = gauge("ecdysis_last_restart_successful", "Whether the last restart succeeded: 1, or 0.")
        successful.add(ledger.is_last_successful)
        at = gauge("ecdysis_last_restart_timestamp_seconds", "When the last restart ended, seconds since the epoch.")
        at.add(ledger.last_restart_at)
        families += [successful, at]
    phases = Family("ecdysis_restart_phase_seconds", Type.HISTOGRAM, "How long each phase of a restart took.")
    for phase, histogram in ledger.phases.items():
        phases.add_histogram(histogram, phase=phase)
    gap = Family(
        "ecdysis_accept_gap_seconds", Type.HISTOGRAM, "How long new connections waited in the kernel at a restart."
    )
    gap.add_histogram(ledger.gap)
    return [*families, phases, gap]
