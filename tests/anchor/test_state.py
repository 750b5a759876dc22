"""What an anchor knows, and that the code of another release reads it and is read."""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any

import anyio
import pytest

from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._anchor.pool import Slot
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import AnchorState, Life, RollOutStage, Turn, TurnState, wait_until
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.channel import encode
from ecdysis_async._management.changes import Changes
from ecdysis_async._system.launch import Launch
from ecdysis_async.report import State
from tests.anchor.puppets import make_report, stage

# What the release before this format's last change to the code wrote and read: no key may go, or mean something else.
KEYS = {"crew", "generation", "planned_workers", "begun", "upgrades", "description", "last_report"}
WORKER_KEYS = {
    "slot",
    "generation",
    "process",
    "pidfd",
    "line",
    "pending",
    "born",
    "starter",
    "pid",
    "state",
    "connections",
    "requests",
    "rss",
    "request_limit",
    "served_since",
    "is_told_to_leave",
    "environment",
}


def make_config(workers: int = 1) -> AnchorConfig:
    return AnchorConfig({}, workers=workers)


def own(body: dict[str, Any]) -> dict[str, Any]:
    """Return the state as another process has it: as JSON, and with descriptors of its own."""
    body = json.loads(json.dumps(body))
    for each in body["crew"]["workers"]:
        each["pidfd"], each["line"] = os.dup(each["pidfd"]), os.dup(each["line"])
    return body


def close(state: AnchorState) -> None:
    for worker in state.pool:
        worker.link.close()
        worker.process.close()


def test_it_is_restored_as_it_was() -> None:
    with stage(2) as here:
        first, second = here.state.pool
        first.requests, first.environment, first.request_limit = 7, {"A": "b"}, 12
        first.rss, first.connections, first.pid = 1000, 3, 77
        second.starter, second.state, second.served_since = first, State.STARTING, math.nan
        here.state.pool.slots[0].failures, here.state.pool.slots[0].retry_at = 1, 9.0
        here.state.generation, here.state.description, here.state.last_report = 4, "an app", make_report()
        body, descriptors = here.state.describe()
        assert set(descriptors) == {
            n for worker in here.state.pool for n in (worker.process.pidfd, worker.link.fileno())
        }
        restored = AnchorState.restore(here.state.config, own(body))
        try:
            assert restored.life is Life.SERVING
            assert restored.has_served
            assert (restored.generation, restored.description, restored.upgrades) == (4, "an app", 1)
            assert restored.begun == here.state.begun
            assert restored.last_report == here.state.last_report
            assert [(slot.index, slot.failures, slot.retry_at) for slot in restored.pool.slots] == [
                (0, 1, 9.0),
                (1, 0, 0.0),
            ]
            twin, other = restored.pool
            for name in ("generation", "born", "pid", "state", "connections", "requests", "rss", "environment"):
                assert getattr(twin, name) == getattr(first, name)
            assert (twin.request_limit, twin.served_since) == (12, 0.0)
            assert other.starter is twin
            assert other.request_limit == math.inf
            assert math.isnan(other.served_since)
            assert not os.get_inheritable(twin.link.fileno())
        finally:
            close(restored)


def test_how_to_start_a_former_release_again_travels_with_it() -> None:
    with stage(1) as here:
        worker = here.state.pool.slots[0].workers[0]
        worker.launch = here.state.former_release = Launch(("/srv/1/serve", "-v"), "/srv/1", {"A": "b"})
        restored = AnchorState.restore(make_config(), own(here.state.describe()[0]))
        try:
            assert restored.former_release == worker.launch
            assert next(iter(restored.pool)).launch == worker.launch
        finally:
            close(restored)


def test_every_key_is_written_that_a_release_has_read() -> None:
    with stage(1) as here:
        body, _ = here.state.describe()
    assert body.keys() >= KEYS
    assert body["crew"].keys() == {"target", "slots", "workers"}
    assert body["crew"]["slots"] == [{"index": 0, "failures": 0, "retry_at": 0.0}]
    assert body["crew"]["workers"][0].keys() >= WORKER_KEYS
    assert body["crew"]["workers"][0]["state"] == "serving"


def test_what_a_later_release_adds_is_no_matter() -> None:
    with stage(1) as here:
        body, _ = here.state.describe()
        body["crew"]["workers"][0]["mood"] = "good"
        close(AnchorState.restore(here.state.config, own({**body, "weather": "fair"})))


@pytest.mark.parametrize(("planned", "target"), [(1, 5), (3, 3)], ids=["unchanged", "changed"])
def test_signals_have_set_the_number_of_workers_unless_it_is_configured_anew(planned: int, target: int) -> None:
    with stage(1) as here:
        here.state.pool.target = 5
        body, _ = here.state.describe()
        restored = AnchorState.restore(make_config(planned), own(body))
        close(restored)
    assert restored.pool.target == target


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_state_without_a_key_is_not_restored(key: str) -> None:
    body, _ = AnchorState.fresh(make_config()).describe()
    del body[key]
    with pytest.raises(KeyError):
        AnchorState.restore(make_config(), body)


def test_words_that_were_not_heard_travel_with_it() -> None:
    with stage(1) as here:
        (worker,) = here.state.pool
        word = encode("beat", {"pid": 1}, 0)
        half = word[: len(word) // 2]
        worker.link.resume(word + half)
        body, _ = here.state.describe()
        restored = AnchorState.restore(here.state.config, own(body))
        (twin,) = restored.pool
        try:
            assert twin.link.pending == word + half
        finally:
            close(restored)


@pytest.mark.parametrize("life", Life)
def test_a_life_that_ends(life: Life) -> None:
    state = AnchorState.fresh(make_config())
    assert state.life is Life.STARTING
    state.life = life
    assert state.is_stopping == (life is Life.STOPPING)
    assert state.is_leaving == (life in (Life.STOPPING, Life.LAME_DUCK))


def test_a_roll_out_rolls_until_it_is_over() -> None:
    state = AnchorState.fresh(make_config())
    assert not state.is_rolling
    state.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
    for stage_of, rolls in zip(RollOutStage, (True, True, False, False), strict=True):
        state.roll_out.stage = stage_of
        assert state.is_rolling == rolls
    turns = [Turn(Slot(0), TurnState.SERVED), Turn(Slot(1), TurnState.UNDER_WAY), Turn(Slot(2))]
    assert state.roll_out.current is None
    state.roll_out.turns = turns
    assert state.roll_out.current is turns[1]


@pytest.mark.parametrize("where", [None, *PredecessorState])
def test_a_turn_is_committed_from_the_word_to_accept_on(where: PredecessorState | None) -> None:
    with stage(1) as here:
        slot = here.state.pool.slots[0]
        (worker,) = slot.workers
        puppet = here.add_worker(slot)
        puppet.stand(where)
        assert not Turn(slot).is_committed
        assert not Turn(slot, old=worker).is_committed
        is_committed = Turn(slot, old=puppet.worker).is_committed
    assert is_committed == (where in (PredecessorState.COMMITTING, PredecessorState.PROBATION))


@pytest.mark.backends("asyncio", "trio")
async def test_who_waits_looks_again_at_each_change() -> None:
    changes = Changes()
    seen: list[int] = []

    def is_so() -> bool:
        seen.append(len(seen))
        return len(seen) > 2

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(wait_until, changes, is_so)
            while len(seen) < 3:
                await anyio.wait_all_tasks_blocked()
                changes.announce()
        with contextlib.suppress(TimeoutError), anyio.fail_after(0):
            await wait_until(changes, lambda: False)
            raise AssertionError
    assert seen == [0, 1, 2]
