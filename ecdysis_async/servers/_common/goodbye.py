"""How a generation takes leave of the clients of its server: the same for every server.

From the restart's settling on, whoever asks is answered, and told to come back on a new connection; WebSockets are
closed one after the other; what is idle to the end the drain closes, shortly before its deadline. Only when nobody is
left may the server shut down. Nothing here knows a server.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import active
from ecdysis_async._accepting.gate import GateState
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.errors import DrainInterrupt

__all__ = ["DRAINING", "RESTARTING", "Goodbye", "is_on_trio"]

DRAINING = "ecdysis.draining"
"""Where an application finds the event that this generation leaves: an object with ``is_set()`` and ``wait()``."""

RESTARTING = 1012
"""The code that a WebSocket is closed with: "Service Restart" in IANA's registry of close codes."""

# How often it is looked whether the last connection has ended, and who is to be closed next, seconds. A WebSocket's
# connection ends without telling, because its protocol is no longer the one that was made for it; a drain, too, looks
# for those this often.
STEP_SECONDS = 0.05

# How long before the deadline the last WebSocket is closed, seconds, and as a share of the whole time: its client has
# to answer, and may be far away, or busy. Whoever has not by then is reset.
ANSWER_SECONDS = 5.0
ANSWER_SHARE = 0.25

# What a server may take for its own shutdown, the application's included, if the drain has used up all of its time; and
# what a drain may take beyond its deadline before it is not waited for any longer. Seconds.
GRACE_SECONDS = 10.0

log = logging.getLogger("ecdysis_async")


def is_on_trio() -> bool:
    """Say whether trio runs, which has no loop that servers could ask for a server."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


class Goodbye:
    """The way out of one server's connections.

    Attributes:
        ecdysis: says when.
        websockets: for each WebSocket that is open, what closes it with ``RESTARTING``; it may take its time, and
            raises nothing.
        goodbyes: what is called again and again from the moment on that this generation leaves, with whether it is
            shortly before the deadline; raises nothing.

    Args:
        ecdysis: see above.
        say_farewell: called shortly before the deadline, when idle connections are to be closed.

    Raises:
        RuntimeError: the loop is not gated, so that the server would bypass the handoff.
        LookupError: the ``Ecdysis`` was not entered.
    """

    def __init__(self, ecdysis: Ecdysis, say_farewell: Callable[[], None] | None = None) -> None:
        if not is_on_trio() and not hasattr(sys.modules["asyncio"].get_running_loop(), "ungated_create_server"):
            raise RuntimeError("this loop's servers cannot be handed over: run the program by ecdysis_async.run(main)")
        self.ecdysis = ecdysis
        self.websockets: set[Callable[[], Coroutine[Any, Any, object]]] = set()
        self.goodbyes: list[Callable[[bool], None]] = []
        self._is_late = False
        self._gate, self._tracker = active().gate, active().tracker
        self._say_farewell = say_farewell
        self._timeout = ecdysis.drain_timeout
        self._deadline = -math.inf

    async def wait_for_last_connection(self) -> None:
        """Return when this generation has left and its last connection has ended, at the deadline at the latest.

        Cancelling it leaves connections as they are.
        """
        await self.ecdysis.finished()
        self._deadline = anyio.current_time() + self._timeout
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._say_goodbye)
            with anyio.CancelScope(deadline=self._deadline + GRACE_SECONDS):
                # Before the gate has ended, one may still be accepted.
                while self._gate.state is not GateState.ENDED or len(self._tracker):
                    for say_goodbye in self.goodbyes:
                        say_goodbye(self._is_late)
                    await anyio.sleep(STEP_SECONDS)
            task_group.cancel_scope.cancel()

    @contextlib.contextmanager
    def ending(self) -> Iterator[Callable[[], None]]:
        """Cancel a server's own shutdown when its time is up, whatever it waits for.

        Yields what is to be called when that shutdown begins.
        """
        with anyio.CancelScope() as scope:

            def begin() -> None:
                scope.deadline = max(self._deadline, anyio.current_time() + GRACE_SECONDS)

            yield begin
        if scope.cancelled_caught:
            log.warning("the server, or the shutdown of its application, does not end: it is not waited for any longer")

    async def _say_goodbye(self) -> None:
        async with anyio.create_task_group() as closing:
            with contextlib.suppress(DrainInterrupt):
                await self.ecdysis.until_draining(self._close_one_by_one(closing))
            self._is_late = True
            if self._say_farewell is not None:
                self._say_farewell()
            while True:
                # All that are left, and those that are opened even now.
                self._close(closing, len(self.websockets))
                await anyio.sleep(STEP_SECONDS)

    async def _close_one_by_one(self, closing: TaskGroup) -> None:
        """Close WebSockets evenly over the time there is: all at once, their clients would come back all at once."""
        end = self._deadline - min(ANSWER_SECONDS, self._timeout * ANSWER_SHARE)
        due = 0.0
        while True:
            await anyio.sleep(STEP_SECONDS)
            # Those that can move are gone soon.
            if self._tracker.is_sweeping:
                continue
            due += len(self.websockets) / max(1.0, (end - anyio.current_time()) / STEP_SECONDS)
            number = min(int(due), len(self.websockets))
            self._close(closing, number)
            due -= number

    def _close(self, closing: TaskGroup, number: int) -> None:
        for _ in range(number):
            closing.start_soon(self.websockets.pop())
