"""An application of Litestar, with a task that is passed on at a restart."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from litestar import Litestar, get

from ecdysis_async import exclusive


@get("/", media_type="text/plain", sync_to_thread=False)
def index() -> str:
    return f"process {os.getpid()}"


async def poll() -> None:
    async with exclusive("poll"):
        while True:
            await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def polling(app: Litestar) -> AsyncIterator[None]:
    task = asyncio.create_task(poll())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


app = Litestar([index], lifespan=[polling])
