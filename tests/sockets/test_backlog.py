"""How many clients wait to be accepted."""

from __future__ import annotations

import contextlib
import socket

import pytest

from ecdysis_async._sockets.backlog import measure_backlog


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_clients_that_wait_are_counted(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as sock, contextlib.ExitStack() as clients:
        assert measure_backlog(sock) == 0
        for _ in range(3):
            clients.enter_context(socket.create_connection(sock.getsockname()[:2]))
        assert measure_backlog(sock) == 3
        sock.accept()[0].close()
        assert measure_backlog(sock) == 2


def test_where_nobody_waits_nothing_is_told() -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket() as idle:
        assert [measure_backlog(sock) for sock in (unix, udp, idle)] == [None, None, None]
    assert measure_backlog(idle) is None
