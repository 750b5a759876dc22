"""What the services of these tests serve, one of each kind: everything answers ``ok``, or echoes."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio

from ecdysis_async import DrainInterrupt, Ecdysis


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """Answer with ``ok``, or with what the path asks for of the scope."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    match scope["path"].removeprefix(scope.get("root_path", "")):
        case "/scope":
            fields = (
                scope["http_version"],
                scope["scheme"],
                scope["client"] and scope["client"][0],
                scope["root_path"],
            )
            body = " ".join(map(str, fields))
        case _:
            body = "ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


def make_aiohttp() -> Any:
    """Make an application, as the factory that ``--factory`` wants."""
    # Not above: it would take half of each start of the others.
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.scheme} {request.remote}" if request.path == "/scope" else "ok")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return app


async def echo(websocket: Any) -> None:
    """Echo, as a handler of websockets."""
    async for message in websocket:
        await websocket.send(message)


async def main(ecdysis: Ecdysis) -> None:
    """Echo lines on a port of its own."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await ecdysis.until_draining(reader.readline()):
                writer.write(line)
        except DrainInterrupt:
            pass
        finally:
            writer.close()

    await ecdysis.start_server(handle, "127.0.0.1", 0)
    await ecdysis.serve_forever()


async def main_on_trio(ecdysis: Ecdysis) -> None:
    """Echo on a port of its own, by anyio's streams."""

    async def handle(stream: Any) -> None:
        try:
            while True:
                await stream.send(await ecdysis.until_draining(stream.receive()))
        except (DrainInterrupt, anyio.EndOfStream):
            pass

    listener = ecdysis.listen_tcp("127.0.0.1", 0)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(ecdysis.serve, handle, listener)
        await ecdysis.serve_forever()
