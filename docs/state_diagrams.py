"""Draws the two state machines of the handoff from their own tables.

``python docs/state_diagrams.py`` writes them anew. The diagrams stand in architecture.md as Mermaid, between two
markers; a test holds them against the tables.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ecdysis_async._handoff.protocol import (
    FromPredecessor,
    FromSuccessor,
    PredecessorEvent,
    PredecessorState,
    SuccessorEvent,
    SuccessorState,
    step_predecessor,
    step_successor,
)

PAGE = Path(__file__).with_name("architecture.md")

_MESSAGES = {message.value for message in (*FromSuccessor, *FromPredecessor)}

Step = Callable[..., tuple[enum.Enum, tuple[enum.Enum, ...]]]


def draw(states: type[enum.Enum], events: type[enum.Enum], step: Step) -> str:
    """Draw one machine: an arrow for each pair of states, with the events that lead from one to the other.

    A message that nobody expects is handled as a broken channel. Such a message has no label of its own, which keeps
    the picture readable.
    """
    lines = ["stateDiagram-v2"]
    lines += [f'    {state.name}: "{state.value}"' for state in states]
    lines += [f"    [*] --> {next(iter(states)).name}"]
    for source in states:
        targets: dict[enum.Enum, list[str]] = {}
        for target, label in _arrows(source, events, step):
            targets.setdefault(target, []).append(label)
        lines += [f"    {source.name} --> {target.name}: {', '.join(labels)}" for target, labels in targets.items()]
        if not targets:
            lines.append(f"    {source.name} --> [*]")
    return "\n".join(lines)


def _arrows(source: enum.Enum, events: type[enum.Enum], step: Step) -> Iterator[tuple[enum.Enum, str]]:
    broken = events["BROKEN"]
    as_broken = step(source, broken)
    for event in events:
        target, actions = step(source, event)
        if target is source:
            continue
        if event.value in _MESSAGES and event.name != "FAILED" and (target, actions) == as_broken:
            continue
        yield target, event.value


def make_diagrams() -> dict[str, str]:
    """Draw both machines, by the name that their markers have in the page."""
    return {
        "predecessor": draw(PredecessorState, PredecessorEvent, step_predecessor),
        "successor": draw(SuccessorState, SuccessorEvent, step_successor),
    }


def put_into(page: str) -> str:
    """Return the page with its diagrams replaced by current ones.

    Raises:
        ValueError: the page has no place for a diagram.
    """
    for name, diagram in make_diagrams().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, text=diagram: f"{found[1]}```mermaid\n{text}\n```\n{found[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{PAGE.name} needs exactly one pair of markers for the diagram of the {name}")
    return page


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text()))
