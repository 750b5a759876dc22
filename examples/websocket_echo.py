"""An echo server for WebSockets that counts its messages, and loses neither a client nor its count in a restart.

Start it: ``python examples/websocket_echo.py``. Talk to it: ``python -m websockets ws://127.0.0.1:8000``. Restart it:
``kill -HUP PID``, with the PID that its log says. The client stays connected: the application offers its counter, and
the next generation goes on with it.
"""

import logging
import os
from typing import Any

import uvicorn

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async.servers.uvicorn import serve


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "websocket":
        raise ValueError("this example speaks WebSocket only")
    transfer = scope["state"]["ecdysis.transfer"]
    count = transfer.inherited or 0
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        # From here on until the next message has come, this WebSocket can move.
        transfer.offer(count)
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        count += 1
        text = f"{count} from generation {current().generation}: {message.get('text')}"
        await send({"type": "websocket.send", "text": text})


async def main() -> None:
    config = uvicorn.Config(
        app, port=int(os.environ.get("PORT", "8000")), ws="websockets-sansio", lifespan="off", log_config=None
    )
    async with Ecdysis() as ecdysis:
        await serve(ecdysis, config)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
