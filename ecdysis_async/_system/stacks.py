"""Where a process stands, for another one that asks: the stacks of its threads, and of its tasks.

A signal asks, and the answer goes to a piece of memory that the asking process opens in /proc. The stacks of threads
are written by faulthandler in C, also where the main thread is blocked. The tasks follow once the main thread comes to
another bytecode.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from types import FrameType

from .tasks import LoopTasks, find_frames

__all__ = ["ask_for_stacks", "hear_questions", "stop_hearing"]

NAME = "ecdysis-stacks"

# The signal: a real-time one, which has no meaning of its own and which applications hardly ever use.
_OFFSET = 11
_NUMBER: int | None = signal.SIGRTMIN + _OFFSET if hasattr(signal, "SIGRTMIN") else None

# How long the asking process waits for an answer, and then for more of it, seconds: as long as one that is to answer
# may wait for a processor.
ANSWER_SECONDS = 3.0
MORE_SECONDS = 0.5

# How many tasks, and how many frames of each, are told at the most: the innermost ones, behind all middleware.
MAX_TASKS = 20
MAX_TASKS_SEEN = 200
MAX_FRAMES = 20

_descriptor = -1


def hear_questions() -> None:
    """Answer those who ask where this process stands; nothing is done where that is not possible."""
    global _descriptor
    if _descriptor >= 0 or _NUMBER is None or not _is_main_thread() or not hasattr(os, "memfd_create"):
        return
    if signal.getsignal(_NUMBER) is not signal.SIG_DFL:
        return
    # A few services are ever asked: the module is C, and there already.
    import faulthandler
    import fcntl

    try:
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
    except OSError:
        return
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    signal.signal(_NUMBER, _write_tasks)
    # System calls go on where they were, as with Python's own handlers (PEP 475).
    faulthandler.register(_NUMBER, file=descriptor, all_threads=True, chain=True)
    _descriptor = descriptor


def stop_hearing() -> None:
    """Answer nobody any more; harmless if done already."""
    global _descriptor
    if _descriptor < 0 or _NUMBER is None:
        return
    import faulthandler

    faulthandler.unregister(_NUMBER)
    if _is_main_thread():
        # It is ignored rather than deadly: a question may be on its way.
        signal.signal(_NUMBER, signal.SIG_IGN)
        signal.signal(_NUMBER, signal.SIG_DFL)
    os.close(_descriptor)
    _descriptor = -1


def _is_main_thread() -> bool:
    # Python installs handlers there, and nowhere else.
    return threading.current_thread() is threading.main_thread()


def ask_for_stacks(pid: int) -> str | None:
    """Return where a process stands; None where it does not tell: it is no process of this library, or not ours.

    It blocks for three seconds at the most.
    """
    if _NUMBER is None or (path := _find_memory(pid)) is None or not _is_caught(pid):
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.ftruncate(descriptor, 0)
        os.kill(pid, _NUMBER)
        size, deadline = 0, time.monotonic() + ANSWER_SECONDS
        grown = time.monotonic()
        while time.monotonic() < deadline and not (size and time.monotonic() - grown > MORE_SECONDS):
            time.sleep(0.01)
            if (now := os.fstat(descriptor).st_size) != size:
                size, grown = now, time.monotonic()
        return os.pread(descriptor, size, 0).decode(errors="replace").strip() or None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _find_memory(pid: int) -> str | None:
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(f"/memfd:{NAME}"):
                    return path
    except OSError:
        pass
    return None


def _is_caught(pid: int) -> bool:
    """Say whether a process has a handler: without one, the signal would end it."""
    assert _NUMBER is not None
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            masks = dict(line.split(":", 1) for line in lines)
        return bool(int(masks["SigCgt"], 16) >> (_NUMBER - 1) & 1)
    except (OSError, ValueError, KeyError):
        return False


def _write_tasks(number: int, frame: FrameType | None) -> None:
    """Write where the tasks of the running loop stand."""
    lines: list[str] = []
    told = 0
    with contextlib.suppress(Exception):  # whatever a loop of another release is like, it goes on
        for name, coroutine in LoopTasks().list(MAX_TASKS_SEEN):
            # This library's own tasks wait for others, and nobody for them.
            if name.startswith("ecdysis_async."):
                continue
            frames = deque(find_frames(coroutine), maxlen=MAX_FRAMES)
            if frames and told < MAX_TASKS:
                told += 1
                lines.append(f"\nTask {name}:")
                lines += [f'  File "{code.co_filename}", line {at} in {code.co_name}' for code, at in reversed(frames)]
    if lines and _descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(_descriptor, "\n".join([*lines, ""]).encode(errors="replace"))
