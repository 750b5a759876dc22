"""When an anchor may be followed by other code, and that it goes on as it was where that does not come about."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ecdysis_async._anchor import reexec, upgrade
from ecdysis_async._anchor.dispatch import Dispatcher
from ecdysis_async._anchor.pool import SlotActivity
from ecdysis_async._anchor.reaping import Reaper
from ecdysis_async._anchor.rollout import make_roll_out
from ecdysis_async._anchor.state import Life
from ecdysis_async._anchor.upgrade import Upgrade
from ecdysis_async._system.launch import Launch
from ecdysis_async.errors import (
    NotReady,
    RestartError,
    RestartInProgress,
    RestartUnsupported,
    RestartWhileDraining,
)
from tests.anchor.puppets import Stage, stage

pytestmark = pytest.mark.backends("asyncio")


class Bench:
    """An upgrade, ready to be tried."""

    def __init__(self, here: Stage, *, is_bound: bool = False) -> None:
        def refuse(*arguments: object) -> Any:
            raise AssertionError(arguments)

        self.here = here
        self.reaper = Reaper(reaps_orphans=False)
        dispatcher = Dispatcher(
            here.state,
            here.sockets,
            self.reaper,
            here.log,
            begin=here.begun,
            beat_seconds=60,
            restart=refuse,
            see_through=refuse,
            stop=refuse,
        )
        self.upgrade = Upgrade(
            here.state,
            dispatcher,
            self.reaper,
            here.log,
            begin=here.begun,
            describe=self.describe,
            is_bound=is_bound,
        )

    def describe(self) -> tuple[dict[str, Any], list[int]]:
        body, descriptors = self.here.state.describe()
        return {**body, "sockets": {}, "signals": 0}, descriptors


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(upgrade, "REST_SECONDS", 0.1)
    with stage(1) as here:
        yield Bench(here)


def run_instead(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let the new code be a program: what started this process is a test runner."""
    launch = Launch((sys.executable, "-c", program), None, {})
    monkeypatch.setattr(upgrade, "describe_launch", lambda *arguments, **named: (launch, ()))


@pytest.mark.parametrize(
    ("life", "error"),
    [
        (Life.STARTING, NotReady),
        (Life.UPGRADING, RestartInProgress),
        (Life.LAME_DUCK, RestartWhileDraining),
        (Life.STOPPING, RestartWhileDraining),
    ],
)
async def test_when_it_is_refused(life: Life, error: type[RestartError], bench: Bench) -> None:
    bench.here.state.life = life
    with pytest.raises(error):
        await bench.upgrade.upgrade()
    with socket.socket() as channel, pytest.raises(error):
        await bench.upgrade.pass_all_on(channel, lambda: None)
    assert bench.here.state.life is life


async def test_it_is_refused_while_a_release_is_rolled_out(bench: Bench) -> None:
    bench.here.state.roll_out = make_roll_out(2, "a test", is_told=False, before=None)
    with pytest.raises(RestartInProgress):
        await bench.upgrade.upgrade()


@pytest.mark.parametrize("why", ["a slot is filled", "a process starts", "a link is broken"])
async def test_it_is_refused_while_workers_come_and_go(why: str, bench: Bench) -> None:
    (slot,) = bench.here.state.pool.slots
    match why:
        case "a slot is filled":
            slot.activity = SlotActivity.FILLING
        case "a link is broken":
            slot.workers[0].link.close()
    with contextlib.ExitStack() as busy:
        if why == "a process starts":
            busy.enter_context(bench.reaper.spawning())
        with pytest.raises(RestartInProgress, match="upgrade the anchor when that is done"):
            await bench.upgrade.upgrade()
    assert bench.here.state.life is Life.SERVING


async def test_new_code_that_cannot_read_the_state_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, "raise SystemExit('what is this?')")
    with pytest.raises(reexec.UpgradeFailed) as failure:
        await bench.upgrade.upgrade()
    assert failure.value.stderr == "what is this?"
    assert bench.here.state.life is Life.SERVING
    assert not bench.reaper.is_spawning


@pytest.mark.parametrize("why", ["stop", "restless"])
async def test_new_code_is_not_executed_where_the_moment_does_not_come(
    why: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_instead(monkeypatch, "")
    ready = await bench.upgrade.upgrade()
    state = bench.here.state
    assert state.life is Life.UPGRADING
    ready.begin()
    # Something was said to a worker that is not sent yet, or the service was told to stop.
    state.pool.slots[0].workers[0].link.tell("word", {})
    if why == "stop":
        state.life = Life.STOPPING
    await bench.here.begun.run()
    stopped = why == "stop"
    assert state.life is (Life.STOPPING if stopped else Life.SERVING)
    expected = "the service is being stopped" if stopped else "there was always something under way"
    assert state.upgrade_error == expected
    assert f"the anchor was not upgraded, and goes on: {expected}" in caplog.text


async def test_code_that_cannot_be_executed_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "")
    ready = await bench.upgrade.upgrade()

    def execute(*arguments: object) -> None:
        raise reexec.UpgradeFailed("it is gone")

    monkeypatch.setattr(reexec, "execute", execute)
    ready.begin()
    await bench.here.begun.run()
    assert bench.here.state.upgrade_error == "it is gone"
    assert bench.here.state.life is Life.SERVING


async def test_a_service_that_is_bound_to_its_process_is_not_passed_on() -> None:
    with stage(1) as here:
        with socket.socket() as channel, pytest.raises(RestartUnsupported, match="ecdysis restart --anchor"):
            await Bench(here, is_bound=True).upgrade.pass_all_on(channel, lambda: None)
        assert here.state.life is Life.SERVING


async def test_a_newcomer_that_leaves_takes_nothing(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    accepted: list[Life] = []

    def accept() -> None:
        accepted.append(bench.here.state.life)
        theirs.close()

    with ours, pytest.raises(RestartError, match="does not take it"):
        await bench.upgrade.pass_all_on(ours, accept)
    assert accepted == [Life.UPGRADING]
    assert bench.here.state.life is Life.SERVING
