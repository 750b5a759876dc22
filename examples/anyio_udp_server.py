"""An echo server for UDP on anyio: what one generation leaves in the socket's queue the next one answers.

Start it: ``python examples/anyio_udp_server.py``, or with BACKEND=trio. Talk to it: ``nc -u 127.0.0.1 8000``. Restart
it: ``kill -HUP PID``, with the PID that its log says.
"""

import contextlib
import logging
import os

import anyio

from ecdysis_async import Ecdysis
from ecdysis_async.anyio_listeners import DatagramListener


async def main() -> None:
    async with Ecdysis() as ecdysis, anyio.create_task_group() as task_group:
        datagrams = DatagramListener(ecdysis.bind_udp("127.0.0.1", int(os.environ.get("PORT", "8000"))))
        task_group.start_soon(ecdysis.serve_forever)
        async for data, address in datagrams:
            with contextlib.suppress(OSError):  # this sender cannot be answered; others can
                await datagrams.send((b"generation %d: %s" % (ecdysis.generation, data), address))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    anyio.run(main, backend=os.environ.get("BACKEND", "asyncio"))
