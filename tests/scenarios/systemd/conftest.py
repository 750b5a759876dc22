"""The real systemd as a fixture, and services that it runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.scenarios.systemd.harness import Unit
from tests.scenarios.systemd.machine import Machine, Unavailable, fetch, running

SYSTEMD = "/lib/systemd/systemd"
# Knows Type=notify-reload.
NEW_ENOUGH = 253


@pytest.fixture(scope="session")
def systemd(request: pytest.FixtureRequest) -> Path:
    """Where a systemd is unpacked."""
    try:
        if os.geteuid() != 0:
            raise Unavailable("only root can run a systemd of its own")
        return fetch(request.config.cache.mkdir("systemd"))
    except Unavailable as error:
        give_up(error)


@pytest.fixture(scope="session")
def booted(systemd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    """The systemd that runs for all tests, in a list from which a test takes it that leaves it in disorder."""
    try:
        with running(systemd, tmp_path_factory.getbasetemp()) as machine:
            yield [machine]
    except Unavailable as error:
        give_up(error)


@pytest.fixture
def machine(
    booted: list[Machine], systemd: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A systemd that runs, and knows nothing of the tests before this one."""
    with contextlib.ExitStack() as stack:
        machine = booted[0] if booted else stack.enter_context(running(systemd, tmp_path_factory.getbasetemp()))
        machine.directory = tmp_path
        yield machine
        if booted:
            try:
                machine.forget()
            except BaseException:
                # The others get one of their own each.
                booted.clear()
                machine.end()
                raise


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """A service of that systemd, not yet started."""
    unit = Unit(machine)
    yield unit
    print(unit.log)  # noqa: T201 - pytest shows it with a failure


@pytest.fixture
def old_unit(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """A service of the systemd that this machine has itself, where that is older than 253."""
    words = subprocess.run([SYSTEMD, "--version"], capture_output=True, text=True, check=False).stdout.split()
    if words[:1] != ["systemd"] or int(words[1]) >= NEW_ENOUGH:
        pytest.skip("this machine has no older systemd")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    try:
        if os.geteuid() != 0:
            raise Unavailable("only root can run a systemd of its own")
        with running(nothing, tmp_path_factory.getbasetemp()) as machine:
            machine.directory = tmp_path
            unit = Unit(machine)
            yield unit
            print(unit.log)  # noqa: T201 - pytest shows it with a failure
    except Unavailable as error:
        give_up(error)


def give_up(error: Unavailable) -> NoReturn:
    """Skip the test; but where the tests are to vouch for the project, there has to be a systemd."""
    if os.environ.get("CI") == "true":
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))
