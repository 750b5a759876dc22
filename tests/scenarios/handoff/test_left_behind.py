"""Nothing outlives its drain: whatever an application leaves behind, its process ends, and it is said what kept it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import Service
from tests.scenarios.left_behind import LEFT, LIMITS, has_ended, leave_behind

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize("what", ["a thread", "a job in an executor", "an exit hook", "a child process"])
@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_replaced_process_ends_and_what_kept_it_is_named(
    backend: str, what: str, run_service: Callable[..., Service]
) -> None:
    left = LEFT[what]
    service = run_service(backend, ecdysis=LIMITS)
    first = service.pids[0]
    child = service.run(left.code)
    service.restart("settled")
    assert service.wait_for_death(first) == 0
    service.wait_for_log("ended by force (exit_timeout); it was kept by ")
    assert left.named in service.log
    # The successor has it in the report of the restart that it came from.
    service.wait_until(
        lambda: left.named in json.dumps(service.run("ecdysis.last_report.left_behind")), "the report does not name it"
    )
    if child is not None:
        service.wait_until(lambda: has_ended(child), "the child lives on")


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_process_ends_after_a_restart_and_at_a_stop(backend: str, run_service: Callable[..., Service]) -> None:
    left = {
        "asyncio": "a blocked loop",
        "uvloop": "a task that cannot be cancelled",
        "trio": "a child process that ignores SIGTERM",
    }
    leave_behind(run_service(backend, ecdysis=LIMITS), LEFT[left[backend]])


@pytest.mark.backends("asyncio")
def test_a_process_that_cannot_end_itself_is_killed_by_its_successor(
    backend: str, run_service: Callable[..., Service]
) -> None:
    planted = "from ecdysis_async._handoff import ancestors; ancestors.GRACE_SECONDS = 0.5"
    service = run_service(backend, ecdysis={"drain_timeout": 3, "exit_timeout": 0.5}, at_import=planted)
    first = service.pids[0]
    # By its successor, as soon as that knows of the drain: it would be over by the time that a test has heard of it.
    service.arm("successor", "settled", "stop-peer")
    with service.begin("hold"), service.begin("restart", until="settled"):
        assert service.wait_for_death(first) == -signal.SIGKILL
    service.wait_for_log("does not end itself: it is killed")


def test_a_program_that_goes_on_after_its_service_is_left_alone(
    tmp_path: Path, run_service: Callable[..., Service]
) -> None:
    after = tmp_path / "after"
    code = f"import threading, time; threading.Timer(3, lambda: open({str(after)!r}, 'w').close()).start(); None"
    service = run_service("asyncio", ecdysis={"drain_timeout": 0.2, "exit_timeout": 0.2})
    service.run(code)
    service.run("ecdysis.stop()")
    service.wait_for_death(service.pids[0])
    # The application itself has stopped its service: nobody has asked for the end of the process.
    assert after.exists()
