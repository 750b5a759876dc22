"""The data of a pool: who serves, who is missing, and when the next worker may be started."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator

import pytest

from ecdysis_async._anchor.pool import (
    FIRST_BACKOFF_SECONDS,
    HEALTHY_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    HandoffStatus,
    Slot,
    Worker,
    WorkerPool,
    backoff_seconds,
)
from ecdysis_async._ipc.worker_link import WorkerLink
from ecdysis_async._system.process import Process
from ecdysis_async.report import State

NOW = 1000.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    ours, theirs = socket.socketpair()
    with theirs:
        found = Worker(1, Process(os.getpid(), os.pidfd_open(os.getpid())), WorkerLink(ours), born=NOW)
        yield found
        found.link.close()
        found.process.close()


@pytest.mark.parametrize("state", State)
def test_a_slot_is_vacant_where_nobody_can_serve_any_more(state: State, worker: Worker) -> None:
    slot = Slot(0, [worker])
    worker.state = state
    assert slot.is_vacant == (state in (State.DRAINING, State.ENDED))
    assert slot.serving_worker == (worker if state is State.SERVING else None)


def test_a_dead_worker_does_not_serve(worker: Worker) -> None:
    worker.state = State.SERVING
    assert WorkerPool(1, [Slot(0, [worker])]).serving == 1
    worker.exit_status = 0
    assert WorkerPool(1, [Slot(0, [worker])]).serving == 0


def test_a_worker_that_had_served_for_long_is_replaced_at_once(worker: Worker) -> None:
    slot = Slot(0, [worker], failures=3)
    worker.state = State.SERVING
    worker.served_since = NOW - HEALTHY_SECONDS
    slot.note_end(worker, NOW)
    assert (slot.workers, slot.failures, slot.retry_at) == ([], 0, NOW)


def test_a_worker_that_crashes_soon_has_to_wait(worker: Worker) -> None:
    slot = Slot(0, [worker], failures=1)
    worker.state = State.SERVING
    worker.served_since = NOW - HEALTHY_SECONDS / 2
    slot.note_end(worker, NOW)
    assert (slot.failures, slot.retry_at) == (2, NOW + 2 * FIRST_BACKOFF_SECONDS)


@pytest.mark.parametrize("reason", ["told", "drained"])
def test_an_orderly_end_is_no_crash(reason: str, worker: Worker) -> None:
    slot = Slot(0, [worker])
    worker.is_told_to_leave = reason == "told"
    worker.state = State.DRAINING if reason == "drained" else State.SERVING
    slot.note_end(worker, NOW)
    assert (slot.workers, slot.failures) == ([], 0)


@pytest.mark.parametrize("reason", ["none", "told", "followed"])
def test_a_worker_that_leaves_of_its_own_accord_has_to_wait(reason: str, worker: Worker) -> None:
    slot = Slot(0, [worker])
    worker.is_told_to_leave = reason == "told"
    worker.handoff = HandoffStatus(None, True, None, None) if reason == "followed" else None
    worker.state = State.DRAINING
    worker.served_since = NOW - 1
    slot.note_leaving(worker, NOW)
    worker.state = State.ENDED
    failures = 1 if reason == "none" else 0
    assert (worker.left_unasked, slot.failures) == (reason == "none", failures)
    if worker.left_unasked:
        slot.note_end(worker, NOW)
        assert (slot.failures, slot.retry_at) == (1, NOW + FIRST_BACKOFF_SECONDS)


def test_the_pauses_grow_and_end_growing() -> None:
    pauses = [backoff_seconds(failures) for failures in range(40)]
    assert pauses[:4] == [0, FIRST_BACKOFF_SECONDS, 2 * FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_BACKOFF_SECONDS


def test_slots_are_numbered_on() -> None:
    pool = WorkerPool(2)
    assert [pool.enlarge().index for _ in range(3)] == [0, 1, 2]
    pool.slots.pop(1)
    assert pool.enlarge().index == 3


def test_no_limit_of_requests_is_ever_reached(worker: Worker) -> None:
    assert worker.request_limit == math.inf
