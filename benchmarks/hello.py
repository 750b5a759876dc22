"""What every server of ``steady.py`` serves: the same few bytes. As a program, the bare server of aiohttp."""

from __future__ import annotations

import os
import sys
from typing import Any

BODY = b"Hello, world"

HEADERS = [(b"content-type", b"text/plain"), (b"content-length", str(len(BODY)).encode())]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer each request alike."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def make_aiohttp() -> Any:
    """Return the same of aiohttp."""
    from aiohttp import web

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=BODY, content_type="text/plain")

    application = web.Application()
    application.router.add_get("/", answer)
    return application


def main(port: int) -> None:
    """Serve by aiohttp's own ``run_app``, on uvloop."""
    import uvloop
    from aiohttp import web
    from aiohttp.log import access_logger

    web.run_app(
        make_aiohttp(),
        host="127.0.0.1",
        port=port,
        print=None,
        loop=uvloop.new_event_loop(),
        access_log=None if "--no-access-log" in sys.argv else access_logger,
    )


if __name__ == "__main__":
    main(int(os.environ["PORT"]))
