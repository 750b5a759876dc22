"""A service whose later generations fail while they take over connections, each in its own way.

It answers each line with its generation and with the number of the line, over all generations. The second generation
takes half of what it is offered, when the file "go" is there; the third has room for some more, until the file "room"
is there; the fourth kills itself with its second batch in its hands.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import anyio

import ecdysis_async
from ecdysis_async import Ecdysis, current
from ecdysis_async._connections.parcel import Refused
from ecdysis_async._connections.receiver import RESERVE_AT_LEAST, Delivery, Receiver
from ecdysis_async._service import restarts
from ecdysis_async.transfer import Release, Transferable

log = logging.getLogger(__name__)

# What the third generation has room for at first.
ROOM = 30


class Lines(asyncio.Protocol, Transferable):
    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for _ in lines:
            self.count += 1
            self.transport.write(b"%d %d\n" % (current().generation, self.count))

    def release_connection(self) -> Release:
        return Release(self.count, self.received)


class Faulty(Receiver):
    """A receiver that does as its generation says."""

    batches = 0

    async def _accept(self, delivery: Delivery) -> Any:
        self.batches += 1
        if current().generation == 2:
            log.info("a batch has come")
            await exists("go")
        return await super()._accept(delivery)

    async def _answer(self, message: bytes) -> None:
        if current().generation == 4 and self.batches == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._answer(message)


async def exists(name: str) -> None:
    while not Path(name).exists():  # noqa: ASYNC110 - a test has no better way to say it
        await anyio.sleep(0.005)


resumed = 0


def resume(count: int) -> Lines:
    global resumed
    resumed += 1
    if current().generation == 2 and resumed % 2:
        raise Refused("only half of them")
    return Lines(count)


async def make_room() -> None:
    used = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + RESERVE_AT_LEAST + ROOM, limits[1]))
    await exists("room")
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def main() -> None:
    vars(restarts)["Receiver"] = Faulty
    async with (
        anyio.create_task_group() as task_group,
        Ecdysis(probation=0.05, drain_timeout=30) as ecdysis,
    ):
        await ecdysis.create_server(Lines, "127.0.0.1", 0, name="lines", resume=resume)
        if ecdysis.generation == 3:
            task_group.start_soon(make_room)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
