"""What stacks say of an application: the line where it stands, and the way there.

They are those of this process, or the text of another one's (``stacks.py``).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType

__all__ = ["Frame", "find_own", "find_place", "leave_application", "leave_loop"]

# A piece of code, and the line in its file where it stands.
Frame = tuple[CodeType, int]

_OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")

# Where loops run their tasks.
_LOOPS = (
    "asyncio/runners.py",
    "asyncio/base_events.py",
    "/selectors.py",
    "trio/_core/_run.py",
    "trio/_core/_io_epoll.py",
)

# Whose lines are no application's, wherever they are installed: what runs tasks, and servers.
_RUNNERS = ("anyio", "asyncio", "trio", "outcome", "sniffio", "uvloop")
_SERVERS = ("uvicorn", "hypercorn", "aiohttp", "aiosignal", "websockets")

# What stands above the stack of the thread that was asked, and above each task, and each frame, the innermost first.
_THREAD = re.compile(r"^Current thread .*\n", re.MULTILINE)
_TASK = re.compile(r"^Task .*:\n", re.MULTILINE)
# Where packages are that belong to another installation than this interpreter's.
_PACKAGES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")

_FRAME = re.compile(r'^ *File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)


def find_own(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames that are the application's; where it is installed as a package, those of packages.

    Those of Python, of this library, of servers and of what runs tasks are never among them.

    Args:
        frames: from the outside in.
    """
    own = [frame for frame in frames if not _is_librarys(frame[0].co_filename)]
    if own:
        return own
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _RUNNERS + _SERVERS)
    packages = (os.path.join(os.path.dirname(file), "") for file in files if file is not None)
    others = ("<frozen ", _OWN, *packages)
    installed = _find_directories("purelib", "platlib")
    return [
        frame
        for frame in frames
        if (file := frame[0].co_filename).startswith(installed) or _PACKAGES.search(file)
        if not file.startswith(others)
    ]


def leave_loop(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames that are inside of the loop that a thread runs; all of them where it runs none.

    Args:
        frames: of a thread, from the outside in.
    """
    starters = (*_LOOPS, os.path.join(_OWN, "_accepting", "loops.py"))
    ends = [number for number, (code, _) in enumerate(frames, 1) if code.co_filename.endswith(starters)]
    return list(frames[ends[-1] :] if ends else frames)


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
    directories = _find_directories("stdlib", "platstdlib", "purelib", "platlib")
    return file.startswith(("<frozen ", _OWN, *directories)) or _PACKAGES.search(file) is not None


@functools.cache
def _find_directories(*names: str) -> tuple[str, ...]:
    """Return directories of this interpreter's installation. They are asked for by each frame of thousands of tasks."""
    paths = sysconfig.get_paths()
    return tuple(os.path.join(paths[name], "") for name in names)
