"""What is counted of a service without workers, from one generation to the next."""

from __future__ import annotations

import json
import logging

import pytest

from ecdysis_async._connections.connection import Connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._management.ledger import Closed
from ecdysis_async._service.counting import Counting
from ecdysis_async.errors import RestartError, SuccessorFailed
from ecdysis_async.report import Outcome, RestartReport


def work(tracker: Tracker, connections: int) -> None:
    for _ in range(connections):
        connection = Connection()
        tracker.open(connection)
        tracker.close(connection)


def travel(counting: Counting, *alive: int) -> object:
    return json.loads(json.dumps(counting.hand_on(alive)))


def test_a_successor_goes_on_counting() -> None:
    trackers = [Tracker() for _ in range(3)]
    first, second, third = map(Counting, trackers)
    work(trackers[0], 3)
    second.inherit(10, travel(first))
    work(trackers[1], 2)
    assert (second.requests, second.closed[Closed.ENDED]) == (5, 5)
    # The first one still drains, and tells what it does.
    work(trackers[0], 1)
    second.note_older(10, json.loads(json.dumps(first.own.to_json())))
    assert second.requests == 6
    # It is not there any more; another one comes.
    third.inherit(11, travel(second))
    assert (third.requests, third.closed[Closed.ENDED]) == (6, 0 + 2)
    assert third.ledger.closed[Closed.ENDED] == 4


def test_two_that_drain_are_not_forgotten() -> None:
    trackers = [Tracker() for _ in range(3)]
    first, second, third = map(Counting, trackers)
    work(trackers[0], 1)
    second.inherit(10, travel(first))
    third.inherit(11, travel(second, 10))
    work(trackers[0], 5)
    third.note_older(10, first.own.to_json())
    assert third.requests == 6
    # This one is unknown.
    third.note_older(99, first.own.to_json())
    assert third.requests == 6


def test_what_is_handed_on_twice_counts_once() -> None:
    """With the commit, and once more when the restart is final."""
    tracker = Tracker()
    first, second = Counting(tracker), Counting(Tracker())
    work(tracker, 3)
    second.inherit(10, travel(first))
    work(tracker, 1)
    second.inherit(10, travel(first))
    assert second.requests == 4


@pytest.mark.parametrize("body", [None, {}, {"ledger": None, "older": [], "own": 3}, [1]])
def test_what_cannot_be_read_does_no_harm(body: object, caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting(Tracker())
    with caplog.at_level(logging.WARNING):
        counting.inherit(10, body)
        counting.note_older(10, body)
    assert counting.requests == 0


def test_a_failed_restart_is_counted_where_it_was_asked_for() -> None:
    counting = Counting(Tracker())
    report = RestartReport("a", 2, 10, outcome=Outcome.FAILED)
    counting.note_restart(report, SuccessorFailed("no"))
    counting.note_restart(report, RestartError("no"), is_called_off=True)
    assert counting.ledger.restarts == {("failed", "successor_failed"): 1, ("failed", "called_off"): 1}
