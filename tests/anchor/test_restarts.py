"""When a service with workers can be restarted, and what follows from how that ends."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._anchor.restarts import Restarts
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import Life, RollOut, RollOutStage, wait_until
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import RestartError, RestartInProgress, RestartWhileDraining
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Stage, make_report, stage

pytestmark = pytest.mark.backends("asyncio")


class Told:
    """What systemd was told."""

    def __init__(self) -> None:
        self.began: list[tuple[float, bool]] = []
        self.ended = 0

    def begins(self, limit: float, *, is_told: bool) -> None:
        self.began.append((limit, is_told))

    def ends(self) -> None:
        self.ended += 1


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage(target=1, settings=Settings(probation=3600, ready_timeout=7)) as found:
        yield found


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def restarts(here: Stage, told: Told) -> Restarts:
    return Restarts(
        here.state,
        here.sockets,
        here.log,
        begin=here.begun,
        fill=here.fill,
        hung_workers=here.hung_workers,
        tell_restart=told.begins,
        tell_end=told.ends,
    )


@pytest.mark.parametrize(
    ("life", "error"),
    [
        (Life.STARTING, None),  # it waits for the end of the start
        (Life.SERVING, None),
        (Life.UPGRADING, RestartInProgress),
        (Life.LAME_DUCK, RestartWhileDraining),
        (Life.STOPPING, RestartWhileDraining),
    ],
)
def test_when_it_can_begin(life: Life, error: type[RestartError] | None, here: Stage, restarts: Restarts) -> None:
    here.state.life = life
    if error is None:
        roll_out = restarts.begin("a test")
        assert (roll_out.generation, here.state.roll_out) == (2, roll_out)
        assert here.begun.names == ["run"]
    else:
        with pytest.raises(error):
            restarts.begin("a test")
        assert here.begun.calls == []


def test_one_at_a_time_until_the_probation(here: Stage, restarts: Restarts) -> None:
    first = restarts.begin("a test")
    with pytest.raises(RestartInProgress, match=first.report.id):
        restarts.begin("a test")
    first.stage = RollOutStage.PROBATION
    second = restarts.begin("a test")
    assert (first.is_hurried, second.before, second.generation) == (True, first, 3)
    second.before, second.stage = None, RollOutStage.OVER
    # It has failed: its number is used again.
    assert restarts.begin("a test").generation == 2


def test_the_report_is_found_by_its_id(here: Stage, restarts: Restarts) -> None:
    assert restarts.find_report("id") is None
    here.state.last_report = make_report()
    assert restarts.find_report("id") is here.state.last_report
    restart = restarts.begin_by_command("a test")
    assert restarts.find_report("id") is None
    assert restarts.find_report(restart.report.id) is restart.report
    assert here.state.roll_out is not None
    assert here.state.roll_out.is_told


@pytest.mark.parametrize("until", ["serving", "settled", "drained"])
async def test_how_far_it_is_seen_through(until: str, here: Stage, restarts: Restarts) -> None:
    roll_out = make_roll_out(2, "a test", is_told=False, before=None)
    seen: list[RollOutStage] = []

    async def see() -> None:
        assert await restarts.see_through(roll_out, until) is roll_out.report
        seen.append(roll_out.stage)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(see)
            for stage_of in RollOutStage:
                roll_out.stage = stage_of
                here.state.changes.announce()
                await anyio.wait_all_tasks_blocked()
    wanted = {"serving": RollOutStage.PROBATION, "settled": RollOutStage.OVER, "drained": RollOutStage.DRAINED}
    assert seen == [wanted[until]]


async def test_a_failure_is_told_once_it_is_undone(here: Stage, restarts: Restarts) -> None:
    roll_out = make_roll_out(2, "a test", is_told=False, before=None)
    roll_out.error = RestartError("a broken release")
    with anyio.move_on_after(0):
        await restarts.see_through(roll_out, "serving")
        raise AssertionError
    roll_out.stage = RollOutStage.OVER
    with pytest.raises(RestartError, match="a broken release"):
        await restarts.see_through(roll_out, "serving")


async def run_to_its_end(here: Stage, roll_out: RollOut) -> None:
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(here.begun.run)
            await wait_until(here.state.changes, lambda: roll_out.is_over)


@pytest.mark.parametrize("fails", [False, True], ids=["settles", "fails"])
async def test_what_a_release_has_opened_goes_with_it(
    fails: bool,
    here: Stage,
    restarts: Restarts,
    told: Told,
) -> None:
    service = here.sockets.service
    old = service.obtain(Internet("127.0.0.1", 0), name="old")
    here.add_slot(state=None)
    fill = here.fill

    async def fill_and_open(*arguments: object) -> object:
        service.obtain(Internet("127.0.0.1", 0), name="new")
        here.failure = RestartError("a broken release") if fails else None
        filled = await fill(*arguments)  # type: ignore[arg-type]
        filled.report.unclaimed = ["old"]
        return filled

    restarts._fill = fill_and_open  # type: ignore[assignment]
    roll_out = restarts.begin("a test")
    roll_out.is_hurried = True
    await run_to_its_end(here, roll_out)
    assert [entry.name for entry in service.entries] == (["old"] if fails else ["new"])
    assert (old in service.entries) == fails
    assert here.state.generation == (1 if fails else 2)
    assert told.ended == 1
    ((limit, is_told),) = told.began
    assert limit >= 3600 + 7
    assert not is_told


async def test_a_signal_restarts_the_service_and_the_log_tells_what_becomes_of_it(
    here: Stage, restarts: Restarts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    here.state.life = Life.LAME_DUCK
    restarts.begin_by_signal("SIGHUP")
    await here.begun.run()
    assert "the service is being stopped" in caplog.text
    here.state.life = Life.UPGRADING
    restarts.begin_by_signal("SIGHUP")
    restarts.begin_by_signal("SIGHUP")
    # Both are remembered as one.
    assert caplog.text.count("while the anchor is being upgraded: another restart follows") == 1
    assert len(here.begun.calls) == 1
