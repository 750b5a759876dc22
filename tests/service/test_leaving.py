"""The way out, step by step: who is told, whom it waits for, what becomes of the sockets."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from ecdysis_async._connections.connection import Connection
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._service.leaving import Leaving, first_of
from ecdysis_async._service.life import Stop
from ecdysis_async._sockets.addresses import Unix
from ecdysis_async.report import Outcome, State
from tests.planes import turn
from tests.service.lives import a_life


async def test_a_stop_begins_to_drain_at_once_and_says_so(backend: str) -> None:
    async with a_life() as (life, management):
        life.state = State.SERVING
        leaving = Leaving(life)
        leaving.stop()
        assert (life.state, life.stop) == (State.DRAINING, Stop.ASKED)
        assert life.leaving.is_set()
        assert life.plane.tracker.draining.is_set()
        leaving.stop(Stop.PARTIAL)
        assert life.stop is Stop.ASKED
        assert management.told == ["leaving"]
        assert not life.body.cancel_called


async def test_a_partial_stop_leaves_it_to_the_application_to_say_so(backend: str) -> None:
    async with a_life() as (life, management):
        life.state = State.SERVING
        Leaving(life).stop(Stop.PARTIAL)
        assert management.told == ["leaving partially"]


async def test_a_stop_before_it_serves_cuts_the_start_short(backend: str) -> None:
    async with a_life() as (life, _):
        Leaving(life).stop()
        assert life.body.cancel_called
        assert life.state is State.DRAINING


async def test_a_stop_during_a_restart_waits_for_what_becomes_of_it(backend: str) -> None:
    async with a_life() as (life, management):
        life.state = State.SERVING
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        Leaving(life).stop()
        assert (life.state, life.stop) == (State.SERVING, Stop.ASKED)
        assert management.told == []


async def test_a_successor_goes_on_so_nobody_is_told_that_the_service_stops(backend: str) -> None:
    async with a_life() as (life, management):
        life.state = State.PAUSED
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        life.handover.report.outcome = Outcome.SETTLED
        Leaving(life).begin()
        assert life.plane.tracker.moves
        assert management.told == []


async def test_the_application_hears_of_it_before_its_connections_have_drained(backend: str) -> None:
    async with a_life(drain_timeout=600) as (life, _):
        life.state = State.SERVING
        leaving = Leaving(life)
        connection = Connection()
        life.plane.tracker.open(connection)
        life.task_group.start_soon(leaving.run)
        with anyio.fail_after(60):
            leaving.begin()
            await life.finished.wait()
            await turn()
            assert not life.drained.is_set()
            life.plane.tracker.close(connection)
            await life.drained.wait()


@pytest.mark.parametrize("has_served", [True, False])
async def test_the_end_of_the_block(backend: str, *, has_served: bool, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with a_life(drain_timeout=0) as (life, management):
        life.plane.registry.obtain(Unix(str(path)))
        life.state = State.SERVING if has_served else State.STARTING
        leaving = Leaving(life)
        life.task_group.start_soon(leaving.run)
        with anyio.fail_after(60):
            assert await leaving.finish(None) is None
        steps = ["leaving", "outlived the others", "withdraw", "leave to the next start", "finish"]
        assert management.told == [step for step in steps if has_served or step != "leave to the next start"]
        assert not path.exists()


async def test_a_failure_is_said_first_and_keeps_what_a_next_start_may_want(backend: str) -> None:
    async with a_life(drain_timeout=0) as (life, management):
        life.state = State.SERVING
        leaving = Leaving(life)
        life.task_group.start_soon(leaving.run)
        with anyio.fail_after(60):
            await leaving.finish(RuntimeError("no database"))
        assert management.told[0] == "failed: generation 1 has failed: RuntimeError('no database')"
        assert "leave to the start after a failure" in management.told


async def test_what_a_successor_has_is_not_removed_from_its_path(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with a_life(drain_timeout=0) as (life, management):
        life.plane.registry.obtain(Unix(str(path)))
        life.state = State.PAUSED
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        life.handover.state = PredecessorState.SETTLED
        life.handover.report.outcome = Outcome.SETTLED
        life.handover.over.set()
        leaving = Leaving(life)
        life.task_group.start_soon(leaving.run)
        with anyio.fail_after(60):
            await leaving.finish(None)
        assert management.told == [
            "restart settled",
            "withdraw for a successor",
            "finish",
        ]
        assert path.exists()
    os.unlink(path)


async def test_the_first_of_several_events(backend: str) -> None:
    events = [anyio.Event(), anyio.Event()]
    events[1].set()
    with anyio.fail_after(60):
        await first_of(*events)
