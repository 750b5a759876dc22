"""A roll-out: in which order workers are replaced, and what becomes of all of them where one is not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pytest

from ecdysis_async import DrainCount, Outcome, Phase, RestartError, RestartReport, RestartWhileDraining, RolledBack
from ecdysis_async._anchor.pool import Slot
from ecdysis_async._anchor.rollout import RollOutRunner, call_off, end_probation, make_roll_out, sum_up
from ecdysis_async._anchor.state import Fill, Filled, Life, RollOut, RollOutStage, Turn, TurnState, wait_until
from ecdysis_async._handoff.protocol import PredecessorState
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async.report import State
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Puppet, Stage, make_report, stage

pytestmark = pytest.mark.backends("asyncio")

PATIENCE_SECONDS = 60


class Play:
    """A roll-out on a stage.

    Attributes:
        roll_out: what is known of it.
        told: in their order, what the anchor was told: that it begins, and how it ended.
    """

    def __init__(self, here: Stage, before: RollOut | None = None, *, fill: Fill | None = None) -> None:
        self.here = here
        self.roll_out = here.state.roll_out = make_roll_out(2, "a test", is_told=False, before=before)
        self.told: list[str] = []
        self.runner = RollOutRunner(
            self.roll_out,
            here.state,
            here.sockets,
            here.log,
            fill=fill or here.fill,
            hung_workers=here.hung_workers,
            prepare=lambda roll_out: self.told.append("begins"),
            conclude=lambda roll_out: self.told.append(roll_out.report.outcome.value),
        )

    async def until(self, is_so: Callable[[], bool]) -> None:
        await wait_until(self.here.state.changes, is_so)

    async def hand_over(self, puppet: Puppet) -> None:
        """Let a worker make its successor, which serves."""
        asked = await puppet.hear()
        assert (asked.type, asked.body["generation"]) == (FromAnchor.RESTART, 2)
        slot = next(slot for slot in self.here.state.pool.slots if puppet.worker in slot.workers)
        self.here.add_worker(slot)
        puppet.worker.state = State.PAUSED
        puppet.stand()
        self.here.state.changes.announce()

    async def take_back(self, puppet: Puppet) -> None:
        """Let a worker serve again because it is told to."""
        told = await puppet.hear()
        assert told.type == FromAnchor.REVERT
        puppet.worker.state = State.SERVING
        puppet.stand(PredecessorState.ROLLED_BACK, is_over=True)
        self.here.state.changes.announce()

    async def settle(self, puppet: Puppet) -> None:
        """Let a worker leave because it is told that its successor is there to stay."""
        assert (await puppet.hear()).type == FromAnchor.SETTLE
        puppet.worker.state = State.DRAINING
        puppet.stand(PredecessorState.SETTLED, is_over=True)
        self.here.state.changes.announce()


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage(target=2, settings=Settings(probation=3600)) as found:
        yield found


def add(here: Stage, count: int = 1) -> list[Puppet]:
    puppets = [here.add_slot() for _ in range(count)]
    return [puppet for puppet in puppets if puppet is not None]


@contextlib.asynccontextmanager
async def playing(play: Play) -> AsyncIterator[None]:
    """Run a roll-out, which has to end."""
    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(play.runner.run)
            yield


async def test_slots_that_nobody_serves_come_first(here: Stage) -> None:
    (puppet,) = add(here)
    here.add_slot(state=None)
    play = Play(here)
    async with playing(play):
        await play.hand_over(puppet)
        assert here.filled == [(1, 2)]
        assert [turn.slot.index for turn in play.roll_out.turns] == [1, 0]
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        assert play.roll_out.report.outcome == "serving"
        end_probation(play.roll_out, here.state.changes)
        await play.settle(puppet)
        await play.until(lambda: play.roll_out.stage is RollOutStage.OVER)
        here.kill(puppet)
    assert play.roll_out.stage is RollOutStage.DRAINED
    assert play.told == ["begins", "settled"]
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.SETTLED] * 2


async def test_one_worker_follows_the_other(here: Stage) -> None:
    first, second = add(here, 2)
    play = Play(here)
    async with playing(play):
        await play.hand_over(first)
        assert second.worker.link.is_idle
        await play.hand_over(second)
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        end_probation(play.roll_out, here.state.changes)
        for puppet in (first, second):
            await play.settle(puppet)
        await play.until(lambda: play.roll_out.stage is RollOutStage.OVER)
        for puppet in (first, second):
            here.kill(puppet)
    assert play.roll_out.error is None


async def test_a_failure_in_the_last_slot_takes_all_back(here: Stage) -> None:
    first, second = add(here, 2)
    play = Play(here)
    async with playing(play):
        await play.hand_over(first)
        await second.hear()
        second.stand(PredecessorState.FAILED, is_over=True, error=RestartError("a broken release"))
        here.state.changes.announce()
        await play.take_back(first)
    assert isinstance(play.roll_out.error, RolledBack)
    assert str(play.roll_out.error).startswith("worker 1: a broken release; all 2 workers go on with the former code")
    assert play.told == ["begins", "rolled back"]
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.REVERTED, TurnState.FAILED]


async def test_a_failure_in_the_first_slot_leaves_nothing_to_take_back(here: Stage) -> None:
    add(here)
    here.add_slot(state=None)
    here.failure = RestartError("a broken release")
    play = Play(here)
    async with playing(play):
        pass
    assert play.roll_out.error is here.failure
    assert play.told == ["begins", "failed"]
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.FAILED, TurnState.PENDING]


async def test_a_new_worker_that_dies_on_probation_takes_all_back(here: Stage) -> None:
    (puppet,) = add(here)
    play = Play(here)
    async with playing(play):
        await play.hand_over(puppet)
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        puppet.stand(PredecessorState.ROLLED_BACK, is_over=True, error=RolledBack("it has died"))
        here.state.changes.announce()
        await play.take_back(puppet)
    assert play.told == ["begins", "rolled back"]


async def test_where_the_old_worker_is_dead_only_the_new_code_is_left(
    here: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = add(here, 2)
    play = Play(here)
    async with playing(play):
        await play.hand_over(first)
        await second.hear()
        here.kill(first)
        second.stand(PredecessorState.FAILED, is_over=True, error=RestartError("a broken release"))
        here.state.changes.announce()
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.KEPT, TurnState.FAILED]
    assert "worker 0 goes on with the new code: its old process has died" in caplog.text


async def test_a_worker_that_is_killed_while_it_is_replaced_is_followed_all_the_same(here: Stage) -> None:
    (puppet,) = add(here)
    play = Play(here)
    async with playing(play):
        await puppet.hear()
        here.kill(puppet)
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        assert here.filled == [(0, 2)]
        end_probation(play.roll_out, here.state.changes)
    assert play.told == ["begins", "settled"]


async def test_it_is_called_off_until_a_worker_was_told_to_accept(here: Stage) -> None:
    (puppet,) = add(here)
    play = Play(here)
    async with playing(play):
        await puppet.hear()
        puppet.stand(PredecessorState.INITIALISING)
        call_off(play.roll_out, here.state)
        told = await puppet.hear()
        assert (told.type, told.body["error"]["message"]) == (FromAnchor.REVERT, "the restart was called off")
        puppet.stand(PredecessorState.FAILED, is_over=True, error=RestartError("the restart was called off"))
        here.state.changes.announce()
    assert str(play.roll_out.error) == "the restart was called off"
    assert play.told == ["begins", "failed"]


@pytest.mark.parametrize("when", ["committed", "second", "over"])
async def test_it_is_too_late_to_call_it_off(when: str, here: Stage) -> None:
    puppets = add(here, 2)
    play = Play(here)
    play.roll_out.turns = turns = [Turn(slot) for slot in here.state.pool.slots]
    turns[0].old, turns[0].state = puppets[0].worker, TurnState.UNDER_WAY
    match when:
        case "committed":
            puppets[0].stand(PredecessorState.COMMITTING)
        case "second":
            turns[0].state, turns[1].state = TurnState.SERVED, TurnState.UNDER_WAY
        case "over":
            play.roll_out.stage = RollOutStage.OVER
    call_off(play.roll_out, here.state)
    assert play.roll_out.called_off is None


async def test_a_stop_ends_it_and_takes_nothing_back(here: Stage) -> None:
    (puppet,) = add(here)
    play = Play(here)
    async with playing(play):
        await play.hand_over(puppet)
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        here.state.life = Life.STOPPING
        here.state.changes.announce()
    assert isinstance(play.roll_out.error, RestartWhileDraining)
    assert play.told == ["begins", "stopped"]
    assert puppet.worker.link.is_idle


async def test_it_waits_for_the_one_before(here: Stage) -> None:
    before = make_roll_out(1, "a test", is_told=False, before=None)
    play = Play(here, before)
    async with playing(play):
        await anyio.wait_all_tasks_blocked()
        assert play.told == []
        before.stage = RollOutStage.OVER
        here.state.changes.announce()
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        assert play.roll_out.before is None
        end_probation(play.roll_out, here.state.changes)
    assert play.told == ["begins", "settled"]


async def test_a_slot_that_has_retired_meanwhile_has_had_its_turn(here: Stage) -> None:
    (puppet,) = add(here)
    here.add_slot(state=None)
    retired = here.state.pool.slots[0]

    async def fill(slot: Slot, generation: int) -> Filled:
        here.state.pool.slots.remove(retired)
        return await here.fill(slot, generation)

    play = Play(here, fill=fill)
    async with playing(play):
        await play.until(lambda: play.roll_out.stage is RollOutStage.PROBATION)
        assert play.roll_out.turns[1].state is TurnState.SETTLED
        end_probation(play.roll_out, here.state.changes)
    assert puppet.worker.link.is_idle


async def test_a_defect_costs_the_roll_out_and_not_the_service(here: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        here.add_slot(state=None)

    async def fill(slot: Slot, generation: int) -> Filled:
        if slot.index == 1:
            raise TypeError("a defect")
        return await here.fill(slot, generation)

    play = Play(here, fill=fill)
    async with playing(play):
        pass
    assert "the roll-out broke down in the anchor" in str(play.roll_out.error)
    assert play.told == ["begins", "rolled back"]
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.KEPT, TurnState.FAILED]
    assert "Traceback" in caplog.text


def test_what_comes_one_after_the_other_adds_up_and_what_is_parallel_does_not() -> None:
    whole = make_report()
    workers = [
        make_report(
            phases={Phase.START: 1.0, Phase.PROBATION: 3.0, Phase.DRAIN: 4.0},
            accept_gap=0.1,
            lost=1,
            drain=DrainCount(drained=1, silent=2, transferred=3, cut=4),
            inherited=["a", "b"],
        ),
        make_report(
            phases={Phase.START: 2.0, Phase.DRAIN: 1.0}, accept_gap=0.2, lost=2, inherited=["b", "c"], hurried=["a"]
        ),
        make_report(drain=DrainCount(drained=10), hurried=["b"]),
    ]
    sum_up(whole, workers)
    assert whole.phases == {Phase.START: 3.0, Phase.DRAIN: 4.0}
    assert (whole.accept_gap, whole.lost) == (0.2, 3)
    assert whole.drain == DrainCount(drained=11, silent=2, transferred=3, cut=4)
    assert whole.inherited == ["a", "b", "c"]
    assert whole.hurried == ["a", "b"]
    assert whole.workers == workers


def test_it_travels_as_json_with_all_its_workers() -> None:
    whole = make_report(outcome=Outcome.SETTLED)
    sum_up(whole, [make_report(outcome=Outcome.SETTLED, created=["x"]), make_report()])
    assert RestartReport.from_json(whole.to_json()) == whole
    # As an older release has written it.
    body = whole.to_json()
    del body["workers"]
    assert RestartReport.from_json(body).workers == []


def test_a_roll_out_in_which_nothing_has_happened_yet() -> None:
    whole = make_report()
    sum_up(whole, [])
    assert (whole.phases, whole.accept_gap, whole.drain) == ({}, None, DrainCount())
