"""A machine with its queue of events and its timer, run on every loop."""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from ecdysis_async._handoff.protocol import (
    PredecessorAction,
    PredecessorEvent,
    PredecessorState,
    Timer,
    step_predecessor,
)
from ecdysis_async._handoff.side import HandoffSide, as_channel_error
from ecdysis_async._ipc.channel import Frame
from ecdysis_async.errors import GarbledFrame, TruncatedFrame
from tests.handoff.scripted import a_generation


class Side(HandoffSide[PredecessorState, PredecessorEvent, PredecessorAction]):
    """Notes what it is told, and fails at what it shall."""

    timed_out = PredecessorEvent.TIMED_OUT
    failed = PredecessorEvent.BROKEN
    limits: Mapping[Timer, float] = dict.fromkeys(Timer, 0.05)

    def __init__(self, impossible: PredecessorAction | None = None) -> None:
        with a_generation() as (generation, _):
            super().__init__(PredecessorState.SPAWNING, step_predecessor, generation)
        self.noted: list[object] = []
        self._impossible = impossible

    def changed(self, before: PredecessorState, event: PredecessorEvent, cause: object) -> None:
        self.noted.append((event.value, self.state.value, cause))

    async def perform(self, action: PredecessorAction) -> None:
        self.noted.append(action)
        if action is self._impossible:
            raise OSError("no descriptors")
        if action is PredecessorAction.END_SUCCESSOR:
            self.post(PredecessorEvent.DIED)


async def test_a_state_ends_with_its_limit(backend: str) -> None:
    side = Side()
    with anyio.fail_after(60):
        await side.advance()
    assert side.noted[0] == ("timed out", "aborting", None)
    assert (side.state, side.over.is_set()) == (PredecessorState.FAILED, True)


async def test_events_that_were_posted_before_are_handled_in_order(backend: str) -> None:
    side = Side()
    side.post(PredecessorEvent.HELLO, "first")
    side.post(PredecessorEvent.DIED, "second")
    with anyio.fail_after(60):
        await side.advance()
    assert side.noted[0] == ("hello", "initialising", "first")
    assert ("died", "failed", "second") in side.noted


async def test_an_action_that_is_impossible_fails_the_restart_and_nothing_else(backend: str) -> None:
    side = Side(PredecessorAction.SEND_LISTENERS)
    side.post(PredecessorEvent.HELLO)
    with anyio.fail_after(60):
        await side.advance()
    events = [each[0] for each in side.noted if isinstance(each, tuple)]
    assert events[:2] == ["hello", "broken"]
    assert side.state is PredecessorState.FAILED


def test_what_is_wrong_with_a_message_is_an_error_of_its_channel() -> None:
    truncated = TruncatedFrame("half of it")
    assert as_channel_error(truncated, Frame("ready", {})) is truncated
    error = as_channel_error(KeyError("claimed"), Frame("ready", {}))
    assert type(error) is GarbledFrame
    assert "'ready' is not what it should be: KeyError('claimed')" in str(error)
