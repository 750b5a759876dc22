"""The watcher of `--reload`, as the service sees it: a child that comes and goes with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import anyio
import psutil
import pytest

from ecdysis_async._anchor import reload
from ecdysis_async._anchor.reload import Watched, require_watchfiles, watch_files
from ecdysis_async.errors import StartupError

pytestmark = pytest.mark.backends("asyncio")

PATIENCE_SECONDS = 60


def test_what_watches_is_a_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    require_watchfiles()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="pip install"):
        require_watchfiles()


async def test_the_watcher_ends_with_the_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # Of other tests, as the systemd that several of them share.
    former = set(psutil.Process().children())
    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(watch_files, str(tmp_path / "control"), Watched((str(tmp_path),)))
            while "watching" not in caplog.text:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
            (watcher,) = set(psutil.Process().children()) - former
            task_group.cancel_scope.cancel()
    assert f"watching {tmp_path}: the service restarts when a file is saved" in caplog.text
    assert not watcher.is_running()


async def test_a_watcher_that_ends_is_told_and_costs_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "WATCHER", "ecdysis_async.no_such_module")
    with anyio.fail_after(PATIENCE_SECONDS):
        await watch_files("control", Watched(("here",)))
    assert "nobody watches for changes any more: the watcher has ended (exit status 1)" in caplog.text
