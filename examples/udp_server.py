"""An echo server for UDP: each datagram is answered by exactly one generation, and none is lost in between.

Start it: ``python examples/udp_server.py``. Talk to it: ``nc -u 127.0.0.1 8000``. Restart it: ``kill -HUP PID``, with
the PID that its log says.
"""

import asyncio
import logging
import os
from typing import cast

import ecdysis_async
from ecdysis_async import Ecdysis, current


class EchoProtocol(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.transport.sendto(b"generation %d: %s" % (current().generation, data), address)


async def main() -> None:
    async with Ecdysis() as ecdysis:
        address = ("127.0.0.1", int(os.environ.get("PORT", "8000")))
        await ecdysis.create_datagram_endpoint(EchoProtocol, local_addr=address)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
