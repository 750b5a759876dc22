"""One side of a restart: a machine of ``protocol.py`` with its queue of events and its timer.

What an event is and what an action does is the business of the two sides, in ``predecessor.py`` and ``successor.py``.
"""

from __future__ import annotations

import abc
import math
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Generic, TypeVar

import anyio

from ecdysis_async._ipc.channel import Frame
from ecdysis_async.errors import ChannelError, GarbledFrame

from .generation import Generation
from .protocol import (
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    SuccessorAction,
    SuccessorEvent,
    SuccessorState,
    Timer,
)

__all__ = ["ALL_COUNTERS", "COUNTERS", "ERROR_BYTES", "HandoffSide", "as_channel_error"]

# How much of a traceback travels, bytes: its end.
ERROR_BYTES = 64 * 1024

# Connections opened and closed (see Tracker.share), in the order of bytes of this machine.
COUNTERS: Final = struct.Struct("@QQ")
# The same, and how many requests the successor has told somebody of, which a release before this one does not write.
ALL_COUNTERS: Final = struct.Struct("@QQQ")

State = TypeVar("State", bound=PredecessorState | SuccessorState)
Event = TypeVar("Event", bound=PredecessorEvent | SuccessorEvent)
Action = TypeVar("Action", bound=PredecessorAction | SuccessorAction)


class HandoffSide(abc.ABC, Generic[State, Event, Action]):
    """A machine with its queue of events and its timer."""

    timed_out: Event
    failed: Event
    limits: Mapping[Timer, float]

    def __init__(
        self, state: State, step: Callable[[State, Event], tuple[State, tuple[Action, ...]]], generation: Generation
    ) -> None:
        self.state: State = state
        self.over = anyio.Event()
        self.generation = generation
        self.log = generation.log
        self._step = step
        self._events: deque[tuple[Event, object]] = deque()
        self._wakeup = anyio.Event()

    def post(self, event: Event, cause: object = None) -> None:
        """Let an event happen, after those that were posted before. Harmless once the restart is over."""
        self._events.append((event, cause))
        self._wakeup.set()

    async def advance(self) -> None:
        """Run the machine until its state is final."""
        timer: Timer | None = None
        deadline = math.inf
        try:
            while not self.state.final:
                if self.state.timer is not timer:
                    timer = self.state.timer
                    deadline = anyio.current_time() + self.limits[timer] if timer is not None else math.inf
                event, cause = await self._next(deadline)
                if not await self.before_event(event, cause):
                    continue
                before = self.state
                self.state, actions = self._step(before, event)
                self.changed(before, event, cause)
                for action in actions:
                    try:
                        await self.perform(action)
                    except Exception as error:
                        # No descriptors, no memory: whatever it is, it fails this restart and not the service.
                        self.log.exception("%s failed", action.value)
                        self.post(self.failed, error)
            await self.conclude()
        finally:
            # Set it after the last action: a caller that is woken by a failure finds this side accepting again.
            self.over.set()

    async def before_event(self, event: Event, cause: object) -> bool:
        """Prepare for an event; return False where another one, which is on its way, must come first."""
        return True

    async def conclude(self) -> None:
        """Wait for what the final state has set going."""

    @abc.abstractmethod
    def changed(self, before: State, event: Event, cause: object) -> None:
        """Take note of what an event has led to, before its actions are carried out."""

    @abc.abstractmethod
    async def perform(self, action: Action) -> None:
        """Carry out one action. What it leads to comes back as an event; so does an exception, as ``failed``."""

    async def _next(self, deadline: float) -> tuple[Event, object]:
        with anyio.CancelScope(deadline=deadline):
            while not self._events:
                self._wakeup = anyio.Event()
                await self._wakeup.wait()
        return self._events.popleft() if self._events else (self.timed_out, None)


def as_channel_error(error: Exception, frame: Frame) -> ChannelError:
    """Return what is wrong with a message as an error of its channel."""
    if isinstance(error, ChannelError):
        return error
    garbled = GarbledFrame(f"the message {frame.type!r} is not what it should be: {error!r}")
    garbled.__cause__ = error
    return garbled
