"""What an anchor opens: everything or nothing at a first start, and what can be opened where workers serve."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._anchor import needs
from ecdysis_async._anchor.metrics_files import AUTO
from ecdysis_async._anchor.opening import Opener
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.management import OwnManagement
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import listen
from ecdysis_async.settings import Settings
from tests.anchor.puppets import Stage, stage
from tests.management.handlers import handlers

pytestmark = pytest.mark.backends("asyncio")

WEB = Internet("127.0.0.1", 0)


def begin(tasks: TaskGroup, function: Callable[..., Coroutine[Any, Any, object]], /, *arguments: object) -> None:
    tasks.start_soon(function, *arguments)


@contextlib.asynccontextmanager
async def opening(here: Stage) -> AsyncIterator[Opener]:
    """Have something that opens what the anchor of a stage needs."""
    config = here.state.config
    plane = DataPlane(here.sockets.control, Gate(), Tracker())
    management = OwnManagement(
        here.log,
        Systemd(""),
        here.sockets.service,
        control=handlers(Changes()),
        signals={},
        describe=lambda: "",
        is_accepting=lambda: True,
        plane=plane,
        control_path=config.control_path,
        pid_file=config.settings.pid_file,
        takes_activation=False,
    )
    try:
        async with anyio.create_task_group() as tasks:
            management.claim(has_predecessor=here.state.is_follower)
            management.start(tasks)
            await plane.gate.open()
            opener = Opener(here.state, here.sockets, management, here.log, functools.partial(begin, tasks))
            yield opener
            tasks.cancel_scope.cancel()
        opener.remove_metrics_dir()
        await management.withdraw(has_successor=False)
    finally:
        management.close()


@pytest.fixture
def taken() -> Iterator[Internet]:
    """Return an address that somebody else has."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield Internet("127.0.0.1", sock.getsockname()[1])


@contextlib.contextmanager
def wanting(tmp_path: Path, health: Internet, *, upgrades: int = 0) -> Iterator[Stage]:
    """Set the stage of an anchor that wants one thing of each kind."""
    settings = Settings(pid_file=tmp_path / "pid")
    with stage(
        settings=settings,
        control_path=str(tmp_path / "control"),
        health=health,
        metrics_dir=AUTO,
    ) as here:
        web = functools.partial(listen, address=WEB)
        here.state.config = dataclasses.replace(here.state.config, open_sockets={"web": web})
        here.state.upgrades = upgrades
        here.state.has_served = upgrades > 0
        yield here


async def test_a_first_start_opens_everything(tmp_path: Path) -> None:
    with wanting(tmp_path, WEB) as here:
        async with opening(here) as opener:
            await opener.open()
            assert here.state.missing == {}
            assert (tmp_path / "control").is_socket()
            assert here.state.metrics_dir is not None
            metrics = Path(here.state.metrics_dir)
            assert metrics.is_dir()
            [health] = here.sockets.health.entries
            [web] = here.sockets.service.entries
            # Somebody answers at the one, and clients would wait in the queue of the other as soon as a worker is told.
            async with await anyio.connect_tcp(*health.sock.getsockname()) as client:
                await client.send(b"GET /live HTTP/1.0\r\n\r\n")
                assert (await client.receive()).startswith(b"HTTP/1.1 200")
            assert web.sock.getsockname()[1] > 0
            # Before the first worker answers, and not before that.
            assert not (tmp_path / "pid").exists()
            await opener.publish_before_first()
            assert (tmp_path / "pid").read_text().strip() == str(os.getpid())
        assert not metrics.exists()


async def test_a_first_start_ends_with_what_cannot_be_opened_and_opens_nothing_after_it(
    tmp_path: Path, taken: Internet
) -> None:
    with wanting(tmp_path, taken) as here:
        async with opening(here) as opener:
            with pytest.raises(OSError, match=f"{taken.port}.*in use"):
                await opener.open()
            assert here.sockets.health.entries == here.sockets.service.entries == ()
            assert not (tmp_path / "pid").exists()


async def test_new_code_goes_on_without_what_cannot_be_opened(
    tmp_path: Path, taken: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "RETRY_SECONDS", 0.01)
    with wanting(tmp_path, taken, upgrades=1) as here:
        async with opening(here) as opener:
            await opener.open()
            [missing] = here.state.missing
            assert missing == f"the health address {taken}"
            assert (tmp_path / "control").is_socket()
            assert len(here.sockets.service.entries) == 1
            assert (tmp_path / "pid").exists()
