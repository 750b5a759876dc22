"""A worker ends, whatever its application has left behind: after a restart, at a stop, or by its anchor's hand."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.scenarios.anchor.harness import AnchoredService

pytestmark = pytest.mark.newest_python_only

Run = Callable[..., AnchoredService]

THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(600,), name='poller').start()"
LIMITS = {"drain_timeout": 1, "exit_timeout": 0.5}


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


def test_a_worker_that_cannot_end_itself_is_killed(run_anchor: Run) -> None:
    planted = "from ecdysis_async._anchor import reconcile; reconcile.LINGER_SECONDS = reconcile.LOOK_SECONDS = 0.5"
    grace = "from ecdysis_async._handoff import ancestors; ancestors.GRACE_SECONDS = 600"
    service = run_anchor(workers=1, ecdysis=LIMITS, handoffs=LIMITS, at_anchor=planted, at_import=grace)
    [former] = service.workers().values()
    with service.hold(former):
        service.roll_out("settled")
        service.signal(former, signal.SIGSTOP)
        assert service.wait_for_death(former) in (-signal.SIGKILL, None)
    service.wait_for_log("it is killed")
