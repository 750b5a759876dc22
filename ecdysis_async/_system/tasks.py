"""The asyncio tasks of a program that nobody waits for: they are lost when its loop ends, without a word.

On trio there are none: each task has a nursery that waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

__all__ = ["abandoned_tasks", "all_tasks", "describe_task"]

# Whose tasks are not the application's own: this library, what runs tasks, and servers, which end theirs themselves.
_NOT_ITS_OWN = ("ecdysis_async", "anyio", "asyncio", "uvicorn", "hypercorn", "aiohttp", "websockets")

# What calls back when a task is done that somebody waits for: task groups, `gather`, `wait`, `wait_for`, `shield`. A
# task that awaits another one is called back by a method of C whose name is this, or whose type is called so.
_WAITERS = ("TaskGroup.", "gather.", "_wait.", "wait_for.", "shield.", "as_completed.", "_release_waiter")
_WAKE_UP = ("task_wakeup", "TaskStepMethWrapper", "TaskWakeupMethWrapper")


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


def describe_task(task: asyncio.Task[Any]) -> str:
    """Name the function that a task runs, and the line where it stands."""
    frames = task.get_stack(limit=1)
    name = getattr(task.get_coro(), "__qualname__", repr(task.get_coro()))
    return f"{name} at {frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else name


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
