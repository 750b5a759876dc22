"""The last restarts of a service that has ended since, for the page of the one that has begun anew.

A service hands its ledger on to whoever follows it. Where it was killed, or stopped, the file of its history is there.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from ecdysis_async._system.history import FORMER_SUFFIX, SUFFIX, VERSION, Note

from .ledger import RECENT

__all__ = ["read_recent"]


def read_recent(history_path: str) -> list[dict[str, Any]]:
    """Return the last restarts in short, the newest one last, as a ledger has them. It blocks.

    Args:
        history_path: of the file; the one before it is read as well.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (history_path.removesuffix(SUFFIX) + FORMER_SUFFIX, history_path):
        # There was no restart yet, or the file is another user's.
        with contextlib.suppress(OSError), open(path, "rb") as lines:
            for line in lines:
                if (short := _parse(line)) is not None:
                    # Once more, with its drain: it stays in its place.
                    found[short["id"]] = short
    return list(found.values())[-RECENT:]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return what a line tells of a restart in short; None where it tells of something else, or is torn."""
    if b'"short"' not in line:
        return None
    try:
        facts = json.loads(line)
        short = facts["short"]
        is_one = (facts["v"], facts["kind"]) == (VERSION, Note.COUNTED) and isinstance(short["phases"], dict)
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    return {**short, "id": str(short.get("id"))} if is_one else None
