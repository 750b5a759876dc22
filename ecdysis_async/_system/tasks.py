"""The tasks of a program: where each one stands, and those that nobody waits for.

The latter are lost when the loop of asyncio ends, without a word. On trio there are none: each task has a nursery that
waits for it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .whereabouts import Frame, find_own

if TYPE_CHECKING:
    import asyncio
    from types import FrameType

__all__ = ["LoopTasks", "abandoned_tasks", "all_tasks", "describe_task", "find_frames"]

# How many frames of a task are followed at the most.
_MAX_DEPTH = 500

# Types of what awaits a step of an asynchronous generator.
_STEPS = ("async_generator_asend", "async_generator_athrow", "anext_awaitable")

# Whose tasks are not the application's own: this library, what runs tasks, and servers, which end theirs themselves.
_NOT_ITS_OWN = ("ecdysis_async", "anyio", "asyncio", "uvicorn", "hypercorn", "aiohttp", "websockets")

# What calls back when a task is done that somebody waits for: task groups, `gather`, `wait`, `wait_for`, `shield`. A
# task that awaits another one is called back by a method of C whose name is this, or whose type is called so.
_WAITERS = ("TaskGroup.", "gather.", "_wait.", "wait_for.", "shield.", "as_completed.", "_release_waiter")
_WAKE_UP = ("task_wakeup", "TaskStepMethWrapper", "TaskWakeupMethWrapper")


class LoopTasks:
    """The unfinished tasks of the loop that runs when this is made, for any thread that asks.

    Attributes:
        loop: of asyncio; None where another one runs, or none.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._root: Any = None
        # A service on trio has not loaded asyncio, and shall not for this, nor the other way round.
        asyncio, trio = sys.modules.get("asyncio"), sys.modules.get("trio")
        # Where another loop runs, or none, they say so by an exception.
        if asyncio is not None:
            with contextlib.suppress(RuntimeError):
                self.loop = asyncio.get_running_loop()
        if trio is not None:
            with contextlib.suppress(RuntimeError):
                self._root = trio.lowlevel.current_root_task()

    def list(self, at_most: int) -> list[tuple[str, Any]]:
        """Return the name and the coroutine of each task; none where they change all the time meanwhile."""
        try:
            if self.loop is not None:
                tasks = () if self.loop.is_closed() else sys.modules["asyncio"].all_tasks(self.loop)
                return [(task.get_name(), task.get_coro()) for task in [*tasks][:at_most]]
            found: list[tuple[str, Any]] = []
            pending = [self._root] if self._root is not None else []
            while pending and len(found) < at_most:
                task = pending.pop()
                found.append((task.name, task.coro))
                pending += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        except RuntimeError:
            return []  # a set has changed under the reader's eyes
        return found


def all_tasks() -> list[asyncio.Task[Any]]:
    """Return the unfinished tasks of the running loop of asyncio; none where another one runs."""
    # A service on trio has not loaded asyncio, and shall not for this.
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return []
    try:
        return list(asyncio.all_tasks())
    except RuntimeError:  # no loop of asyncio runs
        return []


def abandoned_tasks(known: Iterable[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """Return the application's own tasks that nobody waits for, in the order of their names.

    Args:
        known: tasks that are left out.
    """
    former = set(known)
    found = [task for task in all_tasks() if task not in former and _is_its_own(task) and not _is_awaited(task)]
    return sorted(found, key=lambda task: (len(task.get_name()), task.get_name()))


def describe_task(coroutine: Any) -> str:
    """Name the application's function that a task runs, and the application's line where it stands.

    Where no function is the application's, both are the task's own.

    Args:
        coroutine: of the task.
    """
    frames = list(find_frames(coroutine))
    if not frames:
        return str(getattr(coroutine, "__qualname__", None) or repr(coroutine))
    own = find_own(frames) or frames[:1]
    (outer, _), (inner, line) = own[0], own[-1]
    within = f", in {inner.co_qualname}" if inner is not outer else ""
    return f"{outer.co_qualname}{within} at {inner.co_filename}:{line}"


def find_frames(coroutine: Any) -> Iterator[Frame]:
    """Yield where a coroutine stands, and where what it awaits stands, from the outside in."""
    for _ in range(_MAX_DEPTH):
        kind, at = _find_frame(coroutine)
        if at is None:
            # `async for` and `async with` await a step of an asynchronous generator, which names it nowhere.
            generator = next((each for each in gc.get_referents(coroutine) if hasattr(each, "ag_frame")), None)
            if generator is None or type(coroutine).__name__ not in _STEPS:
                return
            coroutine = generator
            kind, at = _find_frame(coroutine)
            if at is None:
                return
        yield at.f_code, at.f_lineno
        coroutine = getattr(coroutine, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None)


def _find_frame(coroutine: Any) -> tuple[str, FrameType | None]:
    """Return of which kind a coroutine is, and its frame, which may end at any moment where another thread runs it."""
    for kind in ("cr", "gi", "ag"):
        if (frame := getattr(coroutine, f"{kind}_frame", None)) is not None:
            return kind, frame
    return "", None


def _is_its_own(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    if code is None:
        return True
    directories = (os.path.dirname(getattr(sys.modules.get(name), "__file__", None) or "") for name in _NOT_ITS_OWN)
    return not code.co_filename.startswith(tuple(os.path.join(each, "") for each in directories if each))


def _is_awaited(task: asyncio.Task[Any]) -> bool:
    callbacks: Iterable[tuple[Any, Any]] = getattr(task, "_callbacks", None) or ()  # asyncio's
    return any(
        getattr(callback, "__qualname__", "").startswith(_WAITERS)
        or getattr(callback, "__name__", type(callback).__name__) in _WAKE_UP
        for callback, _ in callbacks
    )
