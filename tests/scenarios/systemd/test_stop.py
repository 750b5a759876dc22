"""Stops, kills and the watchdog on a real systemd, in each phase of a restart."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.systemd.harness import NAME, Client, Unit
from tests.scenarios.systemd.load import LOST, LOUD, Load
from tests.scenarios.systemd.phases import PHASES, Standstill

pytestmark = pytest.mark.main_python_only

# Clients wait in its sockets until it is there again.
KEPT = ("FileDescriptorStoreMax=8", "Restart=always", "RestartSec=0")


def socket_unit(port: int) -> str:
    return f"[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:{port}\nService={NAME}\n"


@contextlib.contextmanager
def loaded(unit: Unit, *lines: str) -> Iterator[Load]:
    """Start a service under a load that no stop ends: systemd listens, and who comes after it starts it anew."""
    port = find_free_port()
    unit.machine.install("app.socket", socket_unit(port))
    unit.configure(sockets=[["listen_tcp", ["127.0.0.1", port], {}]])
    unit.install("Sockets=app.socket", *lines)
    unit.machine.systemctl("start", "app.socket")
    with Load(port, LOUD) as load:
        yield load
    assert load.counts.failures == Counter()
    assert unit.show("NRestarts") == "0"
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ActiveState")) == ("success", "inactive")


@pytest.mark.parametrize("kill_mode", ["control-group", "mixed"])
def test_a_stop_waits_for_every_generation_that_drains(unit: Unit, kill_mode: str) -> None:
    with loaded(unit, f"KillMode={kill_mode}") as load, Client(unit.addresses[0]) as oldest:
        oldest.say("linger 2 oldest")
        unit.reload()
        with Client(unit.addresses[0]) as newest:
            newest.say("linger 0.2 newest")
            # So that it is there before the stop is.
            assert unit.ask("who")["generation"] == 2
            unit.systemctl("stop")
            assert newest.hear() == "2 newest bye"
        assert oldest.hear() == "1 oldest bye"
        load.wait_for(1, 30)


@pytest.mark.parametrize("kill_mode", ["control-group", "mixed"])
def test_a_stop_in_probation_drains_both(unit: Unit, kill_mode: str) -> None:
    unit.configure(ecdysis={"probation": 30})
    with loaded(unit, f"KillMode={kill_mode}") as load, Client(unit.addresses[0]) as old:
        old.say("linger 0.5 old")
        with Client(unit.addresses[0]) as asker:
            assert asker.ask("restart serving")["outcome"] == "serving"
        with Client(unit.addresses[0]) as new:
            new.say("linger 0.2 new")
            assert unit.ask("who")["generation"] == 2
            unit.systemctl("stop")
            assert new.hear() == "2 new bye"
        assert old.hear() == "1 old bye"
        load.wait_for(1, 30)


@pytest.mark.parametrize("keeper", ["socket unit", "descriptor store"])
def test_a_kill_and_a_stop_while_the_first_generation_starts(unit: Unit, keeper: str) -> None:
    restart = ("Restart=always", "RestartSec=0")
    if keeper == "socket unit":
        port = find_free_port()
        unit.configure(sockets=[["listen_tcp", ["127.0.0.1", port], {}]], hold="ready")
        unit.machine.install("app.socket", socket_unit(port))
        unit.install("Sockets=app.socket", *restart)
        unit.machine.systemctl("start", "app.socket")
        # The first client starts it.
        client = Client(("127.0.0.1", port)).say("echo patience")
    else:
        unit.start("FileDescriptorStoreMax=8", *restart)
        unit.configure(hold="ready")
        unit.machine.kill(unit.main_pid, signal.SIGSTOP)
        client = Client(unit.addresses[0]).say("echo patience")
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
    with client:
        for number in range(1, 3):
            unit.wait_until(lambda: unit.log.count("held\n") == number)  # noqa: B023 - it is called at once
            assert (unit.show("ActiveState"), unit.show("SubState")) == ("activating", "start")
            unit.wait_until(lambda: unit.show("StatusText").startswith("generation 1 is starting"))
            # Of those that were killed nothing is left.
            assert unit.processes == [unit.main_pid]
            if number == 1:
                unit.machine.kill(unit.main_pid, signal.SIGKILL)
        if keeper == "descriptor store":
            assert unit.show("NFileDescriptorStore") == "2"
            unit.release()
            assert client.hear() == "1 patience"
            return
        unit.configure(hold="")
        unit.systemctl("stop")
        assert "serving on" not in unit.log.split("this generation ends")[0]
        # Who waits starts it anew.
        assert client.hear() == "1 patience"


def test_a_stop_while_the_only_generation_starts_leaves_nothing_behind(unit: Unit) -> None:
    path = unit.machine.directory / "app.sock"
    unit.configure(sockets=[["listen_unix", [str(path)], {}]], hold="ready")
    unit.install("FileDescriptorStoreMax=8", "Restart=always")
    unit.systemctl("start", "--no-block")
    unit.wait_until(lambda: "held\n" in unit.log)
    assert path.exists()
    # At once, and not when the application has prepared itself.
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ActiveState")) == ("success", "inactive")
    assert "serving on" not in unit.log
    assert (unit.processes, unit.show("NFileDescriptorStore")) == ([], "0")
    assert not [each for each in (path, Path(unit.control), unit.machine.directory / "app.pid") if each.exists()]


@pytest.mark.parametrize("command", ["stop", "restart"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_under_load_loses_nothing(unit: Unit, phase: str, command: str) -> None:
    restart = Standstill(unit, phase)
    with loaded(unit, "KillMode=mixed") as load, restart:
        restart.reach(load)
        stop = unit.machine.begin("systemctl", command, NAME)
        unit.wait_until(lambda: " stopping\n" in unit.log)
        restart.go_on()
        assert stop.wait() == 0
        # Although systemd has ended ExecReload= by SIGTERM. It makes one of a reload and a restart.
        if phase != "draining" and command == "stop":
            assert restart.reload.wait() != 0
        # The next client starts it anew, or systemd does; those who come before that wait.
        load.wait_for(1, 30)


def test_start_restart_and_drain_may_take_longer_than_the_unit_says(unit: Unit) -> None:
    # What is slow comes after the first word to systemd, and before ready(). Who comes meanwhile waits. That word comes
    # within the unit's times, also where a program takes a while to start.
    unit.configure(ecdysis={"ready_timeout": 60, "probation": 4}, before_ready=6.5)
    with loaded(unit, "TimeoutStartSec=6", "TimeoutStopSec=3") as load:
        unit.configure(before_ready=2.5)
        unit.reload()
        load.wait_for(2)
        unit.configure(before_ready=0.0)
        with Client(unit.addresses[0]) as client:
            client.say("linger 3.5 patience")
            assert unit.ask("who")["generation"] == 2
            unit.systemctl("stop")
            assert client.hear() == "2 patience bye"
        load.wait_for(1, 30)


def test_a_restart_of_the_unit_is_a_new_first_generation(unit: Unit) -> None:
    with loaded(unit) as load:
        unit.reload()
        load.wait_for(2)
        unit.systemctl("restart")
        load.wait_for(1, 30)
        answer = unit.ask("who")
        assert (answer["generation"], answer["pid"]) == (1, unit.main_pid)


def test_a_kill_before_a_restart_is_settled_ends_all_and_the_unit_comes_back(unit: Unit) -> None:
    unit.configure(ecdysis={"probation": 30})
    unit.start(*KEPT)
    first = unit.main_pid
    with Load(unit.port, LOUD) as load:
        with Client(unit.addresses[0]) as client:
            assert client.ask("restart serving")["outcome"] == "serving"
            load.wait_for(2)
            unit.machine.kill(first, signal.SIGKILL)
        unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
        load.wait_for(1, 30)
    # What the killed processes had accepted, and nobody is refused.
    assert set(load.counts.failures) <= LOST
    answer = unit.ask("who")
    assert (answer["generation"], answer["pid"]) == (1, unit.main_pid)


def test_a_kill_of_the_old_generation_after_a_restart_is_settled_costs_nothing(unit: Unit) -> None:
    unit.configure(ecdysis={"drain_timeout": 600})
    unit.start("Restart=always")
    first = unit.main_pid
    with Load(unit.port) as load, Client(unit.addresses[0]) as lost:
        lost.ask("who")
        lost.say("linger 600 lost")
        unit.reload()
        load.wait_for(2, 20)
        unit.machine.kill(first, signal.SIGKILL)
        assert lost.hear() == ""
        assert unit.ask("who")["pid"] == unit.main_pid != first
        load.wait_for(2, 30)
        # What the killed process had not answered yet; and nothing is lost from then on.
        failures = load.counts.failures.copy()
        assert set(failures) <= LOST
        unit.reload()
        load.wait_for(3)
    assert load.counts.failures == failures
    assert (unit.show("NRestarts"), unit.ask("who")["generation"]) == ("0", 3)


def test_a_kill_of_the_new_generation_is_noticed_while_the_old_one_drains(unit: Unit) -> None:
    unit.configure(ecdysis={"drain_timeout": 60})
    unit.start(*KEPT)
    with Load(unit.port, LOUD) as load:
        with Client(unit.addresses[0]) as client:
            client.say("slow 40 for-longer-than-this-test")
            unit.reload()
            load.wait_for(2)
            assert load.counts.failures == Counter()
            unit.machine.kill(unit.main_pid, signal.SIGKILL)
            unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
        load.wait_for(1, 30)
    assert set(load.counts.failures) <= LOST
    assert unit.ask("who")["generation"] == 1


def test_the_watchdog_bites_a_stalled_loop_and_spares_a_sound_one(unit: Unit) -> None:
    unit.configure(ecdysis={"probation": 3.1})
    unit.start("WatchdogSec=3", "FileDescriptorStoreMax=8", "Restart=always", "RestartSec=0")
    with Load(unit.port) as load:
        with Client(unit.addresses[0]) as client:
            # Longer than the watchdog's time in each phase: the start, the probation, the drain, and after all of them.
            client.say("linger 3.1 sound")
            unit.configure(before_ready=3.1)
            unit.reload()
            assert client.hear() == "1 sound bye"
        load.wait_for(2)
        unit.configure(before_ready=0.0)
        assert unit.show("NRestarts") == "0"
        assert unit.ask("who")["generation"] == 2
        assert load.counts.failures == Counter()
        with Client(unit.addresses[0]) as client:
            client.say("stall 30")
            unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
            assert client.hear() == ""
        load.wait_for(1, 30)
        # What the stalled process had accepted; and nobody is refused.
        lost = load.counts.failures.copy()
        assert set(lost) <= LOST
        unit.reload()
        load.wait_for(2)
    assert load.counts.failures == lost


def test_a_partial_stop_leaves_the_word_to_the_application(unit: Unit) -> None:
    with loaded(unit) as load:
        first = unit.main_pid
        with Client(unit.addresses[0]) as client, Client(unit.addresses[0]) as busy:
            busy.say("hold")
            unit.wait_until(lambda: "held\n" in unit.log)
            client.ask("stop partially")
            assert unit.show("SubState") == "running"
            unit.release()
            assert busy.hear().endswith(" bye")
        # Those who came meanwhile start it anew.
        load.wait_for(1, 30)
        assert unit.main_pid != first


def test_a_service_ends_only_when_systemd_has_read_what_it_was_told(unit: Unit) -> None:
    with loaded(unit) as load:
        first = unit.main_pid
        with unit.machine.standing_still():
            unit.machine.kill(first, signal.SIGTERM)
            unit.wait_until(lambda: "the drain has ended" in unit.log)
            # All that is left is to say BARRIER=1, and to wait for systemd to close what came with it.
            unit.machine.run("kill", "-0", str(first))
            assert "this generation ends" not in unit.log
        unit.wait_until(lambda: "this generation ends" in unit.log)
        load.wait_for(1, 30)
        assert unit.main_pid != first
