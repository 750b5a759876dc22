"""Log lines for a stream whose reader may hang (a stuck ``| logger``): the process does not wait for it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import threading
from collections import deque
from typing import TextIO

__all__ = ["PatientHandler"]

# How many lines wait for a reader; those beyond it are lost, and counted.
MAX_LINES = 10_000

# How long the end of the process waits for a reader, seconds.
CLOSE_SECONDS = 1.0


class PatientHandler(logging.StreamHandler[TextIO]):
    """Writes log lines at once where that cannot block; else a thread writes them as soon as somebody reads.

    The thread exists only as long as lines wait. What is beyond ``MAX_LINES`` is lost, and the log says how much.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: deque[str] = deque()
        self._lost = 0
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or let it wait."""
        try:
            line = self.format(record) + self.terminator
        except Exception:  # noqa: BLE001 - as every handler: a record that cannot be formatted ends nothing
            self.handleError(record)
            return
        if not self._lines and not self._is_writing() and _takes(self.stream, line):
            super().emit(record)
            return
        if len(self._lines) < MAX_LINES:
            self._lines.append(line)
        else:
            self._lost += 1
        if not self._is_writing():
            self._writer = threading.Thread(target=self._write, name="ecdysis log", daemon=True)
            # No thread is to be had: the next line tries again.
            with contextlib.suppress(RuntimeError):
                self._writer.start()

    def close(self) -> None:
        """Give a reader a moment to take what waits."""
        if self._is_writing() and self._writer is not None:
            self._writer.join(CLOSE_SECONDS)
        super().close()

    def _is_writing(self) -> bool:
        # A forked child has the object, and not the thread.
        return self._writer is not None and self._writer.is_alive()

    def _write(self) -> None:
        while True:
            with self.lock or contextlib.nullcontext():
                if self._lines:
                    line = self._lines[0]
                elif self._lost:
                    line = f"{self._lost} log lines were lost: nobody has read this log for a while\n"
                    self._lost = 0
                else:
                    self._writer = None
                    return
            # Past the stream, whose lock others would wait for. One that is closed, or whose reader has gone, loses it.
            with contextlib.suppress(OSError, ValueError):
                view = memoryview(line.encode(errors="backslashreplace"))
                while view:
                    view = view[os.write(self.stream.fileno(), view) :]
            with self.lock or contextlib.nullcontext():
                if self._lines and self._lines[0] is line:
                    self._lines.popleft()


def _takes(stream: TextIO, line: str) -> bool:
    """Say whether a line can be written without waiting: there is room for it in a pipe, or the stream is a file."""
    try:
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return True
        # A pipe that takes anything takes as much as this (pipe(7)).
        if len(line.encode(errors="backslashreplace")) > select.PIPE_BUF:
            return False
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    # It has no descriptor, or there is no poll: what is written there waits for nobody.
    except (AttributeError, OSError, ValueError):
        return True
