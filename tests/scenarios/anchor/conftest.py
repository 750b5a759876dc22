"""The service with an anchor, as a fixture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.anchor.harness import AnchoredService, Watchdog, anchored


@pytest.fixture
def run_anchor(tmp_path: Path) -> Iterator[Callable[..., AnchoredService]]:
    """Run a service with an anchor; it is stopped at the test's end, and nothing of it may be left then."""
    with contextlib.ExitStack() as stack:

        def run(**settings: Any) -> AnchoredService:
            return stack.enter_context(anchored(tmp_path, **settings))

        yield run


@pytest.fixture
def watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchdog]:
    """Systemd's watchdog for what is run next: it wants to be fed each 0.4 seconds."""
    with contextlib.closing(Watchdog(tmp_path)) as watchdog:
        monkeypatch.setenv("NOTIFY_SOCKET", watchdog.address)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        yield watchdog
