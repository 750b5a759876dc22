"""Children that an application forks hold nothing of ours, and a signal ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from ecdysis_async._system.forking import withhold_from_children, withholding_from_children
from ecdysis_async._system.signals import handled_signals


@contextlib.contextmanager
def forked() -> Iterator[int]:
    """Fork a child that waits until it is ended."""
    began, begins = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(begins, b"!")
            signal.pause()
        finally:
            os._exit(9)
    try:
        # The child lets go before it returns from fork(), which may be long after this process has.
        assert os.read(began, 1) == b"!"
        yield pid
    finally:
        os.close(began)
        os.close(begins)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def listen() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads of the test runner, and a fork
def test_a_child_holds_no_listening_socket_and_no_duplicate_of_one() -> None:
    with listen() as sock, sock.dup() as duplicate, listen() as other:
        withhold_from_children(sock)
        address = sock.getsockname()
        with forked():
            sock.close()
            duplicate.close()
            with socket.socket() as again:
                again.bind(address)
                again.listen()
            # A socket that nobody has withheld is the child's as well.
            kept = other.getsockname()
            other.close()
            with socket.create_connection(kept):
                pass


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_end_of_a_channel_is_seen_while_a_child_lives() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        withhold_from_children(ours)
        theirs.settimeout(30)
        with forked():
            ours.close()
            assert theirs.recv(1) == b""


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_is_withheld_within_a_block_is_asked_for_at_the_fork() -> None:
    socks: list[socket.socket] = []
    with withholding_from_children(lambda: socks), listen() as sock:
        socks.append(sock)
        with forked():
            address = sock.getsockname()
            sock.close()
            with socket.socket() as again:
                again.bind(address)
                again.listen()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_closed_socket_is_no_hindrance() -> None:
    with listen() as sock:
        withhold_from_children(sock)
    with forked() as pid:
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_child_has_the_signal_handlers_that_were_there_before(in_thread: bool) -> None:
    status: list[int] = []

    def end_one() -> None:
        with forked() as pid:
            os.kill(pid, signal.SIGTERM)
            status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        # Before it has returned from fork(), most of the time.
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(9)
        os.kill(pid, signal.SIGTERM)
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with handled_signals({signal.SIGTERM: lambda: None}), handled_signals({signal.SIGTERM: lambda: None}):
        if in_thread:
            thread = threading.Thread(target=end_one)
            thread.start()
            thread.join()
        else:
            end_one()
    assert status == [-signal.SIGTERM] * 2
