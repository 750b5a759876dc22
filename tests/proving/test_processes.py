"""Processes of a service, as Linux tells of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from ecdysis_async._proving.processes import find_acceptors, find_family, measure_memory


def test_descendants_are_found_and_measured() -> None:
    # It tells its pid itself: before it runs Python, it has next to no memory.
    child = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    program = f"import subprocess, sys; child = {start}; sys.stdin.read(); child.wait()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        family = find_family({process.pid})
        assert family == {process.pid, grandchild}
        assert {process.pid, grandchild, os.getpid()} <= find_family({os.getpid()})
        both, one = measure_memory(family), measure_memory({grandchild})
        assert both > one > 1_000_000
        assert process.stdin is not None
        process.stdin.close()
    assert find_family({process.pid}) == set()
    assert measure_memory({process.pid}) == 0


def test_acceptors_are_those_with_the_listening_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        with (
            subprocess.Popen(sleeper, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]) as having,
            subprocess.Popen(sleeper, stdin=subprocess.PIPE) as lacking,
        ):
            pids = {having.pid, lacking.pid}
            assert find_acceptors(pids, port) == {having.pid}
            assert find_acceptors({os.getpid(), *pids}, port) == {os.getpid(), having.pid}
            assert find_acceptors(pids, 1) == set()
            assert having.stdin is not None and lacking.stdin is not None
            having.stdin.close()
            lacking.stdin.close()
