"""The verdict of a restart: one line that says which generation serves, what runs there, what it took, and why not."""

from __future__ import annotations

import pytest

from ecdysis_async._handoff.verdict import describe_drain, describe_verdict, name_successors, summarize
from ecdysis_async.cli.progress import describe_outcome
from ecdysis_async.errors import RestartError, SuccessorFailed
from ecdysis_async.report import DrainCount, Outcome, Phase, RestartReport


def make_report(outcome: Outcome, **facts: object) -> RestartReport:
    report = RestartReport("0123456789ab", 2, 10, 11, outcome=outcome, phases={Phase.START: 0.1})
    for name, value in facts.items():
        setattr(report, name, value)
    return report


@pytest.mark.parametrize(
    ("report", "error", "expected"),
    [
        (
            make_report(Outcome.SETTLED, release="/srv/2", accept_gap=0.002),
            None,
            "is settled: generation 2 (pid 11, /srv/2) serves; start 100.0 ms; accept gap 2.00 ms",
        ),
        (
            make_report(Outcome.SETTLED, workers=[make_report(Outcome.SETTLED)] * 2, unanswered=["worker 1 hung"]),
            None,
            "is settled: generation 2 (2 workers) serves; start 100.0 ms; worker 1 hung",
        ),
        (
            make_report(Outcome.FAILED),
            SuccessorFailed("it died", stderr="Traceback\nRuntimeError: no database\n"),
            "has failed, and generation 1 serves on: it died … RuntimeError: no database; start 100.0 ms",
        ),
        (
            make_report(Outcome.ROLLED_BACK, lost=3),
            RestartError("it died"),
            "was rolled back, and generation 1 serves again: it died; start 100.0 ms; 3 connections lost",
        ),
        (
            make_report(Outcome.STOPPED),
            RestartError("it was ended"),
            "was called off, because the service stops; start 100.0 ms",
        ),
    ],
)
def test_the_end_of_a_restart_in_one_line(report: RestartReport, error: RestartError | None, expected: str) -> None:
    assert describe_verdict(report, error, 1) == expected


def test_a_worker_is_named_and_not_the_anchor() -> None:
    alone, anchored = make_report(Outcome.SETTLED), make_report(Outcome.SETTLED)
    anchored.workers = [make_report(Outcome.SETTLED, successor_pid=12)]
    assert (name_successors(alone), name_successors(anchored)) == ("pid 11", "pid 12")
    assert describe_outcome(anchored) == "generation 2 (pid 12) serves: settled"


def test_a_reason_is_not_said_twice() -> None:
    assert summarize(RestartError("it says: no", stderr="no")) == "it says: no"
    assert summarize(RestartError("it failed:\n  a traceback\nKeyError: 1")) == "it failed: … KeyError: 1"


def test_a_drain_in_one_line() -> None:
    report = make_report(Outcome.SETTLED, drain=DrainCount(1, 2, 3, 4), phases={Phase.DRAIN: 1.25})
    assert describe_drain(report, "generation 1 has") == (
        "generation 1 has drained in 1.2 s: 1 drained, 2 silent, 3 transferred, 4 cut"
    )
