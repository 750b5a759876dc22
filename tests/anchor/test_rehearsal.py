"""What new code needs is tried, and what the service holds is left alone."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._anchor.rehearsal import rehearse
from ecdysis_async._anchor.sockets import HeldSockets
from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._management.control_path import ControlLock
from ecdysis_async._management.control_server import obtain_control_socket
from ecdysis_async._sockets.addresses import Address, Descriptor, Internet, Unix
from ecdysis_async._sockets.registry import listen
from ecdysis_async.settings import Settings

ELSEWHERE = 2**30


def make_config(*addresses: Address, **more: Any) -> AnchorConfig:
    return AnchorConfig({str(each): functools.partial(listen, address=each) for each in addresses}, **more)


class Former:
    """A service that holds sockets of its own of each kind."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.sockets = HeldSockets(GenerationLog(0))
        self.control = str(directory / "control")
        self._lock = ControlLock(self.control)
        obtain_control_socket(self.control, ControlAccess(), self._lock, self.sockets.control)
        self.web = Unix(str(directory / "web"))
        (health,) = listen(self.sockets.health, Internet("127.0.0.1", 0))
        self.health = Internet("127.0.0.1", health.sock.getsockname()[1])
        listen(self.sockets.service, self.web)
        for registry in (self.sockets.control, self.sockets.health, self.sockets.service):
            registry.start_listening()

    def describe(self) -> dict[str, Any]:
        return self.sockets.describe()[0]

    def close(self) -> None:
        self.sockets.close(unlink=True)
        self._lock.release()


@pytest.fixture
def former(tmp_path: Path) -> Iterator[Former]:
    found = Former(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("knows_kinds", [True, False], ids=["this release", "an older one"])
def test_what_the_service_holds_is_needed_no_second_time(former: Former, tmp_path: Path, *, knows_kinds: bool) -> None:
    held = former.describe()
    if not knows_kinds:
        for each in held.values():
            del each["kinds"]
    pid_file = tmp_path / "pid"
    pid_file.write_text(f"{ELSEWHERE}\n")
    before = sorted(os.listdir(tmp_path))
    settings = Settings(pid_file=pid_file)
    config = make_config(former.web, Internet("127.0.0.1", 0), control_path=former.control, settings=settings)
    rehearse(config, held, ELSEWHERE)
    assert sorted(os.listdir(tmp_path)) == before
    for path in (former.control, former.web.path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


def test_what_is_new_is_opened_and_closed_again(former: Former, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    config = make_config(
        former.web,
        Unix(str(tmp_path / "more")),
        health=Internet("127.0.0.1", 0),
        control_path=str(tmp_path / "another"),
        settings=Settings(pid_file=tmp_path / "pid"),
    )
    rehearse(config, former.describe(), ELSEWHERE)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("what", ["pid file", "directory", "control", "health", "address", "descriptor"])
def test_what_cannot_be_opened(what: str, former: Former, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    missing = tmp_path / "missing" / "file"
    match what:
        case "pid file":
            config = make_config(settings=Settings(pid_file=missing))
        case "directory":
            config = make_config(settings=Settings(pid_file=tmp_path))
        case "control":
            config = make_config(control_path=str(missing))
        case "health":
            config = make_config(health=Unix(str(missing)))
        case "address":
            # The service has it for something else.
            config = make_config(former.web, former.health)
        case _:
            config = make_config(Descriptor("web"))
    with pytest.raises((OSError, LookupError)):
        rehearse(config, former.describe(), ELSEWHERE)
    assert sorted(os.listdir(tmp_path)) == before


def test_what_was_passed_to_this_process_stays_open(former: Former) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        rehearse(make_config(Descriptor(passed.fileno())), former.describe(), ELSEWHERE)
        passed.setblocking(True)
        with socket.create_connection(passed.getsockname()), passed.accept()[0]:
            pass
