"""One connection of a client that takes note of everything."""

from __future__ import annotations

import asyncio

import pytest

from ecdysis_async._proving.http_client import HttpConnection
from ecdysis_async._proving.plan import Kind, Shape, Url
from ecdysis_async._proving.records import Connection
from tests.proving.faulty_server import faulty_server

pytestmark = pytest.mark.backends("asyncio", "uvloop")

PATIENCE_SECONDS = 60


class CancelledOnceConnected(HttpConnection):
    """Its opening is called off in the moment in which the connection is made."""

    opening: asyncio.Task[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.opening.cancel()


async def test_it_closes_though_its_opening_was_called_off_when_it_was_connected() -> None:
    """Ctrl-C, or the end of a client's patience, at that moment: uvloop does not say that the connection is lost."""
    async with faulty_server() as (_, url):
        channel = CancelledOnceConnected(Connection(0, Kind.NEW, 0.0), lambda: 0.0, None)
        channel.opening = asyncio.create_task(channel.open(Url(url.scheme, url.host, url.port), Shape(Kind.NEW, "/")))
        with pytest.raises(asyncio.CancelledError):
            await channel.opening
        async with asyncio.timeout(PATIENCE_SECONDS):
            await channel.close()
