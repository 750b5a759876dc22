"""The units that ``ecdysis unit`` prints, as printed, on a real systemd."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.systemd.harness import NAME, Client, Unit
from tests.scenarios.systemd.load import LOST, Load
from tests.scenarios.systemd.machine import PROJECT, Machine

pytestmark = pytest.mark.main_python_only

APP = Path(__file__).with_name("app")
# Which the system's own Python needs to run the command.
PACKAGES = ("anyio", "idna", "typing_extensions.py", "click", "rich", "markdown_it", "mdurl", "pygments", "dotenv")


# Where everybody may read the program.
IN_SRV = ("env", "-C", "/srv/ecdysis/app", "PWD=/srv/ecdysis/app", "PYTHONPATH=/srv/ecdysis/packages")

ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(sys.argv[2].encode() + b"\\n")
    print(sock.makefile().readline())
"""


def install(machine: Machine) -> None:
    """Copy the program to where everybody may read it."""
    packages = Path(sysconfig.get_path("purelib"))
    machine.run("mkdir", "-p", "/srv/ecdysis/packages")
    for path in (PROJECT / "ecdysis_async", *(packages / name for name in PACKAGES)):
        machine.run("cp", "-r", str(path), "/srv/ecdysis/packages")
    machine.run("cp", "-rT", str(APP), "/srv/ecdysis/app")
    machine.run("chmod", "-R", "a+rX", "/srv/ecdysis")


def ask_as(machine: Machine, user: str, path: str, line: str = "who") -> str:
    """Ask over a Unix socket, as a user; return the answer, or why there is none."""
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    said = machine.run(*become, "/usr/bin/python3", "-c", ASK, path, line, check=False).strip()
    return said.splitlines()[-1] if said else ""


class PrintedUnit:
    """A service whose unit the command has written, which is restarted with other variables."""

    def __init__(self, unit: Unit, *options: str, workers: int = 2) -> None:
        self.unit = unit
        self.directory = unit.machine.directory
        self.address = ("127.0.0.1", find_free_port())
        self.variables = self.directory / "variables"
        self.release()
        host, port = self.address
        command = [
            *(
                sys.executable,
                "-m",
                "ecdysis_async.cli",
                "unit",
                "app:main",
                "--name=app",
                f"--app-dir={APP}",
                f"--bind={host}:{port}",
            ),
            *(f"--env-file={self.variables}", "--probation=0.05", "--drain-timeout=2", f"--workers={workers}"),
        ]
        # Inside, where the systemd is that it is for.
        place = ("env", "-C", str(PROJECT), f"PWD={PROJECT}", f"PYTHONPATH={PROJECT}")
        unit.machine.run(*place, *command, *options, f"--output={unit.machine.units}")
        # So that it can bite within the test, and yet no process that waits for its turn on a busy machine.
        unit.keep_log("WatchdogSec=5", "TimeoutAbortSec=1")

    def release(self, **variables: str) -> None:
        """Make the next generation another release."""
        host, port = self.address
        draft = self.variables.with_suffix(".draft")
        draft.write_text(
            "".join(f"{name}={value}\n" for name, value in (variables | {"ADDRESS": f"{host}:{port}"}).items())
        )
        draft.replace(self.variables)


@pytest.mark.parametrize(("has_socket", "reloads"), [(False, 4), (True, 2)], ids=["service", "socket"])
def test_it_starts_reloads_and_stops_as_printed(unit: Unit, has_socket: bool, reloads: int) -> None:
    printed = PrintedUnit(unit, *(["--socket"] if has_socket else []))
    names = (NAME, *(["app.socket"] if has_socket else []))
    said = unit.machine.run(
        "systemd-analyze", "verify", "--man=no", *(str(unit.machine.units / each) for each in names)
    )
    # It looks at all other units of the machine too.
    assert [line for line in said.splitlines() if any(each in line for each in names)] == []
    if has_socket:
        # The first client starts it.
        unit.machine.systemctl("start", "app.socket")
    else:
        unit.systemctl("start")
    anchor = unit.ask("who", printed.address)["parent"]
    # One worker answers before all of them do, and until then there is nothing to reload.
    unit.wait_until(lambda: unit.show("ActiveState") == "active")
    assert anchor == unit.main_pid
    with Load(printed.address[1]) as load:
        for generation in range(2, reloads + 2):
            unit.reload()
            load.wait_for(generation)
        printed.release(BROKEN="1")
        assert unit.machine.fails("systemctl", "reload", NAME)
        load.wait_for(reloads + 1, 20)
        unit.wait_for_status("a broken release")
        printed.release()
        unit.reload()
        load.wait_for(reloads + 2)
    assert load.counts.failures == Counter()
    assert (unit.main_pid, unit.show("NRestarts")) == (anchor, "0")
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus"), unit.show("ActiveState")) == ("success", "0", "inactive")


def test_clients_wait_for_the_next_start_where_the_anchor_is_killed(unit: Unit) -> None:
    """The store keeps the sockets: a worker that has lost its anchor leaves, and refuses nobody."""
    printed = PrintedUnit(unit, workers=1)
    unit.systemctl("start")
    unit.wait_until(lambda: unit.show("ActiveState") == "active")
    anchor, worker = unit.main_pid, unit.ask("who", printed.address)["pid"]
    with contextlib.ExitStack() as stack:
        # systemd would end the worker before that could do anything.
        with unit.machine.standing_still():
            unit.machine.kill(anchor, signal.SIGKILL)
            unit.wait_until(lambda: unit.machine.run("cat", f"/proc/{worker}/stat").split()[2] == "Z")
            clients = [stack.enter_context(Client(printed.address)).say("who") for _ in range(5)]
        assert {json.loads(client.hear())["pid"] for client in clients}.isdisjoint({worker})


def test_the_watchdog_that_bites_it_and_a_restart_refuse_nobody(unit: Unit) -> None:
    printed = PrintedUnit(unit)
    unit.systemctl("start")
    with Load(printed.address[1]) as load:
        # Its loop turns no more, while its workers serve on.
        unit.machine.kill(unit.main_pid, signal.SIGSTOP)
        unit.wait_until(lambda: unit.show("NRestarts") == "1" and unit.show("ActiveState") == "active")
        load.wait_for(1, 30)
        unit.reload()
        load.wait_for(2)
    assert set(load.counts.failures) <= LOST
    with Load(printed.address[1], first_generation=2) as load:
        unit.systemctl("restart")
        load.wait_for(1, 30)
    assert load.counts.failures == Counter()


def test_a_dynamic_user_serves_a_port_of_root_with_next_to_no_rights(unit: Unit) -> None:
    machine = unit.machine
    # A loopback address of its own, since the network is shared.
    address = (f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.80", 80)
    install(machine)
    machine.run("sh", "-c", f"echo ADDRESS={address[0]}:80 >/srv/ecdysis/app/variables")
    command = [
        *("/usr/bin/python3", "-m", "ecdysis_async.cli", "unit", "app:main", "--name=app"),
        f"--bind={address[0]}:{address[1]}",
        *("--env-file=variables", "--probation=0.05", "--drain-timeout=2", f"--output={machine.units}"),
    ]
    machine.run(*IN_SRV, *command)
    unit.keep_log()
    assert "DynamicUser=yes\n" in (machine.units / NAME).read_text()
    unit.systemctl("start")
    answer = unit.ask("who", address)
    assert answer["uid"] > 60000
    with Load(address) as load:
        unit.reload()
        load.wait_for(2)
        assert load.counts.failures == Counter()
        with Client(address) as client:
            client.ask("who")
            client.say("slow 30 patience")
            unit.machine.kill(unit.main_pid, signal.SIGKILL)
            assert client.hear() == ""
        load.wait_for(1, 20)
    assert set(load.counts.failures) <= LOST
    # Tenths: 10.0 is a service that may do everything.
    machine.run("systemd-analyze", "security", "--threshold=30", "--no-pager", NAME)
    unit.systemctl("stop")
    assert unit.show("ActiveState") == "inactive"


@pytest.mark.parametrize(
    ("user", "has_socket"), [(None, False), (None, True), ("games", False)], ids=["dynamic", "socket", "user"]
)
def test_a_unix_socket_is_the_proxys_over_each_stop_start_and_restart(
    unit: Unit, user: str | None, has_socket: bool
) -> None:
    machine, path = unit.machine, "/run/app/web.sock"
    install(machine)
    machine.run("sh", "-c", f"echo ADDRESS={path} >/srv/ecdysis/app/variables")
    command = [
        *("/usr/bin/python3", "-m", "ecdysis_async.cli", "unit", "app:main", "--name=app", f"--bind=unix:{path}"),
        *("--unix-group=www-data", "--control-group=www-data", "--env-file=variables", "--probation=0.05"),
        "--drain-timeout=2",
        *(["--socket"] if has_socket else []),
        *([f"--user={user}"] if user is not None else []),
        f"--output={machine.units}",
    ]
    said = machine.run(*IN_SRV, *command)
    unit.keep_log()
    first = "app.socket" if has_socket else NAME
    machine.systemctl("start", first)
    # Over and over: what systemd removes at the end of one unit is there again, or stays while the other one needs it.
    steps = [("reload", NAME), ("restart", NAME), ("stop", NAME), ("start", NAME)]
    for step, name in [*steps, *([("restart", first), ("stop", first), ("start", first)] if has_socket else [])]:
        assert "generation" in ask_as(machine, "www-data", path), (step, name)
        assert "PermissionError" in ask_as(machine, "daemon", path)
        unit.wait_until(lambda: unit.show("ActiveState") == "active")
        machine.systemctl(step, name)
        if step == "stop" and (name == first or not has_socket):
            assert "FileNotFoundError" in ask_as(machine, "www-data", path)
            machine.systemctl("start", first)
    assert "generation" in ask_as(machine, "www-data", path)
    # What the command has said is what there is, and who asks for no service in particular finds this one.
    unit.wait_until(lambda: unit.show("ActiveState") == "active")
    control = said.split("ecdysis status --control ")[1].strip()
    status = (
        "env",
        "PYTHONPATH=/srv/ecdysis/packages",
        "/usr/bin/python3",
        "-m",
        "ecdysis_async.cli",
        "status",
        "--json",
    )
    found = json.loads(machine.run(*status))
    assert found["pid"] == json.loads(machine.run(*status, "--control", control))["pid"] == unit.main_pid
    # It writes its data where the unit says, and nowhere else.
    assert ask_as(machine, "www-data", path, "write $STATE/data").endswith("/var/lib/app/data")
    machine.run("test", "-e", "/var/lib/app/data")
    assert "Read-only file system" in ask_as(machine, "www-data", path, "write /srv/ecdysis/app/data")


def test_a_release_behind_a_link_follows_it_at_each_reload_and_start(unit: Unit) -> None:
    machine, address = unit.machine, ("127.0.0.1", find_free_port())
    install(machine)
    for release in ("1", "2", "3"):
        machine.run("mkdir", "-p", f"/srv/shop/releases/{release}")
        machine.run("cp", "-rT", "/srv/ecdysis/app", f"/srv/shop/releases/{release}")
        text = f"ADDRESS={address[0]}:{address[1]}"
        machine.run("sh", "-c", f"echo {text} >/srv/shop/releases/{release}/variables")
    machine.run("ln", "-sfn", "releases/1", "/srv/shop/current")
    place = ("env", "-C", "/srv/shop/current", "PWD=/srv/shop/current", "PYTHONPATH=/srv/ecdysis/packages")
    command = [
        *("/usr/bin/python3", "-m", "ecdysis_async.cli", "unit", "app:main", f"--bind={address[0]}:{address[1]}"),
        *("--env-file=variables", "--probation=0.05", "--drain-timeout=2", f"--output={machine.units}"),
    ]
    assert "shop.service" in machine.run(*place, *command)
    machine.systemctl("daemon-reload")
    try:
        machine.systemctl("start", "shop.service")
        assert unit.ask("who", address)["release"] == "/srv/shop/releases/1/app.py"
        machine.run("ln", "-sfn", "releases/2", "/srv/shop/current")
        machine.systemctl("reload", "shop.service")
        assert unit.ask("who", address)["release"] == "/srv/shop/releases/2/app.py"
        machine.run("ln", "-sfn", "releases/3", "/srv/shop/current")
        machine.run("rm", "-r", "/srv/shop/releases/1", "/srv/shop/releases/2")
        machine.systemctl("restart", "shop.service")
        assert unit.ask("who", address)["release"] == "/srv/shop/releases/3/app.py"
    finally:
        print(machine.run("journalctl", "--no-pager", "-u", "shop.service", check=False))  # noqa: T201 - for a failure


def test_the_machines_older_systemd_runs_it_too(old_unit: Unit) -> None:
    printed = PrintedUnit(old_unit)
    assert "FileDescriptorStoreMax" not in (old_unit.machine.units / NAME).read_text()
    old_unit.systemctl("start")
    with Load(printed.address[1]) as load:
        old_unit.reload()
        load.wait_for(2)
    assert load.counts.failures == Counter()
    old_unit.systemctl("stop")
    assert "is too old" not in old_unit.log
