"""The control socket over generations: it moves with the others, and each client hears the end of what it has asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.handoff.harness import PATIENCE_SECONDS, Clients, Service, running

pytestmark = pytest.mark.main_python_only

Json = dict[str, Any]
Run = Callable[..., Service]


class Asking:
    """One client of a control socket."""

    def __init__(self, path: str, data: bytes = b"", **request: Any) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE_SECONDS)
        self._sock.connect(path)
        self._lines = self._sock.makefile("rb")
        # Refused before it was heard: the answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(data or json.dumps(request).encode() + b"\n")

    def events(self) -> Iterator[Json]:
        """Return what is said, to the end."""
        return map(json.loads, self._lines)

    def wait_for(self, event: str) -> Json:
        return next(each for each in self.events() if each["event"] == event)

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


@contextlib.contextmanager
def asking(path: str, data: bytes = b"", **request: Any) -> Iterator[Asking]:
    with contextlib.closing(Asking(path, data, **request)) as client:
        yield client


def ask(path: str, **request: Any) -> Json:
    """Return the last thing that is said."""
    with asking(path, **request) as client:
        return list(client.events())[-1]


def status(path: str) -> Json:
    found: Json = ask(path, command="status")["status"]
    return found


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control")


def test_it_moves_over_generations(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    inode = os.stat(path).st_ino
    for generation in (1, 2, 3):
        found = status(path)
        assert (found["generation"], found["pid"]) == (generation, service.newest())
        assert os.stat(path).st_ino == inode
        done = ask(path, command="restart", until="drained")
        assert (done["event"], done["report"]["generation"]) == ("done", generation + 1)
        assert done["report"]["inherited"] == ["ecdysis control", "tcp:127.0.0.1:0"]
        assert "drain" in done["report"]["phases"]
        # Its predecessor has told it, and it may not have come to hear of it.
        service.wait_until(lambda: status(path)["last_report"] is not None, "it does not know where it came from")
        last = status(path)["last_report"]
        assert (last["id"], last["outcome"]) == (done["report"]["id"], "settled")
    assert ask(path, command="stop") == {"event": "done"}
    # Everything is free when that is said.
    assert not os.path.exists(path)
    service.wait_for_end()
    assert not os.path.exists(path + ".lock")


def test_a_client_hears_the_end_from_the_generation_it_asked(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path, "probation": 60})
    first = service.pids[0]
    with asking(path, command="restart", until="settled") as client, asking(path, b'{"command": "sta') as slow:
        assert client.wait_for("accepted")["pid"] == first
        service.wait_for("predecessor", state="probation")
        # Who was accepted before is served while it is paused; who comes now is the successor's.
        slow._sock.sendall(b'tus"}\n')
        former = slow.wait_for("status")["status"]
        newer = status(path)
        second = newer["pid"]
        assert (former["pid"], former["state"], newer["generation"], newer["state"]) == (first, "paused", 2, "serving")
        assert former["waiting_for"].startswith(f"generation 2 (pid {second}), on probation for ")
        assert former["restart"]["phase"] == "probation"
        assert newer["waiting_for"] == (
            f"the end of its probation: generation 1 (pid {first}) can still take over again"
        )
        # The successor knows the restart already, of which it has heard nothing but the id.
        verdict = ask(path, command="verdict", id=former["restart"]["id"])
        assert (verdict["report"]["outcome"], verdict["report"]["successor_pid"]) == ("serving", second)
        # A restart of its own ends the probation.
        assert ask(path, command="restart", until="serving")["report"]["generation"] == 3
        *_, done = client.events()
        assert (done["event"], done["report"]["outcome"]) == ("done", "settled")


@pytest.mark.backends("asyncio", "trio")
def test_who_comes_while_nobody_accepts_waits(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    service.arm("predecessor", "committing", "stop-peer")
    with asking(path, command="restart", until="settled") as client:
        second = service.wait_for("fault")["target"]
        service.wait_until_stopped(second)
        with asking(path, command="status") as waiting:
            service.signal(second, signal.SIGCONT)
            assert waiting.wait_for("status")["status"]["pid"] == second
        assert client.wait_for("done")["report"]["successor_pid"] == second


def test_a_rollback(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path, "probation": 60})
    service.arm("successor", "probation", "kill-self")
    failed = ask(path, command="restart", until="settled")
    assert (failed["event"], failed["error"], failed["report"]["outcome"]) == ("failed", "RolledBack", "rolled back")
    found = status(path)
    assert (found["generation"], found["state"], found["waiting_for"]) == (1, "serving", None)
    assert ask(path, command="verdict", id=failed["report"]["id"])["report"] == failed["report"]


@pytest.mark.backends("asyncio", "trio")
def test_a_drain_counts_down(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path, "drain_timeout": 60})
    with service.begin("hold") as held, asking(path, command="restart", until="drained") as client:
        service.wait_for("holding")
        texts = (each["waiting_for"] for each in client.events() if each["event"] == "phase")
        assert next(text for text in texts if text and "deadline" in text).startswith("1 connection, deadline in ")
        # The newest one knows of those before it.
        service.wait_until(lambda: bool(status(path)["draining"]), "it does not know that its predecessor drains")
        [former] = status(path)["draining"]
        # How long it may still take is told as well: by each word of it, of which the first comes at once.
        service.wait_until(lambda: status(path)["draining"][0]["ends_in"] is not None, "nobody says so")
        assert (former["generation"], former["pid"]) == (1, service.pids[0])
        held.say("hello")
        held.answer()
        held.close()
        assert client.wait_for("done")["report"]["drain"]["drained"] == 1
    service.wait_for_death(service.pids[0])
    service.wait_until(lambda: not status(path)["draining"], "a dead generation is said to drain")


@pytest.mark.backends("asyncio", "trio")
def test_the_predecessor_dies(backend: str, run_service: Run, path: str) -> None:
    """The successor knows what became of the restart, also of one that its predecessor could not report any more."""
    service = run_service(backend, ecdysis={"control_socket": path})
    service.configure(at_start="await wait()")
    with asking(path, command="restart", until="settled") as client:
        id = client.wait_for("accepted")["id"]
        service.wait_for("waiting")
        service.signal(service.pids[0], signal.SIGKILL)
        with asking(path, command="verdict", id=id) as again:
            service.release()
            report = again.wait_for("verdict")["report"]
    assert (report["generation"], report["predecessor_pid"]) == (2, service.pids[0])
    assert report["outcome"] in ("serving", "settled")
    service.wait_until(
        lambda: ask(path, command="verdict", id=id)["report"]["outcome"] == "settled", "it does not settle"
    )


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_a_stale_socket_is_replaced(backend: str, tmp_path: Path, path: str) -> None:
    killed, next_one = tmp_path / "killed", tmp_path / "next"
    killed.mkdir()
    next_one.mkdir()
    with running(killed, backend, ecdysis={"control_socket": path}) as service:
        service.signal(service.pids[0], signal.SIGKILL)
        service.wait_for_death(service.pids[0])
    assert os.path.exists(path)
    with running(next_one, backend, ecdysis={"control_socket": path}) as service:
        assert status(path)["pid"] == service.pids[0]
        assert ask(path, command="restart", until="settled")["event"] == "done"


@pytest.mark.backends("asyncio", "trio")
def test_a_live_socket_is_never_stolen(backend: str, run_service: Run, tmp_path: Path, path: str) -> None:
    run_service(backend, ecdysis={"control_socket": path, "probation": 60})
    # Neither while two generations share it, nor where its path leads nowhere any more.
    ask(path, command="restart", until="serving")
    thieves = tmp_path / "thieves"
    thieves.mkdir()

    def steal() -> None:
        with running(thieves, backend, ecdysis={"control_socket": path}, serves=False) as thief:
            thief.expected_blemishes = ("Traceback (most",)
            assert thief.wait_for_death(thief.pids[0]) == 1
            assert f"the control socket {path} belongs to a live service" in thief.log

    steal()
    assert status(path)["generation"] == 2
    elsewhere = str(tmp_path / "elsewhere")
    os.rename(path, elsewhere)
    thieves = tmp_path / "more thieves"
    thieves.mkdir()
    steal()
    assert not os.path.exists(path)
    assert status(elsewhere)["generation"] == 2
    os.unlink(elsewhere)


@pytest.mark.backends("uvloop", "trio")
def test_a_path_that_changes_or_is_gone(backend: str, run_service: Run, tmp_path: Path, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})

    def restart() -> Json:
        former = service.newest()
        report = service.restart("settled")
        service.wait_for_death(former)
        return report

    os.unlink(path)
    assert restart()["created"] == ["ecdysis control"]
    assert status(path)["generation"] == 2
    elsewhere = str(tmp_path / "elsewhere")
    service.configure(ecdysis={"control_socket": elsewhere})
    assert restart()["unclaimed"] == ["ecdysis control"]
    assert status(elsewhere)["generation"] == 3
    assert not os.path.exists(path)
    service.configure(ecdysis={"control_socket": None})
    restart()
    assert not os.path.exists(elsewhere)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".lock")]


@pytest.mark.backends("asyncio", "trio")
def test_a_successor_that_may_not_have_it(backend: str, run_service: Run, tmp_path: Path, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path})
    unsafe = tmp_path / "unsafe"
    unsafe.mkdir()
    unsafe.chmod(0o777)
    service.configure(ecdysis={"control_socket": str(unsafe / "control")})
    service.expected_blemishes = ("Traceback (most",)
    failed = ask(path, command="restart", until="settled")
    assert failed["error"] == "SuccessorFailed"
    assert f"chmod go-w {unsafe}" in failed["message"]
    assert status(path)["generation"] == 1


def test_hostile_clients_cost_nobody_anything(backend: str, run_service: Run, path: str) -> None:
    """Through a restart: those who say nothing, half of it, too much, or never read. All others are served."""
    impatience = "from ecdysis_async._management import control_connection; control_connection.ANSWER_SECONDS = 0.2"
    service = run_service(backend, ecdysis={"control_socket": path, "probation": 0.5}, at_import=impatience)
    with Clients(service.address) as clients, contextlib.ExitStack() as stack:
        requests = [b'{"command": "status"}\n'] * 50 + [b'{"command": "check"}\n'] * 5
        for data in [b"{"] * 100 + requests + [b"x" * 1_000_000]:
            stack.enter_context(asking(path, data))
        stack.enter_context(asking(path, command="restart", until="drained"))
        service.wait_for("predecessor", state="settled")
        # Not the process that was started last, which may be one that is checked.
        second = status(path)["pid"]
        assert second != service.pids[0]
        clients.wait_for(second)
        service.wait_for_death(service.pids[0])
        assert status(path)["pid"] == second
    assert (clients.refused, clients.lost) == ([], [])


@pytest.mark.backends("asyncio", "trio")
def test_reopen_logs(backend: str, run_service: Run, tmp_path: Path, path: str) -> None:
    """By command and by signal, which nobody else may use; and in whoever drains."""
    log = tmp_path / "app.log"
    start = f"import logging\nlogging.getLogger().addHandler(logging.FileHandler({str(log)!r}))"
    service = run_service(backend, ecdysis={"control_socket": path}, at_import=start)
    log.rename(tmp_path / "app.log.1")
    assert ask(path, command="reopen-logs") == {"event": "reopened", "handlers": 1}
    log.unlink(missing_ok=True)
    service.signal(service.pids[0], signal.SIGUSR1)
    service.wait_for_log("reopened 1 log file")
    service.wait_until(log.exists, "nothing is written to the new file")
    faulthandler = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1)"
    service.configure(at_import=faulthandler)
    with service.begin("hold"):
        service.wait_for("holding")
        service.restart("settled")
        log.rename(tmp_path / "app.log.2")
        assert ask(path, command="reopen-logs") == {"event": "reopened", "handlers": 0}
        service.wait_until(lambda: service.log.count("] reopened 1 log file") == 3, "it drains into the former file")
        service.signal(service.newest(), signal.SIGUSR1)
        service.wait_for_log("most recent call first")


@pytest.mark.backends("asyncio", "trio")
def test_a_check_changes_nothing(backend: str, run_service: Run, path: str) -> None:
    """What a restart would start tells what it is, and ends before it has anything of the service."""
    service = run_service(backend, ecdysis={"control_socket": path})
    service.configure(at_start="raise AssertionError('a check has come so far')")
    answer = ask(path, command="check")
    assert answer["event"] == "checked"
    found = answer["comparison"]
    # It would ask for its sockets only where it runs.
    assert (found["pid"], found["sockets"]) == (service.pids[0], None)
    assert found["process"] == found["former_process"]
    assert found["environment"] == {"added": [], "removed": [], "changed": []}
    assert service.ask() == {"generation": 1, "pid": service.pids[0]}
    assert status(path)["last_report"] is None


@pytest.mark.backends("asyncio", "trio")
def test_a_check_that_is_not_passed(backend: str, run_service: Run, path: str) -> None:
    service = run_service(backend, ecdysis={"control_socket": path, "ready_timeout": 20})
    # The channel that it never asked for is left to the interpreter.
    service.expected_blemishes = ("Exception ignored in: <socket.socket", "ResourceWarning: unclosed <socket.socket")
    service.configure(at_import="sys.exit('no licence')")
    failed = ask(path, command="check")
    assert (failed["event"], failed["error"]) == ("failed", "CheckFailed")
    assert failed["message"].startswith("the new release fails its check: it has ended with exit status 1")
    assert "no licence" in failed["message"]
    service.configure(at_import="block()")
    with asking(path, command="check"):
        service.wait_for("blocked")
        assert ask(path, command="check")["message"] == "another check is in progress: try again later"
        # A client that leaves takes its check along: nothing is left for the next one.
    service.wait_until(lambda: len([pid for pid in service.pids if service.is_alive(pid)]) == 1, "it stays")
    service.configure(at_import="")
    service.wait_until(lambda: ask(path, command="check")["event"] == "checked", "there is always one in progress")


@pytest.mark.backends("asyncio")
def test_what_describes_no_release(backend: str, run_service: Run, path: str) -> None:
    run_service(backend, ecdysis={"control_socket": path})
    releases: list[Json] = [{}, {"environment": 1, "sockets": None}, {"environment": {"digests": {}}}]
    for release in releases:
        answer = ask(path, command="compare", release=release)
        assert answer["event"] == "error"
        assert answer["message"].startswith("this does not describe a release: ")
    answer = ask(path, command="compare", release="main:app")
    assert "there is no such request" in answer["message"]
