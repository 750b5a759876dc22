"""A program that loses something at each restart: a task that nobody waits for, and a stash that nobody reads.

The second generation says whether the keys of a WebSocket's scope are there, for the implementation ``WS`` of uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any

import uvicorn
from websockets.asyncio.client import connect

import ecdysis_async
from ecdysis_async import Ecdysis
from ecdysis_async.servers.uvicorn import serve as serve_uvicorn

kept: set[asyncio.Task[None]] = set()


def tell(text: str) -> None:
    os.write(1, text.encode() + b"\n")


async def forgotten() -> None:
    await asyncio.sleep(3600)


async def tracked() -> None:
    async with ecdysis_async.track():
        await asyncio.sleep(0.1)


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        transfer = scope["state"]["ecdysis.transfer"]
        transfer.offer({"offered": True})
        events = [scope["state"][f"ecdysis.{name}"].is_set() for name in ("draining", "settled")]
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": f"{transfer.inherited} {events}"})
        await receive()


async def drive(ecdysis: Ecdysis, port: int) -> None:
    await ecdysis.settled.wait()
    if ecdysis.generation == 1:
        async with connect(f"ws://127.0.0.1:{port}") as websocket:
            tell(str(await websocket.recv()))
        for work in (forgotten, tracked):
            task = asyncio.create_task(work(), name=work.__name__)
            kept.add(task)
            task.add_done_callback(kept.discard)
        await ecdysis.restart("settled")
    else:
        while ecdysis.draining_generations:  # noqa: ASYNC110 - there is no event for that
            await asyncio.sleep(0.01)
        ecdysis.stop()


async def serve(ecdysis: Ecdysis) -> None:
    port = int(os.environ["ARGUMENTS"])
    ecdysis.stash("misspelt", lambda: b"state", at="commit")
    async with asyncio.TaskGroup() as task_group:
        config = uvicorn.Config(application, port=port, ws=os.environ["WS"], lifespan="off", log_config=None)
        task_group.create_task(serve_uvicorn(ecdysis, config))
        task_group.create_task(drive(ecdysis, port))


async def main() -> None:
    async with Ecdysis(probation=0.1, systemd=False) as ecdysis:
        await serve(ecdysis)


if __name__ == "__main__":
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    ecdysis_async.run(main, loop=os.environ["LOOP"])  # type: ignore[arg-type]
