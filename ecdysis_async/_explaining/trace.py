"""Stories in the format that Chrome's and Perfetto's trace viewers read ("Trace Event Format", JSON).

A process is a process there. What it does are slices on its first thread; the phases of a restart are asynchronous
events with the restart's id; a message is a flow from one slice to another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from .story import Span, Step, Story

__all__ = ["make_trace"]

# The thread of a process that its slices are on, and the one of its messages. Viewers show the smaller number above.
STATES, MESSAGES, IMPORTS = 1, 2, 3

# A message is shown as a slice of this length, microseconds: a flow begins and ends at slices, and slices of a thread
# may not overlap.
MESSAGE_MICROSECONDS = 1


def make_trace(stories: Iterable[Story]) -> dict[str, Any]:
    """Return an object of JSON that a trace viewer reads. Its times are CLOCK_MONOTONIC, in microseconds."""
    flows = itertools.count(1)
    events: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    lanes: dict[int, list[tuple[Span, dict[str, Any]]]] = {}
    for story in stories:
        for lane in story.lanes:
            names.setdefault(lane.pid, f"{lane.name} (pid {lane.pid})")
            args = {"restart": story.id, "generation": lane.generation, "fate": lane.fate}
            lanes.setdefault(lane.pid, []).extend(
                (Span(span.name, span.begin, min(span.end, story.end)), args) for span in lane.spans
            )
        for part in story.walk():
            # Phases of several workers go on at the same time, and each of them has its own.
            events += _trace_phases(part, story.id if part is story else f"{story.id}/{part.predecessor}")
        for arrow in story.arrows:
            events += _trace_arrow(arrow.message, (arrow.sender, arrow.sent), (arrow.receiver, arrow.got), next(flows))
    for pid, spans in lanes.items():
        events += _trace_lane(pid, sorted(spans, key=lambda each: each[0].begin))
    for pid, name in names.items():
        events.append({"ph": "M", "pid": pid, "tid": STATES, "name": "process_name", "args": {"name": name}})
        for thread, text in ((STATES, "states"), (MESSAGES, "messages"), (IMPORTS, "imports")):
            events.append({"ph": "M", "pid": pid, "tid": thread, "name": "thread_name", "args": {"name": text}})
    return {"traceEvents": sorted(events, key=lambda event: event.get("ts", 0)), "displayTimeUnit": "ms"}


def _trace_phases(story: Story, id: str) -> Iterator[dict[str, Any]]:
    end = story.end
    whole = {"cat": "restart", "id": id, "pid": story.predecessor, "tid": STATES}
    facts = {"id": story.id, "outcome": story.outcome, "generation": story.generation, "why": story.why}
    name = f"restart {story.id}: {story.outcome}"
    yield {**whole, "ph": "b", "ts": _micros(story.begun), "name": name, "args": facts}
    for step in story.steps:
        begin, until = _micros(step.begin), _micros(min(step.begin + step.seconds, end))
        yield {**whole, "ph": "b", "ts": begin, "name": step.name, "args": {"pid": step.pid}}
        yield {**whole, "ph": "e", "ts": max(begin, until), "name": step.name}
        yield from (_trace_part(part, end) for part in step.parts)
    yield {**whole, "ph": "e", "ts": _micros(end), "name": name}


def _trace_lane(pid: int, spans: list[tuple[Span, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield what a process did, one after the other, though several restarts tell of it."""
    for (span, args), following in zip(spans, (*(each[0].begin for each in spans[1:]), math.inf), strict=True):
        begin, until = _micros(span.begin), _micros(min(span.end, following))
        if until > begin:
            place = {"cat": "state", "pid": pid, "tid": STATES, "ts": begin, "name": span.name}
            yield {**place, "ph": "X", "dur": until - begin, "args": args}


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
