"""A takeover: a process that is no child becomes the successor, and each guarantee holds as for a child."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import PROJECT, Clients, Service
from tests.scenarios.handoff.test_control import ask, asking, status

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control")


def take_over(service: Service, path: str) -> int:
    """Start a newcomer that asks the service for its sockets."""
    service.configure(ecdysis={"takeover": path})
    return service.start_another()


def test_a_newcomer_goes_on(backend: str, run_service: Run, tmp_path: Path, path: str) -> None:
    """It is the next generation, with everything; and what it starts itself are its children."""
    pid_file = tmp_path / "pid"
    service = run_service(backend, ecdysis={"control_socket": path, "pid_file": str(pid_file)})
    first, inode = service.pids[0], os.stat(path).st_ino
    with service.begin("hold") as held, Clients(service.address) as clients:
        service.wait_for("holding")
        second = take_over(service, path)
        clients.wait_for(second)
        service.wait_for("successor", state="settled", pid=second)
        # Who was accepted by the former one is answered by it.
        held.say("hello")
        assert held.answer() == {"generation": 1, "pid": first}
        held.close()
        assert service.wait_for_death(first) == 0
        service.wait_until(lambda: pid_file.read_text().strip() == str(second), "the pid file does not follow")
        found = status(path)
        assert (found["generation"], found["pid"], found["last_report"]["outcome"]) == (2, second, "settled")
        assert os.stat(path).st_ino == inode
        assert service.restart("settled")["generation"] == 3
        third = service.newest()
        clients.wait_for(third)
        service.wait_for_death(second)
    assert (clients.refused, clients.lost) == ([], [])
    assert service.accepting_turns() == [first, second, third]
    # Its log went where its own stderr leads, and not through a pipe of the former one's.
    assert re.search(rf"\[generation 2, pid {second}, restart \w+\] the restart is settled", service.log)


def test_a_newcomer_dies_on_probation(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path, "probation": 60})
    first = service.pids[0]
    with Clients(service.address) as clients:
        service.arm("successor", "probation", "kill-self")
        second = take_over(service, path)
        assert service.wait_for_death(second) == -signal.SIGKILL
        clients.wait_for(first)
        found = status(path)
        assert (found["generation"], found["state"], found["last_report"]["outcome"]) == (1, "serving", "rolled back")
        # Trying again works.
        service.configure(ecdysis={"probation": 0.2})
        clients.wait_for(take_over(service, path))
    assert clients.refused == []
    assert len(clients.lost) <= 1


@pytest.mark.backends("asyncio", "trio")
def test_a_newcomer_that_fails_costs_nothing(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    service.expected_blemishes = ("Traceback (most",)
    service.configure(at_start="raise OSError('no database')")
    with Clients(service.address) as clients:
        assert service.wait_for_death(take_over(service, path)) == 1
        # It has said that it fails, and who was to hear that answers its clients meanwhile.
        service.wait_for("predecessor", state="failed", pid=service.pids[0])
        clients.wait_for(service.pids[0])
        found = status(path)
        assert (found["state"], found["last_report"]["outcome"]) == ("serving", "failed")
        assert "OSError: no database" in found["last_report"]["error"]
    assert (clients.refused, clients.lost) == ([], [])


@pytest.mark.backends("uvloop", "trio")
def test_the_running_one_dies(backend: str, run_service: Run, path: str) -> None:
    """Whoever has the sockets by then goes on with them."""
    service = run_service(backend, ecdysis={"control_socket": path})
    service.configure(at_start="await wait()")
    with Clients(service.address) as clients:
        second = take_over(service, path)
        service.wait_for("waiting", pid=second)
        service.signal(service.pids[0], signal.SIGKILL)
        service.wait_for_death(service.pids[0])
        service.release()
        clients.wait_for(second)
    assert clients.refused == []
    assert len(clients.lost) <= 1
    assert status(path)["pid"] == second


# The SIGTERM that the predecessor sends beside its word comes once the block has been left, and not a moment earlier.
LATE_SIGTERM = """
import atexit, signal

def be_told():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
atexit.register(be_told)
"""


@pytest.mark.backends("asyncio", "trio")
def test_a_stop_ends_both(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    service.configure(at_import=LATE_SIGTERM, at_start="await wait()")
    second = take_over(service, path)
    service.wait_for("waiting", pid=second)
    assert ask(path, command="stop") == {"event": "done"}
    # Its own status, and not that of a process that the signal has killed on its way out.
    assert service.wait_for_death(second) == 1
    service.wait_for_end()


@pytest.mark.backends("asyncio", "trio")
def test_a_kernel_that_passes_no_pidfds_of_peers(backend: str, run_service: Run, path: str) -> None:
    older = "from ecdysis_async._management import control_connection; control_connection.SO_PEERPIDFD = 9999"
    service = run_service(backend, ecdysis={"control_socket": path}, at_import=older)
    with Clients(service.address) as clients:
        second = take_over(service, path)
        clients.wait_for(second)
        service.wait_for_death(service.pids[0])
    assert (clients.refused, clients.lost) == ([], [])


@pytest.mark.backends("asyncio", "trio")
def test_nobody_is_there(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    service.expected_blemishes = ("Traceback (most",)
    assert service.wait_for_death(take_over(service, path + ".missing")) == 1
    assert f"TakeoverFailed: there is no service to take over: {path}.missing: No such file" in service.log
    assert status(path)["generation"] == 1


@pytest.mark.backends("asyncio", "trio")
def test_it_restarts_already(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    service.expected_blemishes = ("Traceback (most",)
    service.configure(at_start="await wait()")
    with asking(path, command="restart", until="settled") as client:
        service.wait_for("waiting")
        assert service.wait_for_death(take_over(service, path)) == 1
        assert f"the service at {path} does not hand over: restart " in service.log
        service.release()
        assert client.wait_for("done")["report"]["generation"] == 2


@pytest.mark.backends("asyncio", "trio")
def test_who_asks_and_leaves(backend: str, run_service: Run, path: str) -> None:
    """Before it has the channel, with the channel, and by its death: nothing changes, and nothing is left."""
    service = run_service(backend, ecdysis={"control_socket": path, "ready_timeout": 30})
    request = json.dumps({"command": "takeover"}).encode() + b"\n"
    program = (
        "import os, signal, socket, sys\n"
        f"sock = socket.socket(socket.AF_UNIX); sock.connect({path!r}); sock.sendall({request!r})\n"
        "if sys.argv[1] != 'early': socket.recv_fds(sock, 65536, 1)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for when in ("early", "late", "killed"):
        subprocess.run([sys.executable, "-c", program, when], timeout=60, cwd=PROJECT, check=False)
        service.wait_until(lambda: status(path)["restart"] is None, "the restart does not end")
    assert status(path)["generation"] == 1
    assert service.restart("settled")["generation"] == 2


@pytest.mark.backends("asyncio")
def test_a_unit_of_systemd_is_not_taken_away(
    backend: str, run_service: Run, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    service = run_service(backend, ecdysis={"control_socket": path})
    answer = ask(path, command="takeover")
    assert (answer["event"], answer["error"]) == ("failed", "RestartUnsupported")
    assert "unit of systemd" in answer["message"]
    assert service.ask()["generation"] == 1
