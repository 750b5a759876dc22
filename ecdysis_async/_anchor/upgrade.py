"""How an anchor is followed: by itself, executed anew (reexec.py), or by another process (succession.py).

Either way it goes on in one moment, in which nothing is under way: no worker is being started or replaced, and nothing
was said that was not heard. Here is how that moment is found, and what happens where it does not come.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.changes import Changes
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import (
    NotReady,
    RestartError,
    RestartInProgress,
    RestartUnsupported,
    RestartWhileDraining,
    TakeoverFailed,
)

from . import reexec
from .pool import SlotActivity, WorkerPool
from .rollout import RollOut
from .takeover import pass_service_on

__all__ = ["Upgradable", "Upgrade"]

# How long it is waited for a moment in which nothing is under way, and between two looks, seconds.
REST_SECONDS = 10.0
REST_PAUSE_SECONDS = 0.02

BUSY = "workers are being started or replaced: upgrade the anchor when that is done"


class Upgradable(Protocol):
    """What a renewal asks of the anchor.

    Attributes:
        crew: its workers.
        changes: what is announced there.
        log: of the anchor.
        ready_timeout: how long new code may take to say that it can go on, seconds.
        roll_out: the last one.
        is_serving: whether all its workers have served.
        is_stopping: whether it was told to stop.
    """

    crew: WorkerPool
    changes: Changes
    log: GenerationLog
    ready_timeout: float
    roll_out: RollOut | None
    is_serving: bool
    is_stopping: bool

    @property
    def is_lame_duck(self) -> bool:
        """Whether it was told to stop, and goes on for a while."""

    @property
    def is_spawning(self) -> bool:
        """Whether a process is being started."""

    @property
    def is_bound(self) -> bool:
        """Whether the service ends with this process, by systemd's will or a container's."""

    def spawning(self) -> AbstractContextManager[None]:
        """Let nobody else reap the processes that are started meanwhile."""

    def hear_all(self) -> None:
        """Hear what the workers have said until now."""

    def dismiss_askers(self) -> None:
        """Tell those who wait for a drain what there is to tell."""

    def describe_state(self) -> tuple[dict[str, Any], list[int]]:
        """Return what the next code has to know, and the descriptors that it names."""

    def begin(self, function: Callable[..., Coroutine[Any, Any, object]], *arguments: object) -> None:
        """Run something beside all else, whose defects cost that, and never the service."""


class Upgrade:
    """The upgrades of an anchor, and its end where another one goes on.

    Attributes:
        is_under_way: whether the anchor is about to be followed.
        count: how often this process was executed anew.
        error: why the last time failed.
    """

    def __init__(self, anchor: Upgradable) -> None:
        self._anchor = anchor
        self.is_under_way = False
        self.count = 0
        self.error: str | None = None

    async def upgrade(self) -> Callable[[], None]:
        """See that the new code takes over from this one; return what then makes it do so.

        Raises:
            RestartError: it does not, or not now.
        """
        anchor = self._anchor
        self._check_possible()
        # A worker may be about to leave, or on its way in another's place.
        with anyio.move_on_after(REST_SECONDS):
            while self._is_busy() and not anchor.is_stopping:  # noqa: ASYNC110 - not all of it is announced
                await anyio.sleep(REST_PAUSE_SECONDS)
        if self._is_busy():
            raise RestartInProgress(BUSY)
        self._begin()
        self.error = None
        try:
            # Nobody else may reap the child that tries the state.
            with anchor.spawning():
                launch, _ = await run_in_thread(functools.partial(describe_launch, None, None, None))
                state, _ = anchor.describe_state()
                memory = reexec.seal(state)
                try:
                    await run_in_thread(functools.partial(reexec.check, launch, memory, anchor.ready_timeout))
                finally:
                    os.close(memory)
        except BaseException as error:
            self.is_under_way = False
            if isinstance(error, OSError):
                raise reexec.UpgradeFailed(f"the state cannot be written: {error}") from error
            raise
        finally:
            anchor.changes.announce()

        def begin() -> None:
            anchor.begin(self._execute, launch)

        return begin

    async def _execute(self, launch: Launch) -> None:
        """Become the new code, in the first moment in which nothing is under way."""
        anchor = self._anchor
        anchor.log.info("upgrading: executing %s", " ".join(launch.arguments))
        # They wait for a drain, of which the new code knows nothing.
        anchor.dismiss_askers()
        error: Exception | None = None
        with anyio.move_on_after(REST_SECONDS):
            while error is None and not anchor.is_stopping:
                with reexec.blocked_signals():
                    if self._is_at_rest():
                        try:
                            state, descriptors = anchor.describe_state()
                            memory = reexec.seal(state)
                            try:
                                reexec.execute(launch, memory, descriptors)
                            finally:
                                os.close(memory)
                        except (OSError, reexec.UpgradeFailed) as failure:
                            error = failure
                await anyio.sleep(REST_PAUSE_SECONDS)
        # Still here: it goes on as it was.
        why = "the service is being stopped" if anchor.is_stopping else "there was always something under way"
        self.error = str(error or why)
        anchor.log.error("the anchor was not upgraded, and goes on: %s", self.error)
        self.is_under_way = False
        anchor.changes.announce()

    async def pass_all_on(self, channel: socket.socket, accept: Callable[[], None]) -> NoReturn:
        """Let another anchor go on with everything, in the first moment in which nothing is under way.

        Does not return: this process ends then.

        Args:
            channel: to that one.
            accept: tells it that it is about to be used.

        Raises:
            RestartError: not now, or that one does not go on.
        """
        anchor = self._anchor
        if anchor.is_bound:
            raise RestartUnsupported(
                "this service belongs to systemd, or to a container, which would end it with its first process: "
                "upgrade it by `ecdysis restart --anchor`"
            )
        self._begin()
        try:
            with anyio.move_on_after(REST_SECONDS):
                while not anchor.is_stopping:
                    if self._is_at_rest():
                        accept()
                        state, descriptors = anchor.describe_state()
                        try:
                            pass_service_on(channel, state, descriptors)
                        except TakeoverFailed as error:
                            raise RestartError(str(error)) from error
                        anchor.log.info("another process has taken the service over; this one ends")
                        logging.shutdown()
                        # As an exec would: nothing is told to anybody, nothing is removed, everything is the other's.
                        os._exit(0)
                    await anyio.sleep(REST_PAUSE_SECONDS)
            raise RestartInProgress("there was always something under way: try again later")
        finally:
            self.is_under_way = False
            anchor.changes.announce()

    def _begin(self) -> None:
        """Let nothing begin any more that would have to be waited for.

        Raises:
            RestartError: the anchor cannot be followed.
        """
        self._check_possible()
        if self.is_under_way:
            raise RestartInProgress("the anchor is being upgraded already")
        self.is_under_way = True

    def _check_possible(self) -> None:
        """See that the anchor can be followed now, or in a moment.

        Raises:
            RestartError: it cannot.
        """
        anchor = self._anchor
        if anchor.is_stopping or anchor.is_lame_duck:
            raise RestartWhileDraining("the service is being stopped")
        if not anchor.is_serving:
            raise NotReady("the service is starting: an upgrade is possible once all workers serve")
        if anchor.roll_out is not None and not anchor.roll_out.over.is_set():
            raise RestartInProgress(BUSY)

    def _is_at_rest(self) -> bool:
        """Hear what the workers have said until now; say whether nothing is under way."""
        anchor = self._anchor
        anchor.hear_all()
        # What was heard may have been a stop, which the new code would know nothing of; so may a signal, meanwhile.
        is_leaving = anchor.is_stopping or anchor.is_lame_duck
        return not (is_leaving or self._is_busy()) and all(worker.line.is_idle for worker in anchor.crew)

    def _is_busy(self) -> bool:
        anchor = self._anchor
        is_rolling = anchor.roll_out is not None and not anchor.roll_out.over.is_set()
        return (
            is_rolling
            or anchor.is_spawning
            or any(slot.activity is not SlotActivity.NONE for slot in anchor.crew.slots)
            # Its line is broken, and it is about to leave.
            or any(worker.line.fileno() == -1 for worker in anchor.crew)
        )
