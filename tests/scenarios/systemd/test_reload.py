"""Reloads on a real systemd: under load, to broken releases, of either type, and through every failure of theirs."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter

import pytest

from tests.scenarios.systemd.harness import NAME, Client, Unit
from tests.scenarios.systemd.load import LOST, Load
from tests.scenarios.systemd.machine import PROJECT

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize(("kind", "reloads"), [("notify", 10), ("notify-reload", 4)])
def test_reloads_in_a_row_lose_nothing(unit: Unit, kind: str, reloads: int) -> None:
    unit.configure(ecdysis={"probation": 0.0 if kind == "notify-reload" else 0.05, "drain_timeout": 2})
    unit.start("WatchdogSec=5", kind=kind)
    first = unit.main_pid
    with Load(unit.port) as load:
        for generation in range(2, reloads + 2):
            former = unit.main_pid
            unit.reload()
            # At once, and not some time later.
            assert unit.main_pid != former
            load.wait_for(generation)
    assert load.counts.failures == Counter()
    assert load.counts.answers == load.counts.requests
    assert unit.ask("who")["pid"] == unit.main_pid != first
    assert (unit.show("NRestarts"), unit.show("ActiveState")) == ("0", "active")
    unit.wait_for_status(f"generation {reloads + 1} is serving")
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")


@pytest.mark.parametrize(
    ("code", "ready_timeout", "reason"),
    [
        ("raise ValueError('a broken release')", 60, "a broken release"),
        ("import signal; signal.pause()", 12, "was not ready within 12 seconds"),
    ],
    ids=["broken", "hangs"],
)
def test_a_reload_that_fails_says_so_and_the_old_generation_serves(
    unit: Unit, code: str, ready_timeout: int, reason: str
) -> None:
    # Also what a good release has for its start at the end.
    unit.configure(ecdysis={"ready_timeout": ready_timeout, "probation": 0.05, "drain_timeout": 2})
    unit.start()
    first = unit.main_pid
    with Load(unit.port) as load:
        with Client(unit.addresses[0]) as client:
            unit.configure(at_start=code)
            assert unit.machine.fails("systemctl", "reload", NAME)
            assert client.ask("who")["pid"] == unit.ask("who")["pid"] == unit.main_pid == first
        load.wait_for(1)
        assert (unit.show("ActiveState"), unit.show("SubState")) == ("active", "running")
        unit.wait_for_status(reason)
        assert "generation 1 is serving" in unit.show("StatusText")
        unit.configure(at_start="")
        unit.reload()
        load.wait_for(2)
    assert load.counts.failures == Counter()
    assert unit.ask("who")["pid"] == unit.main_pid != first


def test_a_restart_that_is_rolled_back_fails_the_reload(unit: Unit) -> None:
    unit.configure(ecdysis={"probation": 30})
    unit.start()
    first = unit.main_pid
    with Load(unit.port) as load:
        reload = unit.machine.begin("systemctl", "reload", NAME)
        load.wait_for(2, 20)
        assert load.counts.failures == Counter()
        unit.machine.kill(unit.ask("who")["pid"], signal.SIGKILL)
        assert reload.wait() != 0
        load.wait_for(1, 30)
        assert unit.ask("who")["pid"] == unit.main_pid == first
        unit.wait_for_status("SIGKILL")
        # What the killed process had accepted; and nothing is lost from then on.
        lost = load.counts.failures.copy()
        assert set(lost) <= LOST
        assert unit.ask("restart serving")["outcome"] == "serving"
        load.wait_for(2, 20)
    assert load.counts.failures == lost


def test_a_reload_by_signal_that_fails_shows_in_the_status(unit: Unit) -> None:
    unit.start(kind="notify-reload")
    first = unit.main_pid
    with Load(unit.port) as load:
        unit.configure(at_start="raise ValueError('a broken release')")
        # systemd has no way to be told that it failed; but it must not wait for its timeout either.
        unit.reload()
        load.wait_for(1, 20)
        assert unit.ask("who")["pid"] == unit.main_pid == first
        unit.wait_for_status("a broken release")
        unit.configure(at_start="")
        unit.reload()
        load.wait_for(2)
    assert load.counts.failures == Counter()


def test_a_reload_by_signal_waits_for_the_restart_that_goes_on(unit: Unit) -> None:
    unit.configure(ecdysis={"probation": 1})
    unit.start(kind="notify-reload")
    with Load(unit.port) as load:
        assert unit.ask("restart serving")["outcome"] == "serving"
        # systemd signals the next main process in the very moment in which it learns of it.
        unit.reload()
        load.wait_for(3)
    assert load.counts.failures == Counter()
    answer = unit.ask("who")
    assert (answer["pid"], answer["generation"]) == (unit.main_pid, 3)


def test_the_pid_file_names_the_main_process_once_it_is_that(unit: Unit) -> None:
    path = unit.machine.directory / "app.pid"
    unit.start(f"PIDFile={path}")
    with Load(unit.port) as load:
        for generation in (2, 3):
            former = unit.main_pid
            unit.reload()
            # With PIDFile= systemd reads it when the reload has ended, and believes it.
            assert int(path.read_text()) == unit.main_pid != former
            load.wait_for(generation)
    assert load.counts.failures == Counter()
    unit.machine.systemctl("daemon-reload")
    assert int(path.read_text()) == unit.main_pid == unit.ask("who")["pid"]


def test_systemd_is_executed_anew_under_load_and_knows_all_it_knew(unit: Unit) -> None:
    unit.configure(ecdysis={"drain_timeout": 2})
    # It does not bite: neither while systemd is executed anew, nor while the service stands still at the end.
    unit.start("WatchdogSec=30", "FileDescriptorStoreMax=8", "Restart=always", "RestartSec=0")
    with Load(unit.port) as load:
        for generation in (2, 3):
            # The service's socket and its control socket.
            unit.wait_until(lambda: unit.show("NFileDescriptorStore") == "2")
            main = unit.main_pid
            # The second time the former generation drains.
            unit.machine.execute_anew()
            assert (unit.main_pid, unit.show("NFileDescriptorStore")) == (main, "2")
            unit.reload()
            load.wait_for(generation)
            assert unit.ask("who")["pid"] == unit.main_pid != main
    assert load.counts.failures == Counter()
    assert unit.show("NRestarts") == "0"
    # What is kept is of use still.
    unit.machine.kill(unit.main_pid, signal.SIGSTOP)
    with Client(unit.addresses[0]).say("echo patience") as client:
        unit.machine.execute_anew()
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        assert client.hear() == "1 patience"
    unit.systemctl("stop")
    assert unit.show("Result") == "success"


@pytest.mark.parametrize("phase", ["initialising", "probation"])
def test_it_survives_systemd_being_executed_anew_in_a_restart(unit: Unit, phase: str) -> None:
    unit.configure(ecdysis={"probation": 60 if phase == "probation" else 0.1})
    unit.start("WatchdogSec=5", "FileDescriptorStoreMax=8")
    first = unit.main_pid
    unit.configure(ecdysis={"probation": 0.1}, hold="ready" if phase == "initialising" else "")
    with Load(unit.port) as load:
        with Client(unit.addresses[0]) as client:
            client.say("restart serving")
            if phase == "initialising":
                unit.wait_until(lambda: "held\n" in unit.log)
            else:
                assert json.loads(client.hear())["outcome"] == "serving"
            unit.machine.execute_anew()
            assert unit.main_pid == first
            unit.release()
            if phase == "initialising":
                assert json.loads(client.hear())["outcome"] == "serving"
        load.wait_for(2)
        # The probation is ended by another restart; systemctl reload would wait, because the unit reloads already.
        assert unit.ask("restart settled")["outcome"] == "settled"
        load.wait_for(3)
    assert load.counts.failures == Counter()
    answer = unit.ask("who")
    assert (answer["generation"], answer["pid"]) == (3, unit.main_pid)
    assert unit.show("NRestarts") == "0"
    unit.systemctl("stop")
    assert unit.show("Result") == "success"


def test_who_asks_by_the_control_socket_gets_the_new_pid_or_the_reason(unit: Unit) -> None:
    command = [sys.executable, "-m", "ecdysis_async.cli", "restart", "--json", "--control", unit.control]
    unit.configure(ecdysis={"drain_timeout": 2})
    # As ExecReload= it writes into the journal; here into the log of the test.
    unit.start(f"ExecReload=\nExecReload={' '.join(command)}")
    with Load(unit.port) as load:
        unit.reload()
        load.wait_for(2)
        by_systemd = json.loads(next(line for line in unit.log.splitlines() if line.startswith("{")))
        assert by_systemd["report"]["successor_pid"] == unit.main_pid
        answer = json.loads(unit.machine.run("env", f"PYTHONPATH={PROJECT}", *command))
        load.wait_for(3)
        assert answer["report"]["successor_pid"] == unit.main_pid == unit.ask("who")["pid"]
        unit.configure(at_start="raise ValueError('a broken release')")
        answer = json.loads(unit.machine.run("env", f"PYTHONPATH={PROJECT}", *command, check=False))
        assert "a broken release" in json.dumps(answer)
        assert unit.machine.fails("systemctl", "reload", NAME)
        load.wait_for(3, 20)
        assert unit.ask("who")["generation"] == 3
    assert load.counts.failures == Counter()


def test_a_program_that_is_gone_fails_the_reload_at_once(unit: Unit) -> None:
    unit.configure(ecdysis={"command": ["/no/such/python", "service.py"]})
    unit.start()
    with Load(unit.port) as load:
        assert unit.machine.fails("systemctl", "reload", NAME)
        unit.wait_for_status("cannot start '/no/such/python'")
        load.wait_for(1, 20)
    assert load.counts.failures == Counter()
    assert unit.ask("who")["pid"] == unit.main_pid
