"""The verdict: its numbers, its words, and its JSON."""

from __future__ import annotations

import json

from ecdysis_async._proving.plan import Kind, Step
from ecdysis_async._proving.records import Answer, Connection, Ending, Exchange, Fault, History, Memory, Restart
from ecdysis_async._proving.verdict import find_first_answer, judge


def make_history() -> History:
    report = {"outcome": "settled", "accept_gap": 0.0015}
    restart = Restart(Step.RESTART, 10.0, 12.0, 13.0, code=0, report=report, generation=2)
    history = History(restarts=[restart], generation=1, ended=20.0)
    for number in range(1, 101):
        due = number / 5
        generation = 1 if due < 11 else 2
        answer = Answer(due + number / 1000, 200, number, 100 + generation, generation)
        history.exchanges.append(Exchange(number, Kind.NEW, "GET /", due, ended=answer.at, answer=answer))
    history.connections = [
        Connection(0, Kind.KEPT, 1.0, 1.0, ended=5.0, ending=Ending.ANNOUNCED),
        Connection(1, Kind.NEW, 1.0, 1.0, ended=5.0, ending=Ending.IDLE),  # of no use to anybody any more
    ]
    history.memory = [Memory(1.0, 50_000_000), Memory(11.0, 90_000_000), Memory(15.0, 55_000_000)]
    return history


def test_numbers() -> None:
    verdict = judge(make_history(), 1000.0)
    assert verdict.is_good
    found = verdict.to_json()
    assert json.loads(json.dumps(found)) == found
    assert (found["verdict"], found["requests"], found["answers"]) == ("good", 100, 100)
    assert found["kinds"] == {"new": 100}
    assert found["closed_by_server"] == {"announced": 1, "idle": 0, "busy": 0}
    assert found["memory"] == {"steady": 55_000_000, "restarts": 90_000_000}
    steady, restarts = found["latency"]["steady"], found["latency"]["restarts"]
    assert steady["count"] + restarts["count"] == 100
    assert round(steady["max"], 3) == 0.1
    assert round(restarts["max"], 3) == 0.065
    [step] = found["steps"]
    assert (step["name"], step["seconds"], step["accept_gap"]) == ("restart 1", 3.0, 0.0015)
    assert round(step["first_answer"], 3) == 1.055


def test_words() -> None:
    text = str(judge(make_history(), 1000.0))
    assert text.startswith("restart 1 ")
    assert "settled, 3.00 s, accept gap 1.50 ms, new code answered after 1.05 s" in text
    assert "memory (PSS): 55 MB, and 90 MB at the most with both generations" in text
    assert text.endswith("verdict: nothing was lost")


def test_words_of_a_bad_one() -> None:
    history = make_history()
    history.exchanges += [Exchange(200 + n, Kind.NEW, "GET /", 11.0, ended=11.0, fault=Fault.REFUSED) for n in range(9)]
    history.notes.append("no WebSockets: none")
    verdict = judge(history, 1000.0)
    assert not verdict.is_good
    assert verdict.to_json()["failures"] == [{"class": "connection refused", "phase": "restart 1", "count": 9}]
    assert len(verdict.to_json()["examples"]) == 5
    text = str(verdict)
    assert "note: no WebSockets: none" in text
    assert "verdict: this service does not restart without a loss" in text
    assert "      9 connection refused (restart 1)" in text
    assert text.count("connection refused") == 6


def test_words_of_late_answers() -> None:
    history = make_history()
    history.patience = 0.09
    verdict = judge(history, 1000.0)
    assert (verdict.is_good, verdict.excused) == (True, [])
    assert verdict.to_json()["late"] == [{"class": "answered late", "phase": "steady", "count": 10}]
    text = str(verdict)
    assert "answered late, after more than 0.09 s (--patience), which is no loss: 10 in steady" in text
    assert text.endswith("verdict: nothing was lost")


def test_nothing_is_proved_by_nothing() -> None:
    assert not judge(History(), 2.0).is_good


def test_new_code_is_one_that_has_not_answered_before() -> None:
    history = make_history()
    [restart] = history.restarts
    assert find_first_answer(history, Restart(Step.RESTART, 0.0)) is not None
    assert find_first_answer(history, Restart(Step.BROKEN, 10.0)) is None
    for exchange in history.exchanges:
        assert exchange.answer is not None
        exchange.answer.pid = exchange.answer.generation = None
    assert find_first_answer(history, restart) is None
    for exchange in history.exchanges:
        assert exchange.answer is not None
        exchange.answer.release = "old" if exchange.due < 12 else "new"
    assert round(find_first_answer(history, restart) or 0, 2) == 2.06
