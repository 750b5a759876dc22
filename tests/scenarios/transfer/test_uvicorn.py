"""uvicorn's clients keep their sockets over many restarts, and those of a service that transfers nothing do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.servers.harness import find_blemishes, running
from tests.scenarios.transfer.clients import Crowd

pytestmark = pytest.mark.main_python_only

RESTARTS = 5

# The default of the drain: to move 550 connections takes 0.1 seconds of a processor, and seven seconds where thirty
# others want it. Those that have not moved at the end of the drain are closed.
SETTINGS = {"probation": 0.02, "drain_timeout": 30, "max_draining": RESTARTS + 1}


@pytest.mark.parametrize(("server", "loop"), [("uvicorn-moving", "asyncio"), ("uvicorn-h11-moving", "uvloop")])
def test_every_client_keeps_its_socket_over_five_restarts(server: str, loop: str, tmp_path: Path) -> None:
    crowd, transferred = asyncio.run(restart_among(server, loop, tmp_path, RESTARTS, idle=500, active=50))
    assert crowd.closed == 0
    assert transferred >= 500 * RESTARTS
    assert set(crowd.generations) >= {1, RESTARTS + 1}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_without_transfer_the_drain_closes_them(loop: str, tmp_path: Path) -> None:
    crowd, transferred = asyncio.run(restart_among("uvicorn", loop, tmp_path, 2, idle=50, active=10, drain_timeout=4))
    # Each idle one at the end of each drain, and the others with their next answer.
    assert crowd.closed >= 100
    assert transferred == 0


async def restart_among(
    server: str, loop: str, directory: Path, restarts: int, *, idle: int, active: int, drain_timeout: float = 30
) -> tuple[Crowd, int]:
    settings = {**SETTINGS, "drain_timeout": drain_timeout}
    async with (
        running(server, loop, directory, settings=settings, is_main=True) as service,
        asyncio.TaskGroup() as task_group,
    ):
        crowd = Crowd(service.port, idle=idle, active=active)
        task_group.create_task(crowd.run())
        await crowd.all_arrived()
        for number in range(restarts):
            answer = await service.restart()
            assert answer.get("outcome") == "settled", answer
            await service.wait_for_generations(number + 2)
            # The next one begins when this one's connections have moved, or the drain has closed them.
            await service.wait_for_ends(number + 1)
        crowd.end()
    assert not crowd.failures, crowd.failures
    reports = [report for pid in service.pids[:-1] if (report := service.reports[pid])]
    assert [report.drain.cut for report in reports] == [0] * restarts
    assert find_blemishes(directory) == []
    return crowd, sum(report.drain.transferred for report in reports)
