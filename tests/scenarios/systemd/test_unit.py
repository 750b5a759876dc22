"""The units that ``ecdysis unit`` prints, as printed, on a real systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from tests.scenarios.systemd.harness import NAME, Client, Unit, free_port
from tests.scenarios.systemd.load import LOST, Load
from tests.scenarios.systemd.machine import PROJECT

pytestmark = pytest.mark.newest_python_only

APP = Path(__file__).with_name("app")
# Which the system's own Python needs to run the command.
PACKAGES = ("anyio", "idna", "typing_extensions.py", "click", "rich", "markdown_it", "mdurl", "pygments", "dotenv")


class PrintedUnit:
    """A service whose unit the command has written, which is restarted with other variables."""

    def __init__(self, unit: Unit, *options: str, workers: int = 2) -> None:
        self.unit = unit
        self.directory = unit.machine.directory
        self.address = ("127.0.0.1", free_port())
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
        subprocess.run(
            [*command, *options, f"--output={unit.machine.units}"],
            check=True,
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        # So that it can bite within the test; a reload takes longer than that.
        unit.keep_log("WatchdogSec=2", "TimeoutAbortSec=1")

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
    files = [str(unit.machine.units / name) for name in (NAME, *(["app.socket"] if has_socket else []))]
    assert unit.machine.run("systemd-analyze", "verify", "--man=no", *files) == ""
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
        assert "a broken release" in unit.show("StatusText")
        printed.release()
        unit.reload()
        load.wait_for(reloads + 2)
    assert load.counts.failures == Counter()
    assert (unit.main_pid, unit.show("NRestarts")) == (anchor, "0")
    unit.systemctl("stop")
    assert (unit.show("Result"), unit.show("ExecMainStatus"), unit.show("ActiveState")) == ("success", "0", "inactive")


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
    packages = Path(sysconfig.get_path("purelib"))
    machine.run("mkdir", "-p", "/srv/ecdysis/packages")
    for path in (PROJECT / "ecdysis_async", *(packages / name for name in PACKAGES)):
        machine.run("cp", "-r", str(path), "/srv/ecdysis/packages")
    machine.run("cp", "-r", str(APP), "/srv/ecdysis/app")
    machine.run("chmod", "-R", "a+rX", "/srv/ecdysis")
    machine.run("sh", "-c", f"echo ADDRESS={address[0]}:80 >/srv/ecdysis/app/variables")
    command = [
        *("/usr/bin/python3", "-m", "ecdysis_async.cli", "unit", "app:main", "--name=app"),
        f"--bind={address[0]}:{address[1]}",
        *("--env-file=variables", "--probation=0.05", "--drain-timeout=2", f"--output={machine.units}"),
    ]
    machine.run("env", "-C", "/srv/ecdysis/app", "PWD=/srv/ecdysis/app", "PYTHONPATH=/srv/ecdysis/packages", *command)
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
