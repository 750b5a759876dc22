"""What is counted of a service, and that it is handed on."""

from __future__ import annotations

import json

import pytest

from ecdysis_async._connections.connection import Connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._management.ledger import (
    RECENT,
    Closed,
    Ledger,
    Reason,
    WorkerRestart,
    count_closed,
    describe_restarts,
    find_reason,
    read_closed,
)
from ecdysis_async.errors import ReadyTimeout, RestartError, RolledBack, SpawnFailed, SuccessorFailed
from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport


def make_report(id: str = "a", outcome: Outcome = Outcome.SETTLED, **facts: object) -> RestartReport:
    phases = {Phase.START: 0.5, Phase.PROBATION: 5.0}
    return RestartReport(id, 2, 10, 11, 1000.0, outcome, phases, 0.002, **facts)  # type: ignore[arg-type]


def fail(error: RestartError, cause: RestartError) -> RestartError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("outcome", "error", "reason"),
    [
        (Outcome.SETTLED, None, Reason.NONE),
        (Outcome.STOPPED, RestartError("stop"), Reason.STOPPED),
        (Outcome.FAILED, SpawnFailed("x"), Reason.SPAWN_FAILED),
        (Outcome.FAILED, SuccessorFailed("x"), Reason.SUCCESSOR_FAILED),
        (Outcome.FAILED, ReadyTimeout("x"), Reason.READY_TIMEOUT),
        (Outcome.FAILED, RestartError("x"), Reason.OTHER),
        (Outcome.ROLLED_BACK, RolledBack("x"), Reason.DIED_ON_PROBATION),
        # A slot has failed, and with it all of those before it.
        (Outcome.ROLLED_BACK, fail(RolledBack("x"), ReadyTimeout("y")), Reason.READY_TIMEOUT),
    ],
)
def test_each_end_of_a_restart_has_a_reason(outcome: Outcome, error: RestartError | None, reason: Reason) -> None:
    assert find_reason(outcome, error) is reason


def test_what_was_called_off_is_no_failure_of_the_release() -> None:
    assert find_reason(Outcome.FAILED, RestartError("called off"), is_called_off=True) is Reason.CALLED_OFF


def test_a_restart_is_counted() -> None:
    ledger = Ledger()
    ledger.note_restart(make_report(lost=3), Reason.NONE, 1010.0)
    ledger.note_restart(make_report(outcome=Outcome.FAILED), Reason.READY_TIMEOUT, 1020.0)
    assert ledger.restarts == {("settled", "none"): 1, ("failed", "ready_timeout"): 1}
    assert (ledger.is_last_successful, ledger.last_restart_at) == (False, 1020.0)
    assert (sum(ledger.gap.counts), sum(ledger.phases[Phase.START].counts)) == (2, 2)
    assert ledger.closed[Closed.LOST] == 3
    # A stop in the middle says nothing about the release.
    ledger.note_restart(make_report(outcome=Outcome.STOPPED), Reason.STOPPED, 1030.0)
    assert ledger.last_restart_at == 1020.0


def test_each_slot_of_a_roll_out_is_counted() -> None:
    ledger = Ledger()
    ledger.note_restart(make_report(workers=[make_report(), make_report()], lost=2), Reason.NONE, 1010.0)
    assert sum(ledger.phases[Phase.START].counts) == sum(ledger.gap.counts) == 2
    assert sum(ledger.phases[Phase.PROBATION].counts) == 1
    # Each process that has died is counted by itself.
    assert ledger.closed[Closed.LOST] == 0


def test_the_last_restarts_are_remembered_with_their_drains() -> None:
    ledger = Ledger()
    for number in range(RECENT + 2):
        ledger.note_restart(make_report(str(number)), Reason.NONE, 1010.0)
    assert [each["id"] for each in ledger.recent] == [str(number) for number in range(2, RECENT + 2)]
    report = make_report("5", drain=DrainCount(cut=4))
    report.phases[Phase.DRAIN] = 7.0
    ledger.note_drain(report)
    found = next(each for each in ledger.recent if each["id"] == "5")
    assert (found["drain"]["cut"], found["phases"]["drain"], found["reason"]) == (4, 7.0, "none")
    assert ledger.phases[Phase.DRAIN].sum == 7.0


def test_it_is_handed_on() -> None:
    ledger = Ledger()
    ledger.note_restart(make_report(), Reason.NONE, 1010.0)
    ledger.note_worker_restart(WorkerRestart.CRASHED)
    ledger.note_end(3, 70, {Closed.ENDED: 5, Closed.CUT: 1})
    ledger.note_end(3, 7, {Closed.ENDED: 5})
    body = json.loads(json.dumps(ledger.to_json()))
    assert Ledger.from_json(body) == ledger
    # A later release may count more.
    body["closed"]["eaten"], body["worker_restarts"]["bored"], body["more"] = 1, 2, 3
    assert Ledger.from_json(body) == ledger
    assert (ledger.requests, ledger.closed[Closed.ENDED]) == ({3: 77}, 10)


def test_a_release_without_one_leaves_none() -> None:
    assert Ledger.from_json(None) == Ledger()


@pytest.mark.parametrize("body", [[], {}, {"restarts": 1}, "x"])
def test_what_is_no_ledger_is_refused(body: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Ledger.from_json(body)


def test_what_is_no_count_of_connections_is_refused() -> None:
    assert read_closed({"ended": 2, "eaten": 1}) == {Closed.ENDED: 2}
    with pytest.raises(TypeError):
        read_closed([1])


def test_before_the_first_restart_nothing_is_claimed_of_the_last() -> None:
    names = {family.name for family in describe_restarts(Ledger())}
    assert "ecdysis_restarts_total" in names
    assert "ecdysis_last_restart_successful" not in names


def test_connections_that_end_while_a_generation_serves_are_its_own() -> None:
    tracker = Tracker()
    first, second = Connection(), Connection()
    for connection in (first, second):
        tracker.open(connection)
    tracker.close(first)
    assert count_closed(tracker)[Closed.ENDED] == 1
    tracker.leave()
    tracker.close(second)
    tracker.count.drained += 1
    counts = count_closed(tracker)
    assert (counts[Closed.ENDED], counts[Closed.DRAINED]) == (1, 1)
