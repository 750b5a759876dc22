"""A line server that counts, and whose connections go on in the next generation, each with its number.

Start it: ``python examples/moving_counter.py``. Talk to it: ``nc 127.0.0.1 8000``. Restart it: ``kill -HUP PID``, with
the PID that its log says. Once the restart has settled, the same connection is answered by the next generation.
"""

import asyncio
import logging
import os

import ecdysis_async
from ecdysis_async import DrainInterrupt, Ecdysis, current, until_draining


async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int = 0) -> None:
    while True:
        try:
            line = await until_draining(reader.readline())
        except DrainInterrupt:
            # It raises DrainInterrupt where the connection has moved, or has to end; else it is served on.
            await current().transfer(number)
            continue
        if not line:
            break
        number += 1
        writer.write(b"%d from generation %d\n" % (number, current().generation))
        await writer.drain()
    writer.close()


async def main() -> None:
    async with Ecdysis(probation=0.5) as ecdysis:
        # In the next generation: count(reader, writer, number).
        await ecdysis.start_server(count, "127.0.0.1", int(os.environ.get("PORT", "8000")), resume=count)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
