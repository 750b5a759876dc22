"""How an anchor is followed: by itself, executed anew (reexec.py), or by another process (takeover.py).

Either way it goes on in one moment, in which nothing is under way: no worker is being started or replaced, and all that
was said was heard. Here is how that moment is found, and what happens where it does not come.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.controlled import ReadyUpgrade
from ecdysis_async._system.launch import Launch, describe_launch
from ecdysis_async._system.process import require_program
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
from .dispatch import Dispatcher
from .pool import SlotActivity
from .reaping import Reaper
from .state import AnchorState, Begin, Life, wait_until
from .takeover import hear_taken, let_go, offer_service

__all__ = ["Upgrade"]

# How long to wait for a moment in which nothing is under way, and between two looks, seconds.
REST_SECONDS = 10.0
REST_PAUSE_SECONDS = 0.02

BUSY = "workers are being started or replaced: upgrade the anchor when that is done"
STOPPED = "the service is being stopped"
RESTLESS = "there was always something under way"


# What a worker tells again every second.
_TOLD_AGAIN = ("connections", "requests", "rss", "closed")


def _find_launch() -> Launch:
    """Return what the anchor executes.

    Raises:
        RestartError: it is gone.
    """
    launch, _ = describe_launch(None, None, None, is_bound_to_directory=True)
    require_program(launch)
    return launch


class Upgrade:
    """What lets the code that follows go on with an anchor's service.

    Args:
        state: what the anchor knows.
        dispatcher: what hears the workers.
        reaper: what must not reap the child that tries the state.
        log: the anchor's log.
        begin: runs something beside everything else.
        describe: returns what the next code has to know, and the descriptors that it names.
        is_bound: whether the service ends with this process, by the will of systemd or of a container.
    """

    def __init__(
        self,
        state: AnchorState,
        dispatcher: Dispatcher,
        reaper: Reaper,
        log: GenerationLog,
        *,
        begin: Begin,
        describe: Callable[[], tuple[dict[str, Any], list[int]]],
        is_bound: bool,
    ) -> None:
        self._state = state
        self._dispatcher = dispatcher
        self._reaper = reaper
        self.log = log
        self._begin = begin
        self._describe = describe
        self._is_bound = is_bound

    async def upgrade(self) -> ReadyUpgrade:
        """See that the new code takes over from this one; return what then makes it do so.

        Raises:
            RestartError: the new code does not take over, or not now.
        """
        state = self._state
        self._check_possible()
        # A worker may be about to leave, or on its way in another's place.
        with anyio.move_on_after(REST_SECONDS):
            while self._is_busy() and not state.is_stopping:  # noqa: ASYNC110 - not all of it is announced
                await anyio.sleep(REST_PAUSE_SECONDS)
        if self._is_busy():
            raise RestartInProgress(BUSY)
        self._enter()
        state.upgrade_error = None
        try:
            with self._reaper.spawning():
                launch = await run_in_thread(_find_launch)
                body, _ = self._describe()
                memory = reexec.seal(body)
                try:
                    timeout = state.config.settings.ready_timeout
                    options = await run_in_thread(functools.partial(reexec.check, launch, memory, timeout))
                finally:
                    os.close(memory)
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise reexec.UpgradeFailed(f"the state cannot be written: {error}") from error
            raise
        finally:
            state.changes.announce()
        return ReadyUpgrade(
            functools.partial(self._begin, self._execute, launch, options), reexec.find_control_path(options)
        )

    async def _execute(self, launch: Launch, options: str | None) -> None:
        """Become the new code, in the first moment in which nothing is under way.

        Args:
            launch: what to run.
            options: what the new code was tried with. It goes on with them, whatever becomes of their files meanwhile.
        """
        state = self._state
        # Its arguments may hold a password.
        self.log.info("upgrading: executing %s anew", launch.arguments[0])
        self._dispatcher.dismiss_askers()
        error: Exception | None = None
        with anyio.move_on_after(REST_SECONDS):
            while error is None and state.life is Life.UPGRADING:
                with reexec.blocked_signals():
                    if self._is_at_rest():
                        try:
                            body, descriptors = self._describe()
                            memory = reexec.seal({**body, reexec.OPTIONS_KEY: options})
                            try:
                                reexec.execute(launch, memory, descriptors)
                            finally:
                                os.close(memory)
                        except (OSError, reexec.UpgradeFailed) as failure:
                            error = failure
                await anyio.sleep(REST_PAUSE_SECONDS)
        # This code still runs, so it goes on as it was.
        state.upgrade_error = str(error or (STOPPED if state.is_leaving else RESTLESS))
        self.log.error("the anchor was not upgraded, and goes on: %s", state.upgrade_error)
        self._leave()
        state.changes.announce()

    async def pass_all_on(self, channel: socket.socket, accept: Callable[[], None]) -> NoReturn:
        """Let another anchor go on with everything, in the first moment in which nothing is under way.

        Where that succeeds, it does not return: this process ends.

        Args:
            channel: the channel to the other anchor.
            accept: tells the other anchor that the channel is about to be used.

        Raises:
            RestartError: the other anchor does not go on, or not now.
        """
        if self._is_bound:
            raise RestartUnsupported(
                "this service belongs to systemd, or to a container, which would end it with its first process: "
                "upgrade it by `ecdysis restart --anchor`"
            )
        self._enter()
        state = self._state
        try:
            with anyio.move_on_after(REST_SECONDS) as waiting:
                while state.life is Life.UPGRADING:
                    if self._is_at_rest():
                        accept()
                        waiting.deadline = math.inf
                        try:
                            await self._offer(channel)
                        except TakeoverFailed as error:
                            self.log.warning("the service was not taken over, and goes on: %s", error)
                            raise RestartError(str(error)) from error
                        self.log.info("another process has taken the service over; this one ends")
                        logging.shutdown()
                        # As with an exec, nothing is told to anybody and nothing is removed: all is the other anchor's.
                        os._exit(0)
                    await anyio.sleep(REST_PAUSE_SECONDS)
            if state.is_leaving:
                raise RestartWhileDraining(STOPPED)
            raise RestartInProgress(f"{RESTLESS}: try again later")
        finally:
            self._leave()
            state.changes.announce()

    async def _offer(self, channel: socket.socket) -> None:
        """Let another anchor take the service over; when it returns, this process has to end.

        Commands and load balancers are answered meanwhile. What the other anchor was told has to be true to the end.

        Raises:
            TakeoverFailed: the other anchor does not take it, or something has happened meanwhile.
        """
        body, descriptors = self._describe()
        offer_service(channel, body, descriptors)
        failure: TakeoverFailed | None = None

        def is_out_of_date() -> bool:
            return self._state.life is not Life.UPGRADING or _find_steady(self._describe()[0]) != _find_steady(body)

        async def withdraw() -> None:
            await wait_until(self._state.changes, is_out_of_date)
            # It ends the waiting in the thread.
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(withdraw)
            try:
                await run_in_thread(functools.partial(hear_taken, channel))
            except TakeoverFailed as error:
                failure = error
            task_group.cancel_scope.cancel()
        # Nothing may be awaited any more: what the other anchor has taken is true now.
        if failure is not None:
            raise failure
        if not self._is_at_rest() or is_out_of_date():
            raise TakeoverFailed("something has happened meanwhile: try again")
        let_go(channel)

    def _enter(self) -> None:
        """Let nothing begin any more that would have to be waited for.

        Raises:
            RestartError: the anchor cannot be followed.
        """
        self._check_possible()
        if self._state.life is Life.UPGRADING:
            raise RestartInProgress("the anchor is being upgraded already")
        self._state.life = Life.UPGRADING

    def _leave(self) -> None:
        """Go on as before, unless the service was told to stop meanwhile."""
        if self._state.life is Life.UPGRADING:
            self._state.life = Life.SERVING

    def _check_possible(self) -> None:
        """See that the anchor can be followed now, or in a moment.

        Raises:
            RestartError: it cannot.
        """
        if self._state.is_leaving:
            raise RestartWhileDraining(STOPPED)
        if self._state.life is Life.STARTING:
            raise NotReady("the service is starting: an upgrade is possible once all workers serve")
        if self._state.is_rolling:
            raise RestartInProgress(BUSY)

    def _is_at_rest(self) -> bool:
        """Hear what the workers have said until now; say whether nothing is under way."""
        self._dispatcher.hear_all()
        # What was heard may have been a stop, which the new code would know nothing of. So may a signal have been.
        return (
            self._state.life is Life.UPGRADING
            and not self._is_busy()
            and all(worker.link.is_idle for worker in self._state.pool)
        )

    def _is_busy(self) -> bool:
        """Say whether workers come or go."""
        return (
            self._state.is_rolling
            or self._reaper.is_spawning
            or any(slot.activity is not SlotActivity.NONE for slot in self._state.pool.slots)
            # The link of such a worker is broken, and the worker is about to leave.
            or any(worker.link.fileno() == -1 for worker in self._state.pool)
        )


def _find_steady(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be true of a service that is handed over: all but what its workers tell again and again."""
    crew = body["crew"]
    workers = [{name: each[name] for name in each if name not in _TOLD_AGAIN} for each in crew["workers"]]
    return {**body, "crew": {**crew, "workers": workers}}
