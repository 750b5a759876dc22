"""One client of the control socket: its request, what it is sent, and who it is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import anyio
import pytest

from ecdysis_async._ipc.peer import wait_for_death
from ecdysis_async._management import control_connection
from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._management.control_connection import ClientGone, ControlConnection


@contextlib.contextmanager
def a_client() -> Iterator[tuple[ControlConnection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ControlConnection(ours), theirs


async def test_a_request_comes_in_pieces(backend: str) -> None:
    with a_client() as (connection, client), anyio.fail_after(60):
        requests: list[object] = []

        async def receive() -> None:
            requests.append(await connection.receive())

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(receive)
            client.send(b'{"command": ')
            await anyio.wait_all_tasks_blocked()
            client.send(b'"status"}\nrest')
    assert requests == [{"command": "status"}]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", ClientGone),
        (b"no JSON\n", ValueError),
        (b"[" * 60000, ValueError),
        (b"x" * (control_connection.MAX_REQUEST_BYTES + 1), ValueError),
    ],
    ids=["nothing", "no JSON", "too deep", "too long"],
)
async def test_what_is_no_request(backend: str, data: bytes, error: type[Exception]) -> None:
    with a_client() as (connection, client), anyio.fail_after(60):

        async def send() -> None:
            await anyio.to_thread.run_sync(client.sendall, data)
            client.shutdown(socket.SHUT_WR)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(send)
            with pytest.raises(error):
                await connection.receive()


async def test_each_message_is_a_line(backend: str) -> None:
    with a_client() as (connection, client), anyio.fail_after(60):
        await connection.send("phase", waiting_for="a client\nthat reads")
        await connection.send("done")
        lines = client.recv(4096).decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "phase", "waiting_for": "a client\nthat reads"},
        {"event": "done"},
    ]


async def test_who_has_left_hears_nothing(backend: str) -> None:
    with a_client() as (connection, client), anyio.fail_after(60):
        assert not connection.has_left()
        client.close()
        assert connection.has_left()
        with pytest.raises(ClientGone):
            await connection.send("done")
        with socket.socket() as passed, pytest.raises(ClientGone):
            connection.send_with(passed, "accepted")


async def test_a_socket_travels_with_the_first_message(backend: str) -> None:
    with a_client() as (connection, client), socket.socket() as passed:
        connection.send_with(passed, "accepted", pid=1)
        line, [descriptor], _, _ = socket.recv_fds(client, 4096, 1)
        assert json.loads(line) == {"event": "accepted", "pid": 1}
        assert os.path.sameopenfile(descriptor, passed.fileno())
        os.close(descriptor)


@pytest.mark.parametrize("kernel_knows", [True, False])
async def test_who_is_at_the_other_end(backend: str, monkeypatch: pytest.MonkeyPatch, *, kernel_knows: bool) -> None:
    if not kernel_knows:
        monkeypatch.setattr(control_connection, "SO_PEERPIDFD", 9999)
    with a_client() as (connection, _):
        assert ControlAccess().admits(connection.sock)
        pid, pidfd = connection.identify()
        assert pid == os.getpid()
        try:
            with anyio.move_on_after(0) as scope:
                await wait_for_death(pidfd)
            assert scope.cancelled_caught
        finally:
            os.close(pidfd)
