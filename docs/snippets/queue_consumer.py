"""A consumer that finishes the job in hand, and leaves the next one to the next process."""

import os

import anyio

from ecdysis_async import exclusive, track


async def next_job():
    await anyio.sleep(0.1)
    return "job"


async def consume():
    async with exclusive("consumer"):
        while True:
            job = await next_job()
            with anyio.CancelScope(shield=True):
                async with track():
                    await anyio.sleep(0.5)
                    print("done", job, "by", os.getpid(), flush=True)


async def main(ecdysis):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await ecdysis.serve_forever()
