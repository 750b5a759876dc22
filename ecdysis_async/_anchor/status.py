"""What an anchor tells of its service: to people who ask, to load balancers and to systemd.

Nothing here changes anything, or waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import anyio

from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.preflight import describe_place
from ecdysis_async._management.status import counted, describe_failed_restart, describe_listeners
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.report import RestartReport

from .pool import Slot, WorkerPool, WorkerState
from .rollout import RollOut, Turn, TurnState
from .upgrade import Upgrade

__all__ = ["Told", "describe", "describe_status", "describe_wait", "describe_waits", "why_not_ready"]

# A worker that accepts, or is about to, or can again: one of a slot is.
_ACCEPTING = (WorkerState.WAITING, WorkerState.SERVING, WorkerState.PAUSED)


class Told(Protocol):
    """What is told of an anchor.

    Attributes:
        crew: its workers.
        generation: what they are.
        registry: their sockets.
        begun: when it began, on the system's clock that counts on.
        fillings: the handoffs of workers that follow nobody.
        roll_out: the last one.
        last_report: of that, or of one before an upgrade.
        is_serving: whether all its workers have served.
        is_stopping: whether it was told to stop.
        lame_duck: where it was told to stop, and goes on for a while: until when.
        renewal: how it is followed, by itself or another one.
    """

    crew: WorkerPool
    generation: int
    registry: Registry
    begun: float
    fillings: dict[Slot, PredecessorSide]
    roll_out: RollOut | None
    last_report: RestartReport | None
    is_serving: bool
    is_stopping: bool
    lame_duck: anyio.CancelScope | None
    renewal: Upgrade

    @property
    def is_lame_duck(self) -> bool:
        """Whether it was told to stop, and goes on for a while."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What its workers were started with."""


def why_not_ready(anchor: Told) -> str | None:
    """Say why a load balancer shall send nobody here; None where it shall."""
    if anchor.is_stopping or anchor.is_lame_duck:
        return "the service is about to stop"
    if not anchor.is_serving:
        return f"the service is starting: {anchor.crew.serving} of {counted(anchor.crew.target, 'worker')} serving"
    if not _accepts(anchor):
        return "no worker serves: clients wait for one"
    return None


def describe_waits(anchor: Told) -> list[dict[str, Any]]:
    """Say of each worker what its restart, or its drain, waits for."""
    roll_out = anchor.roll_out
    if anchor.is_stopping or roll_out is None or len(roll_out.turns) < 2:  # noqa: PLR2004 - one is no list
        return []
    return [{"slot": turn.slot.index, "waiting_for": _wait_of(turn)} for turn in roll_out.turns]


def describe_wait(anchor: Told) -> str | None:
    """Say what the service waits for; None if for nothing but clients."""
    if anchor.is_stopping:
        connections = sum(worker.connections for worker in anchor.crew)
        return counted(connections, "connection") if connections else "the workers to end"
    if anchor.renewal.is_under_way:
        return "the new anchor to take over"
    if anchor.is_lame_duck and anchor.lame_duck is not None:
        seconds = max(0.0, anchor.lame_duck.deadline - anyio.current_time())
        return f"load balancers to look elsewhere, for {seconds:.1f} s more"
    roll_out = anchor.roll_out
    if roll_out is not None and not roll_out.over.is_set():
        if (turn := roll_out.current) is not None:
            place = f"worker {roll_out.turns.index(turn) + 1} of {len(roll_out.turns)}"
            filling = anchor.fillings.get(turn.slot)
            handoff = turn.old.handoff if turn.old is not None else None
            state = filling.state if filling is not None else handoff.state if handoff is not None else None
            return f"{place}: {state.value if state is not None else 'its turn'}"
        if roll_out.probation_ends is not None:
            seconds = max(0.0, roll_out.probation_ends - anyio.current_time())
            return f"generation {roll_out.generation}, on probation for {seconds:.1f} s more"
        if roll_out.before is not None:
            return f"restart {roll_out.before.report.id} to settle, whose probation this one has ended"
        if all(turn.state is TurnState.PENDING for turn in roll_out.turns):
            return "the first worker's turn"
        return "the former workers to take their places again"
    if roll_out is not None and not roll_out.drained.is_set():
        left = sum(turn.old.connections for turn in roll_out.turns if turn.old is not None and turn.old.is_alive)
        return counted(left, "connection") if left else "the former workers to end"
    if anchor.crew.serving < len(anchor.crew.slots):
        return f"{len(anchor.crew.slots) - anchor.crew.serving} of {counted(len(anchor.crew.slots), 'worker')} to serve"
    return None


def describe_status(anchor: Told) -> dict[str, Any]:
    """Return what `ecdysis status` is answered with."""
    roll_out = anchor.roll_out
    draining = [worker for worker in anchor.crew if worker.state in (WorkerState.PAUSED, WorkerState.DRAINING)]
    now = anyio.current_time()
    return {
        "generation": anchor.generation,
        "pid": os.getpid(),
        "state": _state(anchor),
        "uptime": time.monotonic() - anchor.begun,
        "connections": sum(worker.connections for worker in anchor.crew),
        "listeners": describe_listeners(anchor.registry.entries),
        "waiting_for": describe_wait(anchor),
        "restart": None
        if roll_out is None or roll_out.over.is_set()
        else {
            "id": roll_out.report.id,
            "generation": roll_out.generation,
            "pid": None,
            "phase": describe_wait(anchor),
            "seconds": time.time() - roll_out.report.started_at,
        },
        "last_report": anchor.last_report.to_json() if anchor.last_report is not None else None,
        "anchor": {"upgrades": anchor.renewal.count, "error": anchor.renewal.error},
        "process": {**describe_place(), "environment": sorted(anchor.environment)},
        "draining": [
            {"generation": worker.generation, "pid": worker.pid, "connections": worker.connections}
            for worker in draining
        ],
        "workers": [
            {
                "slot": slot.index,
                "pid": worker.pid,
                "generation": worker.generation,
                "state": worker.state.value,
                "connections": worker.connections,
                "requests": worker.requests,
                "rss": worker.rss,
                "uptime": now - worker.born,
            }
            for slot in anchor.crew.slots
            for worker in slot.workers
        ],
    }


def describe(anchor: Told) -> str:
    """Say in one line what `systemctl status` shows."""
    crew = anchor.crew
    connections = sum(worker.connections for worker in crew)
    serving = f"{crew.serving} of {counted(len(crew.slots), 'worker')} serving"
    parts = [f"generation {anchor.generation}: {serving}, {counted(connections, 'connection')}"]
    if (roll_out := anchor.roll_out) is not None and not roll_out.over.is_set():
        parts.append(f"rolling out generation {roll_out.generation}")
    elif roll_out is not None and roll_out.error is not None:
        parts.append(describe_failed_restart(roll_out.error))
    return "; ".join(parts)


def _state(anchor: Told) -> WorkerState:
    if anchor.is_stopping:
        return WorkerState.DRAINING
    return WorkerState.SERVING if anchor.is_serving and _accepts(anchor) else WorkerState.STARTING


def _accepts(anchor: Told) -> bool:
    """Say whether a worker serves, or will in a moment.

    Between a pause and a commit nobody accepts, and clients wait in the kernel's queue: that is no news.
    """
    return any(worker.is_alive and worker.state in _ACCEPTING for worker in anchor.crew)


def _wait_of(turn: Turn) -> str | None:
    old = turn.old
    match turn.state:
        case TurnState.PENDING:
            return "its turn"
        case TurnState.UNDER_WAY if old is not None and old.handoff is not None and old.handoff.state is not None:
            return f"its successor: {old.handoff.state.value}"
        case TurnState.UNDER_WAY:
            return "its successor to start"
        case TurnState.SERVED:
            return "the end of its probation"
        case TurnState.SETTLED if old is not None and old.is_alive:
            return f"{counted(old.connections, 'connection')} of pid {old.pid}" if old.connections else "its end"
    return None
