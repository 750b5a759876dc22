"""When a restart can begin, and what each change of it means for the generation. Real ones are in tests/scenarios."""

from __future__ import annotations

import dataclasses
import os

import anyio
import pytest

from ecdysis_async._accepting.gate import GateState
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorEvent, PredecessorState
from ecdysis_async._service.leaving import Leaving
from ecdysis_async._service.life import Life, Stop
from ecdysis_async._service.restarts import Restarts
from ecdysis_async.errors import (
    NotReady,
    RestartInProgress,
    RestartUnsupported,
    RestartWhileDraining,
    SpawnFailed,
    SuccessorFailed,
)
from ecdysis_async.report import Outcome, State
from tests.planes import turn
from tests.service.lives import a_life


def count_reserve(life: Life) -> int:
    return len(life.reserve._descriptors)


def restarts_of(life: Life) -> Restarts:
    return Restarts(life, Leaving(life))


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (State.STARTING, NotReady),
        (State.WAITING, NotReady),
        (State.DRAINING, RestartWhileDraining),
        (State.ENDED, RestartWhileDraining),
    ],
)
@pytest.mark.backends("asyncio")
async def test_only_a_generation_that_serves_can_be_restarted(
    backend: str, state: State, error: type[Exception]
) -> None:
    async with a_life() as (life, _):
        life.state = state
        with pytest.raises(error):
            restarts_of(life).begin()
        assert life.handover is None


@pytest.mark.backends("asyncio")
async def test_one_at_a_time(backend: str) -> None:
    async with a_life() as (life, _):
        life.state = State.SERVING
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        with pytest.raises(RestartInProgress, match=life.handover.report.id):
            restarts_of(life).begin()


@pytest.mark.backends("asyncio")
async def test_the_first_process_of_a_container_must_not_leave(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_life() as (life, _):
        life.state = State.SERVING
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RestartUnsupported, match="ecdysis run"):
            restarts_of(life).begin()


async def test_one_that_cannot_start_changes_nothing(backend: str) -> None:
    async with a_life(command=["/does/not/exist"]) as (life, management):
        life.state = State.SERVING
        with anyio.fail_after(60), pytest.raises(SpawnFailed):
            await restarts_of(life).restart("serving")
        assert life.state is State.SERVING
        assert life.last_report is not None
        assert life.last_report.outcome is Outcome.FAILED
        await life.handed_over.wait()
        await turn()
        assert management.told[-1] == "serving"


async def test_a_restart_right_behind_one_that_failed_is_left_alone_by_that_one(backend: str) -> None:
    """What follows from the failure is done once the last words of its successor are passed on, which takes a while."""
    async with a_life(command=["/bin/sh", "-c", "exit 3"]) as (life, management):
        life.state = State.SERVING
        with anyio.fail_after(60):
            first = restarts_of(life).begin()
            first_ended = life.handed_over
            await first.over.wait()
            assert isinstance(first.error, SuccessorFailed)
            life.generation.settings = dataclasses.replace(life.generation.settings, command=("sleep", "600"))
            second = restarts_of(life).begin()
            await first_ended.wait()
            await turn()
            assert not second.over.is_set()
            assert not life.handed_over.is_set()
            assert "serving" not in management.told
            assert count_reserve(life) == 0
            second.post(PredecessorEvent.CANCELLED)
            await life.handed_over.wait()
            await turn()
            assert management.told[-1] == "serving"
            assert count_reserve(life) > 0


MEANINGS = {
    PredecessorState.SPAWNING: State.SERVING,
    PredecessorState.INITIALISING: State.SERVING,
    PredecessorState.PAUSING: State.PAUSED,
    PredecessorState.COMMITTING: State.PAUSED,
    PredecessorState.PROBATION: State.PAUSED,
    PredecessorState.ABORTING: State.SERVING,
    PredecessorState.RECALLING: State.PAUSED,
    PredecessorState.REVERTING: State.PAUSED,
    PredecessorState.STOPPING: State.DRAINING,
    PredecessorState.SETTLED: State.DRAINING,
    PredecessorState.FAILED: State.SERVING,
    PredecessorState.ROLLED_BACK: State.SERVING,
    PredecessorState.STOPPED: State.DRAINING,
}


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("state", PredecessorState)
@pytest.mark.parametrize("stop", Stop)
async def test_what_a_change_of_the_handoff_means(backend: str, state: PredecessorState, stop: Stop) -> None:
    async with a_life() as (life, management):
        life.state = State.SERVING
        life.stop = stop
        handover = PredecessorSide(life.generation, lambda handover: None)
        life.handover = handover
        handover.state = state
        restarts_of(life)._on_handover(handover)
        # A restart that is over has not heard of a stop that came in the same moment.
        is_over_and_stopped = state.final and stop is not Stop.NOT_ASKED
        assert life.state is (State.DRAINING if is_over_and_stopped else MEANINGS[state])
        assert management.told[-1] == f"restart {state.value}"


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize("state", PredecessorState)
async def test_a_generation_whose_place_another_process_has_does_not_come_back(
    backend: str, state: PredecessorState
) -> None:
    async with a_life() as (life, _):
        life.state = State.SERVING
        leaving = Leaving(life)
        handover = PredecessorSide(life.generation, lambda handover: None)
        life.handover = handover
        await life.plane.gate.open()
        await life.generation.host.pause(lambda entry: False)
        leaving.leave_place()
        handover.state = state
        Restarts(life, leaving)._on_handover(handover)
        assert life.state is State.DRAINING
        await life.generation.host.resume()
        assert life.plane.gate.state is GateState.CLOSED


async def test_waiting_for_a_restart_says_what_became_of_it(backend: str) -> None:
    async with a_life() as (life, _):
        life.state = State.SERVING
        restarts = restarts_of(life)
        handover = PredecessorSide(life.generation, lambda handover: None)
        with anyio.fail_after(60):
            handover.serving.set()
            assert await restarts.see_through(handover, "serving") is handover.report
            handover.report.outcome = Outcome.STOPPED
            handover.over.set()
            with pytest.raises(RestartWhileDraining, match="was stopped"):
                await restarts.see_through(handover, "settled")
            handover.error = SpawnFailed("there is no such command")
            with pytest.raises(SpawnFailed, match="no such command"):
                await restarts.see_through(handover, "settled")


async def test_a_cancelled_restart_is_called_off(backend: str) -> None:
    async with a_life(command=["/does/not/exist"]) as (life, _):
        life.state = State.SERVING
        with anyio.CancelScope() as scope:
            scope.cancel()
            await restarts_of(life).restart("serving")
        assert life.handover is not None
        assert (PredecessorEvent.CANCELLED, None) in life.handover._events
        with anyio.fail_after(60):
            await life.handed_over.wait()
