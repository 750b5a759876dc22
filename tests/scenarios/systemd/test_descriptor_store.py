"""Listening sockets that a real systemd keeps: whatever kills a service, its clients wait for the next start."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest

from tests.scenarios.systemd.harness import Client, Unit
from tests.scenarios.systemd.load import LOST, LOUD, Load
from tests.scenarios.systemd.phases import PHASES, Standstill

pytestmark = pytest.mark.main_python_only

STORE = ("FileDescriptorStoreMax=16", "Restart=always", "RestartSec=0")

TCP = ["listen_tcp", ["127.0.0.1", 0], {}]


def stored(unit: Unit) -> int:
    return int(unit.show("NFileDescriptorStore"))


def is_refused(address: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == errno.ECONNREFUSED


def wait_for_start(unit: Unit, number: int) -> None:
    unit.wait_until(lambda: unit.show("NRestarts") == str(number) and unit.show("ActiveState") == "active")


def test_clients_in_the_queue_of_a_killed_service_wait_for_the_next_start(unit: Unit) -> None:
    path = str(unit.machine.directory / "app.sock")
    health = ["listen_tcp", ["127.0.0.1", 0], {"name": "health", "until": "exit"}]
    unit.configure(sockets=[TCP, ["listen_unix", [path], {}], health])
    unit.start(*STORE)
    before = unit.addresses
    with Load(unit.port) as web, Load(path) as near:
        # They wait in the queue of a process that will never accept them.
        unit.machine.kill(unit.main_pid, signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(Client(address)) for address in before for _ in range(3)]
            for each in waiting:
                each.say("echo patience")
            unit.machine.kill(unit.main_pid, signal.SIGKILL)
            for each in waiting:
                assert each.hear() == "1 patience"
        assert unit.addresses == before
        wait_for_start(unit, 1)
        assert unit.ask("who", path)["pid"] == unit.main_pid
        for load in (web, near):
            load.wait_for(1, 30)
        # What the killed process had accepted; and nothing is lost from then on.
        lost = [load.counts.failures.copy() for load in (web, near)]
        assert {failure for failures in lost for failure in failures} <= LOST
        unit.reload()
        for load in (web, near):
            load.wait_for(2)
    assert [load.counts.failures for load in (web, near)] == lost


def test_generations_renew_what_is_kept(unit: Unit) -> None:
    named = ["listen_tcp", ["127.0.0.1", 0], {"name": "second"}]
    unit.configure(sockets=[TCP, named])
    unit.start(*STORE)
    # Those two, and the control socket.
    unit.wait_until(lambda: stored(unit) == 3)
    with Load(unit.port, LOUD) as load:
        for generation in (2, 3, 4):
            unit.reload()
            load.wait_for(generation)
        assert stored(unit) == 3
        first, second = unit.addresses
        # A release that wants something else, and the one after it.
        unit.configure(sockets=[TCP, ["listen_tcp", ["127.0.0.1", 0], {"name": "third"}]])
        unit.reload()
        third = unit.addresses[1]
        # Not before its queue is answered, and systemd has let go of it.
        unit.wait_until(lambda: is_refused(second))
        unit.wait_until(lambda: stored(unit) == 3)
        load.wait_for(5)
        assert load.counts.failures == Counter()
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        wait_for_start(unit, 1)
        assert unit.addresses == [first, third]
        # One that finds more than it wants.
        unit.configure(sockets=[TCP])
        load.wait_for(1, 20)
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        wait_for_start(unit, 2)
        unit.wait_until(lambda: stored(unit) == 2)
        assert "nobody asks for third" in unit.log
        unit.wait_until(lambda: is_refused(third))
        load.wait_for(1, 20)
    assert set(load.counts.failures) <= LOST


def test_a_crash_leaves_the_last_stash_to_one_start(unit: Unit) -> None:
    unit.configure(keeps=True)
    unit.start(*STORE)
    unit.reload()
    former = unit.main_pid
    unit.reload()
    # The service's socket, its control socket, and the stash, of which the newer one took the older one's place.
    unit.wait_until(lambda: stored(unit) == 3)
    with Load(unit.port, LOUD, first_generation=3) as load:
        for number, is_killed in ((1, True), (2, False)):
            if is_killed:
                unit.machine.kill(unit.main_pid, signal.SIGKILL)
            else:
                with Client(unit.addresses[0]) as client:
                    client.say("fail")
                    client.hear()
            wait_for_start(unit, number)
            # This start has come through with it: it is kept for the next crash.
            assert unit.ask("who")["stash"] == f"left by pid {former}"
            unit.wait_until(lambda: stored(unit) == 3)
        # One that cannot cope with it is killed by it once, and not again and again.
        unit.configure(hold="ready")
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        unit.wait_until(lambda: "held\n" in unit.log and stored(unit) == 2)
        unit.configure(hold="")
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        wait_for_start(unit, 4)
        assert unit.ask("who")["stash"] == ""
        load.wait_for(1, 20)
        # Of a release that wants none nothing is left.
        unit.reload()
        unit.wait_until(lambda: stored(unit) == 3)
        unit.configure(keeps=False)
        unit.reload()
        unit.wait_until(lambda: stored(unit) == 2)
        load.wait_for(3)
    assert set(load.counts.failures) <= LOST


def test_a_start_that_fails_leaves_them_to_the_next_one(unit: Unit) -> None:
    path = str(unit.machine.directory / "app.sock")
    unit.configure(sockets=[TCP, ["listen_unix", [path], {}]])
    unit.start(*STORE, "StartLimitIntervalSec=0")
    tcp = unit.addresses[0]
    with Load(tcp) as web, Load(path) as near:
        unit.configure(sockets=[["listen_tcp", ["192.0.2.1", 1], {}]])
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        with Client(tcp).say("who") as client, Client(path).say("who") as other:
            unit.wait_until(lambda: int(unit.show("NRestarts")) >= 2)
            unit.configure(sockets=[TCP, ["listen_unix", [path], {}]])
            assert '"generation": 1' in client.hear()
            assert '"generation": 1' in other.hear()
        for load in (web, near):
            load.wait_for(1, 30)
    assert {*web.counts.failures, *near.counts.failures} <= LOST


def test_what_a_socket_unit_holds_is_not_kept_twice(unit: Unit) -> None:
    path = unit.machine.directory / "app.sock"
    unit.machine.install("app.socket", f"[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream={path}\n")
    unit.configure(sockets=[["listen_unix", [str(path)], {}]])
    unit.start(*STORE, "Sockets=app.socket")
    with Load(str(path)) as load:
        for generation in (2, 3):
            unit.reload()
            load.wait_for(generation)
            # The control socket, and no other one.
            unit.wait_until(lambda: stored(unit) == 1)
    assert load.counts.failures == Counter()


def test_a_store_that_is_too_small_is_told(unit: Unit) -> None:
    unit.configure(sockets=[TCP, ["listen_tcp", ["127.0.0.1", 0], {"name": "second"}]])
    unit.start("FileDescriptorStoreMax=1")
    with Load(unit.port) as load:
        unit.reload()
        load.wait_for(2)
        assert stored(unit) == 1
        # Once by each process.
        assert len(re.findall("raise FileDescriptorStoreMax=", unit.log)) == 2
    assert load.counts.failures == Counter()


def test_a_restart_of_the_unit_under_load_loses_nothing(unit: Unit) -> None:
    # For as long as the silent ones are silent.
    unit.configure(ecdysis={"drain_timeout": 2})
    unit.start(*STORE)
    with Load(unit.port) as load:
        unit.systemctl("restart")
        load.wait_for(1, 30)
        unit.reload()
        load.wait_for(2)
        unit.systemctl("restart")
        load.wait_for(1, 30)
    assert load.counts.failures == Counter()


@pytest.mark.parametrize("phase", ["serving", *PHASES])
def test_a_kill_in_any_phase_refuses_nobody(unit: Unit, phase: str) -> None:
    restart = Standstill(unit, phase)
    unit.start(*STORE, "KillMode=mixed")
    with restart, Load(unit.port) as load:
        with Client(unit.addresses[0]) as slow:
            # Who is not accepted yet waits for the next start, and is answered.
            slow.ask("who")
            slow.say("slow 60 for-longer-than-this-test")
            if phase != "serving":
                restart.reach(load)
            before = load.counts.answers.total()
            unit.machine.kill(unit.main_pid, signal.SIGKILL)
            wait_for_start(unit, 1)
            assert slow.hear() == ""
        if phase not in ("serving", "draining"):
            assert restart.reload.wait() != 0
        load.wait_for(1, 50)
        assert load.counts.answers.total() > before
    failures = load.counts.failures
    # What the killed processes had accepted, and nothing else.
    assert set(failures) <= LOST
    assert failures.total() <= 100
    assert unit.ask("who")["pid"] == unit.main_pid
    assert unit.processes == [unit.main_pid]


def test_the_store_is_empty_once_the_service_is_stopped(unit: Unit) -> None:
    path = str(unit.machine.directory / "app.sock")
    unit.configure(sockets=[TCP, ["listen_unix", [path], {}]])
    unit.start(*STORE)
    unit.wait_until(lambda: stored(unit) == 3)
    unit.systemctl("stop")
    assert stored(unit) == 0
    assert not Path(path).exists()
    with pytest.raises(ConnectionRefusedError):
        unit.ask("who")
