"""Work that goes on after its answer: a restart waits for what it knows of."""

import asyncio
import os
from pathlib import Path

from fastapi import BackgroundTasks, FastAPI

from ecdysis_async import track

app = FastAPI()
tasks: set[asyncio.Task[None]] = set()


async def send_mail(kind: str) -> None:
    await asyncio.sleep(1)
    with Path("sent.log").open("a") as log:
        print(kind, os.getpid(), file=log)


@app.get("/background")
async def in_background(background: BackgroundTasks) -> str:
    # BackgroundTasks belong to their request: a restart waits for them by itself.
    background.add_task(send_mail, "background")
    return "queued"


async def tracked(kind: str) -> None:
    async with track():
        await send_mail(kind)


@app.get("/task")
async def in_task() -> str:
    # A task of your own is nobody's request: without track() it would be cancelled when its process ends.
    task = asyncio.create_task(tracked("task"))
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return "queued"
