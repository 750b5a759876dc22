"""A line server that restarts without losing a connection.

Start it: ``python examples/line_server.py``. Talk to it: ``nc 127.0.0.1 8000``. Its log says the PID: ``kill -HUP PID``
puts a new generation in its place. Once that has settled, five seconds later, those who are still connected to the
old one get a last answer, and a goodbye with it.
"""

import asyncio
import logging
import os

import ecdysis_async
from ecdysis_async import Ecdysis, current, until_draining


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    while line := await until_draining(reader.readline()):
        # The goodbye is part of the answer: after one without it, the client's next line may be on its way.
        leaving = ecdysis.draining.is_set()
        writer.write(b"%s from generation %d: %s" % (b"bye" if leaving else b"hello", ecdysis.generation, line))
        if leaving:
            break
        await writer.drain()
    writer.close()


async def main() -> None:
    async with Ecdysis() as ecdysis:
        await ecdysis.start_server(handle, "127.0.0.1", int(os.environ.get("PORT", "8000")))
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
