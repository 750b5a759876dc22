"""The metrics of a service with workers: none of its counters falls, and no label names a process."""

from __future__ import annotations

import json
import os
import socket

import pytest

from ecdysis_async._anchor.metrics import describe_metrics, note_end, note_roll_out
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import AnchorState
from ecdysis_async._management.exposition import Type
from ecdysis_async._management.ledger import Closed, Ledger, WorkerRestart
from ecdysis_async._sockets.entry import Entry, Kind
from ecdysis_async.errors import SuccessorFailed
from ecdysis_async.report import Outcome, State
from tests.anchor.puppets import Stage, stage

Numbers = dict[tuple[str, ...], float]


def measure(state: AnchorState, *entries: Entry) -> Numbers:
    """Return all numbers by their names and labels."""
    return {
        (family.name + ending, *labels.values()): value
        for family in describe_metrics(state, entries)
        for ending, labels, value in family.samples
    }


def count(state: AnchorState) -> Numbers:
    """Return the counters."""
    return {
        (family.name + ending, *labels.values()): value
        for family in describe_metrics(state, ())
        for ending, labels, value in family.samples
        if family.type is not Type.GAUGE
    }


def bury(here: Stage, index: int) -> None:
    slot = here.state.pool.slots[index]
    worker = slot.workers[0]
    slot.workers.remove(worker)
    note_end(here.state, slot, worker)


def test_what_the_workers_say_is_shown() -> None:
    with stage(2) as here, socket.create_server(("127.0.0.1", 0)) as sock:
        first, second = here.state.pool
        # A job has no connection.
        first.requests, first.connections, first.jobs, first.rss = 10, 4, 1, 1000
        second.requests, second.connections, second.state = 5, 1, State.DRAINING
        first.closed = {Closed.ENDED: 4}
        second.closed = {Closed.ENDED: 2, Closed.CUT: 1}
        with socket.create_connection(sock.getsockname()):
            found = measure(here.state, Entry("web", Kind.TCP, "127.0.0.1:0", sock))
        assert found["ecdysis_requests_total", "0"] == 10
        assert found["ecdysis_requests_total", "1"] == 5
        assert found["ecdysis_worker_memory_bytes", "0"] == 1000
        assert found["ecdysis_connections", "serving"] == 3
        assert found["ecdysis_connections", "draining"] == 1
        assert found["ecdysis_workers", "draining"] == found["ecdysis_workers", "serving"] == 1
        assert found["ecdysis_connections_closed_total", "ended"] == 6
        assert found["ecdysis_connections_closed_total", "cut"] == 1
        assert found["ecdysis_socket_backlog", "web"] == 1
        assert found["ecdysis_generation",] == 1


def test_no_counter_falls_when_a_worker_dies() -> None:
    with stage(2) as here:
        for worker in here.state.pool:
            worker.requests, worker.connections, worker.closed = 10, 2, {Closed.ENDED: 4}
        before = count(here.state)
        bury(here, 0)
        after = count(here.state)
        assert all(after[key] >= value for key, value in before.items())
        assert after["ecdysis_worker_restarts_total", "crashed"] == 1
        assert after["ecdysis_connections_closed_total", "lost"] == 2
        # Its successor counts from nothing.
        here.add_worker(here.state.pool.slots[0]).worker.requests = 1
        assert count(here.state)["ecdysis_requests_total", "0"] == 11
        # A slot that is not there any more has not served less.
        here.state.pool.slots.pop()
        assert count(here.state)["ecdysis_requests_total", "0"] == 11


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, WorkerRestart.CRASHED),
        ({"is_hung": True}, WorkerRestart.HUNG),
        ({"state": State.DRAINING, "left_unasked": True}, WorkerRestart.LEFT),
        ({"state": State.DRAINING}, None),
        ({"is_told_to_leave": True}, None),
        ({"state": State.STARTING}, None),
    ],
)
def test_why_a_worker_is_started_anew(facts: dict[str, object], why: WorkerRestart | None) -> None:
    with stage(1) as here:
        worker = next(iter(here.state.pool))
        for name, value in facts.items():
            setattr(worker, name, value)
        bury(here, 0)
        counted = {each for each, number in here.state.ledger.worker_restarts.items() if number}
        assert counted == ({why} if why is not None else set())


def test_a_failed_roll_out_says_why() -> None:
    with stage(1) as here:
        roll_out = make_roll_out(2, "a test", is_told=False, before=None)
        roll_out.report.outcome, roll_out.error = Outcome.FAILED, SuccessorFailed("no")
        note_roll_out(here.state, roll_out)
        found = measure(here.state)
        assert found["ecdysis_restarts_total", "failed", "successor_failed"] == 1
        assert found["ecdysis_last_restart_successful",] == 0


def test_no_label_names_a_process_or_a_restart() -> None:
    with stage(2) as here:
        roll_out = make_roll_out(2, "a test", is_told=False, before=None)
        roll_out.report.outcome = Outcome.SETTLED
        note_roll_out(here.state, roll_out)
        names = {
            name for family in describe_metrics(here.state, ()) for _, labels, _ in family.samples for name in labels
        }
        assert names == {"version", "python", "outcome", "reason", "phase", "le", "state", "slot"}
        labels = {label for key in measure(here.state) for label in key[1:]}
        assert not {str(os.getpid()), roll_out.report.id} & labels


def test_the_code_that_follows_goes_on_counting() -> None:
    with stage(1) as here:
        worker = next(iter(here.state.pool))
        worker.requests, worker.closed = 7, {Closed.SILENT: 2}
        here.state.ledger.note_worker_restart(WorkerRestart.HUNG)
        body, _ = here.state.describe()
        body = json.loads(json.dumps(body))
        assert Ledger.from_json(body["ledger"]) == here.state.ledger
        assert body["crew"]["workers"][0]["closed"] == {"silent": 2}
