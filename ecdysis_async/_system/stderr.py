"""The successor's stderr until it is ready: a pipe that the predecessor passes on and keeps the end of."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TextIO

import anyio

from .threads import run_in_thread

__all__ = ["PREFIX", "StderrTail", "duplicate_stderr", "identity", "pass_on", "say", "write_lines"]

# What begins a line in the name of the command.
PREFIX = "ecdysis: "

STDERR_LINES = 40
STDERR_BYTES = 16 * 1024
# What the pipe holds: one read takes all that is there. The most that anybody may ask for, pipe(7).
PIPE_BYTES = 1024 * 1024

# Lines of this library's log, in whatever format.
_LOG_LINE = re.compile(r"\[(?:generation \d+|new process|anchor), pid \d+(?:, restart \w+)?\] ")

# How long the last words of a dead successor may take to be written, seconds.
REST_SECONDS = 1.0


def say(text: str) -> None:
    """Say something in the command's own name, mostly why it ends."""
    write_lines(f"{PREFIX}{text}")


def write_lines(text: str) -> None:
    """Write lines to stderr in one piece.

    Several processes write there. `print` writes the end of the line by itself under PYTHONUNBUFFERED, which containers
    like to set, and what another process writes in that moment would stand before it.
    """
    stderr: TextIO | None = sys.stderr
    # It is None where Python was started without one.
    if stderr is not None:
        stderr.write(f"{text}\n")
        stderr.flush()


class StderrTail:
    """The successor's stderr until it is ready: passed on as it comes, its last lines kept for the error.

    Attributes:
        read_end: also held by the successor, so that it, and what it has started, never write to a broken pipe.
        write_end: the successor's.
    """

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_end, False)
        # The successor's words have room while it imports and its predecessor, who would read them, is dead. Where
        # this user's pipes are many and large, the pipe stays as it is.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._tail = b""
        self._rest = b""
        self._passing_on = anyio.CancelScope()

    def read(self, *, without_reason: bool = False) -> str:
        """Return the last lines, but for those of this library's log, which tells its part elsewhere.

        Args:
            without_reason: whether to leave out why a command of this library has ended (:func:`say`): it was told in
                another way. A process that ends before it comes so far has no other way.
        """
        lines = self._tail.decode(errors="replace").splitlines()
        lines = [line for line in lines if _LOG_LINE.search(line) is None]
        if without_reason:
            lines = [line for line in lines if not line.startswith(PREFIX)]
        return "\n".join(lines[-STDERR_LINES:])

    async def run(self) -> None:
        """Pass it on until every writer has closed it, or the successor passes it on itself."""
        with self._passing_on:
            await pass_on(self.read_end, self._take)

    def stop(self) -> None:
        """Leave the rest to the successor, which is ready."""
        self._passing_on.cancel()

    def read_rest(self) -> None:
        """Take what a successor has written by now, without waiting for it, or for those who have inherited its stderr.

        What it wrote before it said on the channel that it fails stands in the pipe, and may not have been read yet:
        it is what the error is about.
        """
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.read_end, PIPE_BYTES)
            self._keep(data)
            self._rest += data

    async def pass_rest_on(self) -> None:
        """Pass on what :meth:`read_rest` took, unless nobody takes it off this process."""
        with anyio.move_on_after(REST_SECONDS):
            await _write(self._take(b""))

    def close_write_end(self) -> None:
        """Leave the writing to the successor."""
        os.close(self.write_end)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self.read_end)

    def _take(self, data: bytes) -> bytes:
        """Keep what was read, and return what is to be passed on, in the order it was written in."""
        self._keep(data)
        rest, self._rest = self._rest, b""
        return rest + data

    def _keep(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-STDERR_BYTES:]


async def pass_on(read_end: int, take: Callable[[bytes], bytes] = lambda data: data) -> None:
    """Write what comes out of a pipe to stderr, or what ``take`` makes of it, until its last writer is gone."""
    while True:
        await anyio.wait_readable(read_end)
        try:
            data = os.read(read_end, PIPE_BYTES)
        except BlockingIOError:
            # Another process, which shares the pipe, was faster.
            continue
        if not data:
            return
        await _write(take(data))


async def _write(data: bytes) -> None:
    """Write to stderr. Cancelled, it is not waited for any longer, and is written all the same."""
    unwritten = [data]

    def write() -> None:
        # The thread that takes the data out writes it. A closed stderr loses what it always did.
        with contextlib.suppress(IndexError, OSError):
            _write_all(2, unwritten.pop())

    try:
        # In a thread: a log that nobody reads must not stop the service.
        await run_in_thread(write, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        # It was taken off the pipe, so nobody else can write it; and the thread may never begin with it (asyncio).
        if unwritten:
            with contextlib.suppress(RuntimeError):  # no thread to be had
                threading.Thread(target=write, daemon=True).start()
        raise


def duplicate_stderr() -> int:
    """Return a duplicate of this process' stderr, or of nothing where it has none."""
    try:
        return os.dup(2)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        # A daemon that has closed it.
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def identity(descriptor: int) -> tuple[int, int] | None:
    """Return device and inode of what a descriptor leads to; None where it is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
