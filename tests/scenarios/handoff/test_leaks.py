"""Nothing is left behind: not by restarts that fail, in one process, and not from generation to generation."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from tests.scenarios.handoff.harness import Service
from tests.scenarios.stuck import LIMITS, STUCK, restart_under_load

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

FAILED_RESTARTS = 200
GENERATIONS = 16

# Far more than wait for work at any time, and far fewer than there were if one was left by each restart.
IDLE_THREADS = 10


def facts(pid: int) -> dict[str, int]:
    """Count what could be left behind in a process."""
    process = psutil.Process(pid)
    return {
        "descriptors": process.num_fds(),
        # Those that wait for work are as many as there was work for at once, which differs with the machine's load.
        "threads": max(process.num_threads(), IDLE_THREADS),
        "children": len(process.children()),
    }


def wait_until_no_more(service: Service, pid: int, before: dict[str, int]) -> None:
    """Wait until a process has no more of anything than it had, or than another one had: a client may still leave."""
    service.wait_until(
        lambda: all(count <= before[name] for name, count in facts(pid).items()),
        f"{facts(pid)}, and it was {before}",
    )


@pytest.mark.timeout(600)
@pytest.mark.backends("uvloop", "trio")
def test_failed_restarts_leave_nothing(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis={"command": ["false"]})
    first = service.pids[0]
    failures = f"""
for _ in range({FAILED_RESTARTS // 10}):
    try:
        await ecdysis.restart()
    except ecdysis_async.SuccessorFailed:
        pass
"""
    service.run(failures)
    # The descriptors in reserve are there again a moment after the answer.
    service.wait_until(lambda: service.run("len(ecdysis._life.reserve._descriptors)") > 0, "there is no reserve")
    before = facts(first)
    memory = psutil.Process(first).memory_info().rss
    for _ in range(9):
        service.run(failures)
    wait_until_no_more(service, first, before)
    assert psutil.Process(first).memory_info().rss - memory < 4 * 1024 * 1024


@pytest.mark.timeout(600)  # a quarter of a minute on an idle machine
@pytest.mark.backends("trio")  # the load test counts on all loops
def test_generations_leave_nothing(backend: str, run_service: Run) -> None:
    service = run_service(backend)
    before: dict[str, int] = {}
    for _ in range(GENERATIONS):
        pid = service.restart("settled")["successor_pid"]
        service.wait_for_death(service.pids[-2])
        service.wait_until(lambda: service.run("len(ecdysis.draining_generations)") == 0, "it is not let go of")
        before = before or facts(pid)
        wait_until_no_more(service, pid, before)


@pytest.mark.timeout(7200)  # seconds, for as many restarts as are usual
@pytest.mark.backends("uvloop")
def test_generations_that_cannot_end_leave_nothing(backend: str, run_service: Run) -> None:
    service = run_service(backend, ecdysis=LIMITS, at_start=STUCK)
    restart_under_load(service, lambda: service.restart("settled"), lambda: service.ask()["pid"])
