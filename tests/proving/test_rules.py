"""Each rule, on histories that keep it and on some that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ecdysis_async._proving.plan import Kind, Step
from ecdysis_async._proving.records import Answer, Connection, Ending, Exchange, Fault, History, Restart
from ecdysis_async._proving.rules import STEADY, check, name_phase, percentile

# A restart from generation 1 to 2, and one from 2 to 3 before which a release has failed.
RESTARTS = (
    Restart(Step.RESTART, 10.0, 12.0, 13.0, code=0, generation=2),
    Restart(Step.BROKEN, 20.0, 21.0, code=1),
    Restart(Step.RESTART, 30.0, 32.0, 33.0, code=0, generation=3),
)


class Story:
    """Makes a history."""

    def __init__(self, *restarts: Restart) -> None:
        self.history = History(restarts=list(restarts), generation=1, ended=40.0)

    def connect(self, at: float, **more: Any) -> Connection:
        connection = Connection(len(self.history.connections), Kind.KEPT, at, at, **more)
        self.history.connections.append(connection)
        return connection

    def ask(self, at: float, generation: int | None = 1, connection: Connection | None = None, **more: Any) -> Exchange:
        """Ask, and get the answer at once."""
        connection = connection or self.connect(at)
        answer = Answer(more.pop("answered", at + 0.01), 200, generation=generation, pid=more.pop("pid", None))
        exchange = Exchange(len(self.history.exchanges) + 1, Kind.KEPT, "GET /", at, connection.number)
        answer.request = exchange.id
        exchange.answer, exchange.ended = answer, answer.at
        connection.requests.append(exchange.id)
        connection.answers.append(answer)
        self.history.exchanges.append(exchange)
        return exchange

    def fail(self, at: float, fault: Fault, connection: Connection | None = None) -> Exchange:
        connection = connection or self.connect(at)
        exchange = Exchange(len(self.history.exchanges) + 1, Kind.KEPT, "GET /", at, connection.number, fault=fault)
        exchange.ended = at
        connection.requests.append(exchange.id)
        self.history.exchanges.append(exchange)
        return exchange

    def find(self) -> list[tuple[Fault, str]]:
        return [(finding.fault, finding.phase) for finding in check(self.history, 2.0)]


def test_a_history_that_keeps_all_rules() -> None:
    story = Story(*RESTARTS)
    kept = story.connect(1.0)
    story.ask(5.0, 1, kept)
    story.ask(11.0, 1, kept)  # still there while it drains
    story.ask(11.0, 2)
    story.ask(14.0, 2, kept)  # it has moved
    story.ask(20.5, 2)
    story.ask(31.0, 3)
    story.ask(35.0, 3)
    assert story.find() == []


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.RESET, Fault.TIMEOUT, Fault.TRUNCATED, Fault.STATUS])
def test_a_request_that_fails_is_told_with_what_the_service_was_doing(fault: Fault) -> None:
    story = Story(*RESTARTS)
    story.fail(5.0, fault)
    story.fail(12.0, fault)
    story.fail(20.5, fault)
    assert story.find() == [(fault, STEADY), (fault, "restart 1"), (fault, "2: broken release")]


def test_an_answer_that_is_late_is_told_and_no_loss() -> None:
    story = Story(*RESTARTS)
    story.history.patience = 3.0
    story.ask(9.0, answered=12.1)
    story.ask(1.0, answered=3.9)
    [finding] = check(story.history)
    assert (finding.fault, finding.phase, finding.text) == (
        Fault.LATE,
        "restart 1",
        "request 1 (kept GET /): answered late: after 3.1 s",
    )
    assert finding.excuse is not None


def test_a_request_without_an_end() -> None:
    story = Story()
    story.history.exchanges.append(Exchange(1, Kind.NEW, "GET /", 3.0))
    assert story.find() == [(Fault.UNANSWERED, STEADY)]


def test_an_answer_that_comes_twice() -> None:
    story = Story()
    exchange = story.ask(1.0)
    assert exchange.answer is not None
    story.history.connections[0].answers.append(Answer(1.1, 200, exchange.id))
    assert story.find() == [(Fault.REPEATED, STEADY)]


def test_an_answer_that_comes_twice_and_names_no_request() -> None:
    story = Story()
    connection = story.connect(1.0, requests=[1], answers=[Answer(1.0, 200), Answer(1.1, 200)])
    assert connection.requests == [1]
    assert story.find() == [(Fault.REPEATED, STEADY)]


def test_answers_in_the_wrong_order() -> None:
    story = Story()
    story.connect(1.0, requests=[1, 2], answers=[Answer(1.0, 200, 2), Answer(1.1, 200, 1)])
    assert story.find() == [(Fault.ORDER, STEADY)] * 2


def test_a_connection_that_ends_while_idle() -> None:
    story = Story(*RESTARTS)
    story.connect(1.0, ended=12.5, ending=Ending.IDLE)
    story.connect(1.0, ended=12.5, ending=Ending.ANNOUNCED)
    story.connect(1.0, ended=12.5, ending=Ending.OURS)
    assert story.find() == [(Fault.IDLE_CLOSED, "restart 1")]


@pytest.mark.parametrize(
    ("break_rule", "words"),
    [
        (lambda story: story.ask(5.0, 2), "whose restart had not been asked for yet"),
        (lambda story: story.ask(20.5, 4), "which was never to serve"),
        (lambda story: story.ask(14.0, 1), "on a new connection, 2.00 s after its successor had settled"),
        (lambda story: story.ask(36.0, 1, story.connect(1.0)), "after the end of that generation"),
    ],
)
def test_a_generation_that_was_not_serving(break_rule: Callable[[Story], object], words: str) -> None:
    story = Story(*RESTARTS)
    break_rule(story)
    [finding] = check(story.history)
    assert finding.fault is Fault.GENERATION
    assert words in finding.text


@pytest.mark.parametrize(
    ("step", "words"), [(Step.PREDECESSOR_KILLED, "had been killed"), (Step.SUCCESSOR_KILLED, "still starting")]
)
def test_a_process_that_cannot_have_answered(step: Step, words: str) -> None:
    code = 0 if step is Step.PREDECESSOR_KILLED else 1
    story = Story(Restart(step, 10.0, 12.0, 13.0, code=code, killed=77, killed_at=10.5))
    story.ask(11.6 if step is Step.PREDECESSOR_KILLED else 10.2, pid=77)
    [finding] = check(story.history)
    assert words in finding.text


def test_what_a_killed_process_takes_with_it_is_excused() -> None:
    kill = Restart(Step.PREDECESSOR_KILLED, 10.0, 12.0, 13.0, code=0, generation=2, killed=77, killed_at=10.5)
    story = Story(kill)
    its, other, unknown = (story.connect(9.0) for _ in range(3))
    story.ask(9.5, 1, its, pid=77)
    story.ask(9.5, 1, other, pid=78)
    for connection in (its, other, unknown):
        story.fail(10.51, Fault.RESET, connection)
    story.fail(10.51, Fault.REFUSED)  # the socket itself was lost
    story.fail(21.0, Fault.RESET, story.connect(9.0))  # long after it
    story.connect(9.0, ended=10.52, ending=Ending.IDLE)
    findings = check(story.history)
    assert [(finding.fault, finding.excuse is not None) for finding in findings] == [
        (Fault.RESET, True),
        (Fault.RESET, False),
        (Fault.RESET, True),
        (Fault.REFUSED, False),
        (Fault.IDLE_CLOSED, True),
        (Fault.RESET, False),
    ]


@pytest.mark.parametrize(
    ("restart", "words"),
    [
        (Restart(Step.RESTART, 1.0, 2.0, code=1, message="no disk\nat all"), r"failed \(exit 1\): no disk$"),
        (Restart(Step.RESTART, 1.0, 2.0), r"failed \(exit None\)"),
        (Restart(Step.BROKEN, 1.0, 2.0, code=0), "taken for good"),
        (Restart(Step.BROKEN, 1.0, 2.0, code=6), "exit 6, and not with 1"),
        (Restart(Step.SUCCESSOR_KILLED, 1.0, 2.0, code=0, killed=7, killed_at=1.5), "said to have succeeded"),
        (Restart(Step.PREDECESSOR_KILLED, 1.0, 2.0, code=1, killed=7, killed_at=1.5), "it failed"),
        (Restart(Step.PREDECESSOR_KILLED, 1.0, 2.0, code=0), "nobody to be killed"),
    ],
)
def test_a_restart_with_the_wrong_outcome(restart: Restart, words: str) -> None:
    [finding] = check(Story(restart).history)
    assert finding.fault is Fault.RESTART
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(finding.text)


@pytest.mark.parametrize(
    ("latencies", "is_slower"),
    [
        ((0.02,) * 30, True),
        ((0.02,) * 10, False),  # too few to say so
        ((0.009,) * 30, False),  # less than what a busy machine adds
        ((0.004,) * 20 + (0.5,) * 40, False),  # its best answers are as fast as before: the machine was busy
    ],
)
def test_a_generation_that_is_slower(latencies: tuple[float, ...], is_slower: bool) -> None:
    story = Story(RESTARTS[0])
    for number in range(30):
        story.ask(5 + number / 100, 1, answered=5 + number / 100 + 0.004)
    for number, latency in enumerate(latencies):
        story.ask(15 + number / 100, 2, answered=15 + number / 100 + latency)
    findings = check(story.history, 2.0)
    assert [finding.fault for finding in findings] == [Fault.SLOWER] * is_slower
    if is_slower:
        for exchange in story.history.exchanges:
            exchange.late = 0.01  # the machine itself was busy
        assert check(story.history, 2.0) == []
        assert "generation 2 is 5.0 times slower than generation 1 in kept GET /" in findings[0].text


def test_phases_are_named_by_the_step_that_a_request_met() -> None:
    history = Story(*RESTARTS).history
    assert name_phase(history, 1.0, 9.9) == STEADY
    assert name_phase(history, 9.0, 10.1) == "restart 1"
    assert name_phase(history, 1.0, 99.0) == "restart 1"
    assert name_phase(history, 31.0, 31.1) == "restart 3"


def test_percentiles() -> None:
    values = list(range(1, 101))
    assert [percentile(values, percent) for percent in (1, 50, 99, 99.9, 100)] == [1, 50, 99, 100, 100]
