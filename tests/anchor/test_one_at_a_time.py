"""Roll-outs in which the former release leaves first: in which order, and what comes back where the new one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

from ecdysis_async import RestartError, RolledBack, SuccessorFailed
from ecdysis_async._anchor.one_at_a_time import OneAtATimeRunner, replace_after_end
from ecdysis_async._anchor.pool import Slot
from ecdysis_async._anchor.rollout import call_off, end_probation, make_roll_out
from ecdysis_async._anchor.state import Filled, RollOutStage, TurnState, wait_until
from ecdysis_async._ipc.worker_link import FromAnchor
from ecdysis_async._system.launch import Launch
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Puppet, Stage, make_report, stage

pytestmark = pytest.mark.backends("asyncio")

PATIENCE_SECONDS = 60

FORMER = Launch(("/srv/1/serve",), "/srv/1", {})


class Play:
    """Such a roll-out on a stage.

    Attributes:
        launches: what was to be started as each worker, by the generation; None: what is deployed.
        failures: why the next starts fail; None: they do not.
    """

    def __init__(self, here: Stage) -> None:
        self.here = here
        self.launches: list[tuple[int, Launch | None]] = []
        self.failures: list[RestartError | None] = []
        self.roll_out = here.state.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
        self.puppets: list[Puppet] = []
        for _ in range(2):
            puppet = here.add_slot()
            assert puppet is not None
            puppet.worker.launch = FORMER
            self.puppets.append(puppet)
        self.runner = OneAtATimeRunner(
            self.roll_out,
            here.state,
            here.sockets,
            here.log,
            fill=self.fill,
            hung_workers=here.hung_workers,
            prepare=lambda roll_out: None,
            conclude=lambda roll_out: None,
        )

    async def fill(self, slot: Slot, generation: int) -> Filled:
        self.launches.append((generation, self.here.state.former_release))
        failure = self.failures.pop(0) if self.failures else None
        if failure is None:
            self.puppets.append(self.here.add_worker(slot))
        return Filled(make_report(), failure)

    async def let_leave(self, *puppets: Puppet) -> None:
        """Let workers end, which were all told to before one of them has."""
        for puppet in puppets:
            assert (await puppet.hear()).type == FromAnchor.STOP
        for puppet in puppets:
            self.here.kill(puppet)

    async def until(self, stage: RollOutStage) -> None:
        await wait_until(self.here.state.changes, lambda: self.roll_out.stage >= stage)


@pytest.fixture
def here() -> Iterator[Stage]:
    settings = Settings(probation=3600, command=(sys.executable, "serve"))
    with stage(target=2, settings=settings, one_at_a_time=True) as found:
        yield found


@contextlib.asynccontextmanager
async def playing(play: Play) -> AsyncIterator[None]:
    """Run a roll-out, which has to end."""
    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(play.runner.run)
            yield


async def test_all_leave_before_the_first_one_starts(here: Stage) -> None:
    play = Play(here)
    async with playing(play):
        await play.let_leave(*play.puppets)
        await play.until(RollOutStage.PROBATION)
        end_probation(play.roll_out, here.state.changes)
    assert play.launches == [(2, None)] * 2
    assert play.roll_out.report.outcome == "settled"
    assert play.roll_out.error is None


async def test_clients_have_waited_from_when_the_first_one_leaves_until_another_one_serves(here: Stage) -> None:
    play = Play(here)
    async with playing(play):
        for puppet in play.puppets[:2]:
            assert (await puppet.hear()).type == FromAnchor.STOP
        # However long they drain.
        await anyio.sleep(0.2)
        for puppet in play.puppets[:2]:
            here.kill(puppet)
        await play.until(RollOutStage.PROBATION)
        end_probation(play.roll_out, here.state.changes)
    gap = play.roll_out.report.accept_gap
    assert gap is not None
    assert gap >= 0.2


async def test_where_the_new_release_does_not_start_the_former_one_does(here: Stage) -> None:
    play = Play(here)
    play.failures = [SuccessorFailed("it is broken")]
    async with playing(play):
        await play.let_leave(*play.puppets)
        await play.until(RollOutStage.OVER)
    assert play.launches == [(2, None), (1, FORMER), (1, FORMER)]
    assert type(play.roll_out.error) is SuccessorFailed
    assert str(play.roll_out.error) == "it is broken; the former release was started again, and serves"
    assert [turn.state for turn in play.roll_out.turns] == [TurnState.REVERTED] * 2
    # A worker that crashes is followed by the same.
    assert here.state.former_release == FORMER


async def test_one_that_is_called_off_while_the_old_ones_drain_lets_them_start_again(here: Stage) -> None:
    here.state.config = dataclasses.replace(here.state.config, one_at_a_time=True)
    play = Play(here)
    async with playing(play):
        former = play.puppets[:]
        for puppet in former:
            assert (await puppet.hear()).type == FromAnchor.STOP
        call_off(play.roll_out, here.state)
        for puppet in former:
            here.kill(puppet)
        await play.until(RollOutStage.OVER)
    assert play.launches == [(1, FORMER), (1, FORMER)]
    assert play.roll_out.called_off is not None
    assert "the restart was called off; the former release was started again" in str(play.roll_out.error)


async def test_where_a_new_worker_dies_on_probation_all_of_them_go(here: Stage) -> None:
    play = Play(here)
    async with playing(play):
        await play.let_leave(*play.puppets)
        await play.until(RollOutStage.PROBATION)
        here.kill(play.puppets[2])
        await play.let_leave(play.puppets[3])
        await play.until(RollOutStage.OVER)
    assert isinstance(play.roll_out.error, RolledBack)
    assert play.roll_out.report.outcome == "rolled back"
    assert play.launches[2:] == [(1, FORMER)] * 2


async def test_where_neither_starts_it_is_said_that_nobody_serves(here: Stage) -> None:
    play = Play(here)
    play.failures = [SuccessorFailed("it is broken"), SuccessorFailed("it was pruned")]
    async with playing(play):
        await play.let_leave(*play.puppets)
        await play.until(RollOutStage.OVER)
    assert "nobody serves: it was pruned" in str(play.roll_out.error)
    assert here.state.former_release is None


async def test_what_cannot_be_started_at_all_lets_nobody_leave() -> None:
    settings = Settings(command=("/nowhere/serve",))
    with stage(target=2, settings=settings, one_at_a_time=True) as here:
        play = Play(here)
        async with playing(play):
            await play.until(RollOutStage.OVER)
        assert "/nowhere/serve" in str(play.roll_out.error)
        assert all(puppet.worker.link.is_idle for puppet in play.puppets)
        assert play.launches == []


async def test_one_worker_is_followed_by_another_of_its_release(here: Stage) -> None:
    play = Play(here)
    errors: list[RestartError | None] = []

    async def replace() -> None:
        slot = here.state.pool.slots[0]
        errors.append(await replace_after_end(here.state, slot, play.puppets[0].worker, play.fill))

    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(replace)
            assert (await play.puppets[0].hear()).type == FromAnchor.STOP
            assert play.launches == []
            here.kill(play.puppets[0])
    assert errors == [None]
    assert play.launches == [(here.state.generation, None)]
