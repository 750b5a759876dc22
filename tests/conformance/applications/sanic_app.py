"""Sanic as an ASGI application: pages, and a WebSocket that echoes."""

from sanic import Sanic
from sanic.response import text

app = Sanic("grid")


@app.get("/")
async def index(request):
    return text("ok")


@app.websocket("/ws")
async def echo(request, websocket):
    while True:
        await websocket.send(await websocket.recv())
