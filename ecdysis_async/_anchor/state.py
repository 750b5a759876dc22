"""What an anchor knows: data, and the JSON in which the code that follows it learns the same.

Nothing here acts on a process or a socket. `reconcile`, `rollout`, `status` and `upgrade` are given an `AnchorState`.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.ledger import Ledger, read_closed
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process
from ecdysis_async.errors import RestartError
from ecdysis_async.report import RestartReport, State

from .config import AnchorConfig
from .metrics_files import MetricsFile
from .pool import Slot, Worker, WorkerPool

__all__ = [
    "AnchorState",
    "Begin",
    "Fill",
    "Filled",
    "Life",
    "RollOut",
    "RollOutStage",
    "Turn",
    "TurnState",
    "describe_pool",
    "restore_pool",
    "wait_until",
]


class Begin(Protocol):
    """Runs something beside everything else. A defect in it ends that, and never the service."""

    def __call__(self, function: Callable[..., Coroutine[Any, Any, object]], /, *arguments: object) -> None:
        """Begin to run a coroutine function with these arguments."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What has come of a start in a slot where there was no worker.

    Attributes:
        report: the report of the handoff, in which the anchor was the predecessor.
        error: why no worker serves there.
    """

    report: RestartReport
    error: RestartError | None


Fill: TypeAlias = Callable[[Slot, int], Awaitable[Filled]]
"""Starts a worker of a generation in a slot that has none, and returns once it serves or has failed."""


class Life(enum.Enum):
    """Where an anchor stands between its start and its end."""

    STARTING = "starting"  # the first workers do not serve yet
    SERVING = "serving"
    UPGRADING = "upgrading"  # new code, or another process, is about to go on with the service
    LAME_DUCK = "lame duck"  # it was told to stop, and goes on until load balancers look elsewhere
    STOPPING = "stopping"  # the workers leave, and then the anchor does


class TurnState(enum.Enum):
    """Where a slot stands in a roll-out."""

    PENDING = "pending"
    UNDER_WAY = "under way"
    SERVED = "served"  # by the new code; the old worker is on probation with it, if there is one
    FAILED = "failed"  # its old worker serves, if there is one
    REVERTED = "reverted"  # it was served by the new code, and is by the old one again
    KEPT = "kept"  # it was to be reverted, but its old worker is dead: only the new code is left
    SETTLED = "settled"


@dataclass(slots=True, eq=False)
class Turn:
    """One slot of a roll-out.

    Attributes:
        slot: the slot.
        state: where it stands.
        old: the worker to be replaced; None where there was none.
        report: the restart of this slot.
    """

    slot: Slot
    state: TurnState = TurnState.PENDING
    old: Worker | None = None
    report: RestartReport | None = None

    @property
    def is_committed(self) -> bool:
        """Whether the new worker was told to accept, so that this turn can only be undone by a revert."""
        handoff = self.old.handoff if self.old is not None else None
        return handoff is not None and handoff.state in (PredecessorState.COMMITTING, PredecessorState.PROBATION)


class RollOutStage(enum.IntEnum):
    """How far a roll-out has come."""

    REPLACING = 0  # also where it waits for the roll-out before it
    PROBATION = 1  # every slot is served by the new code
    OVER = 2  # it is final, or has failed and was undone
    DRAINED = 3  # no old worker is left


@dataclass(slots=True, eq=False)
class RollOut:
    """What is known of one roll-out.

    Attributes:
        generation: the generation of its new workers.
        report: what stands so far, for all workers together and for each.
        is_told: whether systemd may know of it already.
        before: the roll-out that has to end first; None once it has.
        turns: its slots, in the order in which they are replaced; none before it has begun.
        stage: how far it has come.
        error: why it has failed.
        called_off: why it is not wanted any more, where that was said in time.
        is_hurried: whether its probation ends at once.
        probation_ends: when its probation ends, on the anchor's clock; None before it has begun.
        caller: the trace context of the application that has asked for it, if one has.
    """

    generation: int
    report: RestartReport
    is_told: bool = False
    before: RollOut | None = None
    turns: list[Turn] = field(default_factory=list)
    stage: RollOutStage = RollOutStage.REPLACING
    error: RestartError | None = None
    called_off: RestartError | None = None
    is_hurried: bool = False
    probation_ends: float | None = None
    caller: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is final, or has failed and was undone."""
        return self.stage >= RollOutStage.OVER

    @property
    def current(self) -> Turn | None:
        """The slot that is being replaced at this moment."""
        return next((turn for turn in self.turns if turn.state is TurnState.UNDER_WAY), None)


@dataclass(slots=True, eq=False)
class AnchorState:
    """Everything that an anchor knows of its service.

    Attributes:
        config: what it is to run.
        pool: its workers.
        life: where it stands between its start and its end.
        has_served: whether all workers have served once. Until then, sockets left by a crash are the next start's.
        generation: the generation of its workers.
        description: in words, what the workers serve, where, and by what.
        begun: when the service began, on the system's monotonic clock.
        roll_out: the last roll-out, under way or over.
        last_report: the report of that, or of a roll-out before an upgrade.
        entries_before: the sockets that there were before the last roll-out.
        fillings: the handoffs of workers that follow no other.
        former_release: what is run as workers while a release before the one that is deployed serves, because that one
            has failed; None while what is deployed is run.
        lame_duck_ends: when it stops being a lame duck, on the loop's clock.
        upgrades: how often new code has gone on with the service.
        upgrade_error: why the last upgrade failed.
        ledger: what is counted of it, for its metrics.
        metrics_dir: where prometheus_client of the workers keeps the application's metrics; None where that is the
            environment's business.
        metrics_dir_wanted: what that was configured as.
        missing: what the service goes on without, because it could not be opened, and why.
        changes: announced whenever something here has changed.
    """

    config: AnchorConfig
    pool: WorkerPool
    life: Life = Life.STARTING
    has_served: bool = False
    generation: int = 1
    description: str = ""
    begun: float = field(default_factory=time.monotonic)
    roll_out: RollOut | None = None
    last_report: RestartReport | None = None
    entries_before: set[Entry] = field(default_factory=set)
    fillings: dict[Slot, PredecessorSide] = field(default_factory=dict)
    former_release: Launch | None = None
    lame_duck_ends: float = 0.0
    upgrades: int = 0
    upgrade_error: str | None = None
    ledger: Ledger = field(default_factory=Ledger)
    metrics_dir: str | None = None
    metrics_dir_wanted: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    @classmethod
    def fresh(cls, config: AnchorConfig) -> AnchorState:
        """Return what an anchor knows that starts its service."""
        return cls(config, WorkerPool(config.workers))

    @classmethod
    def restore(cls, config: AnchorConfig, body: Mapping[str, Any]) -> AnchorState:
        """Return what the former code knew, and what is configured now; it owns the workers' descriptors.

        Raises:
            KeyError, TypeError, ValueError: the former code describes it otherwise.
        """
        pool = restore_pool(body["crew"])
        if config.workers != body["planned_workers"]:
            pool.target = config.workers
        report = body["last_report"]
        return cls(
            config,
            pool,
            # The workers have served all the while.
            life=Life.SERVING,
            has_served=True,
            generation=int(body["generation"]),
            description=str(body["description"]),
            begun=float(body["begun"]),
            last_report=RestartReport.from_json(report) if report is not None else None,
            former_release=_restore_launch(body.get("former_release")),
            upgrades=int(body["upgrades"]),
            # A release before this one does not write it.
            ledger=Ledger.from_json(body.get("ledger")),
            metrics_dir=str(body["metrics_dir"]) if body.get("metrics_dir") is not None else None,
            metrics_dir_wanted=body.get("metrics_dir_wanted"),
        )

    def describe(self) -> tuple[dict[str, Any], list[int]]:
        """Return what the next code has to know as JSON, and the descriptors that it names."""
        pool, descriptors = describe_pool(self.pool)
        body = {
            "crew": pool,
            "generation": self.generation,
            "planned_workers": self.config.workers,
            "begun": self.begun,
            "upgrades": self.upgrades + 1,
            "description": self.description,
            "former_release": _describe_launch(self.former_release),
            "last_report": self.last_report.to_json() if self.last_report is not None else None,
            "ledger": self.ledger.to_json(),
            "metrics_dir": self.metrics_dir,
            "metrics_dir_wanted": self.metrics_dir_wanted,
        }
        return body, descriptors

    @property
    def is_follower(self) -> bool:
        """Whether this is new code that goes on with the workers of former code."""
        return self.upgrades > 0

    @property
    def is_leaving(self) -> bool:
        """Whether the service was told to stop, at once or in a while."""
        return self.life in (Life.LAME_DUCK, Life.STOPPING)

    @property
    def is_stopping(self) -> bool:
        """Whether the workers leave."""
        return self.life is Life.STOPPING

    @property
    def is_rolling(self) -> bool:
        """Whether a roll-out is under way."""
        return self.roll_out is not None and not self.roll_out.is_over


async def wait_until(changes: Changes, is_so: Callable[[], bool]) -> None:
    """Wait until something is so, looking again at each change."""
    while True:
        change = changes.next()
        if is_so():
            return
        await change.wait()


def describe_pool(pool: WorkerPool) -> tuple[dict[str, Any], list[int]]:
    """Return the workers as JSON, and the descriptors that it names and that have to survive."""
    descriptors: list[int] = []
    workers = []
    numbers = {worker: index for index, worker in enumerate(pool)}
    for slot in pool.slots:
        for worker in slot.workers:
            descriptors += [worker.process.pidfd, worker.link.fileno()]
            workers.append(
                {
                    "slot": slot.index,
                    "generation": worker.generation,
                    "process": worker.process.pid,
                    "pidfd": worker.process.pidfd,
                    "line": worker.link.fileno(),
                    "pending": base64.b64encode(worker.link.pending).decode(),
                    "born": worker.born,
                    "starter": numbers.get(worker.starter) if worker.starter is not None else None,
                    "pid": worker.pid,
                    "state": worker.state.value,
                    "connections": worker.connections,
                    "requests": worker.requests,
                    "rss": worker.rss,
                    "closed": dict(worker.closed),
                    "metrics_file": [worker.metrics_file.directory, worker.metrics_file.id]
                    if worker.metrics_file is not None
                    else None,
                    # JSON knows no infinity, and no NaN.
                    "request_limit": worker.request_limit if worker.request_limit < 2**63 else None,
                    "served_since": worker.served_since if worker.served_since == worker.served_since else None,
                    "is_told_to_leave": worker.is_told_to_leave,
                    "environment": dict(worker.environment),
                    "launch": _describe_launch(worker.launch),
                }
            )
    slots = [{"index": each.index, "failures": each.failures, "retry_at": each.retry_at} for each in pool.slots]
    return {"target": pool.target, "slots": slots, "workers": workers}, descriptors


def restore_pool(body: Mapping[str, Any]) -> WorkerPool:
    """Return the workers that were described; the pool owns their descriptors.

    Raises:
        KeyError, TypeError, ValueError: they are described otherwise.
    """
    slots = [
        Slot(int(each["index"]), failures=int(each["failures"]), retry_at=float(each["retry_at"]))
        for each in body["slots"]
    ]
    by_index = {slot.index: slot for slot in slots}
    workers: list[Worker] = []
    for each in body["workers"]:
        starter, limit, since = each["starter"], each["request_limit"], each["served_since"]
        for descriptor in (each["pidfd"], each["line"]):
            os.set_inheritable(descriptor, False)
        worker = Worker(
            generation=int(each["generation"]),
            process=Process(int(each["process"]), int(each["pidfd"])),
            link=WorkerLink(socket.socket(fileno=int(each["line"]))),
            born=float(each["born"]),
            starter=workers[starter] if starter is not None else None,
            pid=int(each["pid"]),
            state=State(each["state"]),
            connections=int(each["connections"]),
            requests=int(each["requests"]),
            rss=each["rss"],
            closed=read_closed(each.get("closed", {})),
            metrics_file=_restore_metrics_file(each.get("metrics_file")),
            is_told_to_leave=bool(each["is_told_to_leave"]),
            environment={str(name): str(value) for name, value in each["environment"].items()},
            # An earlier release does not say it.
            launch=_restore_launch(each.get("launch")),
        )
        if limit is not None:
            worker.request_limit = float(limit)
        if since is not None:
            worker.served_since = float(since)
        worker.link.resume(base64.b64decode(each["pending"]))
        workers.append(worker)
        by_index[int(each["slot"])].workers.append(worker)
    return WorkerPool(int(body["target"]), slots)


def _describe_launch(launch: Launch | None) -> dict[str, Any] | None:
    return None if launch is None else dataclasses.asdict(launch)


def _restore_launch(body: Mapping[str, Any] | None) -> Launch | None:
    if body is None:
        return None
    environment = {str(name): str(value) for name, value in body["environment"].items()}
    directory = body["directory"]
    return Launch(tuple(map(str, body["arguments"])), str(directory) if directory is not None else None, environment)


def _restore_metrics_file(body: Any) -> MetricsFile | None:
    return MetricsFile(str(body[0]), str(body[1])) if body else None
