"""What happens in restarts, written down as it happens: a small file that is there when every process has died.

Each process of a service appends lines of JSON to one file beside the control socket. Times are CLOCK_MONOTONIC, which
all processes of a machine share. The file is begun anew at a size, and the one before it is kept. `ecdysis explain`
reads both.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import errno
import json
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from .shortages import REMEDIES

__all__ = ["FORMER_SUFFIX", "SUFFIX", "VERSION", "History", "Note", "history"]

VERSION = 1
"""Of the form of a line. What is added leaves it as it is, because readers skip what they do not know."""

# What the file is called, behind the path of the control socket; and the one before it.
SUFFIX = ".history"
FORMER_SUFFIX = ".history.1"

# How large a file may grow before the next one begins, bytes: a restart of eight workers takes some 60 kB.
MAX_BYTES = 512 * 1024

# How many lines wait for the thread that writes them at the most, where the disk hangs.
MAX_WAITING = 2000

# The longest text in a line, characters: its end is kept, as the last lines of a traceback tell most.
MAX_TEXT = 6000

# How long the end of a process waits for its last lines to be written, seconds.
FLUSH_SECONDS = 0.5

# Nothing is followed, and nothing waits for a reader, where somebody has put something else in the file's place.
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK

# What can be done about an error.
_NO_PERMISSION: Final = (
    "let the user whom the service becomes own the directory of the control socket, such as by RuntimeDirectory= and "
    "User= of the unit, or choose one of that user's by --control"
)
_REMEDIES: Final = {
    **REMEDIES,
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "choose a directory that can be written by --control",
}


class Note(enum.StrEnum):
    """What a line tells of. Each line has ``v``, ``at`` (epoch), ``clock`` (CLOCK_MONOTONIC), ``pid`` and ``kind``."""

    BEGUN = "begun"  # a process of the service begins: its role
    ENDED = "ended"  # the same process ends as it should
    HANDOFF = "handoff"  # a predecessor begins a handoff: restart, generation, title
    SPAWNED = "spawned"  # it has started the successor: restart, child, begun (before the exec)
    PROCESS = "process"  # the successor: restart, generation, first (its first line here), imports
    IMPORTS = "imports"  # what it has imported since, until it was ready: restart, imports
    STEP = "step"  # something in a process' start-up has ended: what, begun
    STATE = "state"  # a side of the handoff is in another state: restart, side, state
    SENT = "sent"  # a message was sent: restart, message, peer
    GOT = "got"  # a message has come: restart, message, peer
    OUTCOME = "outcome"  # what became of a restart: restart, report, phase, stderr
    COUNTED = "counted"  # what the service remembers of a restart in short, the last time all of it: short
    DRAIN = "drain"  # a drain begins: restart, connections, seconds (until its deadline)
    WAITS = "waits"  # whom the drain waits for: restart, connections, requests
    DRAINED = "drained"  # the drain is over: restart, report
    ROLL_OUT = "roll-out"  # an anchor begins a restart of its workers: restart, generation, workers
    TURN = "turn"  # a slot of a roll-out is in another state: restart, slot, state, old
    WORKER = "worker"  # a worker was started: slot, child, generation
    DIED = "died"  # a worker has ended: slot, child, status


Observer = Callable[[Note, float, float, dict[str, Any]], None]
"""Is told a kind, the time since the epoch and by CLOCK_MONOTONIC, and the facts."""


class History:
    """The history of this process: nothing is written before it is opened, and nothing while nothing happens.

    A line is written by a thread, which is there only while lines wait. Whatever goes wrong with the file, the service
    does not hear of it. A service that starts and stops, and is never restarted, leaves no file behind: its lines are
    kept until :meth:`write_from_now_on`.

    Attributes:
        observers: are called with what is noted, in the moment and the context in which it is noted; they never raise.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._path: str | None = None
        self._owner = -1
        self._is_kept = True
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._has_told = False

    @property
    def path(self) -> str | None:
        """Where it is written; None where it is not."""
        return self._path

    def open(self, path: str) -> None:
        """Write to this file from now on."""
        if self._path is None:
            atexit.register(self.flush)
        self._path, self._owner, self._has_told = path, os.getpid(), False

    def write_from_now_on(self) -> None:
        """Write what was kept, and what comes: something happens that somebody may want explained."""
        with self._lock:
            self._is_kept = False
            if self._waiting:
                self._begin_writing()

    def close(self) -> None:
        """Write what waits, and nothing any more. It may take ``FLUSH_SECONDS``; harmless if done already."""
        self.flush()
        self._path, self._is_kept = None, True
        self._waiting.clear()
        atexit.unregister(self.flush)

    def note(self, kind: Note, **facts: Any) -> None:
        """Take note of something. It neither blocks nor raises, and may be called in any thread."""
        if self._path is None and not self.observers:
            return
        at, clock = time.time(), time.monotonic()
        for observe in self.observers:
            observe(kind, at, clock, facts)
        # A forked child of the application has the object as well, and is no process of the service.
        if self._path is None or os.getpid() != self._owner:
            return
        line = {"v": VERSION, "at": at, "clock": clock, "pid": os.getpid(), "kind": kind.value}
        data = json.dumps(_shortened(line | facts), separators=(",", ":"), default=str).encode() + b"\n"
        with self._lock:
            self._waiting.append(data)
            if not self._is_kept:
                self._begin_writing()

    def flush(self) -> None:
        """Wait until everything is written, for ``FLUSH_SECONDS`` at the most."""
        writer = self._writer
        if writer is not None and writer.is_alive() and writer is not threading.current_thread():
            writer.join(FLUSH_SECONDS)

    def _begin_writing(self) -> None:
        # A forked child has the object, and not the thread.
        if self._writer is None or not self._writer.is_alive():
            self._writer = threading.Thread(target=self._write, name="ecdysis-history", daemon=True)
            # No thread is to be had: the next line tries again.
            with contextlib.suppress(RuntimeError):
                self._writer.start()

    def _write(self) -> None:
        while True:
            with self._lock:
                data = b"".join(self._waiting)
                self._waiting.clear()
                path = self._path
                if not data or path is None:
                    self._writer = None
                    return
            # The service goes on, and is not explained.
            try:
                append(path, data)
            except OSError as error:
                self._tell(path, error)

    def _tell(self, path: str, error: OSError) -> None:
        """Say once that nothing can be written, where somebody can do something about it."""
        # A directory that is gone is one of a service that has ended.
        if self._has_told or error.errno not in _REMEDIES:
            return
        self._has_told = True
        logging.getLogger("ecdysis_async").warning(
            "what happens in restarts cannot be written to %s, and `ecdysis explain` will lack it: %s (user %d): %s",
            path,
            error.strerror,
            os.geteuid(),
            _REMEDIES[error.errno],
        )


def append(path: str, data: bytes) -> None:
    """Append to a file in one piece, among other processes that do so; begin it anew where it is full.

    Raises:
        OSError: that is not possible.
    """
    descriptor = os.open(path, _FLAGS, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "something else is in the place of the history", path)
        if found.st_size >= MAX_BYTES and _has_set_aside(descriptor, path):
            os.close(descriptor)
            descriptor = os.open(path, _FLAGS, 0o600)
        # O_APPEND: the kernel lets the writes of several processes follow each other (write(2)). A writer that was
        # killed may have left half a line, which costs that line alone.
        os.write(descriptor, data if os.fstat(descriptor).st_size == 0 else b"\n" + data)
    finally:
        os.close(descriptor)


def _has_set_aside(descriptor: int, path: str) -> bool:
    """Rename a file that is full, unless another process does so just now."""
    # Imported here, because there are platforms without it, on which nobody has a control socket.
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
        os.replace(path, path.removesuffix(SUFFIX) + FORMER_SUFFIX)
    return True


def _shortened(value: Any) -> Any:
    match value:
        case str():
            return value if len(value) <= MAX_TEXT else f"… {value[-MAX_TEXT:]}"
        case Mapping():
            return {str(key): _shortened(each) for key, each in value.items()}
        case list() | tuple():
            return [_shortened(each) for each in value]
    return value


history = History()
"""Of this process."""
