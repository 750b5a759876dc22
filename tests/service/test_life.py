"""What follows from where a generation stands."""

from __future__ import annotations

import pytest

from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async.report import Outcome, State
from tests.service.lives import a_life


@pytest.mark.backends("asyncio")
async def test_what_each_state_means(backend: str) -> None:
    meanings = {}
    async with a_life() as (life, _):
        for life.state in State:
            meanings[life.state] = life.has_begun, life.is_accepting, life.is_leaving
    assert meanings == {
        State.STARTING: (False, False, False),
        State.WAITING: (False, False, False),
        State.SERVING: (True, True, False),
        State.PAUSED: (True, True, False),
        State.DRAINING: (True, False, True),
        State.ENDED: (True, False, True),
    }


@pytest.mark.backends("asyncio")
async def test_a_successor_is_one_whose_restart_has_settled(backend: str) -> None:
    async with a_life() as (life, _):
        assert not life.has_successor
        life.handover = PredecessorSide(life.generation, lambda handover: None)
        for outcome in Outcome:
            life.handover.report.outcome = outcome
            assert life.has_successor == (outcome is Outcome.SETTLED)
