"""The application that every server of ``peers.py`` serves: each answer begins with the release that gives it.

A release is what ``RELEASE_FILE`` says when this is imported, which takes ``IMPORT_SECONDS``, as real ones do.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

RELEASE = Path(os.environ["RELEASE_FILE"]).read_text()
time.sleep(float(os.environ["IMPORT_SECONDS"]))


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer ``/echo/TEXT`` at once, and ``/slow/SECONDS/TEXT`` after some time."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    *command, text = scope["path"].strip("/").split("/")
    if command[0] == "slow":
        await asyncio.sleep(float(command[1]))
    body = f"{RELEASE} {text}".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
