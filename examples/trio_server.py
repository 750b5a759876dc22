"""An echo server on trio, with trio's own streams.

Start it: ``python examples/trio_server.py``. Talk to it: ``nc 127.0.0.1 8000``. Restart it: ``kill -HUP PID``, with the
PID that its log says.
"""

import logging
import os

import trio

from ecdysis_async import Ecdysis, current, until_draining
from ecdysis_async.trio_listeners import TrioListener


async def handle(stream: trio.SocketStream) -> None:
    ecdysis = current()
    while chunk := await until_draining(stream.receive_some()):
        leaving = ecdysis.draining.is_set()
        answer = b"%s from generation %d: %s" % (b"bye" if leaving else b"hello", ecdysis.generation, chunk)
        await stream.send_all(answer)
        if leaving:
            return


async def main() -> None:
    async with Ecdysis() as ecdysis, trio.open_nursery() as nursery:
        listener = TrioListener(ecdysis.listen_tcp("127.0.0.1", int(os.environ.get("PORT", "8000"))))
        nursery.start_soon(ecdysis.serve, handle, listener)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main)
