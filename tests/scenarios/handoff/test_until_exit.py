"""A listener that serves to the exit: health and metrics are asked most while a service is on its way out."""

from __future__ import annotations

import asyncio

import pytest

from ecdysis_async import Ecdysis
from ecdysis_async._accepting.asyncio_servers import GatedServer


@pytest.mark.backends("asyncio", "uvloop")
async def test_it_answers_while_the_others_drain(backend: str) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.set()
        writer.write(await reader.readline())
        writer.close()

    async def health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"draining" if ecdysis.draining.is_set() else b"ready")
        writer.close()

    async def ask(address: tuple[str, int]) -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    held = asyncio.Event()
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        holding = await ecdysis.start_server(hold, "127.0.0.1", 0)
        healthy = await ecdysis.start_server(health, "127.0.0.1", 0, until="exit")
        assert isinstance(holding, GatedServer)
        assert isinstance(healthy, GatedServer)
        await ecdysis.ready()
        address = healthy.sockets[0].getsockname()
        assert await ask(address) == b"ready"
        reader, writer = await asyncio.open_connection(*holding.sockets[0].getsockname())
        await held.wait()
        ecdysis.stop()
        await ecdysis.finished()
        for _ in range(3):
            assert await ask(address) == b"draining"
        assert (holding.is_serving(), healthy.is_serving()) == (False, True)
        writer.write(b"go on\n")
        assert await reader.readline() == b"go on\n"
        writer.close()
        await writer.wait_closed()
    assert not healthy.is_serving()
