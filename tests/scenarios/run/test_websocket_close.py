"""`--websocket-close together`: the WebSockets of a room are all told to come back at the beginning of the drain."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from .harness import PATIENCE_SECONDS, running

pytestmark = pytest.mark.main_python_only

APP = """
import os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": str(os.getpid())})
    while (await receive())["type"] != "websocket.disconnect":
        pass
"""

# In this time the clients of a room would be closed one by one otherwise: longer than anything here is waited for.
DRAIN_SECONDS = 10 * PATIENCE_SECONDS

ROOM = 8


@pytest.mark.parametrize("options", [("--server", "uvicorn"), ("--server", "hypercorn", "--loop", "trio")])
def test_a_room_meets_in_the_new_release(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(APP)
    together = ("--websocket-close", "together", "--drain-timeout", f"{DRAIN_SECONDS:g}")

    async def test() -> None:
        async with running(tmp_path, "main:app", "--bind", "127.0.0.1:0", *options, *together) as run:
            uri = f"ws://127.0.0.1:{await run.find_port()}"
            async with contextlib.AsyncExitStack() as stack:
                room = [await stack.enter_async_context(connect(uri)) for _ in range(ROOM)]
                former = {await websocket.recv() for websocket in room}
                code, output = await run.restart()
                assert code == 0, output
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.gather(*(websocket.wait_closed() for websocket in room))
                assert {websocket.close_code for websocket in room} == {1012}
            await run.wait_for(
                rf"the former workers have drained in .*: {ROOM} drained, 0 silent, 0 transferred, 0 cut"
            )
            async with connect(uri) as websocket:
                assert await websocket.recv() not in former

    asyncio.run(test())
