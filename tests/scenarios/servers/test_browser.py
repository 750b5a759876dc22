"""A real browser: its page keeps a WebSocket open, is told of each restart, and comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.servers import programs
from tests.scenarios.servers.harness import find_blemishes, running

pytestmark = pytest.mark.main_python_only

RESTARTS = 2
# A WebSocket is closed after half of the drain; the other half is a browser's for its answer, on a busy machine.
SETTINGS = {"probation": 0.05, "drain_timeout": 8}


@pytest.mark.parametrize("server", ["uvicorn", "aiohttp"])
def test_a_page_comes_back_after_each_restart(server: str, tmp_path: Path) -> None:
    programs.find("chromium")
    asyncio.run(keep_a_page_open(server, tmp_path))


async def keep_a_page_open(server: str, directory: Path) -> None:
    async with running(server, "uvloop", directory, settings=SETTINGS) as service:
        with programs.running(programs.browser(directory, f"http://127.0.0.1:{service.port}/page"), directory):
            notes = [f"{service.generations[-1]} hello"]
            await service.wait_for_notes(len(notes))
            for number in range(RESTARTS):
                report = await service.restart()
                assert report.get("outcome") == "settled", report
                await service.wait_for_generations(number + 2)
                # Closed in good order, for the right reason, and open again.
                notes += ["1012 true", f"{service.generations[-1]} hello"]
                await service.wait_for_notes(len(notes))
    # The stop closes it once more, and nobody is there any longer for a note of that.
    assert service.notes == notes
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.drain.cut for report in reports] == [0] * RESTARTS
    assert find_blemishes(directory) == []
