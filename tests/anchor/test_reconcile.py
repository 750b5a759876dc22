"""Who is filled, retired, replaced or ended, and when."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from ecdysis_async._anchor.config import BEAT_SECONDS, AnchorConfig
from ecdysis_async._anchor.hanging import LINGER_SECONDS
from ecdysis_async._anchor.pool import FIRST_BACKOFF_SECONDS, ReplaceReason, SlotActivity
from ecdysis_async._anchor.reconcile import (
    BEATS_PER_WATCHDOG,
    SILENT_SECONDS,
    SILENT_SHARE,
    Reconciler,
    find_beat_seconds,
)
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import Life, RollOutStage
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._management.ledger import WorkerRestart
from ecdysis_async.errors import RestartError
from ecdysis_async.report import State
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Puppet, Stage, sleeping_process, stage

pytestmark = pytest.mark.backends("asyncio")

NOW = 1000.0


def make_reconciler(here: Stage, watchdog: float | None = None) -> Reconciler:
    return Reconciler(
        here.state,
        here.sockets,
        here.log,
        begin=here.begun,
        fill=here.fill,
        bypass=here.hung_workers.bypass,
        watchdog=watchdog,
    )


@pytest.fixture
def three() -> Iterator[Stage]:
    with stage(3, max_rss=1000) as here:
        yield here


def test_a_service_as_it_shall_be_is_left_alone(three: Stage) -> None:
    assert make_reconciler(three).reconcile(NOW) == math.inf
    assert three.begun.calls == []


def test_missing_slots_are_added_and_filled() -> None:
    with stage(1, target=3) as here:
        make_reconciler(here).reconcile(NOW)
        slots = here.state.pool.slots
        assert [arguments for _, arguments in here.begun.calls] == [(slots[1],), (slots[2],)]
        assert [slot.activity for slot in slots] == [SlotActivity.NONE, SlotActivity.FILLING, SlotActivity.FILLING]
        # What is under way is not begun again.
        make_reconciler(here).reconcile(NOW)
        assert here.begun.names == ["refill", "refill"]


@pytest.mark.parametrize("state", State)
def test_a_slot_is_filled_where_its_worker_will_never_accept_again(state: State) -> None:
    with stage(target=1) as here:
        here.add_slot(state=state)
        make_reconciler(here).reconcile(NOW)
        assert here.begun.names == (["refill"] if state in (State.DRAINING, State.ENDED) else [])


def test_a_slot_whose_worker_has_crashed_waits_for_its_time() -> None:
    with stage(target=2) as here:
        for pause in (3.0, 5.0):
            here.add_slot(state=None)
            here.state.pool.slots[-1].retry_at = NOW + pause
        reconciler = make_reconciler(here)
        assert reconciler.reconcile(NOW) == 3.0
        assert here.begun.calls == []
        assert reconciler.reconcile(NOW + 3) == 2.0
        assert here.begun.names == ["refill"]


def test_the_last_slots_retire(three: Stage) -> None:
    three.state.pool.target = 1
    make_reconciler(three).reconcile(NOW)
    slots = three.state.pool.slots
    assert [arguments for _, arguments in three.begun.calls] == [(slots[1],), (slots[2],)]
    assert slots[0].activity is SlotActivity.NONE
    assert {slot.activity for slot in slots[1:]} == {SlotActivity.RETIRING}
    # A slot that retires does not count: a target raised again is reached by another one.
    three.state.pool.target = 2
    make_reconciler(three).reconcile(NOW)
    assert three.begun.names == ["retire", "retire"]


def test_a_slot_in_which_something_is_done_does_not_retire_yet(three: Stage) -> None:
    three.state.pool.target = 2
    three.state.pool.slots[2].activity = SlotActivity.REPLACING
    make_reconciler(three).reconcile(NOW)
    assert three.begun.calls == []


def test_one_worker_at_a_time_is_replaced(three: Stage) -> None:
    for worker in three.state.pool:
        worker.rss = 2000
    reconciler = make_reconciler(three)
    for _ in range(2):
        assert reconciler.reconcile(NOW) == math.inf
        assert three.begun.names == ["replace"]
    slots = three.state.pool.slots
    assert [slot.activity for slot in slots] == [SlotActivity.REPLACING, SlotActivity.NONE, SlotActivity.NONE]


def test_a_worker_that_could_not_be_replaced_waits_and_another_has_its_turn(three: Stage) -> None:
    for worker in three.state.pool:
        worker.rss = 2000
    slots = three.state.pool.slots
    slots[0].retry_at = NOW + 7
    make_reconciler(three).reconcile(NOW)
    assert [slot.activity is SlotActivity.REPLACING for slot in slots] == [False, True, False]
    for slot in slots:
        slot.activity, slot.retry_at = SlotActivity.NONE, NOW + 7
    assert make_reconciler(three).reconcile(NOW) == 7


@pytest.mark.parametrize(
    ("requests", "rss", "reason"),
    [
        (9, 1000, None),
        (10, None, ReplaceReason.REQUESTS),
        (10, 1001, ReplaceReason.REQUESTS),
        (0, 1001, ReplaceReason.MEMORY),
    ],
)
def test_why_a_worker_is_replaced(requests: int, rss: int | None, reason: ReplaceReason | None, three: Stage) -> None:
    (worker, *_) = three.state.pool
    worker.request_limit, worker.requests, worker.rss = 10, requests, rss
    assert worker.find_replace_reason(1000) is reason
    if reason is ReplaceReason.MEMORY:
        assert worker.find_replace_reason(None) is None
    worker.state = State.DRAINING
    assert worker.find_replace_reason(1000) is None


@pytest.mark.parametrize("life", Life)
def test_nothing_begins_that_an_upgrade_or_a_stop_would_wait_for(life: Life) -> None:
    with stage(target=1) as here:
        here.state.life = life
        make_reconciler(here).reconcile(NOW)
        assert here.begun.names == ([] if life in (Life.UPGRADING, Life.STOPPING) else ["refill"])


@pytest.mark.parametrize("roll_out_stage", RollOutStage)
def test_a_roll_out_looks_after_the_workers_itself(roll_out_stage: RollOutStage) -> None:
    with stage(target=1) as here:
        here.state.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
        here.state.roll_out.stage = roll_out_stage
        make_reconciler(here).reconcile(NOW)
        assert here.begun.names == (["refill"] if roll_out_stage >= RollOutStage.OVER else [])


async def test_a_slot_goes_with_its_worker() -> None:
    with stage(2, target=1) as here:
        leaving = here.state.pool.slots[1]
        puppet = Puppet(leaving.workers[0].process)
        try:
            leaving.workers[:] = [puppet.worker]
            make_reconciler(here).reconcile(NOW)
            with anyio.fail_after(60):
                async with anyio.create_task_group() as task_group:
                    task_group.start_soon(here.begun.run)
                    assert (await puppet.hear()).type == FromAnchor.STOP
                    assert puppet.worker.is_told_to_leave
                    assert leaving in here.state.pool.slots
                    here.kill(puppet)
            assert [slot.index for slot in here.state.pool.slots] == [0]
        finally:
            puppet.close()


async def test_a_worker_that_does_not_start_is_tried_again_later(caplog: pytest.LogCaptureFixture) -> None:
    with stage(target=1) as here:
        here.failure = RestartError("no such module")
        reconciler = make_reconciler(here)
        reconciler.reconcile(anyio.current_time())
        (slot,) = here.state.pool.slots
        await here.begun.run()
        slot.activity = SlotActivity.NONE
        assert here.filled == [(0, 1)]
        assert slot.failures == 1
        assert 0 < reconciler.reconcile(slot.retry_at - FIRST_BACKOFF_SECONDS) <= FIRST_BACKOFF_SECONDS
    assert "worker 0 does not start" in caplog.text
    assert "no such module" in caplog.text


async def test_a_worker_is_replaced_by_a_handoff_within_its_generation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with stage(target=1, max_rss=1000) as here:
        puppet = here.add_slot()
        assert puppet is not None
        puppet.worker.rss = 2_000_000
        make_reconciler(here).reconcile(NOW)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(here.begun.run)
                asked = await puppet.hear()
                assert (asked.type, asked.body["generation"]) == (FromAnchor.RESTART, 1)
                puppet.stand()
                here.state.changes.announce()
                assert (await puppet.hear()).type == FromAnchor.SETTLE
                puppet.stand(is_over=True)
                here.state.changes.announce()
        (slot,) = here.state.pool.slots
        assert (slot.activity, slot.failures) == (SlotActivity.NONE, 0)
        assert here.state.ledger.worker_restarts[WorkerRestart.MAX_RSS] == 1
    assert "is replaced: it has 2 MB resident (--max-rss)" in caplog.text
    assert f"worker 0 is served by pid {puppet.worker.pid}" in caplog.text


async def test_a_worker_that_cannot_be_replaced_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with stage(target=1, max_rss=1) as here:
        puppet = here.add_slot()
        assert puppet is not None
        puppet.worker.rss = 2
        make_reconciler(here).reconcile(NOW)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(here.begun.run)
                await puppet.hear()
                puppet.stand(is_over=True, error=RestartError("a broken release"))
                here.state.changes.announce()
        (slot,) = here.state.pool.slots
        assert (slot.activity, slot.failures) == (SlotActivity.NONE, 1)
    assert "worker 0 could not be replaced, and goes on: a broken release" in caplog.text


def test_a_worker_that_is_silent_for_too_long_hangs() -> None:
    with stage(hang_timeout=2) as here:
        for state in State:
            puppet = here.add_slot(state=state)
            assert puppet is not None
            puppet.worker.connections = 1
        # It has drained, and its application shuts down.
        here.add_slot(state=State.DRAINING)
        reconciler = make_reconciler(here)
        for _ in range(4):
            reconciler.note_silence(0.5)
        assert here.begun.calls == []
        for _ in range(4):
            reconciler.note_silence(0.5)
        ended = [arguments[0] for _, arguments in here.begun.calls]
        assert [worker.state for worker in here.state.pool if worker in ended] == [
            State.SERVING,
            State.PAUSED,
            State.DRAINING,
        ]
        # Each is ended once.
        reconciler.note_silence(1000)
        # What leaves, and has not ended by then, is ended once as well.
        lingering: list[Any] = [arguments[0] for _, arguments in here.begun.calls[3:]]
        assert [worker.state for worker in lingering] == [State.DRAINING, State.ENDED, State.DRAINING]
        reconciler.note_silence(1000)
        assert len(here.begun.calls) == 6


async def test_a_worker_that_leaves_for_too_long_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    with sleeping_process() as process, stage(settings=Settings(drain_timeout=10)) as here:
        puppet = here.add_slot(state=State.DRAINING, process=process)
        assert puppet is not None
        limit = 10 + here.state.config.settings.exit_timeout + LINGER_SECONDS
        reconciler = make_reconciler(here)
        reconciler.note_silence(limit)
        assert here.begun.calls == []
        reconciler.note_silence(1)
        await here.begun.run()
        with anyio.fail_after(60):
            assert await process.wait() == -signal.SIGKILL
    assert "has not ended" in caplog.text


def test_a_watchdog_is_fed_while_one_worker_is_sound() -> None:
    with stage(2) as here:
        limit = 10 * SILENT_SHARE
        reconciler = make_reconciler(here, 10)
        first, second = here.state.pool
        first.silence = limit + 1
        assert reconciler.has_sound_worker()
        second.silence = limit + 1
        assert not reconciler.has_sound_worker()
        # One that starts, or drains, is no sign of health, and none of illness.
        first.state = second.state = State.STARTING
        assert reconciler.has_sound_worker()
        assert make_reconciler(here).has_sound_worker()
        first.state, first.silence = State.SERVING, SILENT_SECONDS + 1
        assert not make_reconciler(here, 3600).has_sound_worker()


def test_hanging_workers_are_replaced_instead_of_the_service_where_that_was_configured() -> None:
    with stage(1, hang_timeout=5) as here:
        (worker,) = here.state.pool
        worker.silence = 1000
        assert make_reconciler(here, 10).has_sound_worker()


def test_a_worker_tells_of_itself_often_enough() -> None:
    config = AnchorConfig({})
    assert find_beat_seconds(config, None) == BEAT_SECONDS
    assert find_beat_seconds(config, 3600) == BEAT_SECONDS
    assert find_beat_seconds(config, 1) == 1 / BEATS_PER_WATCHDOG
