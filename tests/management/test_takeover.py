"""A newcomer asks a service for its channel: what it gets, and what it is told where there is nothing to be got."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ecdysis_async._management import takeover
from ecdysis_async._management.takeover import FormerService, ask_for_channel
from ecdysis_async.errors import TakeoverFailed


def ask(path: Path, answer: Callable[[socket.socket], object]) -> socket.socket:
    """Ask a service that gives this answer, once it has heard the request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as client:
                requests.append(json.loads(client.recv(4096)))
                answer(client)

        requests: list[object] = []
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return ask_for_channel(str(path), anchor=3)
        finally:
            thread.join()
            assert requests == [{"command": "takeover", "anchor": 3}]


def test_the_channel_comes_with_the_answer(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = b'{"event": "accepted", "id": "abc"}\n'

        def answer(client: socket.socket) -> None:
            socket.send_fds(client, [line[:5]], [theirs.fileno()])
            client.sendall(line[5:])

        with ask(tmp_path / "control", answer) as channel:
            channel.send(b"hello")
            assert ours.recv(5) == b"hello"


def send_a_file(client: socket.socket) -> None:
    with open(os.devnull, "rb") as file:
        socket.send_fds(client, [b'{"event": "accepted"}\n'], [file.fileno()])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda client: client.sendall(b'{"event": "failed", "message": "not now"}\n'), "does not hand over: not now"),
        (lambda client: client.sendall(b'{"event": "error", "message": "you may not"}\n'), "you may not"),
        (lambda client: client.sendall(b'{"event": "accepted"}\n'), "no service of this library"),
        (lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\n"), "no service of this library"),
        (send_a_file, "no service of this library"),
        (lambda client: None, "has left without an answer"),
    ],
    ids=["refused", "forbidden", "no channel", "another program", "no socket", "nothing"],
)
def test_a_service_that_does_not_hand_over(tmp_path: Path, answer: Callable[[socket.socket], object], why: str) -> None:
    with pytest.raises(TakeoverFailed, match=why):
        ask(tmp_path / "control", answer)


def test_there_is_no_service(tmp_path: Path) -> None:
    with pytest.raises(TakeoverFailed, match="there is no service to take over"):
        ask_for_channel(str(tmp_path / "control"))


def test_a_service_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "ANSWER_SECONDS", 0.05)
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(TakeoverFailed, match="hangs, or is stopped"):
            ask_for_channel(path)


# Listens as another user, and says that by a line.
LISTENS = """
import os, socket, sys
os.setuid(54000)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("listening", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_believed() -> None:
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o777)
        path = f"{shared}/control"
        command = [sys.executable, "-c", LISTENS, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == b"listening\n"
            with pytest.raises(TakeoverFailed, match="belongs to uid 54000"):
                ask_for_channel(path)
            stranger.communicate()


# Listens, says so, and ends when its input does, with or without its path.
SERVES = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("listens", flush=True)
    sys.stdin.read()
    os.unlink(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("environment", "is_killed", "has_died"),
    [({}, True, True), ({}, False, False), ({"NOTIFY_SOCKET": "/run/nowhere"}, True, False)],
    ids=["killed", "stopped", "killed, of systemd"],
)
def test_who_has_died_is_told_from_who_was_stopped(
    environment: dict[str, str], *, is_killed: bool, has_died: bool, tmp_path: Path
) -> None:
    path = tmp_path / "control"
    with subprocess.Popen(
        [sys.executable, "-c", SERVES, str(path)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        with contextlib.closing(FormerService(str(path))) as former:
            assert former.pid == process.pid
            if is_killed:
                process.kill()
            process.communicate()
            assert former.has_died() is has_died


def test_one_that_lives_has_not_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "DEATH_GRACE_MILLISECONDS", 10)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        with contextlib.closing(FormerService(str(tmp_path / "control"))) as former:
            assert not former.has_died()


def test_nobody_is_there_to_be_watched(tmp_path: Path) -> None:
    with pytest.raises(TakeoverFailed, match="there is no service to take over"):
        FormerService(str(tmp_path / "control"))
