"""The line server with an admin endpoint: ``curl -X POST 127.0.0.1:8001`` restarts it and answers how that went.

Start it: ``python examples/admin_server.py``. Talk to it: ``nc 127.0.0.1 8000``. Then put a mistake into this file and
restart it: the answer is the traceback, and the old generation goes on as if nothing had been asked.
"""

import asyncio
import logging
import os

import ecdysis_async
from ecdysis_async import Ecdysis, RestartError, current, until_draining


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    while line := await until_draining(reader.readline()):
        leaving = ecdysis.draining.is_set()
        writer.write(b"%s from generation %d: %s" % (b"bye" if leaving else b"hello", ecdysis.generation, line))
        if leaving:
            break
        await writer.drain()
    writer.close()


async def administer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ecdysis = current()
    request = await until_draining(reader.readuntil(b"\r\n\r\n"))
    status, answer = "405 Method Not Allowed", "POST restarts the service"
    if request.startswith(b"POST "):
        try:
            status, answer = "200 OK", str(await ecdysis.restart())
        except RestartError as error:
            status, answer = "503 Service Unavailable", str(error)
    writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{answer}\n".encode())
    writer.close()


async def main() -> None:
    async with Ecdysis() as ecdysis:
        await ecdysis.start_server(handle, "127.0.0.1", int(os.environ.get("PORT", "8000")))
        await ecdysis.start_server(administer, "127.0.0.1", int(os.environ.get("ADMIN_PORT", "8001")), name="admin")
        await ecdysis.serve_forever()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
