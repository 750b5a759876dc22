"""Litestar: pages, and a WebSocket that echoes."""

from litestar import Litestar, get
from litestar.handlers import websocket_listener


@get("/", media_type="text/plain")
async def index() -> str:
    return "ok"


@websocket_listener("/ws")
async def echo(data: str) -> str:
    return data


app = Litestar([index, echo])
