"""A scheduler that one process of the whole service runs at a time, over all workers and restarts."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from ecdysis_async import exclusive


async def run_scheduler() -> None:
    async with exclusive("scheduler"):
        while True:
            with Path("jobs.log").open("a") as log:
                print("a job of process", os.getpid(), file=log)
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(run_scheduler())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


app = FastAPI(lifespan=lifespan)
