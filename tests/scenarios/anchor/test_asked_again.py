"""A restart that is asked for while the service starts, or restarts, is done when it can be, and once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from tests.scenarios.anchor.harness import AnchoredService
from tests.scenarios.handoff.harness import Json

pytestmark = pytest.mark.main_python_only

Run = Callable[..., AnchoredService]


def test_a_restart_that_is_asked_for_while_the_service_starts_waits_for_it(run_anchor: Run) -> None:
    service = run_anchor(workers=2, at_start="await wait()", serves=False)
    service.wait_for("waiting")
    reports: list[Json] = []
    asking = threading.Thread(target=lambda: reports.append(service.roll_out()))
    asking.start()
    service.wait_until(lambda: service.status()["restart"] is not None, "nobody has noted the restart")
    assert service.status()["waiting_for"] == "the start to end: 0 of 2 workers serving"
    service.configure(at_start="")
    service.release()
    asking.join(60)
    assert [report["outcome"] for report in reports] == ["settled"]
    assert service.status()["generation"] == 2
    service.addresses = service.wait_for("ready")["addresses"]


def test_signals_that_come_during_a_restart_are_one_more_restart(run_anchor: Run) -> None:
    service = run_anchor(workers=1)
    service.configure(at_start="await wait()")
    service.signal(service.anchor, signal.SIGHUP)
    service.wait_for("waiting")
    for _ in range(3):
        service.signal(service.anchor, signal.SIGHUP)
    service.wait_for_log("another restart follows")
    service.configure(at_start="")
    service.release()
    service.wait_until(lambda: service.status()["generation"] == 3, "no other restart has followed")
    service.wait_until(lambda: service.status()["restart"] is None, "it goes on")
    assert service.log.count("the restart begins") == 2
