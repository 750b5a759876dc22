"""Signals as calls within the event loop, on every loop alike, and the former handlers put back afterwards.

``signal.signal`` and a pipe rather than ``loop.add_signal_handler`` or anyio's receiver: those replace a handler that
the application had for good.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any, TypeAlias

import anyio

__all__ = [
    "SignalReceiver",
    "can_handle_signals",
    "catches",
    "clean_mask",
    "handled_signal",
    "handled_signals",
    "is_handled",
    "unblock_all_signals",
]


# After how many seconds a signal that the loop has not seen is told.
DELAY_SECONDS = 3.0

TellDelay: TypeAlias = Callable[[Collection[str], float], None]
"""Is told the names of signals, and for how many seconds they have waited. It is called in a thread."""

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


def can_handle_signals() -> bool:
    """Say whether this thread may install handlers: Python runs them in the main thread only, and on POSIX alike."""
    return hasattr(os, "pipe2") and threading.current_thread() is threading.main_thread()


def is_handled(number: signal.Signals) -> bool:
    """Say whether anybody handles, or ignores, a signal in this process: also one who did it in C (faulthandler).

    Where that cannot be known, somebody does.
    """
    try:
        return _is_set("self", "SigCgt", number) or _is_set("self", "SigIgn", number)
    except (OSError, ValueError, KeyError):
        return True


def catches(pid: int, number: int) -> bool:
    """Say whether a process has a handler for a signal, so that it is not ended by it. In doubt it has none."""
    try:
        return _is_set(pid, "SigCgt", number)
    except (OSError, ValueError, KeyError):
        return False


def _is_set(pid: int | str, name: str, number: int) -> bool:
    """Say whether a signal is in one of the masks of a process (proc_pid_status(5)).

    Raises:
        OSError, ValueError, KeyError: that cannot be known.
    """
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
        masks = dict(line.split(":", 1) for line in lines)
    return bool(int(masks[name], 16) >> (number - 1) & 1)


def unblock_all_signals() -> None:
    """Let every signal come, in a process that is nothing but a service: its parent may have blocked some.

    A parent blocks signals for its own threads (a JVM, a supervisor that waits by sigwait), and an exec keeps that.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextlib.contextmanager
def clean_mask() -> Iterator[None]:
    """Block no signal in this thread, so that a process which is started here blocks none."""
    former = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def handled_signals(
    handlers: Mapping[signal.Signals, Callable[[], None]], tell_delay: TellDelay | None = None
) -> Iterator[SignalReceiver]:
    """Install handlers; run the receiver that is returned, and it calls them as the signals come.

    A parent may have blocked these signals, which this process has inherited: they come meanwhile all the same.

    Args:
        handlers: what is called at each signal.
        tell_delay: see :class:`SignalReceiver`.
    """
    receiver = SignalReceiver(handlers, tell_delay)
    former: dict[signal.Signals, Handler] = {}
    blocked: set[int] = set()
    _replaced.append(former)
    try:
        receiver.wake_from_c()
        for each in handlers:
            former[each] = signal.signal(each, receiver.note)
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers) & set(handlers)
        yield receiver
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        _replaced.remove(former)
        for each, handler in former.items():
            if each in receiver.ignored_afterwards:
                signal.signal(each, signal.SIG_IGN)
            else:
                _put_back(each, handler)
        receiver.close()


@contextlib.contextmanager
def handled_signal(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install one handler that runs between two bytecodes of the main thread, whether or not the loop turns.

    A forked child has the former one.
    """
    former: dict[signal.Signals, Handler] = {}
    _replaced.append(former)
    try:
        former[number] = signal.signal(number, handler)
        yield
    finally:
        _replaced.remove(former)
        # The application may have found a use for the signal meanwhile.
        if signal.getsignal(number) == handler:
            _put_back(number, former[number])


class SignalReceiver:
    """The signals that came and were not looked at yet.

    Python's own handler runs while the loop is blocked, if the main thread comes to another bytecode, or waits in a
    system call. So it can have a thread look whether the loop turns.

    Args:
        handlers: what is called at each signal.
        tell_delay: is told, in a thread, which signals have waited for the loop, and for how many seconds. There is no
            such thread before a signal comes, and none any more once the loop has seen it.
    """

    def __init__(
        self, handlers: Mapping[signal.Signals, Callable[[], None]], tell_delay: TellDelay | None = None
    ) -> None:
        self._tell_delay = tell_delay
        self._watched: threading.Event | None = None
        self.ignored_afterwards: frozenset[signal.Signals] = frozenset()
        self._handlers = handlers
        self._noted: deque[int] = deque()
        # The pipe does nothing but wake: C writes to it as well, and for signals of others too.
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakes_from_c = False

    def wake_from_c(self) -> None:
        """Let Python's own handler write to the pipe, unless the loop has it write to another.

        Python runs :meth:`note` between two bytecodes: a signal that comes after the last one before the loop sleeps
        would be noted once something else wakes the loop. uvloop and trio see to that themselves, and asyncio's loop
        does once it has a signal handler of its own.
        """
        others = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._wakes_from_c = others == -1
        if not self._wakes_from_c:
            signal.set_wakeup_fd(others, warn_on_full_buffer=False)

    def keep_ignoring(self, signals: Collection[signal.Signals]) -> None:
        """Let signals be ignored instead of put back at the end: the process exits, and they ask for nothing else.

        Without it a second SIGTERM would still kill the interpreter while it finalizes, and its exit status would
        tell of a death where there was none. Nothing in Python could catch it by then.
        """
        self.ignored_afterwards |= frozenset(signals)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal: the handler."""
        # Runs between two bytecodes of the main thread, so it does the least there is. Closed already: somebody has
        # kept it as the former handler, and the number of the pipe may belong to another file.
        if self._write_end == -1:
            return
        self._noted.append(number)
        # A full pipe has woken the loop long ago.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, b"\0")
        # The end of a child is no order that anybody waits for.
        if self._tell_delay is not None and self._watched is None and number != signal.SIGCHLD:
            self._watched = threading.Event()
            thread = threading.Thread(
                target=self._watch, args=(self._tell_delay, self._watched), name="ecdysis-signals", daemon=True
            )
            # No thread can be had (ulimit -u): then nobody is told.
            with contextlib.suppress(RuntimeError):
                thread.start()

    def _watch(self, tell_delay: TellDelay, seen: threading.Event) -> None:
        """Tell that the loop does not turn, for as long as that is so; more and more seldom."""
        waited, pause = 0.0, DELAY_SECONDS
        while not seen.wait(pause):
            waited += pause
            pause = waited
            tell_delay([signal.Signals(number).name for number in tuple(self._noted)], waited)

    def _note_seen(self) -> None:
        if self._watched is not None:
            self._watched.set()
            self._watched = None

    def fileno(self) -> int:
        """Return the pipe that C has written the number of each signal to that was not acted upon yet.

        A process that executes itself anew passes it on: signals may reach another thread until the very last moment.
        """
        return self._read_end

    async def run(self) -> None:
        """Call the handlers for ever. Cancellation loses no signal that a later run could not receive."""
        while True:
            await anyio.wait_readable(self._read_end)
            os.read(self._read_end, 4096)
            self._note_seen()
            while self._noted:
                self._handlers[signal.Signals(self._noted.popleft())]()

    def close(self) -> None:
        """Let go of the pipe; harmless if done already. What is noted from then on is ignored."""
        self._note_seen()
        if self._write_end == -1:
            return
        if self._wakes_from_c:
            current = signal.set_wakeup_fd(-1)
            # A loop that was given a signal handler meanwhile has its own.
            if current != self._write_end:
                signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        # First without a number, since a signal may come between any two of these lines.
        read_end, write_end = self._read_end, self._write_end
        self._read_end = self._write_end = -1
        os.close(read_end)
        os.close(write_end)


# The handlers that were there before ours, for each block of :func:`handled_signals` that is entered.
_replaced: list[dict[signal.Signals, Handler]] = []


def _put_back(number: signal.Signals, handler: Handler) -> None:
    # None is a handler that was not installed from Python: it cannot be put back from here.
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _hold_signals() -> None:
    """Block the signals that are handled here, from just before a fork.

    A signal that reached the child before its handlers are put back would be noted there, and be lost: `terminate`
    right after `start` would end nobody.
    """
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, set().union(*_replaced)) if _replaced else None


def _let_signals_through() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _put_all_back_in_child() -> None:
    """Give a forked child the handlers that it would have without us: `Process.terminate` is to end it.

    The pipe that wakes the parent's loop is shared with the child. A signal of the child must not be written there.
    """
    if _replaced:
        signal.set_wakeup_fd(-1)
    for former in reversed(_replaced):
        for number, handler in former.items():
            _put_back(number, handler)
    _let_signals_through()


# The mask of each thread that forks: two may do so at once.
_forking = threading.local()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_signals, after_in_parent=_let_signals_through, after_in_child=_put_all_back_in_child
    )
