"""What a service says to a real systemd, and hears of it: where, how it fails, and what is wrong with its unit."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from ecdysis_async._management import systemd_unit
from tests.ports import find_free_port
from tests.scenarios.systemd.harness import NAME, Client, Unit
from tests.scenarios.systemd.load import LOUD, Load
from tests.scenarios.systemd.machine import PROJECT

pytestmark = pytest.mark.main_python_only

VOICE = Path(__file__).with_name("voice.py")


def test_an_abstract_address_is_as_good_as_a_path(unit: Unit) -> None:
    name = f"ecdysis-{os.getpid()}"
    unit.machine.install(
        "voice.service",
        "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\n"
        f"Environment=PYTHONPATH={PROJECT}\nExecStart={sys.executable} {VOICE} {name}\n",
    )
    unit.machine.systemctl("start", "voice.service")
    unit.configure(ecdysis={"probation": 0.05})
    command = f"/usr/bin/env NOTIFY_SOCKET=@{name} {unit.command()}"
    store = ("FileDescriptorStoreMax=8", "Restart=always", "RestartSec=0")
    unit.start("ExecStart=", f"ExecStart={command}", "WatchdogSec=5", *store)
    with Load(unit.port, LOUD) as load:
        for generation in (2, 3, 4):
            former = unit.main_pid
            unit.reload()
            load.wait_for(generation)
            assert unit.main_pid != former
            unit.wait_until(lambda: "generation" in unit.show("StatusText"))
        # The service's socket and its control socket; the descriptors come along as well.
        unit.wait_until(lambda: unit.show("NFileDescriptorStore") == "2")
    assert load.counts.failures == Counter()
    assert unit.ask("who")["pid"] == unit.main_pid
    assert unit.show("NRestarts") == "0"
    assert "does not hear" not in unit.log
    # Nobody ends without an answer to BARRIER=1.
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ActiveState")) == ("success", "inactive")


def test_what_is_for_one_process_does_not_reach_the_next(unit: Unit) -> None:
    unit.start("WatchdogSec=5")
    with Load(unit.port) as load:
        unit.reload()
        names = unit.ask("who")["names"]
        assert {"NOTIFY_SOCKET", "WATCHDOG_USEC"} <= set(names)
        assert not {"WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"} & set(names)
        # Without a descriptor store it was asked how old systemd is.
        code = (
            "from ecdysis_async._management.systemd_unit import _ask_systemctl; "
            "print(_ask_systemctl('--version').split()[1])"
        )
        version = unit.machine.run("env", f"PYTHONPATH={PROJECT}", sys.executable, "-c", code).strip()
        assert int(version) >= systemd_unit.TELLS_OF_STORE
        assert "too old" not in unit.log
        load.wait_for(2)
    assert load.counts.failures == Counter()


def test_a_start_that_fails_says_why_while_its_clients_wait(unit: Unit) -> None:
    port = find_free_port()
    unit.machine.install(
        "app.socket",
        f"[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:{port}\nTriggerLimitIntervalSec=0\n",
    )
    unit.machine.install(f"{NAME}.d/patience.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    good = [["listen_tcp", ["127.0.0.1", port], {}]]
    unit.configure(sockets=good)
    # A moment between two starts, in which systemd knows how the last one has ended.
    unit.install("Sockets=app.socket", "Restart=always", "RestartSec=300ms")
    unit.machine.systemctl("start", "app.socket")
    with Load(port, LOUD) as load:
        unit.wait_until(lambda: unit.show("ActiveState") == "active")
        unit.configure(sockets=[*good, ["listen_tcp", ["192.0.2.1", 1], {}]])
        unit.systemctl("restart", "--no-block")
        # EADDRNOTAVAIL of Linux; each of its starts says it anew.
        unit.wait_until(lambda: unit.show("StatusErrno") == "99")
        unit.wait_until(lambda: "192.0.2.1" in unit.show("StatusText"))
        unit.wait_until(lambda: int(unit.show("NRestarts")) >= 2)
        unit.configure(sockets=good)
        load.wait_for(1, 30)
        unit.wait_until(lambda: unit.show("ActiveState") == "active")
        assert unit.show("StatusErrno") == "0"
    assert load.counts.failures == Counter()


def test_a_restart_without_a_notification_socket_is_refused_and_says_what_to_change(unit: Unit) -> None:
    unit.start(kind="exec")
    unit.wait_until(lambda: "serving on" in unit.log)
    with Load(unit.port) as load:
        assert unit.log.count("Put Type=notify into") == 1
        with Client(unit.addresses[0]) as client:
            assert "Put Type=notify into" in client.ask("restart settled")["error"]
        load.wait_for(1, 30)
    assert load.counts.failures == Counter()
    assert unit.ask("who")["pid"] == unit.main_pid


def test_behind_a_wrapper_it_says_what_to_change_and_then_it_works(unit: Unit) -> None:
    wrapped = ("ExecStart=", f'ExecStart=/bin/sh -c "{unit.command()}; exit"')
    unit.install(*wrapped)
    unit.systemctl("start", "--no-block")
    unit.wait_until(lambda: "serving on" in unit.log)
    with Load(unit.port) as load:
        # It serves, while systemd waits for a word of another process.
        assert unit.log.count("NotifyAccess=all") == 1
        load.wait_for(1, 30)
        assert unit.show("ActiveState") == "activating"
    assert load.counts.failures == Counter()
    unit.systemctl("stop")
    unit.start(*wrapped, "NotifyAccess=all")
    with Load(unit.port) as load:
        for generation in (2, 3):
            unit.reload()
            load.wait_for(generation)
            assert unit.ask("who")["pid"] == unit.main_pid
    assert load.counts.failures == Counter()
    # Once by each first generation, which cannot know what the unit says.
    assert unit.log.count("NotifyAccess=all") == 2


def test_a_systemd_that_is_too_old_for_the_unit_is_told(old_unit: Unit) -> None:
    old_unit.start("FileDescriptorStoreMax=16")
    with Load(old_unit.port) as load:
        old_unit.wait_until(lambda: " is too old for FileDescriptorStoreMax=16" in old_unit.log)
        for generation in (2, 3):
            old_unit.reload()
            load.wait_for(generation)
            assert old_unit.ask("who")["pid"] == old_unit.main_pid
    assert load.counts.failures == Counter()
    # Once, and not by each generation.
    assert old_unit.log.count("is too old") == 1


def test_a_systemd_that_is_too_old_for_the_type_is_told(old_unit: Unit) -> None:
    old_unit.start(kind="notify-reload")
    old_unit.wait_until(lambda: "serving on" in old_unit.log)
    with Load(old_unit.port) as load:
        assert (
            old_unit.log.count("Put Type=notify into the unit's [Service], also where it says Type=notify-reload") == 1
        )
        with Client(old_unit.addresses[0]) as client:
            assert "Put Type=notify into" in client.ask("restart settled")["error"]
        load.wait_for(1, 30)
    assert load.counts.failures == Counter()
