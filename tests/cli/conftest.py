"""Services for the commands, and a default directory of each test's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Run
from tests.scenarios.handoff.harness import PROJECT, Service, running


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a default directory of this test's own, for services and commands alike."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return directory / "ecdysis"


@pytest.fixture
def run_service(tmp_path: Path) -> Iterator[Run]:
    """Run services, each with a control socket of the default directory."""
    with contextlib.ExitStack() as stack:

        def run(loop: str, name: str = "api", **settings: Any) -> Service:
            directory = tmp_path / f"service {name}"
            directory.mkdir()
            options = {"control_socket": name, **settings.pop("ecdysis", {})}
            return stack.enter_context(running(directory, loop, ecdysis=options, **settings))

        yield run
