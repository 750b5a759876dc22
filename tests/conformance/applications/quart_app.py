"""Quart: pages, and a WebSocket that echoes."""

from quart import Quart, websocket

app = Quart(__name__)


@app.get("/")
async def index():
    return "ok"


@app.websocket("/ws")
async def echo():
    while True:
        await websocket.send(await websocket.receive())
