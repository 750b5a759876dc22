"""An ASGI application without a framework, whose stream of events ends well at each restart.

Start it, listen to its events, and restart it meanwhile::

    ecdysis run asgi_app:app --app-dir examples
    curl http://127.0.0.1:8000/events
    ecdysis restart
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(f"{scope['type']} is not spoken here")
    if scope["path"] == "/events":
        await send_events(scope["state"]["ecdysis.draining"], send)
    else:
        body = f"hello from process {os.getpid()}\n".encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def send_events(draining: anyio.Event, send: Send) -> None:
    """Send the time of each second, until this process is to leave: clients come back to the next one."""
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while not draining.is_set():
        event = f"data: process {os.getpid()} at {anyio.current_time():.0f}\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        with anyio.move_on_after(1):
            await draining.wait()
    await send({"type": "http.response.body", "body": b"event: leaving\ndata: come back\n\n"})
