"""Short functions that may block, run beside the loop, in a place that the application cannot have taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

__all__ = ["run_in_thread"]

T = TypeVar("T")


async def run_in_thread(function: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """Run a function in a thread; on the loop itself where no thread can be had (``ulimit -u``, TasksMax=).

    Cancellation waits for the function, unless it is to be abandoned.
    """
    begun = False

    def run() -> T:
        nonlocal begun
        begun = True
        return function()

    try:
        # A limiter of its own: anyio's default one has 40 places, and an application may be using all of them.
        return await anyio.to_thread.run_sync(
            run, abandon_on_cancel=abandon_on_cancel, limiter=anyio.CapacityLimiter(1)
        )
    except RuntimeError:  # can't start new thread
        if begun:
            raise
        return function()
