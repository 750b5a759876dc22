"""A process that speaks for its service itself: what it claims, and what is heard of it outside."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management import management as management_module
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.control_path import ControlLock
from ecdysis_async._management.management import OwnManagement
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async.errors import RestartUnsupported
from ecdysis_async.report import RestartReport
from tests.management.handlers import handlers
from tests.management.managers import Manager
from tests.planes import a_plane, turn


@contextlib.asynccontextmanager
async def managing(
    systemd: Systemd | None = None,
    *,
    is_accepting: Callable[[], bool] = lambda: True,
    signals: dict[signal.Signals, Callable[[], None]] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[OwnManagement, anyio.abc.TaskGroup]]:
    async with a_plane() as plane:
        assert plane.task_group is not None
        management = OwnManagement(
            GenerationLog(1),
            systemd if systemd is not None else Systemd(""),
            plane.registry,
            control=handlers(Changes()),
            signals=signals if signals is not None else {},
            describe=lambda: "as it should be",
            is_accepting=is_accepting,
            plane=plane,
            takes_activation=False,
            **options,
        )
        try:
            with anyio.fail_after(60):
                yield management, plane.task_group
        finally:
            management.close()


async def test_without_systemd_everything_can_be_told_and_nothing_waits(backend: str) -> None:
    async with managing() as (management, task_group):
        await management.open(has_predecessor=True)
        management.start(task_group)
        management.begin(60)
        await management.announce_restart(60, is_told=False)
        management.serving()
        management.restart_asked()
        management.restart_refused()
        management.become_main()
        management.failed("it has failed", ValueError())
        management.leaving(30)
        management.leave_to_next_start(is_orderly=True)
        management.check_restart()
        management.check_takeover()

        ended = anyio.Event()

        async def others() -> None:
            ended.set()

        # The service counts as stopped, for its parent, with the exit of this process.
        await management.outlive(others)
        assert ended.is_set()
        await management.finish()
        assert not management.is_supervised
        assert not management.keeps_sockets


async def test_what_systemd_hears_of_a_service(backend: str, manager: Manager) -> None:
    async with managing(Systemd(manager.address)) as (management, task_group):
        await management.open(has_predecessor=False)
        management.serving()
        management.start(task_group)
        management.begin(60)
        assert (await manager.hear_until("EXTEND"))[-1] == "EXTEND_TIMEOUT_USEC=60000000"
        management.serving()
        assert (await manager.hear_until("READY"))[-1] == "READY=1"
        management.tell_restart(90, is_told=True)
        assert await manager.hear() == ["EXTEND_TIMEOUT_USEC=90000000"]
        await management.announce_restart(90, is_told=False)
        assert (await manager.hear())[0] == "RELOADING=1"
        management.leaving(30)
        assert await manager.hear() == ["EXTEND_TIMEOUT_USEC=30000000"]
        assert await manager.hear() == ["STOPPING=1"]
        management.leaving(30, is_partial=True)
        management.failed("it has failed", OSError(28, "no space"))
        heard = await manager.hear_until("EXIT_STATUS")
        assert heard == ["EXTEND_TIMEOUT_USEC=30000000", "STATUS=it has failed", "ERRNO=28", "EXIT_STATUS=1"]


async def test_a_successor_says_nothing_until_it_is_the_main_process(backend: str, manager: Manager) -> None:
    async with managing(Systemd(manager.address)) as (management, task_group):
        await management.open(has_predecessor=True)
        management.start(task_group)
        management.serving()
        async with anyio.create_task_group() as waiting:
            # No other process than the main one can name the next one, and say that a restart begins.
            waiting.start_soon(lambda: management.announce_restart(90, is_told=True))
            await turn()
            management.become_main()
        assert await manager.hear() == ["STATUS=as it should be"]
        assert await manager.hear() == ["EXTEND_TIMEOUT_USEC=90000000"]


async def test_the_pid_file_and_who_it_is_left_to(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with managing(pid_file=path) as (management, _):
        await management.prepare(lambda: "")
        assert not path.exists()
        await management.publish()
        assert path.read_text() == f"{os.getpid()}\n"
        await management.withdraw(has_successor=True)
        assert path.exists()
        await management.withdraw(has_successor=False)
        assert not path.exists()


async def test_commands_reach_the_service_by_its_control_socket(backend: str, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    async with managing(control_path=path) as (management, task_group):
        await management.open(has_predecessor=True)
        management.start(task_group)
        assert management.control_path == path
        with pytest.raises(OSError, match="live service"):
            ControlLock(path).acquire(is_family=False)


async def test_a_control_socket_that_is_cleared_away_is_there_again(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management_module, "CONTROL_SECONDS", 0.01)
    path = tmp_path / "control"
    async with managing(control_path=str(path)) as (management, task_group):
        await management.open(has_predecessor=True)
        management.start(task_group)
        task_group.start_soon(management.keep_control)
        await anyio.wait_all_tasks_blocked()
        path.unlink()
        while not path.exists():
            await turn()
        management.leaving(30)


async def test_signals_wait_until_it_starts(backend: str) -> None:
    heard = anyio.Event()
    former = signal.getsignal(signal.SIGUSR2)
    async with managing(signals={signal.SIGUSR2: heard.set}) as (management, task_group):
        management.handle_signals()
        os.kill(os.getpid(), signal.SIGUSR2)
        await turn()
        assert not heard.is_set()
        management.start(task_group)
        await heard.wait()
        management.ignore_on_the_way_out(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    signal.signal(signal.SIGUSR2, former)


async def test_a_restart_and_a_stop_are_its_own(backend: str) -> None:
    report = RestartReport("abc", 2, os.getpid())
    stops: list[str] = []

    async def restart(until: str) -> RestartReport:
        assert until == "settled"
        return report

    async with managing() as (management, _):
        assert await management.restart("settled", restart) is report
        management.stop(lambda: stops.append("here"))
        assert not management.is_anchor(os.getppid())
    assert stops == ["here"]


async def test_a_unit_that_a_restart_would_end_is_told_at_the_start_and_at_the_restart(
    backend: str, environment: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    environment(SYSTEMD_EXEC_PID=str(os.getpid()))
    async with a_plane() as plane:
        management = OwnManagement(
            GenerationLog(1), Systemd(""), plane.registry, control=handlers(Changes()), signals={},
            describe=str, is_accepting=lambda: True,
        )  # fmt: skip
        await management.open(has_predecessor=False)
        with pytest.raises(RestartUnsupported, match="Type=notify"):
            management.check_restart()
        management.close()
    assert "Type=notify" in caplog.text


async def test_a_unit_of_systemd_is_not_passed_to_another(backend: str, manager: Manager) -> None:
    async with managing(Systemd(manager.address)) as (management, _):
        with pytest.raises(RestartUnsupported, match="another unit"):
            management.check_takeover()


async def test_sockets_are_kept_while_clients_can_wait_on_them(
    backend: str, manager: Manager, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDSTORE", "16")
    is_accepting = False
    async with managing(Systemd(manager.address), is_accepting=lambda: is_accepting) as (management, task_group):
        assert management.keeps_sockets
        await management.open(has_predecessor=True)
        management.begin(60)
        management.start(task_group)
        await manager.hear_until("STATUS")
        entry = management._registry.obtain(Internet("127.0.0.1", 0))
        entry.start_listening()
        management.park()
        is_accepting = True
        management.park()
        assert (await manager.hear())[0] == "FDSTORE=1"
