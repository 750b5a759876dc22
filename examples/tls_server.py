"""The line server on TLS: a restart is how it takes up a renewed certificate.

Start it: ``python examples/tls_server.py CERTIFICATE.pem KEY.pem``. Talk to it: ``openssl s_client -connect
127.0.0.1:8000``. Write a new certificate to the same paths and ``kill -HUP PID``, with the PID that its log says: new
connections get the new one, and those that are open go on with the old one.
"""

import asyncio
import logging
import os
import ssl
import sys

import ecdysis_async
from ecdysis_async import Ecdysis, current, until_draining


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    while line := await until_draining(reader.readline()):
        leaving = ecdysis.draining.is_set()
        writer.write(b"%s from generation %d: %s" % (b"bye" if leaving else b"hello", ecdysis.generation, line))
        if leaving:
            break
        await writer.drain()
    writer.close()


async def main() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certfile=sys.argv[1], keyfile=sys.argv[2])
    async with Ecdysis() as ecdysis:
        await ecdysis.start_server(handle, "127.0.0.1", int(os.environ.get("PORT", "8000")), ssl=context)
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
