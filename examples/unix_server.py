"""The line server on a Unix socket; here silent connections are told good-bye as well.

Start it: ``python examples/unix_server.py``. Talk to it: ``nc -U line.sock``. Restart it: ``kill -HUP PID``, with the
PID that its log says. The path stays the same socket over all generations, and goes when the service is stopped.
"""

import asyncio
import logging
import os

import ecdysis_async
from ecdysis_async import DrainInterrupt, Ecdysis, current, until_draining


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    try:
        while line := await until_draining(reader.readline()):
            leaving = ecdysis.draining.is_set()
            writer.write(b"%s from generation %d: %s" % (b"bye" if leaving else b"hello", ecdysis.generation, line))
            if leaving:
                break
            await writer.drain()
    except DrainInterrupt:
        writer.write(b"bye from generation %d\n" % ecdysis.generation)
    writer.close()


async def main() -> None:
    async with Ecdysis() as ecdysis:
        await ecdysis.start_unix_server(handle, os.environ.get("SOCKET", "line.sock"))
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
