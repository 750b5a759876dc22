"""A story is told of what all processes have written: also where one of them has written nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ecdysis_async._explaining.story import Kind, describe_status, tell_stories

from .histories import ANCHOR, NEW, OLD, begin, fail, line, of_predecessor, records, roll_out, settle

START = "start: interpreter and imports, until it says hello"


def test_a_restart_that_settles(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + settle()))
    assert (story.id, story.kind, story.outcome, story.predecessor, story.successor) == (
        "r1",
        Kind.RESTART,
        "settled",
        OLD,
        NEW,
    )
    steps = {step.name: round(step.seconds, 3) for step in story.steps}
    assert steps == {
        "before the new process is started": 0.01,
        "interpreter, and imports before ecdysis_async": 0.1,
        "imports and first lines, until the block is entered": 0.49,
        "the sockets, and what is stashed for it": 0.03,
        "start-up, until it is ready": 0.38,
        "pause: the old process accepts no more": 0.01,
        "commit, until the new process accepts": 0.03,
        "probation": 5.0,
        "drain of the old process": 1.95,
    }
    assert not any(step.is_open for step in story.steps)
    assert [part.name for part in story.steps[2].parts] == ["import numpy", "  import numpy.linalg"]
    assert [part.name for part in story.steps[4].parts] == ["lifespan start-up", "import late"]


def test_each_message_has_both_ends(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + settle()))
    arrows = [(arrow.message, arrow.sender, round(arrow.sent, 2), round(arrow.got, 2)) for arrow in story.arrows]
    assert arrows == [
        ("hello", NEW, 100.6, 100.61),
        ("listeners", OLD, 100.62, 100.63),
        ("ready", NEW, 101.0, 101.01),
        ("commit", OLD, 101.02, 101.03),
    ]


def test_lanes_tell_what_each_process_did(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + settle()))
    old, new = story.lanes
    assert [span.name for span in old.spans] == ["serving", "paused", "draining"]
    assert [span.name for span in new.spans] == ["interpreter", "imports", "starting", "serving"]
    assert old.spans[-1].end == 108.0


def test_what_was_lost_is_told_with_whose_it_was(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + settle()))
    assert story.lost == ["cut at the deadline of the drain: GET /slow, 5.0 s old"]
    assert [(count, requests) for _, count, requests in story.waits] == [(1, ["GET /slow, 3.2 s old"])]


def test_a_restart_that_fails_says_why_and_where(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + fail()))
    assert (story.outcome, story.phase) == ("failed", "initialise")
    assert story.why.endswith("no such table: users")
    assert story.steps[-1].name == "start-up, until it is ready"
    assert story.steps[-1].is_open
    assert story.lanes[-1].fate == "exit status 1"


def test_a_process_that_never_came_to_write_is_told_by_the_other(tmp_path: Path) -> None:
    lines = [each for each in begin() if each["pid"] == OLD and each["kind"] in ("handoff", "spawned")]
    (story,) = tell_stories(records(tmp_path, lines + fail()))
    assert story.successor == NEW
    assert [step.name for step in story.steps if step.is_open] == [
        "start: interpreter and imports, until it says hello"
    ]


def test_a_release_that_writes_no_history_is_told_by_its_messages(tmp_path: Path) -> None:
    lines = [each for each in begin() + settle() if each["pid"] == OLD]
    (story,) = tell_stories(records(tmp_path, lines))
    assert story.outcome == "settled"
    assert [step.name for step in story.steps][1:3] == [
        "start: interpreter and imports, until it says hello",
        "start-up",
    ]


def test_what_could_not_be_started_is_told(tmp_path: Path) -> None:
    report = {"outcome": "failed"}
    lines = [begin()[0], of_predecessor(100.1, "outcome", report=report, why="cannot start 'app'", phase="start")]
    (story,) = tell_stories(records(tmp_path, lines))
    assert (story.outcome, story.steps[0].is_open, story.successor) == ("failed", True, None)


def test_a_restart_that_goes_on_lasts_until_now(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin()))
    assert (story.is_over, story.outcome) == (False, "in progress")
    assert math.isinf(story.steps[-1].seconds)
    story.go_on(105.0)
    assert (story.end, round(story.steps[-1].seconds, 2)) == (105.0, 4.37)


def test_a_roll_out_has_the_handoffs_of_its_workers(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, roll_out()))
    assert (story.kind, story.outcome, [part.slot for part in story.parts]) == (Kind.ROLL_OUT, "settled", [0, 1])
    assert [(part.predecessor, part.successor) for part in story.parts] == [(11, 21), (12, 22)]
    assert [lane.pid for lane in story.lanes] == [ANCHOR, 11, 21, 12, 22]
    assert [arrow.receiver for arrow in story.arrows if arrow.message == "restart"] == [11, 12]
    assert {step.name: round(step.seconds, 2) for step in story.steps} == {"worker 0": 1.16, "worker 1": 1.16}
    assert {lane.fate for lane in story.lanes if lane.pid in (11, 12)} == {"exit status 0"}


def test_a_worker_that_is_started_is_a_story_of_its_own(tmp_path: Path) -> None:
    lines = begin(ANCHOR, 21)
    # With the service, before any restart: the worker is told of none.
    lines[-1]["restart"] = ""
    lines.append(line(100.03, ANCHOR, "worker", slot=3, child=21, generation=2))
    (story,) = tell_stories(records(tmp_path, lines + settle(ANCHOR, 21)))
    assert (story.kind, story.slot, story.successor) == (Kind.START, 3, 21)


def test_what_is_unusual_is_remarked(tmp_path: Path) -> None:
    report = {"outcome": "settled", "unanswered": ["worker 0 did not answer"], "unclaimed": ["web"]}
    (story,) = tell_stories(records(tmp_path, [*begin(), of_predecessor(102, "outcome", report=report)]))
    assert story.remarks == ["worker 0 did not answer", "nobody listens any more on web"]


def test_two_restarts_are_two_stories(tmp_path: Path) -> None:
    second = [{**each, "restart": "r2"} if "restart" in each else each for each in begin(12, 13, 200.0)]
    stories = tell_stories(records(tmp_path, begin() + fail() + second))
    assert [(story.id, story.outcome) for story in stories] == [("r1", "failed"), ("r2", "in progress")]


@pytest.mark.parametrize(
    ("status", "words"), [(None, ""), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")]
)
def test_the_end_of_a_process_in_words(status: int | None, words: str) -> None:
    assert describe_status(status) == words
