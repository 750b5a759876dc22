"""Services with one fault each, and one without, to be proved."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

from ecdysis_async import Ecdysis

LOSS = 100
SLOW_SECONDS = 0.6


async def answer(send: Any, status: int = 200, body: bytes = b"ok") -> None:
    """Answer a request."""
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Any, send: Any) -> None:
    """Start and stop."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def good(scope: Any, receive: Any, send: Any) -> None:
    """Answer everything, and echo what a WebSocket says."""
    match scope["type"]:
        case "lifespan":
            await lifespan(receive, send)
        case "http":
            await answer(send)
        case "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})


class Lossy:
    """Loses one request in a hundred."""

    def __init__(self) -> None:
        self._requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve."""
        if scope["type"] != "http":
            await good(scope, receive, send)
            return
        self._requests += 1
        await answer(send, 500 if self._requests % LOSS == 0 else 200)


lossy = Lossy()


async def slower(scope: Any, receive: Any, send: Any) -> None:
    """Answer, and more slowly in each process but the first."""
    if scope["type"] != "http":
        await good(scope, receive, send)
        return
    if Path(os.environ["FIRST"]).read_text() != str(os.getpid()):
        await asyncio.sleep(SLOW_SECONDS)
    await answer(send)


def make_slower() -> Any:
    """Make the former, and note which process is the first."""
    with contextlib.suppress(FileExistsError), Path(os.environ["FIRST"]).open("x") as file:
        file.write(str(os.getpid()))
    return slower


async def hasty(ecdysis: Ecdysis) -> None:
    """Speak HTTP, and close what is idle as soon as this generation shall leave."""
    idle: set[asyncio.StreamWriter] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                idle.add(writer)
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                idle.discard(writer)
                length = next((line[15:] for line in head.split("\r\n") if line.startswith("content-length:")), "0")
                await reader.readexactly(int(length))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        idle.discard(writer)
        writer.close()

    async def close_idle() -> None:
        await ecdysis.draining.wait()
        for writer in idle:
            writer.close()

    await ecdysis.start_server(handle, "127.0.0.1", 0)
    closing = asyncio.create_task(close_idle())
    await ecdysis.serve_forever()
    await closing
