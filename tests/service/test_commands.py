"""What a generation does at a signal, and which ones it handles."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ecdysis_async._management.management import OwnManagement
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._service.commands import Commands
from ecdysis_async._service.leaving import Leaving
from ecdysis_async._service.life import Life, Stop
from ecdysis_async._service.restarts import Restarts
from ecdysis_async._system.process import Child
from ecdysis_async.errors import RestartUnsupported
from ecdysis_async.report import State
from tests.management.managers import Manager
from tests.planes import turn
from tests.service.lives import a_life


async def never(channel: socket.socket, stderr: int) -> Child:
    raise AssertionError("nobody is to be handed anything")


def commands_of(life: Life) -> Commands:
    leaving = Leaving(life)
    return Commands(life, Restarts(life, leaving), leaving)


@pytest.fixture
def caught() -> Iterator[None]:
    """Let no signal that comes too late end the tests."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    former = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("caught")
async def test_a_stop_signal_stops_and_a_second_one_hurries(backend: str) -> None:
    async with a_life(drain_timeout=600, stop_signals=(signal.SIGTERM,), restart_signals=()) as (life, _):
        management = commands_of(life).find_management(
            Systemd(""), takes_activation=False, control_path=None, pid_file=None
        )
        life.management = management
        life.state = State.SERVING
        try:
            management.handle_signals()
            management.start(life.task_group)
            with anyio.fail_after(60):
                os.kill(os.getpid(), signal.SIGTERM)
                await life.leaving.wait()
                assert not life.plane.tracker.is_hurried
                os.kill(os.getpid(), signal.SIGTERM)
                while not life.plane.tracker.is_hurried:
                    await anyio.wait_all_tasks_blocked()
            assert life.stop_signals == 2
        finally:
            management.close()
            # What comes on the way out is ignored, so that it cannot change the exit status.
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.usefixtures("caught")
async def test_a_restart_that_a_signal_asks_for_in_vain_ends_nothing(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"stop_signals": (), "restart_signals": (signal.SIGHUP,), "command": ["/does/not/exist"]}
    async with a_life(**settings) as (life, _):
        management = commands_of(life).find_management(
            Systemd(""), takes_activation=False, control_path=None, pid_file=None
        )
        life.management = management
        life.state = State.SERVING
        try:
            management.handle_signals()
            management.start(life.task_group)
            with anyio.fail_after(60):
                os.kill(os.getpid(), signal.SIGHUP)
                while "the restart has failed" not in caplog.text:
                    await turn()
            assert life.state is State.SERVING
        finally:
            management.close()


@pytest.mark.usefixtures("caught")
async def test_a_restart_that_is_refused_is_answered(backend: str, tmp_path: Path) -> None:
    """A partial stop is the application's to tell: until then `systemctl reload` would wait for its timeout."""
    manager = Manager(str(tmp_path / "notify"))
    async with a_life(stop_signals=(), restart_signals=(signal.SIGHUP,)) as (life, _):
        management = commands_of(life).find_management(
            Systemd(manager.address), takes_activation=False, control_path=None, pid_file=None
        )
        life.management = management
        try:
            management.handle_signals()
            management.start(life.task_group)
            management.begin(60)
            life.state, life.stop = State.DRAINING, Stop.PARTIAL
            with anyio.fail_after(60):
                os.kill(os.getpid(), signal.SIGHUP)
                heard = await manager.hear_until("READY=1")
            assert "RELOADING=1" in heard
            assert any(line.startswith("MONOTONIC_USEC=") for line in heard)
        finally:
            management.close()
            manager.close()


@pytest.mark.backends("asyncio")
async def test_the_last_signal_that_ends_a_process_is_left_to_an_application_that_has_it(backend: str) -> None:
    async with a_life(stop_signals=(signal.SIGTERM,), restart_signals=()) as (life, _):
        former = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        try:
            assert set(commands_of(life)._signal_handlers()) == {signal.SIGTERM, signal.SIGUSR1}
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            assert set(commands_of(life)._signal_handlers()) == {signal.SIGTERM}
        finally:
            signal.signal(signal.SIGUSR1, former)
    async with a_life(stop_signals=(), restart_signals=()) as (life, _):
        assert commands_of(life)._signal_handlers() == {}


@pytest.mark.backends("asyncio")
async def test_a_unit_of_systemd_is_not_handed_to_a_stranger(backend: str) -> None:
    async with a_life(stop_signals=(), restart_signals=()) as (life, _):
        commands = commands_of(life)
        life.management = management = commands.find_management(
            Systemd("@nobody"), takes_activation=False, control_path=None, pid_file=None
        )
        assert isinstance(management, OwnManagement)
        life.state = State.SERVING
        with pytest.raises(RestartUnsupported, match="unit of systemd"):
            commands._begin_takeover(never, "a takeover")
        assert life.handover is None
        management.close()
