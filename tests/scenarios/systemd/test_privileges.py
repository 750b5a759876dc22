"""Services that are root no more, on ports that only root may bind."""

from __future__ import annotations

import pwd
import signal
from collections import Counter

import pytest

from benchmarks.load import Failure
from tests.scenarios.systemd.harness import NAME, Client, Unit, free_port_of_root
from tests.scenarios.systemd.load import Load

pytestmark = pytest.mark.main_python_only

NOBODY = pwd.getpwnam("nobody").pw_uid


def test_a_service_that_was_root_when_it_bound_restarts_without_being_root(unit: Unit) -> None:
    unit.machine.let_others_in()
    port = free_port_of_root()
    (unit.machine.directory / "own").mkdir()
    unit.machine.run("chown", "nobody", str(unit.machine.directory / "own"))
    path = str(unit.machine.directory / "app.sock")
    own = unit.machine.directory / "own"
    unit.configure(
        sockets=[["listen_tcp", ["127.0.0.1", port], {}], ["listen_unix", [path], {"mode": 0o666}]],
        become=NOBODY,
        ecdysis={"pid_file": str(own / "app.pid"), "drain_timeout": 2},
        addresses=str(own / "addresses"),
    )
    unit.start("FileDescriptorStoreMax=16", "Restart=always", "RestartSec=0", "WatchdogSec=5", f"PIDFile={own}/app.pid")
    with Load(port) as load:
        for generation in range(2, 6):
            unit.reload()
            load.wait_for(generation)
            assert unit.ask("who", path)["uid"] == NOBODY
        # Nothing of what the kernel keeps from it is needed to fail in order, either.
        unit.configure(at_start="raise ValueError('a broken release')")
        assert unit.machine.fails("systemctl", "reload", NAME)
        unit.configure(at_start="")
        unit.reload()
        load.wait_for(6)
    assert load.counts.failures == Counter()
    assert unit.main_pid == unit.ask("who", path)["pid"]
    # What root has made stays for the next start, which is root's again.
    with Load(port, first_generation=6) as load:
        unit.machine.kill(unit.main_pid, signal.SIGKILL)
        load.wait_for(1, 30)
    assert load.counts.failures[Failure.REFUSED] == 0
    unit.wait_until(lambda: unit.show("ActiveState") == "active")
    unit.reload()
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")
    unit.systemctl("start")
    assert unit.ask("who", path)["generation"] == 1


def test_a_user_inherits_a_port_of_root_from_a_socket_unit(unit: Unit) -> None:
    unit.machine.let_others_in()
    port = free_port_of_root()
    unit.machine.install(
        "app.socket", f"[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:{port}\nService={NAME}\n"
    )
    unit.configure(
        sockets=[["listen_tcp", ["127.0.0.1", port], {}]],
        ecdysis={"control_socket": "/run/app/control", "pid_file": None, "drain_timeout": 2},
        addresses="/run/app/addresses",
    )
    unit.install("Sockets=app.socket", "User=nobody", "RuntimeDirectory=app")
    unit.machine.systemctl("start", "app.socket")
    with Load(port) as load:
        for generation in range(2, 5):
            unit.reload()
            load.wait_for(generation)
    assert load.counts.failures == Counter()
    with Client(("127.0.0.1", port)) as client:
        assert client.ask("who")["uid"] == NOBODY
    unit.systemctl("stop")
    assert unit.show("Result") == "success"
