"""The command in front of a socket that somebody else serves: a clear error and exit code 6, and never a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-W", "error", "-m", "ecdysis_async.cli"]


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


ANSWERS: dict[str, list[bytes]] = {
    "garbage": [b"\xff\xfe garbage\n"],
    "done without a report": [line({"event": "done"})],
    "done with an empty report": [line({"event": "done", "report": {}})],
    "failed without fields": [line({"event": "failed"})],
    "a phase with junk": [line({"event": "phase", "waiting_for": 7, "workers": [1], "report": 3})],
    "an empty status": [line({"event": "status", "status": {}})],
    "a status that is a list": [line({"event": "status", "status": []})],
    "a status with junk": [
        line({"event": "status", "status": {"generation": 1, "pid": 1, "state": [], "listeners": 3, "draining": None}})
    ],
    "an event of nobody": [line({"event": "surprise"})],
    "deeply nested": [b"[" * 100_000 + b"\n"],
    "a huge number": [b"9" * 5_000 + b"\n"],
    "a line without an end": [b'{"event": "error", "message": "' + b"x" * (17 * 1024 * 1024)],
    "a number for an event": [line({"event": 3})],
}


@contextlib.contextmanager
def listening(path: str, lines: list[bytes]) -> Iterator[None]:
    """Answer each connection with the same lines."""
    ends = threading.Event()

    def serve() -> None:
        while not ends.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            with client, contextlib.suppress(OSError):
                client.recv(65536)
                for each in lines:
                    client.sendall(each)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(50)
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("command", ["restart", "status", "stop", "restart --anchor", "reopen-logs"])
def test_what_is_no_service_is_called_so(command: str, answer: str, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with listening(path, ANSWERS[answer]):
        ended = run(*command.split(), "--control", path)
    assert "Traceback" not in ended.stderr
    # What a command does not wait for, it does not look at; then the end of the connection is all that it hears.
    assert ended.returncode == 6, (ended.returncode, ended.stderr)
    assert path in ended.stderr


def test_a_service_moves_no_cursor(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with listening(path, [line({"event": "error", "message": "\x1b]0;owned\x07\x1b[2J\x9b31mhello\r\x08"})]):
        ended = run("status", "--control", path)
    assert ended.returncode == 1
    assert ended.stderr == "ecdysis: \\x1b]0;owned\\x07\\x1b[2J\\x9b31mhello\\x0d\\x08\n"


def test_who_says_that_it_has_stopped_and_has_not_is_told_of(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    program = "import sys; from ecdysis_async.cli import client, main; client.EXIT_SECONDS = 0.2; main()"
    with listening(path, [line({"event": "accepted", "pid": os.getpid()}), line({"event": "done"})]):
        ended = subprocess.run(
            [sys.executable, "-c", program, "stop", "--control", path], capture_output=True, text=True, check=False
        )
    assert ended.returncode == 6
    assert f"pid {os.getpid()}" in ended.stderr
    assert "still there" in ended.stderr


@pytest.mark.parametrize("command", ["status", "reopen-logs", "restart --check"])
def test_an_interrupted_question_is_no_verdict(command: str, tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(60)
        process = subprocess.Popen(
            [*COMMAND, *command.split(), "--control", path],
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.DEVNULL,
        )
        client, _ = listener.accept()
        with client:
            assert client.recv(65536).endswith(b"\n")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\necdysis: interrupted\n")


def test_a_service_whose_queue_is_full_is_told_of(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    program = "from ecdysis_async.cli import client, main; client.status.__defaults__ = (0.2,); main()"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        while True:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            if waiting.connect_ex(path) == errno.EAGAIN:
                break
        ended = subprocess.run(
            [sys.executable, "-c", program, "status", "--control", path],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 6
    assert "its queue has been full" in ended.stderr


def test_who_may_not_is_told_so_by_a_code_of_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    refusal = {"event": "error", "reason": "permission", "message": "uid 1 may not control a service of uid 2"}
    with listening(path, [line(refusal)]):
        assert run("restart", "--control", path).returncode == 7


def test_the_variable_counts_for_every_command(tmp_path: Path) -> None:
    for command in ("restart", "status", "stop", "reopen-logs"):
        ended = subprocess.run(
            [*COMMAND, command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "ECDYSIS_CONTROL": str(tmp_path / "nobody")},
        )
        assert ended.returncode == 3
        assert str(tmp_path / "nobody") in ended.stderr
