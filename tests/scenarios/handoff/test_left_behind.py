"""Nothing outlives its drain: whatever an application leaves behind, its process ends, and it is said what kept it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import Service

pytestmark = pytest.mark.main_python_only

THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(600,), name='poller').start()"

EXECUTOR = """
import concurrent.futures, time
jobs = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="job")
jobs.submit(time.sleep, 600)
None
"""

CHILD = """
import multiprocessing, time, warnings
warnings.simplefilter("ignore")
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), name="helper")
child.start()
child.pid
"""

# What is run in a generation that serves, and what is named of it.
LEFT: dict[str, tuple[str, str]] = {
    "a thread": (THREAD, "thread poller"),
    "a job in an executor": (EXECUTOR, "thread job_0"),
    "an exit hook": ("import atexit, time; atexit.register(time.sleep, 600); None", "thread MainThread"),
    "a child process": (CHILD, "child process helper"),
}


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_replaced_process_ends_and_what_kept_it_is_named(
    backend: str, what: str, run_service: Callable[..., Service]
) -> None:
    code, named = LEFT[what]
    service = run_service(backend, ecdysis={"drain_timeout": 1, "exit_timeout": 0.5})
    first = service.pids[0]
    child = service.run(code)
    service.restart("settled")
    assert service.wait_for_death(first) == 0
    service.wait_for_log("ended by force (exit_timeout); it was kept by ")
    assert named in service.log
    # The successor has it in the report of the restart that it came from.
    service.wait_until(
        lambda: named in json.dumps(service.run("ecdysis.last_report.left_behind")), "the report does not name it"
    )
    if child is not None:
        service.wait_until(lambda: not Path(f"/proc/{child}").exists(), "the child lives on")


@pytest.mark.backends("asyncio", "trio")
def test_a_stop_ends_a_process_that_a_thread_keeps(backend: str, run_service: Callable[..., Service]) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 1, "exit_timeout": 0.5})
    service.run(THREAD)
    service.signal(service.pids[0], signal.SIGTERM)
    assert service.wait_for_death(service.pids[0]) == 0
    assert "thread poller" in service.log


@pytest.mark.backends("asyncio")
def test_a_blocked_loop_does_not_outlive_its_drain(backend: str, run_service: Callable[..., Service]) -> None:
    service = run_service(backend, ecdysis={"drain_timeout": 0.5, "exit_timeout": 0.5})
    first = service.pids[0]
    # The loop stands still from the moment in which it has settled: the drain never ends.
    service.run(
        "import time\n"
        "async def stand():\n"
        "    await ecdysis.draining.wait(); time.sleep(600)\n"
        "ecdysis._task_group.start_soon(stand)\nNone"
    )
    service.restart("serving")
    assert service.wait_for_death(first) == 0
    service.wait_for_log("thread MainThread at <planted>")
    assert service.ask()["pid"] != first


@pytest.mark.backends("asyncio")
def test_a_process_that_cannot_end_itself_is_killed_by_its_successor(
    backend: str, run_service: Callable[..., Service]
) -> None:
    planted = "from ecdysis_async._handoff import ancestors; ancestors.GRACE_SECONDS = 0.5"
    service = run_service(backend, ecdysis={"drain_timeout": 0.5, "exit_timeout": 0.5}, at_import=planted)
    first = service.pids[0]
    with service.begin("hold"):
        service.wait_for("holding")
        service.restart("settled")
        service.signal(first, signal.SIGSTOP)
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
