"""Sockets that a real systemd passes: claimed by name and by address, and handed on through all generations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios.systemd.harness import NAME, SERVICE, Client, Unit
from tests.scenarios.systemd.load import LOUD, Load
from tests.scenarios.systemd.machine import PROJECT

pytestmark = pytest.mark.main_python_only


@pytest.mark.parametrize("by", ["name", "address", "descriptor"])
def test_tcp_and_unix_sockets_are_served_through_generations(unit: Unit, by: str) -> None:
    port, path = find_free_port(), str(unit.machine.directory / "app.sock")
    tcp = f"[Socket]\nListenStream=127.0.0.1:{port}\nFileDescriptorName=web\nService={NAME}\n"
    local = f"[Socket]\nListenStream={path}\nFileDescriptorName=local\nService={NAME}\n"
    for name, text in (("tcp.socket", tcp), ("local.socket", local)):
        unit.machine.install(name, f"[Unit]\nDefaultDependencies=no\n{text}")
    unit.configure(
        sockets={
            # Elsewhere, as far as the service knows: where to listen is the socket unit's business.
            "name": [["listen_tcp", ["127.0.0.1", 1], {"name": "web"}], ["listen_unix", ["/x"], {"name": "local"}]],
            "address": [["listen_tcp", ["127.0.0.1", port], {}], ["listen_unix", [path], {}]],
            "descriptor": [["listen_fd", ["web"], {}], ["listen_fd", ["local"], {}]],
        }[by]
    )
    unit.install("Sockets=tcp.socket local.socket")
    unit.machine.systemctl("start", "tcp.socket", "local.socket")
    assert unit.show("ActiveState") == "inactive"
    # The first client starts it, and waits for that in the kernel's queue.
    with Load(port) as web, Load(path) as near:
        for generation in (1, 2):
            for load, address in ((web, ("127.0.0.1", port)), (near, path)):
                load.wait_for(generation)
                answer = unit.ask("who", address)
                assert answer["generation"] == generation
                assert not [name for name in answer["names"] if name.startswith("LISTEN_")]
            assert answer["pid"] == unit.main_pid
            unit.reload()
    assert web.counts.failures == near.counts.failures == Counter()
    with Load(port, LOUD, first_generation=3) as web, Load(path, LOUD, first_generation=3) as near:
        unit.systemctl("stop")
        # It is systemd's path, and systemd still listens there: the next client starts the service anew.
        assert Path(path).is_socket()
        web.wait_for(1, 30)
        near.wait_for(1, 30)
    assert web.counts.failures == near.counts.failures == Counter()
    assert unit.show("NRestarts") == "0"
    unit.systemctl("stop")
    assert unit.show("Result") == "success"
    assert Path(path).is_socket()


def test_several_sockets_of_one_name_and_one_that_nobody_asks_for(unit: Unit) -> None:
    ports = [find_free_port() for _ in range(3)]
    listen = "".join(f"ListenStream=127.0.0.1:{port}\n" for port in ports)
    unit.machine.install(
        "app.socket", f"[Unit]\nDefaultDependencies=no\n[Socket]\n{listen}FileDescriptorName=web\nService={NAME}\n"
    )
    two = [["listen_fd", ["web"], {}], ["listen_fd", ["web"], {}]]
    unit.configure(sockets=two)
    unit.install("Sockets=app.socket")
    unit.machine.systemctl("start", "app.socket")
    unit.systemctl("start")
    assert "nobody asks for it" in unit.log
    with Load(ports[0]) as one, Load(ports[1]) as other, Client(("127.0.0.1", ports[2])) as early:
        early.say("echo patience")
        unit.reload()
        for load in (one, other):
            load.wait_for(2)
        # A later release asks for it after all.
        unit.configure(sockets=[*two, ["listen_fd", ["web"], {}]])
        unit.reload()
        for load in (one, other):
            load.wait_for(3)
        assert early.hear() == "3 patience"
    assert one.counts.failures == other.counts.failures == Counter()
    assert {unit.ask("who", ("127.0.0.1", port))["generation"] for port in ports} == {3}


def is_listened_on(path: str) -> bool:
    """Say whether clients can wait on a Unix socket, which is bound before that: __SO_ACCEPTCON in /proc/net/unix."""
    lines = map(str.split, Path("/proc/net/unix").read_text().splitlines())
    return any(line[3] == "00010000" for line in lines if line[-1] == path)


@pytest.mark.usefixtures("systemd")
def test_systemd_socket_activate_starts_it_as_well(systemd: Path, unit: Unit) -> None:
    # Without a systemd that runs: any program can pass sockets in this way.
    port = find_free_port()
    unit.configure(
        sockets=[["listen_tcp", ["127.0.0.1", port], {}], ["listen_fd", [4], {}]], ecdysis={"control_socket": None}
    )
    environment = {
        "PYTHONPATH": str(PROJECT),
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": ":".join(str(path) for path in systemd.glob("usr/lib/*/systemd")),
    }
    path = str(unit.machine.directory / "socket")
    activate = [str(systemd / "usr/bin/systemd-socket-activate"), "-l", f"127.0.0.1:{port}", "-l", path]
    names = [f"--setenv={name}" for name in ("PYTHONPATH", "PATH")]
    process = subprocess.Popen(
        [*activate, "--fdname=web:local", *names, sys.executable, str(SERVICE), str(unit.settings_path)],
        env=environment,
        start_new_session=True,
    )
    try:
        unit.wait_until(lambda: is_listened_on(path))
        with Load(port) as web, Load(path) as near:
            first = unit.ask("who", path)
            assert (first["pid"], first["generation"]) == (process.pid, 1)
            for generation, address in ((2, ("127.0.0.1", port)), (3, path)):
                assert unit.ask("restart settled", address)["outcome"] == "settled"
                web.wait_for(generation)
                near.wait_for(generation)
        assert web.counts.failures == near.counts.failures == Counter()
        last = unit.ask("who", path)
        assert last["generation"] == 3
        assert process.wait() == 0
        pidfd = os.pidfd_open(last["pid"])
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            unit.wait_until(lambda: not Path(f"/proc/{last['pid']}/cwd").exists())
        finally:
            os.close(pidfd)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
