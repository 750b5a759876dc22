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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from .tasks import LoopTasks, describe_task, find_frames
from .whereabouts import Frame, find_own, leave_loop

if TYPE_CHECKING:
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

# How many tasks are looked at: those of a service with many connections are as many.
SEEN_AT_MOST = 10_000

# The application's task that has begun the service, once it waits for the end of all others.
_WAITS_FOR_OTHERS = "Ecdysis.__aexit__"

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
        self._tasks = LoopTasks()
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
        kept: list[str] = []
        # The process ends in any case, also where a loop that runs on changes what is looked at.
        with contextlib.suppress(Exception):
            kept = find_what_keeps(self._tasks)
        with contextlib.suppress(Exception):
            self._tell(kept)
        _end_children()
        _flush()
        os._exit(self.status)

    def _goes_on(self) -> bool:
        loop = self._tasks.loop
        if self._is_unconditional or not self._has_left or (loop is not None and not loop.is_closed()):
            return False
        return _find_program() is self._program


def _find_program() -> CodeType | None:
    """Return what the main thread began with: no longer the same while the interpreter waits for threads, or exits."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - CPython documents it
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code if frame is not None else None


def find_what_keeps(tasks: LoopTasks) -> list[str]:
    """Say in one line each what keeps this process: threads with where they stand, tasks, child processes.

    The tasks of this library and of servers wait for the application's, and idle threads for work: they are named
    where there is nothing else.

    Args:
        tasks: of the loop that the service runs on.
    """
    frames = sys._current_frames()  # noqa: SLF001 - CPython documents it: no other way to a stack
    main = threading.main_thread()
    threads = [each for each in threading.enumerate() if each is not threading.current_thread()]
    busy = [each for each in threads if each is not main and not each.daemon and not _is_idle(each, frames)]
    if find_own(leave_loop(_extract(main, frames))):
        busy.insert(0, main)
    unfinished = [
        (name, coroutine)
        for name, coroutine in tasks.list(SEEN_AT_MOST)
        if find_own(stack := list(find_frames(coroutine)))
        and not any(code.co_qualname == _WAITS_FOR_OTHERS for code, _ in stack)
    ]
    children = [f"child process {child.name} (pid {child.pid})" for child in _children()]
    if not (busy or unfinished or children):
        busy = [main]
        unfinished = [each for each in tasks.list(SEEN_AT_MOST) if not each[0].startswith("ecdysis_async.")]
    kept = [f"thread {each.name}{_describe_place(_extract(each, frames))}" for each in busy]
    return [*kept, *_describe_tasks(unfinished), *children]


def describe_main_thread() -> str:
    """Say where the main thread stands."""
    frames = sys._current_frames()  # noqa: SLF001 - CPython documents it: no other way to a stack
    return _describe_place(_extract(threading.main_thread(), frames)).strip()


def _describe_tasks(tasks: Iterable[tuple[str, Any]]) -> list[str]:
    places = [(name, describe_task(coroutine)) for name, coroutine in tasks]
    # Requests that hang do so at the same line, and may be hundreds.
    counts = Counter(place for _, place in places)
    names = {place: name for name, place in places}
    lines = [
        f"task {names[place]}: {place}" if count == 1 else f"{count} tasks: {place}"
        for place, count in counts.most_common()
    ]
    more = len(lines) - NAMED_AT_MOST
    return lines if more <= 0 else [*lines[:NAMED_AT_MOST], f"more tasks, at {more} other places"]


def _extract(thread: threading.Thread, frames: Mapping[int, FrameType]) -> list[Frame]:
    """Return the code and the line of each frame of a thread, from the outside in."""
    stack: list[Frame] = []
    frame = frames.get(thread.ident or 0)
    while frame is not None:
        stack.append((frame.f_code, frame.f_lineno or 0))
        frame = frame.f_back
    return stack[::-1]


def _is_idle(thread: threading.Thread, frames: Mapping[int, FrameType]) -> bool:
    """Say whether a thread of an executor, or of anyio, waits for work."""
    frame = frames.get(thread.ident or 0)
    if frame is None:
        return False
    if frame.f_code.co_qualname == "_worker" and frame.f_globals.get("__name__") == "concurrent.futures.thread":
        return True
    if not type(thread).__module__.startswith("anyio."):
        return False
    # It waits in the `get` of its own queue.
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_name != "get":
        caller = caller.f_back
    return caller is not None and caller.f_locals.get("self") is getattr(thread, "queue", thread)


def _describe_place(frames: list[Frame]) -> str:
    """Say where a thread stands: its innermost line that is the application's, or else outside the standard library."""
    if not frames:
        return ""
    library = os.path.dirname(os.__file__)
    others = [frame for frame in frames if not frame[0].co_filename.startswith((library, "<frozen"))]
    code, line = (find_own(leave_loop(frames)) or others or frames)[-1]
    inner = frames[-1][0]
    within = "" if code is inner else f", in {inner.co_name}"
    return f" at {code.co_filename}:{line} ({code.co_name}{within})"


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
