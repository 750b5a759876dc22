"""Tracebacks for people who know their own program, and neither this library nor what runs it."""

from __future__ import annotations

import itertools
import os
import sys
import traceback

__all__ = ["describe_failure"]

# What stands above the application's first line: this library, what runs tasks, what imports and runs modules.
_RUNNERS = ("ecdysis_async", "anyio", "asyncio", "concurrent.futures", "trio", "outcome", "importlib")
_SERVERS = ("uvicorn", "hypercorn", "aiohttp", "aiosignal", "websockets")
_FROZEN = ("<frozen importlib", "<frozen runpy")


def describe_failure(error: BaseException) -> str:
    """Return an exception with its traceback from the application's first line on, and whatever led to it likewise.

    Where no line is the application's, all of them stay.
    """
    runners = _FROZEN + tuple(
        os.path.join(os.path.dirname(file), "")
        for name in _RUNNERS + _SERVERS
        if (file := getattr(sys.modules.get(name), "__file__", None)) is not None
    )
    described = traceback.TracebackException.from_exception(error)
    pending = [described]
    while pending:
        each = pending.pop()
        frames = list(itertools.dropwhile(lambda frame: frame.filename.startswith(runners), each.stack))
        # A syntax error has its place in what it says of itself, and no line of the application's above.
        if frames or hasattr(each, "offset"):
            each.stack = traceback.StackSummary.from_list(frames)
        # A tree: traceback itself leaves out what it has described before.
        pending += (other for other in (each.__cause__, each.__context__, *(each.exceptions or ())) if other)
    return "".join(described.format()).rstrip("\n")
