"""The service of these tests: one application, written for ASGI and for aiohttp, and each server's ``main`` for it.

``ecdysis run`` serves ``asgi``, or what ``make_aiohttp`` returns; as a script it serves by a ``main`` of its own.
Each generation writes a line of JSON to stdout when it serves, and one with its report when it has ended. Paths:
``/echo/TEXT``, ``/slow/SECONDS/TEXT``, ``/events`` (ends when the generation leaves), ``/ws`` (echoes), ``/restart``;
for a browser ``/page``, which tells what becomes of its WebSocket by ``/note/TEXT``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from socket import AF_INET
from typing import Any

import anyio

import ecdysis_async
from ecdysis_async import Ecdysis, RestartError
from ecdysis_async._accepting.asyncio_connections import ServerConnection
from ecdysis_async._accepting.gated_socket import AcceptedConnection
from ecdysis_async._connections.connection import current_connection
from ecdysis_async.servers._common import goodbye

TICK_SECONDS = 0.05

# Its notes come one after the other, each with the errors of those before it.
PAGE = """<!doctype html>
<title>A page with a WebSocket</title>
<script>
let notes = Promise.resolve(), errors = "";
function note(text) {
    notes = notes.then(() => fetch("/note/" + text + errors)).catch(error => { errors += " " + error; });
}
function open() {
    const socket = new WebSocket(`ws://${location.host}/ws`);
    socket.onopen = () => socket.send("hello");
    socket.onmessage = event => note(event.data);
    socket.onclose = event => {
        note(`${event.code} ${event.wasClean}`);
        if (event.code === 1012) open();
    };
}
open();
</script>
"""


def tell(**fact: Any) -> None:
    """Write a line that the test reads; one write each, because generations share the pipe."""
    os.write(1, json.dumps({"pid": os.getpid(), **fact}).encode() + b"\n")


def who() -> str:
    return str(ecdysis_async.current().generation)


def directory() -> Path:
    """Where files say what to do."""
    return Path(os.environ["SERVICE_DIRECTORY"])


async def restart() -> str:
    try:
        return json.dumps((await ecdysis_async.current().restart(until="settled")).to_json())
    except RestartError as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


async def respond(path: str) -> str:
    match path.strip("/").split("/"):
        case ["echo", text]:
            return f"{who()} {text}"
        case ["slow", seconds, text]:
            await anyio.sleep(float(seconds))
            return f"{who()} {text}"
        case ["restart"]:
            return await restart()
        case ["page"]:
            return PAGE
        case ["note", text]:
            tell(event="note", text=text)
            return ""
        case ["nodelay"]:
            connection = current_connection.get()
            if isinstance(connection, AcceptedConnection):
                sock = connection._sock()
            else:
                assert isinstance(connection, ServerConnection) and connection.transport is not None
                sock = connection.transport.get_extra_info("socket")
            assert sock is not None
            return str(bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
    return "what?"


def start() -> None:
    if (directory() / "broken").exists():
        raise ArithmeticError("this release is broken")
    if (directory() / "endless").exists():
        goodbye.GRACE_SECONDS = 0.2
    ecdysis = ecdysis_async.current()
    # A thread, because not every loop has tasks that are nobody's.
    threading.Thread(target=tell_serving, args=[ecdysis], daemon=True).start()
    atexit.register(tell_ended, ecdysis)


def tell_serving(ecdysis: Ecdysis) -> None:
    while ecdysis.state is not ecdysis_async.State.SERVING:
        time.sleep(0.001)
    (port,) = [entry.sock.getsockname()[1] for entry in ecdysis._registry.entries if entry.sock.family == AF_INET]
    tell(event="serving", generation=ecdysis.generation, port=port)


def tell_ended(ecdysis: Ecdysis) -> None:
    report = ecdysis.last_report
    tell(event="ended", generation=ecdysis.generation, report=None if report is None else report.to_json())


async def end() -> None:
    tell(event="shutdown", state=ecdysis_async.current().state.value)
    if (directory() / "endless").exists():
        await anyio.sleep_forever()


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """Serve: the application for uvicorn and hypercorn."""
    match scope["type"]:
        case "lifespan":
            await live(receive, send)
        case "websocket":
            await talk(receive, send)
        case "http" if scope["path"] == "/events":
            await stream(scope["state"]["ecdysis.draining"], send)
        case "http":
            while scope["method"] == "POST" and (await receive()).get("more_body"):
                pass
            await answer(scope, send)


async def live(receive: Any, send: Any) -> None:
    await receive()
    start()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await end()
    await send({"type": "lifespan.shutdown.complete"})


async def answer(scope: Any, send: Any) -> None:
    body = (await respond(scope["path"])).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def stream(draining: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while not draining.is_set():
        await send({"type": "http.response.body", "body": b"data: tick\n\n", "more_body": True})
        with anyio.move_on_after(TICK_SECONDS):
            await draining.wait()
    await send({"type": "http.response.body", "body": b"data: bye\n\n"})


async def talk(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{who()} {message['text']}"})


async def serve_by_uvicorn(
    ecdysis: Ecdysis, http: Any = "httptools", ws: Any = "websockets-sansio", *, transfer: bool = False
) -> None:
    import uvicorn

    import ecdysis_async.servers.uvicorn as adapter

    config = uvicorn.Config(
        asgi, port=0, http=http, ws=ws, timeout_keep_alive=600, access_log=False, log_level="warning"
    )
    await adapter.serve(ecdysis, config, transfer=transfer)


async def serve_http_2_by_uvicorn(ecdysis: Ecdysis) -> None:
    import uvicorn

    import ecdysis_async.servers.uvicorn as adapter

    config = uvicorn.Config(
        asgi, port=0, http="zttp", http2=True, timeout_keep_alive=600, access_log=False, log_level="warning"
    )
    await adapter.serve(ecdysis, config)


async def serve_by_hypercorn(ecdysis: Ecdysis, *, transfer: bool = False) -> None:
    from hypercorn.config import Config

    import ecdysis_async.servers.hypercorn as adapter

    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.loglevel = "WARNING"
    config.keep_alive_timeout = 600
    await adapter.serve(ecdysis, asgi, config, transfer=transfer)


async def serve_by_aiohttp(ecdysis: Ecdysis, *, transfer: bool = False) -> None:
    import ecdysis_async.servers.aiohttp as adapter

    await adapter.serve(ecdysis, make_aiohttp(), host="127.0.0.1", port=0, access_log=None, transfer=transfer)


def make_aiohttp() -> Any:
    """Make the application for aiohttp."""
    from aiohttp import WSMsgType, web

    import ecdysis_async.servers.aiohttp as adapter

    async def answer(request: web.Request) -> web.Response:
        text = await respond(request.path)
        return web.Response(text=text, content_type="text/html" if text is PAGE else "text/plain")

    async def stream(request: web.Request) -> web.StreamResponse:
        draining = request.app[adapter.DRAINING]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # its client has heard enough
            while not draining.is_set():
                await response.write(b"data: tick\n\n")
                with anyio.move_on_after(TICK_SECONDS):
                    await draining.wait()
            await response.write(b"data: bye\n\n")
        return response

    async def talk(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        async for message in websocket:
            if message.type is WSMsgType.TEXT:
                with contextlib.suppress(ConnectionError):  # closed over its head
                    await websocket.send_str(f"{who()} {message.data}")
        return websocket

    async def live(app: web.Application) -> None:
        start()

    async def die(app: web.Application) -> None:
        await end()

    app = web.Application()
    app.on_startup.append(live)
    app.on_shutdown.append(die)
    app.router.add_get("/events", stream)
    app.router.add_get("/ws", talk)
    app.router.add_get("/{path:.*}", answer)
    return app


SERVE: dict[str, Callable[[Ecdysis], Awaitable[None]]] = {
    "uvicorn": serve_by_uvicorn,
    "uvicorn-h11": functools.partial(serve_by_uvicorn, http="h11", ws="wsproto"),
    # Their connections move, as far as they can; those of the others take leave.
    "uvicorn-moving": functools.partial(serve_by_uvicorn, transfer=True),
    "uvicorn-h11-moving": functools.partial(serve_by_uvicorn, http="h11", ws="wsproto", transfer=True),
    "hypercorn-moving": functools.partial(serve_by_hypercorn, transfer=True),
    "aiohttp-moving": functools.partial(serve_by_aiohttp, transfer=True),
    "uvicorn-http2": serve_http_2_by_uvicorn,
    "hypercorn": serve_by_hypercorn,
    "aiohttp": serve_by_aiohttp,
}


async def main() -> None:
    server, _, options = sys.argv[1:]
    async with Ecdysis(**json.loads(options)) as ecdysis:
        await SERVE[server](ecdysis)


if __name__ == "__main__":
    warnings.simplefilter("error")
    if sys.argv[2] == "trio":
        import trio

        trio.run(main)
    else:
        ecdysis_async.run(main, loop=sys.argv[2])  # type: ignore[arg-type]
