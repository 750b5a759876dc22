"""Socket.IO beside other pages; clients connect anew at a restart, and rejoin their room."""

import os

import socketio

sio = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins=[])


@sio.event
async def connect(sid, environ, auth):
    # What was in the memory of the old process is gone: who joins says which room it was in.
    if auth and "room" in auth:
        await sio.enter_room(sid, auth["room"])


@sio.event
async def say(sid, data):
    await sio.emit("said", f"{data} from {os.getpid()}", room=data.get("room") if isinstance(data, dict) else None)


app = socketio.ASGIApp(sio)
