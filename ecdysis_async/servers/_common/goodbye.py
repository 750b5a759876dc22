"""How a generation says goodbye to the clients of its server: the same for every server.

Once a restart has settled, each request is still answered, and its client told to come back on a new connection.
WebSockets are closed one after the other. The drain closes the connections that are still idle shortly before its
deadline. The server shuts down when no connection is left. Nothing here knows a server.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import active
from ecdysis_async._accepting.gate import GateState
from ecdysis_async._accepting.gated_socket import confining_cancellation
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async._service.helpers import exclusive
from ecdysis_async._service.worker_exit import on_worker_exit
from ecdysis_async._system.log_files import on_reopen_logs
from ecdysis_async.errors import DrainInterrupt
from ecdysis_async.settings import WebSocketClose

from .streams import end_streams

__all__ = ["ANSWER_SECONDS", "DRAINING", "RESTARTING", "SETTLED", "Goodbye", "is_on_trio", "make_state", "say_to_one"]

DRAINING = "ecdysis.draining"
"""The key of the event that this generation leaves, in the scope's state: it has ``is_set()`` and ``wait()``."""

SETTLED = "ecdysis.settled"
"""The key of the event that this generation is final."""

EXCLUSIVE = "ecdysis.exclusive"
"""The key of what is held by one process of the whole service at a time, by its name."""

ON_REOPEN_LOGS = "ecdysis.on_reopen_logs"
ON_WORKER_EXIT = "ecdysis.on_worker_exit"
"""The key of what registers a function that opens the application's own log files anew."""

RESTARTING = 1012
"""The code that WebSockets are closed with: "Service Restart" in IANA's registry of close codes."""

# How often it is looked whether the last connection has ended, and which WebSocket is to be closed next, seconds. A
# WebSocket's connection ends without telling, because its protocol is no longer the one that was made for it. A drain
# looks for such connections as often.
STEP_SECONDS = 0.05

# How long before the deadline the last WebSocket is closed, seconds, and as a share of the whole time. Its client has
# to answer, and may be far away, or busy. A connection whose client has not answered by the deadline is reset.
ANSWER_SECONDS = 5.0
ANSWER_SHARE = 0.25

# How long a server may take for its shutdown, with the application's, if the drain has used up all of its time; and how
# far beyond its deadline a drain is waited for. Seconds.
GRACE_SECONDS = 10.0

log = logging.getLogger("ecdysis_async")

CloseWebSocket = Callable[[], Coroutine[Any, Any, object]]


def is_on_trio() -> bool:
    """Say whether trio runs, which has no loop that could be asked for a server."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def make_state(ecdysis: Ecdysis) -> Mapping[str, Any]:
    """Return what an application finds in the state of each scope, whatever serves it."""
    return {
        DRAINING: ecdysis.draining,
        SETTLED: ecdysis.settled,
        EXCLUSIVE: exclusive,
        ON_REOPEN_LOGS: on_reopen_logs,
        ON_WORKER_EXIT: on_worker_exit,
    }


class Goodbye:
    """Says goodbye to the clients of one server, once its generation leaves.

    Attributes:
        ecdysis: says when this generation leaves.
        late: set shortly before the deadline, when idle connections are to be closed.
        deadline: of the drain, by the clock of the loop, once this generation leaves.

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
        # What closes each open WebSocket, and what says whether its client is in the middle of a message.
        self._websockets: dict[CloseWebSocket, Callable[[], bool]] = {}
        self._companions: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.late = anyio.Event()
        self._gate, self._tracker = active().gate, active().tracker
        self._say_farewell = say_farewell
        self._timeout = ecdysis.drain_timeout
        self.deadline = -math.inf

    def add_websocket(self, close: CloseWebSocket, is_in_message: Callable[[], bool] = lambda: False) -> None:
        """Let a WebSocket be closed by ``close``, with ``RESTARTING``; it may take its time.

        While ``is_in_message`` says that the client has begun a message, others are closed first.
        """
        self._websockets[close] = is_in_message

    def discard_websocket(self, close: CloseWebSocket) -> None:
        """Forget a WebSocket that has ended, or is ending by itself; harmless if it was closed from here."""
        self._websockets.pop(close, None)

    def accompany(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have something run once this generation leaves; it is cancelled when the last connection has ended."""
        self._companions.append(run)

    async def wait_for_last_connection(self) -> None:
        """Return when this generation has left and its last connection has ended, at the deadline at the latest.

        Cancelling it leaves connections as they are.
        """
        await self.ecdysis.finished()
        end_streams()
        self.deadline = anyio.current_time() + self._timeout
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(self._say_goodbye)
            for run in self._companions:
                task_group.start_soon(run)
            with anyio.CancelScope(deadline=self.deadline + GRACE_SECONDS):
                # Until the gate has ended, a connection may still be accepted.
                while self._gate.state is not GateState.ENDED or len(self._tracker):  # noqa: ASYNC110 - see STEP_SECONDS
                    await anyio.sleep(STEP_SECONDS)
            task_group.cancel_scope.cancel()

    @contextlib.contextmanager
    def ending(self) -> Iterator[Callable[[], None]]:
        """Cancel a server's own shutdown when its time is up, whatever it waits for.

        Yields a function to call when that shutdown begins.
        """
        with anyio.CancelScope() as scope:

            def begin() -> None:
                scope.deadline = max(self.deadline, anyio.current_time() + GRACE_SECONDS)

            yield begin
        if scope.cancelled_caught:
            log.warning("the server, or the shutdown of its application, does not end: it is not waited for any longer")

    async def _say_goodbye(self) -> None:
        async with anyio.create_task_group() as closing:
            with contextlib.suppress(DrainInterrupt):
                await self.ecdysis.until_draining(self._close_one_by_one(closing))
            self.late.set()
            if self._say_farewell is not None:
                self._say_farewell()
            while True:
                # All that are left, and those that are still being opened.
                self._close(closing, list(self._websockets))
                await anyio.sleep(STEP_SECONDS)

    async def _close_one_by_one(self, closing: TaskGroup) -> None:
        """Close WebSockets evenly over the time there is, or all of them now where their clients belong together.

        Otherwise all of their clients would come back at once. Those whose client is in the middle of a message stay,
        to the end of the drain where it does not end.
        """
        end = self.deadline - min(ANSWER_SECONDS, self._timeout * ANSWER_SHARE)
        is_together = self.ecdysis.websocket_close is WebSocketClose.TOGETHER
        due = 0.0
        while True:
            await anyio.sleep(STEP_SECONDS)
            # WebSockets that can move are gone soon.
            if self._tracker.is_sweeping:
                continue
            left = 1.0 if is_together else max(1.0, (end - anyio.current_time()) / STEP_SECONDS)
            due += len(self._websockets) / left
            number = min(int(due), len(self._websockets))
            idle = (close for close, is_in_message in self._websockets.items() if not is_in_message())
            self._close(closing, list(itertools.islice(idle, number)))
            due -= number

    def _close(self, closing: TaskGroup, those: Iterable[CloseWebSocket]) -> None:
        for close in those:
            del self._websockets[close]
            closing.start_soon(say_to_one, close)


async def say_to_one(say: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Say goodbye to one client. Whatever fails in that costs no other client anything: the deadline ends this one."""
    try:
        # A server may await tasks of its own that have been cancelled.
        with confining_cancellation():
            await say()
    except Exception:
        log.exception("a client could not be told that this generation leaves: its connection has until the deadline")
