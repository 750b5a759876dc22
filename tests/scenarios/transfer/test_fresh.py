"""Connections that nobody has read from move with every server, before their first request is there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.servers.clients import HOST, read_head
from tests.scenarios.servers.harness import PATIENCE_SECONDS, find_blemishes, running

pytestmark = pytest.mark.main_python_only

SETTINGS = {"probation": 0.02, "drain_timeout": 5}

CLIENTS = 20


@pytest.mark.parametrize(
    ("server", "loop"),
    [
        ("hypercorn-moving", "asyncio"),
        ("hypercorn-moving", "uvloop"),
        ("aiohttp-moving", "asyncio"),
        ("aiohttp-moving", "uvloop"),
    ],
)
def test_fresh_connections_move(server: str, loop: str, tmp_path: Path) -> None:
    asyncio.run(move_fresh_ones(server, loop, tmp_path))


async def move_fresh_ones(server: str, loop: str, directory: Path) -> None:
    async with running(server, loop, directory, settings=SETTINGS, is_main=True) as service:
        streams = [await asyncio.open_connection(HOST, service.port) for _ in range(CLIENTS)]
        # Accepted by the first generation: it answers one that came after them.
        assert (await service.restart()).get("outcome") == "settled"
        await service.wait_for_ends(1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            for reader, writer in streams:
                writer.write(b"GET /echo/hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
                headers = await read_head(reader)
                assert await reader.readexactly(int(headers["content-length"])) == b"2 hello"
                writer.close()
    report = service.reports[service.pids[0]]
    assert report is not None
    assert report.drain.transferred == CLIENTS
    assert find_blemishes(directory) == []
