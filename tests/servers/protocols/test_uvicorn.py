"""Which of uvicorn's protocols can move, and that all of them know their connection."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ecdysis_async._accepting.asyncio_servers import create_server
from ecdysis_async._connections.connection import Connection, current_connection
from ecdysis_async.servers._protocols.http import UnreadOnly
from ecdysis_async.servers._protocols.uvicorn import UvicornTransfer, choose_transfer, keep_context, make_movable
from tests.accepting.serving import LOCALHOST, Echo, a_client, an_open_plane, answers


@pytest.mark.parametrize("known", [H11Protocol, HttpToolsProtocol])
def test_protocols_of_which_it_is_known_whether_they_are_idle_move_between_requests(
    known: type[asyncio.Protocol],
) -> None:
    assert type(choose_transfer(Echo, make_movable(keep_context(known)))) is UvicornTransfer


def test_other_protocols_move_until_they_are_read_from() -> None:
    assert make_movable(Echo) is Echo
    assert type(choose_transfer(Echo, Echo)) is UnreadOnly


@pytest.mark.backends("asyncio", "uvloop")
async def test_a_protocol_handles_its_data_in_the_context_of_its_connection() -> None:
    seen: list[Connection | None] = []

    class Asks(Echo):
        def data_received(self, data: bytes) -> None:
            seen.append(current_connection.get())
            super().data_received(data)

    async with an_open_plane() as plane:
        server = await create_server(plane, keep_context(Asks), LOCALHOST, 0)
        with a_client(server) as first, a_client(server) as second:
            assert await answers(first)
            assert await answers(second)
            assert seen == list(plane.tracker.connections())
    assert current_connection not in contextvars.copy_context()
