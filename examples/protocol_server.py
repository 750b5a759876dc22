"""The line server as an ``asyncio.Protocol``: for those who build parsers of their own.

Start it: ``python examples/protocol_server.py``. Talk to it: ``nc 127.0.0.1 8000``. Restart it: ``kill -HUP PID``, with
the PID that its log says. A connection that stays silent is closed shortly before the drain's deadline.
"""

import asyncio
import logging
import os
from typing import cast

import ecdysis_async
from ecdysis_async import Ecdysis, current


class LineProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        ecdysis = current()
        *lines, self.rest = (self.rest + data).split(b"\n")
        leaving = ecdysis.draining.is_set()
        for line in lines:
            answer = b"%s from generation %d: %s\n" % (b"bye" if leaving else b"hello", ecdysis.generation, line)
            self.transport.write(answer)
        if lines and leaving:
            self.transport.close()


async def main() -> None:
    async with Ecdysis() as ecdysis:
        await ecdysis.create_server(LineProtocol, "127.0.0.1", int(os.environ.get("PORT", "8000")))
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
