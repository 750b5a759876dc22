"""A worker ends, whatever its application has left behind: after a restart, at a stop, or by its anchor's hand."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.scenarios import stuck
from tests.scenarios.anchor.harness import AnchoredService
from tests.scenarios.left_behind import LEFT, LIMITS, leave_behind_in_a_worker

pytestmark = pytest.mark.main_python_only

Run = Callable[..., AnchoredService]

THREAD = LEFT["a thread"].code


def test_workers_end_after_each_restart_and_at_the_stop(run_anchor: Run) -> None:
    service = run_anchor(workers=2, ecdysis=LIMITS, handoffs=LIMITS, at_start=THREAD)
    for _ in range(2):
        former = service.workers().values()
        # It returns although no process of the former generation would end by itself.
        service.roll_out("drained")
        for pid in former:
            assert service.wait_for_death(pid) in (0, None)
    assert service.log.count("thread poller") >= 4
    service.stop()


@pytest.mark.parametrize(
    ("loop", "what"),
    [
        ("asyncio", "a child process that ignores SIGTERM"),
        ("uvloop", "a blocked loop"),
        ("trio", "a job in an executor"),
    ],
)
def test_a_worker_ends_after_a_restart_and_at_a_stop(run_anchor: Run, loop: str, what: str) -> None:
    leave_behind_in_a_worker(run_anchor(workers=1, loop=loop, ecdysis=LIMITS, handoffs=LIMITS), LEFT[what])


def test_a_worker_that_cannot_end_itself_is_killed(run_anchor: Run) -> None:
    planted = "from ecdysis_async._anchor import reconcile; reconcile.LINGER_SECONDS = reconcile.LOOK_SECONDS = 0.5"
    grace = "from ecdysis_async._handoff import ancestors; ancestors.GRACE_SECONDS = 600"
    # The test has to come before its drain is over.
    limits = {"drain_timeout": 5, "exit_timeout": 0.5}
    service = run_anchor(workers=1, ecdysis=limits, handoffs=limits, at_anchor=planted, at_import=grace)
    [former] = service.workers().values()
    with service.hold(former):
        service.roll_out("settled")
        service.signal(former, signal.SIGSTOP)
        assert service.wait_for_death(former) in (-signal.SIGKILL, None)
    service.wait_for_log("it is killed")


@pytest.mark.timeout(7200)  # seconds, for as many restarts as are usual
def test_workers_that_cannot_end_leave_nothing(run_anchor: Run) -> None:
    service = run_anchor(workers=2, ecdysis=stuck.LIMITS, handoffs=stuck.LIMITS, at_start=stuck.STUCK)
    stuck.restart_under_load(service, lambda: service.roll_out("settled"), lambda: service.anchor)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_worker_has_one_thread_and_forks_without_a_warning(run_anchor: Run, loop: str) -> None:
    service = run_anchor(workers=1, loop=loop)
    # Those that have opened files for its start end when they have nothing to do.
    service.wait_until(lambda: service.run("len(os.listdir('/proc/self/task'))") == 1, "it has more threads")
    # Warnings are errors here.
    status = service.run("pid = os.fork()\nif pid == 0: os._exit(7)\nos.waitpid(pid, 0)[1]")
    assert status == 7 << 8
