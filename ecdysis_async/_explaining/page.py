"""Stories as JSON, and as a page: one file that needs nothing else, with a lane for each process.

The page (page.html) draws itself from the JSON that stands in it; here that JSON is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ecdysis_async._system.pages import fill

from .now import Wait
from .story import Story

__all__ = ["describe", "write"]

TEMPLATE = Path(__file__).with_name("page.html")


def write(stories: Sequence[Story], waits: Iterable[Wait], subject: str) -> str:
    """Return the page.

    Args:
        stories: what it tells.
        waits: what the service waits for at this moment.
        subject: which service it is.
    """
    return fill(TEMPLATE, f"ecdysis explain: {subject}", describe(stories, waits, subject))


def describe(stories: Iterable[Story], waits: Iterable[Wait], subject: str) -> dict[str, Any]:
    """Return everything as an object of JSON; times are CLOCK_MONOTONIC, and what has not ended has null there."""
    found: dict[str, Any] = _finite(
        {
            "service": subject,
            "waits": [wait.to_json() for wait in waits],
            "restarts": [_describe(story) for story in stories],
        }
    )
    return found


def _describe(story: Story) -> dict[str, Any]:
    fields = {name.name: getattr(story, name.name) for name in dataclasses.fields(story) if name.name != "parts"}
    fields["lanes"] = [dataclasses.asdict(lane) for lane in story.lanes]
    fields["arrows"] = [dataclasses.asdict(arrow) for arrow in story.arrows]
    fields["steps"] = [dataclasses.asdict(step) for step in story.steps]
    fields["waits"] = [
        {"after": at - story.begun, "connections": count, "requests": requests} for at, count, requests in story.waits
    ]
    parts = [_describe(part) for part in story.parts]
    return {**fields, "kind": story.kind.value, "end": story.end, "lost": story.lost, "parts": parts}


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value
