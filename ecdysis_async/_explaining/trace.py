"""Stories in the format that Chrome's and Perfetto's trace viewers read ("Trace Event Format", JSON).

A process is a process there. What it does are slices on its first thread; the phases of a restart are asynchronous
events with the restart's id; a message is a flow from one slice to another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from .story import Step, Story

__all__ = ["make_trace"]

# The thread of a process that its slices are on, and the one of its messages. Viewers show the smaller number above.
STATES, MESSAGES, IMPORTS = 1, 2, 3

# A message is shown as a slice of this length, microseconds: a flow begins and ends at slices.
MESSAGE_MICROSECONDS = 50


def make_trace(stories: Iterable[Story]) -> dict[str, Any]:
    """Return an object of JSON that a trace viewer reads. Its times are CLOCK_MONOTONIC, in microseconds."""
    flows = itertools.count(1)
    events: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for story in stories:
        for lane in story.lanes:
            names.setdefault(lane.pid, f"{lane.name} (pid {lane.pid})")
        for part in story.walk():
            events += _trace_story(part)
        for arrow in story.arrows:
            events += _trace_arrow(arrow.message, (arrow.sender, arrow.sent), (arrow.receiver, arrow.got), next(flows))
    for pid, name in names.items():
        events.append({"ph": "M", "pid": pid, "tid": STATES, "name": "process_name", "args": {"name": name}})
        for thread, text in ((STATES, "states"), (MESSAGES, "messages"), (IMPORTS, "imports")):
            events.append({"ph": "M", "pid": pid, "tid": thread, "name": "thread_name", "args": {"name": text}})
    return {"traceEvents": sorted(events, key=lambda event: event.get("ts", 0)), "displayTimeUnit": "ms"}


def _trace_story(story: Story) -> Iterator[dict[str, Any]]:
    end = story.end
    whole = {"cat": "restart", "id": story.id, "pid": story.predecessor, "tid": STATES}
    facts = {"id": story.id, "outcome": story.outcome, "generation": story.generation, "why": story.why}
    name = f"restart {story.id}: {story.outcome}"
    yield {**whole, "ph": "b", "ts": _micros(story.begun), "name": name, "args": facts}
    for step in story.steps:
        begin, until = _micros(step.begin), _micros(min(step.begin + step.seconds, end))
        yield {**whole, "ph": "b", "ts": begin, "name": step.name, "args": {"pid": step.pid}}
        yield {**whole, "ph": "e", "ts": max(begin, until), "name": step.name}
        yield from (_trace_part(part, end) for part in step.parts)
    yield {**whole, "ph": "e", "ts": _micros(end), "name": name}
    if story.parts:
        return
    for lane in story.lanes:
        for span in lane.spans:
            begin, until = _micros(span.begin), _micros(span.end if math.isfinite(span.end) else end)
            args = {"restart": story.id, "generation": lane.generation, "fate": lane.fate}
            yield {
                "ph": "X",
                "cat": "state",
                "pid": lane.pid,
                "tid": STATES,
                "ts": begin,
                "dur": max(1, until - begin),
                "name": span.name,
                "args": args,
            }


def _trace_part(part: Step, end: float) -> dict[str, Any]:
    begin, until = _micros(part.begin), _micros(min(part.begin + part.seconds, end))
    return {
        "ph": "X",
        "cat": "start-up",
        "pid": part.pid,
        "tid": IMPORTS,
        "ts": begin,
        "dur": max(1, until - begin),
        "name": part.name.strip(),
        "args": {},
    }


def _trace_arrow(
    message: str, sender: tuple[int, float], receiver: tuple[int, float], flow: int
) -> Iterator[dict[str, Any]]:
    for phase, (pid, at) in (("s", sender), ("f", receiver)):
        place = {"cat": "message", "pid": pid, "tid": MESSAGES, "ts": _micros(at), "name": message}
        yield {**place, "ph": "X", "dur": MESSAGE_MICROSECONDS, "args": {"is_sent": phase == "s"}}
        # "bp": "e" ends the flow at the slice around it, instead of at the next one.
        yield {**place, "ph": phase, "id": flow, **({"bp": "e"} if phase == "f" else {})}


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
