"""An application of aiohttp: a page, and a WebSocket that says goodbye by itself."""

import os

from aiohttp import WSMsgType, web


async def index(request: web.Request) -> web.Response:
    return web.Response(text=f"process {os.getpid()}")


async def echo(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        if message.type == WSMsgType.TEXT:
            await websocket.send_str(message.data)
    return websocket


def create_app() -> web.Application:
    app = web.Application()
    app.add_routes([web.get("/", index), web.get("/echo", echo)])
    return app
