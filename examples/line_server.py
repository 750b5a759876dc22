"""A line server that restarts without losing a connection.

Start it: ``python examples/line_server.py``. Talk to it: ``nc 127.0.0.1 8000``. Its log says the PID: ``kill -HUP PID``
puts a new generation in its place. Once that has settled, five seconds later, the old one answers a last line and says
bye to those who are still connected.
"""

import asyncio
import logging
import os

import ecdysis_async
from ecdysis_async import Ecdysis, current, until_draining


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    while line := await until_draining(reader.readline()):
        writer.write(b"generation %d: %s" % (ecdysis.generation, line))
        if ecdysis.draining.is_set():
            writer.write(b"bye\n")
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
