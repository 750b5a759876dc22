"""Functions of the application that are called when a worker has ended."""

from __future__ import annotations

import logging

import anyio.lowlevel
import pytest

from ecdysis_async._service import worker_exit
from ecdysis_async._service.worker_exit import WorkerExit, on_worker_exit, tell_application

ENDED = WorkerExit(pid=7, worker=1, generation=3, returncode=-9, was_expected=False)


async def test_each_is_called_also_after_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_exit, "_hooks", [])
    seen: list[WorkerExit] = []

    @on_worker_exit
    def fail(ended: WorkerExit) -> None:
        raise ValueError(ended.pid)

    @on_worker_exit
    async def note(ended: WorkerExit) -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(ended)

    assert on_worker_exit(seen.append) == seen.append
    with caplog.at_level(logging.ERROR, "ecdysis_async"):
        await tell_application(WorkerExit.from_json(ENDED.to_json()))
    assert seen == [ENDED, ENDED]
    assert [each.getMessage() for each in caplog.records] == ["the application's on_worker_exit has failed for pid 7"]
    assert (fail.__name__, note.__name__) == ("fail", "note")
