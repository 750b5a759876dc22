"""ASGI itself: pages, an answer that waits for the next restart, and a WebSocket that echoes texts and bytes."""

import asyncio
import os


async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await echo(receive, send)
    elif scope["type"] == "http":
        body = b"ok"
        if scope["path"] == "/last":
            # `ecdysis run` alone has this: the event that the process drains.
            await scope["state"]["ecdysis.draining"].wait()
        elif scope["path"].startswith("/slow/"):
            _, _, seconds, name = scope["path"].split("/")
            await asyncio.sleep(float(seconds))
            body = f"{os.getpid()} {name}".encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    else:
        raise NotImplementedError(scope["type"])


async def echo(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": message["text"]})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})
