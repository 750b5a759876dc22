"""A process that shall end is ended: whatever its application has left behind, and with a word on what that is.

A thread that is no daemon, a job in an executor, a child process of multiprocessing, a shutdown that blocks: each of
them keeps a Python process alive for ever once its work is done. A thread of our own looks at the clock instead of the
loop, which may be what is blocked.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from .tasks import describe_task

if TYPE_CHECKING:
    import asyncio
    from multiprocessing.process import BaseProcess

__all__ = ["ExitDeadline", "describe_main_thread", "find_what_keeps"]

# How long child processes get from SIGTERM to SIGKILL, and the process itself once they are gone, seconds.
CHILD_SECONDS = 1.0

# How long the last words may take to be written, seconds: standard output may be a pipe that nobody reads.
FLUSH_SECONDS = 0.5

# How often it is looked whether a program goes on with something else once its time is over, seconds.
LOOK_SECONDS = 1.0

# How many threads, tasks and children are named at the most.
NAMED_AT_MOST = 10

# The one that looks whether the program goes on: the last one whose time was over.
_watching: ExitDeadline | None = None


class ExitDeadline:
    """Ends this process by force once its time is over. It has a thread of its own from the first `set` on.

    A program may go on with something else once its service has ended: the rest of a test suite, a window. Such a
    program is left alone, unless its deadline counts unconditionally. It goes on where the block of the service was
    left, the loop that the service ran on is closed, and the main thread still runs the program's own first lines.

    Args:
        tell: is called in that thread, with one line for each thing that has kept the process. It may not block.
        status: the exit status.
    """

    def __init__(self, tell: Callable[[list[str]], None], status: int = 0) -> None:
        self._tell = tell
        self.status = status
        self._deadline = math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_unconditional = False
        self._has_left = False
        self._loop = _find_loop()
        self._program = _find_program()

    def set(self, seconds: float, *, unconditionally: bool = False) -> None:
        """Let this process end in so many seconds, or at an earlier moment that was set before.

        Where no thread can be had (``ulimit -u``) nothing is done: those who follow this process still end it.

        Args:
            seconds: from now on.
            unconditionally: whether it ends also where its program goes on with something else.
        """
        with self._changed:
            self._is_unconditional |= unconditionally
            self._deadline = min(self._deadline, time.monotonic() + seconds)
            self._changed.notify()
        if self._thread is None and self._deadline < math.inf:
            self._thread = threading.Thread(target=self._run, name="ecdysis-exit-deadline", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None

    def note_left(self) -> None:
        """Take note that the block of the service was left."""
        self._has_left = True

    def _run(self) -> None:
        with self._changed:
            while (seconds := self._deadline - time.monotonic()) > 0:
                self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
        global _watching
        _watching = self
        while self._goes_on():
            time.sleep(LOOK_SECONDS)
            # A test suite has many services one after the other, and needs one thread that looks.
            if _watching is not self:
                return
        kept = find_what_keeps(self._loop)
        with contextlib.suppress(Exception):  # the process ends in any case
            self._tell(kept)
        _end_children()
        _flush()
        os._exit(self.status)

    def _goes_on(self) -> bool:
        if self._is_unconditional or not self._has_left or (self._loop is not None and not self._loop.is_closed()):
            return False
        return _find_program() is self._program


def _find_program() -> CodeType | None:
    """Return what the main thread began with: no longer the same while the interpreter waits for threads, or exits."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - CPython documents it
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code if frame is not None else None


def find_what_keeps(loop: asyncio.AbstractEventLoop | None = None) -> list[str]:
    """Say in one line each what keeps this process: threads with where they stand, tasks, child processes."""
    frames = sys._current_frames()  # noqa: SLF001 - CPython documents it: no other way to a stack
    main = threading.main_thread()
    threads = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and (thread is main or not thread.daemon)
    ]
    kept = [f"thread {thread.name}{_describe_place(frames.get(thread.ident or 0))}" for thread in threads]
    tasks = _unfinished_tasks(loop)
    kept += [f"task {task.get_name()}: {describe_task(task)}" for task in tasks[:NAMED_AT_MOST]]
    if len(tasks) > NAMED_AT_MOST:
        kept.append(f"{len(tasks) - NAMED_AT_MOST} more tasks")
    kept += [f"child process {child.name} (pid {child.pid})" for child in _children()]
    return kept


def describe_main_thread() -> str:
    """Say where the main thread stands."""
    frames = sys._current_frames()  # noqa: SLF001 - CPython documents it: no other way to a stack
    return _describe_place(frames.get(threading.main_thread().ident or 0)).strip()


def _describe_place(frame: FrameType | None) -> str:
    """Say where a thread stands: its innermost line outside the standard library, or else its innermost line."""
    if frame is None:
        return ""
    stack = traceback.extract_stack(frame)
    library = os.path.dirname(os.__file__)
    own = [each for each in stack if not each.filename.startswith((library, "<frozen"))]
    place = (own or stack)[-1]
    innermost = "" if place is stack[-1] else f", in {stack[-1].name}"
    return f" at {place.filename}:{place.lineno} ({place.name}{innermost})"


def _find_loop() -> asyncio.AbstractEventLoop | None:
    # A service on trio has not loaded asyncio, and shall not for this.
    module = sys.modules.get("asyncio")
    if module is None:
        return None
    try:
        loop: asyncio.AbstractEventLoop = module.get_running_loop()
    except RuntimeError:
        return None
    return loop


def _unfinished_tasks(loop: asyncio.AbstractEventLoop | None) -> list[asyncio.Task[Any]]:
    if loop is None or loop.is_closed():
        return []
    try:
        return [task for task in sys.modules["asyncio"].all_tasks(loop) if not task.done()]
    except RuntimeError:
        return []  # the set has changed under the reader's eyes, time and again


def _children() -> Iterable[BaseProcess]:
    # Loaded only where the application has made children with it.
    multiprocessing = sys.modules.get("multiprocessing")
    return multiprocessing.active_children() if multiprocessing is not None else ()


def _end_children() -> None:
    """Ask the children of multiprocessing to end, then kill them; without a parent they would live on."""
    with contextlib.suppress(Exception):
        for child in _children():
            child.terminate()
        deadline = time.monotonic() + CHILD_SECONDS
        while list(_children()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for child in _children():
            child.kill()


def _flush() -> None:
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    with contextlib.suppress(RuntimeError):
        thread.start()
        thread.join(FLUSH_SECONDS)
