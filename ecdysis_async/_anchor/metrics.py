"""The metrics of a service with workers, made of what its anchor knows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ecdysis_async._management.exposition import Family, counter, gauge
from ecdysis_async._management.ledger import Closed, WorkerRestart, find_reason
from ecdysis_async._management.metrics import describe_service
from ecdysis_async._sockets.entry import Entry
from ecdysis_async.report import State

from .pool import Slot, Worker
from .state import AnchorState, RollOut

__all__ = ["describe_metrics", "note_end", "note_roll_out"]

# The states that a worker can be in while there is a process.
_STATES = (State.STARTING, State.WAITING, State.SERVING, State.PAUSED, State.DRAINING)


def note_roll_out(state: AnchorState, roll_out: RollOut) -> None:
    """Count a roll-out that is over."""
    report = roll_out.report
    reason = find_reason(report.outcome, roll_out.error, is_called_off=roll_out.called_off is not None)
    state.ledger.note_restart(report, reason, time.time())


def note_end(state: AnchorState, slot: Slot, worker: Worker) -> None:
    """Count what a worker has done that has ended, and its end where it should have served on."""
    closed = dict(worker.closed)
    # What it had at its last word went with it. A worker that has drained has said that nothing is left.
    closed[Closed.LOST] = closed.get(Closed.LOST, 0) + worker.connections - worker.jobs
    state.ledger.note_end(slot.index, worker.requests, closed)
    if worker.is_hung:
        state.ledger.note_worker_restart(WorkerRestart.HUNG)
    elif worker.is_told_to_leave:
        return
    elif worker.state in (State.SERVING, State.PAUSED):
        state.ledger.note_worker_restart(WorkerRestart.CRASHED)
    elif worker.left_unasked:
        state.ledger.note_worker_restart(WorkerRestart.LEFT)


def describe_metrics(state: AnchorState, entries: Sequence[Entry]) -> list[Family]:
    """Return the metrics of a service at this moment.

    Args:
        state: what the anchor knows.
        entries: the sockets of the workers.
    """
    closed = {kind: sum(worker.closed.get(kind, 0) for worker in state.pool) for kind in Closed}
    service = describe_service(state.ledger, generation=state.generation, closed=closed, entries=entries)
    return [*service, *_describe_workers(state)]


def _describe_workers(state: AnchorState) -> list[Family]:
    pool, ledger = state.pool, state.ledger
    workers = gauge("ecdysis_workers", "Processes that serve, by where they stand.")
    connections = gauge("ecdysis_connections", "Open connections, by where the process stands that has them.")
    for each in _STATES:
        alike = [worker for worker in pool if worker.state is each]
        workers.add(len(alike), state=each.value)
        connections.add(sum(worker.connections - worker.jobs for worker in alike), state=each.value)
    restarts = counter(
        "ecdysis_worker_restarts_total", "Workers that were started anew by themselves, outside of restarts."
    )
    for why, count in ledger.worker_restarts.items():
        restarts.add(count, reason=why)
    memory = gauge("ecdysis_worker_memory_bytes", "Resident memory of the processes of a slot, old and new together.")
    requests = counter("ecdysis_requests_total", "Requests, or connections where a server counts none, by slot.")
    slots = {slot.index: slot for slot in pool.slots}
    for index in sorted({*slots, *ledger.requests}):
        alive = slots[index].workers if index in slots else []
        requests.add(ledger.requests.get(index, 0) + sum(worker.requests for worker in alive), slot=index)
        if alive:
            memory.add(sum(worker.rss or 0 for worker in alive), slot=index)
    return [workers, connections, restarts, memory, requests]
