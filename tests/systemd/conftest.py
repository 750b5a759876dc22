"""The real systemd as a fixture, and services that it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.systemd.harness import Unit
from tests.systemd.machine import Machine, Unavailable, fetch, running


@pytest.fixture(scope="session")
def systemd(request: pytest.FixtureRequest) -> Path:
    """Where a systemd is unpacked."""
    try:
        if os.geteuid() != 0:
            raise Unavailable("only root can run a systemd of its own")
        return fetch(request.config.cache.mkdir("systemd"))
    except Unavailable as error:
        give_up(error)


@pytest.fixture
def machine(systemd: Path, tmp_path: Path) -> Iterator[Machine]:
    """A systemd that runs."""
    try:
        with running(systemd, tmp_path) as machine:
            yield machine
    except Unavailable as error:
        give_up(error)


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """A service of that systemd, not yet started."""
    unit = Unit(machine)
    yield unit
    print(unit.log)  # noqa: T201 - pytest shows it with a failure


def give_up(error: Unavailable) -> NoReturn:
    """Skip the test; but where the tests are to vouch for the project, there has to be a systemd."""
    if os.environ.get("CI") == "true":
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))
