"""Which connections of a server move that shows nothing of its own: the kernel tells whether they were read from."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from ecdysis_async._accepting.asyncio_servers import create_server
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.parcel import Refused, Release
from ecdysis_async.servers._protocols.http import IDLE, UnreadOnly, will_move
from tests.accepting.serving import LOCALHOST, Echo, a_client, an_open_plane, answers

pytestmark = pytest.mark.backends("asyncio", "uvloop")


class Accepted:
    """Stands for a connection, as far as its descriptor goes."""

    def __init__(self, sock: socket.socket) -> None:
        self.fileno = sock.fileno


def is_packed(sock: socket.socket) -> bool:
    accepted: Any = Accepted(sock)
    return UnreadOnly(Echo).pack(accepted, None) is not None


def test_a_connection_moves_until_it_is_read_from() -> None:
    with socket.create_server((LOCALHOST, 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        sock, _ = listener.accept()
        with sock:
            assert is_packed(sock)
            client.send(b"waits in the kernel")
            sock.recv(1, socket.MSG_PEEK)
            assert is_packed(sock)
            sock.recv(1)
            assert not is_packed(sock)


def test_a_connection_of_a_unix_socket_does_not_move() -> None:
    """The kernel does not count what is read of one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not is_packed(ours)


async def test_another_kind_of_connection_is_refused() -> None:
    strategy = UnreadOnly(Echo)
    assert isinstance(strategy.resume(Release(kind=IDLE)), Echo)
    with pytest.raises(Refused, match="of the kind 'another'"):
        strategy.resume(Release(kind="another"))


async def test_a_connection_that_has_answered_does_not_move_with_a_server_that_shows_nothing() -> None:
    moving: list[bool] = []

    class Asks(Echo):
        def data_received(self, data: bytes) -> None:
            current_connection.set(plane.tracker.connections()[0])
            moving.append(will_move())
            super().data_received(data)

    class Knows(UnreadOnly):
        moves_between_requests = True

    async with an_open_plane() as plane:
        plane.tracker.moves = True
        server = await create_server(plane, Asks, LOCALHOST, 0)
        with a_client(server) as client:
            for transfer in (None, UnreadOnly(Asks), Knows(Asks)):
                server.adapt(transfer=transfer)
                assert await answers(client)
        assert moving == [False, False, True]
