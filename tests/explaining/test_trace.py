"""A trace is what the Trace Event Format asks for: seen by its rules, because no viewer of it can be had everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._explaining.story import tell_stories
from ecdysis_async._explaining.trace import make_trace

from .histories import begin, fail, records, roll_out, settle

# The second restart begins while the old process of the first one drains.
SECOND = [*begin(12, 13, 107.0), *settle(12, 13, 107.0)]
TWICE = [*begin(), *settle(), *({**each, "restart": "r2"} if "restart" in each else each for each in SECOND)]

STORIES = {"settled": begin() + settle(), "failed": begin() + fail(), "roll-out": roll_out(), "in progress": begin()}
STORIES["two"] = TWICE


def make(directory: Path, name: str) -> list[dict[str, Any]]:
    trace = make_trace(tell_stories(records(directory, STORIES[name])))
    events: list[dict[str, Any]] = json.loads(json.dumps(trace, allow_nan=False))["traceEvents"]
    return events


@pytest.mark.parametrize("name", list(STORIES))
def test_each_event_has_what_its_phase_needs(name: str, tmp_path: Path) -> None:
    needed = {"X": {"ts", "dur", "name"}, "M": {"args", "name"}, "b": {"id", "cat", "ts"}, "e": {"id", "cat", "ts"}}
    needed |= {phase: {"id", "cat", "ts"} for phase in "sf"}
    for event in make(tmp_path, name):
        assert event.keys() >= needed[event["ph"]] | {"pid", "tid"}
        assert event.get("dur", 1) > 0


@pytest.mark.parametrize("name", list(STORIES))
def test_slices_of_a_thread_are_within_each_other_or_apart(name: str, tmp_path: Path) -> None:
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in make(tmp_path, name):
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for slices in threads.values():
        for one, (first, last) in enumerate(slices):
            for other_first, other_last in slices[one + 1 :]:
                assert not first < other_first < last < other_last, (first, last, other_first, other_last)


@pytest.mark.parametrize("name", list(STORIES))
def test_what_begins_ends(name: str, tmp_path: Path) -> None:
    events = make(tmp_path, name)
    for begin_phase, end_phase in ("be", "sf"):
        begun = Counter((event["cat"], event["id"], event["name"]) for event in events if event["ph"] == begin_phase)
        ended = Counter((event["cat"], event["id"], event["name"]) for event in events if event["ph"] == end_phase)
        assert begun == ended
        assert begun


@pytest.mark.parametrize("name", list(STORIES))
def test_a_flow_ends_at_a_slice(name: str, tmp_path: Path) -> None:
    events = make(tmp_path, name)
    slices = {(event["pid"], event["tid"], event["ts"]) for event in events if event["ph"] == "X"}
    assert {(event["pid"], event["tid"], event["ts"]) for event in events if event["ph"] in "sf"} <= slices


def test_each_process_is_one(tmp_path: Path) -> None:
    names = {
        event["pid"]: event["args"]["name"] for event in make(tmp_path, "roll-out") if event["name"] == "process_name"
    }
    assert names[10] == "anchor (pid 10)"
    assert len(names) == 5
