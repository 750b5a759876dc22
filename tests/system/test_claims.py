"""What was passed to a process: found by its marker, taken once, and gone from the environment."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdysis_async._system.claims import LINE_MARKER, MARKER, claim_activation, claim_socket, mark, mark_restart

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def end() -> Iterator[socket.socket]:
    here, there = socket.socketpair()
    with here, there:
        yield there


def set_marker(monkeypatch: pytest.MonkeyPatch, descriptor: int, inode_offset: int = 0) -> None:
    found = os.fstat(descriptor)
    monkeypatch.setenv(MARKER, f"{descriptor}:{found.st_dev}:{found.st_ino + inode_offset}")


def test_a_socket_is_claimed_once(monkeypatch: pytest.MonkeyPatch, end: socket.socket) -> None:
    assert claim_socket(MARKER) is None
    descriptor = os.dup(end.fileno())
    os.set_inheritable(descriptor, True)
    set_marker(monkeypatch, descriptor)
    channel = claim_socket(MARKER)
    assert channel is not None
    with channel:
        assert channel.fileno() == descriptor
        assert not channel.get_inheritable()
        assert MARKER not in os.environ
        assert claim_socket(MARKER) is None


@pytest.mark.parametrize("marker", ["", "x", "1:2", "0:0:0:0", "-1:0:0", f"{10**30}:0:0", "1000000:0:0", "0:0:0"])
def test_a_marker_that_fits_nothing_is_ignored(monkeypatch: pytest.MonkeyPatch, marker: str) -> None:
    monkeypatch.setenv(MARKER, marker)
    assert claim_socket(MARKER) is None
    assert MARKER not in os.environ


def test_a_marker_that_fits_something_else_is_ignored(monkeypatch: pytest.MonkeyPatch, end: socket.socket) -> None:
    set_marker(monkeypatch, end.fileno(), inode_offset=1)
    assert claim_socket(MARKER) is None
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams, open(__file__) as file:
        for descriptor in tcp.fileno(), datagrams.fileno(), file.fileno():
            set_marker(monkeypatch, descriptor)
            assert claim_socket(MARKER) is None
            assert MARKER not in os.environ
        # None of them was ours to close.
        assert stat.S_ISSOCK(os.fstat(tcp.fileno()).st_mode)
        assert stat.S_ISSOCK(os.fstat(datagrams.fileno()).st_mode)


# Run as another program, because it is for the descriptors from 3 on of a process that was just executed.
ACTIVATED = """
import json, os, sys
from ecdysis_async._system import claims
found = claims.take_activation()
assert not claims.take_activation()
print(json.dumps([found, [os.get_inheritable(fd) for fd in found], [key for key in os.environ if "LISTEN" in key]]))
"""


def run_activated(sockets: int, names: str | None, pid: str = "$$") -> str:
    variables = f"LISTEN_PID={pid} LISTEN_FDS={sockets}" + (f" LISTEN_FDNAMES={names}" if names is not None else "")
    made = [socket.socket() for _ in range(2)]
    try:
        # A shell puts them from 3 on, and knows the pid before the exec.
        command = (
            f"exec {' '.join(f'{3 + index}<&{sock.fileno() + 20}' for index, sock in enumerate(made))} 5</dev/null; "
            f'exec env {variables} "$0" -c "$1"'
        )
        high = [os.dup2(sock.fileno(), sock.fileno() + 20) for sock in made]
        try:
            return subprocess.run(
                ["bash", "-c", command, sys.executable, ACTIVATED],
                check=True, capture_output=True, text=True, cwd=PROJECT, pass_fds=high,
            ).stdout.strip()  # fmt: skip
        finally:
            for descriptor in high:
                os.close(descriptor)
    finally:
        for sock in made:
            sock.close()


@pytest.mark.parametrize(
    ("sockets", "names", "pid", "result"),
    [
        (2, "web:web", "$$", '[{"3": "web", "4": "web"}, [false, false], []]'),
        (2, None, "$$", '[{"3": "unknown", "4": "unknown"}, [false, false], []]'),
        (3, "web::file", "$$", '[{"3": "web", "4": "unknown"}, [false, false], []]'),
        (2, "web", "1", "[{}, [], []]"),
        (0, "", "$$", "[{}, [], []]"),
    ],
)
def test_an_activation_is_claimed_and_its_variables_are_gone(
    sockets: int, names: str | None, pid: str, result: str
) -> None:
    assert run_activated(sockets, names, pid) == result


@pytest.mark.parametrize("count", ["many", "0", "9" * 10, "9" * 5000])
def test_what_was_never_passed_is_not_claimed(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    for key, value in {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "web"}.items():
        monkeypatch.setenv(key, value)
    assert claim_activation() == {}
    assert not [key for key in os.environ if key.startswith("LISTEN_")]


# Run as another program, because what was passed is claimed when the package is imported.
CLAIMING = """
import os, signal
import ecdysis_async
from ecdysis_async._system import claims
sockets = claims.take_channel(), claims.take_line()
print([sock is not None and sock.recv(1) for sock in sockets], claims.take_channel(), claims.take_line())
print(claims.is_worker(), claims.is_check(), callable(signal.getsignal(signal.SIGHUP)))
print([key for key in os.environ if key.startswith("ECDYSIS_")])
"""


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        ((), "[False, False] None None\nFalse False False\n[]\n"),
        ((MARKER,), "[b'x', False] None None\nFalse False False\n[]\n"),
        ((MARKER, "ECDYSIS_CHECK"), "[b'x', False] None None\nFalse True False\n[]\n"),
        (("ECDYSIS_CHECK",), "[False, False] None None\nFalse False False\n[]\n"),
        ((LINE_MARKER,), "[False, b'x'] None None\nTrue False True\n[]\n"),
    ],
)
def test_a_process_takes_what_it_was_passed_once(keys: tuple[str, ...], output: str) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.send(b"x")
        environment = {**os.environ, **{key: mark(there.fileno()) for key in keys}}
        found = subprocess.run(
            [sys.executable, "-c", CLAIMING], env=environment, pass_fds=[there.fileno()],
            check=True, capture_output=True, text=True, cwd=PROJECT,
        )  # fmt: skip
    assert found.stdout == output


def test_a_restart_is_known_by_the_first_line_and_not_to_what_is_started_from_here() -> None:
    here, there = socket.socketpair()
    program = (
        "import os, subprocess, sys; from ecdysis_async._system.claims import restart_id; "
        "print(repr(restart_id()), 'ECDYSIS_RESTART' in os.environ)"
    )
    with here, there:
        marks = {MARKER: mark(there.fileno()), "ECDYSIS_RESTART": mark_restart("0123456789ab", there.fileno())}
        other = {**marks, "ECDYSIS_RESTART": mark_restart("0123456789ab", here.fileno())}
        for variables, expected in (marks, "'0123456789ab' False"), (other, "'' False"):
            told = subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, **variables, "PYTHONPATH": str(PROJECT)},
                pass_fds=[there.fileno()],
                capture_output=True,
                text=True,
                check=True,
            )
            assert told.stdout.strip() == expected
