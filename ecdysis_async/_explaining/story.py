"""The story of a restart: who took part in it, what was said, where the time went, and what came of it.

It is made of the records that all processes have left. Nothing here reads, prints or asks anybody.
"""

from __future__ import annotations

import enum
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ecdysis_async._system.history import Note

from .records import Record

__all__ = ["Arrow", "Kind", "Lane", "Span", "Step", "Story", "describe_status", "tell_stories"]

# A module, a wait or a step that takes less is not told, seconds.
MIN_SECONDS = 0.0005

# What a predecessor's side of a handoff is called while its generation accepts.
_ACCEPTING = {"spawning", "initialising", "failed", "rolled back", "aborting"}
# What its state means for the process, where that differs from the name of the state.
_MEANINGS = {
    "pausing": "paused",
    "committing": "paused",
    "probation": "paused",
    "recalling": "paused",
    "reverting": "paused",
    "settled": "draining",
    "stopping": "draining",
    "stopped": "draining",
}
_FINAL = {"failed", "rolled back", "settled", "stopped"}
_SUCCESSOR_MEANINGS = {
    "initialising": "starting",
    "waiting": "waiting",
    "opening": "waiting",
    "orphaned": "starting",
    "opening orphaned": "waiting",
    "probation": "serving",
    "settled": "serving",
    "aborted": "leaving",
    "stopped": "draining",
    "returned": "draining",
}


class Kind(enum.StrEnum):
    """What a story is of."""

    RESTART = "restart"
    ROLL_OUT = "roll-out"  # the restart of a service with workers: its parts are the handoffs of the slots
    START = "start"  # of a worker in a slot that had none


@dataclass(slots=True)
class Span:
    """What one process did for a while; its end is infinite where that is not known."""

    name: str
    begin: float
    end: float = math.inf


@dataclass(slots=True)
class Lane:
    """One process, from its first record to its last in this restart.

    Attributes:
        pid: the process.
        name: what it is.
        generation: of it; 0 for an anchor.
        spans: what it did.
        fate: how it ended, where that is known.
    """

    pid: int
    name: str
    generation: int
    spans: list[Span] = field(default_factory=list)
    fate: str = ""


@dataclass(frozen=True, slots=True)
class Arrow:
    """One message. Where one of the two processes has not written its end down, the other's time stands for both."""

    message: str
    sender: int
    sent: float
    receiver: int
    got: float


@dataclass(slots=True)
class Step:
    """Where time went.

    Attributes:
        name: what took it.
        begin: when that began, by CLOCK_MONOTONIC.
        seconds: how long it took.
        pid: in which process.
        parts: what it consists of, as far as that is known.
        is_open: whether it has not ended, or its end was the end of the process.
        is_import: whether a module was imported.
    """

    name: str
    begin: float
    seconds: float
    pid: int
    parts: list[Step] = field(default_factory=list)
    is_open: bool = False
    is_import: bool = False


@dataclass(slots=True)
class Story:
    """One restart, or one part of it. Times are CLOCK_MONOTONIC.

    Attributes:
        id: of the restart.
        kind: what it is of.
        generation: the number of the generation that came, or was to come.
        at: when it began, in seconds since the epoch.
        begun: the same by CLOCK_MONOTONIC.
        ended: when its outcome stood; infinite while it does not.
        outcome: what it is called; "in progress" without one.
        why: why it failed, in one paragraph; empty where it did not.
        phase: in which phase it failed.
        stderr: the last lines that the successor wrote.
        report: what the service has reported, as an object of JSON.
        title: what it was for, in the words of the log.
        former: the generation that was there before.
        slot: of the worker, in a part of a roll-out.
        predecessor: the pid of the process that was asked.
        successor: the pid of the process that came.
        state: where the handoff stands, in the predecessor's words.
        state_since: since when.
        lanes: the processes.
        arrows: the messages.
        steps: where the time went.
        waits: whom the drain has waited for: when that was seen, and what was seen.
        drained: when the drain was over; infinite while it is not, or where there was none.
        parts: the handoffs of a roll-out.
        now: this moment, where it goes on; NaN where it does not.
    """

    id: str
    kind: Kind
    generation: int
    at: float
    begun: float
    ended: float = math.inf
    outcome: str = "in progress"
    why: str = ""
    phase: str = ""
    stderr: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    former: int = 0
    slot: int | None = None
    predecessor: int = 0
    successor: int | None = None
    state: str = "spawning"
    state_since: float = 0.0
    lanes: list[Lane] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    waits: list[tuple[float, int, list[str]]] = field(default_factory=list)
    drained: float = math.inf
    parts: list[Story] = field(default_factory=list)
    now: float = math.nan

    def go_on(self, now: float) -> None:
        """Let what has not ended last until this moment: its processes live."""
        self.now = now
        for step in self.steps:
            if not math.isfinite(step.seconds):
                step.seconds = max(0.0, now - step.begin)
        for part in self.parts:
            if not part.is_over:
                part.go_on(now)

    @property
    def is_over(self) -> bool:
        """Whether its outcome stands."""
        return math.isfinite(self.ended)

    @property
    def end(self) -> float:
        """When the last thing happened that is known of it."""
        times = [self.begun, self.ended, self.drained, self.state_since, self.now]
        times += [step.begin + step.seconds for step in self.steps]
        times += [arrow.got for arrow in self.arrows]
        times += [part.end for part in self.parts]
        return max(each for each in times if math.isfinite(each))

    @property
    def remarks(self) -> list[str]:
        """What was unusual, and is no loss."""
        found = [str(each) for each in self.report.get("unanswered") or ()]
        if self.report.get("unclaimed"):
            found.append(f"nobody listens any more on {', '.join(map(str, self.report['unclaimed']))}")
        return found

    @property
    def lost(self) -> list[str]:
        """What was lost, and whose it was."""
        report = self.report
        found = [f"cut at the deadline of the drain: {each}" for each in report.get("cut_requests") or ()]
        if report.get("lost"):
            found.append(f"{report['lost']} connections that the new process had accepted when it was rolled back")
        found += [f"cut short, because too many releases drain: {each}" for each in report.get("hurried") or ()]
        if report.get("left_behind"):
            found.append(f"the old process was ended by force, kept by {', '.join(report['left_behind'])}")
        return found

    def walk(self) -> Iterator[Story]:
        """Yield this story and its parts."""
        yield self
        yield from self.parts


@dataclass(slots=True)
class _Handoff:
    """The records of one handoff, sorted by who has written them."""

    begin: Record
    predecessor: list[Record] = field(default_factory=list)
    successor: list[Record] = field(default_factory=list)
    children: set[int] = field(default_factory=set)
    drain: list[Record] = field(default_factory=list)


def tell_stories(records: Iterable[Record]) -> list[Story]:
    """Return all restarts that the records tell of, in the order of their beginnings."""
    records = list(records)
    handoffs = _sort(records)
    slots = {record.number("child"): record.number("slot") for record in records if record.kind is Note.WORKER}
    steps = [record for record in records if record.kind is Note.STEP]
    deaths = {record.number("child"): record for record in records if record.kind is Note.DIED}
    stories = []
    for handoff in handoffs:
        story = _tell(handoff, steps)
        story.slot = next((slots[child] for child in handoff.children if child in slots), None)
        if story.slot is not None and handoff.begin.pid not in slots:
            story.kind = Kind.START
        for lane in story.lanes:
            if (death := deaths.get(lane.pid)) is not None and lane.spans:
                lane.fate = describe_status(death.number("status"))
                _end(lane, death.clock)
        stories.append(story)
    return sorted(_gather(records, stories), key=lambda story: story.at)


def describe_status(status: int | None) -> str:
    """Say how a process ended; empty where that is not known."""
    if status is None:
        return ""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _sort(records: list[Record]) -> list[_Handoff]:
    """Give each record to the handoff that it belongs to."""
    handoffs: list[_Handoff] = []

    def find(restart: str, predecessor: int | None, child: int | None) -> _Handoff | None:
        # A worker that is started with the service is told of no restart.
        candidates = [
            each
            for each in handoffs
            if (each.begin.restart == restart if restart else child in each.children)
            and predecessor in (None, each.begin.pid)
        ]
        own = [each for each in candidates if child in each.children]
        found = own or [each for each in candidates if not each.children or child is None] or candidates
        return found[-1] if found else None

    for record in records:
        match record.kind:
            case Note.HANDOFF:
                handoffs.append(_Handoff(record))
            case Note.SPAWNED:
                started = [
                    each
                    for each in handoffs
                    if (each.begin.restart, each.begin.pid) == (record.restart, record.pid) and not each.children
                ]
                if started and (child := record.number("child")) is not None:
                    started[-1].children.add(child)
                    started[-1].predecessor.append(record)
            case Note.PROCESS | Note.IMPORTS:
                if (handoff := find(record.restart, record.number("peer"), record.pid)) is not None:
                    # Behind a wrapper, another process than the one that was started speaks.
                    handoff.children.add(record.pid)
                    handoff.successor.append(record)
            case Note.STATE | Note.SENT | Note.GOT if record.text("side") != "anchor":
                peer = record.number("peer")
                own = find(record.restart, record.pid, peer)
                if own is not None and own.begin.pid == record.pid:
                    own.predecessor.append(record)
                elif (handoff := find(record.restart, peer, record.pid)) is not None:
                    handoff.successor.append(record)
            case Note.OUTCOME if record.text("side") != "anchor":
                if (handoff := find(record.restart, record.pid, _child_of(record))) is not None:
                    handoff.predecessor.append(record)
            case Note.DRAIN | Note.WAITS | Note.DRAINED if record.restart and record.text("side") != "anchor":
                if (handoff := find(record.restart, record.pid, None)) is not None:
                    handoff.drain.append(record)
    return handoffs


def _child_of(record: Record) -> int | None:
    report = record.facts.get("report")
    child = report.get("successor_pid") if isinstance(report, dict) else None
    return child if isinstance(child, int) else None


def _tell(handoff: _Handoff, steps: list[Record]) -> Story:
    begin = handoff.begin
    story = Story(
        begin.restart,
        Kind.RESTART,
        begin.number("generation") or 0,
        begin.at,
        begin.clock,
        title=begin.text("title"),
        former=begin.number("former") or 0,
        predecessor=begin.pid,
        state_since=begin.clock,
    )
    process = next((each for each in handoff.successor if each.kind is Note.PROCESS), None)
    spawned = next((each for each in handoff.predecessor if each.kind is Note.SPAWNED), None)
    story.successor = process.pid if process is not None else spawned.number("child") if spawned is not None else None
    for record in handoff.predecessor:
        if record.kind is Note.STATE:
            story.state, story.state_since = record.text("state"), record.clock
        elif record.kind is Note.OUTCOME:
            _note_outcome(story, record)
    for record in handoff.drain:
        if record.kind is Note.WAITS:
            requests = record.facts.get("requests")
            named = [str(each) for each in requests] if isinstance(requests, list) else []
            story.waits.append((record.clock, record.number("connections") or 0, named))
        elif record.kind is Note.DRAINED:
            story.drained = record.clock
            if isinstance(report := record.facts.get("report"), dict):
                story.report = report
    story.arrows = sorted(_match(handoff, story), key=lambda arrow: arrow.sent)
    story.steps = list(_find_steps(handoff, story, process, spawned, steps))
    story.lanes = list(_find_lanes(handoff, story, process, spawned))
    return story


def _note_outcome(story: Story, record: Record) -> None:
    report = record.facts.get("report")
    story.ended = record.clock
    story.report = report if isinstance(report, dict) else {}
    story.outcome = str(story.report.get("outcome", "unknown"))
    story.why, story.phase, story.stderr = record.text("why"), record.text("phase"), record.text("stderr")


def _match(handoff: _Handoff, story: Story) -> Iterator[Arrow]:
    """Yield each message, with both of its ends."""
    predecessor, successor = story.predecessor, story.successor or 0
    sides = (
        (handoff.predecessor, predecessor, handoff.successor, successor),
        (handoff.successor, successor, handoff.predecessor, predecessor),
    )
    process = next((each for each in handoff.successor if each.kind is Note.PROCESS), None)
    for senders, sender, receivers, receiver in sides:
        got = [each for each in receivers if each.kind is Note.GOT]
        for record in senders:
            if record.kind is not Note.SENT:
                continue
            message = record.text("message")
            end = next((each for each in got if each.text("message") == message), None)
            if end is not None:
                got.remove(end)
            arrival = end.clock if end is not None else record.clock
            if message == "listeners" and process is not None:
                arrival = process.seconds("listeners") or arrival
            yield Arrow(message, sender, record.clock, receiver, max(arrival, record.clock))
        for record in got:
            # The first word is spoken before the new process knows which restart it is in.
            message, sent = record.text("message"), record.clock
            if message == "hello" and process is not None:
                sent = process.seconds("hello") or sent
            yield Arrow(message, sender, min(sent, record.clock), receiver, record.clock)


def _find_steps(
    handoff: _Handoff, story: Story, process: Record | None, spawned: Record | None, steps: list[Record]
) -> Iterator[Step]:
    """Yield where the time went, one after the other."""
    predecessor, successor = story.predecessor, story.successor or 0
    states = {each.text("state"): each.clock for each in handoff.predecessor if each.kind is Note.STATE}
    got = {each.text("message"): each.clock for each in handoff.predecessor if each.kind is Note.GOT}
    over = story.ended
    if spawned is None:
        yield _step("start the process", story.begun, min(over, story.end), predecessor, is_open=True)
        return
    launched = spawned.seconds("begun") or spawned.clock
    if launched - story.begun >= MIN_SECONDS:
        yield _step("before the new process is started", story.begun, launched, predecessor)
    hello = process.seconds("hello") if process is not None else got.get("hello")
    if process is None or hello is None:
        said = got.get("hello")
        name = "start: interpreter and imports, until it says hello"
        yield _step(name, launched, said if said is not None else over, successor, is_open=said is None)
        if said is None:
            return
        ready = got.get("ready")
        yield _step("start-up", said, ready if ready is not None else over, successor, is_open=ready is None)
    else:
        first = process.seconds("first") or hello
        yield _step("interpreter, and imports before ecdysis_async", launched, first, successor)
        imports = _step("imports and first lines, until the block is entered", first, hello, successor)
        imports.parts = _find_imports([process], successor)
        yield imports
        listeners = process.seconds("listeners") or hello
        if listeners - hello >= MIN_SECONDS:
            yield _step("the sockets, and what is stashed for it", hello, listeners, successor)
        ready = got.get("ready")
        start_up = _step(
            "start-up, until it is ready",
            listeners,
            ready if ready is not None else over,
            successor,
            is_open=ready is None,
        )
        until = ready if ready is not None else over
        start_up.parts = [
            _step(each.text("what"), each.seconds("begun") or each.clock, each.clock, successor)
            for each in steps
            if each.pid == successor and listeners <= each.clock <= until
        ]
        start_up.parts += _find_imports([each for each in handoff.successor if each.kind is Note.IMPORTS], successor)
        start_up.parts.sort(key=lambda part: part.begin)
        yield start_up
    if ready is None:
        return
    paused, committed = states.get("committing"), states.get("probation")
    failed = next((states[each] for each in ("aborting", "reverting", "failed", "rolled back") if each in states), over)
    yield _step("pause: the old process accepts no more", ready, paused or failed, predecessor, is_open=paused is None)
    if paused is None:
        return
    opened = committed or failed
    yield _step("commit, until the new process accepts", paused, opened, successor, is_open=committed is None)
    if committed is None:
        return
    settled = states.get("settled")
    ended = settled or states.get("reverting") or states.get("recalling") or over
    yield _step("probation", committed, ended, successor, is_open=settled is None)
    # An anchor, which has begun a slot, has nothing that drains.
    if settled is not None and handoff.drain:
        drain = _step("drain of the old process", settled, story.drained, predecessor)
        drain.is_open = not math.isfinite(story.drained)
        if drain.is_open:
            drain.seconds = max((each.clock for each in handoff.drain), default=settled) - settled
        yield drain


def _step(name: str, begin: float, end: float, pid: int, *, is_open: bool = False) -> Step:
    seconds = max(0.0, end - begin) if math.isfinite(end) else math.inf
    return Step(name, begin, seconds, pid, is_open=is_open)


def _find_imports(records: list[Record], pid: int) -> list[Step]:
    found = []
    # What this library consists of is nothing that its users could change: it is told as one.
    own_depth = math.inf
    for record in records:
        imports = record.facts.get("imports")
        for each in imports if isinstance(imports, list) else ():
            match each:
                case [str(name), int() | float() as begun, int() | float() as seconds, int(depth)]:
                    if depth > own_depth:
                        continue
                    own_depth = depth if name.startswith("ecdysis_async") else math.inf
                    name = f"{'  ' * depth}import {name}"
                    found.append(Step(name, float(begun), float(seconds), pid, is_import=True))
    return found


def _find_lanes(handoff: _Handoff, story: Story, process: Record | None, spawned: Record | None) -> Iterator[Lane]:
    old = Lane(story.predecessor, f"generation {story.former}", story.former)
    _add(old, "serving", story.begun)
    for record in handoff.predecessor:
        if record.kind is Note.STATE:
            state = record.text("state")
            _add(old, "serving" if state in _ACCEPTING else _MEANINGS.get(state, state), record.clock)
    _end(old, story.drained if math.isfinite(story.drained) else math.inf)
    yield old
    if story.successor is None or spawned is None:
        return
    new = Lane(story.successor, f"generation {story.generation}", story.generation)
    _add(new, "interpreter", spawned.seconds("begun") or spawned.clock)
    if process is not None:
        _add(new, "imports", process.seconds("first") or process.clock)
        _add(new, "starting", process.seconds("hello") or process.clock)
    for record in handoff.successor:
        if record.kind is Note.STATE:
            state = record.text("state")
            _add(new, _SUCCESSOR_MEANINGS.get(state, state), record.clock)
    if story.is_over and story.outcome in ("failed", "rolled back"):
        outcome = next(each for each in handoff.predecessor if each.kind is Note.OUTCOME)
        new.fate = describe_status(outcome.number("status"))
        _end(new, story.ended)
    yield new


def _add(lane: Lane, name: str, at: float) -> None:
    if lane.spans and lane.spans[-1].name == name:
        return
    _end(lane, at)
    lane.spans.append(Span(name, at))


def _end(lane: Lane, at: float) -> None:
    if lane.spans and not math.isfinite(lane.spans[-1].end):
        lane.spans[-1].end = max(at, lane.spans[-1].begin)


def _gather(records: list[Record], stories: list[Story]) -> list[Story]:
    """Put the handoffs of a roll-out into the story of that."""
    roll_outs: dict[str, Story] = {}
    for record in records:
        if record.kind is Note.ROLL_OUT:
            roll_outs[record.restart] = Story(
                record.restart,
                Kind.ROLL_OUT,
                record.number("generation") or 0,
                record.at,
                record.clock,
                predecessor=record.pid,
                state_since=record.clock,
            )
    others: list[Story] = []
    for story in stories:
        # They have the id of the roll-out that they belong to.
        roll_out = roll_outs.get(story.id)
        (others if roll_out is None else roll_out.parts).append(story)
    for record in records:
        roll_out = roll_outs.get(record.restart)
        if roll_out is None or record.clock < roll_out.begun:
            continue
        match record.kind:
            case Note.OUTCOME if record.text("side") == "anchor":
                _note_outcome(roll_out, record)
            case Note.DRAINED if record.text("side") == "anchor":
                roll_out.drained = record.clock
            case Note.STATE if record.text("side") == "anchor":
                roll_out.state, roll_out.state_since = record.text("state"), record.clock
            case Note.SENT if record.text("side") == "anchor":
                receiver = record.number("peer") or 0
                roll_out.arrows.append(Arrow(record.text("message"), record.pid, record.clock, receiver, record.clock))
            case Note.TURN:
                _note_turn(roll_out, record)
    for roll_out in roll_outs.values():
        lanes = [lane for part in roll_out.parts for lane in part.lanes if lane.generation]
        roll_out.lanes = [Lane(roll_out.predecessor, "anchor", 0, [Span("anchor", roll_out.begun)]), *lanes]
        roll_out.arrows = sorted(
            [*roll_out.arrows, *(arrow for part in roll_out.parts for arrow in part.arrows)], key=lambda it: it.sent
        )
    return [*roll_outs.values(), *others]


def _note_turn(roll_out: Story, record: Record) -> None:
    name = f"worker {record.number('slot')}"
    if record.text("state") == "under way":
        roll_out.steps.append(Step(name, record.clock, math.inf, record.number("old") or 0, is_open=True))
    elif record.text("state") in ("served", "failed"):
        for step in roll_out.steps:
            if step.name == name and step.is_open:
                step.seconds, step.is_open = record.clock - step.begin, False
