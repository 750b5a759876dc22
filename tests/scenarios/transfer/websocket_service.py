"""A service whose WebSockets do as their path says: they move, or cannot."""

from __future__ import annotations

import logging
from typing import Any

import uvicorn

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async.servers.uvicorn import serve


async def app(scope: Any, receive: Any, send: Any) -> None:
    transfer = scope["state"]["ecdysis.transfer"]
    count, path = transfer.inherited or 0, scope["path"]
    if path == "/turned-away" and transfer.inherited is not None:
        await send({"type": "websocket.close"})
        return
    if path == "/broken" and transfer.inherited is not None:
        raise ValueError("this one breaks when it is resumed")
    await receive()
    accept: dict[str, Any] = {"type": "websocket.accept"}
    if scope["subprotocols"]:
        # One that the next release does not speak any more, or speaks as well.
        accept["subprotocol"] = scope["subprotocols"][0 if path == "/same" else current().generation - 1]
    await send(accept)
    while True:
        if path == "/no-json":
            transfer.offer(object())
        elif path != "/silent":
            transfer.offer(count)
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        count += 1
        await send({"type": "websocket.send", "text": f"{current().generation} {count}"})


async def main() -> None:
    config = uvicorn.Config(app, port=0, ws="websockets-sansio", lifespan="off", log_config=None)
    async with Ecdysis(probation=0.05, drain_timeout=4) as ecdysis:
        await serve(ecdysis, config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
