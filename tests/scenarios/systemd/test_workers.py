"""The workers of a printed unit, and what systemd makes of how they are."""

from __future__ import annotations

import signal

import pytest

from tests.scenarios.systemd.harness import Unit
from tests.scenarios.systemd.load import LOST, Load
from tests.scenarios.systemd.test_unit import PrintedUnit

pytestmark = pytest.mark.main_python_only


def test_the_watchdog_bites_where_no_worker_turns(unit: Unit) -> None:
    """The main process, whose own loop turns, does not feed it for a service that answers nobody."""
    printed = PrintedUnit(unit, workers=1)
    unit.systemctl("start")
    worker = unit.ask("who", printed.address)
    with Load(printed.address[1]) as load:
        unit.machine.kill(worker["pid"], signal.SIGSTOP)
        unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
        load.wait_for(1, 30)
    # What the worker had accepted; all others have waited.
    assert set(load.counts.failures) <= LOST
    found = unit.ask("who", printed.address)
    assert found["parent"] == unit.main_pid != worker["parent"]


def test_workers_of_a_killed_anchor_do_not_hold_the_next_start_up(unit: Unit) -> None:
    """Clients wait in the queue that systemd keeps until the last process has gone, which does not drain for long."""
    printed = PrintedUnit(unit, "--drain-timeout=600")
    # Without it, systemd itself ends the workers at once.
    unit.keep_log("KillMode=control-group")
    unit.systemctl("start")
    unit.wait_until(lambda: unit.show("ActiveState") == "active")
    with Load(printed.address[1]) as load:
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
        load.wait_for(1, 30)
    assert set(load.counts.failures) <= LOST
