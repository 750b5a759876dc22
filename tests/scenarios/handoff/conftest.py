"""The service under test, as a fixture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.handoff.harness import Service, running


@pytest.fixture
def run_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Run a service on a loop; it is stopped at the test's end, and nothing of it may be left then."""
    with contextlib.ExitStack() as stack:

        def run(loop: str, **settings: Any) -> Service:
            return stack.enter_context(running(tmp_path, loop, **settings))

        yield run
