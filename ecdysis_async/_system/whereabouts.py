"""What the stacks of a process (``stacks.py``) say of its application: the line where it stands, and the way there."""

from __future__ import annotations

import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator

__all__ = ["find_place", "leave_application"]

_OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")

# Where loops run their tasks.
_LOOPS = (
    "asyncio/runners.py",
    "asyncio/base_events.py",
    "/selectors.py",
    "trio/_core/_run.py",
    "trio/_core/_io_epoll.py",
)

# What stands above the stack of the thread that was asked, and above each task, and each frame, the innermost first.
_THREAD = re.compile(r"^Current thread .*\n", re.MULTILINE)
_TASK = re.compile(r"^Task .*:\n", re.MULTILINE)
_FRAME = re.compile(r'^ *File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)


def find_place(stacks: str) -> str | None:
    """Return the application's innermost line; where none is its own, the innermost one of all; None for none.

    Args:
        stacks: of the process.
    """
    thread, tasks = _split(stacks)
    stack = list(_FRAME.finditer(thread))
    candidates = (frame for frame in (*_above_loop(stack), *_FRAME.finditer(tasks)) if not _is_librarys(frame["file"]))
    frame = next(candidates, stack[0] if stack else None)
    return f"{frame['file']}:{frame['line']} ({frame['name']})" if frame is not None else None


def leave_application(stacks: str) -> str:
    """Return the stack of the main thread and the tasks, without the frames of what runs the application.

    Args:
        stacks: of the process.
    """
    thread, tasks = _split(stacks)
    above = "\n".join(frame[0] for frame in _above_loop(_FRAME.finditer(thread)))
    parts = [("Main thread (most recent call first):", above)]
    heads = list(_TASK.finditer(tasks))
    ends = (*(head.start() for head in heads[1:]), len(tasks))
    parts += [(head[0].strip(), tasks[head.end() : end]) for head, end in zip(heads, ends, strict=False)]
    lines: list[str] = []
    for head, part in parts:
        frames = [frame[0] for frame in _FRAME.finditer(part) if not frame["file"].startswith(("<frozen ", _OWN))]
        lines += [head, *frames] if frames else []
    return "\n".join(lines)


def _above_loop(stack: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
    """Return the frames above the loop. Below it is what has started it, which stands there all the time."""
    return itertools.takewhile(lambda frame: not frame["file"].endswith(_LOOPS), stack)


def _split(stacks: str) -> tuple[str, str]:
    """Return the stack of the thread that was asked, and the tasks."""
    begun = _THREAD.search(stacks)
    rest = stacks[begun.end() :] if begun is not None else ""
    thread = re.split(r"^(?:Thread |Task )", rest, maxsplit=1, flags=re.MULTILINE)[0]
    first = _TASK.search(stacks)
    return thread, stacks[first.start() :] if first is not None else ""


def _is_librarys(file: str) -> bool:
    """Say whether a file belongs to Python, or to an installed package, and not to the application."""
    paths = sysconfig.get_paths()
    directories = (os.path.join(paths[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.startswith(("<frozen ", _OWN, *directories))
