"""The service of ``websocket_service.py`` by the library websockets."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async.servers.websockets import serve, transfer_of


async def handle(websocket: ServerConnection) -> None:
    assert websocket.request is not None
    transfer = transfer_of(websocket)
    count = transfer.inherited or 0
    if websocket.request.path == "/no-json":
        transfer.offer(object())
    elif websocket.request.path != "/silent":
        transfer.offer(lambda: count)
    async for _ in websocket:
        count += 1
        await websocket.send(f"{current().generation} {count}")


def turn_away(websocket: ServerConnection, request: Request) -> Response | None:
    if request.path == "/turned-away" and transfer_of(websocket).inherited is not None:
        return websocket.respond(403, "not here")
    return None


def select_subprotocol(websocket: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return offered[min(current().generation, len(offered)) - 1] if offered else None


async def main() -> None:
    async with Ecdysis(probation=0.05, drain_timeout=4) as ecdysis:
        await serve(ecdysis, handle, "127.0.0.1", 0, process_request=turn_away, select_subprotocol=select_subprotocol)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
