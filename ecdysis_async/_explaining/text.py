"""A story in lines, for a terminal or a file: what came of it first, then why, then where the time went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from .now import Wait
from .story import Kind, Lane, Step, Story

__all__ = ["describe", "describe_briefly", "describe_now", "format_seconds"]

WIDTH = 56

# How a process is drawn while it does something.
_STROKES = {
    "serving": "█",
    "anchor": "─",
    "paused": "▒",
    "draining": "░",
    "waiting": "▄",
    "starting": "▃",
    "imports": "▂",
    "interpreter": "▁",
    "leaving": "░",
}

# What a module imports that a module imports is told from then on, seconds.
LONG_IMPORT_SECONDS = 0.1

# How many messages, modules and requests are told at the most.
MAX_MESSAGES = 40
MAX_PARTS = 12
MAX_LINES_OF_STDERR = 25

# What a terminal is told for each (ECMA-48, SGR).
_CODES = {"red": "31", "green": "32", "yellow": "33"}

_COLOURS = {"settled": "green", "serving": "green", "in progress": "yellow", "stopped": "yellow"}


def _style(text: str, *, fg: str | None = None, bold: bool = False, dim: bool = False) -> str:
    """Colour a text; who prints it leaves that out where no terminal shows it."""
    codes = [
        code for code, is_wanted in (("1", bold), ("2", dim), (_CODES.get(fg or "", ""), fg is not None)) if is_wanted
    ]
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def format_seconds(seconds: float) -> str:
    """Write a duration as people read it."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.1:  # noqa: PLR2004 - milliseconds are easier to read
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else f"{seconds / 60:.0f} min {seconds % 60:.0f} s"  # noqa: PLR2004


def describe_briefly(story: Story) -> str:
    """Say in one line what came of a restart."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.at))
    outcome = _style(f"{story.outcome:<11}", fg=_COLOURS.get(story.outcome, "red"))
    line = f"{story.id}  {when}  {_name(story):<24} {outcome} {format_seconds(_duration(story)):>9}"
    return f"{line}  {_first_line(story.why)}" if story.why else line


def describe(story: Story) -> Iterator[str]:
    """Tell the story in lines."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.at))
    outcome = _style(story.outcome, fg=_COLOURS.get(story.outcome, "red"), bold=True)
    yield f"restart {_style(story.id, bold=True)} ({_name(story)}): {outcome}"
    took = "it took" if story.is_over else "it goes on for" if math.isfinite(story.now) else "its end is unknown after"
    yield f"  begun {when}, asked of pid {story.predecessor}; {took} {format_seconds(_duration(story))}"
    yield from _describe_failure(story)
    yield from _describe_lost(story)
    yield ""
    yield from _draw_lanes(story)
    for part in story.parts or [story]:
        yield ""
        where = f" of worker {part.slot}" if part.slot is not None else ""
        yield _style(f"  where the time went{where} (pid {part.predecessor} → {part.successor}):", bold=True)
        longest = max((step.seconds for step in part.steps if math.isfinite(step.seconds)), default=0.0)
        for step in part.steps:
            yield from _describe_step(step, longest)
        if (gap := part.report.get("accept_gap")) is not None:
            yield f"    {'accept gap: clients waited in the queue':<58} {format_seconds(float(gap)):>10}"
        yield from _describe_waits(part)
    yield ""
    yield from _describe_messages(story)


def describe_now(waits: Sequence[Wait]) -> Iterator[str]:
    """Say who waits for whom at this moment, and where those stand that are waited for."""
    for wait in waits:
        yield _style(wait.text, fg="yellow", bold=True)
        for line in wait.details:
            yield f"  {line}"
        if wait.stack:
            yield f"  where pid {wait.pid} stands:"
            yield from (f"    {line}" for line in wait.stack.splitlines())
        elif wait.is_asked:
            yield f"  pid {wait.pid} does not tell where it stands"
        if wait.is_asked:
            yield f"  next step, for what stands below Python as well: py-spy dump --native --pid {wait.pid}"
        yield ""


def _name(story: Story) -> str:
    match story.kind:
        case Kind.ROLL_OUT:
            count = len(story.parts)
            return f"generation {story.generation}, {count} {'worker' if count == 1 else 'workers'}"
        case Kind.START:
            return f"start of worker {story.slot}"
    return f"generation {story.former} → {story.generation}"


def _duration(story: Story) -> float:
    return (story.ended if story.is_over else story.end) - story.begun


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _describe_failure(story: Story) -> Iterator[str]:
    if story.why:
        first, *rest = story.why.rstrip().splitlines()
        phase = f" in the phase {story.phase!r}" if story.phase else ""
        yield f"  {_style(f'why it failed{phase}:', fg='red', bold=True)} {first}"
        yield from (f"    {line}" for line in rest)
    if story.stderr:
        lines = story.stderr.rstrip().splitlines()[-MAX_LINES_OF_STDERR:]
        yield _style("  the last lines that the new process wrote to stderr:", bold=True)
        yield from (f"    | {line}" for line in lines)
    if not story.is_over:
        current = next((part for part in story.parts if not part.is_over), story)
        until = f", for {format_seconds(story.now - current.state_since)} now" if math.isfinite(story.now) else ""
        yield f"  it stands at {current.state!r}{until}"


def _describe_lost(story: Story) -> Iterator[str]:
    lost = [each for part in story.parts or [story] for each in part.lost]
    if lost:
        yield _style("  lost:", fg="red", bold=True)
        yield from (f"    {each}" for each in lost)
    elif story.is_over:
        yield "  lost: nothing"
    remarks = dict.fromkeys(each for part in story.walk() for each in part.remarks)
    yield from (f"  {each}" for each in remarks)


def _draw_lanes(story: Story) -> Iterator[str]:
    """Draw each process as a bar over the time of the story."""
    lanes = _distinct(story.lanes)
    begin, end = story.begun, max(story.end, story.begun + 1e-6)
    scale = WIDTH / (end - begin)
    for lane in lanes:
        cells = [" "] * WIDTH
        for span in lane.spans:
            left = max(0, int((span.begin - begin) * scale))
            right = WIDTH if not math.isfinite(span.end) else min(WIDTH, math.ceil((span.end - begin) * scale))
            for cell in range(min(left, WIDTH - 1), max(right, min(left, WIDTH - 1) + 1)):
                cells[cell] = _STROKES.get(span.name, "?")
        fate = f"  {lane.fate}" if lane.fate else ""
        yield f"  pid {lane.pid:<8} {lane.name:<14} {''.join(cells)}{fate}"
    names = list(dict.fromkeys(span.name for lane in lanes for span in lane.spans))
    legend = " ".join(f"{_STROKES.get(name, '?')} {name}" for name in names)
    yield f"  {'':<27} {legend}"
    yield f"  {'':<27} from 0 to {format_seconds(end - begin)}"


def _distinct(lanes: Sequence[Lane]) -> list[Lane]:
    """Leave out what several parts tell of the same process."""
    found: dict[int, Lane] = {}
    for lane in lanes:
        if lane.pid not in found:
            found[lane.pid] = lane
    return list(found.values())


def _describe_step(step: Step, longest: float) -> Iterator[str]:
    bar = "■" * round(20 * step.seconds / longest) if longest and math.isfinite(step.seconds) else ""
    note = _style("  and no further", fg="yellow") if step.is_open else ""
    yield f"    {step.name:<58} {format_seconds(step.seconds):>10}  {bar}{note}"
    told = [part for part in step.parts if not part.is_import or _is_worth(part)]
    parts = sorted(told, key=lambda part: (part.is_import, -part.seconds))[:MAX_PARTS]
    for part in sorted(parts, key=lambda part: part.begin):
        yield _style(f"      {part.name:<56} {format_seconds(part.seconds):>10}", dim=True)
    if len(step.parts) > len(parts):
        yield _style(f"      and {len(step.parts) - len(parts)} shorter ones (--json has all)", dim=True)


def _is_worth(part: Step) -> bool:
    """Say whether an import is told in a text: what a module imports itself only where that takes long."""
    return not part.name.startswith(" ") or part.seconds >= LONG_IMPORT_SECONDS


def _describe_waits(story: Story) -> Iterator[str]:
    if not story.waits:
        return
    settled = story.waits[0][0] if not math.isfinite(story.ended) else story.ended
    yield "    the drain has waited for:"
    for at, connections, requests in story.waits:
        named = "; ".join(requests) or "connections without a request"
        more = f" (of {connections} connections)" if connections > len(requests) else ""
        yield f"      after {format_seconds(at - settled):>8}: {named}{more}"


def _describe_messages(story: Story) -> Iterator[str]:
    if not story.arrows:
        return
    yield _style("  messages:", bold=True)
    for arrow in story.arrows[:MAX_MESSAGES]:
        travelled = arrow.got - arrow.sent
        late = f"  read after {format_seconds(travelled)}" if travelled >= 0.001 else ""  # noqa: PLR2004 - a millisecond
        yield f"    {arrow.sent - story.begun:>9.3f} s  {arrow.sender} → {arrow.receiver}  {arrow.message}{late}"
    if len(story.arrows) > MAX_MESSAGES:
        yield f"    and {len(story.arrows) - MAX_MESSAGES} more (--json has all)"
