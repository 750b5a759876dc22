"""The application that every Python server of ``peers`` serves: each answer begins with the release that gives it.

A release is what ``RELEASE_FILE`` says when this is imported, which takes ``IMPORT_SECONDS``, as real ones do.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

RELEASE = Path(os.environ["RELEASE_FILE"]).read_text()
if RELEASE == "broken":
    raise RuntimeError("a release that does not start")
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
        # A server on trio has imported it by now, and no other one has.
        await sys.modules.get("trio", asyncio).sleep(float(command[1]))
    # A proxy says which release it is, where it is the proxy that restarts.
    release = dict(scope["headers"]).get(b"x-release", RELEASE.encode()).decode()
    body = f"{release} {text}".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
