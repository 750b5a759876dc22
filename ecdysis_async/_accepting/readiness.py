"""Which servers of a program are still getting ready: a generation is ready when the last of them is.

A server that is started by its own ``serve`` says so before it waits for anything, and says when it could serve.
Nothing here accepts, or announces anything.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel

from ecdysis_async._system.wording import name_setting

__all__ = ["Readiness", "Startup"]

# How many turns of the loop the first server that is ready gives to others that are started beside it. A task group
# starts its tasks in one turn; a program may start one of them in a function that another one calls.
TURNS = 10

# How long the servers that are ready wait after another one has failed, seconds. Its task group cancels them; a program
# that can do without it goes on.
FAILURE_SECONDS = 1.0

# When the log says which servers are waited for, as a share of the time they have; and how much of it they have. The
# predecessor counts from the start of this process, and would say no more than that it took too long.
TELL_SHARE = 0.25
TIME_SHARE = 0.8

log = logging.getLogger("ecdysis_async")


class Startup:
    """The start of one server: enter it before anything is awaited, and await :meth:`ready` when it could serve."""

    def __init__(self, readiness: Readiness, name: str) -> None:
        self.name = name
        self._readiness = readiness

    def __enter__(self) -> Self:
        self._readiness.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readiness.discard(self, has_failed=error is not None)

    async def ready(self) -> None:
        """Say that this server could serve, and return when all others could as well.

        Raises:
            TimeoutError: another one could not in time.
        """
        self._readiness.discard(self)
        await self._readiness.wait()


class Readiness:
    """The servers of one generation that are still getting ready.

    Args:
        timeout: how long a generation may take to be ready, seconds.
    """

    def __init__(self, timeout: float = 60) -> None:
        self._timeout = timeout
        self._pending: dict[Startup, None] = {}
        self._has_failed = False
        self._is_announced = False
        # Set when no server is waited for any more.
        self._complete = anyio.Event()

    @property
    def is_awaited(self) -> bool:
        """Whether a server is still getting ready, which will see to the announcement."""
        return bool(self._pending)

    def expect(self, name: str) -> Startup:
        """Return the start of a server, which is waited for once it is entered."""
        return Startup(self, name)

    def note_announced(self) -> None:
        """Take note that this generation was announced to be ready: nobody is waited for any more."""
        self._is_announced = True
        self._complete.set()

    def add(self, startup: Startup) -> None:
        """Wait for a server."""
        self._pending[startup] = None

    def discard(self, startup: Startup, *, has_failed: bool = False) -> None:
        """Wait for a server no more; harmless if it was not waited for."""
        if startup not in self._pending:
            return
        del self._pending[startup]
        self._has_failed = self._has_failed or has_failed
        if not self._pending:
            self._complete.set()

    async def wait(self) -> None:
        """Return when no server is getting ready any more.

        Raises:
            TimeoutError: one was not in time; the text names it.
        """
        begun = anyio.current_time()
        with anyio.move_on_after(self._timeout * TELL_SHARE):
            await self._wait()
            return
        log.warning("not ready yet: waiting for %s", self.names())
        with anyio.move_on_after(begun + self._timeout * TIME_SHARE - anyio.current_time()):
            await self._wait()
            return
        raise TimeoutError(
            f"{self.names()} did not get ready within {self._timeout * TIME_SHARE:g} s, while other servers of this "
            f"program were waiting to begin ({name_setting('ready_timeout')} {self._timeout:g})"
        )

    async def _wait(self) -> None:
        while not self._is_announced:
            for _ in range(TURNS):
                await anyio.lowlevel.checkpoint()
            if not self._pending:
                if not self._has_failed:
                    return
                self._has_failed = False
                await anyio.sleep(FAILURE_SECONDS)
                continue
            self._complete = anyio.Event()
            await self._complete.wait()

    def names(self) -> str:
        """Say what is waited for."""
        return ", ".join(startup.name for startup in self._pending) or "a server that has failed"
