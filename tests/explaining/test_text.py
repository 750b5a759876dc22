"""A story in lines: what came of it, why, and where the time went."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecdysis_async._explaining.now import Wait
from ecdysis_async._explaining.story import tell_stories
from ecdysis_async._explaining.text import describe, describe_briefly, describe_now, format_seconds

from .histories import begin, fail, records, roll_out, settle


def test_a_failure_is_told_first(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + fail()))
    lines = list(describe(story))
    text = "\n".join(lines)
    assert "failed" in lines[0]
    assert text.index("no such table: users") < text.index("where the time went")
    assert "    | ab\\x07\n    | last" in text
    assert "import numpy " in text
    assert "and no further" in text


def test_a_drain_names_whom_it_has_waited_for(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + settle()))
    text = "\n".join(describe(story))
    assert "GET /slow, 3.2 s old" in text
    assert "cut at the deadline of the drain: GET /slow, 5.0 s old" in text
    assert "accept gap: clients waited in the queue" in text


def test_of_a_roll_out_each_worker_is_told(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, roll_out()))
    text = "\n".join(describe(story))
    assert text.count("where the time went of worker") == 2
    assert "2 workers" in describe_briefly(story)


def test_of_a_failure_its_first_line_is_told_briefly(tmp_path: Path) -> None:
    (story,) = tell_stories(records(tmp_path, begin() + fail()))
    assert describe_briefly(story).endswith("the successor (pid 12) failed: no such table: users")


def test_who_is_waited_for_is_told_with_its_stack() -> None:
    lines = list(
        describe_now([Wait(12, "pid 11 waits for pid 12", stack="File app.py, line 3"), Wait(13, "probation")])
    )
    assert any("File app.py, line 3" in line for line in lines)
    assert any("py-spy dump --native --pid 12" in line for line in lines)
    assert any("pid 13 does not tell" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0012, "1.2 ms"), (1.5, "1.50 s"), (75, "1 min 15 s"), (float("inf"), "?")],
)
def test_durations_are_written_as_people_read_them(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words
