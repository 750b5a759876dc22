"""The successor's stderr until it is ready: a pipe that the predecessor passes on and keeps the end of."""

from __future__ import annotations

import contextlib
import os

import anyio
import anyio.to_thread

__all__ = ["StderrTail", "duplicate_stderr", "identity"]

STDERR_LINES = 40
STDERR_BYTES = 16 * 1024


class StderrTail:
    """The successor's stderr until it is ready: passed on as it comes, its last lines kept for the error."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._tail = b""

    @property
    def text(self) -> str:
        """The last lines."""
        return "\n".join(self._tail.decode(errors="replace").splitlines()[-STDERR_LINES:])

    async def run(self) -> None:
        """Pass it on until every writer has closed it; that is long after the successor has put its own in place."""
        while True:
            await anyio.wait_readable(self._read_end)
            if not await self._read():
                return

    async def read_rest(self) -> None:
        """Take what a dead successor has left, without waiting for those who may have inherited its stderr."""
        with contextlib.suppress(BlockingIOError):
            while await self._read():
                pass

    def close_write_end(self) -> None:
        """Leave the writing to the successor."""
        os.close(self.write_end)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._read_end)

    async def _read(self) -> bool:
        data = os.read(self._read_end, 64 * 1024)
        self._tail = (self._tail + data)[-STDERR_BYTES:]
        if data:
            # In a thread: a log that nobody reads must not stop the service. A closed stderr loses what it always did.
            with contextlib.suppress(OSError):
                await anyio.to_thread.run_sync(_write_all, 2, data, abandon_on_cancel=True)
        return bool(data)


def duplicate_stderr() -> int:
    """Return a duplicate of this process' stderr, or of nothing where it has none."""
    try:
        return os.dup(2)
    except OSError:  # a daemon that has closed it
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
