"""A service that is stuck at this moment: who waits for whom, since when, and for what.

It is found in the history, which tells also where the service itself does not answer any more.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ecdysis_async._system.history import Note
from ecdysis_async._system.whereabouts import find_place

from .records import Record
from .story import Kind, Story

__all__ = ["Wait", "add_stacks", "find_deaths", "find_waits", "is_alive"]

# A worker that has said nothing to its anchor for so long hangs, seconds: it tells of itself each second.
SILENT_SECONDS = 2.5

# Where the files are of what is not the application's own.
_LIBRARIES = ("/lib/python3", "/ecdysis_async/", "<frozen ")

# What runs a loop, and what it is run by.
_RUNNERS = ("/asyncio/runners.py", "/ecdysis_async/_accepting/loops.py", "/trio/_core/_run.py")

# What a predecessor waits for in each state; the pid is the successor's, or its own.
_FOR_SUCCESSOR = {
    "spawning": "to start",
    "initialising": "to get ready",
    "committing": "to accept",
    "aborting": "to end, because the restart has failed",
    "recalling": "to give the sockets back",
    "reverting": "to end, because it has failed",
    "stopping": "to end, because the service stops",
}


@dataclass(slots=True)
class Wait:
    """Somebody waits for a process.

    Attributes:
        pid: the process that is waited for.
        text: who waits for it, since when and for what.
        is_asked: whether that process is to be asked where it stands.
        details: what else is known, line by line.
        stack: where that process stands, as it says itself.
    """

    pid: int
    text: str
    is_asked: bool = True
    details: list[str] = field(default_factory=list)
    stack: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of JSON."""
        return {"pid": self.pid, "text": self.text, "details": self.details, "stack": self.stack}


def is_alive(pid: int) -> bool:
    """Say whether there is a process of this number that has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def find_waits(
    records: Sequence[Record], stories: Iterable[Story], status: Mapping[str, Any] | str | None
) -> list[Wait]:
    """Return who waits for whom.

    Args:
        records: of the service.
        stories: the same as restarts.
        status: what the service says of itself; a text says why it says nothing; None: nobody is there.
    """
    waits = [wait for story in stories for part in story.walk() if (wait := _find_wait(part)) is not None]
    if isinstance(status, str):
        waits += [
            Wait(pid, f"commands wait for the {role} (pid {pid}) to answer: {status}")
            for pid, role in _find_speakers(records)
        ]
    if isinstance(status, Mapping):
        waits += _find_silent_workers(status)
    waits += _find_drains(records)
    found: dict[int, Wait] = {}
    for wait in waits:
        if wait.pid not in found:
            found[wait.pid] = wait
        else:
            found[wait.pid].details += wait.details
    return list(found.values())


def find_deaths(records: Sequence[Record]) -> list[str]:
    """Name the process that answered commands last, if it has ended without a word."""
    begun: dict[int, Record] = {}
    last: Record | None = None
    for record in records:
        if record.kind is Note.BEGUN and record.text("role") in ("anchor", "service"):
            begun[record.pid] = last = record
        elif record.kind is Note.ENDED:
            begun.pop(record.pid, None)
    if last is None or last.pid not in begun or is_alive(last.pid):
        return []
    who = f"the {last.text('role')} (pid {last.pid}, generation {last.text('generation')})"
    return [f"{who} has ended without a word: it was killed, or ended by os._exit, a crash in C, or the machine"]


def add_stacks(waits: Iterable[Wait], ask: Callable[[int], str | None]) -> None:
    """Ask each process that is waited for where it stands."""
    for wait in waits:
        if wait.is_asked and (stack := ask(wait.pid)) is not None:
            wait.stack = trim(stack)
            # Where a drain waits for requests, these tell more than one of many lines.
            if not wait.details and (place := find_place(stack)) is not None:
                wait.details.insert(0, f"it stands at {place}")


def trim(stack: str) -> str:
    """Leave out the threads and tasks in which nothing of the application's runs, unless nothing is left then."""
    paragraphs = [_without_runners(each) for each in stack.split("\n\n")]
    return "\n\n".join([each for each in paragraphs if _has_own_lines(each)] or paragraphs)


def _without_runners(paragraph: str) -> str:
    """Leave out what has started the loop."""
    lines = paragraph.splitlines()
    return "\n".join(itertools.takewhile(lambda line: not any(each in line for each in _RUNNERS), lines))


def _has_own_lines(paragraph: str) -> bool:
    return any(
        line.lstrip().startswith("File ") and not any(place in line for place in _LIBRARIES)
        for line in paragraph.splitlines()
    )


def _find_wait(story: Story) -> Wait | None:
    """Return what a handoff waits for that has not come to its end."""
    if story.is_over or not is_alive(story.predecessor) or not story.predecessor or story.parts:
        return None
    seconds = time.monotonic() - story.state_since
    who = f"restart {story.id}: generation {story.former} (pid {story.predecessor})"
    if story.kind is Kind.START:
        who = f"the anchor (pid {story.predecessor})"
    if (what := _FOR_SUCCESSOR.get(story.state)) is not None:
        if story.successor is None or not is_alive(story.successor):
            return None
        return Wait(
            story.successor,
            f"{who} waits for generation {story.generation} (pid {story.successor}) {what}, for {seconds:.1f} s now",
        )
    if story.state == "pausing":
        return Wait(
            story.predecessor,
            f"restart {story.id}: generation {story.generation} (pid {story.successor}) waits for generation "
            f"{story.former} (pid {story.predecessor}) to accept no more, for {seconds:.1f} s now",
        )
    if story.state == "probation" and story.successor is not None:
        text = f"{who} can still take over again from pid {story.successor}: probation, for {seconds:.1f} s now"
        return Wait(story.successor, text, is_asked=False)
    return None


def _find_speakers(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Return the processes that answer commands, or should: the newest one last."""
    speakers: dict[int, str] = {}
    for record in records:
        if record.kind is Note.BEGUN and record.text("role") in ("anchor", "service"):
            speakers[record.pid] = record.text("role")
        elif record.kind is Note.ENDED:
            speakers.pop(record.pid, None)
    return [(pid, role) for pid, role in speakers.items() if is_alive(pid) and pid != os.getpid()]


def _find_silent_workers(status: Mapping[str, Any]) -> Iterable[Wait]:
    workers = status.get("workers")
    for worker in workers if isinstance(workers, list) else ():
        match worker:
            case {"pid": int(pid), "slot": slot, "state": "starting", "uptime": int() | float() as seconds} if (
                seconds >= SILENT_SECONDS
            ):
                yield Wait(
                    pid, f"the service waits for worker {slot} (pid {pid}) to get ready, for {seconds:.1f} s now"
                )
            case {"pid": int(pid), "slot": slot, "silence": int() | float() as silence} if silence >= SILENT_SECONDS:
                yield Wait(
                    pid,
                    f"the anchor waits for worker {slot} (pid {pid}) to answer, which is silent for {silence:.0f} s",
                )


def _find_drains(records: Sequence[Record]) -> Iterable[Wait]:
    """Yield the processes that drain, with whom they wait for."""
    drains: dict[int, tuple[Record, Record | None]] = {}
    for record in records:
        match record.kind:
            case Note.DRAIN:
                drains[record.pid] = (record, None)
            case Note.WAITS if record.pid in drains:
                drains[record.pid] = (drains[record.pid][0], record)
            case Note.ENDED:
                drains.pop(record.pid, None)
    for pid, (begin, last) in drains.items():
        if not is_alive(pid):
            continue
        seconds = time.monotonic() - begin.clock
        limit = begin.seconds("seconds")
        count = last.number("connections") if last is not None else begin.number("connections")
        text = f"pid {pid} drains for {seconds:.1f} s now"
        if limit is not None:
            text += f", until {max(0.0, limit - seconds):.1f} s from now at the most"
        requests = last.facts.get("requests") if last is not None else None
        details = [f"it waits for {each}" for each in requests] if isinstance(requests, list) else []
        noun = "connection" if count == 1 else "connections"
        yield Wait(pid, f"{text}: {count} {noun}", details=details)
