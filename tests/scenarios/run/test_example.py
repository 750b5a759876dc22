"""The example of an ASGI application does what it says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.scenarios.run.harness import PROJECT, by_tcp, get, running
from tests.scenarios.servers.clients import read_head

pytestmark = pytest.mark.main_python_only


def test_a_stream_of_events_ends_well(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, "asgi_app:app", "--app-dir", str(PROJECT / "examples"), "--port", "0") as run:
            port = await run.find_port()
            before = await get(by_tcp(port))
            reader, writer = await by_tcp(port)()
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await read_head(reader)
            assert b"data: process" in await reader.readuntil(b"\n\n")
            code, output = await run.restart("--until", "drained")
            assert code == 0, output
            assert (await reader.read()).endswith(b"event: leaving\ndata: come back\n\n\r\n0\r\n\r\n")
            writer.close()
            after = await get(by_tcp(port))
            assert before.startswith("hello from process ") and after.startswith("hello from process ")
            assert before != after

    asyncio.run(test())
