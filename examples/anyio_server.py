"""A line server on anyio.

Start it: ``python examples/anyio_server.py``, or with BACKEND=trio. Talk to it: ``nc 127.0.0.1 8000``. Restart it:
``kill -HUP PID``, with the PID that its log says.
"""

import contextlib
import logging
import os

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from ecdysis_async import Ecdysis, current, until_draining


async def handle(stream: SocketStream) -> None:
    ecdysis = current()
    received = BufferedByteReceiveStream(stream)
    with contextlib.suppress(anyio.IncompleteRead):
        while True:
            line = await until_draining(received.receive_until(b"\n", 65536))
            leaving = ecdysis.draining.is_set()
            answer = b"%s from generation %d: %s\n" % (b"bye" if leaving else b"hello", ecdysis.generation, line)
            await stream.send(answer)
            if leaving:
                return


async def main() -> None:
    async with Ecdysis() as ecdysis, anyio.create_task_group() as task_group:
        listener = ecdysis.listen_tcp("127.0.0.1", int(os.environ.get("PORT", "8000")))
        task_group.start_soon(ecdysis.serve, handle, listener)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    anyio.run(main, backend=os.environ.get("BACKEND", "asyncio"))
