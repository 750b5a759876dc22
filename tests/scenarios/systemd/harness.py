"""A service as systemd runs it: its unit, its settings, and its clients."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.scenarios.systemd.machine import PATIENCE_SECONDS, PROJECT, Machine

SERVICE = Path(__file__).with_name("service.py")
NAME = "app.service"

Json = dict[str, Any]


def free_port_of_root() -> int:
    """Return a port that only root may bind, and nobody has at this moment."""
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            port = random.randrange(300, 1024)
            sock.bind(("127.0.0.1", port))
            return port


class Unit:
    """The unit of a service, and the service."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._settings: Json = {
            "ecdysis": {
                "control_socket": str(machine.directory / "control"),
                "pid_file": str(machine.directory / "app.pid"),
                "probation": 0.1,
                "drain_timeout": 10,
            },
            "sockets": [["listen_tcp", ["127.0.0.1", 0], {}]],
            "addresses": str(machine.directory / "addresses"),
            "at_start": "",
            "hold": "",
            "keeps": False,
            "released": str(machine.directory / "released"),
            "before_ready": 0.0,
            "become": 0,
        }
        self.settings_path = machine.directory / "settings.json"
        self._log = machine.directory / "log"
        self.configure()

    # What it is told

    def configure(self, *, ecdysis: Json | None = None, **settings: Any) -> None:
        """Change the settings of the generations to come."""
        self._settings |= settings
        self._settings["ecdysis"] = {**self._settings["ecdysis"], **(ecdysis or {})}
        draft = self.settings_path.with_suffix(".draft")
        draft.write_text(json.dumps(self._settings))
        draft.replace(self.settings_path)

    def release(self) -> None:
        """Let those go on who were told to ``hold``, and all who come later."""
        Path(self._settings["released"]).touch()

    def command(self) -> str:
        """Return the service's command line."""
        return f"{sys.executable} {SERVICE} {self.settings_path}"

    @property
    def control(self) -> str:
        """Where its control socket is."""
        return str(self._settings["ecdysis"]["control_socket"])

    def install(self, *lines: str, kind: str = "notify") -> None:
        """Write the unit, with more lines of its [Service]."""
        reload = f"ExecReload={sys.executable} -m ecdysis_async.cli restart --control {self.control}\n"
        self.machine.install(
            NAME,
            "[Unit]\nDefaultDependencies=no\n"
            f"[Service]\nType={kind}\nExecStart={self.command()}\nEnvironment=PYTHONPATH={PROJECT}\n"
            + (reload if kind == "notify" else "")
            + f"StandardOutput=append:{self._log}\nStandardError=append:{self._log}\n"
            + "".join(f"{line}\n" for line in lines),
        )

    def keep_log(self, *lines: str) -> None:
        """Have a unit that somebody else has written, with more lines in [Service], and log where the test looks."""
        self.machine.install(
            f"{NAME}.d/log.conf",
            f"[Service]\nStandardOutput=append:{self._log}\nStandardError=append:{self._log}\n"
            + "".join(f"{line}\n" for line in lines),
        )

    def start(self, *lines: str, kind: str = "notify") -> Self:
        """Write the unit and start it."""
        self.install(*lines, kind=kind)
        self.machine.systemctl("start", NAME)
        return self

    def reload(self) -> None:
        """Reload it, which must not fail."""
        # One that a client has started may answer before systemd has heard that it is ready.
        self.wait_until(lambda: self.show("ActiveState") != "activating")
        self.machine.systemctl("reload", NAME)

    def systemctl(self, command: str, *options: str) -> None:
        """Run a command of systemctl on it, which must not fail."""
        self.machine.systemctl(command, *options, NAME)

    # How it is

    @property
    def addresses(self) -> list[Any]:
        """Where its sockets are."""
        found = json.loads(Path(self._settings["addresses"]).read_text())
        return [address if isinstance(address, str) else tuple(address) for address in found]

    @property
    def port(self) -> int:
        """The port of its first socket."""
        port: int = self.addresses[0][1]
        return port

    @property
    def main_pid(self) -> int:
        """The main process, as systemd sees it; 0 where there is none."""
        return int(self.show("MainPID"))

    @property
    def processes(self) -> list[int]:
        """All processes of the unit, by their numbers inside."""
        path = f"/sys/fs/cgroup{self.show('ControlGroup')}/cgroup.procs"
        return sorted(map(int, self.machine.run("cat", path).split())) if self.show("ControlGroup") else []

    @property
    def log(self) -> str:
        """What all generations have written."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def show(self, name: str) -> str:
        """Return a property of the unit."""
        return self.machine.show(NAME, name)

    def wait_for_status(self, text: str) -> None:
        """Wait until systemd has read a status with this text: who has asked for a restart is told beside it."""
        self.wait_until(lambda: text in self.show("StatusText"), f"{text!r} is not in the status")

    def ask(self, line: str, address: Any = None) -> Any:
        """Ask whoever answers."""
        with Client(address or self.addresses[0]) as client:
            return client.ask(line)

    def wait_until(self, is_so: Callable[[], bool], otherwise: str = "it does not happen") -> None:
        """Wait for something that systemd comes to know, and tells nobody unasked."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"{otherwise}\n{self.log}"
            time.sleep(0.03)


class Client:
    """One connection to the service."""

    def __init__(self, address: Any) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._sock = socket.socket(family)
        self._sock.settimeout(PATIENCE_SECONDS)
        try:
            self._sock.connect(address)
        except OSError:
            self._sock.close()
            raise
        self._file = self._sock.makefile("r")

    def say(self, line: str) -> Self:
        """Ask for something, and let the answer come later."""
        self._sock.sendall(line.encode() + b"\n")
        return self

    def hear(self) -> str:
        """Wait for a line; at the end "" comes, also where a killed process had not read everything."""
        try:
            return self._file.readline().rstrip("\n")
        except ConnectionResetError:
            return ""

    def ask(self, line: str) -> Any:
        """Ask for something that is answered by an object."""
        return json.loads(self.say(line).hear())

    def close(self) -> None:
        """Leave."""
        self._file.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
