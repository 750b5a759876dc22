"""A worker whose anchor has died frees its addresses, though its loop does not turn.

A worker learns of its anchor's death on its loop, and leaves (``anchor_client.py``). One that hangs does not learn of
it: it would keep the port for as long as it hangs, and clients would wait in a queue that nobody reads.
"""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import FrameType

from ecdysis_async._ipc.peer import is_dead
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.signals import can_handle_signals, handled_signal, is_handled

__all__ = ["DEATH_SECONDS", "AnchorWatch"]

# How long after the end of the link the anchor's death may be seen, seconds: the kernel closes descriptors first.
DEATH_SECONDS = 0.5

# How long a loop gets to answer those who wait, and to close its sockets by itself, seconds.
GRACE_SECONDS = 0.5


class AnchorWatch:
    """Sees the anchor die, and has a thread of its own from then on.

    Before that there is no thread: from Python 3.12 on, a fork in a process with several threads warns. The kernel
    sends SIGURG when the other end of the link is closed (O_ASYNC, fcntl(2)), and Python's handler runs though the loop
    is blocked: between two bytecodes, or in a system call that Python waits in. Where nobody handles SIGURG its default
    is to be ignored, so that a late one ends no process. It is left alone where the application has a use for it, and
    outside of the main thread: there the thread sleeps in the kernel from the first moment on.

    The thread cuts no request: it only lets nobody queue any more, where the loop has not done so by itself. What ends
    a process that hangs is its exit deadline. The other signal from the kernel (PR_SET_PDEATHSIG) would come with the
    end of the anchor's thread that has started this process, and not where a wrapper stands between the two.

    Args:
        link: the worker's end of the link; a duplicate is taken.
        entries: returns the sockets of this generation.
        on_death: is called in the thread, once the anchor is dead.
    """

    def __init__(
        self, link: socket.socket, entries: Callable[[], Iterable[Entry]], on_death: Callable[[], None]
    ) -> None:
        self._link = link.dup()
        self._entries = entries
        self._on_death = on_death
        self._pidfd = -1
        self._was_dead = False
        # The thread ends by a byte. The end of the pipe would not do: a forked child has the other end as well.
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._has_begun = self._has_thread = False
        # Held while the thread runs.
        self._running = threading.Lock()
        self._signalling = ExitStack()

    @property
    def is_proven(self) -> bool:
        """Whether the anchor is known to be dead, by its pidfd: the link alone may end for another reason."""
        with self._lock:
            return self._was_dead or (self._pidfd >= 0 and is_dead(self._pidfd))

    def watch(self, pid: int) -> None:
        """Watch the process that is the anchor from now on; nothing is done where that is not possible."""
        pidfd, was_dead = -1, False
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            was_dead = True
        except (AttributeError, OSError):
            return
        with self._lock:
            self._close_pidfd()
            self._pidfd, self._was_dead = pidfd, was_dead
        if not self._has_begun:
            self._has_begun = True
            self._begin()

    def close(self) -> None:
        """Watch no more; harmless if done already."""
        with self._lock:
            if self._waker < 0:
                return
            waker, self._waker = self._waker, -1
        self._signalling.close()
        os.write(waker, b"\0")
        if self._has_thread:
            self._running.acquire()
        with self._lock:
            self._close_pidfd()
        self._link.close()
        os.close(waker)
        os.close(self._woken)

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _begin(self) -> None:
        if can_handle_signals() and not is_handled(signal.SIGURG):
            self._signalling.enter_context(handled_signal(signal.SIGURG, self._on_signal))
            fcntl.fcntl(self._link, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(self._link, fcntl.F_SETSIG, signal.SIGURG)
            self._set_async(os.O_ASYNC)
            self._signalling.callback(self._set_async, 0)
            # The link may have ended before.
            if not self._has_hung_up():
                return
        self._start_thread()

    def _set_async(self, flag: int) -> None:
        flags = fcntl.fcntl(self._link, fcntl.F_GETFL)
        fcntl.fcntl(self._link, fcntl.F_SETFL, flags & ~os.O_ASYNC | flag)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Each word of the anchor sends it as well.
        if self._has_hung_up():
            self._start_thread()

    def _has_hung_up(self) -> bool:
        poll = select.poll()
        # Without any event asked for, only a hang-up is told.
        poll.register(self._link, 0)
        return bool(poll.poll(0))

    def _start_thread(self) -> None:
        if self._has_thread:
            return
        self._has_thread = True
        self._running.acquire()
        try:
            # By the module below `threading`, whose locks the code may hold that was interrupted by the signal.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            # No thread can be had (ulimit -u): then a loop that turns still frees its addresses.
            self._running.release()

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._running.release()

    def _watch(self) -> None:
        # Without any event asked for, only a hang-up is told: what the anchor says wakes nobody here.
        if self._is_closed_within(None, self._link.fileno()):
            return
        if self._is_closed_within(DEATH_SECONDS) or not self.is_proven:
            return
        self._on_death()
        if self._is_closed_within(GRACE_SECONDS):
            return
        for entry in self._entries():
            with contextlib.suppress(OSError):  # the loop was faster
                entry.refuse_newcomers()
                entry.stop_listening()

    def _is_closed_within(self, seconds: float | None, link: int | None = None) -> bool:
        """Wait for so long, or until the link has ended; say whether this watch was closed meanwhile."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if link is not None:
            poll.register(link, 0)
        found = poll.poll(None if seconds is None else seconds * 1000)
        return any(number == self._woken for number, _ in found)
