"""The client of the control socket: which service it finds, and what it makes of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async.cli import client
from ecdysis_async.cli.output import Exit
from tests.cli.commands import FAILED, NO_SERVICE, SERVING, UNKNOWN, USAGE, Run, call
from tests.scenarios.handoff.harness import PATIENCE_SECONDS

pytestmark = pytest.mark.main_python_only


@contextlib.contextmanager
def answering(path: Path, answers: list[bytes]) -> Iterator[None]:
    """Listen there, and answer to each connection with the next of these, and nothing else."""

    def serve() -> None:
        for answer in answers:
            sock, _ = listener.accept()
            # A client that has only looked whether the service is there is gone already.
            with sock, contextlib.suppress(OSError):
                sock.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_SECONDS)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("command", ["restart", "stop", "status"])
@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([b"HTTP/1.1 400\r\n"], UNKNOWN),
        ([b"[]\n"], UNKNOWN),
        ([b"", b""], UNKNOWN),
        ([b'{"event": "error", "message": "no"}\n'], FAILED),
    ],
)
def test_somebody_else_listens(command: str, answers: list[bytes], code: int, tmp_path: Path) -> None:
    """What answers is no service, ends without a word, or refuses: no traceback, and never "it serves"."""
    with answering(tmp_path / "other", answers):
        done = call(command, "--control", str(tmp_path / "other"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("ecdysis: ")
    assert done.stderr.count("\n") == 1


def test_who_leaves_without_a_word_is_followed_by_somebody_who_is_asked(tmp_path: Path) -> None:
    """An anchor that is executed anew drops whom it has accepted and not answered."""
    with answering(tmp_path / "control", [b"", b'{"event": "reopened", "handlers": 3}\n']):
        done = call("reopen-logs", "--control", str(tmp_path / "control"))
    assert (done.returncode, done.stdout) == (SERVING, "reopened 3 log files\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.backends("asyncio")
def test_another_user(backend: str, run_service: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_service(backend)
    # From within, because the directories above belong to root alone.
    directory = tmp_path / "run" / "ecdysis"
    monkeypatch.chdir(directory)
    directory.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(client.CommandFailed, match="may not be used by uid 65534") as caught:
            client.status("api")
    finally:
        os.seteuid(0)
    assert caught.value.code == Exit.PERMISSION


@pytest.mark.backends("asyncio")
def test_several_services(backend: str, run_service: Run, environment: Path) -> None:
    run_service(backend, "api")
    # The one that is started last is ended first: both let their orphans go to this process.
    run_service(backend, "jobs")
    done = call("reopen-logs")
    assert done.returncode == USAGE
    assert done.stderr.splitlines()[1:] == [f"  --control {environment}/{name}" for name in ("api", "jobs")]
    # To look harms nobody: all of them are shown.
    done = call("status")
    assert done.returncode == SERVING
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        [f"{environment}/{name}", "1"] for name in ("api", "jobs")
    ]
    found = json.loads(call("status", "--json").stdout)["services"]
    assert {path: status["generation"] for path, status in found.items()} == {
        f"{environment}/{name}": 1 for name in ("api", "jobs")
    }
    assert call("status", "--control", "jobs").returncode == SERVING


@pytest.mark.parametrize("command", ["restart", "stop", "status", "reopen-logs"])
def test_no_service(command: str, environment: Path, tmp_path: Path) -> None:
    done = call(command)
    assert (done.returncode, done.stdout) == (NO_SERVICE, "")
    assert f"no service has its control socket in {environment}, " in done.stderr
    done = call(command, "--control", "api")
    assert done.returncode == NO_SERVICE
    assert done.stderr.startswith(f"ecdysis: no service has the control socket {environment}/api: it has ended, or ")
    # What a killed one has left.
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert call(command, "--control", str(path)).returncode == NO_SERVICE


def test_who_waits_for_a_service_that_is_silent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.5)
    path = str(tmp_path / "control")
    events: list[dict[str, object]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(client.CommandFailed, match="did not say whether it restarts"):
            client.restart(path, "settled", events.append)
    (event,) = events
    assert str(event["waiting_for"]).startswith(f"an answer of {path}, silent for ")
