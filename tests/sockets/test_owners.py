"""A port that is taken, and who has it: out of the errors that libraries raise."""

from __future__ import annotations

import asyncio
import os
import socket
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ecdysis_async._sockets.owners import describe_held, describe_owner, describe_taken

LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as sock:
    print(sock.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner() -> Iterator[tuple[int, int]]:
    """A process that listens: its pid, and its port."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.kill()


def by_hand(port: int) -> None:
    with socket.socket() as sock:
        address = "127.0.0.1", port
        sock.bind(address)


def by_server(port: int) -> None:
    with socketserver.TCPServer(("127.0.0.1", port), socketserver.BaseRequestHandler):
        pass


def by_asyncio(port: int) -> None:
    asyncio.run(asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port))


def by_words(port: int) -> None:
    raise RuntimeError(f"Failed to bind to address 127.0.0.1:{port}; set GRPC_VERBOSITY=debug")


def wrapped(port: int) -> None:
    try:
        by_server(port)
    except OSError as error:
        raise ExceptionGroup("several", [ValueError("the application cannot start")]) from error


@pytest.mark.parametrize("bind", [by_hand, by_server, by_asyncio, by_words, wrapped])
def test_a_port_and_its_owner_are_named(owner: tuple[int, int], bind: Callable[[int], None]) -> None:
    pid, port = owner
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of each kind
        bind(port)
    told = describe_taken(caught.value, ())
    assert told is not None
    assert told.startswith(f"Port {port} is taken by pid {pid} (python")
    assert "stop that program" in told
    told = describe_taken(caught.value, {pid})
    assert told is not None
    assert "of this service" in told
    assert "--one-at-a-time" in told


def test_one_that_this_process_has_itself_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            by_hand(port)
        assert describe_taken(caught.value, ()) == f"Port {port} is open in this process already: it is opened twice"


def test_other_errors_are_left_alone() -> None:
    assert describe_taken(ValueError("no port 8000"), ()) is None
    assert describe_taken(OSError(98, os.strerror(98)), ()) is None


def test_a_password_in_a_command_line_is_not_told() -> None:
    command = [sys.executable, "-c", LISTEN, "--password", "secret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = describe_owner(int(process.stdout.readline()))
        process.kill()
    assert f"pid {process.pid}" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError('Could not set lock on file "a.db": Conflicting lock is held in python (PID 53)'), "Pid 53 is of"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "If another process of this service has it"),
        (RuntimeError("database is locked"), "If another process of this service has it"),
    ],
)
def test_a_lock_that_a_process_of_the_service_may_have_is_told(error: Exception, told: str) -> None:
    found = describe_held(error, {53})
    assert found is not None
    assert found.startswith(told)
    assert "--one-at-a-time" in found
    assert describe_held(error, ()) is None


@pytest.mark.parametrize("text", ["the clock is wrong", "blocked by a filter", "pid 54 has left"])
def test_other_errors_are_of_no_lock(text: str) -> None:
    assert describe_held(ValueError(text), {53}) is None
