"""What one process of the whole service holds at a time: `exclusive`.

The kernel arbitrates, by a lock on a file that all processes of the service have open (``_system/lock_file.py``). So
neither the anchor nor a predecessor has to be asked, and their death changes nothing: a lock is free once its holder
has let go, or is dead.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel

from ecdysis_async._handoff.generation import Generation
from ecdysis_async._system.claims import is_worker
from ecdysis_async._system.lock_file import LockFile
from ecdysis_async.errors import DrainInterrupt, StartupError

__all__ = ["Exclusives", "StartUp", "check_name", "in_application"]

MAX_NAME = 200

# How often a lock is tried where no thread can wait for it, seconds.
POLL_SECONDS = 0.2

# When it is said that a start-up waits, and how long it may wait for a holder who may let go before, seconds.
START_UP_WARNING_SECONDS = 1.0
START_UP_SECONDS = 10.0

REMEDIES = (
    "take it in a task of its own that the start-up does not wait for; do without it until then, and begin at "
    "`settled`; or let the old release leave first (ecdysis run --one-at-a-time)"
)


def check_name(name: str) -> None:
    """See that a name can be one.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of something exclusive is text, not {name!r}")
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"the name of something exclusive has 1 to {MAX_NAME} printable characters, unlike {name!r}")


@dataclass(slots=True, eq=False)
class StartUp:
    """The start-up of an application, in the task that carries it out.

    Attributes:
        task: that task's id.
        is_over: whether it has ended.
    """

    task: int
    is_over: bool = False


# The start-up of the application that a server runs, for its own task and all that come of it.
_start_up: contextvars.ContextVar[StartUp | None] = contextvars.ContextVar("ecdysis_start_up", default=None)


@contextlib.contextmanager
def in_application() -> Iterator[StartUp]:
    """Take the running task for an application's start-up, and what it begins for tasks that the application ends."""
    start_up = StartUp(anyio.get_current_task().id)
    token = _start_up.set(start_up)
    try:
        yield start_up
    finally:
        start_up.is_over = True
        _start_up.reset(token)


@dataclass(slots=True, eq=False)
class _Claim:
    """One ``async with exclusive(name)``.

    Attributes:
        name: what it asks for.
        is_start_up: whether the service's start-up waits for it.
        scope: what is cancelled when this generation leaves: the waiting, and then the body.
        is_held: whether it has what it asks for.
        since: when it began to wait, or to hold, on the system's monotonic clock.
    """

    name: str
    is_start_up: bool
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    is_held: bool = False
    since: float = field(default_factory=time.monotonic)


class _Turn:
    """A thread that waits for a lock in the kernel's queue.

    Nothing can call it back from there. If nobody wants the lock any more when it comes, it gives the lock back.
    """

    def __init__(self, lock_file: LockFile, name: str) -> None:
        self._lock_file = lock_file
        self._name = name
        self._mutex = threading.Lock()
        # What wakes the task that wants the lock; None while none does.
        self._waker: socket.socket | None = None
        self._error: OSError | None = None
        self._has_lock = False
        self.is_over = False
        # The interpreter does not wait for it at its end.
        threading.Thread(target=self._run, name=f"ecdysis exclusive {name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._lock_file.lock(self._name)
        except OSError as error:
            self._error = error
        with self._mutex:
            self._has_lock = self._error is None
            if self._waker is not None:
                with contextlib.suppress(OSError):
                    self._waker.send(b"\0")
            else:
                self._give_back()
            # From here on the lock may be taken without waiting: what was given back later would be that one.
            self.is_over = True

    def _give_back(self) -> None:
        if self._has_lock:
            self._has_lock = False
            self._lock_file.unlock(self._name)

    async def wait(self) -> bool:
        """Wait until the turn has come, and return whether this process has the lock.

        It has not where nobody wanted the lock when it came, and where this is cancelled.

        Raises:
            OSError: the thread could not wait.
        """
        is_taken = False
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with self._mutex:
                self._waker = theirs
            try:
                if not self.is_over:
                    await anyio.wait_readable(ours)
                is_taken = True
            finally:
                with self._mutex:
                    self._waker = None
                    if not is_taken:
                        self._give_back()
        if self._error is not None:
            raise self._error
        return self._has_lock


class Exclusives:
    """What this process holds exclusively, or waits for.

    Args:
        generation: of this process.
        draining: is set when this generation leaves.
        drained: is set when its connections have ended.
        is_starting: says whether this generation has yet to serve.
        is_paused: says whether another process accepts in the place of this one, which may yet do so again.
        body_task: the id of the task that has entered the block.
        on_change: called when something is held, or waited for, or is not any more.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        draining: anyio.Event,
        drained: anyio.Event,
        is_starting: Callable[[], bool],
        is_paused: Callable[[], bool],
        body_task: int,
        on_change: Callable[[], None],
    ) -> None:
        self._generation = generation
        # None on a platform that has no locks, and no restarts.
        self._lock_file = generation.lock_file
        self._draining = draining
        self._drained = drained
        self._is_starting = is_starting
        self._is_paused = is_paused
        self._body_task = body_task
        self._on_change = on_change
        self._claims: list[_Claim] = []
        # The kernel's locks belong to processes: these are for the tasks of this one.
        self._tasks: dict[str, anyio.Lock] = {}
        self._turns: dict[str, _Turn] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Hold a name; see :meth:`Ecdysis.exclusive`."""
        if self._lock_file is None and is_worker():
            raise RuntimeError(
                f"exclusive({name!r}) needs an anchor that knows of it, and this worker's is of an earlier release: "
                "`ecdysis restart --anchor` upgrades it"
            )
        claim = _Claim(name, self._is_start_up())
        self._claims.append(claim)
        self._on_change()
        try:
            await self._obtain(claim)
            try:
                with claim.scope:
                    yield
            finally:
                self._let_go(claim)
        finally:
            self._claims.remove(claim)
            self._on_change()

    def leave(self) -> None:
        """Let the body of everything that is held end, and everything that is waited for be waited for in vain."""
        for claim in self._claims:
            claim.scope.cancel()

    def note_serving(self) -> None:
        """Take note that the start-up is over: what it has taken is kept for as long as this generation serves."""
        for claim in self._claims:
            if claim.is_held and claim.is_start_up:
                self._tell(claim, is_kept=True)

    def describe(self) -> list[dict[str, Any]]:
        """Say what is held, and what is waited for."""
        now = time.monotonic()
        return [
            {"name": each.name, "is_held": each.is_held, "seconds": max(0.0, now - each.since)} for each in self._claims
        ]

    # Waiting

    async def _obtain(self, claim: _Claim) -> None:
        """Return when a claim has its lock.

        Raises:
            DrainInterrupt: this generation leaves.
            RuntimeError: the running task has it already.
            StartupError: the start-up would wait for it for ever.
        """
        with claim.scope:
            if not self._draining.is_set():
                await self._wait_for_task(claim)
        if claim.is_held and not self._draining.is_set():
            # The waiting is over, and the body has a scope of its own.
            claim.scope = anyio.CancelScope()
            claim.since = time.monotonic()
            self._tell(claim)
            self._on_change()
            return
        if claim.is_held:
            self._let_go(claim)
        await self._wait_in_vain()

    async def _wait_in_vain(self) -> None:
        if _start_up.get() is not None:
            # A server's application ends its tasks when it shuts down, and expects no other error of them.
            await anyio.sleep_forever()
        # An exception any earlier might take a group of tasks with it that serve connections.
        await self._drained.wait()
        raise DrainInterrupt("this generation leaves, and does not get it any more")

    async def _wait_for_task(self, claim: _Claim) -> None:
        tasks = self._tasks.setdefault(claim.name, anyio.Lock())
        try:
            await tasks.acquire()
        except RuntimeError:
            raise RuntimeError(
                f"this task holds exclusive({claim.name!r}) already, and would wait for itself"
            ) from None
        try:
            if claim.is_start_up:
                await self._wait_in_start_up(claim)
            else:
                await self._wait_for_process(claim)
            claim.is_held = True
        finally:
            if not claim.is_held:
                tasks.release()

    async def _wait_in_start_up(self, claim: _Claim) -> None:
        assert self._lock_file is not None
        limit = min(START_UP_SECONDS, self._generation.settings.ready_timeout / 2)
        begun = anyio.current_time()
        for seconds in (0.0, min(START_UP_WARNING_SECONDS, limit), limit):
            with anyio.CancelScope(deadline=begun + seconds) as scope:
                # A lock that is free is taken without waiting, whatever the deadline.
                if self._try(claim.name):
                    return
                await self._wait_for_process(claim)
            if not scope.cancelled_caught:
                return
            holder = self._lock_file.read(claim.name)
            text = f"the start-up waits for exclusive({claim.name!r}), which {_describe(holder)}"
            if holder.get("is_kept") or seconds == limit:
                raise StartupError(
                    f"{text} and lets go when it leaves: an old release leaves only once this one serves, and another "
                    f"worker keeps it. So {REMEDIES}"
                )
            if seconds:
                self._generation.log.warning("%s", text)

    def _try(self, name: str) -> bool:
        """Take the lock of a name if it is free, and no thread waits for it, which could take it for its own."""
        turn = self._turns.get(name)
        if turn is not None and not turn.is_over:
            return False
        self._turns.pop(name, None)
        return self._lock_file is None or self._lock_file.try_lock(name)

    async def _wait_for_process(self, claim: _Claim) -> None:
        """Wait until this process has a lock, and may use it.

        A generation that has paused is about to leave: what its former holder lets go is the successor's. It may yet
        serve again, where the restart fails.
        """
        await self._wait_for_lock(claim)
        while self._is_paused():
            if self._lock_file is not None:
                self._lock_file.unlock(claim.name)
            while self._is_paused():  # noqa: ASYNC110 - for the time of a probation
                await anyio.sleep(POLL_SECONDS)
            await self._wait_for_lock(claim)

    async def _wait_for_lock(self, claim: _Claim) -> None:
        await anyio.lowlevel.checkpoint()
        try:
            while not self._try(claim.name):
                assert self._lock_file is not None
                turn = self._turns.get(claim.name)
                if turn is None:
                    turn = self._turns[claim.name] = _Turn(self._lock_file, claim.name)
                if await turn.wait():
                    return
        except (OSError, RuntimeError) as error:
            # A thread is not to be had. Or the kernel sees a deadlock where tasks wait independently of each other.
            if isinstance(error, OSError) and error.errno not in (errno.EDEADLK, errno.ENOLCK, errno.EMFILE):
                raise
            while not self._try(claim.name):  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(POLL_SECONDS)

    def _let_go(self, claim: _Claim) -> None:
        claim.is_held = False
        if self._lock_file is not None:
            self._lock_file.unlock(claim.name)
        self._tasks[claim.name].release()

    def _is_start_up(self) -> bool:
        if not self._is_starting() or self._lock_file is None:
            return False
        task, start_up = anyio.get_current_task().id, _start_up.get()
        return task == self._body_task or (start_up is not None and not start_up.is_over and task == start_up.task)

    def _tell(self, claim: _Claim, *, is_kept: bool = False) -> None:
        if self._lock_file is not None:
            self._lock_file.write(
                claim.name,
                {
                    "pid": os.getpid(),
                    "generation": self._generation.number,
                    "since": claim.since,
                    "is_kept": is_kept,
                },
            )


def _describe(holder: dict[str, Any]) -> str:
    try:
        seconds = max(0.0, time.monotonic() - float(holder["since"]))
        return f"pid {int(holder['pid'])} (generation {int(holder['generation'])}) has held for {seconds:.0f} s"
    except (KeyError, OverflowError, TypeError, ValueError):
        return "another process of this service holds"
