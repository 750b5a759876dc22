"""Signals as calls within the event loop, on every loop alike, and the former handlers put back afterwards.

``signal.signal`` and a pipe rather than ``loop.add_signal_handler`` or anyio's receiver: those replace a handler that
the application had for good.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import anyio

__all__ = ["SignalReceiver", "can_handle_signals", "handled_signals"]


def can_handle_signals() -> bool:
    """Say whether this thread may install handlers: Python runs them in the main thread only, and on POSIX alike."""
    return hasattr(os, "pipe2") and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled_signals(handlers: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[SignalReceiver]:
    """Install handlers; run the receiver that is returned, and it calls them as the signals come."""
    receiver = SignalReceiver(handlers)
    former = {each: signal.signal(each, receiver.note) for each in handlers}
    try:
        yield receiver
    finally:
        for each, handler in former.items():
            # None: a handler that was not installed from Python, and cannot be put back from here.
            if handler is not None:
                signal.signal(each, handler)
        receiver.close()


class SignalReceiver:
    """The signals that came and were not looked at yet."""

    def __init__(self, handlers: Mapping[signal.Signals, Callable[[], None]]) -> None:
        self._handlers = handlers
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal: the handler."""
        # Runs between two bytecodes of the main thread, so it does the least there is. A full pipe holds thousands of
        # signals that nobody has looked at yet; one more tells nothing new.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, bytes([number]))

    async def run(self) -> None:
        """Call the handlers for ever. Cancellation loses no signal that a later run could not receive."""
        while True:
            await anyio.wait_readable(self._read_end)
            for number in os.read(self._read_end, 4096):
                self._handlers[signal.Signals(number)]()

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._read_end)
        os.close(self._write_end)
