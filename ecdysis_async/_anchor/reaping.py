"""Reaping: an anchor that adopts orphans collects them, and nobody else takes the exit status of a child of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ecdysis_async._system.process import find_process

__all__ = ["Reaper"]


class Reaper:
    """Collects the dead children of this process that nobody waits for.

    Args:
        reaps_orphans: whether this process has such children: it is PID 1, which every orphan becomes a child of, or
            its former code has started some.

    Attributes:
        reaps_orphans: the same.
    """

    def __init__(self, *, reaps_orphans: bool) -> None:
        self.reaps_orphans = reaps_orphans
        self._spawning = 0

    @property
    def is_spawning(self) -> bool:
        """Whether a process is being started, so that some child's pid is not known here yet."""
        return self._spawning > 0

    @contextlib.contextmanager
    def spawning(self) -> Iterator[None]:
        """Reap nobody meanwhile: a process that is being started belongs to its starter."""
        self._spawning += 1
        try:
            yield
        finally:
            self._spawning -= 1
            # What was put off meanwhile is done now.
            if self.reaps_orphans:
                self.reap()

    def reap(self) -> None:
        """Reap every child that has ended: the handler of SIGCHLD. It waits for none."""
        while not self._spawning:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if (process := find_process(found.si_pid)) is not None and process.returncode is None:
                process.reap()
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)
