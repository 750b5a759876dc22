"""What the sides of a handoff share: the log that says which generation speaks, and logs that are opened anew."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import anyio
import pytest

from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._system import log_files
from tests.handoff.scripted import a_generation


def test_each_line_says_which_generation_speaks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ecdysis_async"):
        GenerationLog(7).info("it is %s", "ready")
    assert caplog.messages == [f"[generation 7, pid {os.getpid()}] it is ready"]


async def test_logs_are_opened_anew_and_a_handler_that_fails_ends_nothing(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    logger = logging.getLogger(f"test.{os.getpid()}.{tmp_path.name}")
    logger.addHandler(handler)
    try:
        (tmp_path / "log").rename(tmp_path / "log.1")
        with a_generation() as (generation, _), caplog.at_level(logging.INFO, "ecdysis_async"):
            assert await generation.reopen_logs() == 1
        assert (tmp_path / "log").exists()
        assert "reopened 1 log file" in caplog.text
    finally:
        logger.removeHandler(handler)
        handler.close()


async def test_a_request_that_comes_by_two_ways_opens_logs_once_and_is_counted_for_both(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    is_asked, may_go_on = anyio.Event(), anyio.Event()

    async def reopen() -> None:
        opened.append(len(opened))
        is_asked.set()
        await may_go_on.wait()

    counts: list[int] = []

    async def ask(generation: Generation, request: str) -> None:
        counts.append(await generation.reopen_logs(request))

    monkeypatch.setattr(log_files, "_reopeners", [reopen])
    with a_generation() as (generation, _):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, generation, "one")
            await is_asked.wait()
            tasks.start_soon(ask, generation, "one")
            may_go_on.set()
        await ask(generation, "one")
        assert (opened, counts) == ([0], [1, 1, 1])
        # One that comes by a signal is another one, and does not hide that this one was done.
        await ask(generation, "")
        await ask(generation, "one")
        assert (opened, counts) == ([0, 1], [1] * 5)
        await ask(generation, "another")
        await ask(generation, "")
        assert (opened, counts) == ([0, 1, 2, 3], [1] * 7)
