"""What an anchor tells of its service, in each state that it can be in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from ecdysis_async._anchor import status
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import Life, RollOut, RollOutStage, Turn, TurnState
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import RestartError
from ecdysis_async.report import State
from tests.anchor.puppets import Puppet, Stage, make_report, stage

pytestmark = pytest.mark.backends("asyncio")


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage(target=2) as found:
        yield found


def add(here: Stage, state: State = State.SERVING) -> Puppet:
    puppet = here.add_slot(state=state)
    assert puppet is not None
    return puppet


def roll(here: Stage, *states: TurnState) -> RollOut:
    """Let a roll-out be under way, with a turn for each slot."""
    roll_out = here.state.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
    roll_out.turns = [
        Turn(slot, state, slot.workers[0] if slot.workers else None)
        for slot, state in zip(here.state.pool.slots, states, strict=True)
    ]
    return roll_out


@pytest.mark.parametrize(
    ("life", "reason"),
    [
        (Life.STARTING, "the service is starting: 1 of 2 workers serving"),
        (Life.SERVING, None),
        (Life.UPGRADING, None),
        (Life.LAME_DUCK, "the service is about to stop"),
        (Life.STOPPING, "the service is about to stop"),
    ],
)
def test_why_it_is_not_ready(life: Life, reason: str | None, here: Stage) -> None:
    add(here)
    here.state.life = life
    assert status.why_not_ready(here.state) == reason


@pytest.mark.parametrize("state", State)
def test_it_is_ready_while_a_worker_accepts_or_is_about_to(state: State, here: Stage) -> None:
    add(here, state)
    is_ready = state in (State.WAITING, State.SERVING, State.PAUSED)
    assert status.why_not_ready(here.state) == (None if is_ready else "no worker serves: clients wait for one")


def test_a_dead_worker_accepts_nothing(here: Stage) -> None:
    add(here).worker.exit_status = 0
    assert status.why_not_ready(here.state) is not None


async def test_what_a_life_waits_for(here: Stage) -> None:
    puppet = add(here)
    state = here.state
    assert status.describe_wait(state) is None
    state.life = Life.UPGRADING
    assert status.describe_wait(state) == "the new anchor to take over"
    state.life, state.lame_duck_ends = Life.LAME_DUCK, math.inf
    assert status.describe_wait(state) == "load balancers to look elsewhere, for inf s more"
    state.lame_duck_ends = anyio.current_time() - 1
    assert status.describe_wait(state) == "load balancers to look elsewhere, for 0.0 s more"
    state.life = Life.STOPPING
    puppet.worker.pid = 77
    expected = f"pid 77 to end, with nothing left to answer (by force {state.config.settings.exit_timeout:g} s "
    assert status.describe_wait(state) == f"{expected}after the drain)"
    puppet.worker.connections = 2
    assert status.describe_wait(state) == "2 connections"


def test_it_waits_for_workers_that_are_to_serve(here: Stage) -> None:
    add(here)
    add(here, State.STARTING)
    assert status.describe_wait(here.state) == "1 of 2 workers to serve"


async def test_what_a_roll_out_waits_for(here: Stage) -> None:
    first, second = add(here), add(here)
    state = here.state
    roll_out = roll(here, TurnState.PENDING, TurnState.PENDING)
    assert status.describe_wait(state) == "the first worker's turn"
    before = roll_out.before = make_roll_out(1, "a test", is_told=False, before=None)
    assert status.describe_wait(state) == f"restart {before.report.id} to settle, whose probation this one has ended"
    roll_out.before = None
    roll_out.turns[0].state = TurnState.UNDER_WAY
    assert status.describe_wait(state) == "worker 1 of 2: its turn"
    first.stand(PredecessorState.INITIALISING)
    assert status.describe_wait(state) == f"worker 1 of 2: {PredecessorState.INITIALISING.value}"
    roll_out.turns[0].state = roll_out.turns[1].state = TurnState.SERVED
    assert status.describe_wait(state) == "the former workers to take their places again"
    roll_out.probation_ends = math.inf
    assert status.describe_wait(state) == "generation 2, on probation for inf s more"
    roll_out.stage = RollOutStage.OVER
    assert str(status.describe_wait(state)).endswith(
        " to end, with nothing left to answer (by force 10 s after the drain)"
    )
    second.worker.connections = 1
    assert status.describe_wait(state) == "1 connection"
    roll_out.stage = RollOutStage.DRAINED
    assert status.describe_wait(state) is None


async def test_what_each_worker_waits_for(here: Stage) -> None:
    puppets = [add(here) for _ in range(8)]
    puppets[7].stand(PredecessorState.PAUSING)
    states = (*TurnState, TurnState.UNDER_WAY)
    roll(here, *states)
    waits = [each["waiting_for"] for each in status.describe_waits(here.state)]
    assert waits == [
        "its turn",
        "its successor to start",
        "the end of its probation",
        None,
        None,
        None,
        "its end",
        *waits[7:],
    ]
    settled = puppets[6].worker
    settled.connections, settled.pid = 3, 4711
    assert status.describe_waits(here.state)[6] == {"slot": 6, "waiting_for": "3 connections of pid 4711"}
    here.state.life = Life.STOPPING
    assert status.describe_waits(here.state) == []


def test_one_worker_is_no_list(here: Stage) -> None:
    add(here)
    roll(here, TurnState.PENDING)
    assert status.describe_waits(here.state) == []


def test_what_systemctl_shows(here: Stage) -> None:
    add(here).worker.connections = 2
    add(here, State.STARTING)
    assert status.describe(here.state) == "generation 1: 1 of 2 workers serving, 2 connections"
    roll_out = roll(here, TurnState.PENDING, TurnState.PENDING)
    assert status.describe(here.state).endswith("; rolling out generation 2")
    roll_out.stage, roll_out.error = RollOutStage.OVER, RestartError("a broken release")
    assert "a broken release" in status.describe(here.state)


# What `ecdysis status --json` of any release reads.
KEYS = {
    "generation",
    "pid",
    "state",
    "stopping",
    "uptime",
    "connections",
    "jobs",
    "release",
    "restart_would_run",
    "unfollowed_link",
    "listeners",
    "waiting_for",
    "restart",
    "last_report",
    "anchor",
    "process",
    "exclusive",
    "draining",
    "workers",
}


async def ask(here: Stage) -> dict[str, Any]:
    described = status.describe_status(here.state, here.sockets.service.entries)
    found: dict[str, Any] = json.loads(json.dumps({**described, **await status.look_up_status(here.state)}))
    return found


@pytest.mark.parametrize(
    ("life", "state"),
    [
        (Life.STARTING, "starting"),
        (Life.SERVING, "serving"),
        (Life.UPGRADING, "serving"),
        (Life.LAME_DUCK, "serving"),
        (Life.STOPPING, "draining"),
    ],
)
async def test_the_state_of_the_whole(life: Life, state: str, here: Stage) -> None:
    add(here)
    here.state.life = life
    found = await ask(here)
    assert found["state"] == state
    assert (
        found["stopping"] == {"draining": {"phase": "draining", "ends_in": None}}.get(state) or life is Life.LAME_DUCK
    )


async def test_the_status_is_json_with_all_that_commands_know(here: Stage) -> None:
    here.sockets.service.obtain(Internet("127.0.0.1", 0), name="web")
    first, second = add(here), add(here, State.DRAINING)
    first.worker.environment, first.worker.requests, first.worker.rss = {"B": "1", "A": "2"}, 5, 1000
    second.worker.connections, second.worker.pid = 4, 77
    here.state.last_report, here.state.upgrades, here.state.upgrade_error = make_report(), 3, "not today"
    here.state.missing["the pid file"] = "full"
    found = await ask(here)
    assert found.keys() == KEYS
    assert [each["name"] for each in found["listeners"]] == ["web"]
    assert found["connections"] == 4
    assert found["anchor"] == {"upgrades": 3, "error": "not today", "missing": {"the pid file": "full"}}
    assert found["process"]["environment"] == ["A", "B"]
    assert found["draining"] == [
        {
            "generation": 1,
            "pid": 77,
            "slot": 1,
            "state": "draining",
            "connections": 4,
            "jobs": 0,
            "ends_in": None,
            "serving": [],
        }
    ]
    assert [(each["slot"], each["state"], each["requests"]) for each in found["workers"]] == [
        (0, "serving", 5),
        (1, "draining", 0),
    ]
    assert found["restart"] is None
    assert found["last_report"]["id"] == "id"
    roll_out = roll(here, TurnState.PENDING, TurnState.PENDING)
    restart = (await ask(here))["restart"]
    assert (restart["id"], restart["generation"], restart["phase"]) == (
        roll_out.report.id,
        2,
        "the first worker's turn",
    )


async def test_a_worker_that_does_not_answer_is_named_while_it_is_waited_for(here: Stage) -> None:
    puppet = add(here)
    roll(here, TurnState.UNDER_WAY)
    puppet.worker.heard_at = anyio.current_time() - 7
    wait = f"worker 0 (pid {puppet.worker.pid}) to answer, which has been silent for 7 s"
    assert status.describe_wait(here.state) == wait
    assert status.describe_status(here.state, [])["workers"][0]["silence"] >= 7
    # From then on it is not waited for any more.
    puppet.worker.is_bypassed = True
    assert status.describe_wait(here.state) == "worker 1 of 1: its turn"
