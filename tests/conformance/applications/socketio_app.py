"""Socket.IO beside pages; an event is answered by what it brought."""

import socketio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

sio = socketio.AsyncServer(async_mode="asgi")


@sio.event
async def echo(sid, data):
    return data


async def index(request):
    return PlainTextResponse("ok")


app = socketio.ASGIApp(sio, Starlette(routes=[Route("/", index)]))
