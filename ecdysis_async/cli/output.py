"""What a command leaves to its caller: an exit code, and what it writes.

Who reads standard output may leave, and it may be closed, without any effect on what is done.
"""

from __future__ import annotations

import enum
import io
import os
import sys
from typing import TextIO

from ecdysis_async._system.descriptors import occupy_standard_descriptors

__all__ = ["Exit", "has_reader", "let_readers_leave"]


class Exit(enum.IntEnum):
    """The exit codes of the command: a contract."""

    DONE = 0  # the new generation serves
    FAILED = 1  # it failed, and the old one serves
    USAGE = 2
    NO_SERVICE = 3  # or none that serves
    IN_PROGRESS = 4  # another restart is
    ROLLED_BACK = 5
    UNKNOWN = 6  # what became of it
    PERMISSION = 7  # you may not
    INTERRUPTED = 130  # 128 + SIGINT, as shells count it


class Output(io.TextIOWrapper):
    """Writes for as long as somebody reads; what comes afterwards goes nowhere.

    The exit status of a command tells what became of the service. A reader like ``head -1`` has no part in that.
    """

    has_reader = True

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        """Put /dev/null in its place: the pipe has no reader, the terminal is gone, or the disk is full.

        What is still buffered can be written there, and so the interpreter finds nothing to complain of at its end.
        """
        self.has_reader = False
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, self.fileno())
        os.close(null)


def let_readers_leave() -> None:
    """Make standard output, and standard error, of this process such that writing never fails."""
    if isinstance(sys.stdout, Output):
        return
    # Where they were closed, the next descriptor that is opened would take their place.
    occupy_standard_descriptors()
    sys.stdout, sys.stderr = _wrap(sys.stdout, 1), _wrap(sys.stderr, 2)


def has_reader() -> bool:
    """Say whether somebody may still read what is written to standard output."""
    return getattr(sys.stdout, "has_reader", True)


def _wrap(stream: TextIO | None, number: int) -> TextIO:
    if stream is None or stream.closed:
        return Output(open(number, "wb", closefd=False))
    if not hasattr(stream, "buffer"):
        return stream  # somebody in this process collects what is written
    return Output(
        stream.buffer,
        encoding=stream.encoding,
        # A path may hold bytes that are no text, and a terminal may know no such characters: neither is an error.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=True,
        write_through=getattr(stream, "write_through", False),
    )
