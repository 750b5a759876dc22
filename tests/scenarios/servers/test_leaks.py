"""Nothing is left behind by restarts of ``ecdysis run``: not in the anchor, and not from worker to worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.scenarios.servers.clients import fetch
from tests.scenarios.servers.harness import PATIENCE_SECONDS, Service, find_blemishes, running

pytestmark = pytest.mark.main_python_only

RESTARTS = 5
SETTINGS = {"probation": 0.05, "drain_timeout": 1}


@pytest.mark.timeout(600)  # a few seconds on an idle machine
def test_restarts_leave_nothing(tmp_path: Path) -> None:
    asyncio.run(restart_often(tmp_path))


async def restart_often(directory: Path) -> None:
    async with running("uvicorn", "uvloop", directory, settings=SETTINGS) as service:
        anchor = psutil.Process(service.pids[0]).parent()
        assert anchor is not None
        before: list[dict[str, int]] = []
        for number in range(RESTARTS):
            assert (await service.restart()).get("outcome") == "settled"
            await service.wait_for_generations(number + 2)
            await service.wait_for_ends(number + 1)
            assert (await fetch(service.port, "/echo/here")).endswith(" here")
            if not before:
                before = await settle(service, anchor)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Whoever was here last, a client or a command, may still leave.
            while has_more(count(service, anchor), before):  # noqa: ASYNC110 - another process has no event
                await asyncio.sleep(0.02)
        assert psutil.Process(service.pids[-1]).parent() == anchor
    assert find_blemishes(directory) == []


async def settle(service: Service, anchor: psutil.Process) -> list[dict[str, int]]:
    """Count once the generation before is gone from the anchor."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (facts := count(service, anchor))[0]["children"] > 1:  # noqa: ASYNC110 - another process has no event
            await asyncio.sleep(0.02)
    return facts


def count(service: Service, anchor: psutil.Process) -> list[dict[str, int]]:
    """Count what could be left behind, in the anchor and in the worker."""
    return [
        {"descriptors": each.num_fds(), "threads": each.num_threads(), "children": len(each.children())}
        for each in (anchor, psutil.Process(service.pids[-1]))
    ]


def has_more(now: list[dict[str, int]], before: list[dict[str, int]]) -> bool:
    return any(facts[name] > former[name] for facts, former in zip(now, before, strict=True) for name in facts)
