"""The echo server that counts, by the library websockets: each connection goes on in the next generation.

Start it: ``python examples/websockets_server.py``. Talk to it: ``python -m websockets ws://127.0.0.1:8000``. Restart
it: ``kill -HUP PID``, with the PID that its log says.
"""

import logging
import os

from websockets.asyncio.server import ServerConnection

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async.servers.websockets import serve, transfer_of


async def echo(websocket: ServerConnection) -> None:
    transfer = transfer_of(websocket)
    count = transfer.inherited or 0
    # While it waits for a message, this connection can move; the function is asked for the count of that moment.
    transfer.offer(lambda: count)
    async for message in websocket:
        count += 1
        await websocket.send(f"{count} from generation {current().generation}: {message!s}")


async def main() -> None:
    async with Ecdysis() as ecdysis:
        await serve(ecdysis, echo, "127.0.0.1", int(os.environ.get("PORT", "8000")))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
