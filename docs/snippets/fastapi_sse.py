"""Server-sent events that end when their process leaves; the browser reconnects, to the new process."""

import os
from collections.abc import AsyncIterator

import anyio
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from ecdysis_async import draining

app = FastAPI()


async def make_events() -> AsyncIterator[str]:
    while not draining.is_set():
        yield f"data: process {os.getpid()}\n\n"
        with anyio.move_on_after(1):
            await draining.wait()
    # A browser's EventSource comes back after so many milliseconds.
    yield "retry: 100\n\n"


@app.get("/events")
async def events() -> StreamingResponse:
    return StreamingResponse(make_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
