"""What ``ecdysis run`` serves here: the example that counts the messages of a WebSocket, and an echo over HTTP."""

from __future__ import annotations

from typing import Any

from ecdysis_async import current
from examples import websocket_echo


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await websocket_echo.app(scope, receive, send)
        return
    body = f"{current().generation} {scope['path'].removeprefix('/echo/')}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
